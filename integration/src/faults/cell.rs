//! What a cell of the table is — which fault, upon whom, in which phase — and what must come of it.

use std::fmt;

use nix::sys::signal::Signal;
use sidecar::protocol::types::{QemuBuild, Transport};

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL.
    Kill,
    /// SIGSTOP: it hangs, and comes back at the end.
    Stop,
    /// The link between the hosts loses every packet.
    Cut,
    /// SIGKILL, and it is started again at once, as a service manager does.
    Restart,
    /// SIGKILL, and it does not come back until `muster recover --fenced` has settled what is left.
    Fence,
    /// Nothing.
    None,
}

impl Fault {
    /// The signal it is, if it is one.
    #[must_use]
    pub fn signal(self) -> Option<Signal> {
        match self {
            Self::Kill | Self::Restart | Self::Fence => Some(Signal::SIGKILL),
            Self::Stop => Some(Signal::SIGSTOP),
            Self::Cut | Self::None => None,
        }
    }
}

/// To whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// The coordinator.
    Coordinator,
    /// The sidecar of the host that the VMs leave.
    SourceSidecar,
    /// The sidecar of the host that they are to reach.
    DestinationSidecar,
    /// The sidecar that keeps the register.
    Register,
    /// The source's QEMU of the first VM.
    SourceQemu,
    /// The destination's QEMU of the first VM.
    DestinationQemu,
    /// The link between source and destination.
    Link,
    /// Nobody: the move without a fault.
    Nobody,
}

/// When: the state of the group at that moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// QEMUs are being started and set up.
    Preparing,
    /// Memory is being copied.
    Precopy,
    /// Every VM is in wait-and-copy.
    Held,
    /// Every VM is paused, `continue` is not sent.
    Stopped,
    /// Stop-and-copy is under way.
    Switching,
    /// Every half has arrived, nothing is decided.
    Arrived,
    /// The commit is recorded, nobody has been told.
    Committing,
}

impl Point {
    /// All, in the order in which a move passes them.
    pub const ALL: [Self; 7] = [
        Self::Preparing,
        Self::Precopy,
        Self::Held,
        Self::Stopped,
        Self::Switching,
        Self::Arrived,
        Self::Committing,
    ];
}

/// Where a VM is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It runs at its source, and only there.
    Source,
    /// It runs at its destination, and only there.
    Destination,
    /// It runs at its source, or is paused as [`Self::Paused`] is.
    SourceOrPaused,
    /// On one side, whichever.
    OneSide,
    /// On one side, the same for the whole group.
    Together,
    /// Its last complete copy died: it runs nowhere.
    Lost,
    /// The living cannot know, or cannot reach it: it is paused, and somebody says so.
    Paused,
}

/// What must come of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Without help, within ten seconds: the VM whose QEMU was hit, and the others.
    pub alone: (Place, Place),
    /// After what was stopped or killed is back.
    pub finally: (Place, Place),
}

/// One cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// What happens.
    pub fault: Fault,
    /// To whom.
    pub target: Target,
    /// When.
    pub point: Point,
    /// How the streams go.
    pub transport: Transport,
}

impl Cell {
    /// The whole table: both signals upon every process in every phase; the link cut in every
    /// phase; a sidecar that is restarted at once while it keeps the register; the register's host
    /// gone for good.
    #[must_use]
    pub fn all() -> Vec<Self> {
        Self::over(Transport::Relay)
    }

    /// The table for this QEMU: a patched one is held over both transports.
    #[must_use]
    pub fn possible(build: QemuBuild) -> Vec<Self> {
        let mut cells = Self::all();
        if build == QemuBuild::Patched {
            cells.extend(Self::over(Transport::Direct));
        }
        cells
    }

    fn over(transport: Transport) -> Vec<Self> {
        use Target as T;
        let processes = [
            T::Coordinator,
            T::SourceSidecar,
            T::DestinationSidecar,
            T::Register,
            T::SourceQemu,
            T::DestinationQemu,
        ];
        let mut cells = vec![Self {
            fault: Fault::None,
            target: T::Nobody,
            point: Point::Arrived,
            transport,
        }];
        let mut add = |fault, target, points: &[Point]| {
            cells.extend(points.iter().map(|&point| Self {
                fault,
                target,
                point,
                transport,
            }));
        };
        for fault in [Fault::Kill, Fault::Stop] {
            for target in processes {
                add(fault, target, &Point::ALL);
            }
        }
        add(Fault::Cut, T::Link, &Point::ALL);
        add(Fault::Restart, T::SourceSidecar, &Point::ALL);
        let after_continue = [Point::Stopped, Point::Switching, Point::Arrived];
        add(Fault::Fence, T::Register, &after_continue);
        cells
    }

    /// Whether the first VM's source keeps the register, as it does by default; else a third host
    /// does, so that every target is a process of its own.
    #[must_use]
    pub fn register_at_source(self) -> bool {
        self.fault == Fault::Restart
    }

    /// What must come of it. docs/failure-modes.md has the reasons.
    #[must_use]
    pub fn expected(self, build: QemuBuild) -> Expected {
        use Place as P;
        let same = |alone, finally| Expected {
            alone: (alone, alone),
            finally: (finally, finally),
        };
        let early = self.point <= Point::Switching;
        let reversible = self.point < Point::Stopped;
        let settled = |place| same(place, place);
        let forward = settled(P::Destination);
        let back = settled(P::Source);
        let one = |alone, finally, others| Expected {
            alone: (alone, others),
            finally: (finally, others),
        };
        let direct = self.transport == Transport::Direct;
        match (self.target, self.fault) {
            (Target::Nobody, _) => forward,
            // The destination's sidecar misses its companion and shuts the stream down, which a
            // paused source notices, too; in stop-and-copy the QEMUs may be done before.
            (Target::SourceSidecar, Fault::Kill | Fault::Stop)
                if direct && self.point == Point::Stopped =>
            {
                back
            }
            // A patched source that waits, paused, sees its relay die, too, and goes on by itself.
            (Target::SourceSidecar, Fault::Kill)
                if build == QemuBuild::Patched && self.point == Point::Stopped =>
            {
                back
            }
            (Target::SourceSidecar, Fault::Stop) if direct && self.point == Point::Switching => {
                same(P::SourceOrPaused, P::Source)
            }
            (Target::Coordinator, _) if self.point < Point::Committing => back,
            // A source whose stream breaks in stop-and-copy goes on by itself; one that is paused
            // before it, or has sent everything, is in the hands of its own sidecar alone.
            (Target::SourceSidecar, Fault::Kill) if self.point == Point::Switching => {
                same(P::SourceOrPaused, P::Source)
            }
            (Target::SourceSidecar, Fault::Kill | Fault::Stop) if early => {
                same(if reversible { P::Source } else { P::Paused }, P::Source)
            }
            (Target::SourceSidecar, Fault::Restart) if self.point <= Point::Held => back,
            (Target::SourceSidecar, Fault::Restart) if self.point < Point::Committing => {
                settled(P::Together)
            }
            (Target::DestinationSidecar, _) if !early => same(P::Paused, P::Destination),
            (Target::Register, Fault::Fence) => same(P::Paused, P::Source),
            (Target::Register, _) if reversible => back,
            (Target::Register, _) if self.point < Point::Committing => same(P::Paused, P::Together),
            (Target::SourceQemu, Fault::Kill) if early => one(P::Lost, P::Lost, P::Source),
            (Target::SourceQemu, _) if early => one(P::Paused, P::Source, P::Source),
            // Its sidecar proposes `abort` while the coordinator proposes `commit`.
            (Target::DestinationQemu, Fault::Kill) if self.point == Point::Arrived => {
                one(P::Source, P::Source, P::OneSide)
            }
            (Target::DestinationQemu, Fault::Kill) if !early => {
                one(P::Source, P::Source, P::Destination)
            }
            (Target::DestinationQemu, _) if !early => {
                one(P::Paused, P::Destination, P::Destination)
            }
            (Target::DestinationSidecar | Target::DestinationQemu | Target::Link, _) if early => {
                back
            }
            _ => forward,
        }
    }
}

impl Place {
    /// Whether it is only settled with help.
    #[must_use]
    pub fn is_open(self) -> bool {
        matches!(self, Self::Paused | Self::SourceOrPaused)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Cut => "cut",
            Self::Restart => "restart",
            Self::Fence => "fence",
            Self::None => "none",
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Coordinator => "coordinator",
            Self::SourceSidecar => "source-sidecar",
            Self::DestinationSidecar => "destination-sidecar",
            Self::Register => "register",
            Self::SourceQemu => "source-qemu",
            Self::DestinationQemu => "destination-qemu",
            Self::Link => "link",
            Self::Nobody => "nobody",
        })
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Preparing => "preparing",
            Self::Precopy => "precopy",
            Self::Held => "held",
            Self::Stopped => "stopped",
            Self::Switching => "switching",
            Self::Arrived => "arrived",
            Self::Committing => "committing",
        })
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}/{}/{}", self.fault, self.target, self.point);
        match self.transport {
            Transport::Relay => f.pad(&text),
            Transport::Direct => f.pad(&format!("direct/{text}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_cell_once() {
        let cells = Cell::all();
        let signals = [Fault::Kill, Fault::Stop];
        let count = |test: &dyn Fn(&Cell) -> bool| cells.iter().filter(|cell| test(cell)).count();
        assert_eq!(count(&|cell| signals.contains(&cell.fault)), 84);
        assert_eq!(count(&|cell| cell.fault == Fault::Cut), 7);
        let mut names: Vec<String> = cells.iter().map(Cell::to_string).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), cells.len());
    }

    #[test]
    fn a_vm_is_lost_only_with_its_source_before_its_arrival() {
        for cell in Cell::possible(QemuBuild::Patched) {
            let lost = cell.expected(QemuBuild::Patched).finally.0 == Place::Lost;
            let source_died = cell.target == Target::SourceQemu && cell.fault == Fault::Kill;
            assert_eq!(
                lost,
                source_died && cell.point <= Point::Switching,
                "{cell}"
            );
            let (hit, others) = cell.expected(QemuBuild::Patched).finally;
            assert!(!hit.is_open() && !others.is_open(), "{cell}");
        }
    }
}
