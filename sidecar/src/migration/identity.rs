//! Who a QEMU is and what it can do: asked before anything is changed, and put back after.

use serde_json::{Value, json};
use uuid::Uuid;

use super::balloon::find_device;
use super::disks::read_nodes;
use crate::protocol::types::{DiskInfo, QemuBuild};

/// The capability by which a patched QEMU is known.
pub const HOLD_CAPABILITY: &str = "switchover-hold";
const DEVICES: &str = "/machine/peripheral";
const ANONYMOUS_DEVICES: &str = "/machine/peripheral-anon";

/// The questions of an identification, in the order they are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// `query-uuid`.
    Uuid,
    /// `query-status`.
    Status,
    /// `query-migrate`.
    Migration,
    /// `query-migrate-capabilities`.
    Capabilities,
    /// `query-migrate-parameters`.
    Parameters,
    /// `query-memory-size-summary`.
    Memory,
    /// `qom-get /machine type`.
    Machine,
    /// `query-kvm`.
    Kvm,
    /// `query-named-block-nodes`.
    Disks,
    /// `qom-list` of the devices that have a name …
    Devices,
    /// … and of those that have none.
    AnonymousDevices,
}

impl Question {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Uuid,
        Self::Status,
        Self::Migration,
        Self::Capabilities,
        Self::Parameters,
        Self::Memory,
        Self::Machine,
        Self::Kvm,
        Self::Disks,
        Self::Devices,
        Self::AnonymousDevices,
    ];

    /// The QMP command and its arguments.
    #[must_use]
    pub fn command(self) -> (&'static str, Value) {
        match self {
            Self::Uuid => ("query-uuid", Value::Null),
            Self::Status => ("query-status", Value::Null),
            Self::Migration => ("query-migrate", Value::Null),
            Self::Capabilities => ("query-migrate-capabilities", Value::Null),
            Self::Parameters => ("query-migrate-parameters", Value::Null),
            Self::Memory => ("query-memory-size-summary", Value::Null),
            Self::Kvm => ("query-kvm", Value::Null),
            Self::Disks => ("query-named-block-nodes", json!({"flat": true})),
            Self::Devices => ("qom-list", json!({"path": DEVICES})),
            Self::AnonymousDevices => ("qom-list", json!({"path": ANONYMOUS_DEVICES})),
            Self::Machine => ("qom-get", json!({"path": "/machine", "property": "type"})),
        }
    }
}

/// What QEMU answered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Identity {
    /// The VM's UUID.
    pub uuid: Uuid,
    /// Run state, such as `running`.
    pub status: String,
    /// Status of the last or current migration, `none` if there was none.
    pub migration: String,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Machine type with its version, such as `pc-i440fx-10.0`.
    pub machine: String,
    /// Whether KVM executes the guest (else TCG).
    pub kvm: bool,
    /// Block nodes with a name of their own.
    pub disks: Vec<DiskInfo>,
    /// Its virtio-balloon device, if it has one: the path in QEMU's object model.
    pub balloon: Option<String>,
    /// QEMU's version, such as `10.0.2`.
    pub version: String,
    capabilities: Vec<(String, bool)>,
    parameters: Value,
    answered: usize,
}

impl Identity {
    /// An identity of a QEMU of this version, nothing asked yet.
    #[must_use]
    pub fn new(version: String) -> Self {
        Self {
            version,
            ..Self::default()
        }
    }

    /// Takes one answer; true when it was the last one.
    pub fn answer(&mut self, question: Question, value: &Value) -> bool {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        match question {
            Question::Uuid => {
                self.uuid = value["UUID"]
                    .as_str()
                    .and_then(|s| s.parse().ok())
                    .unwrap_or_default();
            }
            Question::Status => self.status = text(&value["status"]),
            Question::Migration => {
                self.migration = value["status"].as_str().unwrap_or("none").to_owned();
            }
            Question::Capabilities => {
                self.capabilities = value
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|item| {
                        Some((
                            item["capability"].as_str()?.to_owned(),
                            item["state"].as_bool()?,
                        ))
                    })
                    .collect();
            }
            Question::Parameters => self.parameters = value.clone(),
            Question::Memory => {
                self.memory_bytes = value["base-memory"].as_u64().unwrap_or(0)
                    + value["plugged-memory"].as_u64().unwrap_or(0);
            }
            Question::Disks => self.disks = read_nodes(value),
            Question::Devices => self.balloon = find_device(DEVICES, value),
            Question::AnonymousDevices => {
                let found = find_device(ANONYMOUS_DEVICES, value);
                self.balloon = self.balloon.take().or(found);
            }
            Question::Kvm => self.kvm = value["enabled"].as_bool().unwrap_or(false),
            Question::Machine => {
                self.machine = text(value).trim_end_matches("-machine").to_owned();
            }
        }
        self.answered += 1;
        self.answered == Question::ALL.len()
    }

    /// Whether this QEMU knows the capability.
    #[must_use]
    pub fn has_capability(&self, name: &str) -> bool {
        self.capabilities.iter().any(|(known, _)| known == name)
    }

    /// Whether this QEMU holds by itself.
    #[must_use]
    pub fn build(&self) -> QemuBuild {
        if self.has_capability(HOLD_CAPABILITY) {
            QemuBuild::Patched
        } else {
            QemuBuild::Stock
        }
    }

    /// Whether a migration is going on.
    #[must_use]
    pub fn is_migrating(&self) -> bool {
        !matches!(
            self.migration.as_str(),
            "none" | "completed" | "failed" | "cancelled"
        )
    }

    /// Whether QEMU is at least of this version.
    #[must_use]
    pub fn is_at_least(&self, major: u64, minor: u64) -> bool {
        let mut parts = self
            .version
            .split('.')
            .map(|part| part.parse::<u64>().unwrap_or(0));
        let found = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        found >= (major, minor)
    }

    /// Arguments for `migrate-set-capabilities` that put back what `changed` named.
    #[must_use]
    pub fn original_capabilities(&self, changed: &Value) -> Value {
        let list: Vec<Value> = changed["capabilities"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|item| {
                let name = item["capability"].as_str()?;
                let (_, state) = self.capabilities.iter().find(|(known, _)| known == name)?;
                Some(json!({ "capability": name, "state": state }))
            })
            .collect();
        json!({ "capabilities": list })
    }

    /// Whether its migration parameters have this one.
    #[must_use]
    pub fn has_parameter(&self, name: &str) -> bool {
        self.parameters.get(name).is_some()
    }

    /// Arguments for `migrate-set-parameters` that put back what `changed` named.
    #[must_use]
    pub fn original_parameters(&self, changed: &Value) -> Value {
        let mut object = serde_json::Map::new();
        for name in changed
            .as_object()
            .into_iter()
            .flat_map(|object| object.keys())
        {
            if let Some(value) = self.parameters.get(name) {
                object.insert(name.clone(), value.clone());
            }
        }
        Value::Object(object)
    }
}

/// Who keeps a VM in wait-and-copy until it is released.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HoldBy {
    /// Nobody: it switches over as soon as it converges.
    #[default]
    Nobody,
    /// The relay, which keeps the destination's acknowledgement back.
    Relay,
    /// QEMU itself, a patched one.
    Qemu,
}

/// What a run asks of QEMU's capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapabilityPlan {
    /// Who keeps the VM in wait-and-copy until released.
    pub hold: HoldBy,
    /// Pause before the switchover (source only).
    pub pause: bool,
    /// Allow vCPU throttling (source only).
    pub throttle: bool,
    /// Send over several channels.
    pub multifd: bool,
}

impl CapabilityPlan {
    /// Arguments for `migrate-set-capabilities`.
    #[must_use]
    pub fn arguments(self, identity: &Identity) -> Value {
        let wanted = [
            ("return-path", true),
            ("events", true),
            ("late-block-activate", true),
            ("switchover-ack", self.hold == HoldBy::Relay),
            (HOLD_CAPABILITY, self.hold == HoldBy::Qemu),
            ("pause-before-switchover", self.pause),
            ("auto-converge", self.throttle),
            ("multifd", self.multifd),
            ("postcopy-ram", false),
        ];
        let list: Vec<Value> = wanted
            .into_iter()
            .filter(|(name, state)| *state || identity.has_capability(name))
            .map(|(name, state)| json!({ "capability": name, "state": state }))
            .collect();
        json!({ "capabilities": list })
    }

    /// The first capability that is needed and missing, with what to do.
    #[must_use]
    pub fn missing(self, identity: &Identity) -> Option<String> {
        let needed = [
            ("return-path", true, "2.6"),
            ("events", true, "2.4"),
            ("late-block-activate", true, "3.1"),
            ("switchover-ack", self.hold == HoldBy::Relay, "8.1"),
            ("pause-before-switchover", self.pause, "2.11"),
            ("auto-converge", self.throttle, "1.6"),
            ("multifd", self.multifd, "4.0"),
        ];
        let (name, _, since) = needed
            .into_iter()
            .find(|(name, wanted, _)| *wanted && !identity.has_capability(name))?;
        Some(format!(
            "QEMU {} has no migration capability `{name}`: QEMU {since} or newer is needed",
            identity.version
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let mut identity = Identity::new("10.0.2".into());
        let capabilities: Vec<Value> = ["return-path", "events", "late-block-activate", "multifd"]
            .iter()
            .map(|name| json!({"capability": name, "state": *name == "multifd"}))
            .collect();
        identity.answer(Question::Capabilities, &json!(capabilities));
        identity.answer(
            Question::Parameters,
            &json!({"max-bandwidth": 7, "downtime-limit": 300}),
        );
        identity
    }

    #[test]
    fn says_what_is_missing() {
        let plan = CapabilityPlan {
            hold: HoldBy::Relay,
            pause: false,
            throttle: false,
            multifd: true,
        };
        let text = plan.missing(&identity()).expect("no switchover-ack");
        assert!(
            text.contains("switchover-ack") && text.contains("8.1"),
            "{text}"
        );
        assert_eq!(
            CapabilityPlan {
                hold: HoldBy::Nobody,
                ..plan
            }
            .missing(&identity()),
            None
        );
        assert!(identity().is_at_least(9, 1) && !identity().is_at_least(10, 1));
    }

    #[test]
    fn puts_back_what_it_found() {
        let plan = CapabilityPlan {
            hold: HoldBy::Nobody,
            pause: false,
            throttle: false,
            multifd: false,
        };
        let changed = plan.arguments(&identity());
        let back = identity().original_capabilities(&changed);
        let list = back["capabilities"].as_array().expect("a list");
        assert_eq!(list.len(), 4);
        assert!(list.contains(&json!({"capability": "multifd", "state": true})));
        let back = identity().original_parameters(&json!({"max-bandwidth": 1}));
        assert_eq!(back, json!({"max-bandwidth": 7}));
    }
}
