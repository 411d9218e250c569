//! Watching a move: every event and step as it happens, and snapshots for a live display.

use std::time::Duration;

use sidecar::protocol::event::Envelope;
use uuid::Uuid;

use crate::engine::{Step, VmProgress};

/// A group that a step belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupName {
    /// The group's run.
    pub run: Uuid,
    /// Names of its VMs.
    pub vms: Vec<String>,
}

/// Where the whole move stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Since it began.
    pub elapsed: Duration,
    /// Every VM, in the application file's order. VMs whose group has not begun have no phase.
    pub vms: Vec<VmProgress>,
}

/// Sees everything that a move does. The calls block the move: a test can inject a fault or hash
/// a guest's memory in them. The time they take does not count against the engine's deadlines,
/// and keep-alives go on meanwhile (for a minute at most).
pub trait Observer {
    /// What is done before the move begins: probing, measuring.
    fn survey(&mut self, _what: &str) {}

    /// An event from the sidecar of `host`, before the engine acts on it.
    fn event(&mut self, _host: &str, _envelope: &Envelope) {}

    /// A step of a group: [`Step::AllArrived`] comes before the decision is proposed,
    /// [`Step::Decided`] before it is carried out.
    fn step(&mut self, _group: &GroupName, _step: &Step) {}

    /// A snapshot, twice a second.
    fn progress(&mut self, _progress: &Progress) {}
}

/// Watches nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nobody;

impl Observer for Nobody {}
