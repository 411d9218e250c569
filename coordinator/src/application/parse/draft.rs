//! A file as it was read, before it is known whether it says enough for a move.

use rate_limiter::{Bytes, BytesPerSecond};
use uuid::Uuid;

use super::settings::Settings;
use crate::application::{
    Application, Ballooning, ControlAddress, Disk, Host, Link, Mac, Outline, OutlineHost,
    OutlineVm, Traffic, TransportChoice, Vm,
};

/// A file as it was read: what only a move needs may be missing.
pub(super) struct Draft {
    pub settings: Settings,
    pub hosts: Vec<DraftHost>,
    pub links: Vec<Link>,
    pub vms: Vec<DraftVm>,
    pub traffic: Vec<Traffic>,
}

pub(super) struct DraftHost {
    pub control: Option<ControlAddress>,
    pub known: OutlineHost,
}

pub(super) struct DraftVm {
    pub uuid: Option<Uuid>,
    pub mac: Option<Mac>,
    pub transport: Option<TransportChoice>,
    pub disks: Vec<Disk>,
    pub min_write_rate: Option<BytesPerSecond>,
    pub balloon: Option<bool>,
    pub balloon_reserve: Option<Bytes>,
    pub known: OutlineVm,
}

impl Draft {
    /// What a plan needs of it.
    pub(super) fn outline(self) -> Outline {
        let app = self.settings.application;
        Outline {
            throttle: app.throttle(),
            name: app.name,
            policy: app.policy,
            allowance: app.allowance,
            max_downtime: app.max_downtime,
            deadline: app.deadline,
            termination: app.termination,
            replica_groups: app.replica_groups,
            hosts: self.hosts.into_iter().map(|host| host.known).collect(),
            links: self.links,
            vms: self
                .vms
                .into_iter()
                .map(|vm| vm.outline(app.ballooning))
                .collect(),
            traffic: self.traffic,
        }
    }

    /// The application, where nothing is missing.
    pub(super) fn finish(self) -> Option<Application> {
        let hosts = self.hosts.into_iter().map(DraftHost::finish);
        let vms: Option<Vec<Vm>> = self.vms.into_iter().map(DraftVm::finish).collect();
        let vms = vms?;
        Some(Application {
            hosts: hosts.collect::<Option<_>>()?,
            links: self.links,
            traffic: self.traffic,
            register: self.settings.register.unwrap_or(vms.first()?.from),
            vms,
            ..self.settings.application
        })
    }
}

impl DraftHost {
    fn finish(self) -> Option<Host> {
        Some(Host {
            name: self.known.name,
            control: self.control?,
            nic: self.known.nic,
            disk: self.known.disk,
        })
    }
}

impl DraftVm {
    fn outline(self, ballooning: Ballooning) -> OutlineVm {
        let profile = self.known.profile;
        OutlineVm {
            profile: ballooning.moved(self.balloon, self.balloon_reserve, profile),
            ..self.known
        }
    }

    fn finish(self) -> Option<Vm> {
        Some(Vm {
            name: self.known.name,
            uuid: self.uuid?,
            mac: self.mac,
            tier: self.known.tier,
            from: self.known.from?,
            to: self.known.to?,
            transport: self.transport,
            max_throttle: self.known.max_throttle,
            disks: self.disks,
            min_write_rate: self.min_write_rate,
            balloon: self.balloon,
            balloon_reserve: self.balloon_reserve,
            profile: self.known.profile,
        })
    }
}
