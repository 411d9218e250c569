//! Ctrl-C and SIGTERM: counted, never fatal while something is under way.
//!
//! The signals are blocked before any thread is started, and read from a signalfd by one thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// What is said at the first interrupt of a move, and at others.
pub(super) const MOVE: [&str; 2] = [
    "interrupted: rolling back, unless the decision has been made",
    "interrupted again: still finishing; nothing is left half done",
];
/// The same for a measurement.
pub(super) const MEASUREMENT: [&str; 2] = [
    "interrupted: ending the measurement",
    "interrupted again: still ending it",
];

/// Counts interrupts into `counter` from now on.
pub(super) fn watch(counter: &Arc<AtomicU8>, said: [&'static str; 2]) -> nix::Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let source = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
    let counter = Arc::clone(counter);
    std::thread::spawn(move || {
        while let Ok(signal) = source.read_signal() {
            if signal.is_none() {
                continue;
            }
            let before = counter.load(Ordering::Relaxed);
            counter.store(before.saturating_add(1), Ordering::Relaxed);
            super::err(said[usize::from(before > 0)]);
        }
    });
    Ok(())
}
