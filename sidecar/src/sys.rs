//! The crate's only unsafe code: what nix does not wrap (pidfds, some socket options), and the signal
//! mask of programs that are started.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A descriptor that becomes readable when process `pid` ends.
///
/// # Errors
/// The process does not exist (any more), or the kernel is older than 5.3.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
    let fd = RawFd::try_from(result).map_err(|_| io::Error::other("no descriptor"))?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal to the process behind `pidfd`: never to another one that got its number later.
///
/// # Errors
/// The process is gone.
pub fn pidfd_kill(pidfd: &OwnedFd, signal: i32) -> io::Result<()> {
    let null = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open, a null siginfo is allowed, no memory of ours is touched.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            libc::c_long::from(pidfd.as_raw_fd()),
            libc::c_long::from(signal),
            null,
            0,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sets an option of a socket: `value` are the bytes that the kernel expects for it.
///
/// # Errors
/// The kernel refuses.
pub fn set_option(socket: &impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open while it is borrowed; `value` is valid for `length` bytes, and
    // the kernel only reads it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            length,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Reads an option of a socket into `value`; returns how many bytes the kernel has filled.
///
/// # Errors
/// The kernel refuses.
pub fn get_option(
    socket: &impl AsFd,
    level: i32,
    name: i32,
    value: &mut [u8],
) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open while it is borrowed; `value` is valid for `length` bytes, of
    // which the kernel writes at most as many and says how many in `length`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(length).unwrap_or(0).min(value.len()))
}

/// What an ioctl that tells a number of a socket's bytes says: SIOCOUTQ or SIOCINQ.
///
/// # Errors
/// It is no socket, or one that does not count them.
pub fn queued_bytes(socket: &impl AsFd, which: libc::Ioctl) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open while it is borrowed; both requests write one int, to ours.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), which, &raw mut bytes) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(bytes).unwrap_or(0))
}

/// Lets the program start with no signal blocked: the sidecar's own mask, which its children would
/// inherit, keeps SIGTERM from them.
pub fn unblock_signals(command: &mut std::process::Command) {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    use std::os::unix::process::CommandExt;

    let unblock =
        || sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).map_err(Into::into);
    // SAFETY: the closure runs in the forked child before exec. It allocates nothing, takes no
    // lock, and makes one system call, sigprocmask, which is async-signal-safe.
    unsafe { command.pre_exec(unblock) };
}
