//! The crate's only unsafe code: the guest's bytes, what a child does between fork and exec, and
//! system calls that nix does not wrap.

#![allow(
    unsafe_code,
    reason = "each block argues its safety; the rest of the crate denies it"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;

core::arch::global_asm!(include_str!("guest/rom.S"), options(att_syntax, raw));

unsafe extern "C" {
    static muster_rom_start: u8;
    static muster_rom_end: u8;
}

/// The assembled guest: the last 4 KiB of its ROM.
pub(crate) fn rom_code() -> &'static [u8] {
    let start = &raw const muster_rom_start;
    let end = &raw const muster_rom_end;
    // SAFETY: rom.S defines both symbols around one run of bytes in one read-only section, so the
    // range is initialised, immutable, and lives as long as the program.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Makes the child a session of its own that is killed when the thread that starts it ends, and
/// moves it to the network namespace `netns`.
pub(crate) fn isolate(command: &mut Command, netns: Option<Arc<File>>) {
    let prepare = move || {
        nix::unistd::setsid()?;
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        if let Some(file) = &netns {
            setns(file.as_ref(), CloneFlags::CLONE_NEWNET)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only three system calls are made, on values made before the
    // fork; nothing is allocated and no lock is taken.
    unsafe { command.pre_exec(prepare) };
}

/// A descriptor that names the process `pid` for as long as it is open.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(result).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened `fd` for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends `signal` to the process behind a pidfd.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    // SAFETY: the descriptor is open; the null siginfo asks the kernel for kill(2)'s own.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as i32,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets the calling thread run before all ordinary ones. Needs privileges.
pub(crate) fn make_thread_realtime() -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: `param` outlives the call, which only reads it; 0 means the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const param) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Opens the end of a new tap that hands frames to us, each behind a virtio_net_hdr of 10 bytes,
/// unsegmented and without checksums; reading and writing do not block. The tap is in the calling
/// thread's namespace and goes with the descriptor.
pub(crate) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // SAFETY: the path is a C string, and nothing of ours is written to.
    let fd = unsafe { libc::open(c"/dev/net/tun".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened `fd` for us, and nobody else knows of it.
    let tap = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: ifreq is made of integers and arrays of them, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(kind).unwrap_or_default();
    // SAFETY: TUNSETIFF reads and writes the ifreq that is handed over, which outlives the call.
    check(unsafe { libc::ioctl(fd, libc::TUNSETIFF, &raw mut request) })?;
    let header: libc::c_int = 10;
    // SAFETY: TUNSETVNETHDRSZ reads the int that is handed over, which outlives the call.
    check(unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header) })?;
    let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    check(unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })?;
    Ok(tap)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
