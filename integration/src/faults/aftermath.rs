//! What must not be left behind: settings of QEMU, processes, files, listeners, runs, alarms.
//! (The register keeps its records: a sidecar that comes back much later still asks for them.)

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use coordinator::application::HostId;
use coordinator::client::Client;
use coordinator::status::SidecarStatus;
use serde_json::{Value, json};
use sidecar::protocol::command::Command;

use super::log::addresses;
use crate::lab::Lab;

const ANSWER: Duration = Duration::from_secs(2);

/// What a QEMU's migration is set to, and who listens, before a move.
#[derive(Debug, Clone, PartialEq)]
pub struct Baseline {
    settings: Vec<(String, Value, Value)>,
    listeners: Vec<(String, BTreeSet<String>)>,
}

fn settings(lab: &Lab, guest: &str, host: &str) -> Result<(Value, Value)> {
    let mut monitor = lab.monitor(guest, host)?;
    let capabilities = monitor.execute("query-migrate-capabilities", json!({}), ANSWER)?;
    let parameters = monitor.execute("query-migrate-parameters", json!({}), ANSWER)?;
    Ok((capabilities, parameters))
}

fn listeners(lab: &Lab, host: &str) -> Result<BTreeSet<String>> {
    let read = || {
        let mut found = BTreeSet::new();
        for table in ["tcp", "tcp6"] {
            let path = format!("/proc/thread-self/net/{table}");
            for line in std::fs::read_to_string(path)?.lines().skip(1) {
                let fields: Vec<&str> = line.split_whitespace().collect();
                if let [_, local, _, "0A", ..] = fields[..] {
                    found.insert((*local).to_owned());
                }
            }
        }
        Ok::<_, std::io::Error>(found)
    };
    Ok(lab.network.host(host)?.enter(read)??)
}

impl Baseline {
    /// Reads it, with every guest on `host`.
    ///
    /// # Errors
    /// A QEMU does not answer.
    pub fn read(lab: &Lab, host: &str) -> Result<Self> {
        let mut all = Vec::new();
        for guest in &lab.spec.guests {
            let (capabilities, parameters) = settings(lab, &guest.name, host)?;
            all.push((guest.name.clone(), capabilities, parameters));
        }
        let mut listening = Vec::new();
        for host in &lab.spec.hosts {
            listening.push((host.clone(), listeners(lab, host)?));
        }
        Ok(Self {
            settings: all,
            listeners: listening,
        })
    }

    /// Everything that is not as it was, with every guest where `places` says.
    ///
    /// # Errors
    /// A QEMU does not answer.
    pub fn differences(
        &self,
        lab: &Lab,
        places: &[(String, Option<String>)],
    ) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for (guest, place) in places {
            let Some(host) = place else { continue };
            let before = self.settings.iter().find(|(name, ..)| name == guest);
            let (_, capabilities, parameters) = before.context("a guest without a baseline")?;
            let now = settings(lab, guest, host)?;
            differ(guest, "capability", capabilities, &now.0, &mut found);
            differ(guest, "parameter", parameters, &now.1, &mut found);
        }
        for (host, before) in &self.listeners {
            for extra in listeners(lab, host)?.difference(before) {
                found.push(format!("host {host} listens at {extra}"));
            }
        }
        for host in &lab.spec.hosts {
            let here: Vec<&str> = places
                .iter()
                .filter(|(_, place)| place.as_ref() == Some(host))
                .map(|(guest, _)| guest.as_str())
                .collect();
            processes(lab, host, here.len(), &mut found)?;
            files(lab, host, &here, &mut found);
        }
        Ok(found)
    }
}

fn differ(guest: &str, what: &str, before: &Value, now: &Value, found: &mut Vec<String>) {
    let pairs = |value: &Value| -> Vec<(String, Value)> {
        match value {
            Value::Array(list) => list
                .iter()
                .map(|one| (one["capability"].to_string(), one["state"].clone()))
                .collect(),
            Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            _ => Vec::new(),
        }
    };
    let now = pairs(now);
    for (name, old) in pairs(before) {
        let new = now.iter().find(|(other, _)| *other == name);
        if new.map(|(_, value)| value) != Some(&old) {
            let new = new.map_or("nothing".into(), |(_, value)| value.to_string());
            found.push(format!("{guest}: {what} {name} is {new}, was {old}"));
        }
    }
}

fn processes(lab: &Lab, host: &str, expected: usize, found: &mut Vec<String>) -> Result<()> {
    let name = |pid: &u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        text.trim().to_owned()
    };
    let names: Vec<String> = lab
        .network
        .host(host)?
        .processes()
        .iter()
        .map(name)
        .filter(|name| !name.is_empty())
        .collect();
    let qemus = names.iter().filter(|name| name.starts_with("qemu")).count();
    let sidecars = names
        .iter()
        .filter(|name| name.starts_with("muster-sidecar"))
        .count();
    if qemus != expected || sidecars != 1 || names.len() != qemus + sidecars {
        let list = names.join(", ");
        found.push(format!(
            "host {host} runs {list}; expected {expected} QEMU and one sidecar"
        ));
    }
    Ok(())
}

fn files(lab: &Lab, host: &str, guests: &[&str], found: &mut Vec<String>) {
    let directory = lab.host_directory(host);
    let list = |path: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    };
    for note in list(&directory.join("state").join("runs")) {
        found.push(format!("host {host} keeps the note {note}"));
    }
    for socket in list(&directory.join("run")) {
        let stale = match socket.rsplit_once('.') {
            Some((_, "in" | "out")) => true,
            Some((guest, "qmp")) => !guests.contains(&guest),
            _ => false,
        };
        if stale {
            found.push(format!("host {host} keeps the socket {socket}"));
        }
    }
}

/// Asks the sidecars of a lab.
#[derive(Debug)]
pub struct Asker {
    client: Client,
    hosts: Vec<String>,
}

impl Asker {
    /// Connects to every sidecar of the lab.
    #[must_use]
    pub fn new(lab: &Lab) -> Self {
        let client = Client::connect_to(addresses(lab));
        let _ = client.wait_connected(ANSWER);
        Self {
            client,
            hosts: lab.spec.hosts.clone(),
        }
    }

    /// Asks one sidecar.
    ///
    /// # Errors
    /// It does not answer, or refuses.
    pub fn ask(&self, host: &str, command: Command) -> Result<Value> {
        let index = self.hosts.iter().position(|name| name == host);
        let id = HostId(index.context("no such host")?);
        let mut answers = self.client.ask(&[(id, command)], ANSWER);
        let answer = answers.pop().context("no answer")?;
        answer.map_err(|error| anyhow::anyhow!("sidecar {host}: {error}"))
    }

    /// Runs and alarms that are still open at the sidecars.
    #[must_use]
    pub fn open(&self) -> Vec<String> {
        let mut found = Vec::new();
        for host in &self.hosts {
            let status = self
                .ask(host, Command::QueryStatus)
                .and_then(|value| Ok(serde_json::from_value::<SidecarStatus>(value)?));
            match status {
                Err(error) => found.push(format!("{error:#}")),
                Ok(status) => {
                    for run in status.runs.iter().filter(|run| !run.is_over()) {
                        found.push(format!("sidecar {host}: a run is {}", run.phase));
                    }
                    let alarms = status.alarms.iter();
                    found.extend(alarms.map(|alarm| format!("sidecar {host}: alarm: {alarm}")));
                }
            }
        }
        found
    }
}
