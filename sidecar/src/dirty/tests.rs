//! The machine against a monitor that answers as QEMU does.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::log::Look;
use super::{Measurement, Output};
use crate::migration::Now;
use crate::protocol::dirty::{
    DirtyEnd, DirtyEvent, DirtyPhase, DirtyRound, DirtySource, DirtyStartArgs,
};

const MIB: u64 = 1 << 20;

fn args() -> DirtyStartArgs {
    DirtyStartArgs {
        vm: "db".into(),
        interval_ms: 500,
        duration_ms: 60_000,
        delays_ms: vec![],
        heat_cells: 0,
        disks: false,
    }
}

/// A QEMU, the measurement, and the time.
struct World {
    machine: Measurement,
    now: Now,
    /// What `query-dirty-log-export` says; `None`: the command is not known.
    export: Option<&'static str>,
    version: [u64; 2],
    migration: &'static str,
    /// Commands that are refused.
    refused: Vec<&'static str>,
    /// What is said then.
    why: &'static str,
    /// Commands that are never answered.
    mute: Vec<&'static str>,
    /// Commands that came, with their arguments; questions of an identification are left out.
    log: Vec<(String, Value)>,
    outputs: Vec<Output>,
}

impl World {
    fn new(export: Option<&'static str>) -> Self {
        let now = Now {
            mono: Instant::now(),
            unix_us: 0,
        };
        Self {
            machine: Measurement::new(now, args()),
            now,
            export,
            version: [10, 0],
            migration: "none",
            refused: vec![],
            why: "no",
            mute: vec![],
            log: vec![],
            outputs: vec![],
        }
    }

    fn started(export: Option<&'static str>) -> Self {
        let mut world = Self::new(export);
        world.greet();
        world
    }

    fn greet(&mut self) {
        let [major, minor] = self.version;
        let greeting = json!({"QMP": {
            "version": {"qemu": {"major": major, "minor": minor, "micro": 0}},
            "capabilities": [],
        }});
        self.say(&greeting);
        self.go_on();
    }

    fn say(&mut self, message: &Value) {
        let text = format!("{message}\n");
        self.machine.receive(self.now, text.as_bytes());
    }

    /// Answers until nothing is asked any more; the log is opened when it is wanted.
    fn go_on(&mut self) {
        loop {
            while let Some(output) = self.machine.poll_output() {
                if matches!(output, Output::OpenLog { .. }) {
                    self.machine.log_opened(self.now);
                }
                self.outputs.push(output);
            }
            let bytes = self.machine.qmp.output().to_vec();
            if bytes.is_empty() {
                return;
            }
            self.machine.qmp.written(bytes.len());
            for line in bytes.split(|byte| *byte == b'\n').filter(|l| !l.is_empty()) {
                let command: Value = serde_json::from_slice(line).expect("JSON");
                self.answer(&command);
            }
        }
    }

    fn answer(&mut self, command: &Value) {
        let name = command["execute"].as_str().expect("a name").to_owned();
        let value = match name.as_str() {
            "query-kvm" => json!({"enabled": true}),
            "query-migrate" => json!({"status": self.migration}),
            "query-status" => json!({"status": "running"}),
            "query-memory-size-summary" => json!({"base-memory": 64 * MIB}),
            "query-dirty-log-export" => json!({"status": self.export}),
            "query-block" => json!([
                {"inserted": {"node-name": "disk0", "ro": false}},
                {"inserted": {"node-name": "cd", "ro": true}},
                {"inserted": {"node-name": "#block17", "ro": false}},
                {},
            ]),
            // The disk; that of the bitmaps' counts is asked for without its children.
            "query-named-block-nodes" => json!([{"node-name": "disk0", "dirty-bitmaps": [
                {"name": "somebody's", "count": 1},
                {"name": "muster-measured-rate", "count": 8192},
                {"name": "muster-measured-set", "count": 40960},
            ]}]),
            "query-dirty-rate" => json!({"status": "measured", "dirty-rate": 7}),
            _ => json!({}),
        };
        if !name.starts_with("query-")
            && !["qmp_capabilities", "qom-get", "qom-list"].contains(&&*name)
        {
            self.log.push((name.clone(), command["arguments"].clone()));
        }
        if self.mute.contains(&&*name) {
            return;
        }
        let unknown = name.contains("dirty-log-export") && self.export.is_none();
        let id = &command["id"];
        if unknown || self.refused.contains(&&*name) {
            self.say(&json!({"error": {"class": "GenericError", "desc": self.why}, "id": id}));
        } else {
            self.say(&json!({"return": value, "id": id}));
        }
    }

    fn wait(&mut self, time: Duration) {
        self.now.mono += time;
        self.machine.handle_timeout(self.now);
        self.go_on();
    }

    fn commands(&self) -> Vec<&str> {
        self.log.iter().map(|(name, _)| &**name).collect()
    }

    fn end(&mut self, reason: DirtyEnd) {
        self.machine.end(self.now, reason, None);
        self.go_on();
    }

    /// Why it ended, after which nothing may follow.
    fn ended(&self) -> (DirtyEnd, String) {
        assert_eq!(self.outputs.last(), Some(&Output::Close));
        let [.., Output::CloseLog, Output::Event(event), Output::Close] = &self.outputs[..] else {
            panic!("{:?}", self.outputs);
        };
        let DirtyEvent::DirtyEnded { reason, error, .. } = event else {
            panic!("{event:?}");
        };
        (*reason, error.clone().unwrap_or_default())
    }

    fn rounds(&self) -> Vec<&DirtyRound> {
        let rounds = self.outputs.iter().filter_map(|output| match output {
            Output::Event(DirtyEvent::DirtyRound(round)) => Some(round),
            _ => None,
        });
        rounds.collect()
    }
}

fn round() -> DirtyRound {
    DirtyRound {
        vm: "db".into(),
        source: DirtySource::Export,
        round: 1,
        duration_us: 500_000,
        missed: 0,
        dirtied_bytes: 4096,
        dirty_rate_bytes_per_s: 8192,
        mean_dirty_rate_bytes_per_s: 8192,
        max_dirty_rate_bytes_per_s: 8192,
        working_set_bytes: Some(4096),
        working_set_stable: Some(false),
        predicted: vec![],
        heat: None,
        disks: Vec::new(),
    }
}

#[test]
fn a_patched_qemu_exports_until_it_is_stopped() {
    let mut world = World::started(Some("inactive"));
    assert_eq!(world.commands(), ["getfd", "dirty-log-export-start"]);
    let name = &world.log[0].1["fdname"];
    assert_eq!(world.log[1].1, json!({"fdname": name, "interval": 500}));
    let opened = Output::OpenLog {
        memory_bytes: 64 * MIB,
    };
    assert!(world.outputs.contains(&opened));
    world
        .machine
        .looked(world.now, Look::Round(Box::new(round())));
    world.go_on();
    assert_eq!(world.rounds(), [&round()]);
    let report = world.machine.report();
    assert_eq!(report.phase, DirtyPhase::Measuring);
    assert_eq!(report.latest, Some(round()));
    world.end(DirtyEnd::Stopped);
    assert_eq!(world.commands()[2..], ["dirty-log-export-stop"]);
    assert_eq!(world.ended().0, DirtyEnd::Stopped);
    // What the scanner found too late, and a second end, change nothing.
    world
        .machine
        .looked(world.now, Look::Round(Box::new(round())));
    world.end(DirtyEnd::Failed);
    assert_eq!(world.ended().0, DirtyEnd::Stopped);
    assert_eq!(world.rounds().len(), 1);
}

#[test]
fn a_stale_export_is_stopped_first() {
    for status in ["measuring", "waiting"] {
        let world = World::started(Some(status));
        let expected = ["dirty-log-export-stop", "getfd", "dirty-log-export-start"];
        assert_eq!(world.commands(), expected, "{status}");
    }
    // It may have ended in between.
    let mut world = World::new(Some("measuring"));
    world.refused = vec!["dirty-log-export-stop"];
    world.greet();
    assert_eq!(world.commands()[1..], ["getfd", "dirty-log-export-start"]);
}

#[test]
fn what_is_refused_is_said() {
    let mut world = World::new(Some("inactive"));
    world.refused = vec!["dirty-log-export-start"];
    world.greet();
    let (reason, error) = world.ended();
    assert_eq!(reason, DirtyEnd::Failed);
    assert!(error.contains("refuses to export"), "{error}");
    assert!(!world.commands().contains(&"dirty-log-export-stop"));
}

#[test]
fn a_vm_that_migrates_is_left_alone() {
    let mut world = World::new(Some("inactive"));
    world.migration = "active";
    world.greet();
    assert_eq!(world.ended().0, DirtyEnd::Migration);
    assert!(world.log.is_empty());
    let mut world = World::started(Some("inactive"));
    world.machine.looked(world.now, Look::Migrating);
    world.go_on();
    assert_eq!(world.ended().0, DirtyEnd::Migration);
    assert_eq!(world.commands()[2..], ["dirty-log-export-stop"]);
}

#[test]
fn stock_qemu_tells_its_rate_again_and_again() {
    let mut world = World::started(None);
    for _ in 0..3 {
        world.wait(Duration::from_millis(500));
    }
    assert_eq!(world.commands(), ["calc-dirty-rate"; 4]);
    let arguments = json!({
        "calc-time": 500, "calc-time-unit": "millisecond", "mode": "dirty-bitmap",
    });
    assert_eq!(world.log[0].1, arguments);
    let rounds = world.rounds();
    assert_eq!(rounds.len(), 3);
    let last = rounds[2];
    assert_eq!((last.round, last.source), (3, DirtySource::CalcDirtyRate));
    assert_eq!(last.dirty_rate_bytes_per_s, 7 * MIB);
    assert_eq!(last.mean_dirty_rate_bytes_per_s, 7 * MIB);
    assert_eq!(last.dirtied_bytes, 7 * MIB / 2);
    assert_eq!((last.working_set_bytes, &last.heat), (None, &None));
    // Nothing is left to be put back.
    world.end(DirtyEnd::Stopped);
    assert_eq!(world.commands().len(), 4);
    assert_eq!(world.ended().0, DirtyEnd::Stopped);
}

#[test]
fn a_calculation_that_was_left_behind_is_waited_for() {
    let mut world = World::new(None);
    world.refused = vec!["calc-dirty-rate"];
    world.why = "the dirty rate is already being measured.";
    world.greet();
    assert_eq!(world.commands(), ["calc-dirty-rate"]);
    world.refused.clear();
    world.wait(Duration::from_millis(50));
    assert_eq!(world.commands(), ["calc-dirty-rate"; 2]);
    assert_eq!(world.rounds().len(), 0);
    world.wait(Duration::from_millis(500));
    assert_eq!(world.rounds().len(), 1);
    assert_eq!(world.log[2].1["mode"], "dirty-bitmap");
}

#[test]
fn an_old_qemu_counts_seconds_and_samples() {
    let mut world = World::new(None);
    world.version = [7, 2];
    world.refused = vec!["calc-dirty-rate"];
    world.greet();
    let seconds = |mode: &str| json!({"calc-time": 1, "mode": mode});
    assert_eq!(world.log[0].1, seconds("dirty-bitmap"));
    // KVM's dirty ring has no bitmap to count in.
    assert_eq!(world.log[1].1, seconds("page-sampling"));
    assert_eq!(world.ended().0, DirtyEnd::Failed);
    let mut world = World::new(None);
    world.version = [7, 2];
    world.greet();
    assert_eq!(world.machine.report().interval_ms, 1000);
}

#[test]
fn it_ends_when_its_time_is_up() {
    let mut world = World::started(Some("inactive"));
    while world.now.mono < world.machine.deadline().expect("one") {
        let left = world.machine.deadline().expect("one") - world.now.mono;
        world.wait(left.min(Duration::from_millis(500)));
        let look = Look::Round(Box::new(round()));
        world.machine.looked(world.now, look);
        if world.outputs.last() == Some(&Output::Close) {
            break;
        }
    }
    assert_eq!(world.ended().0, DirtyEnd::Duration);
}

#[test]
fn a_qemu_that_hangs_is_given_up() {
    // No interval comes.
    let mut world = World::started(Some("inactive"));
    world.wait(Duration::from_secs(7));
    assert_eq!(world.ended().0, DirtyEnd::Failed);
    // No answer to the stop: a migration waits for the monitor.
    let mut world = World::started(Some("inactive"));
    world.mute = vec!["dirty-log-export-stop"];
    world.end(DirtyEnd::Migration);
    assert_eq!(world.machine.report().phase, DirtyPhase::Ending);
    assert!(!world.outputs.contains(&Output::Close));
    world.wait(Duration::from_secs(1));
    let (reason, error) = world.ended();
    assert_eq!(reason, DirtyEnd::Migration);
    assert!(error.contains("may go on"), "{error}");
    // No answer at all.
    let mut world = World::new(None);
    world.wait(Duration::from_secs(2));
    let (reason, error) = world.ended();
    assert_eq!(reason, DirtyEnd::Failed);
    assert!(error.contains("no greeting"), "{error}");
}

#[test]
fn a_monitor_that_closes_ends_it() {
    let mut world = World::started(Some("inactive"));
    world.machine.closed("QEMU closed its monitor");
    world.go_on();
    assert_eq!(world.ended().0, DirtyEnd::Failed);
}

#[test]
fn others_may_ask_who_qemu_is() {
    let identified = |world: &World| {
        let outputs = world.outputs.iter();
        outputs.filter(|o| matches!(o, Output::Identified(i) if i.memory_bytes == 64 * MIB && i.version == "10.0.0")).count()
    };
    let mut world = World::started(Some("inactive"));
    assert_eq!(identified(&world), 0);
    world.machine.inquire(world.now);
    world.machine.inquire(world.now);
    world.go_on();
    assert_eq!(identified(&world), 1);
    world.machine.inquire(world.now);
    world.go_on();
    assert_eq!(identified(&world), 2);
    // Before it is known, once for all.
    let mut world = World::new(None);
    world.machine.inquire(world.now);
    world.greet();
    assert_eq!(identified(&world), 1);
}

const ADD: &str = "block-dirty-bitmap-add";
const CLEAR: &str = "block-dirty-bitmap-clear";
const REMOVE: &str = "block-dirty-bitmap-remove";

#[test]
fn disks_are_counted_and_left_as_they_were() {
    for export in [Some("inactive"), None] {
        let mut world = World::new(export);
        world.machine.wanted.disks = true;
        world.greet();
        let bitmaps = |world: &World, command: &str| {
            let of = world.log.iter().filter(|(name, _)| name == command);
            of.map(|(_, arguments)| {
                assert_eq!(arguments["node"], "disk0");
                arguments["name"].as_str().expect("a name").to_owned()
            })
            .collect::<Vec<_>>()
        };
        let both = ["muster-measured-rate", "muster-measured-set"];
        assert_eq!(bitmaps(&world, ADD), both);
        // Stale ones went first.
        assert_eq!(bitmaps(&world, REMOVE), both);
        world.now.mono += Duration::from_millis(500);
        if export.is_some() {
            let look = Look::Round(Box::new(round()));
            world.machine.looked(world.now, look);
        } else {
            world.machine.handle_timeout(world.now);
        }
        world.go_on();
        let [found] = &world.rounds()[..] else {
            panic!("{:?}", world.rounds());
        };
        let [disk] = &found.disks[..] else {
            panic!("{:?}", found.disks);
        };
        assert_eq!(disk.node, "disk0");
        assert_eq!(disk.dirty_rate_bytes_per_s, 16_384);
        assert_eq!(disk.max_dirty_rate_bytes_per_s, 16_384);
        assert_eq!(disk.dirty_set_bytes, 40_960);
        assert_eq!(bitmaps(&world, CLEAR), both[..1]);
        world.log.clear();
        world.end(DirtyEnd::Stopped);
        assert_eq!(bitmaps(&world, REMOVE), both);
        assert_eq!(world.ended().0, DirtyEnd::Stopped);
    }
}

#[test]
fn what_a_killed_sidecar_left_in_disks_is_removed() {
    let mut world = World::new(Some("active"));
    world.machine = Measurement::tidy(world.now, "db");
    world.greet();
    assert_eq!(world.commands(), [REMOVE, REMOVE]);
    assert_eq!(world.outputs.last(), Some(&Output::Close));

    let mut mute = World::new(None);
    mute.machine = Measurement::tidy(mute.now, "db");
    mute.mute = vec![REMOVE];
    mute.greet();
    mute.wait(Duration::from_secs(2));
    assert_eq!(mute.outputs.last(), Some(&Output::Close));
}
