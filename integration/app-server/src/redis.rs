//! As much of redis' protocol as the application needs, and connections that are used again.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A database that is silent for so long has failed.
const SILENCE: Duration = Duration::from_secs(60);
/// The longest line and value of a reply.
const LINE: u64 = 1024;
const VALUE: usize = 1 << 20;

/// Connections to one database.
#[derive(Debug)]
pub struct Pool {
    address: String,
    idle: Mutex<Vec<BufReader<TcpStream>>>,
}

impl Pool {
    /// To the database at `address`; it is connected to when it is asked.
    pub fn new(address: &str) -> Self {
        Self {
            address: address.to_owned(),
            idle: Mutex::new(Vec::new()),
        }
    }

    /// The value of a key.
    ///
    /// # Errors
    /// The database cannot be asked.
    pub fn get(&self, key: &str) -> io::Result<Option<String>> {
        self.ask(&["GET", key])
    }

    /// Sets the value of a key.
    ///
    /// # Errors
    /// The database cannot be asked.
    pub fn set(&self, key: &str, value: &str) -> io::Result<()> {
        self.ask(&["SET", key, value]).map(drop)
    }

    /// Sets the values of several keys at once.
    ///
    /// # Errors
    /// The database cannot be asked.
    pub fn set_all(&self, pairs: &[(String, String)]) -> io::Result<()> {
        let pairs = pairs
            .iter()
            .flat_map(|(key, value)| [key.as_str(), value.as_str()]);
        let words: Vec<&str> = std::iter::once("MSET").chain(pairs).collect();
        self.ask(&words).map(drop)
    }

    /// Adds one to the value of a key, and returns it.
    ///
    /// # Errors
    /// The database cannot be asked.
    pub fn increment(&self, key: &str) -> io::Result<String> {
        self.ask(&["INCR", key])?
            .ok_or_else(|| bad("nothing was counted"))
    }

    /// A connection that broke is not used again.
    fn ask(&self, words: &[&str]) -> io::Result<Option<String>> {
        let kept = self.idle().pop();
        let mut connection = match kept {
            Some(connection) => connection,
            None => self.connect()?,
        };
        connection.get_mut().write_all(&command(words))?;
        let reply = read_reply(&mut connection)?;
        self.idle().push(connection);
        reply.map_err(io::Error::other)
    }

    fn connect(&self) -> io::Result<BufReader<TcpStream>> {
        let stream = TcpStream::connect(&self.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        Ok(BufReader::new(stream))
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<BufReader<TcpStream>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn command(words: &[&str]) -> Vec<u8> {
    let mut text = format!("*{}\r\n", words.len());
    for word in words {
        text.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    text.into_bytes()
}

/// A reply: a value or none, or what the database did not like.
fn read_reply(from: &mut impl BufRead) -> io::Result<Result<Option<String>, String>> {
    let mut line = Vec::new();
    (&mut *from).take(LINE).read_until(b'\n', &mut line)?;
    let line = text(line)?;
    let line = line
        .strip_suffix("\r\n")
        .ok_or_else(|| bad("a reply is cut short"))?;
    let (kind, rest) = line
        .split_at_checked(1)
        .ok_or_else(|| bad("a reply is empty"))?;
    match kind {
        "+" | ":" => Ok(Ok(Some(rest.to_owned()))),
        "-" => Ok(Err(rest.to_owned())),
        "$" if rest == "-1" => Ok(Ok(None)),
        "$" => {
            let length = rest.parse().ok().filter(|length| *length <= VALUE);
            let length: usize = length.ok_or_else(|| bad("a value is too long"))?;
            let mut value = vec![0; length + 2];
            from.read_exact(&mut value)?;
            value.truncate(length);
            Ok(Ok(Some(text(value)?)))
        }
        _ => Err(bad("a reply of an unknown kind")),
    }
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|_| bad("a reply is no text"))
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_replies() {
        assert_eq!(command(&["GET", "ab"]), b"*2\r\n$3\r\nGET\r\n$2\r\nab\r\n");
        let read = |text: &str| read_reply(&mut text.as_bytes());
        assert_eq!(read("+OK\r\n").unwrap(), Ok(Some("OK".to_owned())));
        assert_eq!(read(":17\r\n").unwrap(), Ok(Some("17".to_owned())));
        assert_eq!(read("$-1\r\n").unwrap(), Ok(None));
        assert_eq!(read("$2\r\nab\r\n").unwrap(), Ok(Some("ab".to_owned())));
        assert_eq!(read("-ERR no\r\n").unwrap(), Err("ERR no".to_owned()));
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        for text in ["", "$3\r\nab", "$99999999\r\n", "?\r\n", "+OK", "\r\n"] {
            assert!(read_reply(&mut text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
