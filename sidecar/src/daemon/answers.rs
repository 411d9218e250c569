//! What queries return.

use std::sync::LazyLock;

use schemars::{JsonSchema, schema_for};
use serde_json::{Value, json};

use super::Daemon;
use crate::protocol::codec::CommandError;
use crate::protocol::command as c;
use crate::protocol::dirty::{AnyEvent, DirtyStartArgs, DirtyVmArgs};
use crate::protocol::probe::{ProbeArgs, ProbeListenArgs};
use crate::protocol::traffic::QueryTrafficArgs;
use crate::protocol::types::{HostInfo, VmEntry};

impl Daemon {
    pub(super) fn query(&self, command: &c::Command) -> Result<Value, CommandError> {
        match command {
            c::Command::QuerySchema => Ok(SCHEMA.clone()),
            c::Command::QueryStatus => Ok(self.status()),
            c::Command::QueryHost => Ok(json!(self.host_info())),
            c::Command::QueryVms => Ok(json!(self.vm_entries())),
            c::Command::QuerySettings => Ok(self.settings()),
            c::Command::QueryRun(args) => {
                let Some(entry) = self.runs.get(&args.run) else {
                    let text = format!("run {} is not known here", args.run);
                    return Err(CommandError::generic(text));
                };
                let mut vms = entry.run.reports();
                self.complete_reports(args.run, &mut vms);
                Ok(json!({
                    "run": args.run,
                    "epoch": entry.run.epoch,
                    "phase": entry.run.phase(),
                    "decision": entry.run.decision(),
                    "in_doubt": entry.run.is_in_doubt(),
                    "ended": entry.run.has_ended(),
                    "register": entry.run.register,
                    "vms": vms,
                }))
            }
            c::Command::QueryDirty(args) => self.query_dirty(&args.vm),
            _ => {
                let text = format!("`{}` is no query", command.name());
                Err(CommandError::generic(text))
            }
        }
    }

    fn status(&self) -> Value {
        let runs: Vec<Value> = self
            .runs
            .iter()
            .map(|(id, entry)| {
                let halves = entry.run.halves.iter();
                let vms: Vec<&str> = halves.map(|half| half.half().name.as_str()).collect();
                json!({
                    "run": id,
                    "epoch": entry.run.epoch,
                    "phase": entry.run.phase(),
                    "decision": entry.run.decision(),
                    "in_doubt": entry.run.is_in_doubt(),
                    "ended": entry.run.has_ended(),
                    "vms": vms,
                })
            })
            .collect();
        json!({
            "host": self.config.host,
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_ms": crate::hold::millis(self.started.elapsed()),
            "runs": runs,
            "alarms": self.alarms,
            "measured": self.measured_vms(),
        })
    }

    fn host_info(&self) -> HostInfo {
        let free = nix::sys::statvfs::statvfs(&self.config.state_dir).map_or(0, |stat| {
            stat.blocks_available().saturating_mul(stat.fragment_size())
        });
        HostInfo {
            host: self.config.host.clone(),
            available_memory_bytes: available_memory().unwrap_or(0),
            state_free_bytes: free,
            stream_address: self.stream_address.clone(),
            sidecar_version: env!("CARGO_PKG_VERSION").to_owned(),
            qemu_version: self.programs.version(),
        }
    }

    fn vm_entries(&self) -> Vec<VmEntry> {
        let entry = |name: String| {
            let path = self.config.qmp_path(&name);
            let config = self.config.vm(&name);
            VmEntry {
                qmp: Some(path.display().to_string()),
                qmp_present: path.exists(),
                can_receive: config.is_some_and(|vm| vm.adopt || !vm.incoming.is_empty()),
                incoming_build: config
                    .and_then(|vm| vm.incoming.first())
                    .and_then(|program| self.programs.build(program)),
                disks: config.filter(|vm| !vm.adopt).map(|vm| {
                    let nodes = vm.disks.iter().map(|disk| disk.node.clone());
                    nodes.collect()
                }),
                vm: name,
            }
        };
        self.config.vm_names().into_iter().map(entry).collect()
    }

    fn settings(&self) -> Value {
        let runs: Vec<Value> = self
            .runs
            .iter()
            .filter(|(_, entry)| !entry.run.has_ended())
            .map(|(id, entry)| {
                let vms = entry
                    .run
                    .halves
                    .iter()
                    .zip(&entry.io)
                    .filter_map(|(half, io)| {
                        let leaf = io.leaf?;
                        Some(json!({
                            "vm": half.half().name,
                            "bytes_per_s": self.pacing.leaf_limit(leaf),
                        }))
                    });
                json!({
                    "run": id,
                    "lease_ms": crate::hold::millis(entry.run.lease),
                    "report_interval_ms": crate::hold::millis(entry.run.report_interval),
                    "max_downtime_ms": crate::hold::millis(entry.run.max_downtime),
                    "hold": entry.run.hold,
                    "group_bytes_per_s": self.pacing.group_limit(entry.group),
                    "vms": vms.collect::<Vec<Value>>(),
                })
            })
            .collect();
        json!({ "link_bytes_per_s": self.pacing.link_limit(), "runs": runs })
    }
}

fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn command<T: JsonSchema>(name: &str, oob: bool) -> Value {
    json!({ "name": name, "oob": oob, "arguments": schema_for!(T) })
}

static SCHEMA: LazyLock<Value> = LazyLock::new(schema);

fn schema() -> Value {
    json!({
        "protocol": {
            "major": crate::protocol::PROTOCOL_MAJOR,
            "minor": crate::protocol::PROTOCOL_MINOR,
        },
        "commands": [
            command::<c::CapabilitiesArgs>("qmp_capabilities", false),
            command::<c::NoArgs>("query-muster-schema", false),
            command::<c::NoArgs>("query-status", false),
            command::<c::NoArgs>("query-host", false),
            command::<c::NoArgs>("query-vms", false),
            command::<c::NoArgs>("query-settings", false),
            command::<c::QueryVmArgs>("query-vm", false),
            command::<c::QueryRunArgs>("query-run", false),
            command::<c::QueryRunArgs>("query-decision", false),
            command::<c::PrepareArgs>("prepare", false),
            command::<c::StartArgs>("start", false),
            command::<c::PaceArgs>("pace", false),
            command::<c::VmArgs>("hold", false),
            command::<c::RunArgs>("arm", false),
            command::<c::RunArgs>("disarm", false),
            command::<c::RunArgs>("release", false),
            command::<c::RunArgs>("continue", false),
            command::<c::RunArgs>("back", false),
            command::<c::DecideArgs>("decide", false),
            command::<c::RunArgs>("commit", false),
            command::<c::RunArgs>("abort", true),
            command::<c::FinishArgs>("finish", false),
            command::<c::ThrottleArgs>("throttle", false),
            command::<c::ThrottleDisksArgs>("throttle-disks", false),
            command::<c::VmArgs>("yank", true),
            command::<c::RunArgs>("keep-alive", false),
            command::<c::ReportIntervalArgs>("set-report-interval", false),
            command::<c::RecoverArgs>("recover", false),
            command::<c::RunArgs>("forget", false),
            command::<DirtyStartArgs>("dirty-start", false),
            command::<DirtyVmArgs>("dirty-stop", false),
            command::<DirtyVmArgs>("query-dirty", false),
            command::<ProbeListenArgs>("probe-listen", false),
            command::<ProbeArgs>("probe", false),
            command::<QueryTrafficArgs>("query-traffic", false),
        ],
        "events": schema_for!(AnyEvent),
    })
}
