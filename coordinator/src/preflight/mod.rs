//! Preflight: everything that can be known to be wrong before anything is moved.
//!
//! [`gather`] asks the sidecars; [`judge`] is pure and names every problem at once.

mod disks;
#[cfg(test)]
mod tests;
mod transport;

use std::collections::BTreeMap;
use std::time::Duration;

use rate_limiter::Bytes;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sidecar::protocol::command::{Command, PrepareDisk, QueryVmArgs};
use sidecar::protocol::types::{HostInfo, QemuBuild, Transport, VmEntry, VmInfo};

use crate::application::{Application, HostId, Policy, VmId};
use crate::client::Client;
use crate::policy::{CannotRun, can_run, plan};
use crate::status::{self, SidecarStatus};
use crate::survey::Wanted;

const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const ANSWER_WITHIN: Duration = Duration::from_secs(6);
/// Notes and register records need so much room in a state directory.
const STATE_ROOM: u64 = 1 << 20;

/// What was found out.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Every host that takes part: what its sidecar says, or why it could not be asked.
    pub hosts: BTreeMap<HostId, Result<HostFacts, String>>,
    /// Every VM at its source.
    pub vms: BTreeMap<VmId, Result<VmInfo, String>>,
}

/// What one sidecar says.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// How it calls its host.
    pub name: String,
    /// The host.
    pub info: HostInfo,
    /// The VMs in its configuration.
    pub vms: Vec<VmEntry>,
    /// Runs under way.
    pub status: SidecarStatus,
}

/// The result of the preflight.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// What stands in the way. Empty: the move can begin.
    pub problems: Vec<String>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Machine types found at the sources: the destinations must offer the same.
    pub machines: BTreeMap<VmId, String>,
    /// How each VM's stream is to go.
    pub transports: BTreeMap<VmId, Transport>,
    /// Local disks that move, with their sizes.
    pub disks: BTreeMap<VmId, Vec<PrepareDisk>>,
}

/// Asks the sidecars of every host that takes part.
#[must_use]
pub fn gather(app: &Application, client: &Client) -> Facts {
    let mut facts = Facts::default();
    for host in app.hosts_involved() {
        facts
            .hosts
            .insert(host, Err("no connection within 5 s".into()));
    }
    let mut connected = Vec::new();
    for (host, result) in client.wait_connected(CONNECT_WITHIN) {
        let result = result.map_err(|error| error.to_string());
        if let Err(error) = &result {
            facts.hosts.insert(host, Err(error.clone()));
        }
        connected.push((host, result));
    }
    ask_hosts(client, &connected, &mut facts);
    ask_vms(app, client, &mut facts);
    facts
}

fn ask_hosts(client: &Client, connected: &[(HostId, Result<String, String>)], facts: &mut Facts) {
    let up: Vec<(HostId, &String)> = connected
        .iter()
        .filter_map(|(host, result)| Some((*host, result.as_ref().ok()?)))
        .collect();
    let queries: Vec<(HostId, Command)> = up
        .iter()
        .flat_map(|(host, _)| {
            [Command::QueryHost, Command::QueryVms, Command::QueryStatus].map(|c| (*host, c))
        })
        .collect();
    let answers = client.ask(&queries, ANSWER_WITHIN);
    for ((host, name), answers) in up.iter().zip(answers.chunks(3)) {
        let read = || -> Result<HostFacts, String> {
            let [info, vms, status] = answers else {
                return Err("not asked".into());
            };
            Ok(HostFacts {
                name: (*name).clone(),
                info: understood("query-host", info)?,
                vms: understood("query-vms", vms)?,
                status: understood::<status::SidecarStatus>("query-status", status)?,
            })
        };
        facts.hosts.insert(*host, read());
    }
}

fn ask_vms(app: &Application, client: &Client, facts: &mut Facts) {
    let asked: Vec<VmId> = app
        .vm_ids()
        .filter(|id| matches!(facts.hosts.get(&app.vm(*id).from), Some(Ok(_))))
        .collect();
    let queries: Vec<(HostId, Command)> = asked
        .iter()
        .map(|id| {
            let vm = app.vm(*id).name.clone();
            (app.vm(*id).from, Command::QueryVm(QueryVmArgs { vm }))
        })
        .collect();
    for (id, answer) in asked.iter().zip(client.ask(&queries, ANSWER_WITHIN)) {
        facts.vms.insert(*id, understood("query-vm", &answer));
    }
}

fn understood<T: DeserializeOwned>(
    query: &str,
    answer: &Result<Value, String>,
) -> Result<T, String> {
    let value = answer
        .as_ref()
        .map_err(|error| format!("{query}: {error}"))?;
    serde_json::from_value(value.clone())
        .map_err(|error| format!("the answer to {query} is not understood: {error}"))
}

/// Names everything that stands in the way of moving `app` with `policy`.
#[must_use]
pub fn judge(app: &Application, policy: Policy, facts: &Facts) -> Verdict {
    let mut verdict = Verdict::default();
    // Replica groups are found by the plan alone.
    let possible = if app.replica_groups {
        plan(app, policy).map(drop)
    } else {
        can_run(app, policy)
    };
    let wanted = Wanted::of_move(app, policy);
    let measures = wanted.bandwidth || !wanted.vms.is_empty();
    match possible {
        Err(error @ CannotRun::NoReplicaGroups { .. }) if measures => verdict.notes.push(format!(
            "{error}; what the file does not say is measured before the move"
        )),
        Err(error) => {
            verdict.problems.push(error.to_string());
            return verdict;
        }
        Ok(()) => {}
    }
    judge_hosts(app, facts, &mut verdict);
    for id in app.vm_ids() {
        judge_vm(app, app.holds(policy), facts, id, &mut verdict);
    }
    judge_memory(app, facts, &mut verdict);
    verdict
}

fn judge_hosts(app: &Application, facts: &Facts, verdict: &mut Verdict) {
    let mut names: BTreeMap<&str, HostId> = BTreeMap::new();
    for (&id, found) in &facts.hosts {
        let host = app.host(id);
        let facts = match found {
            Ok(facts) => facts,
            Err(error) => {
                verdict
                    .problems
                    .push(format!("host {}: {error}", host.name));
                continue;
            }
        };
        if let Some(other) = names.insert(&facts.name, id) {
            verdict.problems.push(format!(
                "hosts {} and {}: both control addresses reach the sidecar of `{}`",
                app.host(other).name,
                host.name,
                facts.name
            ));
        } else if facts.name != host.name {
            verdict.notes.push(format!(
                "host {}: its sidecar calls itself `{}`",
                host.name, facts.name
            ));
        }
        if facts.info.state_free_bytes < STATE_ROOM {
            verdict.problems.push(format!(
                "host {}: {} are free in the sidecar's state directory, its journal needs {}",
                host.name,
                Bytes(facts.info.state_free_bytes),
                Bytes(STATE_ROOM)
            ));
        }
        for alarm in &facts.status.alarms {
            verdict.notes.push(format!("host {}: {alarm}", host.name));
        }
        for run in facts.status.runs.iter().filter(|run| !run.is_over()) {
            let ours = |name: &&String| app.vms.iter().any(|vm| vm.name == **name);
            let names: Vec<&str> = run.vms.iter().filter(ours).map(String::as_str).collect();
            if !names.is_empty() {
                verdict.problems.push(format!(
                    "host {}: {} is in run {} already ({}{}); see `muster status`",
                    host.name,
                    names.join(", "),
                    run.run,
                    run.phase,
                    if run.in_doubt { ", in doubt" } else { "" }
                ));
            }
        }
    }
}

fn judge_vm(app: &Application, hold: bool, facts: &Facts, id: VmId, verdict: &mut Verdict) {
    let vm = app.vm(id);
    let (from, to) = (&app.host(vm.from).name, &app.host(vm.to).name);
    if let Some(Ok(destination)) = facts.hosts.get(&vm.to) {
        match destination.vms.iter().find(|entry| entry.vm == vm.name) {
            None => verdict.problems.push(format!(
                "VM {}: host {to} does not know it; add it (with a template) to the sidecar's configuration there",
                vm.name
            )),
            Some(entry) if !entry.can_receive => verdict.problems.push(format!(
                "VM {}: host {to} has neither a template to start it from nor a QEMU waiting for it",
                vm.name
            )),
            Some(_) => {}
        }
    }
    let info = match facts.vms.get(&id) {
        Some(Ok(info)) => info,
        Some(Err(error)) => {
            verdict
                .problems
                .push(format!("VM {} at {from}: {error}", vm.name));
            return;
        }
        None => return,
    };
    if info.uuid != vm.uuid {
        verdict.problems.push(format!(
            "VM {} at {from}: QEMU's UUID is {}, the application file says {}",
            vm.name, info.uuid, vm.uuid
        ));
    }
    if matches!(
        info.status.as_str(),
        "inmigrate" | "postmigrate" | "finish-migrate" | "shutdown"
    ) {
        verdict.problems.push(format!(
            "VM {} at {from}: its state is `{}`; it must be running or paused",
            vm.name, info.status
        ));
    }
    if !info.kvm && info.qemu_build != QemuBuild::Patched {
        verdict.notes.push(format!(
            "VM {} runs under TCG: QEMU {} can lose writes there when a guest dirties memory faster than it is sent; move only what can be lost",
            vm.name, info.qemu_version
        ));
    }
    if hold && !info.can_hold {
        verdict.problems.push(format!(
            "VM {} at {from}: QEMU {} cannot be held (switchover-ack, QEMU 8.1 or newer); update it or use policy sequential or parallel",
            vm.name, info.qemu_version
        ));
    }
    if let Some(Ok(destination)) = facts.hosts.get(&vm.to) {
        if let Some(version) = &destination.info.qemu_version {
            let machine = machine_version(&info.machine);
            if machine.is_some_and(|machine| version_of(version).is_some_and(|v| v < machine)) {
                verdict.problems.push(format!(
                    "VM {}: its machine type {} is newer than QEMU {version} at {to}",
                    vm.name, info.machine
                ));
            }
        }
    }
    verdict.machines.insert(id, info.machine.clone());
    let there = match facts.hosts.get(&vm.to) {
        Some(Ok(host)) => host.vms.iter().find(|entry| entry.vm == vm.name),
        _ => None,
    };
    if app.balloon_of(id).is_some() && info.has_balloon == Some(false) {
        verdict.notes.push(format!(
            "VM {} at {from}: it has no virtio-balloon device; all its memory is copied",
            vm.name
        ));
    }
    disks::judge(app, info, there, id, verdict);
    let found = transport::Found {
        source: info.qemu_build,
        destination: there.and_then(|entry| entry.incoming_build),
        hold,
    };
    match transport::choose(app, id, found) {
        Ok((transport, note)) => {
            verdict.transports.insert(id, transport);
            verdict.notes.extend(note);
        }
        Err(problem) => verdict.problems.push(problem),
    }
}

fn judge_memory(app: &Application, facts: &Facts, verdict: &mut Verdict) {
    for (&id, found) in &facts.hosts {
        let Ok(host) = found else { continue };
        let coming: Vec<(&str, u64)> = app
            .vm_ids()
            .filter(|vm| app.vm(*vm).to == id)
            .filter_map(|vm| {
                Some((
                    app.vm(vm).name.as_str(),
                    facts.vms.get(&vm)?.as_ref().ok()?.memory_bytes,
                ))
            })
            .collect();
        let need = coming
            .iter()
            .fold(0_u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
        if need > host.info.available_memory_bytes {
            let names: Vec<&str> = coming.iter().map(|(name, _)| *name).collect();
            verdict.problems.push(format!(
                "host {}: {} need {}, {} are available",
                app.host(id).name,
                names.join(", "),
                Bytes(need),
                Bytes(host.info.available_memory_bytes)
            ));
        }
    }
}

/// Major and minor version at the beginning of `10.0.2 (Debian …)`.
fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The version at the end of `pc-i440fx-10.0`.
fn machine_version(machine: &str) -> Option<(u32, u32)> {
    version_of(machine.rsplit('-').next()?)
}
