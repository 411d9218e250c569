//! What may block — files that are synced, programs that are started — happens on this thread.
//!
//! The event loop sends a [`Job`] over a bounded channel and is woken when its [`Done`] is there.
//! One thread, so that jobs keep their order. Images of disks may lie on any file system, also one
//! that hangs, and traffic is counted for a while: such jobs have a thread of their own each time, and
//! the register goes on.

use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use mio::Waker;
use serde_json::{Value, json};
use uuid::Uuid;

use super::hooks::Hook;
use super::images::{self, Image};
use super::{log, process, traffic};
use crate::notes::{self, Note};
use crate::protocol::codec::CommandError;
use crate::protocol::types::{RecordKey, RecordValue};
use crate::register::{FileRegister, Register};

/// Which request of which client waits for the result.
#[derive(Debug, Clone)]
pub struct Asker {
    /// The client.
    pub client: usize,
    /// Its `id`.
    pub id: Option<Value>,
}

/// What is to be done.
#[derive(Debug)]
pub enum Job {
    /// Write a run's note; its number among the notes of the run comes back.
    SaveNote(Box<Note>, u64),
    /// Remove it.
    RemoveNote(Uuid),
    /// Record, or read what stands.
    Decide(Asker, Uuid, RecordKey, RecordValue),
    /// Read a run's records.
    Records(Asker, Uuid),
    /// Remove a run's records.
    Forget(Asker, Uuid),
    /// Remove images that were made for a run.
    RemoveImages(Vec<PathBuf>),
    /// Run a hook; who waits for it.
    Hook(Hook, Option<(Uuid, usize)>),
    /// Count what VMs send each other, for so long.
    CountTraffic(Asker, Duration),
    /// Start a program.
    Spawn {
        /// Images to be made before.
        images: Vec<Image>,
        /// The run.
        run: Uuid,
        /// Which half of it.
        half: usize,
        /// Program and arguments.
        arguments: Vec<String>,
        /// Where its output goes.
        log: PathBuf,
    },
}

/// What was done.
#[derive(Debug)]
pub enum Done {
    /// A note was written, or not.
    NoteSaved(Uuid, u64, Result<(), String>),
    /// An answer for a client.
    Answer(Asker, Result<Value, CommandError>),
    /// A hook that a half waits for has ended.
    Hooked(Uuid, usize, Result<(), String>),
    /// A program was started, or not; the images that were made.
    Spawned(Uuid, usize, Result<Child, String>, Vec<PathBuf>),
}

/// The thread's end in the event loop.
#[derive(Debug)]
pub struct Storage {
    jobs: Sender<Job>,
    done: Receiver<Done>,
}

const QUEUE: usize = 1024;
/// Records of runs that nobody said were over are kept for so long; looked at when starting.
const RECORDS_KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

impl Storage {
    /// Starts the thread.
    ///
    /// # Errors
    /// The register cannot be opened, or no thread be started.
    pub fn start(state_dir: &std::path::Path, waker: Arc<Waker>) -> anyhow::Result<Self> {
        let mut register = FileRegister::open(state_dir.join("register"))?;
        register.expire(RECORDS_KEPT)?;
        let notes_dir = state_dir.join("runs");
        let (jobs, queue) = bounded::<Job>(QUEUE);
        let (results, done) = bounded::<Done>(QUEUE);
        std::thread::Builder::new()
            .name("storage".into())
            .spawn(move || {
                for job in queue {
                    let done = if job.takes_time() {
                        beside(job, &results, &waker)
                    } else {
                        perform(job, &mut register, &notes_dir)
                    };
                    if done.is_some_and(|done| !tell(done, &results, &waker)) {
                        return;
                    }
                }
            })?;
        Ok(Self { jobs, done })
    }

    /// Hands over a job.
    ///
    /// # Errors
    /// The thread is a thousand jobs behind: the disk hangs.
    pub fn submit(&self, job: Job) -> Result<(), String> {
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => "the disk under the state directory hangs".to_owned(),
            TrySendError::Disconnected(_) => "the storage thread is gone".to_owned(),
        })
    }

    /// What was done since.
    pub fn take_done(&self) -> Vec<Done> {
        self.done.try_iter().collect()
    }
}

impl Job {
    /// Whether others should not wait for it.
    fn takes_time(&self) -> bool {
        match self {
            Self::Hook(..) => true,
            Self::Spawn { images, .. } => !images.is_empty(),
            Self::RemoveImages(_) | Self::CountTraffic(..) => true,
            _ => false,
        }
    }
}

/// Whether somebody is there to be told.
fn tell(done: Done, results: &Sender<Done>, waker: &Waker) -> bool {
    results.send(done).is_ok() && waker.wake().is_ok()
}

/// Does a job on a thread of its own; what came of it at once, where there is none.
fn beside(job: Job, results: &Sender<Done>, waker: &Arc<Waker>) -> Option<Done> {
    let failed = failure_of(&job);
    let (results, waker) = (results.clone(), waker.clone());
    let thread = std::thread::Builder::new().name("beside".into());
    let started = thread.spawn(move || {
        if let Some(done) = without_register(job) {
            tell(done, &results, &waker);
        }
    });
    failed(format!("no thread can be started: {}", started.err()?))
}

/// How it is told that a job was not done.
fn failure_of(job: &Job) -> Box<dyn FnOnce(String) -> Option<Done>> {
    match job {
        Job::Spawn { run, half, .. } => {
            let (run, half) = (*run, *half);
            Box::new(move |error| Some(Done::Spawned(run, half, Err(error), Vec::new())))
        }
        Job::Hook(_, Some((run, half))) => {
            let (run, half) = (*run, *half);
            Box::new(move |error| Some(Done::Hooked(run, half, Err(error))))
        }
        Job::CountTraffic(asker, _) => {
            let asker = asker.clone();
            Box::new(move |error| Some(answer(asker, Err(error))))
        }
        _ => Box::new(|error| {
            log(&format!(
                "images of a run are left, or a hook was not run: {error}"
            ));
            None
        }),
    }
}

/// The jobs that need no register.
fn without_register(job: Job) -> Option<Done> {
    match job {
        Job::Hook(hook, whose) => {
            let result = hook.run();
            if let Err(error) = &result {
                log(error);
            }
            whose.map(|(run, half)| Done::Hooked(run, half, result))
        }
        Job::RemoveImages(paths) => {
            images::remove(&paths);
            None
        }
        Job::CountTraffic(asker, time) => {
            let counted = traffic::count(time).map(|count| json!(count));
            Some(answer(asker, counted))
        }
        Job::Spawn {
            images,
            run,
            half,
            arguments,
            log,
        } => {
            let made = images::make(&images, &qemu_img(&arguments));
            let created = made.clone().unwrap_or_default();
            let child = made.and_then(|_| process::spawn(&arguments, &log));
            Some(Done::Spawned(run, half, child, created))
        }
        _ => None,
    }
}

fn answer(asker: Asker, result: Result<Value, impl std::fmt::Display>) -> Done {
    Done::Answer(
        asker,
        result.map_err(|error| CommandError::generic(error.to_string())),
    )
}

/// `records` as they stand in answers: `{"group": "commit", "vm-UUID": "source"}`.
fn records_value(records: &[(RecordKey, RecordValue)]) -> Value {
    let mut object = json!({});
    for (key, value) in records {
        let name = match key {
            RecordKey::Group => "group".to_owned(),
            RecordKey::Vm(vm) => format!("vm-{vm}"),
        };
        object[name] = json!(value);
    }
    object
}

/// Reads what [`records_value`] wrote; what is not understood is passed over.
#[must_use]
pub fn read_records(value: &Value) -> Vec<(RecordKey, RecordValue)> {
    let entries = value.as_object().into_iter().flatten();
    entries
        .filter_map(|(name, value)| {
            let key = match name.strip_prefix("vm-") {
                Some(vm) => RecordKey::Vm(vm.parse().ok()?),
                None if name == "group" => RecordKey::Group,
                None => return None,
            };
            Some((key, serde_json::from_value(value.clone()).ok()?))
        })
        .collect()
}

/// The program that makes images: beside a QEMU that is named by its path, else on the search path.
fn qemu_img(arguments: &[String]) -> PathBuf {
    let qemu = arguments.first().map(PathBuf::from).unwrap_or_default();
    let beside = qemu.with_file_name("qemu-img");
    if beside.is_absolute() && beside.exists() {
        beside
    } else {
        "qemu-img".into()
    }
}

fn perform(job: Job, register: &mut FileRegister, notes_dir: &std::path::Path) -> Option<Done> {
    Some(match job {
        Job::SaveNote(note, number) => {
            let saved = notes::save(notes_dir, &note).map_err(|error| error.to_string());
            Done::NoteSaved(note.run, number, saved)
        }
        Job::RemoveNote(run) => {
            if let Err(error) = notes::remove(notes_dir, run) {
                eprintln!("muster-sidecar: the note of run {run} cannot be removed: {error}");
            }
            return None;
        }
        Job::Decide(asker, run, key, value) => answer(
            asker,
            register
                .decide(run, key, value)
                .map(|value| json!({ "value": value })),
        ),
        Job::Records(asker, run) => answer(
            asker,
            register.records(run).map(|records| records_value(&records)),
        ),
        Job::Forget(asker, run) => answer(asker, register.forget(run).map(|()| json!({}))),
        Job::RemoveImages(_) | Job::CountTraffic(..) | Job::Spawn { .. } | Job::Hook(..) => {
            return without_register(job);
        }
    })
}
