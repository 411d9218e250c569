//! A move as the testbed's commands watch it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use coordinator::RunOptions;
use coordinator::engine::Step;
use coordinator::live::Live;
use coordinator::observer::{GroupName, Observer, Progress};
use sidecar::protocol::event::Envelope;

use crate::signals::Interrupt;

/// Passes a move on to the live display, and Ctrl-C to the coordinator.
#[derive(Debug)]
pub struct Watch<'a> {
    live: Live,
    interrupt: &'a Interrupt,
    asked: Arc<AtomicU8>,
}

impl<'a> Watch<'a> {
    /// Of a move that is made with `options`.
    #[must_use]
    pub fn new(options: &RunOptions, interrupt: &'a Interrupt) -> Self {
        Self {
            live: Live::new(false),
            interrupt,
            asked: Arc::clone(&options.interrupt),
        }
    }

    /// Leaves the last state on the screen.
    pub fn finish(&mut self) {
        self.live.finish();
    }
}

impl Observer for Watch<'_> {
    fn event(&mut self, host: &str, envelope: &Envelope) {
        self.live.event(host, envelope);
    }

    fn step(&mut self, group: &GroupName, step: &Step) {
        self.live.step(group, step);
    }

    fn progress(&mut self, progress: &Progress) {
        if self.interrupt.check().is_err() {
            self.asked.store(1, Ordering::Relaxed);
        }
        self.live.progress(progress);
    }
}
