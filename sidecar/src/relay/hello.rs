//! The first bytes of a connection between two sidecars: which VM and channel it carries.

use uuid::Uuid;

const MAGIC: u32 = 0x4d55_5354;
/// What every sidecar knows.
const VERSION: u16 = 1;
/// With the balloon's size behind it: said only where there is one to give back.
const WITH_BALLOON: u16 = 2;

const PLAIN_BYTES: usize = 4 + 2 + 2 + 16 + 16 + 32 + 1;
/// Length of the longest encoded hello.
pub const HELLO_BYTES: usize = PLAIN_BYTES + 8;

/// Channel of a connection that carries a local disk (NBD). multifd has at most 255.
pub const DISK_CHANNEL: u16 = 0x8000;

/// A one-time secret that both ends got from the coordinator. It pairs connections with VMs; it
/// is no protection against somebody who reads the network.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(pub [u8; 32]);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Token {
    /// Reads 64 hexadecimal digits.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            if !pair.iter().all(u8::is_ascii_hexdigit) {
                return None;
            }
            let pair = std::str::from_utf8(pair).ok()?;
            *byte = u8::from_str_radix(pair, 16).ok()?;
        }
        Some(Self(bytes))
    }

    /// Compares without telling by its time how far the two agree.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        self.0
            .iter()
            .zip(&other.0)
            .fold(0, |sum, (a, b)| sum | (a ^ b))
            == 0
    }
}

/// What a connection says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// The run.
    pub run: Uuid,
    /// The VM.
    pub vm: Uuid,
    /// 0 is the main channel, the only one with a return path; [`DISK_CHANNEL`] carries a disk.
    pub channel: u16,
    /// Whether the guest runs at the source, and so is to run at the destination.
    pub guest_runs: bool,
    /// What the guest's balloon is to be again once it runs at the destination, in bytes, where
    /// memory was taken from it.
    pub balloon_bytes: Option<u64>,
    /// See [`Token`].
    pub token: Token,
}

/// The one byte that answers a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Go on.
    Accepted = 1,
    /// No such VM is expected here, or the token is another.
    Unknown = 2,
    /// The hello is of another version.
    Version = 3,
    /// The destination's QEMU does not accept the stream.
    NotListening = 4,
}

impl Answer {
    /// Reads the byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Accepted,
            Self::Unknown,
            Self::Version,
            Self::NotListening,
        ]
        .into_iter()
        .find(|answer| *answer as u8 == byte)
    }

    /// What a refusal means and what to do.
    #[must_use]
    pub fn explain(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Unknown => {
                "the destination's sidecar does not expect this VM (was the run aborted there?)"
            }
            Self::Version => {
                "the destination's sidecar speaks another stream version: install the same \
                 release on both hosts"
            }
            Self::NotListening => "the destination's QEMU does not accept the migration stream",
        }
    }
}

impl Hello {
    /// As it stands on the wire.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let version = self.balloon_bytes.map_or(VERSION, |_| WITH_BALLOON);
        let mut bytes = vec![0; PLAIN_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&version.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.channel.to_be_bytes());
        bytes[8..24].copy_from_slice(self.run.as_bytes());
        bytes[24..40].copy_from_slice(self.vm.as_bytes());
        bytes[40..72].copy_from_slice(&self.token.0);
        bytes[72] = u8::from(self.guest_runs);
        bytes.extend(
            self.balloon_bytes
                .iter()
                .flat_map(|size| size.to_be_bytes()),
        );
        bytes
    }

    /// How many bytes of it are still to come.
    #[must_use]
    pub fn missing(bytes: &[u8]) -> usize {
        let is_long = bytes.get(4..6) == Some(&WITH_BALLOON.to_be_bytes());
        let whole = if is_long && bytes.len() >= PLAIN_BYTES {
            HELLO_BYTES
        } else {
            PLAIN_BYTES
        };
        whole.saturating_sub(bytes.len())
    }

    /// Reads one of which nothing is [missing](Self::missing).
    ///
    /// # Errors
    /// The answer to give: the magic or the version is another.
    pub fn decode(bytes: &[u8]) -> Result<Self, Answer> {
        fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
            std::array::from_fn(|i| bytes.get(at + i).copied().unwrap_or(0))
        }
        if u32::from_be_bytes(take(bytes, 0)) != MAGIC {
            return Err(Answer::Unknown);
        }
        let balloon_bytes = match u16::from_be_bytes(take(bytes, 4)) {
            VERSION => None,
            WITH_BALLOON => Some(u64::from_be_bytes(take(bytes, PLAIN_BYTES))),
            _ => return Err(Answer::Version),
        };
        Ok(Self {
            channel: u16::from_be_bytes(take(bytes, 6)),
            run: Uuid::from_bytes(take(bytes, 8)),
            vm: Uuid::from_bytes(take(bytes, 24)),
            token: Token(take(bytes, 40)),
            guest_runs: take::<1>(bytes, PLAIN_BYTES - 1) != [0],
            balloon_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_the_wire_and_refuses_others() {
        let token = Token::from_hex(&"a5".repeat(32)).expect("64 digits");
        let hello = Hello {
            run: Uuid::from_u128(1),
            vm: Uuid::from_u128(2),
            channel: 3,
            guest_runs: true,
            balloon_bytes: None,
            token,
        };
        let with_balloon = Hello {
            balloon_bytes: Some(7 << 30),
            ..hello
        };
        for hello in [hello, with_balloon] {
            let bytes = hello.encode();
            assert_eq!(Hello::decode(&bytes), Ok(hello));
            assert_eq!(Hello::missing(&bytes), 0);
            assert!((0..bytes.len()).all(|n| Hello::missing(&bytes[..n]) > 0));
        }
        let mut bytes = hello.encode();
        bytes[5] = 9;
        assert_eq!(Hello::decode(&bytes), Err(Answer::Version));
        bytes[0] = 0;
        assert_eq!(Hello::decode(&bytes), Err(Answer::Unknown));
        assert_eq!(Answer::from_byte(4), Some(Answer::NotListening));
        assert_eq!(Answer::from_byte(0), None);
        assert_eq!(Token::from_hex("a5"), None);
        assert_eq!(Token::from_hex(&"+5".repeat(32)), None);
        assert!(!token.matches(&Token([0; 32])));
    }
}
