//! One VM's move, seen from one host: the machines that drive QEMU through it.
//!
//! [`source::Source`] and [`destination::Destination`] take commands, QMP messages, news of the
//! stream and the time; they leave QMP commands in their [`QmpClient`] and [`Output`]s for the
//! daemon. They decide nothing about the group: `commit` does, and they carry out its [`Next`].
//!
//! [`QmpClient`]: crate::qmp::QmpClient
//! [`Next`]: crate::commit::Next

pub mod balloon;
pub mod destination;
pub mod disks;
pub mod identity;
pub mod source;

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::commit::End;
use crate::protocol::event::Event;
use crate::protocol::types::{Phase, PhaseEntry, Role, Side, Transport, VmReport};

/// The name under which a QEMU gets the socket of its stream.
pub const STREAM_FD: &str = "muster-stream";
/// How often a QEMU that only waits for its part is asked whether it is alive: one that hangs is
/// noticed before anybody needs it.
const HEALTH: Duration = Duration::from_millis(500);

/// The time, on both clocks: one for deadlines, one for people.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For deadlines and durations.
    pub mono: Instant,
    /// Unix time in microseconds.
    pub unix_us: i64,
}

/// What a machine wants from the daemon.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Tell the clients.
    Event(Event),
    /// Connect to the VM's monitor.
    ConnectQmp,
    /// Start the destination's QEMU from its template.
    Spawn,
    /// Send SIGKILL to the process.
    Kill,
    /// Source: accept QEMU's stream on a unix socket and carry it to the destination.
    Listen,
    /// Source: connect to the destination for a stream that QEMU itself will write.
    Connect,
    /// Source: accept QEMU's NBD clients on a unix socket and carry them to the destination.
    ListenDisks,
    /// Destination: disks may come; have their images written back as they do.
    WriteBack,
    /// Destination: the NBD server has stopped; close the connections that wait for that.
    SealDisks,
    /// Destination: QEMU has taken the connection of its stream; the other side may begin.
    AcceptStream,
    /// Close every connection of the stream.
    CutStream,
    /// Let the switchover acknowledgement through.
    OpenAckGate,
    /// Put a limit on the VM's stream in the relay, or take it off.
    Unpace,
    /// Run the hook before the switchover, and answer with `hook_ended`.
    RunHook,
    /// Write the run's note to disk and answer with `note_saved`.
    SaveNote,
    /// A person has something to do: keep it where the operator looks.
    Alarm {
        /// What, in one line.
        text: String,
        /// Whether it is still to be done when the run has ended.
        lasts: bool,
    },
}

/// What both halves have in common: who it is, where it stands, what is to be told.
#[derive(Debug)]
pub struct Half {
    /// The VM's name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Which half this is.
    pub role: Role,
    /// Guest RAM in bytes, 0 while unknown.
    pub total_bytes: u64,
    /// QEMU's STOP event: unix time in microseconds.
    pub stopped_at_us: Option<i64>,
    /// QEMU's RESUME event: unix time in microseconds.
    pub resumed_at_us: Option<i64>,
    /// How its stream goes.
    pub transport: Transport,
    phase: Phase,
    history: Vec<PhaseEntry>,
    error: Option<String>,
    outputs: Vec<Output>,
}

impl Half {
    /// A half in `preparing`.
    #[must_use]
    pub fn new(now: Now, name: String, uuid: Uuid, role: Role) -> Self {
        let entry = PhaseEntry {
            phase: Phase::Preparing,
            at_us: now.unix_us,
        };
        Self {
            name,
            uuid,
            role,
            total_bytes: 0,
            stopped_at_us: None,
            resumed_at_us: None,
            transport: Transport::Relay,
            phase: Phase::Preparing,
            history: vec![entry],
            error: None,
            outputs: Vec::new(),
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// What went wrong first, if anything.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Enters the last phase and says so, once. (A destination has told that it is committed when
    /// its guest ran.)
    pub fn end(&mut self, now: Now, end: End) {
        if self.phase.is_final() {
            return;
        }
        let (vm, role) = (self.name.clone(), self.role);
        match end {
            End::Committed => {
                self.enter(now, Phase::Committed);
                if role == Role::Source {
                    self.tell(Event::Committed {
                        vm,
                        role,
                        resumed_at_us: None,
                    });
                }
            }
            End::RolledBack => {
                self.enter(now, Phase::RolledBack);
                let reason = self.error.clone();
                self.tell(Event::RolledBack { vm, role, reason });
            }
            End::Diverged(side) => {
                let phase = match side {
                    Side::Source => Phase::RolledBack,
                    Side::Destination => Phase::Committed,
                };
                self.enter(now, phase);
                let reason = "its other copy was lost; this one was the last complete one".into();
                self.tell(Event::Diverged { vm, side, reason });
            }
            End::Lost => self.enter(now, Phase::Failed),
        }
    }

    /// Enters a phase, once; a final one stays.
    pub fn enter(&mut self, now: Now, phase: Phase) {
        if self.phase != phase && !self.phase.is_final() {
            self.phase = phase;
            self.history.push(PhaseEntry {
                phase,
                at_us: now.unix_us,
            });
        }
    }

    /// Asks something of the daemon.
    pub fn put(&mut self, output: Output) {
        self.outputs.push(output);
    }

    /// Tells the clients.
    pub fn tell(&mut self, event: Event) {
        self.put(Output::Event(event));
    }

    /// Records what went wrong and tells it; only the first of several faults is told.
    pub fn fault(&mut self, error: impl Into<String>, lost: bool) {
        self.tell_fault(error.into(), lost, false);
    }

    /// The same for what follows from a stream that was cut.
    pub fn secondary_fault(&mut self, error: impl Into<String>) {
        self.tell_fault(error.into(), false, true);
    }

    fn tell_fault(&mut self, error: String, lost: bool, secondary: bool) {
        if self.error.is_none() || lost {
            self.error.get_or_insert_with(|| error.clone());
            let (vm, role) = (self.name.clone(), self.role);
            self.tell(Event::Failed {
                vm,
                role,
                error,
                lost,
                secondary,
            });
        }
    }

    /// Takes what the daemon has to do.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    /// A report with what this half knows by itself.
    #[must_use]
    pub fn report(&self) -> VmReport {
        VmReport {
            transport: self.transport,
            total_bytes: self.total_bytes,
            history: self.history.clone(),
            stopped_at_us: self.stopped_at_us,
            resumed_at_us: self.resumed_at_us,
            error: self.error.clone(),
            ..VmReport::new(self.name.clone(), self.uuid, self.role, self.phase)
        }
    }
}
