//! One link: a veth pair with a token bucket at each end.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rate_limiter::{Bytes, BytesPerSecond};

use super::{Host, NetError, run};

/// Room in the token bucket: a few segments of generic segmentation offload.
const BURST: &str = "128kb";
/// How long a packet waits in the queue at most.
const LATENCY: &str = "30ms";

/// How a link is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Packets vanish, and nobody is told: a cable cut somewhere on the way.
    Silent,
    /// Both interfaces go down, and their routes with them: a cable pulled at the host.
    Down,
}

/// The link between two hosts.
#[derive(Debug)]
pub struct Link {
    ends: [End; 2],
    state: Mutex<State>,
}

#[derive(Debug)]
struct End {
    host: String,
    namespace: String,
    device: String,
}

#[derive(Debug, Clone, Copy)]
struct State {
    rate: BytesPerSecond,
    cut: Option<Cut>,
}

/// Bytes that a link has carried, headers included, by the host that sent them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Carried {
    /// The first host, and what it sent.
    pub first: (String, Bytes),
    /// The other host, and what it sent.
    pub second: (String, Bytes),
}

impl Link {
    pub(super) fn create(one: &Host, other: &Host, rate: BytesPerSecond) -> Result<Self, NetError> {
        let end = |host: &Host, peer: &Host| End {
            host: host.name.clone(),
            namespace: host.namespace.clone(),
            device: format!("to-{}", peer.name),
        };
        let ends = [end(one, other), end(other, one)];
        let [left, right] = &ends;
        run(
            "ip",
            &[
                "link",
                "add",
                &left.device,
                "netns",
                &left.namespace,
                "type",
                "veth",
                "peer",
                "name",
                &right.device,
                "netns",
                &right.namespace,
            ],
        )?;
        for (end, host, peer) in [(left, one, other), (right, other, one)] {
            let (own, peer) = (host.address.to_string(), peer.address.to_string());
            host.ip(&["addr", "add", &own, "peer", &peer, "dev", &end.device])?;
            host.ip(&["link", "set", &end.device, "up"])?;
        }
        let link = Self {
            ends,
            state: Mutex::new(State { rate, cut: None }),
        };
        link.shape(rate)?;
        Ok(link)
    }

    /// The rate it is shaped to, each way, headers included.
    #[must_use]
    pub fn rate(&self) -> BytesPerSecond {
        self.state().rate
    }

    /// Changes its rate, each way, while traffic flows.
    ///
    /// # Errors
    /// If tc refuses.
    pub fn set_rate(&self, rate: BytesPerSecond) -> Result<(), NetError> {
        let mut state = self.state();
        state.rate = rate;
        if state.cut == Some(Cut::Silent) {
            return Ok(());
        }
        self.shape(rate)
    }

    /// Takes the token buckets away: it carries what the processors can.
    ///
    /// # Errors
    /// If tc refuses.
    pub fn unshape(&self) -> Result<(), NetError> {
        for end in &self.ends {
            end.replace_root(&["pfifo"])?;
        }
        Ok(())
    }

    /// Cuts it.
    ///
    /// # Errors
    /// If ip or tc refuses.
    pub fn cut(&self, cut: Cut) -> Result<(), NetError> {
        let mut state = self.state();
        state.cut = Some(cut);
        for end in &self.ends {
            match cut {
                Cut::Silent => end.replace_root(&["blackhole"])?,
                Cut::Down => end.ip(&["link", "set", &end.device, "down"])?,
            };
        }
        Ok(())
    }

    /// Joins it again, at its last rate.
    ///
    /// # Errors
    /// If ip or tc refuses.
    pub fn restore(&self) -> Result<(), NetError> {
        let mut state = self.state();
        for end in &self.ends {
            end.ip(&["link", "set", &end.device, "up"])?;
        }
        self.shape(state.rate)?;
        state.cut = None;
        Ok(())
    }

    /// What it has carried so far.
    ///
    /// # Errors
    /// If ip refuses.
    pub fn carried(&self) -> Result<Carried, NetError> {
        let [left, right] = &self.ends;
        Ok(Carried {
            first: (left.host.clone(), left.sent()?),
            second: (right.host.clone(), right.sent()?),
        })
    }

    pub(super) fn joins(&self, one: &str, other: &str) -> bool {
        let [left, right] = &self.ends;
        (left.host == one && right.host == other) || (left.host == other && right.host == one)
    }

    fn shape(&self, rate: BytesPerSecond) -> Result<(), NetError> {
        let rate = format!("{}bit", rate.0.max(1).saturating_mul(8));
        let words = ["tbf", "rate", &rate, "burst", BURST, "latency", LATENCY];
        for end in &self.ends {
            end.replace_root(&words)?;
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl End {
    fn replace_root(&self, qdisc: &[&str]) -> Result<String, NetError> {
        let head = [
            "-n",
            &self.namespace,
            "qdisc",
            "replace",
            "dev",
            &self.device,
            "root",
        ];
        run("tc", &[&head, qdisc].concat())
    }

    fn ip(&self, arguments: &[&str]) -> Result<String, NetError> {
        run("ip", &[&["-n", &self.namespace], arguments].concat())
    }

    fn sent(&self) -> Result<Bytes, NetError> {
        counters(&self.namespace, &self.device).map(|counters| counters.sent)
    }
}

/// What an interface has carried, by its own counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Received by the host.
    pub received: Bytes,
    /// Sent by the host.
    pub sent: Bytes,
}

pub(super) fn counters(namespace: &str, device: &str) -> Result<Counters, NetError> {
    let words = ["-n", namespace, "-j", "-s", "link", "show", "dev", device];
    let said = run("ip", &words)?;
    let value: Option<serde_json::Value> = serde_json::from_str(&said).ok();
    let bytes = |way: &str| value.as_ref()?[0]["stats64"][way]["bytes"].as_u64();
    match (bytes("rx"), bytes("tx")) {
        (Some(received), Some(sent)) => Ok(Counters {
            received: Bytes(received),
            sent: Bytes(sent),
        }),
        _ => Err(NetError::Command {
            command: "ip -j -s link show".to_owned(),
            said,
        }),
    }
}
