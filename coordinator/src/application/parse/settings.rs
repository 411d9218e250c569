//! `[application]` and `[application.termination]`.

use std::time::Duration;

use sidecar::protocol::command::{BALLOON_WAIT_MS, Termination};

use super::profile::{positive_rate, rate, read_balloon_reserve};
use super::{RATE, host_named};
use crate::application::reader::{Problems, TableReader};
use crate::application::{
    Application, Ballooning, HostId, OnNonConvergence, OnPartial, Policy, TransportChoice,
};
use crate::capacity::Allowance;

const MS: Duration = Duration::from_millis(1);
const DAY: Duration = Duration::from_secs(86_400);

/// What `[application]` says; hosts and VMs are filled in by the caller.
pub(super) struct Settings {
    pub application: Application,
    /// The register's host, where it is named.
    pub register: Option<HostId>,
}

pub(super) fn choice<T: Copy>(
    reader: &mut TableReader<'_, '_>,
    problems: &mut Problems<'_>,
    key: &'static str,
    choices: &[(&str, T)],
) -> Option<T> {
    let names: Vec<String> = choices
        .iter()
        .map(|(name, _)| format!("\"{name}\""))
        .collect();
    let expected = names.join(" or ");
    let found = reader.text(problems, key, &expected)?;
    let value = choices.iter().find(|(name, _)| *name == found.value);
    if value.is_none() {
        let text = format!(
            "`{key}` in {} is \"{}\"; expected {expected}",
            reader.name, found.value
        );
        problems.at(&found.span, text);
    }
    value.map(|(_, value)| *value)
}

/// Reads `transport`, of the application or of a VM.
pub(super) fn read_transport(
    reader: &mut TableReader<'_, '_>,
    problems: &mut Problems<'_>,
) -> Option<TransportChoice> {
    let choices = [
        ("auto", TransportChoice::Auto),
        ("relay", TransportChoice::Relay),
        ("direct", TransportChoice::Direct),
    ];
    choice(reader, problems, "transport", &choices)
}

/// Reads `max-throttle`, of the application or of a VM: percent.
pub(super) fn read_max_throttle(
    reader: &mut TableReader<'_, '_>,
    problems: &mut Problems<'_>,
    least: i64,
) -> Option<u8> {
    let percent = reader.integer(problems, "max-throttle", least..100)?;
    u8::try_from(percent).ok()
}

/// Reads `[application]`.
pub(super) fn read_settings(
    top: &mut TableReader<'_, '_>,
    hosts: &[&str],
    problems: &mut Problems<'_>,
) -> Option<Settings> {
    let Some(value) = top.get("application") else {
        top.missing(problems, "[application]", "a name at least");
        return None;
    };
    let Some(table) = value.get_ref().as_table() else {
        problems.at(
            &value.span(),
            "`application` must be written as [application]",
        );
        return None;
    };
    let mut reader = TableReader::new("[application]", value.span(), table);
    let name = reader
        .text(problems, "name", "a name")
        .map(|found| found.value);
    if name.is_none() && !reader.has("name") {
        reader.missing(problems, "name", "a name");
    }
    let policies = Policy::ALL.map(|policy| (policy.as_str(), policy));
    let policy = choice(&mut reader, problems, "policy", &policies);
    let (allowance, probe) = read_allowance(&mut reader, problems);
    let measure = reader.boolean(problems, "measure");
    let max_downtime = reader
        .duration(problems, "max-downtime", MS..2000 * Duration::from_secs(1))
        .unwrap_or(300 * MS);
    let hard = reader.duration(problems, "downtime-limit-hard", MS..DAY);
    if hard.is_some_and(|hard| hard < max_downtime) {
        let text = "`downtime-limit-hard` in [application] is below `max-downtime`";
        problems.at(&reader.span.clone(), text);
    }
    let deadline = reader.duration(problems, "deadline", Duration::from_secs(1)..7 * DAY);
    let lease = reader.duration(
        problems,
        "lease",
        Duration::from_secs(3)..Duration::from_secs(3600),
    );
    let interval = reader.duration(
        problems,
        "report-interval",
        20 * MS..Duration::from_secs(61),
    );
    let disk_stall = reader.duration(problems, "disk-stall", 100 * MS..60_001 * MS);
    let ballooning = read_ballooning(&mut reader, problems);
    let channels = reader.integer(problems, "multifd-channels", 0..256);
    let transport = read_transport(&mut reader, problems);
    let register = reader
        .text(problems, "register", "a host's name")
        .and_then(|found| {
            let at = ("register", "[application]", &found.span);
            host_named(hosts, &found.value, at, problems)
        });
    let horizon = reader.duration(problems, "horizon", Duration::ZERO..DAY);
    let non_convergence = [
        ("abort", OnNonConvergence::Abort),
        ("throttle", OnNonConvergence::Throttle),
        ("force", OnNonConvergence::Force),
    ];
    let on_non_convergence = choice(
        &mut reader,
        problems,
        "on-non-convergence",
        &non_convergence,
    );
    let max_throttle = read_max_throttle(&mut reader, problems, 1);
    let partial = [
        ("retry", OnPartial::Retry),
        ("return", OnPartial::Return),
        ("stay", OnPartial::Stay),
    ];
    let on_partial = choice(&mut reader, problems, "on-partial", &partial);
    let (termination, ends_by_rule) = read_termination(&mut reader, problems);
    let replica_groups = reader.boolean(problems, "replica-groups");
    reader.finish(problems);
    Some(Settings {
        application: Application {
            name: name?,
            policy: policy.unwrap_or(Policy::Muster),
            allowance,
            probe,
            measure: measure.unwrap_or(true),
            max_downtime,
            hard_downtime: hard.unwrap_or(max_downtime * 2),
            deadline,
            lease: lease.unwrap_or(Duration::from_secs(5)),
            register: HostId(0),
            horizon: horizon.unwrap_or(Duration::from_secs(10)),
            on_non_convergence: on_non_convergence.unwrap_or(OnNonConvergence::Abort),
            max_throttle: max_throttle.unwrap_or(99),
            on_partial: on_partial.unwrap_or(OnPartial::Stay),
            report_interval: interval.unwrap_or(500 * MS),
            disk_stall: disk_stall.unwrap_or(2000 * MS),
            ballooning,
            multifd_channels: channels.and_then(|n| u8::try_from(n).ok()).unwrap_or(0),
            transport: transport.unwrap_or_default(),
            termination,
            ends_by_rule,
            replica_groups: replica_groups.unwrap_or(false),
            hosts: Vec::new(),
            links: Vec::new(),
            vms: Vec::new(),
            traffic: Vec::new(),
        },
        register,
    })
}

/// Reads `balloon`, `balloon-reserve` and `balloon-wait`.
fn read_ballooning(reader: &mut TableReader<'_, '_>, problems: &mut Problems<'_>) -> Ballooning {
    let usual = Ballooning::default();
    Ballooning {
        on: reader.boolean(problems, "balloon").unwrap_or(usual.on),
        reserve: read_balloon_reserve(reader, problems).unwrap_or(usual.reserve),
        wait: reader
            .duration(
                problems,
                "balloon-wait",
                Duration::from_millis(*BALLOON_WAIT_MS.start())
                    ..Duration::from_millis(BALLOON_WAIT_MS.end() + 1),
            )
            .unwrap_or(usual.wait),
    }
}

/// Reads `bandwidth`, `reserve` and `probe`: what the migration may use, and whether it is probed.
fn read_allowance(
    reader: &mut TableReader<'_, '_>,
    problems: &mut Problems<'_>,
) -> (Allowance, bool) {
    let bandwidth = positive_rate(reader, problems, "bandwidth");
    let reserve = rate(reader, problems, "reserve").unwrap_or_default();
    let is_missing = !reader.has("bandwidth");
    let probe = reader.boolean(problems, "probe").unwrap_or(is_missing);
    if is_missing && !probe {
        reader.missing(problems, "bandwidth", &format!("{RATE}, or `probe = true`"));
    }
    let allowance = Allowance { bandwidth, reserve };
    if bandwidth.is_some() && allowance.usable().is_none() {
        let text = "`reserve` in [application] leaves nothing of `bandwidth`";
        problems.at(&reader.span.clone(), text);
    }
    (allowance, probe)
}

/// When pre-copy ends, and whether the file names a rule that QEMU does not have itself.
fn read_termination(
    parent: &mut TableReader<'_, '_>,
    problems: &mut Problems<'_>,
) -> (Termination, bool) {
    let mut termination = Termination::default();
    let Some(value) = parent.get("termination") else {
        return (termination, false);
    };
    let Some(table) = value.get_ref().as_table() else {
        let text = "`termination` must be written as [application.termination]";
        problems.at(&value.span(), text);
        return (termination, false);
    };
    let mut reader = TableReader::new("[application.termination]", value.span(), table);
    let rules = [
        ("qemu", Termination::QEMU),
        ("xen", Termination::XEN),
        ("intelligent", Termination::default()),
    ];
    let rule = choice(&mut reader, problems, "rule", &rules);
    let ends_by_rule = rule.is_some_and(|rule| rule != Termination::QEMU);
    termination = rule.unwrap_or(termination);
    if let Some(epsilon) = reader.number(problems, "stall-epsilon", 0.0..1.0) {
        termination.stall_epsilon = epsilon;
    }
    let mut whole = |key, most| {
        let found = reader.integer(problems, key, 1..most)?;
        u32::try_from(found).ok()
    };
    termination.stall_rounds = whole("stall-rounds", 1001).or(termination.stall_rounds);
    termination.max_rounds = whole("max-rounds", 100_001).or(termination.max_rounds);
    if let Some(factor) = reader.number(problems, "max-memory-factor", 1.0..1000.0) {
        termination.max_memory_factor = Some(factor);
    }
    if let Some(longest) = reader.duration(problems, "max-precopy", Duration::ZERO..DAY) {
        termination.max_precopy_ms = u64::try_from(longest.as_millis()).unwrap_or(u64::MAX);
    }
    reader.finish(problems);
    (termination, ends_by_rule)
}
