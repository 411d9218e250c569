//! Text for `muster check` and `muster status`.

use coordinator::application::{Application, Policy};
use coordinator::policy::{self, Concurrency};
use coordinator::preflight::{Facts, Verdict};
use coordinator::status::HostStatus;
use coordinator::survey::Wanted;
use rate_limiter::Bytes;
use sidecar::protocol::types::QemuBuild;

/// What is worse without the patches.
const STOCK_COSTS: &str = "stock QEMU is held by the relay: the stream crosses both sidecars (about \
    a core per GiB/s on each host), a held VM takes about 0.07 core, what remains is known to 100 ms \
    of dirtying, and a group that turns out too heavy when it is paused rolls back";

/// What a successful check says.
pub(super) fn checked(
    app: &Application,
    policy: Policy,
    facts: &Facts,
    verdict: &Verdict,
) -> String {
    let mut lines = Vec::new();
    let mut stock = 0;
    for id in app.vm_ids() {
        let vm = app.vm(id);
        if let Some(Ok(info)) = facts.vms.get(&id) {
            let transport = verdict.transports.get(&id).copied().unwrap_or_default();
            lines.push(format!(
                "{}: {} → {}, {}, {}, QEMU {} ({}), {}, {transport}",
                vm.name,
                app.host(vm.from).name,
                app.host(vm.to).name,
                Bytes(info.memory_bytes),
                info.machine,
                info.qemu_version,
                info.qemu_build,
                info.status
            ));
            stock += usize::from(info.qemu_build == QemuBuild::Stock);
        }
    }
    if stock > 0 && app.holds(policy) {
        lines.push(STOCK_COSTS.into());
    }
    lines.push(format!(
        "{} can be moved: policy {policy}, {} VMs, {}, max-downtime {} ms, register at {}",
        app.name,
        app.vms.len(),
        bandwidth(app),
        app.max_downtime.as_millis(),
        app.host(app.register).name
    ));
    lines.extend(groups(app, policy));
    lines.join("\n")
}

/// The groups that a move would make of what the file says; before it measures what is left out.
fn groups(app: &Application, policy: Policy) -> Vec<String> {
    let plan = match policy::plan(app, policy) {
        Ok(plan) => plan,
        Err(error) => return vec![format!("no groups: {error}")],
    };
    let together = match plan.concurrency {
        Concurrency::OneAfterAnother => "one after another",
        Concurrency::AllAtOnce => "all at once",
        Concurrency::TwoStages => "all memory first, then their turns",
    };
    let count = plan.groups.len();
    let mut lines = vec![match count {
        1 => "1 group".to_owned(),
        _ => format!("{count} groups, {together}"),
    }];
    for (index, group) in plan.groups.iter().enumerate() {
        let names: Vec<&str> = group
            .vms
            .iter()
            .map(|&vm| app.vm(vm).name.as_str())
            .collect();
        let scheme = if group.vms.len() > 1 {
            format!(", by {}", group.scheme)
        } else {
            String::new()
        };
        lines.push(format!("  {}. {}{scheme}", index + 1, names.join(", ")));
    }
    let wanted = Wanted::of_move(app, policy);
    if !wanted.is_empty() {
        lines.push(format!(
            "  a move begins with {}, and may make others",
            wanted.describe(app)
        ));
    }
    lines.extend(plan.notes.iter().map(|note| format!("note: {note}")));
    lines
}

/// What the migration may use, for people.
fn bandwidth(app: &Application) -> String {
    let probed = if app.probe { ", probed before" } else { "" };
    match app.allowance.bandwidth {
        Some(rate) if app.allowance.reserve.0 > 0 => {
            format!("{rate} with {} in reserve{probed}", app.allowance.reserve)
        }
        Some(rate) => format!("{rate}{probed}"),
        None => "bandwidth probed before".into(),
    }
}

/// The state of every host.
pub(super) fn status(hosts: &[HostStatus]) -> String {
    let mut lines = Vec::new();
    for host in hosts {
        let status = match &host.answer {
            Ok(status) => status,
            Err(error) => {
                lines.push(format!("{} ({}): {error}", host.host, host.control));
                continue;
            }
        };
        lines.push(format!(
            "{} ({}), sidecar {}",
            host.host, host.control, status.version
        ));
        for alarm in &status.alarms {
            lines.push(format!("  ALARM {alarm}"));
        }
        if status.runs.is_empty() {
            lines.push("  no runs".into());
        }
        for run in &status.runs {
            let decision = run.decision.map_or(String::new(), |decision| {
                format!(", {decision:?}").to_lowercase()
            });
            let doubt = if run.in_doubt { ", IN DOUBT" } else { "" };
            let vms = run.vms.join(", ");
            lines.push(format!(
                "  run {}: {vms}: {}{decision}{doubt}",
                run.run, run.phase
            ));
        }
        for half in &host.halves {
            let error = half
                .error
                .as_ref()
                .map_or(String::new(), |error| format!(", {error}"));
            lines.push(format!(
                "    {} ({}): {}, round {}, {} left, {} sent{error}",
                half.vm,
                format!("{:?}", half.role).to_lowercase(),
                half.phase,
                half.round,
                Bytes(half.remaining_bytes),
                Bytes(half.transferred_bytes)
            ));
        }
    }
    lines.join("\n")
}

/// 0, or 3 where a person should look.
pub(super) fn status_code(hosts: &[HostStatus]) -> u8 {
    let bad = |host: &HostStatus| match &host.answer {
        Ok(status) => !status.alarms.is_empty() || status.runs.iter().any(|run| run.in_doubt),
        Err(_) => true,
    };
    if hosts.iter().any(bad) {
        super::EXIT_ATTENTION
    } else {
        0
    }
}
