//! A WAN in userspace: sites joined by lines whose time, rate and loss can be changed at any time.
//!
//! Every host has a tap on its bridge, whose other end is held here: one thread moves the frames,
//! as [`Switch`] says. Segmentation and checksums are left to the ends (IFF_VNET_HDR), so that
//! frames of 64 KiB pass as one and 400 Mbit/s cost a tenth of a core. Neither netem nor any
//! privilege beyond a namespace's is needed.

mod switch;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

pub use switch::{Count, Mac, Path, Switch};

use super::{Host, NetError};
use crate::clock::Micros;
use crate::sys;

const TAP: &str = "wan";
/// The largest frame of segmentation offload, with headers.
const FRAME: usize = 80 << 10;
/// Frames read from one port before another's turn.
const BATCH: usize = 64;
/// The thread looks this often whether it is to end.
const IDLE: Duration = Duration::from_millis(50);

/// The WAN; its lines go when this is dropped.
#[derive(Debug)]
pub struct Wan {
    switch: Arc<Mutex<Switch>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Wan {
    /// Joins the bridges of hosts, each in a site, all paths open.
    ///
    /// # Errors
    /// A tap cannot be made.
    pub fn join(hosts: &[(&Host, usize)]) -> Result<Self, NetError> {
        let sites: Vec<usize> = hosts.iter().map(|(_, site)| *site).collect();
        let mut lines = Vec::new();
        for (host, _) in hosts {
            lines.push(host.open_line(TAP)?);
        }
        let switch = Arc::new(Mutex::new(Switch::new(&sites)));
        let end = Arc::new(AtomicBool::new(false));
        let (shared, ending) = (Arc::clone(&switch), Arc::clone(&end));
        let thread = std::thread::Builder::new()
            .name("wan".to_owned())
            .spawn(move || carry(&lines, &shared, &ending))
            .map_err(|error| NetError::File {
                path: "the thread of the WAN".into(),
                error,
            })?;
        Ok(Self {
            switch,
            end,
            thread: Some(thread),
        })
    }

    /// Changes the paths between two sites.
    pub fn set_path(&self, one: usize, other: usize, path: Path) {
        lock(&self.switch).set_path(one, other, path);
    }

    /// What went from one site to another so far.
    #[must_use]
    pub fn count(&self, from: usize, to: usize) -> Count {
        lock(&self.switch).count(from, to)
    }

    /// The bytes that went between sites so far, by sender and receiver.
    #[must_use]
    pub fn pairs(&self) -> Vec<((Mac, Mac), u64)> {
        let switch = lock(&self.switch);
        switch
            .pairs()
            .iter()
            .map(|(pair, bytes)| (*pair, *bytes))
            .collect()
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(switch: &Mutex<Switch>) -> MutexGuard<'_, Switch> {
    switch.lock().unwrap_or_else(PoisonError::into_inner)
}

fn carry(lines: &[OwnedFd], switch: &Mutex<Switch>, end: &AtomicBool) {
    // A late frame is a longer way. Without the privilege it is as late as other threads make it.
    let _ = sys::make_thread_realtime();
    let mut buffer = vec![0; FRAME];
    while !end.load(Ordering::Relaxed) {
        let next = lock(switch).next_arrival();
        let wait = next.map_or(IDLE, |at| at.since(Micros::now()).min(IDLE));
        let mut waiting: Vec<PollFd<'_>> = lines
            .iter()
            .map(|line| PollFd::new(line.as_fd(), PollFlags::POLLIN))
            .collect();
        match ppoll(&mut waiting, Some(TimeSpec::from(wait)), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
        for (port, line) in lines.iter().enumerate() {
            if waiting[port].any() == Some(true) && !read_all(line, port, switch, &mut buffer) {
                // The host is gone, and with it all that is to be carried.
                return;
            }
        }
        deliver(lines, switch);
    }
}

/// Reads what waits at a port; `false` if there is no such port any more.
fn read_all(line: &OwnedFd, port: usize, switch: &Mutex<Switch>, buffer: &mut [u8]) -> bool {
    for _ in 0..BATCH {
        match nix::unistd::read(line, buffer) {
            Ok(length) => lock(switch).take(Micros::now(), port, &buffer[..length]),
            Err(Errno::EAGAIN) => return true,
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
    true
}

fn deliver(lines: &[OwnedFd], switch: &Mutex<Switch>) {
    loop {
        let Some((port, frame)) = lock(switch).arrived(Micros::now()) else {
            return;
        };
        // A frame that a host does not take is lost, as on any line.
        let _: Result<usize, io::Error> =
            nix::unistd::write(&lines[port], &frame).map_err(io::Error::from);
    }
}
