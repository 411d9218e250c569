//! What sidecars say about themselves: `query-status`, read leniently across minor versions.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sidecar::protocol::command::{Command, QueryRunArgs};
use sidecar::protocol::types::{Decision, VmReport};
use uuid::Uuid;

use crate::application::{Application, HostId};
use crate::client::Client;

const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// A sidecar's answer to `query-status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SidecarStatus {
    /// The host.
    #[serde(default)]
    pub host: String,
    /// Version of the sidecar program.
    #[serde(default)]
    pub version: String,
    /// Runs it takes part in, or did.
    #[serde(default)]
    pub runs: Vec<RunSummary>,
    /// What a person should look at.
    #[serde(default)]
    pub alarms: Vec<String>,
}

/// A run, as one sidecar sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    /// Which run.
    pub run: Uuid,
    /// Highest epoch seen.
    #[serde(default)]
    pub epoch: u64,
    /// Phase, as text.
    #[serde(default)]
    pub phase: String,
    /// The decision, where it is known there.
    #[serde(default)]
    pub decision: Option<Decision>,
    /// Names of its VMs with a half there.
    #[serde(default)]
    pub vms: Vec<String>,
    /// Whether it waits for a register that cannot be reached.
    #[serde(default)]
    pub in_doubt: bool,
}

impl RunSummary {
    /// Whether nothing more will happen to it there.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(
            self.phase.as_str(),
            "committed" | "rolled-back" | "failed" | "ended"
        )
    }
}

/// One host in `muster status`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HostStatus {
    /// Its name in the application file.
    pub host: String,
    /// Its control socket.
    pub control: String,
    /// What it says, or why it could not be asked.
    pub answer: Result<SidecarStatus, String>,
    /// The halves of every run there that is not over.
    pub halves: Vec<VmReport>,
}

#[derive(Deserialize)]
struct RunState {
    #[serde(default)]
    vms: Vec<VmReport>,
}

/// Asks every host in `app`; `connected` says which could be reached.
#[must_use]
pub fn ask(
    app: &Application,
    client: &Client,
    connected: &[(HostId, Result<String, String>)],
) -> Vec<HostStatus> {
    let queries: Vec<(HostId, Command)> = connected
        .iter()
        .filter(|(_, result)| result.is_ok())
        .map(|(host, _)| (*host, Command::QueryStatus))
        .collect();
    let mut answers = client.ask(&queries, ANSWER_WITHIN).into_iter();
    let mut hosts = Vec::new();
    for (host, result) in connected {
        let answer = match result {
            Err(error) => Err(error.clone()),
            Ok(_) => answers
                .next()
                .unwrap_or_else(|| Err("not asked".into()))
                .and_then(|value| {
                    serde_json::from_value(value)
                        .map_err(|error| format!("query-status is not understood: {error}"))
                }),
        };
        hosts.push((*host, answer));
    }
    hosts
        .into_iter()
        .map(|(host, answer)| HostStatus {
            host: app.host(host).name.clone(),
            control: app.host(host).control.to_string(),
            halves: halves(client, host, answer.as_ref().ok()),
            answer,
        })
        .collect()
}

fn halves(client: &Client, host: HostId, status: Option<&SidecarStatus>) -> Vec<VmReport> {
    let runs = status.map_or(&[][..], |status| status.runs.as_slice());
    let open = runs.iter().filter(|run| !run.is_over());
    let queries: Vec<(HostId, Command)> = open
        .map(|run| (host, Command::QueryRun(QueryRunArgs { run: run.run })))
        .collect();
    let answers = client.ask(&queries, ANSWER_WITHIN).into_iter().flatten();
    answers
        .filter_map(|value| serde_json::from_value::<RunState>(value).ok())
        .flat_map(|state| state.vms)
        .collect()
}
