//! A host whose guests have network cards: a bridge with the host's address, and a tap for each.

use std::os::fd::OwnedFd;

use super::link::{Counters, counters};
use super::{Host, NetError};
use crate::sys;

/// The bridge's name on every host.
pub const BRIDGE: &str = "br0";
/// Long lines with fast streams need windows as large as what is under way.
const WINDOWS: &str = "4096 131072 33554432";

impl Host {
    /// Makes its bridge, with its address, and nothing on it yet.
    ///
    /// The bridge's own hardware address is pinned: it would change with the first interface that
    /// is attached, and peers that know the old one stall for seconds.
    ///
    /// # Errors
    /// A step is refused.
    pub fn add_bridge(&self) -> Result<(), NetError> {
        let [_, high, low, last] = self.address.octets();
        let mac = format!("02:6d:75:{high:02x}:{low:02x}:{last:02x}");
        let words = ["link", "add", BRIDGE, "address", &mac, "type", "bridge"];
        let options = [
            "stp_state",
            "0",
            "forward_delay",
            "0",
            "mcast_snooping",
            "0",
        ];
        self.enter(|| {
            let set = |file: &str, value: &str| {
                std::fs::write(file, value).map_err(|error| NetError::File {
                    path: file.into(),
                    error,
                })
            };
            set("/proc/sys/net/ipv4/tcp_rmem", WINDOWS)?;
            set("/proc/sys/net/ipv4/tcp_wmem", WINDOWS)?;
            // Only where the kernel has it: its chatter would be counted as traffic.
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            Ok::<_, NetError>(())
        })??;
        self.ip(&[&words[..], &options].concat())?;
        self.add_address(&format!("{}/24", self.address))?;
        self.ip(&["link", "set", BRIDGE, "up"])?;
        Ok(())
    }

    /// Gives its bridge one more address, with the bits of its network.
    ///
    /// # Errors
    /// It is refused.
    pub fn add_address(&self, address: &str) -> Result<(), NetError> {
        self.ip(&["addr", "add", address, "dev", BRIDGE]).map(drop)
    }

    /// Makes a tap that a QEMU on this host opens by its name, on the bridge.
    ///
    /// # Errors
    /// It is refused.
    pub fn add_tap(&self, name: &str) -> Result<(), NetError> {
        self.ip(&["tuntap", "add", name, "mode", "tap", "vnet_hdr"])?;
        self.attach(name)
    }

    /// What a tap has carried: what the host received is what its guest sent.
    ///
    /// # Errors
    /// There is no such tap.
    pub fn tap_counters(&self, name: &str) -> Result<Counters, NetError> {
        counters(&self.namespace, name)
    }

    /// Opens a tap whose frames are the caller's to carry, on the bridge. It goes with its
    /// descriptor.
    pub(super) fn open_line(&self, name: &str) -> Result<OwnedFd, NetError> {
        let opened = self.enter(|| sys::open_tap(name))?;
        let line = opened.map_err(|error| NetError::File {
            path: "/dev/net/tun".into(),
            error,
        })?;
        self.attach(name)?;
        Ok(line)
    }

    fn attach(&self, name: &str) -> Result<(), NetError> {
        self.ip(&["link", "set", name, "master", BRIDGE, "up"])
            .map(drop)
    }
}
