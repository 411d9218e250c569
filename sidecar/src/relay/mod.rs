//! The relay transport: QEMU's migration stream, carried between two sidecars.
//!
//! ```text
//! QEMU ═unix═► Pipe ═TCP═► (network) ═TCP═► Pipe ═unix═► QEMU -incoming
//! QEMU ◄unix═ Pipe ◄TCP═ (network) ◄TCP═ Pipe ◄unix═ QEMU -incoming
//!              └ ReturnPath keeps SWITCHOVER_ACK on the source's host
//! ```
//!
//! This module is without I/O: [`Pipe`] is the buffer of one direction, [`hello`] the opening of a
//! connection, [`nbd`] the watch over a disk's connection, [`return_path`] the parser that keeps the acknowledgement back. `daemon::stream`
//! moves the bytes and asks the rate limiter how many.

pub mod hello;
pub mod nbd;
pub mod return_path;

/// Bytes that one direction of one channel holds at most.
///
/// Large enough for few system calls at full speed, small enough that what is in flight drains
/// in some milliseconds at switchover.
pub const PIPE_BYTES: usize = 512 * 1024;

/// A bounded first-in first-out buffer of bytes, read and written in place.
///
/// A ring: nothing is moved within it. When it runs empty it begins again at its front, where the
/// processor's cache still has it.
#[derive(Debug)]
pub struct Pipe {
    buffer: Box<[u8]>,
    start: usize,
    waiting: usize,
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
            waiting: 0,
            ended: false,
        }
    }

    /// What waits to be written on, up to where the ring turns; empty only if nothing waits.
    #[must_use]
    pub fn filled(&self) -> &[u8] {
        let end = (self.start + self.waiting).min(self.buffer.len());
        &self.buffer[self.start..end]
    }

    /// How many bytes wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// The first `n` waiting bytes were written on.
    pub fn consume(&mut self, n: usize) {
        let n = n.min(self.waiting);
        self.waiting -= n;
        self.start = match self.waiting {
            0 => 0,
            _ => (self.start + n) % self.buffer.len(),
        };
    }

    /// Where new bytes go, up to where the ring turns; empty only if the pipe is full.
    pub fn room(&mut self) -> &mut [u8] {
        let size = self.buffer.len();
        let end = self.start + self.waiting;
        if end < size {
            &mut self.buffer[end..]
        } else {
            &mut self.buffer[end - size..self.start]
        }
    }

    /// How many bytes fit.
    #[must_use]
    pub fn free(&self) -> usize {
        self.buffer.len() - self.waiting
    }

    /// `n` bytes were put into [`Self::room`].
    pub fn fill(&mut self, n: usize) {
        self.waiting += n.min(self.room().len());
    }

    /// Appends `bytes`; returns how many fitted.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let mut pushed = 0;
        // Twice where the ring turns in between.
        while pushed < bytes.len() && self.free() > 0 {
            let room = self.room();
            let n = room.len().min(bytes.len() - pushed);
            room[..n].copy_from_slice(&bytes[pushed..pushed + n]);
            self.fill(n);
            pushed += n;
        }
        pushed
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
                let mut left = take;
                while left > 0 && !pipe.is_empty() {
                    let n = left.min(pipe.filled().len());
                    prop_assert!(n > 0);
                    for (i, byte) in pipe.filled()[..n].iter().enumerate() {
                        prop_assert_eq!(*byte, ((read + i as u64) % 251) as u8);
                    }
                    pipe.consume(n);
                    read += n as u64;
                    left -= n;
                }
                prop_assert_eq!((PIPE_BYTES - pipe.free()) as u64, written - read);
                prop_assert_eq!(pipe.room().is_empty(), pipe.free() == 0);
            }
        }
    }
}
