//! The traffic matrix, counted at the hosts (COMMA 3.1 has it from iptraf).
//!
//! The sidecars count frames by sender and receiver as they enter their hosts' bridges, all for the
//! same time; no guest is touched. A frame between two hosts is counted at both, so of what the hosts
//! say of a pair the largest counts.

use std::collections::BTreeMap;
use std::time::Duration;

use rate_limiter::BytesPerSecond;
use serde::Serialize;
use sidecar::protocol::command::Command;
use sidecar::protocol::traffic::{COUNT_MS, QueryTrafficArgs, TrafficCount};

use crate::application::{Application, HostId, Mac, Traffic, VmId};
use crate::client::Client;

/// Version of the JSON form.
pub const SCHEMA_VERSION: u32 = 1;
/// Beyond the time itself, a count is begun, ended and told within this.
const SLACK: Duration = Duration::from_secs(25);

/// Why there is no matrix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrafficError {
    /// Fewer than two VMs can be told apart.
    #[error("traffic is counted by hardware address: give `mac` in [[vm]] of two VMs at least")]
    NoAddresses,
    /// The time is too short or too long.
    #[error("{0}")]
    Time(String),
    /// A host did not count.
    #[error("host {host}: {error}")]
    Host {
        /// The host.
        host: String,
        /// Why.
        error: String,
    },
}

/// What was counted.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Counted {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// How long, on the host that counted the shortest time, in seconds.
    pub duration_s: f64,
    /// Every pair of VMs that sent something, by the file's order.
    pub pairs: Vec<Pair>,
}

/// Two VMs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pair {
    /// Their names.
    pub between: [String; 2],
    /// Bytes from the first to the second, with Ethernet headers.
    pub sent_bytes: u64,
    /// Bytes from the second to the first.
    pub received_bytes: u64,
    /// Frames, both ways; a frame of segmentation offload is one.
    pub packets: u64,
    /// Both ways together.
    pub rate_bytes_per_s: u64,
    #[serde(skip)]
    ids: [VmId; 2],
}

impl Counted {
    /// As the traffic matrix of an application.
    #[must_use]
    pub fn traffic(&self) -> Vec<Traffic> {
        let entry = |pair: &Pair| Traffic {
            between: pair.ids,
            rate: BytesPerSecond(pair.rate_bytes_per_s),
        };
        self.pairs
            .iter()
            .map(entry)
            .filter(|entry| entry.rate.0 > 0)
            .collect()
    }
}

/// Whether the file tells enough VMs apart.
#[must_use]
pub fn can_count(app: &Application) -> bool {
    app.vms.iter().filter(|vm| vm.mac.is_some()).count() > 1
}

/// The hosts that VMs may be on.
#[must_use]
pub fn hosts(app: &Application) -> Vec<HostId> {
    let mut hosts: Vec<HostId> = app.vms.iter().map(|vm| vm.from).collect();
    hosts.sort_unstable();
    hosts.dedup();
    hosts
}

/// Has the sidecars of the hosts that VMs run on count for so long; they must be connected.
///
/// # Errors
/// A host did not count, or the file names no hardware addresses.
pub fn count(app: &Application, client: &Client, time: Duration) -> Result<Counted, TrafficError> {
    if !can_count(app) {
        return Err(TrafficError::NoAddresses);
    }
    let arguments = QueryTrafficArgs {
        duration_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
    };
    if arguments.check().is_err() {
        let (least, most) = (COUNT_MS.start(), COUNT_MS.end() / 1000);
        let text = format!("traffic is counted for {least} ms to {most} s");
        return Err(TrafficError::Time(text));
    }
    let hosts = hosts(app);
    let ask = |&host: &HostId| (host, Command::QueryTraffic(arguments));
    let queries: Vec<(HostId, Command)> = hosts.iter().map(ask).collect();
    let mut counts = Vec::new();
    for (host, answer) in hosts.iter().zip(client.ask(&queries, time + SLACK)) {
        let count = answer.and_then(|value| {
            serde_json::from_value::<TrafficCount>(value).map_err(|error| error.to_string())
        });
        counts.push(count.map_err(|error| TrafficError::Host {
            host: app.host(*host).name.clone(),
            error,
        })?);
    }
    Ok(matrix(app, &counts))
}

/// Bytes and frames one way.
#[derive(Debug, Clone, Copy, Default)]
struct OneWay {
    bytes: u64,
    packets: u64,
}

fn matrix(app: &Application, counts: &[TrafficCount]) -> Counted {
    let known: BTreeMap<Mac, VmId> = app
        .vm_ids()
        .filter_map(|id| app.vm(id).mac.map(|mac| (mac, id)))
        .collect();
    let vm_of = |text: &str| known.get(&text.parse().ok()?).copied();
    let mut ways: BTreeMap<(VmId, VmId), OneWay> = BTreeMap::new();
    for pair in counts.iter().flat_map(|count| &count.pairs) {
        if let (Some(from), Some(to)) = (vm_of(&pair.from), vm_of(&pair.to)) {
            let way = ways.entry((from, to)).or_default();
            way.bytes = way.bytes.max(pair.bytes);
            way.packets = way.packets.max(pair.packets);
        }
    }
    let duration_us = counts
        .iter()
        .map(|count| count.duration_us)
        .min()
        .unwrap_or(0);
    let ids: Vec<VmId> = app.vm_ids().collect();
    let mut pairs = Vec::new();
    for (at, &one) in ids.iter().enumerate() {
        for &other in &ids[at + 1..] {
            let way = |from, to| ways.get(&(from, to)).copied().unwrap_or_default();
            let (there, back) = (way(one, other), way(other, one));
            let bytes = there.bytes.saturating_add(back.bytes);
            if bytes == 0 {
                continue;
            }
            let rate = u128::from(bytes) * 1_000_000 / u128::from(duration_us.max(1));
            pairs.push(Pair {
                between: [one, other].map(|id| app.vm(id).name.clone()),
                sent_bytes: there.bytes,
                received_bytes: back.bytes,
                packets: there.packets.saturating_add(back.packets),
                rate_bytes_per_s: u64::try_from(rate).unwrap_or(u64::MAX),
                ids: [one, other],
            });
        }
    }
    Counted {
        schema_version: SCHEMA_VERSION,
        duration_s: Duration::from_micros(duration_us).as_secs_f64(),
        pairs,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use sidecar::protocol::traffic::PairCount;

    use super::*;

    const WEB: &str = "52:54:00:00:00:0a";
    const DB: &str = "52:54:00:00:00:0b";

    fn app(macs: [&str; 2]) -> Application {
        let vm = |name: &str, last: u8, mac: &str| {
            format!(
                "[[vm]]\nname = \"{name}\"\nuuid = \"6f1c1c1e-8a52-4b6e-9a4e-3f0b3a6c1d{last:02}\"\n\
                 from = \"a\"\nto = \"b\"\n{mac}\n"
            )
        };
        let text = format!(
            "version = 1\n[application]\nname = \"shop\"\nbandwidth = \"1MB/s\"\n\
             [[host]]\nname = \"a\"\ncontrol = \"unix:/a\"\n\
             [[host]]\nname = \"b\"\ncontrol = \"unix:/b\"\n{}{}",
            vm("web", 1, macs[0]),
            vm("db", 2, macs[1]),
        );
        Application::parse(&text, Path::new("shop.toml")).expect("good")
    }

    fn pair(from: &str, to: &str, bytes: u64) -> PairCount {
        PairCount {
            from: from.to_owned(),
            to: to.to_owned(),
            bytes,
            packets: 10,
        }
    }

    #[test]
    fn what_passes_two_hosts_is_one_pair_once() {
        let app = app(["mac = \"52:54:00:00:00:0a\"", "mac = \"52:54:00:00:00:0B\""]);
        assert!(can_count(&app));
        let count = |pairs| TrafficCount {
            duration_us: 2_000_000,
            pairs,
        };
        let broadcast = pair(WEB, "ff:ff:ff:ff:ff:ff", 60);
        let counts = [
            count(vec![pair(WEB, DB, 3000), pair(DB, WEB, 900), broadcast]),
            count(vec![pair(WEB, DB, 2990), pair(DB, WEB, 1000)]),
        ];
        let counted = matrix(&app, &counts);
        let [only] = &counted.pairs[..] else {
            panic!("{counted:?}")
        };
        assert_eq!((only.sent_bytes, only.received_bytes), (3000, 1000));
        assert_eq!((only.packets, only.rate_bytes_per_s), (20, 2000));
        let expected = Traffic {
            between: [VmId(0), VmId(1)],
            rate: BytesPerSecond(2000),
        };
        assert_eq!(counted.traffic(), [expected]);
    }

    #[test]
    fn vms_without_an_address_are_not_told_apart() {
        assert!(!can_count(&app(["mac = \"52:54:00:00:00:0a\"", ""])));
    }
}
