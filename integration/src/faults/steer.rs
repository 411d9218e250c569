//! The coordinator as a process of its own that stops wherever a fault may strike.
//!
//! `muster-testbed faults-coordinate FILE SOCKET` runs the move of an application with an observer
//! that says at every [`At`] where it is, and goes on when it is told to. Meanwhile the observer
//! blocks the move, as observers do, with keep-alives going on. One JSON object a line; the answer
//! to an `at` is one line, whatever it says.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use coordinator::engine::Step;
use coordinator::observer::{GroupName, Observer};
use coordinator::{Application, RunOptions};
use serde::{Deserialize, Serialize};
use sidecar::protocol::event::{Envelope, Event};
use sidecar::protocol::types::{Decision, Phase, Role};
use uuid::Uuid;

use crate::clock::Micros;
use crate::lab::program;
use crate::process::{Isolation, Process};

use super::log::{Log, What};

/// Where the move stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum At {
    /// The first source said PREPARED.
    SourcePrepared,
    /// The first destination said PREPARED.
    DestinationPrepared,
    /// A STATUS with a VM in pre-copy.
    Precopy,
    /// [`Step::AllHeld`].
    Held,
    /// [`Step::AllStopped`].
    Stopped,
    /// The first SWITCHING.
    Switching,
    /// [`Step::AllArrived`].
    Arrived,
    /// [`Step::Decided`], commit.
    Committing,
}

/// What the coordinator's process says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Said {
    /// It stands still here, in this run.
    At(At, Uuid),
    /// A step that is no trouble.
    Step(String),
    /// A step that names a trouble.
    Trouble(String),
    /// The move is over: exit code and reason.
    End(u8, Option<String>),
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    us: u64,
    said: Said,
}

struct Steered {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
    passed: BTreeSet<At>,
}

impl Steered {
    fn say(&mut self, said: Said) {
        let line = Line {
            us: Micros::now().0,
            said,
        };
        // A testbed that is gone takes this process with it.
        if let Ok(mut text) = serde_json::to_string(&line) {
            text.push('\n');
            let _ = self.stream.write_all(text.as_bytes());
        }
    }

    fn stand_still(&mut self, at: At, run: Uuid) {
        if self.passed.insert(at) {
            self.say(Said::At(at, run));
            let _ = self.answers.read_line(&mut String::new());
        }
    }
}

impl Observer for Steered {
    fn event(&mut self, _host: &str, envelope: &Envelope) {
        let run = envelope.run;
        match &envelope.event {
            Event::Prepared { role, .. } => match role {
                Role::Source => self.stand_still(At::SourcePrepared, run),
                Role::Destination => self.stand_still(At::DestinationPrepared, run),
            },
            Event::Status { vms } => {
                let copies = |phase| phase == Phase::Precopy;
                if vms
                    .iter()
                    .any(|vm| vm.role == Role::Source && copies(vm.phase))
                {
                    self.stand_still(At::Precopy, run);
                }
            }
            Event::Switching { .. } => self.stand_still(At::Switching, run),
            _ => {}
        }
    }

    fn step(&mut self, group: &GroupName, step: &Step) {
        let text = step.to_string();
        match step {
            Step::RollingBack { .. } | Step::InDoubt { .. } | Step::Notice(_) => {
                self.say(Said::Trouble(text));
            }
            _ => self.say(Said::Step(text)),
        }
        match step {
            Step::AllHeld => self.stand_still(At::Held, group.run),
            Step::AllStopped { .. } => self.stand_still(At::Stopped, group.run),
            Step::AllArrived => self.stand_still(At::Arrived, group.run),
            Step::Decided(Decision::Commit) => self.stand_still(At::Committing, group.run),
            _ => {}
        }
    }
}

/// The process that [`Coordinator::start`] starts.
///
/// # Errors
/// The file or the socket cannot be used.
pub fn coordinate(file: &Path, socket: &Path) -> Result<u8> {
    let app = Application::load(file)?;
    let stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    let answers = BufReader::new(stream.try_clone()?);
    let mut steered = Steered {
        stream,
        answers,
        passed: BTreeSet::new(),
    };
    let (code, reason) = match coordinator::run(&app, &RunOptions::default(), &mut steered) {
        Ok(report) => {
            for notice in report.notices {
                steered.say(Said::Trouble(notice));
            }
            (report.result.exit_code(), report.reason)
        }
        Err(error) => (1, Some(error.to_string())),
    };
    steered.say(Said::End(code, reason));
    Ok(code)
}

/// A move under way in a process of its own.
#[derive(Debug)]
pub struct Coordinator {
    /// The process.
    pub process: Process,
    stream: UnixStream,
}

const CONNECT_LIMIT: Duration = Duration::from_secs(10);

impl Coordinator {
    /// Starts the move of the application in `file`; what it says goes to `log`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(file: &Path, directory: &Path, log: &Log) -> Result<Self> {
        let socket = directory.join("steer.sock");
        // That of an earlier move in this directory.
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen on {}", socket.display()))?;
        listener.set_nonblocking(true)?;
        let mut command = Command::new(program("muster-testbed", "MUSTER_TESTBED")?);
        command.arg("faults-coordinate").arg(file).arg(&socket);
        let isolation = Isolation {
            netns: None,
            log: Some(directory.join("coordinator.log")),
        };
        let mut process = Process::start("the coordinator", command, &isolation)?;
        let by = Instant::now() + CONNECT_LIMIT;
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(_) if Instant::now() < by => {
                    process.must_run()?;
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => bail!("the coordinator does not connect: {error}"),
            }
        };
        stream.set_nonblocking(false)?;
        let lines = BufReader::new(stream.try_clone()?);
        let log = log.clone();
        std::thread::spawn(move || {
            for line in lines.lines() {
                let Ok(line) = line else { break };
                match serde_json::from_str::<Line>(&line) {
                    Ok(Line { us, said }) => log.add(Micros(us), "coordinator", What::Said(said)),
                    Err(error) => {
                        let text = format!("the coordinator said `{line}`: {error}");
                        log.add(Micros::now(), "testbed", What::Trouble(text));
                    }
                }
            }
        });
        Ok(Self { process, stream })
    }

    /// Lets it go on from where it stands still.
    pub fn go_on(&mut self) {
        // One that is dead does not go on.
        let _ = self.stream.write_all(b"go on\n");
    }
}
