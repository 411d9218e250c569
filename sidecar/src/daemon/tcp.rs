//! What the kernel knows of a TCP connection that QEMU writes, and what it is told to do with it.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::net::{Moved, Socket};
use crate::direct::Progress;
use crate::sys;

/// Bytes of `struct tcp_info` that are looked at (linux/tcp.h); kernels since 4.6 fill them.
const INFO_BYTES: usize = 168;

fn u32_at(info: &[u8; INFO_BYTES], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&info[at..at + 4]);
    u32::from_ne_bytes(bytes)
}

fn u64_at(info: &[u8; INFO_BYTES], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&info[at..at + 8]);
    u64::from_ne_bytes(bytes)
}

/// How far a connection is (TCP_INFO).
///
/// # Errors
/// It is no TCP socket, or the kernel is older than 4.6.
pub fn progress(socket: &impl AsFd) -> io::Result<Progress> {
    let mut info = [0; INFO_BYTES];
    let filled = sys::get_option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    if filled < INFO_BYTES {
        return Err(io::Error::other("this kernel's TCP_INFO is too short"));
    }
    // Offsets of struct tcp_info: the kernel only ever appends to it.
    Ok(Progress {
        acked_bytes: u64_at(&info, 120),
        received_bytes: u64_at(&info, 128),
        unsent_bytes: u64::from(u32_at(&info, 144)),
        unacked_segments: u32_at(&info, 24),
        rtt_us: u32_at(&info, 68),
    })
}

/// Has the kernel send at most so much per second; `None` is no limit.
///
/// # Errors
/// Those of setsockopt.
pub fn pace(socket: &impl AsFd, bytes_per_s: Option<u64>) -> io::Result<()> {
    // 0 would be no limit at all, and so is the largest value.
    let rate = bytes_per_s.map_or(u64::MAX, |rate| rate.clamp(1, u64::MAX - 1));
    let option = libc::SO_MAX_PACING_RATE;
    sys::set_option(socket, libc::SOL_SOCKET, option, &rate.to_ne_bytes())
}

/// How many bytes a writer may be ahead of the wire; `None`: as many as the send buffer holds.
///
/// # Errors
/// Those of setsockopt.
pub fn limit_unsent(socket: &impl AsFd, bytes: Option<u32>) -> io::Result<()> {
    let bytes = bytes.unwrap_or(u32::MAX);
    let option = libc::TCP_NOTSENT_LOWAT;
    sys::set_option(socket, libc::IPPROTO_TCP, option, &bytes.to_ne_bytes())
}

/// Writes once to a unix socket, and passes `descriptor` with the first byte.
pub fn send_with_descriptor(socket: &Socket, bytes: &[u8], descriptor: &impl AsFd) -> Moved {
    let Socket::Unix(stream) = socket else {
        return Moved::Broken(io::ErrorKind::Unsupported.into());
    };
    let descriptors = [descriptor.as_fd().as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    match sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(bytes)],
        &control,
        flags,
        None,
    ) {
        Ok(n) => Moved::Bytes(n),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => Moved::Blocked,
        Err(error) => Moved::Broken(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let one = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
        (one, listener.accept().expect("accepts").0)
    }

    #[test]
    fn progress_is_counted() {
        let (mut one, mut other) = pair();
        let before = progress(&one).expect("TCP_INFO");
        one.write_all(&[7; 5000]).expect("writes");
        let mut bytes = [0; 5000];
        other.read_exact(&mut bytes).expect("reads");
        let by = Instant::now() + Duration::from_secs(5);
        loop {
            let now = progress(&one).expect("TCP_INFO");
            if now.acked_bytes - before.acked_bytes == 5000 && !now.is_waiting() {
                break;
            }
            assert!(Instant::now() < by, "{now:?}");
            std::thread::yield_now();
        }
        let received = progress(&other).expect("TCP_INFO").received_bytes;
        assert_eq!(received, 5000);
    }

    #[test]
    fn the_kernel_paces() {
        let (mut one, mut other) = pair();
        pace(&one, Some(10_000_000)).expect("paces");
        limit_unsent(&one, Some(65_536)).expect("limits");
        let begun = Instant::now();
        let reader = std::thread::spawn(move || {
            let mut bytes = vec![0; 5_000_000];
            other.read_exact(&mut bytes).expect("reads");
        });
        one.write_all(&vec![1; 5_000_000]).expect("writes");
        reader.join().expect("no panic");
        let took = begun.elapsed().as_secs_f64();
        // 0.5 s; the first ten segments are not paced, and the machine may be busy.
        assert!(took > 0.3, "{took} s");
    }
}
