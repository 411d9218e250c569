//! `muster` as a program, against two sidecars that only pretend.

mod fake;

use std::process::{Child, Command, Output, Stdio};

use fake::World;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn muster(args: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_muster"))
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("muster starts")
}

fn end(child: Child) -> (i32, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().expect("muster ends");
    let text = String::from_utf8_lossy(&stdout) + String::from_utf8_lossy(&stderr);
    (status.code().expect("no signal"), text.into_owned())
}

fn path(world: &World, name: &str) -> String {
    world.path(name).display().to_string()
}

#[test]
fn run_moves_the_group_and_reports() {
    let world = World::new("");
    let file = world.file("").display().to_string();
    let (json, svg) = (path(&world, "out.json"), path(&world, "out.svg"));
    let (code, text) = end(muster(&["run", &file, "--json", &json, "--svg", &svg]));
    assert_eq!(code, 0, "{text}");
    for needle in [
        "every VM has arrived",
        "decided: commit",
        "downtime web",
        "resume skew",
    ] {
        assert!(text.contains(needle), "{needle} in {text}");
    }
    let report: Value =
        serde_json::from_str(&std::fs::read_to_string(json).expect("written")).expect("JSON");
    assert_eq!(report["result"], "committed");
    assert_eq!(report["split_s"], 0.0);
    assert_eq!(report["vms"][0]["side"], "destination");
    assert!(
        report["vms"][1]["downtime_s"]
            .as_f64()
            .is_some_and(|s| s > 0.0)
    );
    assert!(
        std::fs::read_to_string(svg)
            .expect("written")
            .contains("<svg")
    );
    let expected = [
        (1, "prepare"),
        (0, "prepare"),
        (0, "pace"),
        (0, "start"),
        (0, "arm"),
        (0, "release"),
        (0, "pace"),
        (0, "continue"),
        (0, "decide"),
        (1, "commit"),
        (0, "commit"),
        (0, "finish"),
        (0, "finish"),
    ];
    let mut log = world.log();
    // The two hosts are told at the same moment: which one takes it first is chance.
    for pair in [[0, 1], [9, 10]] {
        log[pair[0]..=pair[1]].sort_by_key(|(host, _)| std::cmp::Reverse(*host));
    }
    assert_eq!(log, expected);
}

#[test]
fn a_bandwidth_that_is_not_known_is_needed_before_anything_is_touched() {
    let world = World::new("");
    let file = world.file("").display().to_string();
    let text = std::fs::read_to_string(&file).expect("written");
    std::fs::write(&file, text.replace("bandwidth = \"50MB/s\"", "")).expect("written");
    // These sidecars probe nothing.
    let (code, text) = end(muster(&["run", &file]));
    assert_eq!(code, 1, "{text}");
    for needle in ["could not be probed", "a to b", "set `bandwidth`"] {
        assert!(text.contains(needle), "{needle} in {text}");
    }
    assert!(!world.log().iter().any(|(_, name)| *name == "prepare"));
}

#[test]
fn an_interrupt_in_pre_copy_rolls_back() {
    let world = World::new("start");
    let file = world.file("").display().to_string();
    let child = muster(&["run", &file]);
    world.wait_for("start");
    let pid = i32::try_from(child.id()).expect("a pid");
    kill(Pid::from_raw(pid), Signal::SIGINT).expect("it lives");
    let (code, text) = end(child);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("rolled back: interrupted"), "{text}");
    assert!(!world.log().iter().any(|(_, name)| *name == "commit"));
}

#[test]
fn a_cut_control_connection_is_opened_again() {
    let world = World::new("arm");
    let file = world.file("").display().to_string();
    let child = muster(&["run", &file]);
    world.wait_for("arm");
    world.go_on();
    world.cut(0);
    let end_at = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while world.connections(0) == 0 {
        assert!(std::time::Instant::now() < end_at, "not connected again");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    kill(
        Pid::from_raw(i32::try_from(child.id()).expect("a pid")),
        Signal::SIGTERM,
    )
    .expect("it lives");
    let (code, text) = end(child);
    assert_eq!(code, 2, "{text}");
    assert!(
        text.contains("the connection to the sidecar of a is lost"),
        "{text}"
    );
}

#[test]
fn after_the_decision_no_interrupt_stops_it() {
    let world = World::new("commit");
    let file = world.file("").display().to_string();
    let child = muster(&["run", &file]);
    world.wait_for("commit");
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    for _ in 0..3 {
        kill(pid, Signal::SIGINT).expect("it lives");
    }
    world.go_on();
    let (code, text) = end(child);
    assert_eq!(code, 0, "{text}");
    assert!(
        !world.log().iter().any(|(_, name)| *name == "abort"),
        "{text}"
    );
}

#[test]
fn check_names_every_problem() {
    let world = World::new("").without_hold();
    let file = world.file("").display().to_string();
    let (code, text) = end(muster(&["check", &file]));
    assert_eq!(code, 1, "{text}");
    assert_eq!(text.matches("cannot be held").count(), 2, "{text}");
    assert!(world.log().is_empty());
    let (code, text) = end(muster(&["check", &file, "--policy", "parallel"]));
    assert_eq!(code, 0, "{text}");
    let (code, text) = end(muster(&["run", &file]));
    assert_eq!(code, 1, "{text}");
    assert!(world.log().is_empty(), "nothing was touched");
}

#[test]
fn sequential_and_parallel_go_by_themselves() {
    for policy in ["sequential", "parallel"] {
        let world = World::new("");
        let file = world.file("deadline = \"2s\"").display().to_string();
        let (code, text) = end(muster(&["run", &file, "--policy", policy]));
        // These sidecars answer `start` with HELD and never switch over: the deadline ends it.
        assert_eq!(code, 2, "{text}");
        assert!(text.contains("has not arrived"), "{text}");
    }
}

#[test]
fn nothing_to_abort_or_recover() {
    let world = World::new("");
    let file = world.file("").display().to_string();
    for command in ["abort", "recover"] {
        let (code, text) = end(muster(&[command, &file]));
        assert_eq!(
            (code, text.contains("no run is under way")),
            (0, true),
            "{text}"
        );
    }
    let (code, text) = end(muster(&["status", &file]));
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("no runs"), "{text}");
}

#[test]
fn usage_and_bad_files_exit_with_1() {
    let world = World::new("");
    let file = world.file("polcy = \"muster\"").display().to_string();
    for args in [
        &["run"][..],
        &["fly"],
        &["run", "/no/such/file.toml"],
        &["check", &file],
        &["run", &file, "--policy", "best"],
    ] {
        assert_eq!(end(muster(args)).0, 1, "{args:?}");
    }
    let (_, text) = end(muster(&["check", &file]));
    assert!(text.contains("app.toml:5: unknown key `polcy`"), "{text}");
    assert!(text.contains("did you mean `policy`?"), "{text}");
    assert_eq!(end(muster(&["--help"])).0, 0);
}
