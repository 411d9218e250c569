use std::path::Path;

use sidecar::protocol::command::Command;
use sidecar::protocol::event::Event;
use sidecar::protocol::types::{QemuBuild, Role};

use super::*;
use crate::application::Policy;
use crate::policy::plan;

mod replan;
mod two_stages;
mod world;

struct Counter(u128);

impl Randomness for Counter {
    fn run(&mut self) -> Uuid {
        self.0 += 1;
        Uuid::from_u128(self.0)
    }

    fn token(&mut self) -> String {
        "0".repeat(64)
    }
}

fn app(on_partial: OnPartial) -> Application {
    let text = r#"
        version = 1
        application = { name = "shop", bandwidth = "50MB/s" }
        host = [{ name = "a", control = "unix:/a" }, { name = "b", control = "unix:/b" }]
        vm = [
          { name = "web", uuid = "00000000-0000-0000-0000-000000000001", from = "a", to = "b" },
          { name = "db", uuid = "00000000-0000-0000-0000-000000000002", from = "a", to = "b" },
        ]
    "#;
    let mut app = Application::parse(text, Path::new("test")).expect("good");
    app.on_partial = on_partial;
    app
}

/// Plays sidecars for which every move works, except the runs in `failing`.
struct Play<'a> {
    conductor: Conductor<'a, Counter>,
    seq: u64,
    now: Duration,
    failing: Vec<u128>,
    /// Run, first VM, host it started from, limit.
    starts: Vec<(u128, String, HostId, u64)>,
}

impl<'a> Play<'a> {
    fn new(app: &'a Application, policy: Policy, failing: &[u128]) -> Self {
        let plan = plan(app, policy).expect("carried out");
        Self {
            conductor: Conductor::new(app, plan, BTreeMap::new(), Counter(0)),
            seq: 0,
            now: Duration::from_secs(1),
            failing: failing.to_vec(),
            starts: Vec::new(),
        }
    }

    fn say(&mut self, run: Uuid, host: HostId, event: Event) {
        self.seq += 1;
        let envelope = Envelope {
            run,
            seq: self.seq,
            at_us: 0,
            event,
        };
        // The gap in `seq` between hosts only causes a query-run.
        self.conductor.handle_event(self.now, host, &envelope);
    }

    fn play(&mut self) -> Outcome {
        self.conductor.begin(self.now);
        let mut limit = 0;
        for _ in 0..1000 {
            let Some((index, output)) = self.conductor.poll_output() else {
                break;
            };
            let Output::Send {
                host,
                ticket,
                command,
            } = output
            else {
                continue;
            };
            let spec = self.conductor.started()[index].group.spec().clone();
            let run = spec.run;
            let answer = match &command {
                Command::Decide(args) => serde_json::json!({ "value": args.value }),
                _ => serde_json::json!({ "vms": [] }),
            };
            self.conductor
                .handle_reply(self.now, index, host, ticket, Ok(answer));
            if let Command::Pace(args) = &command {
                limit = args.group_bytes_per_s.unwrap_or_default();
            }
            for member in &spec.members {
                let vm = member.name.clone();
                let here = |role| {
                    (if role == Role::Source {
                        member.from
                    } else {
                        member.to
                    }) == host
                };
                let halves = [Role::Source, Role::Destination]
                    .into_iter()
                    .filter(|role| here(*role));
                for role in halves {
                    let vm = vm.clone();
                    match (&command, role) {
                        (Command::Prepare(args), _) if args.role == role => self.say(
                            run,
                            host,
                            Event::Prepared {
                                vm,
                                role,
                                stream: Some("s".into()),
                                memory_bytes: 1,
                                qemu_version: "10".into(),
                                qemu_build: QemuBuild::Stock,
                            },
                        ),
                        (Command::Start(_), Role::Source) => {
                            self.starts.push((run.as_u128(), vm.clone(), host, limit));
                            if self.failing.contains(&run.as_u128()) {
                                let (error, lost) = ("no".into(), false);
                                self.say(
                                    run,
                                    host,
                                    Event::Failed {
                                        vm,
                                        role,
                                        error,
                                        lost,
                                        secondary: false,
                                    },
                                );
                                continue;
                            }
                            self.say(
                                run,
                                member.to,
                                Event::Arrived {
                                    vm: vm.clone(),
                                    role: Role::Destination,
                                },
                            );
                            self.say(run, host, Event::Arrived { vm, role });
                        }
                        (Command::Abort(_), _) => {
                            let reason = None;
                            self.say(run, host, Event::RolledBack { vm, role, reason });
                        }
                        (Command::Commit(_), Role::Destination)
                        | (Command::Finish(_), Role::Source) => {
                            let resumed_at_us = None;
                            self.say(
                                run,
                                host,
                                Event::Committed {
                                    vm,
                                    role,
                                    resumed_at_us,
                                },
                            );
                        }
                        _ => {}
                    }
                }
            }
        }
        self.conductor.outcome().expect("ended")
    }
}

#[test]
fn sequential_moves_one_after_another_at_full_rate() {
    let app = app(OnPartial::Stay);
    let mut play = Play::new(&app, Policy::Sequential, &[]);
    assert_eq!(play.play(), Outcome::Committed);
    let full = 50_000_000;
    let expected = [(1, "web", 0, full), (2, "db", 0, full)]
        .map(|(run, vm, host, limit)| (run, vm.to_owned(), HostId(host), limit));
    assert_eq!(play.starts, expected);
}

#[test]
fn parallel_shares_the_rate() {
    let app = app(OnPartial::Stay);
    let mut play = Play::new(&app, Policy::Parallel, &[]);
    assert_eq!(play.play(), Outcome::Committed);
    assert_eq!(play.starts[0].3, 25_000_000);
}

#[test]
fn a_failed_first_group_leaves_everything_at_home() {
    for on_partial in [OnPartial::Stay, OnPartial::Retry, OnPartial::Return] {
        let app = app(on_partial);
        let mut play = Play::new(&app, Policy::Sequential, &[1]);
        assert_eq!(play.play(), Outcome::RolledBack);
        assert_eq!(play.starts.len(), 1);
    }
}

#[test]
fn a_later_failure_stays_returns_or_retries() {
    let stay = app(OnPartial::Stay);
    assert_eq!(
        Play::new(&stay, Policy::Sequential, &[2]).play(),
        Outcome::PartlyMoved
    );

    let back = app(OnPartial::Return);
    let mut play = Play::new(&back, Policy::Sequential, &[2]);
    assert_eq!(play.play(), Outcome::RolledBack);
    assert_eq!(play.starts[2].2, HostId(1), "web goes back from b");
    let mut play = Play::new(&back, Policy::Sequential, &[2, 3]);
    assert_eq!(play.play(), Outcome::PartlyMoved);

    let retry = app(OnPartial::Retry);
    assert_eq!(
        Play::new(&retry, Policy::Sequential, &[2]).play(),
        Outcome::Committed
    );
    let mut play = Play::new(&retry, Policy::Sequential, &[2, 3]);
    assert_eq!(play.play(), Outcome::PartlyMoved);
    assert_eq!(play.starts.len(), 3);
}
