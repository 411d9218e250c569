//! Sockets of either kind, and a meter of what crosses them.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use mio::event::Source;
use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token};
use nix::sys::socket::{setsockopt, sockopt};

use crate::sys;

/// A stream socket of either kind, non-blocking.
#[derive(Debug)]
pub enum Socket {
    /// Within the host.
    Unix(UnixStream),
    /// Between hosts.
    Tcp(TcpStream),
}

/// What the kernel keeps for a QEMU that is reading (it doubles it): more than one turn of ours,
/// so that QEMU finds the next bytes without being woken for them.
const UNIX_SEND_BYTES: usize = 512 * 1024;
/// A peer that does not acknowledge for so long is gone (TCP_USER_TIMEOUT).
const USER_TIMEOUT_MS: u32 = 3000;

impl Socket {
    /// Connects to a unix socket.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect_unix(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        // The kernel's own size works too, with more switches between processes.
        let _ = setsockopt(&stream, sockopt::SndBuf, &UNIX_SEND_BYTES);
        Ok(Self::Unix(stream))
    }

    /// Begins to connect to an address.
    ///
    /// # Errors
    /// It is unreachable.
    pub fn connect_tcp(address: SocketAddr) -> io::Result<Self> {
        Ok(Self::tcp(TcpStream::connect(address)?))
    }

    /// A TCP stream with the options that migration streams want.
    #[must_use]
    pub fn tcp(stream: TcpStream) -> Self {
        // Worse without, but not wrong: an error here is passed over.
        let _ = stream.set_nodelay(true);
        let _ = setsockopt(&stream, sockopt::TcpUserTimeout, &USER_TIMEOUT_MS);
        let _ = setsockopt(&stream, sockopt::KeepAlive, &true);
        Self::Tcp(stream)
    }

    /// Registers for edge-triggered readiness both ways.
    ///
    /// # Errors
    /// Those of epoll.
    pub fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        self.source()
            .register(registry, token, Interest::READABLE | Interest::WRITABLE)
    }

    /// Ends the registration.
    pub fn deregister(&mut self, registry: &Registry) {
        // It ends by itself when the socket is closed.
        let _ = self.source().deregister(registry);
    }

    fn source(&mut self) -> &mut dyn Source {
        match self {
            Self::Unix(stream) => stream,
            Self::Tcp(stream) => stream,
        }
    }

    /// Says that nothing more will be written.
    pub fn shutdown_write(&self) {
        // The peer may have closed already.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(std::net::Shutdown::Write),
            Self::Tcp(stream) => stream.shutdown(std::net::Shutdown::Write),
        };
    }

    /// Why a connection in progress failed, if it did.
    #[must_use]
    pub fn take_error(&self) -> Option<io::Error> {
        match self {
            Self::Unix(stream) => stream.take_error(),
            Self::Tcp(stream) => stream.take_error(),
        }
        .ok()
        .flatten()
    }

    /// Bytes that wait here to be read (SIOCINQ).
    #[must_use]
    pub fn unread_bytes(&self) -> u64 {
        self.queued(libc::FIONREAD)
    }

    /// Bytes that were written and that the other end has not acknowledged (SIOCOUTQ); of a unix
    /// socket, the kernel's memory for those not read yet.
    #[must_use]
    pub fn unacknowledged_bytes(&self) -> u64 {
        self.queued(libc::TIOCOUTQ)
    }

    fn queued(&self, which: libc::Ioctl) -> u64 {
        let told = match self {
            Self::Unix(stream) => sys::queued_bytes(stream, which),
            Self::Tcp(stream) => sys::queued_bytes(stream, which),
        };
        // A connection that has broken has nothing under way.
        told.unwrap_or(0)
    }

    /// The process at the other end of a unix socket.
    #[must_use]
    pub fn peer_pid(&self) -> Option<i32> {
        match self {
            Self::Unix(stream) => nix::sys::socket::getsockopt(stream, sockopt::PeerCredentials)
                .ok()
                .map(|credentials| credentials.pid())
                .filter(|pid| *pid > 0),
            Self::Tcp(_) => None,
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buffer),
            Self::Tcp(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a non-blocking read or write did.
#[derive(Debug)]
pub enum Moved {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Blocked,
    /// The peer closed its side.
    End,
    /// The connection broke.
    Broken(io::Error),
}

/// Reads once.
pub fn read_some(socket: &mut Socket, buffer: &mut [u8]) -> Moved {
    loop {
        match socket.read(buffer) {
            Ok(0) => return Moved::End,
            Ok(n) => return Moved::Bytes(n),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return Moved::Blocked,
                _ => return Moved::Broken(error),
            },
        }
    }
}

/// Writes once.
pub fn write_some(socket: &mut Socket, bytes: &[u8]) -> Moved {
    loop {
        match socket.write(bytes) {
            Ok(n) => return Moved::Bytes(n),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected => return Moved::Blocked,
                _ => return Moved::Broken(error),
            },
        }
    }
}

/// Bytes per second over about the last second.
#[derive(Debug, Default)]
pub struct RateMeter {
    samples: VecDeque<(Instant, u64)>,
}

const METER_STEP: Duration = Duration::from_millis(100);
const METER_WINDOW: Duration = Duration::from_secs(1);

impl RateMeter {
    /// Takes the total so far and returns the rate.
    pub fn observe(&mut self, now: Instant, total_bytes: u64) -> u64 {
        let step = self
            .samples
            .back()
            .is_none_or(|(at, _)| now.duration_since(*at) >= METER_STEP);
        if step {
            self.samples.push_back((now, total_bytes));
        }
        while self
            .samples
            .get(1)
            .is_some_and(|(at, _)| now.duration_since(*at) >= METER_WINDOW)
        {
            self.samples.pop_front();
        }
        let Some((since, bytes)) = self.samples.front() else {
            return 0;
        };
        let micros = now.duration_since(*since).as_micros();
        if micros < 20_000 {
            return 0;
        }
        let rate = u128::from(total_bytes.saturating_sub(*bytes)) * 1_000_000 / micros;
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_meter_follows_a_change_within_its_window() {
        let start = Instant::now();
        let mut meter = RateMeter::default();
        let mut total = 0;
        let mut rate = 0;
        for step in 0..300u32 {
            total += if step < 150 { 1_000_000 } else { 100_000 };
            rate = meter.observe(start + Duration::from_millis(10) * step, total);
            if step == 149 {
                assert!(rate.abs_diff(100_000_000) < 5_000_000, "{rate}");
            }
        }
        assert!(rate.abs_diff(10_000_000) < 500_000, "{rate}");
    }
}
