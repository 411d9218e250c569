//! Two sidecars that only pretend: they speak the control protocol on unix sockets and answer
//! every command as if the move went well, up to a point that the test names.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use sidecar::protocol::codec::{
    CommandError, answer_line, event_line, greeting_line, read_request,
};
use sidecar::protocol::command::Command;
use sidecar::protocol::event::{Envelope, Event};
use sidecar::protocol::lines::{Line, LineBuffer};
use sidecar::protocol::types::{HoldReason, QemuBuild, Role};
use tempfile::TempDir;
use uuid::Uuid;

pub const VMS: [&str; 2] = ["web", "db"];

/// Both sidecars.
pub struct World {
    dir: TempDir,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    clients: [Vec<UnixStream>; 2],
    seq: BTreeMap<(usize, Uuid), u64>,
    record: Option<Value>,
    /// Names of the commands taken, in order, with their host.
    log: Vec<(usize, &'static str)>,
    /// This command is taken, and nothing follows from it.
    stuck_at: &'static str,
    can_hold: bool,
}

fn now_us() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970");
    i64::try_from(since.as_micros()).expect("before 292 000")
}

impl World {
    /// Sidecars for which every move works, except that nothing follows from `stuck_at`.
    pub fn new(stuck_at: &'static str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let state = Arc::new(Mutex::new(State {
            stuck_at,
            can_hold: true,
            ..State::default()
        }));
        for (host, name) in NAMES.iter().enumerate() {
            let listener = UnixListener::bind(dir.path().join(name)).expect("a socket");
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let stream = stream.expect("a connection");
                    let state = Arc::clone(&state);
                    std::thread::spawn(move || serve(host, stream, &state));
                }
            });
        }
        Self { dir, state }
    }

    /// QEMU at the sources is too old for a hold.
    pub fn without_hold(self) -> Self {
        self.state.lock().expect("no panic").can_hold = false;
        self
    }

    /// Writes the application file.
    pub fn file(&self, extra: &str) -> PathBuf {
        let path = |name| self.dir.path().join(name).display().to_string();
        let mut text = format!(
            "version = 1\n[application]\nname = \"shop\"\nbandwidth = \"50MB/s\"\n{extra}\n\
             [[host]]\nname = \"a\"\ncontrol = \"unix:{}\"\n[[host]]\nname = \"b\"\ncontrol = \"unix:{}\"\n",
            path("a"),
            path("b")
        );
        for (index, vm) in VMS.iter().enumerate() {
            text += &format!(
                "[[vm]]\nname = \"{vm}\"\nuuid = \"{}\"\nfrom = \"a\"\nto = \"b\"\n",
                uuid(index)
            );
        }
        text += "[[traffic]]\nbetween = [\"web\", \"db\"]\nrate = \"1MB/s\"\n";
        let file = self.dir.path().join("app.toml");
        std::fs::write(&file, text).expect("writable");
        file
    }

    /// Cuts every connection to this host; it can be connected to again at once.
    pub fn cut(&self, host: usize) {
        let mut state = self.state.lock().expect("no panic");
        for client in state.clients[host].drain(..) {
            // The peer may have closed it already.
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
    }

    /// How many connections this host has.
    pub fn connections(&self, host: usize) -> usize {
        self.state.lock().expect("no panic").clients[host].len()
    }

    /// From now on every command works.
    pub fn go_on(&self) {
        self.state.lock().expect("no panic").stuck_at = "";
    }

    pub fn path(&self, name: &str) -> PathBuf {
        Path::join(self.dir.path(), name)
    }

    pub fn log(&self) -> Vec<(usize, &'static str)> {
        self.state.lock().expect("no panic").log.clone()
    }

    /// Waits until a command has been taken (at most ten seconds).
    pub fn wait_for(&self, name: &str) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !self.log().iter().any(|(_, taken)| *taken == name) {
            assert!(
                std::time::Instant::now() < end,
                "no {name}: {:?}",
                self.log()
            );
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

const NAMES: [&str; 2] = ["a", "b"];

fn uuid(index: usize) -> Uuid {
    Uuid::from_u128(1 + index as u128)
}

fn serve(host: usize, mut stream: UnixStream, state: &Mutex<State>) {
    stream
        .write_all(&greeting_line(NAMES[host]))
        .expect("greets");
    let client = stream.try_clone().expect("cloned");
    state.lock().expect("no panic").clients[host].push(client);
    let mut lines = LineBuffer::new(1 << 20);
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        lines.push(&buffer[..count]);
        while let Some(Line::Whole(line)) = lines.next_line() {
            let request = read_request(&line);
            let mut state = state.lock().expect("no panic");
            let (answer, events) = match request.command {
                Ok(command) => state.take(host, &command),
                Err(error) => (Err(error), Vec::new()),
            };
            // The coordinator may be gone already.
            let _ = stream.write_all(&answer_line(request.id.as_ref(), &answer));
            for (host, run, event) in events {
                state.emit(host, run, event);
            }
        }
    }
}

type Events = Vec<(usize, Uuid, Event)>;

impl State {
    fn emit(&mut self, host: usize, run: Uuid, event: Event) {
        let seq = self.seq.entry((host, run)).or_default();
        *seq += 1;
        let envelope = Envelope {
            run,
            seq: *seq,
            at_us: now_us(),
            event,
        };
        let line = event_line(&envelope);
        self.clients[host].retain_mut(|client| client.write_all(&line).is_ok());
    }

    fn take(&mut self, host: usize, command: &Command) -> (Result<Value, CommandError>, Events) {
        let chatter = matches!(command, Command::KeepAlive(_) | Command::Capabilities(_))
            || command.name().starts_with("query-")
            || command.name() == "dirty-start"
            || command.name() == "set-report-interval";
        if !chatter {
            self.log.push((host, command.name()));
        }
        if command.name() == self.stuck_at {
            return (Ok(json!({})), Vec::new());
        }
        let Some(answer) = self.query(host, command) else {
            return (Ok(json!({})), self.events(host, command));
        };
        (answer, Vec::new())
    }

    fn query(&mut self, host: usize, command: &Command) -> Option<Result<Value, CommandError>> {
        Some(Ok(match command {
            Command::QueryHost => json!({
                "host": NAMES[host], "available_memory_bytes": 1_u64 << 32,
                "state_free_bytes": 1_u64 << 30, "stream_address": "127.0.0.1:1",
                "sidecar_version": "0.1.0", "qemu_version": "10.0.2",
            }),
            Command::QueryVms => VMS
                .iter()
                .map(
                    |vm| json!({ "vm": vm, "qmp": null, "qmp_present": true, "can_receive": true }),
                )
                .collect(),
            Command::QueryVm(args) => {
                let index = VMS.iter().position(|vm| *vm == args.vm)?;
                json!({
                    "vm": args.vm, "uuid": uuid(index), "status": "running",
                    "memory_bytes": 128 << 20, "machine": "pc-i440fx-10.0",
                    "qemu_version": "10.0.2", "can_hold": self.can_hold,
                })
            }
            Command::QueryStatus => {
                json!({ "host": NAMES[host], "version": "0.1.0", "runs": [], "alarms": [] })
            }
            // Nothing dirties here: a move goes on without knowing what its VMs do.
            Command::DirtyStart(_) => return Some(Err(CommandError::generic("no QEMU"))),
            Command::QueryRun(_) => json!({ "vms": [] }),
            Command::Decide(args) => {
                let value = self.record.get_or_insert_with(|| json!(args.value));
                json!({ "value": value })
            }
            _ => return None,
        }))
    }

    fn events(&mut self, host: usize, command: &Command) -> Events {
        let Some(run) = command.run().map(|args| args.run) else {
            return Vec::new();
        };
        let each = |host: usize, event: &dyn Fn(String) -> Event| -> Events {
            VMS.iter()
                .map(|vm| (host, run, event((*vm).to_owned())))
                .collect()
        };
        let here = if host == 0 {
            Role::Source
        } else {
            Role::Destination
        };
        match command {
            Command::Prepare(args) => each(host, &|vm| Event::Prepared {
                vm,
                role: args.role,
                stream: (host == 1).then(|| "127.0.0.1:1".into()),
                memory_bytes: 128 << 20,
                qemu_version: "10.0.2".into(),
                qemu_build: QemuBuild::Stock,
            }),
            Command::Start(_) => each(0, &|vm| Event::Held {
                vm,
                reason: HoldReason::Converged,
                remaining_bytes: 1 << 20,
                dirty_rate_bytes_per_s: 1 << 20,
            }),
            Command::Arm(_) => each(0, &|vm| Event::Armed {
                vm,
                remaining_bytes: 1 << 20,
                dirty_rate_bytes_per_s: 1 << 20,
            }),
            Command::Release(_) => each(0, &|vm| Event::Stopped {
                vm,
                remaining_bytes: 1 << 20,
                stopped_at_us: now_us(),
            }),
            Command::Continue(_) => {
                let arrived = |role| move |vm| Event::Arrived { vm, role };
                let mut events = each(0, &|vm| Event::Switching { vm });
                events.extend(each(0, &arrived(Role::Source)));
                events.extend(each(1, &arrived(Role::Destination)));
                events
            }
            Command::Commit(_) if host == 1 => each(1, &|vm| Event::Committed {
                vm,
                role: here,
                resumed_at_us: Some(now_us()),
            }),
            Command::Finish(args) => {
                let done = |vm: &String| Event::Committed {
                    vm: vm.clone(),
                    role: here,
                    resumed_at_us: None,
                };
                args.vms.iter().map(|vm| (0, run, done(vm))).collect()
            }
            Command::Abort(_) => each(host, &|vm| Event::RolledBack {
                vm,
                role: here,
                reason: None,
            }),
            _ => Vec::new(),
        }
    }
}
