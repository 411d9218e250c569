//! The daemon: one mio event loop under all the state machines.
//!
//! Every turn: do what is due, reconcile every run, move bytes, sleep until something is ready or
//! the next deadline. What may block is done by the storage thread (`storage`).
//!
//! - `channel`: one connection of a migration stream and its two pipes.
//! - `streams`: who a stream belongs to, and how fast it may go.
//! - `direct`: streams that QEMU itself writes, `direct_pace` their pace, `tcp` what the kernel knows.
//! - `disks`: connections of local disks, `images` what they are written to.
//! - `control`: clients and their commands; `answers` what queries return.
//! - `halves`: monitors and processes of the VMs in runs.
//! - `link`: asking another sidecar's register.
//! - `bandwidth`: probes of the bandwidth to other hosts.
//! - `dirty`: measurements of VMs; `scanner` reads their logs on a thread of its own.

mod adopt;
mod answers;
mod bandwidth;
mod channel;
mod clients;
mod control;
mod direct;
mod direct_pace;
mod dirty;
mod disks;
mod halves;
mod hooks;
mod images;
mod link;
mod net;
mod probes;
mod process;
mod programs;
mod scanner;
mod storage;
mod streams;
mod tcp;
mod traffic;
mod write_back;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use mio::net::{TcpListener, UnixListener};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rate_limiter::{GroupId, Hierarchy, LeafId};
use uuid::Uuid;

use crate::config::Config;
use crate::migration::{Now, Output};
use crate::protocol::event::Event;
use crate::run::{NotePlace, Run, RunOutput};
use bandwidth::Probings;
use channel::{Channel, HalfKey};
use clients::Client;
use dirty::Measuring;
use halves::HalfIo;
use link::Link;
use probes::Probe;
use process::Process;
use programs::Programs;
use scanner::Scanner;
use storage::{Done, Job, Storage};

/// What a poll token stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Signals,
    Woken,
    ControlUnix,
    ControlTcp,
    Streams,
    Client,
    Monitor(HalfKey),
    Process(HalfKey),
    Listener(HalfKey),
    DiskListener(HalfKey),
    ChannelEnd(usize),
    Opening(HalfKey),
    Companion(HalfKey),
    Link(Uuid),
    Probe,
    Measurement,
    Probing,
}

/// A run with its surroundings.
#[derive(Debug)]
struct Entry {
    run: Run,
    io: Vec<HalfIo>,
    group: GroupId,
    owner: Option<usize>,
    /// Notes written so far, or on their way.
    notes: u64,
    scheduled: Vec<(Instant, crate::protocol::command::PaceArgs)>,
}

/// The daemon. See the module.
#[derive(Debug)]
pub struct Daemon {
    config: Config,
    poll: Poll,
    signals: SignalFd,
    control_unix: UnixListener,
    control_tcp: Option<TcpListener>,
    streams: TcpListener,
    stream_address: String,
    storage: Storage,
    started: Instant,
    next_token: usize,
    slots: HashMap<Token, Slot>,
    clients: HashMap<usize, Client>,
    /// Clients that may have more to say than they had their turn for.
    eager_clients: Vec<usize>,
    runs: BTreeMap<Uuid, Entry>,
    channels: HashMap<usize, Channel>,
    busy: Vec<usize>,
    /// A channel told a half something: what it does about that comes before the next wait.
    stirred: bool,
    pacing: Hierarchy,
    leaves: HashMap<LeafId, HalfKey>,
    pace_at: Option<Instant>,
    /// When direct streams are looked at again.
    direct_at: Option<Instant>,
    links: HashMap<Uuid, Link>,
    probes: HashMap<usize, Probe>,
    measurements: HashMap<usize, Measuring>,
    probings: Probings,
    scanner: Scanner,
    alarms: Vec<String>,
    /// QEMUs of runs that are over, with their monitors' paths.
    children: Vec<(Process, std::path::PathBuf)>,
    measured_at: Option<Instant>,
    programs: Programs,
    _lock: Flock<File>,
}

/// Runs that are over are remembered so that they can be queried; the oldest go first.
const REMEMBERED_RUNS: usize = 64;
/// Longest sleep.
const IDLE: Duration = Duration::from_secs(5);

fn now() -> Now {
    let unix = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Now {
        mono: Instant::now(),
        unix_us: i64::try_from(unix.as_micros()).unwrap_or(i64::MAX),
    }
}

/// Two sidecars in one state directory would settle each other's runs.
fn lock_state(directory: &Path) -> anyhow::Result<Flock<File>> {
    let path = directory.join("lock");
    let file = File::create(&path)
        .with_context(|| format!("the lock {} cannot be made", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        anyhow::anyhow!(
            "another sidecar uses the state directory {}: {error}; give each its own `state-dir`",
            directory.display()
        )
    })
}

fn log(text: &str) {
    eprintln!("muster-sidecar: {text}");
}

impl Daemon {
    /// Opens everything the configuration names and takes over what an earlier life left.
    ///
    /// # Errors
    /// What cannot be opened, and what to do.
    pub fn open(config: Config) -> anyhow::Result<Self> {
        for warning in config.warnings() {
            log(&warning);
        }
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGTERM);
        mask.add(Signal::SIGINT);
        mask.thread_block().context("signals cannot be blocked")?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .context("signalfd")?;
        for directory in [&config.state_dir, &config.runtime_dir] {
            std::fs::create_dir_all(directory)
                .with_context(|| format!("the directory {} cannot be made", directory.display()))?;
        }
        let lock = lock_state(&config.state_dir)?;
        let poll = Poll::new().context("epoll")?;
        let waker = Waker::new(poll.registry(), Token(1)).context("eventfd")?;
        let waker = Arc::new(waker);
        let storage = Storage::start(&config.state_dir, Arc::clone(&waker))?;
        let scanner = Scanner::start(waker).context("the scanner's thread")?;
        let control_tcp = match config.control.tcp {
            Some(address) => Some(TcpListener::bind(address).with_context(|| {
                format!("the control address {address} cannot be used (is the port taken?)")
            })?),
            None => None,
        };
        let listen = config.stream.listen;
        let streams = TcpListener::bind(listen).with_context(|| {
            format!("the stream address {listen} cannot be used (is the port taken?)")
        })?;
        let stream_address = streams
            .local_addr()
            .context("the stream address")?
            .to_string();
        // Last: who can connect to it finds everything else in place.
        let control_unix = clients::listen_unix(&config.control.unix)?;
        let start = Instant::now();
        let programs = Programs::ask(&config);
        let pacing = Hierarchy::new(start, config.limits.link);
        let mut daemon = Self {
            config,
            poll,
            signals,
            control_unix,
            control_tcp,
            streams,
            stream_address,
            storage,
            started: start,
            next_token: 2,
            slots: HashMap::from([(Token(1), Slot::Woken)]),
            clients: HashMap::new(),
            eager_clients: Vec::new(),
            runs: BTreeMap::new(),
            channels: HashMap::new(),
            busy: Vec::new(),
            stirred: false,
            pacing,
            leaves: HashMap::new(),
            pace_at: None,
            direct_at: None,
            links: HashMap::new(),
            probes: HashMap::new(),
            measurements: HashMap::new(),
            probings: Probings::new(),
            scanner,
            alarms: Vec::new(),
            children: Vec::new(),
            measured_at: None,
            programs,
            _lock: lock,
        };
        daemon.register_listeners()?;
        daemon.take_over()?;
        Ok(daemon)
    }

    fn register_listeners(&mut self) -> anyhow::Result<()> {
        let token = self.token(Slot::Signals);
        let registry = self.poll.registry();
        let fd = self.signals.as_raw_fd();
        registry.register(&mut SourceFd(&fd), token, Interest::READABLE)?;
        let token = self.token(Slot::ControlUnix);
        let registry = self.poll.registry();
        registry.register(&mut self.control_unix, token, Interest::READABLE)?;
        let token = self.token(Slot::Streams);
        self.poll
            .registry()
            .register(&mut self.streams, token, Interest::READABLE)?;
        let token = self.token(Slot::ControlTcp);
        if let Some(listener) = &mut self.control_tcp {
            self.poll
                .registry()
                .register(listener, token, Interest::READABLE)?;
        }
        Ok(())
    }

    fn token(&mut self, slot: Slot) -> Token {
        let token = Token(self.next_token);
        self.next_token += 1;
        self.slots.insert(token, slot);
        token
    }

    /// Serves until SIGTERM or SIGINT.
    ///
    /// # Errors
    /// The event loop itself broke.
    pub fn serve(&mut self) -> anyhow::Result<()> {
        log(&format!(
            "host {}: control at {}, streams at {}",
            self.config.host,
            self.config.control.unix.display(),
            self.stream_address
        ));
        let mut events = Events::with_capacity(256);
        loop {
            let now = now();
            for client in std::mem::take(&mut self.eager_clients) {
                self.serve_client(now, client);
            }
            self.do_due(now);
            self.stirred = false;
            self.reconcile(now);
            self.move_bytes(now);
            let timeout = self.timeout(now);
            if let Err(error) = self.poll.poll(&mut events, Some(timeout)) {
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error).context("epoll");
                }
            }
            let now = self::now();
            for event in &events {
                let ready = (
                    event.is_readable() || event.is_read_closed(),
                    event.is_writable(),
                );
                let slot = self.slots.get(&event.token()).copied();
                match slot {
                    Some(Slot::Signals) => {
                        self.end_all_measurements();
                        let _ = std::fs::remove_file(&self.config.control.unix);
                        log("ended by a signal; guests run on");
                        return Ok(());
                    }
                    Some(slot) => self.dispatch(now, event.token(), slot, ready),
                    None => {}
                }
            }
        }
    }

    fn dispatch(&mut self, now: Now, token: Token, slot: Slot, ready: (bool, bool)) {
        match slot {
            Slot::Signals => {}
            Slot::Woken => {
                for done in self.storage.take_done() {
                    self.stored(now, done);
                }
                self.take_looks(now);
            }
            Slot::ControlUnix | Slot::ControlTcp => self.accept_clients(slot),
            Slot::Streams => self.accept_streams(now),
            Slot::Client => self.serve_client(now, token.0),
            Slot::Monitor(key) => self.serve_monitor(now, key),
            Slot::Process(key) => self.check_process(now, key),
            Slot::Listener(key) => self.accept_qemu(now, key, false),
            Slot::DiskListener(key) => self.accept_qemu(now, key, true),
            Slot::ChannelEnd(id) => {
                if let Some(channel) = self.channels.get_mut(&id) {
                    channel.ready(token, ready.0, ready.1);
                    self.busy.push(id);
                }
            }
            Slot::Opening(key) => self.serve_opening(now, key),
            Slot::Companion(key) => self.serve_companion(now, key),
            Slot::Link(run) => self.serve_link(now, run),
            Slot::Probe => self.serve_probe(now, token.0),
            Slot::Measurement => self.serve_measurement(now, token.0),
            Slot::Probing => self.step_probe(now, token.0),
        }
    }

    fn stored(&mut self, now: Now, done: Done) {
        match done {
            Done::Answer(asker, result) => self.answer(asker, &result),
            Done::Hooked(run, half, result) => {
                let entry = self.runs.get_mut(&run);
                if let Some(source) = entry.and_then(|e| e.run.halves[half].source_mut()) {
                    source.hook_ended(now, result);
                }
            }
            Done::Spawned(run, half, child, created) => {
                self.spawned(now, (run, half), child, created);
            }
            Done::NoteSaved(run, number, saved) => {
                let Some(entry) = self.runs.get_mut(&run) else {
                    return;
                };
                for (half, io) in entry.run.halves.iter_mut().zip(&mut entry.io) {
                    match &saved {
                        // An earlier note does not hold what this half waits for.
                        Ok(()) if io.note.is_some_and(|wanted| wanted <= number) => {
                            io.note = None;
                            if let Some(source) = half.source_mut() {
                                source.note_saved(now);
                            }
                        }
                        Ok(()) => {}
                        Err(error) => half.fail(error),
                    }
                }
            }
        }
    }

    /// What is due by the clock, outside of the runs.
    fn do_due(&mut self, now: Now) {
        let overdue: Vec<Uuid> = self
            .runs
            .iter()
            .filter(|(_, entry)| entry.run.ask_is_overdue(now))
            .map(|(id, _)| *id)
            .collect();
        for run in overdue {
            self.drop_link(run);
            if let Some(entry) = self.runs.get_mut(&run) {
                entry.run.not_answered(now, "it does not answer");
            }
        }
        self.drop_overdue_probes(now);
        self.tend_measurements(now);
        self.tend_probes(now);
        self.apply_scheduled(now);
        self.tend_direct(now);
        self.measure(now);
    }

    /// Lets every run do what it can, until nothing changes any more.
    fn reconcile(&mut self, now: Now) {
        let ids: Vec<Uuid> = self.runs.keys().copied().collect();
        for id in ids {
            self.count_disks(now, id);
            for _ in 0..8 {
                let Some(entry) = self.runs.get_mut(&id).filter(|e| !e.run.has_ended()) else {
                    break;
                };
                let outputs = entry.run.reconcile(now);
                if outputs.is_empty() {
                    break;
                }
                for output in outputs {
                    self.carry_out(now, id, output);
                }
            }
            self.flush_monitors(now, id);
        }
        self.forget_oldest();
    }

    fn carry_out(&mut self, now: Now, run: Uuid, output: RunOutput) {
        match output {
            RunOutput::Event(event) => self.tell(now, run, event),
            RunOutput::Ask(ask) => self.ask_register(now, run, ask),
            RunOutput::Ended => self.end_run(run),
            RunOutput::Half(half, output) => {
                let key = (run, half);
                match output {
                    Output::Event(event) => self.tell(now, run, event),
                    Output::ConnectQmp => self.connect_monitor(now, key),
                    Output::Spawn => self.spawn(now, key),
                    Output::Kill => self.kill(now, key),
                    Output::Listen => self.listen_for_qemu(now, key),
                    Output::ListenDisks => self.listen_for_disks(now, key),
                    Output::RunHook => self.hook_before(now, key),
                    Output::WriteBack => self.write_back(key),
                    Output::SealDisks => self.seal_disks(key),
                    Output::Connect => self.connect_direct(now, key),
                    Output::AcceptStream => self.accept_direct(key),
                    Output::CutStream => self.cut_stream(key),
                    Output::OpenAckGate => self.open_gate(key),
                    Output::Unpace => self.unpace(now, key),
                    Output::Alarm { text, lasts: true } => self.alarm(text),
                    // It goes with its run.
                    Output::Alarm { text, .. } => self.alarm(format!("run {run}: {text}")),
                    Output::SaveNote => {
                        let number = self.save_note(run);
                        if let Some(entry) = self.runs.get_mut(&run) {
                            entry.io[half].note = Some(number);
                        }
                    }
                }
            }
        }
    }

    fn alarm(&mut self, text: String) {
        log(&text);
        if !self.alarms.contains(&text) {
            self.alarms.push(text);
        }
    }

    fn tell(&mut self, now: Now, run: Uuid, mut event: Event) {
        if let Event::Status { vms } | Event::RunEnded { vms } = &mut event {
            self.complete_reports(run, vms);
        }
        let Some(entry) = self.runs.get_mut(&run) else {
            return;
        };
        match &event {
            Event::InDoubt { error } => self.alarms.push(format!("run {run}: {error}")),
            Event::Failed { vm, error, .. } => log(&format!("run {run}, VM {vm}: {error}")),
            Event::CoordinatorLost { error } => log(&format!("run {run}: {error}")),
            _ => {}
        }
        let envelope = entry.run.envelope(now, event);
        self.broadcast(&envelope);
    }

    fn end_run(&mut self, run: Uuid) {
        self.drop_link(run);
        self.alarms
            .retain(|alarm| !alarm.contains(&run.to_string()));
        self.release_halves(run);
        if let Err(error) = self.storage.submit(Job::RemoveNote(run)) {
            log(&error);
        }
    }

    fn forget_oldest(&mut self) {
        let ended = || self.runs.iter().filter(|(_, entry)| entry.run.has_ended());
        if ended().count() > REMEMBERED_RUNS {
            if let Some(id) = ended().map(|(id, _)| *id).next() {
                self.runs.remove(&id);
            }
        }
    }

    /// Has the run's note written as it is now; returns the note's number.
    fn save_note(&mut self, run: Uuid) -> u64 {
        let Some(entry) = self.runs.get_mut(&run) else {
            return 0;
        };
        entry.notes += 1;
        let number = entry.notes;
        let note = entry.run.note(|half| {
            let io = &entry.io[half];
            let process = io
                .process
                .as_ref()
                .map(|(_, process)| (process.pid, process.started));
            NotePlace {
                qmp: io.qmp_path.display().to_string(),
                process,
                created: io.created.clone(),
            }
        });
        if let Err(error) = self.storage.submit(Job::SaveNote(Box::new(note), number)) {
            if let Some(entry) = self.runs.get_mut(&run) {
                for half in &mut entry.run.halves {
                    half.fail(&error);
                }
            }
        }
        number
    }

    fn timeout(&self, now: Now) -> Duration {
        if self.stirred || !self.busy.is_empty() || !self.eager_clients.is_empty() {
            return Duration::ZERO;
        }
        let runs = self.runs.values().filter_map(|entry| entry.run.deadline());
        let channels = self.channels.values().filter_map(Channel::deadline);
        let scheduled = self
            .runs
            .values()
            .flat_map(|entry| entry.scheduled.iter().map(|(at, _)| *at));
        let probes = self.probes.values().map(|probe| probe.by);
        let measurements = self.measurements.values().filter_map(Measuring::deadline);
        let next = runs
            .chain(channels)
            .chain(scheduled)
            .chain(probes)
            .chain(measurements)
            .chain(self.probings.deadline(now.mono))
            .chain(self.pace_at)
            .chain(self.direct_at)
            .min();
        next.map_or(IDLE, |at| at.saturating_duration_since(now.mono))
            .min(IDLE)
    }
}
