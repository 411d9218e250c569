//! One connection to the application, over which one request follows the other.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::time::Duration;

use super::Ending;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// The longest line, head and body of an answer.
const LINE: u64 = 4096;
const LINES: usize = 64;
const BODY: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    /// Connects; an answer that does not go on within `limit` is an error.
    pub(super) fn connect(front: SocketAddrV4, limit: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&front.into(), CONNECT_LIMIT.min(limit))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Sends a request without a body and reads the answer.
    pub(super) fn ask(&mut self, method: &str, target: &str) -> io::Result<(Ending, String)> {
        let request =
            format!("{method} {target} HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes())?;
        read_answer(&mut self.stream)
    }
}

fn read_answer(from: &mut impl BufRead) -> io::Result<(Ending, String)> {
    let first = line(from)?;
    let status = first
        .split(' ')
        .nth(1)
        .and_then(|word| word.parse::<u16>().ok());
    let status = status.ok_or_else(|| bad("an answer has no status"))?;
    let mut length = None;
    for _ in 0..LINES {
        let line = line(from)?;
        if line.is_empty() {
            let length = length.ok_or_else(|| bad("an answer has no length"))?;
            let mut body = vec![0; length];
            from.read_exact(&mut body)?;
            let ending = if status == 200 {
                Ending::Answered
            } else {
                Ending::Refused
            };
            return Ok((ending, String::from_utf8_lossy(&body).into_owned()));
        }
        let field = line.split_once(':');
        let field = field.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        if let Some((_, value)) = field {
            let value = value.trim().parse().ok().filter(|length| *length <= BODY);
            length = Some(value.ok_or_else(|| bad("an answer is too long"))?);
        }
    }
    Err(bad("an answer's head has too many lines"))
}

fn line(from: &mut impl BufRead) -> io::Result<String> {
    let mut line = Vec::new();
    from.take(LINE).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Err(bad("an answer is cut short"));
    }
    let text = String::from_utf8(line).map_err(|_| bad("an answer's head is no text"))?;
    Ok(text.trim_end_matches('\r').to_owned())
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let text = "HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length: 4\r\n\r\nwellHTTP";
        let (ending, body) = read_answer(&mut text.as_bytes()).unwrap();
        assert_eq!((ending, body.as_str()), (Ending::Answered, "well"));
        let text = "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n";
        assert_eq!(
            read_answer(&mut text.as_bytes()).unwrap().0,
            Ending::Refused
        );
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        for text in [
            "",
            "HTTP/1.1\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        ] {
            assert!(read_answer(&mut text.as_bytes()).is_err(), "{text}");
        }
    }
}
