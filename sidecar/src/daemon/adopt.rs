//! Taking over the runs of an earlier life of this sidecar, from its notes.

use std::time::Duration;

use super::halves::{HalfIo, outgoing_path};
use super::process::{self, Process};
use super::{Daemon, Entry, log};
use crate::migration::Now;
use crate::migration::destination::Destination;
use crate::migration::source::{Settings, Source};
use crate::notes::{self, Note, NoteVm};
use crate::protocol::types::{Role, Transport};
use crate::relay::hello::Token as StreamToken;
use crate::run::{Run, VmHalf};

impl Daemon {
    /// After a restart: adopts every run of which a note is left.
    pub(super) fn take_over(&mut self) -> anyhow::Result<()> {
        let (notes, problems) = notes::load(&self.config.state_dir.join("runs"))?;
        for problem in problems {
            log(&problem);
            self.alarms.push(problem);
        }
        let now = super::now();
        for note in notes {
            log(&format!(
                "run {}: taking over {} VM(s)",
                note.run,
                note.vms.len()
            ));
            self.adopt(now, &note);
        }
        self.tidy_disks(now);
        Ok(())
    }

    fn adopt(&mut self, now: Now, note: &Note) {
        let lease = Duration::from_millis(note.lease_ms);
        let mut run = Run::new(now, note.run, note.epoch, note.register.clone(), lease);
        run.max_downtime = Duration::from_millis(note.max_downtime_ms);
        run.hold = note.hold;
        run.lose_coordinator("this sidecar was restarted");
        let settings = Settings {
            max_downtime: run.max_downtime,
            hold: note.hold,
            throttle: false,
            resend: false,
            multifd_channels: 0,
            termination: note.termination(),
            transport: Transport::Relay,
        };
        let group = self.pacing.add_group(now.mono, None);
        let mut io = Vec::new();
        let mut processes = Vec::new();
        for vm in &note.vms {
            run.halves.push(adopt_half(now, vm, settings));
            if vm.role == Role::Source {
                // Where QEMU connected to the earlier life.
                let _ = std::fs::remove_file(outgoing_path(&self.config.runtime_dir, &vm.vm));
            }
            let mut half = HalfIo::new(
                vm.qmp.clone().into(),
                self.incoming_path(&vm.vm),
                StreamToken([0; 32]),
            );
            half.created.clone_from(&vm.created);
            io.push(half);
            let known = vm
                .process
                .and_then(|(pid, started)| Process::watch_same(pid, started).ok());
            // It may have been started just before the earlier life ended.
            let started = || match vm.role {
                Role::Destination => process::find_by_arguments(&self.incoming_arguments(&vm.vm)),
                Role::Source => None,
            };
            let process = known.or_else(|| started().and_then(|pid| Process::watch(pid).ok()));
            processes.push(process);
        }
        self.runs.insert(
            note.run,
            Entry {
                run,
                io,
                group,
                owner: None,
                notes: 0,
                scheduled: Vec::new(),
            },
        );
        for (half, process) in processes.into_iter().enumerate() {
            if let Some(process) = process {
                self.watch_process((note.run, half), process);
            }
        }
    }
}

fn adopt_half(now: Now, vm: &NoteVm, settings: Settings) -> VmHalf {
    let name = vm.vm.clone();
    match vm.role {
        Role::Source => {
            let source = Source::adopt(
                now,
                name,
                vm.uuid,
                settings,
                vm.released,
                vm.originals.clone(),
                vm.was_running,
            );
            let source = source.with_adopted_disks(&vm.disks);
            VmHalf::Source(Box::new(source.with_adopted_balloon(vm.balloon.clone())))
        }
        Role::Destination => {
            let destination = Destination::adopt(
                now,
                name,
                vm.uuid,
                settings,
                vm.was_running,
                vm.originals.clone(),
            );
            VmHalf::Destination(Box::new(
                destination.with_adopted_balloon(vm.balloon.clone()),
            ))
        }
    }
}
