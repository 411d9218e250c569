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
    /// What writes to its devices are limited to.
    pub limits: BTreeMap<String, u64>,
    /// What all dirty bitmaps of its disks hold.
    pub written: u64,
    /// What each image holds without holes.
    pub allocated: Option<u64>,
    /// Its disks: block node and size.
    pub disks: Vec<(String, u64)>,
    /// Mirror jobs: offset and length.
    pub jobs: BTreeMap<String, (u64, u64)>,
    /// NBD nodes.
    pub targets: Vec<String>,
    /// So many `cont`s are refused.
    pub not_finalized: u32,
    /// Jobs that were told to end stay.
    pub jobs_stay: bool,
    /// Its balloon, where it has one.
    pub balloon: Option<Balloon>,
    said: Vec<u8>,
    clock_us: i64,
}

/// A virtio-balloon device with its guest; sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Balloon {
    /// What the guest has.
    pub actual: u64,
    /// What it is told to have.
    pub target: u64,
    /// How much changes hands between two looks.
    pub step: u64,
    /// What of 256 MiB the guest uses; none: it has no driver.
    pub used: Option<u64>,
    pub polling: u64,
    /// It is told sizes and refuses them.
    pub refuses: bool,
}

impl Balloon {
    pub fn using(used: u64) -> Self {
        Self {
            actual: 256 * MIB,
            target: 256 * MIB,
            step: 256 * MIB,
            used: Some(used),
            polling: 0,
            refuses: false,
        }
    }

    fn get(&self, property: &str) -> Result<Value, String> {
        Ok(match property {
            "free-page-hint" => json!(true),
            "guest-stats-polling-interval" => json!(self.polling),
            "guest-stats" => {
                let left = self
                    .used
                    .map_or(u64::MAX, |used| self.actual.saturating_sub(used));
                // Before it is asked for new ones it has some from long ago.
                let updated = match (self.used, self.polling) {
                    (None, _) => 0,
                    (_, 1) => 1_000_000,
                    (Some(_), _) => 1,
                };
                json!({ "last-update": updated, "stats": {
                    "stat-available-memory": left, "stat-free-memory": u64::MAX,
                }})
            }
            _ => return Err(format!("Property '{property}' not found")),
        })
    }

    fn obey(&mut self, name: &str, arguments: &Value) -> Result<Value, String> {
        match name {
            "qom-set" => self.polling = arguments["value"].as_u64().expect("seconds"),
            "balloon" if self.refuses => return Err("it does not".into()),
            "balloon" => self.target = arguments["value"].as_u64().expect("bytes"),
            _ => {
                let (least, most) = (
                    self.actual.saturating_sub(self.step),
                    self.actual + self.step,
                );
                self.actual = self.target.clamp(least, most);
                return Ok(json!({ "actual": self.actual }));
            }
        }
        Ok(json!({}))
    }
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
            limits: BTreeMap::new(),
            written: 0,
            allocated: None,
            disks: Vec::new(),
            jobs: BTreeMap::new(),
            targets: Vec::new(),
            not_finalized: 0,
            jobs_stay: false,
            balloon: None,
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
            "qom-get" if arguments["path"] == "/machine" => json!("pc-i440fx-10.0-machine"),
            "qom-list" => match &self.balloon {
                Some(_) if arguments["path"] == "/machine/peripheral" => {
                    json!([{ "name": "balloon0", "type": "child<virtio-balloon-pci>" }])
                }
                _ => json!([]),
            },
            "qom-get" => {
                assert_eq!(arguments["path"], "/machine/peripheral/balloon0");
                let balloon = self.balloon.as_ref().expect("a balloon");
                balloon.get(arguments["property"].as_str().expect("a name"))?
            }
            "qom-set" | "balloon" | "query-balloon" => {
                let balloon = self.balloon.as_mut().ok_or("No balloon device")?;
                balloon.obey(name, arguments)?
            }
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
            "cont" if self.not_finalized > 0 => {
                self.not_finalized -= 1;
                return Err("Migration is not finalized yet".into());
            }
            "cont" => {
                self.status = "running".into();
                self.event("RESUME", Value::Null);
                json!({})
            }
            _ if name.contains("block") => return self.obey_block(name, arguments),
            _ => json!({}),
        })
    }

    fn obey_block(&mut self, name: &str, arguments: &Value) -> Result<Value, String> {
        let text = |key: &str| arguments[key].as_str().unwrap_or_default().to_owned();
        match name {
            "query-named-block-nodes" => {
                let node = |(name, size): &(String, u64)| {
                    let bitmap = |name: &str| json!({ "name": name, "count": self.written });
                    json!({
                        "node-name": name, "drv": "raw", "ro": false,
                        "backing_file_depth": 0,
                        "image": { "virtual-size": size, "actual-size": self.allocated },
                        "dirty-bitmaps": [
                            bitmap("muster-rate"), bitmap("muster-set"), { "count": self.written }
                        ],
                    })
                };
                return Ok(self.disks.iter().map(node).collect());
            }
            "query-block" => {
                let device = |(name, _): &(String, u64)| {
                    json!({
                        "qdev": format!("{name}-device"),
                        "inserted": { "node-name": name, "bps_wr": 0 },
                    })
                };
                return Ok(self.disks.iter().map(device).collect());
            }
            "block_set_io_throttle" => {
                let limit = arguments["bps_wr"].as_u64().unwrap_or(0);
                self.limits.insert(text("id"), limit);
            }
            "query-block-jobs" => {
                let job = |(id, (offset, len)): (&String, &(u64, u64))| json!({ "device": id, "type": "mirror", "offset": offset, "len": len });
                return Ok(self.jobs.iter().map(job).collect());
            }
            "blockdev-add" => self.targets.push(text("node-name")),
            "blockdev-mirror" => {
                let size = self.disks.iter().find(|disk| disk.0 == text("device"));
                let size = size.ok_or("Cannot find device")?.1;
                self.jobs.insert(text("job-id"), (0, size));
            }
            "block-job-cancel" => {
                let job = text("device");
                if !self.jobs.contains_key(&job) {
                    return Err(format!("Job '{job}' not found"));
                }
                if !self.jobs_stay {
                    let whole = arguments["force"] == json!(false);
                    self.ends(&job, whole, None);
                }
            }
            "blockdev-del" => {
                let node = text("node-name");
                let Some(at) = self.targets.iter().position(|target| *target == node) else {
                    return Err(format!("Failed to find node with node-name='{node}'"));
                };
                let index = node.trim_start_matches("muster-nbd");
                if self.jobs.contains_key(&format!("muster-mirror{index}")) {
                    return Err(format!("Node {node} is in use"));
                }
                self.targets.remove(at);
            }
            _ => {}
        }
        Ok(json!({}))
    }

    /// A job ends: whole or cancelled, or with an error.
    pub fn ends(&mut self, job: &str, whole: bool, error: Option<&str>) {
        let (offset, len) = self.jobs.remove(job).expect("a job");
        let offset = if whole { len } else { offset };
        let mut data = json!({ "type": "mirror", "device": job, "offset": offset, "len": len });
        if let Some(error) = error {
            data["error"] = json!(error);
        }
        let name = match (whole, error) {
            (false, None) => "BLOCK_JOB_CANCELLED",
            _ => "BLOCK_JOB_COMPLETED",
        };
        self.event(name, data);
    }

    /// Everything is copied once, but so many bytes of each.
    pub fn mirrors_ready(&mut self, left: u64) {
        for (job, (offset, len)) in self.jobs.clone() {
            self.jobs.insert(job.clone(), (len - left, len));
            let data = json!({ "device": job, "offset": len - left, "len": len, "speed": 0 });
            self.event("BLOCK_JOB_READY", data);
            let _ = offset;
        }
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
