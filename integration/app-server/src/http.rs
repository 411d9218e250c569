//! As much of HTTP/1.1 as nginx asks of what stands behind it: one request after the other, whose
//! bodies are counted and passed over.

use std::io::{self, BufRead, BufReader, Read, Write};

/// The longest line of a head, and how many there may be.
const LINE: u64 = 4096;
const LINES: usize = 64;
/// The longest body that is passed over.
const BODY: u64 = 1 << 20;

/// How a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Well.
    Ok,
    /// There is no such thing.
    NotFound,
    /// The database did not answer.
    Failed,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `GET` or `POST`.
    pub method: String,
    /// The path, without what follows `?`.
    pub path: String,
    /// The number behind `?id=`, or 0.
    pub id: u64,
}

/// One connection.
#[derive(Debug)]
pub struct Connection<S: Read> {
    stream: BufReader<S>,
}

impl<S: Read + Write> Connection<S> {
    /// Over a stream.
    pub fn new(stream: S) -> Self {
        Self {
            stream: BufReader::new(stream),
        }
    }

    /// The next request; none at the stream's end.
    ///
    /// # Errors
    /// The stream breaks, or what comes is no request.
    pub fn next(&mut self) -> io::Result<Option<Request>> {
        let Some(first) = self.line()? else {
            return Ok(None);
        };
        let mut words = first.split(' ');
        let (Some(method), Some(target)) = (words.next(), words.next()) else {
            return Err(bad("a request line has three words"));
        };
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let id = query.split('&').find_map(|pair| pair.strip_prefix("id="));
        let request = Request {
            method: method.to_owned(),
            path: path.to_owned(),
            id: id
                .map_or(Ok(0), str::parse)
                .map_err(|_| bad("id is no number"))?,
        };
        self.pass_over()?;
        Ok(Some(request))
    }

    /// The rest of the head, and the body.
    fn pass_over(&mut self) -> io::Result<()> {
        let mut length = 0;
        for _ in 0..LINES {
            let line = self.line()?.ok_or(io::ErrorKind::UnexpectedEof)?;
            if line.is_empty() {
                let body = &mut (&mut self.stream).take(length);
                let passed = io::copy(body, &mut io::sink())?;
                return if passed == length {
                    Ok(())
                } else {
                    Err(bad("the body is cut short"))
                };
            }
            let field = line.split_once(':');
            let field = field.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
            if let Some((_, value)) = field {
                let value = value.trim().parse().ok().filter(|length| *length <= BODY);
                length = value.ok_or_else(|| bad("a body is too long"))?;
            }
        }
        Err(bad("a head has too many lines"))
    }

    fn line(&mut self) -> io::Result<Option<String>> {
        let mut line = Vec::new();
        (&mut self.stream).take(LINE).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        if line.pop() != Some(b'\n') {
            return Err(bad("a line is too long or cut short"));
        }
        let text = String::from_utf8(line).map_err(|_| bad("a head is no text"))?;
        Ok(Some(text.trim_end_matches('\r').to_owned()))
    }

    /// Answers the last request.
    ///
    /// # Errors
    /// The stream breaks.
    pub fn reply(&mut self, status: Status, body: &[u8]) -> io::Result<()> {
        let status = match status {
            Status::Ok => "200 OK",
            Status::NotFound => "404 Not Found",
            Status::Failed => "502 Bad Gateway",
        };
        let mut whole = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        whole.extend_from_slice(body);
        self.stream.get_mut().write_all(&whole)
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is read comes from `input`, what is written goes to `output`.
    struct Pipe<'a> {
        input: &'a [u8],
        output: Vec<u8>,
    }

    impl Read for Pipe<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.input.read(buffer)
        }
    }

    impl Write for Pipe<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.output.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn connection(input: &str) -> Connection<Pipe<'_>> {
        Connection::new(Pipe {
            input: input.as_bytes(),
            output: Vec::new(),
        })
    }

    #[test]
    fn requests_follow_each_other() {
        let text = "GET /home HTTP/1.1\r\nHost: x\r\n\r\n\
                    POST /add?x=1&id=17 HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc";
        let mut connection = connection(text);
        let first = connection.next().unwrap().unwrap();
        assert_eq!(
            (first.method.as_str(), first.path.as_str(), first.id),
            ("GET", "/home", 0)
        );
        connection.reply(Status::Ok, b"well").unwrap();
        let said = String::from_utf8(connection.stream.get_ref().output.clone()).unwrap();
        assert!(said.starts_with("HTTP/1.1 200 OK\r\n") && said.ends_with("\r\n\r\nwell"));
        let second = connection.next().unwrap().unwrap();
        assert_eq!((second.path.as_str(), second.id), ("/add", 17));
        assert_eq!(connection.next().unwrap(), None);
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let long = "x".repeat(5000);
        for text in [
            "GET\r\n\r\n",
            "GET /a?id=b HTTP/1.1\r\n\r\n",
            "GET /a HTTP/1.1\r\n",
            "POST /a HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc",
            "POST /a HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
            &long,
        ] {
            assert!(connection(text).next().is_err(), "{text}");
        }
    }
}
