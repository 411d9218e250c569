use rate_limiter::{Bytes, BytesPerSecond};
use sidecar::protocol::command::{PrepareBalloon, Termination};
use sidecar::protocol::types::CopyMode;

use super::*;
use crate::application::ApplicationError;
use crate::application::Policy;
use std::path::Path;

const GOOD: &str = r#"
version = 1
[application]
name = "shop"
bandwidth = "400Mbit/s"
deadline = "2m"
[application.termination]
max-rounds = 12
[[host]]
name = "a"
control = "unix:/run/a"
[[host]]
name = "b"
control = "tcp:10.0.0.2:4600"
nic = "1Gbit/s"
[[link]]
between = ["a", "b"]
rate = "400Mbit/s"
rtt = "20ms"
[[vm]]
name = "web"
uuid = "00000000-0000-0000-0000-000000000001"
tier = "front"
from = "a"
to = "b"
memory = "128MiB"
[[vm]]
name = "db"
uuid = "00000000-0000-0000-0000-000000000002"
from = "b"
to = "a"
[[traffic]]
between = ["web", "db"]
rate = "1MB/s"
"#;

fn problems(text: &str) -> Vec<(usize, String)> {
    let problems = parse(text).expect_err("must be refused");
    problems.into_iter().map(|p| (p.line, p.text)).collect()
}

#[test]
fn a_whole_file_with_its_defaults() {
    let app = parse(GOOD).expect("good");
    assert_eq!(app.allowance.usable(), Some(BytesPerSecond(50_000_000)));
    assert!(!app.probe && app.measure);
    assert_eq!(app.policy, Policy::Muster);
    assert_eq!(app.max_downtime, Duration::from_millis(300));
    assert_eq!(app.hard_downtime, Duration::from_millis(600));
    assert_eq!(app.lease, Duration::from_secs(5));
    assert_eq!(app.horizon, Duration::from_secs(10));
    assert_eq!(app.register, HostId(0));
    assert_eq!(app.termination.max_rounds, Some(12));
    assert_eq!(app.termination.stall_rounds, Some(2));
    assert_eq!(app.vms[1].from, HostId(1));
    assert_eq!(app.vms[0].profile.memory, Some(Bytes(128 << 20)));
    assert_eq!(app.traffic[0].between, [VmId(0), VmId(1)]);
    assert_eq!(app.links[0].rtt, Some(Duration::from_millis(20)));
}

#[test]
fn a_rule_of_termination_and_what_overrides_it() {
    let of = |keys: &str| {
        let app = parse(&GOOD.replace("max-rounds = 12", keys)).expect("good");
        app.termination
    };
    assert_eq!(of("rule = \"intelligent\""), Termination::default());
    assert_eq!(of("rule = \"xen\""), Termination::XEN);
    assert_eq!(of("rule = \"qemu\""), Termination::QEMU);
    let bounded = of("rule = \"qemu\"\nmax-rounds = 7");
    assert_eq!(bounded.max_rounds, Some(7));
    assert_eq!(bounded.max_memory_factor, None);
    assert_eq!(bounded.stall_rounds, None);
    let stalls = of("max-rounds = 7\nstall-rounds = 3\nrule = \"xen\"").stall_rounds;
    assert_eq!(stalls, Some(3));
    let found = problems(&GOOD.replace("max-rounds = 12", "rule = \"kvm\""));
    assert!(
        found[0]
            .1
            .contains("\"qemu\" or \"xen\" or \"intelligent\""),
        "{found:?}"
    );
}

#[test]
fn transports_of_the_application_and_of_a_vm() {
    use crate::application::TransportChoice as T;
    let app = parse(GOOD).expect("good");
    assert_eq!(app.transport_of(VmId(0)), T::Auto);
    let text = GOOD
        .replace("deadline =", "transport = \"relay\"\ndeadline =")
        .replace("tier =", "transport = \"direct\"\ntier =");
    let app = parse(&text).expect("good");
    assert_eq!(app.transport_of(VmId(0)), T::Direct);
    assert_eq!(app.transport_of(VmId(1)), T::Relay);
    let found = problems(&text.replace("\"relay\"", "\"relai\""));
    assert!(found[0].1.contains("\"auto\" or \"relay\" or \"direct\""));
}

#[test]
fn a_hardware_address_is_one_vms_own() {
    let with = |macs: [&str; 2]| {
        let [web, db] = macs.map(|mac| format!("mac = \"{mac}\"\nfrom ="));
        GOOD.replacen("from =", &web, 1)
            .replace("from = \"b\"", &(db + " \"b\""))
    };
    let app = parse(&with(["52:54:00:00:00:0A", "52:54:00:00:00:0b"])).expect("good");
    let mac = app.vm(VmId(0)).mac.map(|mac| mac.to_string());
    assert_eq!(mac.as_deref(), Some("52:54:00:00:00:0a"));
    assert!(parse(GOOD).expect("good").vm(VmId(0)).mac.is_none());
    let found = problems(&with(["52:54:00:00:00:0a", "52:54:00:00:00:0A"]));
    assert!(found[0].1.contains("is also that of VM `web`"), "{found:?}");
    let found = problems(&with(["ff:ff:ff:ff:ff:ff", "52:54:00:00:00:0b"]));
    assert!(found[0].1.contains("hardware address"), "{found:?}");
}

#[test]
fn unknown_keys_come_with_line_and_suggestion() {
    let text = GOOD.replace("bandwidth =", "bandwith =");
    let found = problems(&text);
    assert!(found.iter().any(|(line, text)| *line == 5
        && text.contains("unknown key `bandwith`")
        && text.contains("did you mean `bandwidth`?")));
}

#[test]
fn a_bandwidth_is_given_or_probed_and_keeps_a_reserve() {
    let of = |keys: &str| GOOD.replace("bandwidth = \"400Mbit/s\"", keys);
    let app = parse(&of("")).expect("good");
    assert!(app.probe && app.allowance.usable().is_none());
    let app = parse(&of("reserve = \"5MB/s\"\nmeasure = false")).expect("good");
    assert!(app.probe && !app.measure);
    assert_eq!(app.allowance.reserve, BytesPerSecond(5_000_000));
    let app = parse(&of(
        "bandwidth = \"50MB/s\"\nreserve = \"5MB/s\"\nprobe = true",
    ));
    let app = app.expect("good");
    assert!(app.probe);
    assert_eq!(app.allowance.usable(), Some(BytesPerSecond(45_000_000)));
    for (keys, expected) in [
        ("probe = false", "`bandwidth` is missing"),
        (
            "bandwidth = \"5MB/s\"\nreserve = \"5MB/s\"",
            "leaves nothing",
        ),
        ("reserve = \"-1MB/s\"", "`reserve`"),
        ("reserve = \"1EB/s\"", "`reserve`"),
        ("probe = \"yes\"", "true or false"),
    ] {
        let found = problems(&of(keys));
        let named = found.iter().any(|(_, text)| text.contains(expected));
        assert!(named, "{keys}: {found:?}");
    }
}

#[test]
fn every_problem_is_named_at_once() {
    let text = GOOD
        .replace("to = \"b\"", "to = \"a\"")
        .replace(
            "400Mbit/s\"\ndeadline",
            "0\"\nmax-downtime = \"0s\"\ndeadline",
        )
        .replace("\"web\", \"db\"", "\"web\", \"dbb\"")
        .replace("000000000002", "000000000001")
        .replace("from = \"b\"", "from = \"c\"")
        .replace("nic = \"1Gbit/s\"", "nic = 5");
    let found = problems(&text);
    let has = |needle: &str| found.iter().any(|(_, text)| text.contains(needle));
    assert!(has("where it comes from"), "{found:?}");
    assert!(has("`bandwidth` in [application] is 0"), "{found:?}");
    assert!(has("`max-downtime` in [application] is 0ns"), "{found:?}");
    assert!(has("there is no VM `dbb`; did you mean `db`?"), "{found:?}");
    assert!(has("is also that of VM `web`"), "{found:?}");
    assert!(has("there is no host `c`"), "{found:?}");
    assert!(has("`nic` in [[host]] `b`: expected a rate"), "{found:?}");
    assert!(found.is_sorted_by_key(|(line, _)| *line));
}

#[test]
fn duplicate_names_and_addresses() {
    let text = GOOD
        .replace("name = \"b\"", "name = \"a\"")
        .replace("name = \"db\"", "name = \"web\"")
        .replace("tcp:10.0.0.2:4600", "unix:/run/a");
    let found = problems(&text);
    let has = |needle: &str| found.iter().any(|(_, text)| text.contains(needle));
    assert!(
        has("[[host]] `a` is there twice (first in line 10)"),
        "{found:?}"
    );
    assert!(has("[[vm]] `web` is there twice"), "{found:?}");
    assert!(has("is also that of host `a`"), "{found:?}");
}

#[test]
fn broken_and_empty_files_say_what_was_expected() {
    assert_eq!(problems("version = \n")[0].0, 1);
    let found = problems("");
    for needle in ["`version`", "[application]", "[[host]]", "[[vm]]"] {
        assert!(
            found.iter().any(|(_, text)| text.contains(needle)),
            "{needle}: {found:?}"
        );
    }
    let found = problems(&GOOD.replace("version = 1", "version = 2"));
    assert!(found[0].1.contains("version = 1"));
}

#[test]
fn the_message_names_the_file() {
    let error = Application::parse("version = 1", Path::new("app.toml")).expect_err("bad");
    assert!(error.to_string().starts_with("app.toml:1: "), "{error}");
    let error = Application::load(Path::new("/no/such/file.toml")).expect_err("missing");
    assert!(matches!(error, ApplicationError::Read { .. }));
    assert!(error.to_string().contains("/no/such/file.toml"));
}

#[test]
fn a_plan_needs_no_hosts() {
    let text = "version = 1\n[application]\nname = \"shop\"\nbandwidth = \"32MB/s\"\n\
        replica-groups = true\n[[vm]]\nname = \"db\"\nfrom = \"a\"\ndirty-set = \"2GB\"\n\
        memory = \"1GB\"\n";
    let outline = parse_outline(text).expect("enough");
    assert!(outline.replica_groups && outline.hosts.is_empty());
    assert_eq!(outline.vms[0].from, None);
    // Where hosts are named they must be right; and the dirty set is of memory and disk.
    let hosts = format!("{text}disk = \"500MB\"\n[[host]]\nname = \"b\"\nnic = \"1GB/s\"\n");
    let problems = parse_outline(&hosts).expect_err("no host `a`");
    assert!(
        problems
            .iter()
            .any(|p| p.text.contains("there is no host `a`"))
    );
    assert!(
        problems
            .iter()
            .any(|p| p.text.contains("`dirty-set` 1.86 GiB is above `memory`"))
    );
    let moved = parse(text).expect_err("no move").len();
    assert!(moved >= 3, "hosts, `uuid` and `to` are missing");
    let wrong = text.replace("replica-groups = true", "replica-groups = 1");
    let problems = parse_outline(&wrong).expect_err("no number");
    assert!(problems[0].text.contains("expected true or false"));
}

#[test]
fn a_move_and_a_plan_read_the_same() {
    let app = parse(GOOD).expect("good");
    assert_eq!(app.outline(), parse_outline(GOOD).expect("good"));
}

#[test]
fn local_disks_have_names_of_their_own() {
    let with =
        |disks: &str| parse(&GOOD.replacen("uuid =", &format!("disks = {disks}\nuuid ="), 1));
    let app = with(r#"[{ node = "root" }, { node = "data" }]"#).expect("good");
    let nodes: Vec<&str> = app.vms[0].disks.iter().map(|d| d.node.as_str()).collect();
    assert_eq!(nodes, ["root", "data"]);
    assert!(app.vms[1].disks.is_empty());
    let app = with(r#"[{ node = "root", copy-mode = "write-blocking" }]"#).expect("good");
    assert_eq!(app.vms[0].disks[0].copy_mode, CopyMode::WriteBlocking);
    assert_eq!(app.disk_stall, Duration::from_secs(2));
    for (disks, needle) in [
        (r#"["root"]"#, "[[disks]]"),
        ("[{}]", "`node` is missing"),
        (r#"[{ node = "a/b" }]"#, "block node"),
        (r#"[{ node = "a" }, { node = "a" }]"#, "twice"),
        (r#"[{ node = "a", size = 1 }]"#, "unknown key `size`"),
        (
            r#"[{ node = "a", copy-mode = "fast" }]"#,
            "\"background\" or \"write-blocking\"",
        ),
    ] {
        let problems = with(disks).expect_err(disks);
        assert!(problems[0].text.contains(needle), "{disks}: {problems:?}");
    }
}

#[test]
fn who_is_ballooned_and_how() {
    let of = |keys: &str, vm: &str| {
        let text = GOOD
            .replace("deadline = \"2m\"", keys)
            .replace("memory = \"128MiB\"", &format!("memory = \"128MiB\"\n{vm}"));
        parse(&text).map(|app| [VmId(0), VmId(1)].map(|id| app.balloon_of(id)))
    };
    let wish = |mib: u64, wait_ms| {
        Some(PrepareBalloon {
            reserve_bytes: mib << 20,
            wait_ms,
        })
    };
    assert_eq!(of("", ""), Ok([None, None]));
    assert_eq!(of("balloon = true", ""), Ok([wish(64, 5000); 2]));
    let all = "balloon = true\nballoon-reserve = \"32MiB\"\nballoon-wait = \"2s\"";
    let own = of(all, "balloon-reserve = \"8MiB\"");
    assert_eq!(own, Ok([wish(8, 2000), wish(32, 2000)]));
    let not = of(all, "balloon = false");
    assert_eq!(not, Ok([None, wish(32, 2000)]));
    for (keys, vm, needle) in [
        ("balloon = 1", "", "`balloon`"),
        ("balloon-wait = \"2m\"", "", "`balloon-wait`"),
        ("balloon-reserve = \"1B\"", "", "expected 1 MiB to 1 TiB"),
        ("", "balloon-reserve = \"2TiB\"", "expected 1 MiB to 1 TiB"),
        ("", "used-memory = \"129MiB\"", "above `memory`"),
    ] {
        let problems = of(keys, vm).expect_err(needle);
        assert!(problems[0].text.contains(needle), "{problems:?}");
    }
    // What a plan counts.
    let text = GOOD.replace("deadline = \"2m\"", "balloon = true").replace(
        "memory = \"128MiB\"",
        "memory = \"128MiB\"\nused-memory = \"20MiB\"",
    );
    let outline = parse_outline(&text).expect("good");
    assert_eq!(outline.vms[0].profile.memory, Some(Bytes(84 << 20)));
    assert_eq!(outline, parse(&text).expect("good").outline());
}

#[test]
fn how_much_may_be_slowed() {
    let of = |keys: &str, vm: &str| {
        let text = GOOD
            .replace("deadline = \"2m\"", keys)
            .replace("memory = \"128MiB\"", vm);
        parse(&text).map(|app| (app.throttle(), app.vms[0].max_throttle))
    };
    let throttle = "on-non-convergence = \"throttle\"";
    assert_eq!(of("", ""), Ok((None, None)));
    assert_eq!(of(throttle, ""), Ok((Some(99), None)));
    let less = format!("{throttle}\nmax-throttle = 60");
    assert_eq!(of(&less, "max-throttle = 0"), Ok((Some(60), Some(0))));
    for (keys, vm) in [
        ("max-throttle = 0", ""),
        ("max-throttle = 100", ""),
        ("", "max-throttle = 100"),
    ] {
        assert!(of(keys, vm).is_err(), "{keys} {vm}");
    }
}

#[test]
fn a_rule_that_qemu_does_not_have_holds_the_vms_of_every_policy() {
    let of = |keys: &str| {
        let app = parse(&GOOD.replace("max-rounds = 12", keys)).expect("good");
        [Policy::Sequential, Policy::Parallel, Policy::Muster].map(|policy| app.holds(policy))
    };
    assert_eq!(of("max-rounds = 12"), [false, false, true]);
    assert_eq!(of("rule = \"qemu\""), [false, false, true]);
    assert_eq!(of("rule = \"xen\""), [true; 3]);
    assert_eq!(of("rule = \"intelligent\""), [true; 3]);
}
