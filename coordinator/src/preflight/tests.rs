use std::path::Path;

use uuid::Uuid;

use super::*;
use crate::status::RunSummary;
use sidecar::protocol::types::{CopyMode, DiskInfo, QemuBuild};

fn app() -> Application {
    let text = r#"
        version = 1
        application = { name = "shop", bandwidth = "50MB/s" }
        host = [{ name = "a", control = "unix:/a" }, { name = "b", control = "unix:/b" }]
        vm = [
          { name = "web", uuid = "00000000-0000-0000-0000-000000000001", from = "a", to = "b" },
          { name = "db", uuid = "00000000-0000-0000-0000-000000000002", from = "a", to = "b" },
        ]
    "#;
    Application::parse(text, Path::new("test")).expect("good")
}

fn host(name: &str) -> HostFacts {
    let entry = |vm: &str| VmEntry {
        disks: Some(Vec::new()),
        vm: vm.into(),
        qmp: None,
        qmp_present: name == "a",
        can_receive: name == "b",
        incoming_build: None,
    };
    HostFacts {
        name: name.into(),
        info: HostInfo {
            host: name.into(),
            available_memory_bytes: 1 << 30,
            state_free_bytes: 1 << 30,
            stream_address: "10.0.0.1:1".into(),
            sidecar_version: "0.1.0".into(),
            qemu_version: Some("10.0.2".into()),
        },
        vms: vec![entry("web"), entry("db")],
        status: SidecarStatus {
            host: name.into(),
            version: String::new(),
            runs: Vec::new(),
            alarms: Vec::new(),
        },
    }
}

fn vm(uuid: u128) -> VmInfo {
    VmInfo {
        has_balloon: None,
        disks: Vec::new(),
        vm: String::new(),
        uuid: Uuid::from_u128(uuid),
        status: "running".into(),
        memory_bytes: 256 << 20,
        machine: "pc-i440fx-10.0".into(),
        qemu_version: "10.0.2".into(),
        kvm: true,
        can_hold: true,
        qemu_build: QemuBuild::Stock,
    }
}

fn facts() -> Facts {
    Facts {
        hosts: BTreeMap::from([(HostId(0), Ok(host("a"))), (HostId(1), Ok(host("b")))]),
        vms: BTreeMap::from([(VmId(0), Ok(vm(1))), (VmId(1), Ok(vm(2)))]),
    }
}

#[test]
fn a_good_set_up_passes() {
    let verdict = judge(&app(), Policy::Muster, &facts());
    assert_eq!(verdict.problems, Vec::<String>::new());
    assert_eq!(verdict.machines[&VmId(0)], "pc-i440fx-10.0");
}

#[test]
fn every_problem_is_named_at_once() {
    let mut facts = facts();
    let mut b = host("b");
    b.info.available_memory_bytes = 300 << 20;
    b.info.state_free_bytes = 12;
    b.info.qemu_version = Some("8.2.1".into());
    b.vms[0].can_receive = false;
    b.vms.remove(1);
    b.status.runs.push(RunSummary {
        run: Uuid::nil(),
        epoch: 1,
        phase: "held".into(),
        decision: None,
        vms: vec!["web".into()],
        in_doubt: true,
    });
    facts.hosts.insert(HostId(1), Ok(b));
    let mut old = vm(7);
    old.can_hold = false;
    old.status = "postmigrate".into();
    facts.vms.insert(VmId(1), Ok(old));
    let problems = judge(&app(), Policy::Muster, &facts).problems;
    for needle in [
        "web, db need 512.0 MiB, 300.0 MiB are available",
        "12 B are free",
        "newer than QEMU 8.2.1 at b",
        "VM web: host b has neither",
        "VM db: host b does not know it",
        "web is in run",
        "QEMU's UUID is",
        "cannot be held",
        "its state is `postmigrate`",
    ] {
        assert!(
            problems.iter().any(|p| p.contains(needle)),
            "{needle}: {problems:#?}"
        );
    }
    let problems = judge(&app(), Policy::Parallel, &facts).problems;
    assert!(!problems.iter().any(|p| p.contains("cannot be held")));
}

#[test]
fn hosts_that_cannot_be_reached_are_all_named() {
    let mut facts = facts();
    facts.hosts.insert(HostId(0), Err("refused".into()));
    facts.hosts.insert(HostId(1), Err("no greeting".into()));
    facts.vms.clear();
    let problems = judge(&app(), Policy::Muster, &facts).problems;
    assert_eq!(problems, vec!["host a: refused", "host b: no greeting"]);
}

#[test]
fn one_sidecar_behind_two_addresses() {
    let mut facts = facts();
    facts.hosts.insert(HostId(1), Ok(host("a")));
    let problems = judge(&app(), Policy::Muster, &facts).problems;
    assert!(
        problems[0].contains("both control addresses"),
        "{problems:?}"
    );
}

#[test]
fn versions() {
    assert_eq!(version_of("10.0.2 (Debian)"), Some((10, 0)));
    assert_eq!(machine_version("pc-i440fx-10.0"), Some((10, 0)));
    assert_eq!(machine_version("pc-q35-9.2"), Some((9, 2)));
    assert_eq!(machine_version("microvm"), None);
}

/// `web` alone, with these disks.
fn with_disks(disks: &str) -> Application {
    let text = format!(
        r#"
        version = 1
        application = {{ name = "shop", bandwidth = "50MB/s" }}
        host = [{{ name = "a", control = "unix:/a" }}, {{ name = "b", control = "unix:/b" }}]
        [[vm]]
        name = "web"
        uuid = "00000000-0000-0000-0000-000000000001"
        from = "a"
        to = "b"
        disks = [{disks}]
    "#
    );
    Application::parse(&text, Path::new("test")).expect("good")
}

#[test]
fn local_disks_are_found_or_named() {
    let app = with_disks(r#"{ node = "root" }, { node = "data" }, { node = "cd" }"#);
    let mut facts = facts();
    let info = |node: &str, size_bytes| DiskInfo {
        node: node.into(),
        size_bytes,
        format: "raw".into(),
        read_only: node == "cd",
    };
    let mut web = vm(1);
    web.disks = vec![info("root", 4096), info("cd", 1)];
    facts.vms = BTreeMap::from([(VmId(0), Ok(web))]);
    let verdict = judge(&app, Policy::Sequential, &facts);
    for needle in [
        "there is no block node `data`; it has root, cd",
        "host b has no place for its disk `root`",
    ] {
        let found = verdict.problems.iter().any(|text| text.contains(needle));
        assert!(found, "{needle}: {:?}", verdict.problems);
    }
    let mut b = host("b");
    b.vms[0].disks = Some(vec!["root".into(), "data".into(), "cd".into()]);
    facts.hosts.insert(HostId(1), Ok(b));
    let mut web = vm(1);
    web.disks = vec![info("root", 4096), info("data", 8192)];
    web.disks.push(info("cd", 1));
    web.qemu_build = QemuBuild::Patched;
    facts.vms = BTreeMap::from([(VmId(0), Ok(web))]);
    let verdict = judge(&app, Policy::Muster, &facts);
    assert_eq!(verdict.problems, Vec::<String>::new());
    let sizes: Vec<u64> = verdict.disks[&VmId(0)]
        .iter()
        .map(|d| d.size_bytes)
        .collect();
    assert_eq!(sizes, [4096, 8192, 1]);
    let read_only = verdict.disks[&VmId(0)].iter().map(|d| d.read_only);
    assert_eq!(read_only.collect::<Vec<_>>(), [false, false, true]);
    assert_eq!(verdict.transports[&VmId(0)], Transport::Relay);
}

#[test]
fn write_blocking_copies_need_a_patched_qemu() {
    let app = with_disks(r#"{ node = "root", copy-mode = "write-blocking" }"#);
    let builds = [
        (QemuBuild::Stock, CopyMode::Background, true),
        (QemuBuild::Patched, CopyMode::WriteBlocking, false),
    ];
    for (build, mode, is_noted) in builds {
        let mut facts = facts();
        let mut b = host("b");
        b.vms[0].disks = Some(vec!["root".into()]);
        facts.hosts.insert(HostId(1), Ok(b));
        let mut web = vm(1);
        web.qemu_build = build;
        web.disks = vec![DiskInfo {
            node: "root".into(),
            size_bytes: 4096,
            format: "raw".into(),
            read_only: false,
        }];
        facts.vms = BTreeMap::from([(VmId(0), Ok(web))]);
        let verdict = judge(&app, Policy::Muster, &facts);
        assert_eq!(verdict.problems, Vec::<String>::new());
        assert_eq!(verdict.disks[&VmId(0)][0].copy_mode, mode);
        let noted = verdict
            .notes
            .iter()
            .any(|note| note.contains("is not patched"));
        assert_eq!(noted, is_noted, "{:?}", verdict.notes);
    }
}

#[test]
fn stock_qemu_loses_writes_under_tcg() {
    for (build, is_noted) in [(QemuBuild::Stock, true), (QemuBuild::Patched, false)] {
        let mut facts = facts();
        let mut web = vm(1);
        web.kvm = false;
        web.qemu_build = build;
        facts.vms.insert(VmId(0), Ok(web));
        let notes = judge(&app(), Policy::Muster, &facts).notes;
        let noted = notes.iter().any(|note| note.contains("can lose writes"));
        assert_eq!(noted, is_noted, "{notes:?}");
    }
}
