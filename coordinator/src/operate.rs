//! Runs that somebody else began: `muster abort` and `muster recover`.
//!
//! The coordinator keeps nothing on disk. Runs are found by asking the sidecars, and settled by
//! telling them: each knows its run's register and obeys it, so an `abort` here can never undo a
//! commit that is recorded.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use sidecar::protocol::command::{Command, FinishArgs, RecoverArgs, RunArgs};
use sidecar::protocol::types::{Decision, Phase, RecordValue, Role};
use uuid::Uuid;

use crate::application::{Application, HostId};
use crate::client::Client;
use crate::report::Outcome;
use crate::status::{self, HostStatus};

const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
const SETTLE_WITHIN: Duration = Duration::from_secs(20);
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// What is to be done with the runs found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// Roll back what can still go back.
    Abort,
    /// Help every run to its end; nobody is vouched for.
    Settle,
    /// The operator vouches that a host is off: runs in doubt end as said.
    Fenced {
        /// The host that is off for good.
        host: String,
        /// What the group does where nothing is recorded.
        value: Decision,
    },
}

/// How one run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// The run.
    pub run: Uuid,
    /// Its VMs.
    pub vms: Vec<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// What was refused, or is left.
    pub notes: Vec<String>,
}

/// Why nothing could be done.
#[derive(Debug, thiserror::Error)]
pub enum OperateError {
    /// No sidecar could be asked.
    #[error("no sidecar could be reached:\n  {}", errors.join("\n  "))]
    NoHost {
        /// Why, per host.
        errors: Vec<String>,
    },
    /// The run that was named is not known anywhere.
    #[error(
        "run {run} is under way on no host that could be reached{}",
        unreachable(errors)
    )]
    NoSuchRun {
        /// The run.
        run: Uuid,
        /// Hosts that could not be asked.
        errors: Vec<String>,
    },
    /// `--fenced` names no host of the application.
    #[error("there is no host `{name}` in the application file")]
    NoSuchHost {
        /// The name.
        name: String,
    },
}

fn unreachable(errors: &[String]) -> String {
    if errors.is_empty() {
        String::new()
    } else {
        format!("; not reached:\n  {}", errors.join("\n  "))
    }
}

/// Asks all hosts once.
#[must_use]
pub fn look(app: &Application) -> Vec<HostStatus> {
    Operator::connect(app).look()
}

/// Finds the runs of `app` that are not over and does as wished. Without `run`: all of them.
///
/// # Errors
/// No sidecar was reached, or the run or host named does not exist.
pub fn settle(
    app: &Application,
    run: Option<Uuid>,
    wish: &Wish,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Settled>, OperateError> {
    if let Wish::Fenced { host, .. } = wish {
        if app.host_named(host).is_none() {
            return Err(OperateError::NoSuchHost { name: host.clone() });
        }
    }
    let operator = Operator::connect(app);
    let hosts = operator.look();
    let errors = operator.errors();
    if operator.up().is_empty() {
        return Err(OperateError::NoHost { errors });
    }
    let mut found = open_runs(app, &hosts);
    if let Some(run) = run {
        found.retain(|known, _| *known == run);
        if found.is_empty() {
            return Err(OperateError::NoSuchRun { run, errors });
        }
    }
    for error in &errors {
        say(error);
    }
    Ok(found
        .into_iter()
        .map(|(run, open)| operator.settle(run, &open, wish, say))
        .collect())
}

/// A run that is not over somewhere.
#[derive(Debug, Clone, Default)]
struct OpenRun {
    epoch: u64,
    vms: BTreeSet<String>,
    decision: Option<Decision>,
}

fn open_runs(app: &Application, hosts: &[HostStatus]) -> BTreeMap<Uuid, OpenRun> {
    let mut found: BTreeMap<Uuid, OpenRun> = BTreeMap::new();
    let open: BTreeSet<Uuid> = hosts
        .iter()
        .filter_map(|host| host.answer.as_ref().ok())
        .flat_map(|status| &status.runs)
        .filter(|run| !run.is_over())
        .filter(|run| {
            run.vms
                .iter()
                .any(|name| app.vms.iter().any(|vm| vm.name == *name))
        })
        .map(|run| run.run)
        .collect();
    for run in hosts
        .iter()
        .filter_map(|host| host.answer.as_ref().ok())
        .flat_map(|status| &status.runs)
        .filter(|run| open.contains(&run.run))
    {
        let entry = found.entry(run.run).or_default();
        entry.epoch = entry.epoch.max(run.epoch);
        entry.vms.extend(run.vms.iter().cloned());
        entry.decision = entry.decision.or(run.decision);
    }
    found
}

struct Operator<'a> {
    app: &'a Application,
    client: Client,
    connected: Vec<(HostId, Result<String, String>)>,
}

impl<'a> Operator<'a> {
    fn connect(app: &'a Application) -> Self {
        let hosts = app.hosts_involved();
        let client = Client::connect(app, &hosts);
        let mut connected: Vec<(HostId, Result<String, String>)> = client
            .wait_connected(CONNECT_WITHIN)
            .into_iter()
            .map(|(host, result)| (host, result.map_err(|error| error.to_string())))
            .collect();
        for host in hosts {
            if connected.iter().all(|(known, _)| *known != host) {
                connected.push((
                    host,
                    Err(format!("no connection within {CONNECT_WITHIN:?}")),
                ));
            }
        }
        connected.sort_by_key(|(host, _)| *host);
        Self {
            app,
            client,
            connected,
        }
    }

    fn look(&self) -> Vec<HostStatus> {
        status::ask(self.app, &self.client, &self.connected)
    }

    fn up(&self) -> Vec<HostId> {
        let up = self.connected.iter().filter(|(_, result)| result.is_ok());
        up.map(|(host, _)| *host).collect()
    }

    fn errors(&self) -> Vec<String> {
        self.connected
            .iter()
            .filter_map(|(host, result)| {
                let error = result.as_ref().err()?;
                Some(format!("host {}: {error}", self.app.host(*host).name))
            })
            .collect()
    }

    /// Sends a command to every host that is up; returns what was refused.
    fn tell(&self, command: &Command) -> Vec<String> {
        let queries: Vec<(HostId, Command)> = self
            .up()
            .into_iter()
            .map(|host| (host, command.clone()))
            .collect();
        let answers = self.client.ask(&queries, ANSWER_WITHIN);
        queries
            .iter()
            .zip(answers)
            .filter_map(|((host, command), answer)| {
                let error = answer.err()?;
                let name = &self.app.host(*host).name;
                Some(format!("host {name}, {}: {error}", command.name()))
            })
            .collect()
    }

    /// Tells halves that wait for the fenced host what the operator vouches for.
    fn vouch_for_vms(&self, run: Uuid, fenced: &str, hosts: &[HostStatus]) {
        let queries: Vec<(HostId, Command)> = waiting_halves(self.app, run, fenced, hosts)
            .into_iter()
            .filter_map(|(host, vm, value)| {
                let (vm, fenced) = (Some(vm), fenced.to_owned());
                let recover = RecoverArgs {
                    run,
                    vm,
                    value,
                    fenced,
                };
                Some((self.app.host_named(&host)?, Command::Recover(recover)))
            })
            .collect();
        // What is refused shows in what is left.
        let _ = self.client.ask(&queries, ANSWER_WITHIN);
    }

    fn settle(&self, run: Uuid, open: &OpenRun, wish: &Wish, say: &mut dyn FnMut(&str)) -> Settled {
        let vms: Vec<String> = open.vms.iter().cloned().collect();
        let args = RunArgs {
            run,
            epoch: open.epoch.saturating_add(1),
        };
        say(&format!("run {run} ({})", vms.join(", ")));
        let mut notes = Vec::new();
        match wish {
            Wish::Abort if open.decision == Some(Decision::Commit) => {
                say("commit is recorded: this is finished, it cannot be taken back");
            }
            Wish::Abort => notes = self.tell(&Command::Abort(args)),
            Wish::Settle => {}
            Wish::Fenced { host, value } => {
                // What a sidecar knows to be recorded stands.
                let value = match open.decision.unwrap_or(*value) {
                    Decision::Commit => RecordValue::Commit,
                    Decision::Abort => RecordValue::Abort,
                };
                let fenced = host.clone();
                let vm = None;
                notes = self.tell(&Command::Recover(RecoverArgs {
                    run,
                    vm,
                    value,
                    fenced,
                }));
            }
        }
        let end = Instant::now() + SETTLE_WITHIN;
        let fenced = match wish {
            Wish::Fenced { host, .. } => host.as_str(),
            _ => "",
        };
        let mut decision = open.decision;
        loop {
            let hosts = self.look();
            let mut view = View::of(run, &hosts, fenced);
            view.decision = view.decision.or(decision);
            decision = view.decision;
            if view.over || Instant::now() >= end {
                let outcome = view.outcome();
                if outcome == Outcome::NeedsAttention {
                    notes.extend(view.left);
                } else {
                    notes.clear();
                }
                return Settled {
                    run,
                    vms,
                    outcome,
                    notes,
                };
            }
            if let Wish::Fenced { host, .. } = wish {
                self.vouch_for_vms(run, host, &hosts);
            }
            if view.decision == Some(Decision::Commit) {
                // Finishing forward is everyone's business.
                self.tell(&Command::Commit(args));
                let vms = view.running;
                if !vms.is_empty() {
                    let (run, epoch) = (args.run, args.epoch);
                    self.tell(&Command::Finish(FinishArgs { run, epoch, vms }));
                }
            }
            std::thread::sleep(ASK_AGAIN);
        }
    }
}

/// What is to be vouched for a half that waits to hear of its VM's other half, which it cannot: `on`
/// which host, and the side on which the VM ends.
fn waiting_halves(
    app: &Application,
    run: Uuid,
    fenced: &str,
    hosts: &[HostStatus],
) -> Vec<(String, Uuid, RecordValue)> {
    let is_over = |host: &str, phase: &str| {
        let known = hosts.iter().find(|known| known.host == host);
        let summaries = known.and_then(|known| known.answer.as_ref().ok());
        summaries.is_some_and(|status| {
            status
                .runs
                .iter()
                .any(|summary| summary.run == run && summary.phase == phase)
        })
    };
    let mut found = Vec::new();
    for host in hosts {
        for half in &host.halves {
            let Some(vm) = app.vms.iter().find(|vm| vm.name == half.vm) else {
                continue;
            };
            let complete = matches!(
                half.phase,
                Phase::Arrived | Phase::InDoubt | Phase::Committing
            );
            let (from, to) = (&app.host(vm.from).name, &app.host(vm.to).name);
            let side = match half.role {
                // Its source is off, and this copy is complete: it is the last one.
                Role::Destination if complete && from == fenced => RecordValue::Destination,
                Role::Destination if is_over(from, "rolled-back") => RecordValue::Source,
                Role::Source if complete && to == fenced => RecordValue::Source,
                Role::Source if is_over(to, "committed") => RecordValue::Destination,
                _ => continue,
            };
            found.push((host.host.clone(), half.uuid, side));
        }
    }
    found
}

/// A run as all hosts that answer see it now.
#[derive(Debug, Default)]
struct View {
    over: bool,
    /// A host could not be asked, so that nothing can be said for sure.
    blind: bool,
    decision: Option<Decision>,
    /// VMs whose destination runs.
    running: Vec<String>,
    failed: bool,
    rolled_back: bool,
    committed: bool,
    /// What is not over, in words.
    left: Vec<String>,
}

impl View {
    fn of(run: Uuid, hosts: &[HostStatus], fenced: &str) -> Self {
        let mut view = Self {
            over: true,
            ..Self::default()
        };
        for host in hosts {
            let status = match &host.answer {
                Ok(status) => status,
                Err(_) if host.host == fenced => continue,
                Err(error) => {
                    view.blind = true;
                    view.left
                        .push(format!("host {} could not be asked: {error}", host.host));
                    continue;
                }
            };
            for summary in status.runs.iter().filter(|summary| summary.run == run) {
                view.decision = view.decision.or(summary.decision);
                view.failed |= summary.phase == "failed";
                view.committed |= summary.phase == "committed";
                view.rolled_back |= summary.phase == "rolled-back";
                if !summary.is_over() {
                    view.over = false;
                    let doubt = if summary.in_doubt {
                        ": in doubt, its register cannot be reached; bring that host back, or \
                         vouch that it is off with `muster recover --fenced HOST`"
                    } else {
                        ""
                    };
                    let vms = summary.vms.join(", ");
                    view.left
                        .push(format!("{vms} at {}: {}{doubt}", host.host, summary.phase));
                }
            }
            for half in &host.halves {
                let runs = half.role == Role::Destination && half.phase == Phase::Committed;
                if runs {
                    view.running.push(half.vm.clone());
                }
            }
        }
        view
    }

    fn outcome(&self) -> Outcome {
        let mixed = self.committed && self.rolled_back;
        if !self.over || self.blind || self.failed || mixed {
            return Outcome::NeedsAttention;
        }
        match self.decision {
            Some(Decision::Commit) => Outcome::Committed,
            Some(Decision::Abort) => Outcome::RolledBack,
            None if self.committed => Outcome::Committed,
            None if self.rolled_back => Outcome::RolledBack,
            // Its sidecars have forgotten it, and nobody said how it ended.
            None => Outcome::NeedsAttention,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{RunSummary, SidecarStatus};

    fn host(name: &str, phase: &str, decision: Option<Decision>, in_doubt: bool) -> HostStatus {
        let run = RunSummary {
            run: Uuid::from_u128(1),
            epoch: 3,
            phase: phase.into(),
            decision,
            vms: vec!["web".into()],
            in_doubt,
        };
        HostStatus {
            host: name.into(),
            control: String::new(),
            answer: Ok(SidecarStatus {
                host: name.into(),
                version: String::new(),
                runs: vec![run],
                alarms: Vec::new(),
            }),
            halves: Vec::new(),
        }
    }

    fn outcome(hosts: &[HostStatus]) -> Outcome {
        View::of(Uuid::from_u128(1), hosts, "").outcome()
    }

    #[test]
    fn a_run_is_judged_by_all_that_answer() {
        let abort = Some(Decision::Abort);
        let commit = Some(Decision::Commit);
        let back = [
            host("a", "rolled-back", abort, false),
            host("b", "rolled-back", None, false),
        ];
        assert_eq!(outcome(&back), Outcome::RolledBack);
        let done = [
            host("a", "committed", commit, false),
            host("b", "committed", None, false),
        ];
        assert_eq!(outcome(&done), Outcome::Committed);
        let mixed = [
            host("a", "committed", None, false),
            host("b", "rolled-back", None, false),
        ];
        assert_eq!(outcome(&mixed), Outcome::NeedsAttention);
        assert_eq!(outcome(&[]), Outcome::NeedsAttention, "nobody knows");
        let mut away = host("b", "", None, false);
        away.answer = Err("refused".into());
        let blind = [host("a", "rolled-back", abort, false), away];
        assert_eq!(outcome(&blind), Outcome::NeedsAttention);
        let view = View::of(Uuid::from_u128(1), &blind, "b");
        assert_eq!(view.outcome(), Outcome::RolledBack, "b is fenced");
        let doubt = [
            host("a", "in-doubt", None, true),
            host("b", "arrived", None, false),
        ];
        let view = View::of(Uuid::from_u128(1), &doubt, "");
        assert_eq!(view.outcome(), Outcome::NeedsAttention);
        assert!(view.left[0].contains("--fenced"), "{:?}", view.left);
    }
}
