//! The stage: two sites with hosts and sidecars, a WAN between them, users, and the application,
//! running and warm on the hosts of the first site.
//!
//! The guests are started from snapshots. Where there are none yet, they boot once, the database is
//! filled, every connection between the tiers is made, and then all are paused and saved. Dropping
//! the stage removes all but the snapshots.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use coordinator::Application;
use rate_limiter::{Bytes, BytesPerSecond};
use serde_json::json;
use tempfile::TempDir;

use super::image::AppImage;
use super::load::{self, Action};
use super::machine::{
    AppLaunch, AppVm, NETWORK, PREFIX, Start, Tier, USERS, kernel_line, machines, shell,
};
use super::wan_plan::State;
use crate::lab::files::quoted;
use crate::lab::{payload, serve};
use crate::net::wan::{Path as WanPath, Wan};
use crate::net::{Counters, Host, Network};
use crate::process::Process;
use crate::qemu::{self, Accel, Qemu, installed};
use crate::qmp::Qmp;
use crate::signals::Interrupt;

/// The users' host.
const USERS_HOST: &str = "users";
/// The sites' numbers on the WAN.
const SITES: [usize; 2] = [0, 1];
const USERS_SITE: usize = 2;
const BOOT_LIMIT: Duration = Duration::from_secs(90);
const MONITOR_LIMIT: Duration = Duration::from_secs(10);
const SAVE_LIMIT: Duration = Duration::from_secs(60);
/// Requests of every kind that warm the application before it is saved.
const WARM: u64 = 8;

/// What is to be built.
#[derive(Debug, Clone)]
pub struct StageSpec {
    /// App servers.
    pub apps: u8,
    /// RAM of every VM.
    pub memory: Bytes,
    /// Hosts of each site.
    pub hosts: u8,
    /// Who executes the guests.
    pub accel: Accel,
    /// The WAN between the two sites.
    pub wan: State,
    /// Round trip time between the users and either site.
    pub users_rtt: Duration,
    /// What migration streams leave the application of the WAN.
    pub reserve: BytesPerSecond,
    /// Lines for `[application]` beyond name, bandwidth and reserve.
    pub settings: Vec<String>,
}

/// A stage. See the module.
#[derive(Debug)]
pub struct Stage {
    /// What was asked for.
    pub spec: StageSpec,
    /// The application's VMs.
    pub vms: Vec<AppVm>,
    /// The WAN.
    pub wan: Wan,
    /// Whether the guests had to boot.
    pub booted: bool,
    sidecars: BTreeMap<String, Process>,
    started: BTreeMap<String, Qemu>,
    network: Network,
    image: AppImage,
    directory: TempDir,
}

impl Stage {
    /// Builds it.
    ///
    /// # Errors
    /// What could not be made; nothing is left behind then.
    pub fn build(spec: StageSpec, interrupt: &Interrupt) -> Result<Self> {
        let image = AppImage::find()?;
        let vms = machines(spec.apps);
        let mut names = host_names(&spec);
        names.push(USERS_HOST.to_owned());
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let network = Network::islands(&names)?;
        for host in network.hosts() {
            host.add_bridge()?;
            if host.name() != USERS_HOST {
                for vm in &vms {
                    host.add_tap(&vm.tap())?;
                }
            }
        }
        let [a, b, c] = NETWORK;
        let users = network.host(USERS_HOST)?;
        users.add_address(&format!("{a}.{b}.{c}.{USERS}/{PREFIX}"))?;
        let sites: Vec<(&Host, usize)> = network
            .hosts()
            .iter()
            .map(|host| (host, site_of(host.name())))
            .collect();
        let wan = Wan::join(&sites)?;
        let directory = tempfile::Builder::new().prefix("muster-app.").tempdir()?;
        let mut stage = Self {
            spec,
            vms,
            wan,
            booted: false,
            sidecars: BTreeMap::new(),
            started: BTreeMap::new(),
            network,
            image,
            directory,
        };
        stage.set_wan(stage.spec.wan);
        for site in SITES {
            stage
                .wan
                .set_path(site, USERS_SITE, way(None, stage.spec.users_rtt, 0.0));
        }
        for host in host_names(&stage.spec) {
            std::fs::create_dir_all(stage.host_directory(&host).join("run"))?;
            let text = stage.sidecar_config(&host)?;
            let process = serve(
                stage.network.host(&host)?,
                &stage.host_directory(&host),
                &text,
            )?;
            stage.sidecars.insert(host, process);
        }
        stage.start_guests(interrupt)?;
        Ok(stage)
    }

    /// Changes the WAN between the sites, at any time.
    pub fn set_wan(&self, state: State) {
        let State { rate, rtt, loss } = state;
        self.wan
            .set_path(SITES[0], SITES[1], way(Some(rate), rtt, loss));
    }

    /// Bytes that went over the WAN between the sites so far, both ways.
    #[must_use]
    pub fn wan_bytes(&self) -> Bytes {
        let [one, other] = SITES;
        Bytes(self.wan.count(one, other).bytes + self.wan.count(other, one).bytes)
    }

    /// Bytes that VMs sent each other over the WAN so far.
    #[must_use]
    pub fn wan_bytes_between_vms(&self) -> Bytes {
        let ours = |mac| self.vms.iter().any(|vm| vm.mac == mac);
        let pairs = self.wan.pairs().into_iter();
        Bytes(
            pairs
                .filter(|((from, to), _)| ours(*from) && ours(*to))
                .map(|(_, bytes)| bytes)
                .sum(),
        )
    }

    /// The users' host.
    ///
    /// # Errors
    /// There is none.
    pub fn users(&self) -> Result<&Host> {
        Ok(self.network.host(USERS_HOST)?)
    }

    /// Where the users send their requests.
    #[must_use]
    pub fn front(&self) -> std::net::SocketAddrV4 {
        let web = self.vms.iter().find(|vm| vm.tier == Tier::Web);
        let address = web.map_or(std::net::Ipv4Addr::UNSPECIFIED, |vm| vm.address);
        std::net::SocketAddrV4::new(address, 80)
    }

    /// The host of a VM in a site.
    ///
    /// # Errors
    /// There is none.
    pub fn host(&self, vm: usize, site: usize) -> Result<&Host> {
        Ok(self.network.host(&self.host_of(vm, site))?)
    }

    /// What the tap of a VM has carried in a site.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn tap_counters(&self, vm: usize, site: usize) -> Result<Counters> {
        let host = self.host(vm, site)?;
        Ok(host.tap_counters(&self.vms[vm].tap())?)
    }

    /// The name of a VM's host in a site.
    #[must_use]
    pub fn host_of(&self, vm: usize, site: usize) -> String {
        host_name(site, vm % usize::from(self.spec.hosts.max(1)))
    }

    /// The application, moving from one site to the other.
    ///
    /// # Errors
    /// Its settings are not valid.
    pub fn application(&self, from: usize, to: usize) -> Result<Application> {
        let path = self.directory.path().join(format!("{from}-{to}.toml"));
        let text = self.application_text(from, to);
        std::fs::write(&path, &text)?;
        Ok(Application::parse(&text, &path)?)
    }

    fn application_text(&self, from: usize, to: usize) -> String {
        let (bandwidth, reserve) = (payload(self.spec.wan.rate).0, self.spec.reserve.0);
        let mut text = format!(
            "version = 1\n\n[application]\nname = \"shop\"\nbandwidth = \"{bandwidth}B/s\"\n\
             reserve = \"{reserve}B/s\"\n"
        );
        for line in &self.spec.settings {
            let _ = writeln!(text, "{line}");
        }
        for host in host_names(&self.spec) {
            let control = self.host_directory(&host).join("control.sock");
            let control = quoted(&format!("unix:{}", control.display()));
            let _ = write!(text, "\n[[host]]\nname = \"{host}\"\ncontrol = {control}\n");
        }
        for (index, vm) in self.vms.iter().enumerate() {
            // What the guests of this image do at a light load.
            let _ = write!(
                text,
                "\n[[vm]]\nname = \"{}\"\nuuid = \"{}\"\nmac = \"{}\"\nfrom = \"{}\"\nto = \"{}\"\n\
                 memory = \"{}B\"\ndirty-rate = \"2MB/s\"\nmax-dirty-rate = \"4MB/s\"\n\
                 writable-working-set = \"8MiB\"\n",
                vm.name,
                vm.uuid,
                vm.mac_text(),
                self.host_of(index, from),
                self.host_of(index, to),
                self.spec.memory.0
            );
        }
        text
    }

    fn sidecar_config(&self, host: &str) -> Result<String> {
        let directory = self.host_directory(host);
        let path = |name: &str| quoted(&directory.join(name).to_string_lossy());
        let address = self.network.host(host)?.address();
        let mut text = format!(
            "version = 1\nhost = \"{host}\"\nstate-dir = {}\nruntime-dir = {}\n\n[control]\n\
             unix = {}\n\n[stream]\nlisten = \"{address}:4601\"\ninsecure = true\n",
            path("state"),
            path("run"),
            path("control.sock"),
        );
        for vm in &self.vms {
            let template = self.launch(vm, host).template(&Start::Incoming)?;
            let words: Vec<String> = template.iter().map(|word| quoted(word)).collect();
            let _ = write!(
                text,
                "\n[[vm]]\nname = \"{}\"\nincoming = [{}]\n",
                vm.name,
                words.join(", ")
            );
        }
        Ok(text)
    }

    fn host_directory(&self, host: &str) -> PathBuf {
        self.directory.path().join(host)
    }

    fn launch(&self, vm: &AppVm, host: &str) -> AppLaunch {
        AppLaunch {
            vm: vm.clone(),
            kernel_line: kernel_line(vm, &self.vms),
            accel: self.spec.accel,
            memory: self.spec.memory,
            image: self.image.clone(),
            console: self
                .host_directory(host)
                .join(format!("{}.console", vm.name)),
            observe: self
                .host_directory(host)
                .join(format!("{}.observe", vm.name)),
            networked: true,
        }
    }

    fn start_guests(&mut self, interrupt: &Interrupt) -> Result<()> {
        let snapshots = self.snapshots()?;
        self.booted = !snapshots.is_dir();
        for (index, vm) in self.vms.clone().iter().enumerate() {
            interrupt.check()?;
            let host = self.host_of(index, SITES[0]);
            let start = if self.booted {
                Start::Boot
            } else {
                Start::Snapshot(snapshots.join(&vm.name))
            };
            let launch = self.launch(vm, &host);
            let run = self.host_directory(&host).join("run");
            let log = run.join(format!("{}.log", vm.name));
            let isolation = self.network.host(&host)?.isolation(Some(log));
            let qmp = run.join(format!("{}.qmp", vm.name));
            let template = launch.template(&start)?;
            let qemu = qemu::start(&vm.name, &template, &qmp, &launch.observe, &isolation)?;
            self.started.insert(vm.name.clone(), qemu);
        }
        if !self.booted {
            self.resume(interrupt)?;
        }
        self.wait_for_answer(interrupt)?;
        if self.booted {
            self.warm().context("the application cannot be warmed")?;
            self.save(&snapshots, interrupt)?;
        }
        Ok(())
    }

    /// Loaded from snapshots the guests are paused, as they were when they were saved: all go on together.
    fn resume(&mut self, interrupt: &Interrupt) -> Result<()> {
        let by = Instant::now() + SAVE_LIMIT;
        for (name, qemu) in &mut self.started {
            loop {
                interrupt.sleep(Duration::from_millis(20))?;
                let said = qemu
                    .monitor
                    .execute("query-status", json!({}), MONITOR_LIMIT)?;
                match said["status"].as_str() {
                    Some("inmigrate") if Instant::now() < by => {}
                    Some("paused") => break,
                    _ => bail!("{name} cannot be loaded from its snapshot: {said}"),
                }
            }
        }
        for qemu in self.started.values_mut() {
            qemu.monitor.execute("cont", json!({}), MONITOR_LIMIT)?;
        }
        Ok(())
    }

    /// Until a request goes through all tiers.
    fn wait_for_answer(&mut self, interrupt: &Interrupt) -> Result<()> {
        let by = Instant::now() + BOOT_LIMIT;
        loop {
            interrupt.check()?;
            for qemu in self.started.values_mut() {
                qemu.process.must_run()?;
            }
            let front = self.front();
            let answer = self
                .users()?
                .enter(|| load::ask_once(front, Action::Count, 0))?;
            match answer {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > by => {
                    bail!(
                        "the application does not answer within {BOOT_LIMIT:?}: {error}; its VMs said:\n{}",
                        self.consoles()
                    );
                }
                Err(_) => interrupt.sleep(Duration::from_millis(100))?,
            }
        }
    }

    /// The last lines of every guest's console.
    fn consoles(&self) -> String {
        let mut text = String::new();
        for (index, vm) in self.vms.iter().enumerate() {
            let console = self.launch(vm, &self.host_of(index, SITES[0])).console;
            let said = std::fs::read(console).unwrap_or_default();
            let said = String::from_utf8_lossy(&said).into_owned();
            let lines: Vec<&str> = said.lines().collect();
            for line in &lines[lines.len().saturating_sub(3)..] {
                let _ = writeln!(text, "{}: {line}", vm.name);
            }
        }
        text
    }

    fn warm(&self) -> Result<()> {
        let front = self.front();
        self.users()?.enter(|| {
            load::ask_once(front, Action::Fill, u64::from(u16::MAX))?;
            for id in 0..WARM {
                for action in Action::USERS {
                    load::ask_once(front, action, id)?;
                }
            }
            Ok(())
        })?
    }

    /// Where snapshots of these guests are kept.
    fn snapshots(&self) -> Result<PathBuf> {
        let qemu = installed()?;
        let name = format!(
            "{}-{}-{}-{}-{}M-{}vms-{:016x}",
            qemu.version,
            qemu.build,
            qemu.machine,
            self.spec.accel,
            self.spec.memory.0 >> 20,
            self.vms.len(),
            self.image.hash
        );
        Ok(self.image.directory.join("snapshots").join(name))
    }

    /// Pauses all VMs, saves them, and lets them run on.
    fn save(&mut self, snapshots: &Path, interrupt: &Interrupt) -> Result<()> {
        let parent = snapshots.parent().context("no place for snapshots")?;
        std::fs::create_dir_all(parent)?;
        let unfinished = tempfile::Builder::new()
            .prefix(".unfinished-")
            .tempdir_in(parent)?;
        for qemu in self.started.values_mut() {
            qemu.monitor.execute("stop", json!({}), MONITOR_LIMIT)?;
        }
        for (name, qemu) in &mut self.started {
            let uri = format!("exec:cat >{}", shell(&unfinished.path().join(name)));
            qemu.monitor
                .execute("migrate", json!({ "uri": uri }), MONITOR_LIMIT)?;
        }
        for (name, qemu) in &mut self.started {
            let by = Instant::now() + SAVE_LIMIT;
            loop {
                interrupt.sleep(Duration::from_millis(20))?;
                let said = qemu
                    .monitor
                    .execute("query-migrate", json!({}), MONITOR_LIMIT)?;
                match said["status"].as_str() {
                    Some("completed") => break,
                    Some("failed" | "cancelled") => bail!("{name} cannot be saved: {said}"),
                    _ if Instant::now() > by => bail!("{name} is not saved within {SAVE_LIMIT:?}"),
                    _ => {}
                }
            }
        }
        for qemu in self.started.values_mut() {
            qemu.monitor.execute("cont", json!({}), MONITOR_LIMIT)?;
        }
        // Whoever was faster has saved the same.
        if std::fs::rename(unfinished.path(), snapshots).is_err() && !snapshots.is_dir() {
            bail!("cannot keep the snapshots in {}", snapshots.display());
        }
        Ok(())
    }

    /// The testbed's own monitor of a VM's QEMU in a site.
    ///
    /// # Errors
    /// That QEMU does not run or does not answer.
    pub fn monitor(&self, vm: usize, site: usize) -> Result<Qmp> {
        let launch = self.launch(&self.vms[vm], &self.host_of(vm, site));
        Ok(Qmp::connect(&launch.observe, MONITOR_LIMIT)?)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Guests that sidecars started have other parents: they go with their namespace.
        self.sidecars.clear();
        self.started.clear();
    }
}

fn host_name(site: usize, index: usize) -> String {
    format!("{}{}", ["a", "b"][site % 2], index + 1)
}

fn host_names(spec: &StageSpec) -> Vec<String> {
    let hosts = 0..usize::from(spec.hosts.max(1));
    SITES
        .iter()
        .flat_map(|site| hosts.clone().map(|index| host_name(*site, index)))
        .collect()
}

fn site_of(host: &str) -> usize {
    match host.as_bytes().first() {
        _ if host == USERS_HOST => USERS_SITE,
        Some(b'a') => SITES[0],
        _ => SITES[1],
    }
}

/// A way with a queue of a round trip, and of 50 ms at least.
fn way(rate: Option<BytesPerSecond>, rtt: Duration, loss: f64) -> WanPath {
    WanPath {
        delay: rtt / 2,
        rate,
        loss,
        queue: rtt.max(Duration::from_millis(50)),
    }
}
