//! The relay transport: QEMU's migration stream, carried between two sidecars.
//!
//! ```text
//! QEMU ═unix═► Pipe ═TCP═► (network) ═TCP═► Pipe ═unix═► QEMU -incoming
//! QEMU ◄unix═ Pipe ◄TCP═ (network) ◄TCP═ Pipe ◄unix═ QEMU -incoming
//!              └ ReturnPath keeps SWITCHOVER_ACK on the source's host
//! ```
//!
//! This module is without I/O: [`Pipe`] is the buffer of one direction, [`hello`] the opening of a
//! connection, [`return_path`] the parser that keeps the acknowledgement back. `daemon::stream`
//! moves the bytes and asks the rate limiter how many.

pub mod hello;
pub mod return_path;

/// Bytes that one direction of one channel holds at most.
///
/// Large enough for few system calls at full speed, small enough that what is in flight drains
/// in some milliseconds at switchover.
pub const PIPE_BYTES: usize = 512 * 1024;

/// A bounded first-in first-out buffer of bytes, read and written in place.
#[derive(Debug)]
pub struct Pipe {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    ended: bool,
}

impl Default for Pipe {
    fn default() -> Self {
        Self::new()
    }
}

impl Pipe {
    /// An empty pipe; its memory is only touched when used.
    #[must_use]
    pub fn new() -> Self {
        Self {
            buffer: vec![0; PIPE_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            ended: false,
        }
    }

    /// What waits to be written on.
    #[must_use]
    pub fn filled(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The first `n` waiting bytes were written on.
    pub fn consume(&mut self, n: usize) {
        self.start = (self.start + n).min(self.end);
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Where new bytes go; empty when the pipe is full. Moves what waits to the front when the
    /// room behind it is small.
    pub fn room(&mut self) -> &mut [u8] {
        if self.start > 0 && self.buffer.len() - self.end < PIPE_BYTES / 4 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buffer[self.end..]
    }

    /// `n` bytes were put into [`Self::room`].
    pub fn fill(&mut self, n: usize) {
        self.end = (self.end + n).min(self.buffer.len());
    }

    /// Appends `bytes`; returns how many fitted.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let room = self.room();
        let n = room.len().min(bytes.len());
        room[..n].copy_from_slice(&bytes[..n]);
        self.fill(n);
        n
    }

    /// The reading side reached its end.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Whether the reading side reached its end.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether everything that will ever come was written on.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.ended && self.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(steps in proptest::collection::vec((0usize..900_000, 0usize..900_000), 1..20)) {
            let mut pipe = Pipe::new();
            let mut written = 0u64;
            let mut read = 0u64;
            for (put, take) in steps {
                let bytes: Vec<u8> = (0..put).map(|i| ((written + i as u64) % 251) as u8).collect();
                written += pipe.push(&bytes) as u64;
                let n = take.min(pipe.filled().len());
                for (i, byte) in pipe.filled()[..n].iter().enumerate() {
                    prop_assert_eq!(*byte, ((read + i as u64) % 251) as u8);
                }
                pipe.consume(n);
                read += n as u64;
            }
            prop_assert_eq!(pipe.filled().len() as u64, written - read);
        }
    }
}
