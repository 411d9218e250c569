//! Lines of JSON: framing with a bound.

/// Collects bytes and hands out whole messages, none longer than its limit.
///
/// QMP has no framing but JSON's own: qemu.qmp, for one, ends its commands with no newline. So a
/// message ends with the bracket that closes its first one, or at a newline, whichever comes
/// first; the latter is where broken input ends.
#[derive(Debug)]
pub struct LineBuffer {
    bytes: Vec<u8>,
    /// Where the next message begins.
    start: usize,
    scanned: usize,
    limit: usize,
    skipping: bool,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

/// What [`LineBuffer::next_line`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// A whole message without the end of its line.
    Whole(Vec<u8>),
    /// A message over the limit; it was dropped up to its end.
    TooLong,
}

impl LineBuffer {
    /// A buffer for messages of up to `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            start: 0,
            scanned: 0,
            limit,
            skipping: false,
            depth: 0,
            in_string: false,
            escaped: false,
        }
    }

    /// Takes what was read from the peer.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one. Empty lines are passed over.
    pub fn next_line(&mut self) -> Option<Line> {
        loop {
            if !self.scan() {
                if self.scanned - self.start > self.limit {
                    self.start = self.scanned;
                    if !std::mem::replace(&mut self.skipping, true) {
                        return Some(Line::TooLong);
                    }
                } else if self.skipping {
                    self.start = self.scanned;
                }
                return None;
            }
            let line = self.bytes[self.start..self.scanned].trim_ascii_end();
            self.start = self.scanned;
            if std::mem::replace(&mut self.skipping, false) {
                continue;
            }
            if line.len() > self.limit {
                return Some(Line::TooLong);
            }
            if !line.is_empty() {
                return Some(Line::Whole(line.to_vec()));
            }
        }
    }

    /// Goes on to the end of the message; whether it is there.
    fn scan(&mut self) -> bool {
        while let Some(&byte) = self.bytes.get(self.scanned) {
            self.scanned += 1;
            let inside = self.depth > 0;
            match byte {
                b'\n' => {
                    self.depth = 0;
                    self.in_string = false;
                    self.escaped = false;
                    return true;
                }
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' if inside => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if inside => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return true;
                    }
                }
                _ => {}
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_and_bounded() {
        let mut buffer = LineBuffer::new(8);
        buffer.push(b"ab\r\n\n  \ncd");
        assert_eq!(buffer.next_line(), Some(Line::Whole(b"ab".to_vec())));
        assert_eq!(buffer.next_line(), None);
        buffer.push(b"ef\n0123456789");
        assert_eq!(buffer.next_line(), Some(Line::Whole(b"cdef".to_vec())));
        assert_eq!(buffer.next_line(), Some(Line::TooLong));
        buffer.push(b"still the same line\nnext\n");
        assert_eq!(buffer.next_line(), Some(Line::Whole(b"next".to_vec())));
        assert_eq!(buffer.next_line(), None);
    }

    #[test]
    fn a_message_needs_no_newline() {
        let mut buffer = LineBuffer::new(40);
        let texts = [
            r#"{"a": "}\"]{", "b": [{}]}"#,
            r#"{"c": 1}"#,
            r#"[{"d": "\\"}]"#,
        ];
        for byte in texts.concat().bytes() {
            buffer.push(&[byte]);
        }
        for text in texts {
            assert_eq!(buffer.next_line(), Some(Line::Whole(text.into())));
        }
        assert_eq!(buffer.next_line(), None);
        // A newline ends what is broken.
        buffer.push(b"{\"a\n{\"b\": 2}\r\n}]\n\"{\n");
        let whole = |text: &str| Some(Line::Whole(text.into()));
        assert_eq!(buffer.next_line(), whole("{\"a"));
        assert_eq!(buffer.next_line(), whole("{\"b\": 2}"));
        assert_eq!(buffer.next_line(), whole("}]"));
        assert_eq!(buffer.next_line(), whole("\"{"));
        assert_eq!(buffer.next_line(), None);
        // What is too long ends like anything else.
        buffer.push(b"{\"a\": \"0123456789012345678901234567890123456789");
        assert_eq!(buffer.next_line(), Some(Line::TooLong));
        buffer.push(b"012345678901234567890123456789012345678901234567890123456789");
        assert_eq!(buffer.next_line(), None);
        buffer.push(b"\"}{\"b\": 2}");
        assert_eq!(buffer.next_line(), whole("{\"b\": 2}"));
    }
}
