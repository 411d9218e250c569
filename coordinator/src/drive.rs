//! Runs a move: connects the pure conductor with sockets, the clock, and the observer.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rate_limiter::Bytes;
use sidecar::protocol::command::Command;
use sidecar::protocol::command::RunArgs;
use sidecar::protocol::event::Event;
use uuid::Uuid;

use crate::application::{Application, HostId, Policy};
use crate::client::{Client, Message, Sender};
use crate::conductor::{Conductor, Replanned, SystemRandom};
use crate::engine::{Output, Step};
use crate::observer::{GroupName, Observer, Progress};
use crate::policy::{can_run, plan};
use crate::preflight;
use crate::report::assemble::{Times, assemble};
use crate::report::predicted::predict;
use crate::report::{Adaptation, AdaptationKind, MoveReport, Outcome};
use crate::survey::{self, Again, Wanted};

/// The interrupt flag is looked at this often.
const TICK: Duration = Duration::from_millis(50);
/// The records of a finished run are removed within this time, or later by their sidecar.
const FORGET_WITHIN: Duration = Duration::from_secs(5);
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// How long an observer may block while keep-alives go on for it.
const HEARTBEAT_AT_MOST: Duration = Duration::from_secs(60);
const HEARTBEAT: Duration = Duration::from_millis(500);

/// How a move is run.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Instead of the application's policy.
    pub policy: Option<Policy>,
    /// Counted up by the user's interrupts (Ctrl-C): the first one rolls back what can still go
    /// back; after the decision the move finishes forward.
    pub interrupt: Arc<AtomicU8>,
}

/// Why a move did not begin.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Something stands in its way; nothing was touched.
    #[error("the move cannot begin:\n  {}", problems.join("\n  "))]
    Preflight {
        /// Every problem.
        problems: Vec<String>,
    },
    /// Interrupted before anything was touched.
    #[error("interrupted before anything was touched")]
    Interrupted,
}

/// Moves the application. Returns when every group has ended, one way or the other.
///
/// # Errors
/// The preflight found something, or the user interrupted before anything was touched.
pub fn run(
    app: &Application,
    options: &RunOptions,
    observer: &mut dyn Observer,
) -> Result<MoveReport, RunError> {
    let policy = options.policy.unwrap_or(app.policy);
    let refused = |error: &dyn ToString| RunError::Preflight {
        problems: vec![error.to_string()],
    };
    can_run(app, policy).map_err(|error| refused(&error))?;
    let client = Client::connect(app, &app.hosts_involved());
    let facts = preflight::gather(app, &client);
    let mut completed = app.clone();
    let mut notes = Vec::new();
    let wanted = Wanted::of_move(app, policy);
    if !wanted.is_empty() && facts.hosts.values().all(Result::is_ok) {
        observer.survey(&wanted.describe(app));
        notes = survey::complete(&mut completed, &wanted, &client, &options.interrupt)
            .map_err(|error| refused(&error))?;
    }
    let verdict = preflight::judge(&completed, policy, &facts);
    if !verdict.problems.is_empty() {
        return Err(RunError::Preflight {
            problems: verdict.problems,
        });
    }
    if options.interrupt.load(Ordering::Relaxed) > 0 {
        return Err(RunError::Interrupted);
    }
    // Disks that move are part of what is planned, whether or not the file says how large they are.
    for (id, disks) in &verdict.disks {
        let size = disks.iter().map(|disk| disk.size_bytes).sum();
        if size > 0 {
            completed.vms[id.0].profile.disk.get_or_insert(Bytes(size));
        }
    }
    let again = Again::new(app, &completed, &wanted);
    let app = &completed;
    let plan = plan(app, policy).map_err(|error| refused(&error))?;
    notes.extend(plan.notes.iter().cloned());
    notes.extend(deadline_note(app, policy));
    let heart = Heart::new(client.sender());
    let mut drive = Drive {
        app,
        client,
        conductor: Conductor::new(app, plan, verdict.machines, SystemRandom)
            .with_transports(verdict.transports)
            .with_disks(verdict.disks),
        observer,
        heart,
        begun: Instant::now(),
        blocked: Duration::ZERO,
        tickets: HashMap::new(),
        interrupts_seen: 0,
        next_progress: Duration::ZERO,
        times: Times::default(),
        ended: HashSet::new(),
        planning: None,
        again,
        adaptations: Vec::new(),
    };
    drive.run(&options.interrupt);
    drive.times.ended_at_us = unix_us();
    drive.forget();
    let outcome = drive.conductor.outcome().unwrap_or(Outcome::NeedsAttention);
    let mut report = assemble(app, policy, outcome, drive.conductor.started(), drive.times);
    report.adaptations = drive.adaptations;
    report
        .notices
        .splice(0..0, verdict.notes.into_iter().chain(notes));
    Ok(report)
}

/// What is to be expected of the deadline, where it can be said. That it is missed, the plans of `muster`
/// and `comma` say themselves.
fn deadline_note(app: &Application, policy: Policy) -> Option<String> {
    app.deadline?;
    let planned = predict(app, policy, &[]).ok()?;
    let deadline = planned.deadline?;
    let spare = deadline.limit_s - deadline.needed_s;
    let says_itself = matches!(policy, Policy::Muster | Policy::Comma);
    match deadline.met {
        true => Some(format!(
            "the deadline of {:.0} s is met with about {spare:.0} s to spare",
            deadline.limit_s
        )),
        false if says_itself => None,
        false => planned.notes.last().cloned(),
    }
}

/// The time now: unix time in microseconds.
#[must_use]
pub fn unix_us() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

struct Drive<'a, 'o> {
    app: &'a Application,
    client: Client,
    conductor: Conductor<'a, SystemRandom>,
    observer: &'o mut dyn Observer,
    heart: Heart,
    begun: Instant,
    /// Time spent in the observer: it does not count.
    blocked: Duration,
    /// Wire id → group and its ticket.
    tickets: HashMap<u64, (usize, u64)>,
    interrupts_seen: u8,
    next_progress: Duration,
    times: Times,
    /// Runs that are over on a host.
    ended: HashSet<(HostId, Uuid)>,
    /// The search that is made beside the move.
    planning: Option<Receiver<Replanned>>,
    /// What is measured beside the move.
    again: Again,
    adaptations: Vec<Adaptation>,
}

impl Drive<'_, '_> {
    fn now(&self) -> Duration {
        self.begun.elapsed().saturating_sub(self.blocked)
    }

    fn run(&mut self, interrupt: &AtomicU8) {
        self.conductor.begin(self.now());
        self.carry_out();
        while self.conductor.outcome().is_none() {
            let now = self.now();
            let due = self
                .conductor
                .poll_timeout()
                .map_or(TICK, |due| due.saturating_sub(now));
            let mut message = self.client.receive(due.min(TICK));
            // What has arrived counts before any deadline does.
            while let Some((host, received)) = message {
                self.receive(host, received);
                self.carry_out();
                message = self.client.try_receive();
            }
            let interrupts = interrupt.load(Ordering::Relaxed);
            while self.interrupts_seen < interrupts {
                self.interrupts_seen += 1;
                self.conductor.interrupt(self.now());
                self.carry_out();
            }
            self.plan_again();
            let now = self.now();
            if self.conductor.poll_timeout().is_some_and(|due| due <= now) {
                self.conductor.handle_timeout(now);
                self.carry_out();
            }
            if now >= self.next_progress {
                self.next_progress = now + PROGRESS_INTERVAL;
                self.progress();
            }
        }
        self.carry_out();
        self.progress();
    }

    /// Takes what was measured beside the move, and the answer of a search; begins others where it is
    /// time, or one is asked for.
    fn plan_again(&mut self) {
        let waiting = self.conductor.waiting();
        let measured = self.again.look(self.now(), &waiting);
        if !measured.is_empty() {
            self.conductor.handle_measured(measured);
            self.carry_out();
        }
        let found = self.planning.as_ref().map(Receiver::try_recv);
        match found {
            Some(Ok(found)) => {
                self.planning = None;
                self.conductor.handle_replanned(found);
                self.carry_out();
            }
            // A thread that failed has no answer.
            Some(Err(TryRecvError::Disconnected)) => self.planning = None,
            Some(Err(TryRecvError::Empty)) | None => {}
        }
        // One at a time: what has changed meanwhile asks again.
        if self.planning.is_some() {
            return;
        }
        if let Some(planning) = self.conductor.poll_planning() {
            let (answer, found) = channel();
            // It ends by itself, and nobody may listen any more.
            std::thread::spawn(move || {
                let _ = answer.send(planning.run());
            });
            self.planning = Some(found);
        }
    }

    /// Runs that ended cleanly on every host need their records no more. What cannot be reached
    /// keeps them; its sidecar removes them after a while.
    fn forget(&mut self) {
        let by = Instant::now() + FORGET_WITHIN;
        let clean: Vec<_> = self
            .conductor
            .started()
            .iter()
            .filter(|started| {
                let outcome = started.group.outcome();
                matches!(outcome, Some(Outcome::Committed | Outcome::RolledBack))
            })
            .map(|started| {
                let spec = started.group.spec();
                let hosts: Vec<_> = spec.members.iter().flat_map(|m| [m.from, m.to]).collect();
                (spec.run, spec.epoch, spec.register, hosts)
            })
            .collect();
        let over = |ended: &HashSet<_>, run, hosts: &[HostId]| {
            hosts.iter().all(|host| ended.contains(&(*host, run)))
        };
        while Instant::now() < by
            && !clean
                .iter()
                .all(|(run, _, _, hosts)| over(&self.ended, *run, hosts))
        {
            if let Some((host, message)) = self.client.receive(TICK) {
                self.receive(host, message);
            }
        }
        let queries: Vec<_> = clean
            .into_iter()
            .filter(|(run, _, _, hosts)| over(&self.ended, *run, hosts))
            .map(|(run, epoch, register, _)| (register, Command::Forget(RunArgs { run, epoch })))
            .collect();
        // Refused or unreachable: as said above.
        let _ = self.client.ask(&queries, FORGET_WITHIN);
    }

    fn receive(&mut self, host: HostId, message: Message) {
        match message {
            Message::Event(envelope) => {
                let name = self.app.host(host).name.clone();
                self.observe(|observer| observer.event(&name, &envelope));
                if matches!(envelope.event, Event::RunEnded { .. }) {
                    self.ended.insert((host, envelope.run));
                }
                self.conductor.handle_event(self.now(), host, &envelope);
            }
            Message::Answer { id, result } => {
                if let Some((group, ticket)) = self.tickets.remove(&id) {
                    let result = result.map_err(|error| error.desc);
                    self.conductor
                        .handle_reply(self.now(), group, host, ticket, result);
                }
            }
            Message::Lost(error) => {
                self.conductor
                    .handle_lost(self.now(), host, &error.to_string());
            }
            // A move begins no measurement.
            Message::Dirty { .. } | Message::Probed(_) => {}
            Message::Connected { .. } => self.conductor.handle_connected(self.now(), host),
        }
    }

    /// Carries out the outputs in their order.
    fn carry_out(&mut self) {
        while let Some((index, output)) = self.conductor.poll_output() {
            match output {
                Output::Send {
                    host,
                    ticket,
                    command,
                } => {
                    // Where there is no connection now, the reader says so and the engine sends
                    // it again after the next one.
                    if let Some(id) = self.client.send(host, &command) {
                        self.tickets.insert(id, (index, ticket));
                    }
                }
                Output::Step(step) => self.step(index, &step),
            }
        }
    }

    fn step(&mut self, index: usize, step: &Step) {
        if *step == Step::Started {
            self.times.started_at_us.get_or_insert_with(unix_us);
        }
        let spec = self.conductor.started()[index].group.spec();
        let args = RunArgs {
            run: spec.run,
            epoch: spec.epoch,
        };
        let mut hosts: Vec<HostId> = spec.members.iter().flat_map(|m| [m.from, m.to]).collect();
        hosts.sort_unstable();
        hosts.dedup();
        let name = GroupName {
            run: spec.run,
            vms: spec
                .members
                .iter()
                .map(|member| member.name.clone())
                .collect(),
        };
        match step {
            Step::Preparing => self.heart.add(args, &hosts),
            Step::Ended(_) => self.heart.remove(args),
            _ => {}
        }
        if let Some(kind) = AdaptationKind::of(step) {
            let since = unix_us().saturating_sub(self.times.started_at_us.unwrap_or_else(unix_us));
            self.adaptations.push(Adaptation {
                at_s: Duration::from_micros(u64::try_from(since).unwrap_or(0)).as_secs_f64(),
                kind,
                what: step.to_string(),
            });
        }
        self.observe(|observer| observer.step(&name, step));
    }

    fn progress(&mut self) {
        let progress = Progress {
            elapsed: self.begun.elapsed(),
            vms: self.conductor.progress(),
        };
        self.observe(|observer| observer.progress(&progress));
    }

    fn observe(&mut self, call: impl FnOnce(&mut dyn Observer)) {
        let since = Instant::now();
        self.heart.busy_since(Some(since));
        call(self.observer);
        self.heart.busy_since(None);
        self.blocked += since.elapsed();
    }
}

/// Sends keep-alives while the observer blocks.
struct Heart {
    shared: Arc<HeartState>,
}

struct HeartState {
    runs: Mutex<Vec<(RunArgs, Vec<HostId>)>>,
    epoch: Instant,
    /// Milliseconds after `epoch` plus 1, or 0.
    busy_since_ms: AtomicU64,
    stop: AtomicBool,
}

impl Heart {
    fn new(sender: Sender) -> Self {
        let shared = Arc::new(HeartState {
            runs: Mutex::new(Vec::new()),
            epoch: Instant::now(),
            busy_since_ms: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let state = Arc::clone(&shared);
        std::thread::spawn(move || {
            while !state.stop.load(Ordering::Relaxed) {
                std::thread::sleep(HEARTBEAT);
                state.beat(&sender);
            }
        });
        Self { shared }
    }

    fn add(&self, args: RunArgs, hosts: &[HostId]) {
        let mut runs = self
            .shared
            .runs
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        runs.push((args, hosts.to_vec()));
    }

    fn remove(&self, args: RunArgs) {
        let mut runs = self
            .shared
            .runs
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        runs.retain(|(known, _)| *known != args);
    }

    fn busy_since(&self, since: Option<Instant>) {
        let ms = since.map_or(0, |at| {
            let ms = at.saturating_duration_since(self.shared.epoch).as_millis();
            u64::try_from(ms).unwrap_or(u64::MAX - 1) + 1
        });
        self.shared.busy_since_ms.store(ms, Ordering::Relaxed);
    }
}

impl HeartState {
    fn beat(&self, sender: &Sender) {
        let busy = self.busy_since_ms.load(Ordering::Relaxed);
        if busy == 0 {
            return;
        }
        let since = self.epoch + Duration::from_millis(busy - 1);
        if (HEARTBEAT..HEARTBEAT_AT_MOST).contains(&since.elapsed()) {
            for (args, hosts) in &*self.runs.lock().unwrap_or_else(PoisonError::into_inner) {
                for host in hosts {
                    sender.send(*host, &Command::KeepAlive(*args));
                }
            }
        }
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}
