//! VMs with local disks: copied in stage one, and slowed where they would not get copied.

use super::stages::{last_pace, report_of, round_over, two_stages};
use super::*;
use sidecar::protocol::types::{Chain, CopyMode, DiskReport, Phase};

/// Of `web`, which has a disk of 300 MB.
fn with_disk(copy_mode: CopyMode) -> GroupSpec {
    let mut spec = two_stages(&["web", "db"]);
    spec.members[0].disks = vec![PrepareDisk {
        node: "disk0".into(),
        size_bytes: 300 * MB,
        copy_mode,
        chain: Chain::Flatten,
        read_only: false,
    }];
    spec
}

/// Whom `start` was sent for since the last look, and whether of the disks alone.
fn started(s: &mut Script) -> Vec<(String, bool)> {
    let sent = std::mem::take(&mut s.sent);
    let starts = sent
        .into_iter()
        .filter_map(|(_, _, command)| match command {
            Command::Start(args) => Some(args),
            _ => None,
        });
    let each = starts.flat_map(|args| {
        let only = args.disks_only;
        args.vms.into_keys().map(move |vm| (vm, only))
    });
    each.collect()
}

fn copied(s: &mut Script) {
    let event = Event::DisksCopied {
        vm: "web".into(),
        remaining_bytes: MB,
    };
    s.event(A, event);
}

#[test]
fn disks_are_copied_in_stage_one_and_memory_follows_in_its_turn() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let mut s = Script::new(with_disk(mode));
        s.prepared();
        // In proportion to the disk of one and the memory of the other.
        let pace = last_pace(&s);
        let weight = |vm: &str| pace.vms[vm].weight.expect("a weight");
        assert!(
            (weight("web") / weight("db") - 3.0).abs() < 0.01,
            "{pace:?}"
        );
        assert_eq!(
            started(&mut s),
            [("web".to_owned(), true), ("db".to_owned(), false)]
        );
        copied(&mut s);
        assert!(!s.group.has_copied());
        // A guest whose writes wait for their copy does not wait for the others.
        let limit = last_pace(&s).vms["web"].bytes_per_s;
        assert_eq!(limit == Some(0), mode == CopyMode::WriteBlocking);
        round_over(&mut s, "db");
        assert!(s.group.has_copied());
        assert_eq!(started(&mut s), []);
        s.group.give_turn(s.now);
        s.drain();
        s.pass(Duration::from_secs(60));
        assert_eq!(started(&mut s), [("web".to_owned(), false)]);
    }
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_as_far_as_the_file_allows() {
    for least in [None, Some(BytesPerSecond(4 * MB))] {
        let mut spec = with_disk(CopyMode::Background);
        spec.members[0].min_write_rate = least;
        let mut s = Script::new(spec);
        s.prepared();
        s.sent.clear();
        let mut rate = 20 * MB;
        let mut limits = Vec::new();
        for _ in 0..40 {
            let mut report = report_of(&s, "web", Phase::Precopy, 0, 250 * MB);
            report.rate_bytes_per_s = 22 * MB;
            report.disks = vec![DiskReport {
                node: "disk0".into(),
                size_bytes: 300 * MB,
                copied_bytes: 0,
                remaining_bytes: 150 * MB,
                dirty_rate_bytes_per_s: rate,
                dirty_set_bytes: 0,
                ready: false,
            }];
            s.event(A, Event::Status { vms: vec![report] });
            for (_, _, command) in std::mem::take(&mut s.sent) {
                if let Command::ThrottleDisks(args) = command {
                    limits.push(args.bytes_per_s);
                    // A guest that finds ways to write more than that.
                    rate = 20 * MB;
                }
            }
            s.now += Duration::from_millis(500);
        }
        let expected = match least {
            None => vec![],
            Some(_) => vec![10 * MB, 5 * MB, 4 * MB],
        };
        assert_eq!(limits, expected);
    }
}

#[test]
fn reports_come_often_when_bulk_copies_are_about_to_end() {
    let mut s = Script::new(with_disk(CopyMode::Background));
    s.prepared();
    let usual = u64::try_from(s.group.spec().limits.report_interval.as_millis()).expect("small");
    let intervals = |s: &mut Script| -> Vec<u64> {
        let sent = std::mem::take(&mut s.sent).into_iter();
        let those = sent.filter_map(|(_, _, command)| match command {
            Command::SetReportInterval(args) => Some(args.interval_ms),
            _ => None,
        });
        those.collect()
    };
    intervals(&mut s);
    for left in [290 * MB, 2 * MB, MB] {
        let mut web = report_of(&s, "web", Phase::Precopy, 0, left + 64 * MB);
        web.disks = vec![DiskReport {
            node: "disk0".into(),
            size_bytes: 300 * MB,
            copied_bytes: 300 * MB - left,
            remaining_bytes: left,
            dirty_rate_bytes_per_s: 0,
            dirty_set_bytes: 0,
            ready: false,
        }];
        let db = report_of(&s, "db", Phase::Precopy, 0, left / 3);
        let vms = vec![web, db];
        s.event(A, Event::Status { vms });
        s.now += Duration::from_millis(500);
    }
    // Once, not with every report.
    assert_eq!(intervals(&mut s), [50]);
    copied(&mut s);
    round_over(&mut s, "db");
    assert!(s.group.has_copied());
    assert_eq!(intervals(&mut s).last(), Some(&usual));
}
