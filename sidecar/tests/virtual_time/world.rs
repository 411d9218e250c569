//! A world in which a half of a VM lives: a pretended QEMU, a register, and time that jumps.

use super::*;

pub const VM: Uuid = Uuid::from_u128(7);

/// What the register does when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    Works,
    Silent,
}

pub struct World {
    pub now: Now,
    pub run: Run,
    pub qemu: Qemu,
    pub events: Vec<Event>,
    pub outputs: Vec<Output>,
    pub register: Register,
    pub group: Option<RecordValue>,
    pub vm: Option<RecordValue>,
    pub heard: bool,
}

pub fn settings(hold: bool) -> Settings {
    Settings {
        max_downtime: Duration::from_millis(300),
        hold,
        resend: false,
        throttle: true,
        multifd_channels: 0,
        termination: Termination::default(),
        transport: Transport::Relay,
    }
}

impl World {
    pub fn new(half: impl FnOnce(Now) -> VmHalf, status: &str) -> Self {
        let now = Now {
            mono: Instant::now(),
            unix_us: 0,
        };
        let lease = Duration::from_secs(5);
        let mut run = Run::new(now, Uuid::from_u128(1), 1, "unix:/r".into(), lease);
        run.halves.push(half(now));
        Self {
            now,
            run,
            qemu: Qemu::new(VM, status),
            events: Vec::new(),
            outputs: Vec::new(),
            register: Register::Works,
            group: None,
            vm: None,
            heard: true,
        }
    }

    pub fn source(hold: bool) -> Self {
        let make =
            |now| VmHalf::Source(Box::new(Source::new(now, "db".into(), VM, settings(hold))));
        Self::new(make, "running")
    }

    pub fn destination() -> Self {
        let place = Place {
            machine: Some("pc-i440fx-10.0".into()),
            stream_address: "10.0.0.2:4601".into(),
            incoming_path: "/run/db.in".into(),
            spawn: true,
            disks: Vec::new(),
            images: Vec::new(),
            nbd_path: "/run/db.nbd".into(),
        };
        let make = |now| {
            VmHalf::Destination(Box::new(Destination::new(
                now,
                "db".into(),
                VM,
                settings(true),
                place,
            )))
        };
        Self::new(make, "inmigrate")
    }

    pub fn src(&mut self) -> &mut Source {
        self.run.halves[0].source_mut().expect("a source")
    }

    pub fn dst(&mut self) -> &mut Destination {
        self.run.halves[0].destination_mut().expect("a destination")
    }

    pub fn phase(&self) -> Phase {
        self.run.halves[0].half().phase()
    }

    /// Lets everything happen that happens at this moment.
    pub fn settle(&mut self) {
        for _ in 0..50 {
            if self.heard {
                self.run.hear(self.now);
            }
            let outputs = self.run.reconcile(self.now);
            let talked = self.talk();
            if outputs.is_empty() && !talked {
                return;
            }
            for output in outputs {
                self.obey(output);
            }
        }
        panic!("it never settles: {:?}", self.events.last());
    }

    pub fn talk(&mut self) -> bool {
        let now = self.now;
        macro_rules! talk {
            ($half:expr) => {{
                let half = $half;
                let Some(qmp) = &mut half.qmp else {
                    return false;
                };
                let written = qmp.output().to_vec();
                qmp.written(written.len());
                let said = self.qemu.talk(&written);
                qmp.receive(&said);
                let mut messages = Vec::new();
                while let Ok(Some(message)) = qmp.poll(now.mono) {
                    messages.push(message);
                }
                let any = !messages.is_empty() || !written.is_empty();
                for message in messages {
                    half.handle(now, message);
                }
                any
            }};
        }
        match &mut self.run.halves[0] {
            VmHalf::Source(source) => talk!(source),
            VmHalf::Destination(destination) => talk!(destination),
        }
    }

    pub fn obey(&mut self, output: RunOutput) {
        let now = self.now;
        match output {
            RunOutput::Event(event) => self.events.push(event),
            RunOutput::Ended => {}
            RunOutput::Ask(ask) => self.ask(ask),
            RunOutput::Half(_, output) => {
                match &output {
                    Output::Event(event) => self.events.push(event.clone()),
                    Output::ConnectQmp => match &mut self.run.halves[0] {
                        VmHalf::Source(source) => source.qmp_connected(now),
                        VmHalf::Destination(destination) => destination.qmp_connected(now),
                    },
                    Output::Spawn => self.dst().spawned(now),
                    Output::SaveNote => {
                        if let Some(source) = self.run.halves[0].source_mut() {
                            source.note_saved(now);
                        }
                    }
                    Output::Listen => self.src().listening(now, "/run/db.out"),
                    Output::CutStream => self.cut(),
                    Output::Kill => self.run.halves[0].process_gone(now),
                    Output::Connect => self.src().connected(now),
                    Output::OpenAckGate
                    | Output::Unpace
                    | Output::AcceptStream
                    | Output::WriteBack
                    | Output::SealDisks => {}
                    Output::RunHook | Output::Alarm { .. } => {}
                    Output::ListenDisks => self.src().disks_listening(now, "/run/db.mirror"),
                }
                self.outputs.push(output);
            }
        }
    }

    /// The stream is gone: QEMU fails back, unless it had completed.
    pub fn cut(&mut self) {
        if matches!(
            self.qemu.migration.as_str(),
            "active" | "pre-switchover" | "device"
        ) && !self.qemu.hung
        {
            self.qemu.fails("failed");
        }
    }

    pub fn ask(&mut self, ask: Ask) {
        if self.register == Register::Silent {
            self.run.not_answered(self.now, "connection refused");
            return;
        }
        let mut records = Vec::new();
        match ask {
            Ask::Decide(RecordKey::Group, value) => {
                records.push((RecordKey::Group, *self.group.get_or_insert(value)));
            }
            Ask::Decide(key, value) => records.push((key, *self.vm.get_or_insert(value))),
            Ask::Records => {
                records.extend(self.group.map(|value| (RecordKey::Group, value)));
                records.extend(self.vm.map(|value| (RecordKey::Vm(VM), value)));
            }
        }
        self.run.answered(self.now, &records);
    }

    /// Lets `time` pass, deadline by deadline.
    pub fn pass(&mut self, time: Duration) {
        let end = self.now.mono + time;
        self.settle();
        while let Some(at) = self.run.deadline().filter(|at| *at <= end) {
            let step = at.saturating_duration_since(self.now.mono);
            self.advance(step.max(Duration::from_micros(1)));
            self.settle();
        }
        self.advance(end.saturating_duration_since(self.now.mono));
        self.settle();
    }

    pub fn advance(&mut self, step: Duration) {
        self.now.mono += step;
        self.now.unix_us += i64::try_from(step.as_micros()).expect("short");
    }

    pub fn has(&self, test: impl Fn(&Event) -> bool) -> bool {
        self.events.iter().any(test)
    }

    pub fn count(&self, command: &str) -> usize {
        self.qemu
            .commands
            .iter()
            .filter(|name| *name == command)
            .count()
    }

    /// Brings a source to this phase on the usual way.
    pub fn up_to(&mut self, phase: Phase) {
        self.pass(Duration::from_millis(50));
        if phase == Phase::Prepared {
            return;
        }
        let now = self.now;
        self.src().start(now, false);
        self.pass(Duration::from_millis(200));
        if phase == Phase::Precopy {
            return;
        }
        if !self.qemu.jobs.is_empty() {
            self.qemu.mirrors_ready(0);
            self.pass(Duration::from_millis(200));
        }
        self.src().rate_bytes_per_s = 50 * MIB;
        self.qemu.dirty_pages_per_s = 2560;
        self.qemu.round(256 * MIB, 50 * MIB);
        self.pass(Duration::from_millis(200));
        self.qemu.round(50 * MIB, 5 * MIB);
        self.pass(Duration::from_millis(200));
        if phase == Phase::Held {
            return;
        }
        let now = self.now;
        self.src().arm(now);
        self.pass(Duration::from_millis(300));
        if phase == Phase::Armed {
            return;
        }
        let now = self.now;
        self.src().release(now);
        self.settle();
        assert!(self.outputs.contains(&Output::OpenAckGate));
        self.qemu.pauses();
        self.settle();
        if phase == Phase::Stopped {
            return;
        }
        let now = self.now;
        self.src().proceed(now);
        self.settle();
        for _ in 0..self.qemu.disks.len() {
            self.src().disk_sealed(now);
        }
        self.settle();
        if phase == Phase::Switching {
            return;
        }
        self.qemu.completes("postmigrate");
        self.settle();
    }
}
