//! Downtime from outside: every VM is pinged by its users fifty times a second, and the longest time
//! without an answer is how long it was away from the network. The guest's kernel answers, whatever
//! its server does.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, socket,
};

use crate::clock::Micros;
use crate::net::{Host, NetError};

/// From one ping to the next.
pub const PERIOD: Duration = Duration::from_millis(20);
const ECHO: u8 = 8;
const ECHO_REPLY: u8 = 0;
const HEADER: usize = 8;

/// When answers came, by the address that sent them.
type Answers = BTreeMap<Ipv4Addr, Vec<Micros>>;

/// Pings; they end when this is dropped.
#[derive(Debug)]
pub struct Probe {
    answers: Arc<Mutex<Answers>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Probe {
    /// Begins to ping these addresses from a host.
    ///
    /// # Errors
    /// The host has no raw sockets for us.
    pub fn start(host: &Host, addresses: Vec<Ipv4Addr>) -> Result<Self, NetError> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let open = || {
            socket(
                AddressFamily::Inet,
                SockType::Raw,
                flags,
                SockProtocol::Icmp,
            )
        };
        let socket = host.enter(open)?.map_err(|error| NetError::Traffic {
            from: host.name().to_owned(),
            to: "its guests".to_owned(),
            error: error.into(),
        })?;
        let answers = Arc::new(Mutex::new(Answers::new()));
        let end = Arc::new(AtomicBool::new(false));
        let (told, ending) = (Arc::clone(&answers), Arc::clone(&end));
        let thread = std::thread::spawn(move || ping(&socket, &addresses, &told, &ending));
        Ok(Self {
            answers,
            end,
            thread: Some(thread),
        })
    }

    /// The longest time without an answer from an address between two moments, less the time from
    /// one ping to the next. Nothing came at all: the whole time.
    #[must_use]
    pub fn longest_gap(&self, address: Ipv4Addr, from: Micros, to: Micros) -> Duration {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let all = answers.get(&address).map_or(&[][..], Vec::as_slice);
        longest_gap(all, from, to).saturating_sub(PERIOD)
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Between `from`, the answers after it, and `to`.
fn longest_gap(answers: &[Micros], from: Micros, to: Micros) -> Duration {
    let inside = answers
        .iter()
        .copied()
        .filter(|at| (from..=to).contains(at));
    let moments: Vec<Micros> = std::iter::once(from).chain(inside).chain([to]).collect();
    let gaps = moments.windows(2).map(|pair| pair[1].since(pair[0]));
    gaps.max().unwrap_or_default()
}

fn ping(socket: &OwnedFd, addresses: &[Ipv4Addr], told: &Mutex<Answers>, end: &AtomicBool) {
    let [high, low] = u16::try_from(std::process::id() % 65_536)
        .unwrap_or(1)
        .to_be_bytes();
    let mut due = Micros::now();
    let mut number = 0_u16;
    loop {
        if end.load(Ordering::Relaxed) {
            return;
        }
        let [first, second] = number.to_be_bytes();
        let mut packet = [ECHO, 0, 0, 0, high, low, first, second];
        let sum = checksum(&packet).to_be_bytes();
        packet[2..4].copy_from_slice(&sum);
        for address in addresses {
            let to = SockaddrIn::from(std::net::SocketAddrV4::new(*address, 0));
            // One that cannot be sent is one that is not answered.
            let _ = sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty());
        }
        number = number.wrapping_add(1);
        due = due + PERIOD;
        loop {
            listen(socket, [high, low], told);
            let left = due.since(Micros::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(PERIOD / 10));
        }
    }
}

/// Notes the answers that have come.
fn listen(socket: &OwnedFd, ours: [u8; 2], told: &Mutex<Answers>) {
    let mut packet = [0; 128];
    while let Ok(length) = recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty()) {
        let Some(address) = answer(&packet[..length], ours) else {
            continue;
        };
        let mut answers = told.lock().unwrap_or_else(PoisonError::into_inner);
        answers.entry(address).or_default().push(Micros::now());
    }
}

/// Who sent an IPv4 packet that answers a ping of ours.
fn answer(packet: &[u8], ours: [u8; 2]) -> Option<Ipv4Addr> {
    let head = usize::from(packet.first()? & 15) * 4;
    let from: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
    let echo = packet.get(head..head + HEADER)?;
    (echo[0] == ECHO_REPLY && echo[4..6] == ours).then(|| from.into())
}

fn checksum(packet: &[u8]) -> u16 {
    let words = packet
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_reach_to_the_ends() {
        let at = [100, 120, 500, 520].map(Micros);
        let gap = |from, to| longest_gap(&at, Micros(from), Micros(to)).as_micros();
        assert_eq!(gap(90, 530), 380);
        assert_eq!(gap(510, 1000), 480, "silent to the end");
        assert_eq!(gap(0, 110), 100, "silent from the beginning");
        assert_eq!(longest_gap(&[], Micros(5), Micros(25)).as_micros(), 20);
    }

    #[test]
    fn only_our_own_pings_are_answers() {
        let mut packet = vec![0x45; 28];
        packet[12..16].copy_from_slice(&[10, 0, 0, 7]);
        packet[20..28].copy_from_slice(&[ECHO_REPLY, 0, 0, 0, 1, 2, 0, 9]);
        assert_eq!(answer(&packet, [1, 2]), Some(Ipv4Addr::new(10, 0, 0, 7)));
        assert_eq!(answer(&packet, [1, 3]), None);
        assert_eq!(answer(&packet[..24], [1, 2]), None);
        assert_eq!(checksum(&[8, 0, 0, 0, 0, 1, 0, 1]), 0xf7fd);
    }
}
