//! The control protocol: QMP's wire format, spoken by the sidecar.
//!
//! A client connects to the control socket, reads the greeting, enables `oob` if it likes with
//! `qmp_capabilities`, and from then on sends commands as JSON objects. Commands return at once;
//! what takes time ends with an event; state can always be queried. docs/protocol.md draws it.
//!
//! ```text
//! client                                  sidecar
//!   │ ◄──── {"QMP": {version, capabilities}} │
//!   │ {"execute": "qmp_capabilities"} ─────► │
//!   │ ◄──── {"return": {}}                   │
//!   │ {"execute": "prepare", arguments} ───► │
//!   │ ◄──── {"return": {}}                   │
//!   │ ◄──── {"event": "PREPARED", data}      │
//! ```
//!
//! - [`lines`]: lines of JSON with a bound on their length.
//! - [`codec`]: what stands on them.
//! - [`command`]: the commands and their arguments.
//! - [`event`]: the events and the reports in them.
//! - [`dirty`]: measurements of a VM's dirty pages, commands and events.
//! - [`probe`]: probes of the bandwidth between hosts.
//! - [`traffic`]: counts of what VMs send each other.
//! - [`types`]: what both share.

pub mod codec;
pub mod command;
pub mod dirty;
pub mod event;
pub mod lines;
pub mod probe;
pub mod traffic;
pub mod types;

/// Major version of the protocol: peers with another one refuse each other.
pub const PROTOCOL_MAJOR: u32 = 1;
/// Minor version of the protocol: additions only.
pub const PROTOCOL_MINOR: u32 = 6;
