//! The return path of a migration: messages from the destination's QEMU to the source's.
//!
//! Big endian: u16 type, u16 length, payload (QEMU migration/migration.c,
//! `migrate_send_rp_message`; length ≤ 512). The gate keeps every SWITCHOVER_ACK back until it is
//! opened: without one, a source with capability `switchover-ack` goes on with pre-copy and does
//! not switch over. All other messages pass at once.

/// `MIG_RP_MSG_SHUT`: the destination has loaded everything (payload 0) or failed.
pub const SHUT: u16 = 1;
/// `MIG_RP_MSG_SWITCHOVER_ACK`.
pub const SWITCHOVER_ACK: u16 = 7;

const HEADER_BYTES: usize = 4;
const MAX_PAYLOAD_BYTES: usize = 512;

/// The bytes are no return path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the destination's return path is garbled (message type {kind}, length {length}): is this a \
     plain QEMU migration stream?"
)]
pub struct Garbled {
    kind: u16,
    length: usize,
}

/// Parses the return path and keeps SWITCHOVER_ACK while closed.
#[derive(Debug, Default)]
pub struct AckGate {
    partial: Vec<u8>,
    open: bool,
    kept: u32,
}

impl AckGate {
    /// A closed gate.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the destination and appends what may pass to `out`.
    ///
    /// # Errors
    /// A header with an impossible length. The stream cannot be understood from there on.
    pub fn pass(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Garbled> {
        loop {
            if self.partial.len() < HEADER_BYTES {
                let n = (HEADER_BYTES - self.partial.len()).min(bytes.len());
                self.partial.extend_from_slice(&bytes[..n]);
                bytes = &bytes[n..];
                if self.partial.len() < HEADER_BYTES {
                    return Ok(());
                }
            }
            let kind = u16::from_be_bytes([self.partial[0], self.partial[1]]);
            let length = usize::from(u16::from_be_bytes([self.partial[2], self.partial[3]]));
            if length > MAX_PAYLOAD_BYTES || kind == 0 {
                return Err(Garbled { kind, length });
            }
            let missing = HEADER_BYTES + length - self.partial.len();
            let n = missing.min(bytes.len());
            self.partial.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if n < missing {
                return Ok(());
            }
            if kind == SWITCHOVER_ACK && !self.open {
                self.kept += 1;
            } else {
                out.extend_from_slice(&self.partial);
            }
            self.partial.clear();
        }
    }

    /// Whether the destination has acknowledged, so that a release can take effect.
    #[must_use]
    pub fn has_ack(&self) -> bool {
        self.open || self.kept > 0
    }

    /// Opens the gate for good; returns what was kept.
    pub fn open(&mut self) -> Vec<u8> {
        self.open = true;
        let kept = std::mem::take(&mut self.kept);
        let mut bytes = Vec::new();
        for _ in 0..kept {
            bytes.extend_from_slice(&SWITCHOVER_ACK.to_be_bytes());
            bytes.extend_from_slice(&0u16.to_be_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = kind.to_be_bytes().to_vec();
        let length = u16::try_from(payload.len()).expect("short");
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn keeps_the_acknowledgement_until_opened() {
        let mut gate = AckGate::new();
        let mut out = Vec::new();
        let pong = message(2, &7u32.to_be_bytes());
        let ack = message(SWITCHOVER_ACK, &[]);
        gate.pass(&[pong.clone(), ack.clone()].concat(), &mut out)
            .expect("valid");
        assert_eq!(out, pong);
        assert!(gate.has_ack());
        assert_eq!(gate.open(), ack);
        out.clear();
        gate.pass(&ack, &mut out).expect("valid");
        assert_eq!(out, ack);
        assert_eq!(gate.open(), b"");
    }

    #[test]
    fn garbage_is_refused() {
        let mut gate = AckGate::new();
        assert!(gate.pass(&[0xff; 8], &mut Vec::new()).is_err());
        assert!(AckGate::new().pass(&[0, 0, 0, 0], &mut Vec::new()).is_err());
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same(
            kinds in proptest::collection::vec((1u16..10, 0usize..20), 0..20),
            cuts in proptest::collection::vec(1usize..9, 0..200),
        ) {
            let all: Vec<u8> =
                kinds.iter().flat_map(|(kind, n)| message(*kind, &vec![1; if *kind == SWITCHOVER_ACK { 0 } else { *n }])).collect();
            let expected: Vec<u8> = kinds.iter().filter(|(kind, _)| *kind != SWITCHOVER_ACK)
                .flat_map(|(kind, n)| message(*kind, &vec![1; *n])).collect();
            let mut gate = AckGate::new();
            let mut out = Vec::new();
            let mut rest = &all[..];
            for cut in cuts {
                let n = cut.min(rest.len());
                gate.pass(&rest[..n], &mut out).expect("valid");
                rest = &rest[n..];
            }
            gate.pass(rest, &mut out).expect("valid");
            prop_assert_eq!(out, expected);
            let acks = kinds.iter().filter(|(kind, _)| *kind == SWITCHOVER_ACK).count();
            prop_assert_eq!(gate.open().len(), acks * 4);
        }
    }
}
