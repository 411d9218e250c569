//! Watches an NBD conversation pass by: how many of the client's requests are unanswered.
//!
//! Nothing is changed or kept back. A server that hangs answers nothing and closes nothing, and a
//! guest's writes may come to wait for it: the relay must cut what has been silent for too long.
//! Something that is no NBD as QEMU speaks it ends the watch, not the conversation.

use std::time::{Duration, Instant};

const OPTION: u32 = 0x4948_4156; // "IHAV", of IHAVEOPT
const REQUEST: u32 = 0x2560_9513;
const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
const GREETING: u32 = 0x4e42_444d; // "NBDM", of NBDMAGIC
const OPTION_REPLY: u32 = 0x0003_e889;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const CHUNK: u32 = 0x668e_33ef;
const EXTENDED_CHUNK: u32 = 0x6e8a_278c;

const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
/// Option replies of these types are followed by others: SERVER, INFO, META_CONTEXT.
const MORE_FOLLOWS: std::ops::RangeInclusive<u32> = 2..=4;
/// How often one looks, within the longest silence, whether the other host still takes bytes.
const LOOKS: u32 = 8;
/// Longest header of all.
const MAX_HEADER: usize = 32;

/// One direction: headers with what follows them.
#[derive(Debug, Default)]
struct Side {
    header: [u8; MAX_HEADER],
    have: usize,
    /// Bytes of data that follow the last header.
    skip: u64,
    /// What is to be counted when these bytes have passed.
    then: i64,
}

/// What a header says: its length, how much data follows, and what it counts then.
struct Meaning {
    data: u64,
    count: i64,
}

impl Side {
    /// Takes bytes; what they count, or `None` if they are no NBD.
    fn take(
        &mut self,
        mut bytes: &[u8],
        length: impl Fn(u32) -> Option<usize>,
        meaning: impl Fn(&[u8]) -> Meaning,
    ) -> Option<i64> {
        let mut sum = 0;
        while !bytes.is_empty() {
            if self.skip > 0 {
                let n =
                    usize::try_from(self.skip).map_or(bytes.len(), |skip| skip.min(bytes.len()));
                self.skip -= n as u64;
                bytes = &bytes[n..];
                if self.skip == 0 {
                    sum += std::mem::take(&mut self.then);
                }
                continue;
            }
            let wanted = if self.have < 4 {
                4
            } else {
                length(word(&self.header, 0))?
            };
            let n = (wanted - self.have).min(bytes.len());
            self.header[self.have..self.have + n].copy_from_slice(&bytes[..n]);
            self.have += n;
            bytes = &bytes[n..];
            if self.have < 4 || self.have < length(word(&self.header, 0))? {
                continue;
            }
            let said = meaning(&self.header[..self.have]);
            self.have = 0;
            self.skip = said.data;
            if said.data == 0 {
                sum += said.count;
            } else {
                self.then = said.count;
            }
        }
        Some(sum)
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) << 32 | u64::from(word(bytes, at + 4))
}

fn client_length(magic: u32) -> Option<usize> {
    match magic {
        // Before its first option the client sends four bytes of flags, all of them small.
        0..=3 => Some(4),
        OPTION => Some(16),
        REQUEST => Some(28),
        EXTENDED_REQUEST => Some(32),
        _ => None,
    }
}

fn client_meaning(header: &[u8]) -> Meaning {
    let (data, count) = match word(header, 0) {
        OPTION => (u64::from(word(header, 12)), 1),
        REQUEST | EXTENDED_REQUEST => {
            let kind = half(header, 6);
            let length = if header.len() == 32 {
                long(header, 24)
            } else {
                u64::from(word(header, 24))
            };
            let data = if kind == WRITE { length } else { 0 };
            (data, i64::from(kind != DISCONNECT))
        }
        _ => (0, 0),
    };
    Meaning { data, count }
}

fn server_length(magic: u32) -> Option<usize> {
    match magic {
        GREETING => Some(18),
        OPTION_REPLY | CHUNK => Some(20),
        SIMPLE_REPLY => Some(16),
        EXTENDED_CHUNK => Some(32),
        _ => None,
    }
}

fn server_meaning(header: &[u8]) -> Meaning {
    let done = |flags: u16| -i64::from(flags & 1 != 0);
    let (data, count) = match word(header, 0) {
        OPTION_REPLY => {
            let is_last = !MORE_FOLLOWS.contains(&word(header, 12));
            (u64::from(word(header, 16)), -i64::from(is_last))
        }
        CHUNK => (u64::from(word(header, 16)), done(half(header, 4))),
        EXTENDED_CHUNK => (long(header, 24), done(half(header, 4))),
        SIMPLE_REPLY => (0, -1),
        _ => (0, 0),
    };
    Meaning { data, count }
}

/// A conversation. See the module.
#[derive(Debug, Default)]
pub struct NbdWatch {
    client: Side,
    server: Side,
    unanswered: i64,
    /// Since when the server owes an answer and has said nothing.
    silent_since: Option<Instant>,
    /// What was on its way, not acknowledged by the other host, when that was last looked at.
    on_its_way: u64,
    looked_at: Option<Instant>,
    lost: bool,
}

impl NbdWatch {
    /// Bytes of the client went out.
    pub fn sent(&mut self, now: Instant, bytes: &[u8]) {
        let count = self.client.take(bytes, client_length, client_meaning);
        self.count(count);
        if self.unanswered > 0 {
            self.silent_since.get_or_insert(now);
        }
    }

    /// Bytes of the server came in.
    pub fn received(&mut self, now: Instant, bytes: &[u8]) {
        let count = self.server.take(bytes, server_length, server_meaning);
        self.count(count);
        self.silent_since = (self.unanswered > 0).then_some(now);
    }

    fn count(&mut self, count: Option<i64>) {
        match count {
            Some(count) if !self.lost => self.unanswered += count,
            _ => {
                self.lost = true;
                self.unanswered = 0;
            }
        }
    }

    /// The other host has not acknowledged so many bytes: one that still takes them is slow, not
    /// silent. When it took some is only known to lie after the look before.
    pub fn look(&mut self, now: Instant, on_its_way: u64) {
        if on_its_way < self.on_its_way {
            self.silent_since = self.silent_since.max(self.silent_since.and(self.looked_at));
        }
        self.on_its_way = on_its_way;
        self.looked_at = Some(now);
    }

    /// When to look again, or the server will have been silent for so long.
    #[must_use]
    pub fn deadline(&self, longest: Duration) -> Option<Instant> {
        let silent = self.silent_since? + longest;
        let look = self.looked_at.filter(|_| self.on_its_way > 0);
        Some(look.map_or(silent, |at| silent.min(at + longest / LOOKS)))
    }

    /// Whether the server has been silent for so long. Look first.
    #[must_use]
    pub fn is_silent(&self, now: Instant, longest: Duration) -> bool {
        self.silent_since
            .is_some_and(|since| since + longest <= now)
    }

    /// Requests without an answer.
    #[must_use]
    pub fn unanswered(&self) -> i64 {
        self.unanswered
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn option(number: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn option_reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        bytes.extend(7_u32.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn request(kind: u16, data: &[u8], extended: bool) -> Vec<u8> {
        let magic = if extended { EXTENDED_REQUEST } else { REQUEST };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(0_u16.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0; 16]);
        if extended {
            bytes.extend((data.len() as u64).to_be_bytes());
        } else {
            bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        }
        bytes.extend(data);
        bytes
    }

    fn chunk(done: bool, data: &[u8], extended: bool) -> Vec<u8> {
        let magic = if extended { EXTENDED_CHUNK } else { CHUNK };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(u16::from(done).to_be_bytes());
        bytes.extend([0; 10]);
        if extended {
            bytes.extend([0; 8]);
            bytes.extend((data.len() as u64).to_be_bytes());
        } else {
            bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        }
        bytes.extend(data);
        bytes
    }

    /// What both say, with what is unanswered after each turn.
    fn conversation(extended: bool) -> Vec<(bool, Vec<u8>, i64)> {
        let magic_in_data = [CHUNK.to_be_bytes(), REQUEST.to_be_bytes()].concat();
        let mut greeting = b"NBDMAGICIHAVEOPT".to_vec();
        greeting.extend([0, 3]);
        let mut opening = 3_u32.to_be_bytes().to_vec();
        opening.extend(option(8, &[]));
        let mut info = option_reply(3, &[1, 2, 3]);
        info.extend(option_reply(1, &[]));
        let mut writes = request(1, &magic_in_data, extended);
        writes.extend(request(3, &[], extended));
        vec![
            (false, greeting, 0),
            (true, opening, 1),
            (false, option_reply(1, &[]), 0),
            (true, option(7, b"name"), 1),
            (false, info, 0),
            (true, writes, 2),
            (false, chunk(false, &magic_in_data, extended), 2),
            (false, chunk(true, &[], extended), 1),
            (false, chunk(true, &magic_in_data, extended), 0),
            (true, request(2, &[], extended), 0),
        ]
    }

    proptest! {
        #[test]
        fn every_request_is_counted_however_the_bytes_are_cut(
            piece in 1_usize..40,
            extended in any::<bool>(),
        ) {
            let mut watch = NbdWatch::default();
            let now = Instant::now();
            for (is_client, bytes, unanswered) in conversation(extended) {
                for part in bytes.chunks(piece) {
                    if is_client {
                        watch.sent(now, part);
                    } else {
                        watch.received(now, part);
                    }
                }
                prop_assert_eq!(watch.unanswered(), unanswered);
                prop_assert_eq!(watch.silent_since.is_some(), unanswered > 0);
            }
        }

        #[test]
        fn anything_else_ends_the_watch(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut watch = NbdWatch::default();
            let now = Instant::now();
            watch.sent(now, &bytes);
            watch.received(now, &bytes);
            watch.received(now, b"no such magic");
            prop_assert!(watch.lost || watch.client.skip > 0 || watch.server.skip > 0);
        }
    }

    #[test]
    fn silence_counts_from_the_last_word() {
        let second = Duration::from_secs(1);
        let mut watch = NbdWatch::default();
        let start = Instant::now();
        assert_eq!(watch.deadline(second), None);
        watch.sent(start, &request(3, &[], false));
        watch.sent(start, &request(3, &[], false));
        assert_eq!(watch.deadline(second), Some(start + second));
        let later = start + second / 2;
        watch.received(later, &chunk(true, &[], false));
        assert_eq!(watch.deadline(second), Some(later + second));
        // A request is only owed an answer when all of it went out.
        let write = request(1, &[0; 100], false);
        watch.received(later, &chunk(true, &[], false));
        watch.sent(later, &write[..50]);
        assert_eq!(watch.deadline(second), None);
        watch.sent(later, &write[50..]);
        assert!(watch.deadline(second).is_some());
    }

    #[test]
    fn a_host_that_takes_bytes_is_slow_and_not_silent() {
        let second = Duration::from_secs(1);
        let start = Instant::now();
        let mut watch = NbdWatch::default();
        watch.sent(start, &request(1, &[0; 100], false));
        watch.look(start, 128);
        // It is looked in time whether it takes some.
        assert_eq!(watch.deadline(second), Some(start + second / LOOKS));
        for look in 1..=20 {
            let now = start + second / LOOKS * look;
            watch.look(now, u64::from(128 - look));
            assert!(!watch.is_silent(now, second), "look {look}");
        }
    }

    #[test]
    fn a_host_that_took_all_at_once_is_silent_from_then_on() {
        let second = Duration::from_secs(1);
        let start = Instant::now();
        let mut watch = NbdWatch::default();
        watch.sent(start, &request(1, &[0; 100], false));
        watch.look(start, 128);
        // Whenever one comes to look: it may have been right after the look before.
        watch.look(start + second, 0);
        assert!(watch.is_silent(start + second, second));
        assert_eq!(watch.deadline(second), Some(start + second));
    }
}
