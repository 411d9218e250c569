//! A QEMU as far as its monitor goes: enough of QMP's migration commands to drive the machines.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// What the pretended QEMU knows.
#[derive(Debug)]
pub struct Qemu {
    pub uuid: uuid::Uuid,
    pub status: String,
    pub migration: String,
    pub capabilities: BTreeMap<String, bool>,
    pub parameters: BTreeMap<String, Value>,
    pub remaining: u64,
    pub sent: u64,
    pub syncs: u64,
    pub dirty_pages_per_s: u64,
    /// Every command in order.
    pub commands: Vec<String>,
    /// It does not answer any more.
    pub hung: bool,
    said: Vec<u8>,
    clock_us: i64,
}

const CAPABILITIES: [&str; 8] = [
    "return-path",
    "events",
    "late-block-activate",
    "switchover-ack",
    "pause-before-switchover",
    "auto-converge",
    "multifd",
    "postcopy-ram",
];

pub const MIB: u64 = 1 << 20;

impl Qemu {
    pub fn new(uuid: uuid::Uuid, status: &str) -> Self {
        let greeting = json!({"QMP": {
            "version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""},
            "capabilities": ["oob"],
        }});
        let mut qemu = Self {
            uuid,
            status: status.into(),
            migration: "none".into(),
            capabilities: CAPABILITIES
                .iter()
                .map(|name| ((*name).into(), false))
                .collect(),
            parameters: [
                ("max-bandwidth", 134_217_728),
                ("downtime-limit", 300),
                ("multifd-channels", 2),
                ("cpu-throttle-initial", 20),
                ("max-cpu-throttle", 99),
                ("cpu-throttle-increment", 10),
                ("throttle-trigger-threshold", 50),
            ]
            .into_iter()
            .map(|(name, value)| (name.to_owned(), json!(value)))
            .collect(),
            remaining: 256 * MIB,
            sent: 0,
            syncs: 1,
            dirty_pages_per_s: 0,
            commands: Vec::new(),
            hung: false,
            said: Vec::new(),
            clock_us: 1_000_000,
        };
        qemu.say(&greeting);
        qemu
    }

    /// From now on it has Muster's patches.
    pub fn patch(&mut self) {
        self.capabilities.insert("switchover-hold".into(), false);
        for (name, value) in [
            ("stall-threshold", 10),
            ("stall-rounds", 2),
            ("max-rounds", 0),
            ("max-bytes", 0),
        ] {
            let name = format!("switchover-hold-{name}");
            self.parameters.insert(name, json!(value));
        }
        let ahead = "switchover-hold-stall-ahead".to_owned();
        self.parameters.insert(ahead, json!(false));
    }

    fn say(&mut self, value: &Value) {
        self.said.extend(value.to_string().into_bytes());
        self.said.push(b'\n');
    }

    pub fn event(&mut self, name: &str, data: Value) {
        self.clock_us += 10;
        let stamp = json!({
            "seconds": self.clock_us / 1_000_000,
            "microseconds": self.clock_us % 1_000_000,
        });
        self.say(&json!({ "event": name, "data": data, "timestamp": stamp }));
    }

    pub fn migrates(&mut self, status: &str) {
        self.migration = status.into();
        self.event("MIGRATION", json!({ "status": status }));
    }

    /// Takes what the machine wrote and gives what QEMU says.
    pub fn talk(&mut self, input: &[u8]) -> Vec<u8> {
        for line in input
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
        {
            let command: Value = serde_json::from_slice(line).expect("the machine writes JSON");
            let name = command["execute"].as_str().or(command["exec-oob"].as_str());
            let name = name.expect("a command").to_owned();
            self.commands.push(name.clone());
            if self.hung {
                continue;
            }
            let mut answer = match self.obey(&name, &command["arguments"]) {
                Ok(value) => json!({ "return": value }),
                Err(desc) => json!({ "error": { "class": "GenericError", "desc": desc } }),
            };
            if let Some(id) = command.get("id") {
                answer["id"] = id.clone();
            }
            self.say(&answer);
        }
        std::mem::take(&mut self.said)
    }

    fn obey(&mut self, name: &str, arguments: &Value) -> Result<Value, String> {
        Ok(match name {
            "query-kvm" => json!({ "enabled": true, "present": true }),
            "query-uuid" => json!({ "UUID": self.uuid }),
            "query-status" => json!({ "status": self.status }),
            "query-memory-size-summary" => json!({ "base-memory": 256 * MIB }),
            "qom-get" => json!("pc-i440fx-10.0-machine"),
            "query-migrate-capabilities" => self
                .capabilities
                .iter()
                .map(|(name, state)| json!({ "capability": name, "state": state }))
                .collect(),
            "query-migrate-parameters" => json!(self.parameters),
            "query-migrate" => self.query_migrate(),
            "migrate-set-capabilities" => {
                for item in arguments["capabilities"].as_array().expect("a list") {
                    let name = item["capability"].as_str().expect("a name").to_owned();
                    let state = item["state"].as_bool().expect("a state");
                    *self
                        .capabilities
                        .get_mut(&name)
                        .ok_or("unknown capability")? = state;
                }
                json!({})
            }
            "migrate-set-parameters" => {
                for (name, value) in arguments.as_object().expect("an object") {
                    self.parameters.insert(name.clone(), value.clone());
                }
                json!({})
            }
            "migrate" => {
                self.migrates("setup");
                self.migrates("active");
                json!({})
            }
            "migrate-continue" => {
                self.migrates("device");
                json!({})
            }
            "migrate_cancel" => {
                if matches!(
                    self.migration.as_str(),
                    "active" | "pre-switchover" | "device"
                ) {
                    self.fails("cancelled");
                }
                json!({})
            }
            "cont" => {
                self.status = "running".into();
                self.event("RESUME", Value::Null);
                json!({})
            }
            _ => json!({}),
        })
    }

    fn query_migrate(&self) -> Value {
        if self.migration == "none" {
            return json!({});
        }
        json!({ "status": self.migration, "ram": {
            "total": 256 * MIB, "remaining": self.remaining, "normal-bytes": self.sent,
            "duplicate": 0, "page-size": 4096, "dirty-sync-count": self.syncs,
            "dirty-pages-rate": self.dirty_pages_per_s,
        }})
    }

    /// The migration ended without success, and QEMU continues the guest by itself.
    pub fn fails(&mut self, how: &str) {
        self.migrates(how);
        self.status = "running".into();
    }

    /// A round ended: `sent` more, `remaining` left.
    pub fn round(&mut self, sent: u64, remaining: u64) {
        self.sent += sent;
        self.remaining = remaining;
        self.syncs += 1;
        let pass = self.syncs;
        self.event("MIGRATION_PASS", json!({ "pass": pass }));
    }

    /// The acknowledgement came through: it pauses.
    pub fn pauses(&mut self) {
        self.status = "paused".into();
        self.event("STOP", Value::Null);
        self.migrates("pre-switchover");
    }

    pub fn completes(&mut self, status: &str) {
        self.status = status.into();
        self.migrates("completed");
    }
}
