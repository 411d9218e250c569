//! A model checker over the real transition functions.
//!
//! Two VMs, a source and a destination sidecar, a register and a coordinator. Every interleaving of
//! their steps is walked, with lost leases, a coordinator that dies or gives up at any point, failing
//! migrations, and one crash: of a sidecar (which comes back), the register (which may come back) or
//! a QEMU. With MUSTER_MODEL_FAULTS=4 all of these crashes together (48 million states, some
//! minutes and 4 GiB in a release build: `MUSTER_MODEL_FAULTS=4 cargo test --release -p
//! muster-sidecar --lib commit`).
//!
//! In every state: no VM runs on both sides. From every state, once what can come back has come
//! back: every VM runs on exactly one side unless its last complete copy died, and the VMs of a
//! group without dead QEMUs are on the same side.

use std::collections::HashSet;

use super::*;

const VMS: usize = 2;
/// Worlds that are looked at before their successors are compared with what was seen.
const AT_ONCE: usize = 1 << 14;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Vm {
    source: SourceHalf,
    destination: DestinationHalf,
    source_ended: bool,
    destination_ended: bool,
    source_shot: bool,
    destination_shot: bool,
    /// The source's death came when the destination had everything already, and before the record
    /// gave the VM back to its source (from then on the other copy counts as stale).
    shot_when_loaded: bool,
    /// The destination's death came when it may have run.
    shot_when_running: bool,
    seen_source: bool,
    seen_destination: bool,
    record: Option<Side>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Sidecar {
    dead: bool,
    crashed_once: bool,
    group: Option<Decision>,
    sides: [Option<Side>; VMS],
    runs: [bool; VMS],
    wants_out: bool,
    lease_lost: bool,
    /// Restarted, and these QEMUs were not asked yet.
    unknown: [bool; VMS],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    vms: [Vm; VMS],
    source: Sidecar,
    destination: Sidecar,
    register_down: bool,
    register_fell_once: bool,
    group: Option<Decision>,
    coordinator_dead: bool,
    continued: bool,
    decided: Option<Decision>,
    giving_up: bool,
    shots: u8,
}

fn start() -> World {
    let vm = Vm {
        source: SourceHalf::Reversible,
        destination: DestinationHalf::Loading,
        source_ended: false,
        destination_ended: false,
        source_shot: false,
        destination_shot: false,
        shot_when_loaded: false,
        shot_when_running: false,
        seen_source: false,
        seen_destination: false,
        record: None,
    };
    World {
        vms: [vm; VMS],
        source: Sidecar::default(),
        destination: Sidecar::default(),
        register_down: false,
        register_fell_once: false,
        group: None,
        coordinator_dead: false,
        continued: false,
        decided: None,
        giving_up: false,
        shots: 0,
    }
}

impl Vm {
    fn source_runs(&self) -> bool {
        use SourceHalf as S;
        matches!(
            self.source,
            S::Reversible | S::Released | S::RunsAgain { .. }
        )
    }

    fn destination_runs(&self) -> bool {
        matches!(
            self.destination,
            DestinationHalf::ContSent | DestinationHalf::Running
        )
    }

    fn loaded(&self) -> bool {
        use DestinationHalf as D;
        matches!(self.destination, D::Loaded | D::ContSent | D::Running)
    }

    /// The stream broke: what may become of the source.
    fn cut(&self) -> Vec<Self> {
        let mut next = Vec::new();
        let released = self.source == SourceHalf::Released;
        if released || self.source == SourceHalf::Reversible {
            let mut vm = *self;
            vm.source = SourceHalf::RunsAgain {
                was_released: released,
            };
            if vm.destination == DestinationHalf::Loading {
                vm.destination = DestinationHalf::Broken;
            }
            next.push(vm);
        }
        if released && self.loaded() {
            // The last message was on its way already.
            next.push(Self {
                source: SourceHalf::Completed,
                ..*self
            });
        }
        next
    }
}

impl World {
    fn with_vm(&self, index: usize, vm: Vm) -> Self {
        let mut world = *self;
        world.vms[index] = vm;
        world
    }

    fn knowledge(&self, index: usize, sidecar: &Sidecar) -> Knowledge {
        Knowledge {
            group: sidecar.group,
            vm: sidecar.sides[index],
            wants_out: sidecar.wants_out,
            lease_lost: sidecar.lease_lost,
            destination_runs: sidecar.runs[index],
        }
    }

    /// The register's part of a step: asked by one of the sidecars.
    fn ask(&self, index: usize, next: Next, at_source: bool) -> Vec<Self> {
        if self.register_down {
            return vec![];
        }
        let mut world = *self;
        match next {
            Next::ProposeAbort => {
                world.group = world.group.or(Some(Decision::Abort));
            }
            Next::Claim(side) => {
                world.vms[index].record = world.vms[index].record.or(Some(side));
            }
            _ => {}
        }
        let (group, records) = (world.group, world.vms.map(|vm| vm.record));
        let sidecar = if at_source {
            &mut world.source
        } else {
            &mut world.destination
        };
        match next {
            Next::ProposeAbort => sidecar.group = group,
            Next::Claim(_) => sidecar.sides[index] = records[index],
            _ => {
                sidecar.group = sidecar.group.or(group);
                for (known, record) in sidecar.sides.iter_mut().zip(records) {
                    *known = known.or(record);
                }
            }
        }
        vec![world]
    }

    fn source_steps(&self, index: usize) -> Vec<Self> {
        let vm = self.vms[index];
        if self.source.dead || vm.source_ended {
            return vec![];
        }
        let next = source_next(vm.source, self.knowledge(index, &self.source));
        match next {
            Next::Wait => vec![],
            Next::AskAgain | Next::ProposeAbort | Next::Claim(_) => self.ask(index, next, true),
            Next::Cancel => vm
                .cut()
                .into_iter()
                .map(|vm| self.with_vm(index, vm))
                .collect(),
            Next::Resume => {
                let source = SourceHalf::RunsAgain { was_released: true };
                vec![self.with_vm(index, Vm { source, ..vm })]
            }
            Next::Quit => vec![self.with_vm(
                index,
                Vm {
                    source: SourceHalf::Quit,
                    ..vm
                },
            )],
            Next::End(_) => vec![self.with_vm(
                index,
                Vm {
                    source_ended: true,
                    ..vm
                },
            )],
            Next::Cont | Next::Kill => panic!("{next:?} is not the source's"),
        }
    }

    fn destination_steps(&self, index: usize) -> Vec<Self> {
        use DestinationHalf as D;
        let vm = self.vms[index];
        if self.destination.dead || vm.destination_ended {
            return vec![];
        }
        if self.destination.unknown[index] {
            let next = destination_next(D::Unknown, self.knowledge(index, &self.destination));
            assert_eq!(
                next,
                Next::Wait,
                "nothing is done to a QEMU that was not asked"
            );
            let mut asked = *self;
            asked.destination.unknown[index] = false;
            return vec![asked];
        }
        if vm.destination == D::ContSent {
            return vec![self.with_vm(
                index,
                Vm {
                    destination: D::Running,
                    ..vm
                },
            )];
        }
        let next = destination_next(vm.destination, self.knowledge(index, &self.destination));
        match next {
            Next::Wait => vec![],
            Next::AskAgain | Next::ProposeAbort | Next::Claim(_) => self.ask(index, next, false),
            Next::Cont => vec![self.with_vm(
                index,
                Vm {
                    destination: D::ContSent,
                    ..vm
                },
            )],
            Next::Kill => {
                let killed = Vm {
                    destination: D::Killed,
                    ..vm
                };
                let mut worlds = vec![self.with_vm(index, killed)];
                if matches!(vm.source, SourceHalf::Reversible | SourceHalf::Released) {
                    let cut = vm.cut().into_iter();
                    worlds = cut
                        .map(|cut| {
                            self.with_vm(
                                index,
                                Vm {
                                    destination: D::Killed,
                                    ..cut
                                },
                            )
                        })
                        .collect();
                }
                worlds
            }
            Next::End(_) => vec![self.with_vm(
                index,
                Vm {
                    destination_ended: true,
                    ..vm
                },
            )],
            Next::Cancel | Next::Resume | Next::Quit => {
                panic!("{next:?} is not the destination's")
            }
        }
    }

    fn qemu_steps(&self, index: usize) -> Vec<Self> {
        use DestinationHalf as D;
        let vm = self.vms[index];
        let mut worlds = Vec::new();
        if vm.source == SourceHalf::Released && vm.destination == D::Loading {
            worlds.push(self.with_vm(
                index,
                Vm {
                    destination: D::Loaded,
                    ..vm
                },
            ));
        }
        if vm.source == SourceHalf::Released && vm.loaded() {
            worlds.push(self.with_vm(
                index,
                Vm {
                    source: SourceHalf::Completed,
                    ..vm
                },
            ));
        }
        worlds.extend(vm.cut().into_iter().map(|vm| self.with_vm(index, vm)));
        if self.shots > 0 {
            return worlds;
        }
        let shoot = |vm: Vm| World {
            shots: 1,
            ..self.with_vm(index, vm)
        };
        use SourceHalf as S;
        if matches!(vm.source, S::Reversible | S::Released | S::Completed) {
            let was_released = vm.source != S::Reversible;
            let mut shot = Vm {
                source: S::Dead { was_released },
                source_shot: true,
                shot_when_loaded: vm.loaded() && vm.record != Some(Side::Source),
                ..vm
            };
            if vm.destination == D::Loading {
                shot.destination = D::Broken;
            }
            worlds.push(shoot(shot));
        }
        if matches!(
            vm.destination,
            D::Loading | D::Loaded | D::ContSent | D::Running
        ) {
            let cont_sent = vm.destination_runs();
            let shot = Vm {
                destination: D::Dead { cont_sent },
                destination_shot: true,
                shot_when_running: cont_sent,
                ..vm
            };
            match vm.cut() {
                cut if cut.is_empty() => worlds.push(shoot(shot)),
                cut => worlds.extend(cut.into_iter().map(|cut| {
                    shoot(Vm {
                        destination: shot.destination,
                        ..Vm {
                            source: cut.source,
                            ..shot
                        }
                    })
                })),
            }
        }
        worlds
    }

    fn crash_source(&self) -> Vec<Self> {
        let fresh = Sidecar {
            dead: true,
            crashed_once: true,
            ..Sidecar::default()
        };
        let mut worlds = vec![World {
            source: fresh,
            ..*self
        }];
        // Its relay goes with it: every stream is cut.
        for index in 0..VMS {
            worlds = worlds
                .into_iter()
                .flat_map(|world| match world.vms[index].cut() {
                    cut if cut.is_empty() => vec![world],
                    cut => cut.into_iter().map(|vm| world.with_vm(index, vm)).collect(),
                })
                .collect();
        }
        worlds
    }

    fn crash_destination(&self) -> Vec<Self> {
        let mut crashed = World {
            destination: Sidecar {
                dead: true,
                crashed_once: true,
                unknown: [true; VMS],
                ..Sidecar::default()
            },
            ..*self
        };
        for vm in &mut crashed.vms {
            // A restarted sidecar must assume that a `cont` was sent.
            if let DestinationHalf::Dead { cont_sent } = &mut vm.destination {
                *cont_sent = true;
            }
        }
        let mut worlds = vec![crashed];
        for index in 0..VMS {
            worlds = worlds
                .into_iter()
                .flat_map(|world| match world.vms[index].cut() {
                    cut if cut.is_empty() => vec![world],
                    cut => cut.into_iter().map(|vm| world.with_vm(index, vm)).collect(),
                })
                .collect();
        }
        worlds
    }

    fn coordinator_steps(&self) -> Vec<Self> {
        let mut worlds = Vec::new();
        if self.coordinator_dead {
            return worlds;
        }
        worlds.push(World {
            coordinator_dead: true,
            ..*self
        });
        if !self.continued && !self.giving_up && !self.source.dead {
            let mut world = World {
                continued: true,
                ..*self
            };
            for vm in &mut world.vms {
                if vm.source == SourceHalf::Reversible {
                    vm.source = SourceHalf::Released;
                }
            }
            worlds.push(world);
        }
        for index in 0..VMS {
            let vm = self.vms[index];
            if vm.source == SourceHalf::Completed && !vm.seen_source && !self.source.dead {
                worlds.push(self.with_vm(
                    index,
                    Vm {
                        seen_source: true,
                        ..vm
                    },
                ));
            }
            let loaded = vm.destination == DestinationHalf::Loaded;
            if loaded && !vm.seen_destination && !self.destination.dead {
                worlds.push(self.with_vm(
                    index,
                    Vm {
                        seen_destination: true,
                        ..vm
                    },
                ));
            }
            let runs = vm.destination == DestinationHalf::Running && !self.destination.dead;
            if runs && self.decided.is_some() && !self.source.dead && !self.source.runs[index] {
                let mut world = *self;
                world.source.runs[index] = true;
                worlds.push(world);
            }
        }
        match self.decided {
            None if self.giving_up => {
                if !self.register_down {
                    let group = self.group.or(Some(Decision::Abort));
                    worlds.push(World {
                        group,
                        decided: group,
                        ..*self
                    });
                }
                let mut world = *self;
                world.source.wants_out |= !world.source.dead;
                world.destination.wants_out |= !world.destination.dead;
                worlds.push(world);
            }
            None => {
                worlds.push(World {
                    giving_up: true,
                    ..*self
                });
                let all = self
                    .vms
                    .iter()
                    .all(|vm| vm.seen_source && vm.seen_destination);
                if all && !self.register_down {
                    let group = self.group.or(Some(Decision::Commit));
                    worlds.push(World {
                        group,
                        decided: group,
                        ..*self
                    });
                }
            }
            Some(Decision::Abort) => {
                let mut world = *self;
                world.source.wants_out |= !world.source.dead;
                world.destination.wants_out |= !world.destination.dead;
                worlds.push(world);
            }
            Some(Decision::Commit) => {
                let mut world = *self;
                if !world.destination.dead {
                    world.destination.group = world.destination.group.or(self.decided);
                }
                worlds.push(world);
                let mut world = *self;
                if !world.source.dead {
                    world.source.group = world.source.group.or(self.decided);
                }
                worlds.push(world);
            }
        }
        worlds
    }

    /// Crashes so far, of sidecars, the register and QEMUs.
    fn faults(&self) -> u8 {
        u8::from(self.source.crashed_once)
            + u8::from(self.destination.crashed_once)
            + u8::from(self.register_fell_once)
            + self.shots
    }

    fn successors(&self) -> Vec<Self> {
        let mut worlds = self.coordinator_steps();
        for index in 0..VMS {
            worlds.extend(self.source_steps(index));
            worlds.extend(self.destination_steps(index));
            worlds.extend(self.qemu_steps(index));
        }
        if !self.source.crashed_once {
            worlds.extend(self.crash_source());
        }
        if !self.destination.crashed_once {
            worlds.extend(self.crash_destination());
        }
        for at_source in [true, false] {
            let mut world = *self;
            let sidecar = if at_source {
                &mut world.source
            } else {
                &mut world.destination
            };
            if sidecar.dead {
                sidecar.dead = false;
                sidecar.wants_out = true;
            }
            sidecar.lease_lost = true;
            worlds.push(world);
        }
        if !self.register_fell_once {
            worlds.push(World {
                register_down: true,
                register_fell_once: true,
                ..*self
            });
        }
        if self.register_down {
            worlds.push(World {
                register_down: false,
                ..*self
            });
        }
        worlds
    }

    fn check_now(&self) {
        for vm in &self.vms {
            assert!(
                !(vm.source_runs() && vm.destination_runs()),
                "runs on both sides: {self:#?}"
            );
        }
    }

    /// Everything comes back, the coordinator does not: where does it end?
    fn check_settles(&self) {
        let mut world = *self;
        world.coordinator_dead = true;
        world.register_down = false;
        for sidecar in [&mut world.source, &mut world.destination] {
            sidecar.wants_out |= sidecar.dead;
            sidecar.dead = false;
            sidecar.lease_lost = true;
        }
        for _ in 0..60 {
            let steps = |world: &World| {
                (0..VMS)
                    .flat_map(|i| [world.source_steps(i), world.destination_steps(i)].concat())
                    .find(|next| next != world)
            };
            match steps(&world) {
                Some(next) => world = next,
                None => break,
            }
            world.check_now();
        }
        for vm in &world.vms {
            let sides = u8::from(vm.source_runs()) + u8::from(vm.destination_runs());
            let lost = (vm.source_shot && !vm.shot_when_loaded)
                || (vm.destination_shot && vm.shot_when_running);
            // A destination that died before a restart may have run; its source stays paused.
            let unsure = vm.destination_shot && self.destination.crashed_once;
            assert!(
                sides == 1 || lost || unsure,
                "runs nowhere: {world:#?}\nfrom {self:#?}"
            );
            assert!(
                vm.source_ended && vm.destination_ended || lost || unsure,
                "never ends: {world:#?}\nfrom {self:#?}"
            );
        }
        if self.shots == 0 {
            let at_source = world.vms[0].source_runs();
            assert!(
                world.vms.iter().all(|vm| vm.source_runs() == at_source),
                "split: {world:#?}"
            );
        }
    }
}

#[test]
fn no_interleaving_runs_a_vm_twice_or_nowhere() {
    let limit = std::env::var("MUSTER_MODEL_FAULTS").map_or(1, |text| {
        text.parse().expect("MUSTER_MODEL_FAULTS is a number")
    });
    let explore = |worlds: &[World], seen: &HashSet<World>| {
        let mut found = Vec::new();
        for world in worlds {
            world.check_now();
            world.check_settles();
            let successors = world.successors().into_iter();
            found.extend(successors.filter(|next| next.faults() <= limit && !seen.contains(next)));
        }
        found
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let mut seen = HashSet::from([start()]);
    let mut stack = vec![start()];
    while !stack.is_empty() {
        let some = stack.split_off(stack.len().saturating_sub(AT_ONCE));
        let parts = some.chunks(some.len().div_ceil(workers));
        let found = std::thread::scope(|scope| {
            let (explore, seen) = (&explore, &seen);
            let begin = |part| scope.spawn(move || explore(part, seen));
            let parts: Vec<_> = parts.map(begin).collect();
            let found = parts
                .into_iter()
                .flat_map(|part| part.join().expect("a world is wrong"));
            found.collect::<Vec<World>>()
        });
        stack.extend(found.into_iter().filter(|next| seen.insert(*next)));
    }
    println!("{} states", seen.len());
    assert!(
        seen.len() > 10_000,
        "the walk stopped early: {} states",
        seen.len()
    );
}
