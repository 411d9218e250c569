//! The command line: arguments, exit codes, and the small commands.

mod dirty;
mod plan;
mod show;
mod signals;
mod simulate;
mod traffic;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use coordinator::application::{Application, Policy};
use coordinator::client::Client;
use coordinator::operate::{self, OperateError, Settled, Wish};
use coordinator::report::{Outcome, table::table, timeline::timeline};
use coordinator::{RunOptions, preflight};
use sidecar::protocol::types::Decision;
use uuid::Uuid;

/// Usage, application file, or preflight.
const EXIT_REFUSED: u8 = 1;
const EXIT_ATTENTION: u8 = 3;

const EXIT_CODES: &str = "Exit codes: 0 committed (or nothing to do), 1 usage or preflight, \
2 rolled back cleanly, 3 needs attention, 4 partly moved.";

/// Moves a group of running KVM/QEMU virtual machines to other hosts: all together, or none.
#[derive(Debug, Parser)]
#[command(name = "muster", version, after_help = EXIT_CODES)]
struct Args {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Says everything that stands in the way of a move, without touching anything.
    Check {
        /// The application file.
        file: PathBuf,
        /// Check for this policy instead of the file's.
        #[arg(long, value_name = "POLICY")]
        policy: Option<Policy>,
    },
    /// Moves the application.
    Run {
        /// The application file.
        file: PathBuf,
        /// sequential, parallel or muster, instead of the file's.
        #[arg(long, value_name = "POLICY")]
        policy: Option<Policy>,
        /// Writes the report as JSON; `-` is standard output.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Writes the timeline as a picture (SVG).
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
    /// Says what each policy would do, and what it would cost, without touching any VM.
    Plan(plan::Options),
    /// Moves an application in virtual time: a paper's set-up beside the paper's figures, or a file.
    Simulate(simulate::Options),
    /// Shows what the sidecars are doing.
    Status {
        /// The application file.
        file: PathBuf,
        /// Shows it again every second, until Ctrl-C.
        #[arg(long)]
        watch: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Rolls back a move that another coordinator began, as far as it is not committed.
    Abort {
        /// The application file.
        file: PathBuf,
        /// Only this run.
        #[arg(long, value_name = "UUID")]
        run: Option<Uuid>,
    },
    /// Brings moves that were left behind to their end.
    Recover {
        /// The application file.
        file: PathBuf,
        /// Only this run.
        #[arg(long, value_name = "UUID")]
        run: Option<Uuid>,
        /// You vouch that this host is off, and stays off: runs in doubt because of it end.
        #[arg(long, value_name = "HOST")]
        fenced: Option<String>,
        /// With --fenced: how they end where nothing is recorded.
        #[arg(
            long,
            value_name = "VALUE",
            requires = "fenced",
            default_value = "abort"
        )]
        value: Value,
    },
    /// Shows how a VM dirties its memory: dirty rate, working set, heat map.
    Dirty(dirty::Args),
    /// Counts what the VMs send each other, as entries of the application file.
    Traffic(traffic::Args),
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Value {
    Abort,
    Commit,
}

/// Everything `muster` does; returns its exit code.
pub(crate) fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Nothing can be done about a standard output that is gone.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_REFUSED } else { 0 });
        }
    };
    match act(args.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            err(&format!("{error:#}"));
            ExitCode::from(EXIT_REFUSED)
        }
    }
}

/// Prints a line. A closed standard output must not end a move half way, so errors are ignored.
fn out(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn err(text: &str) {
    let _ = writeln!(std::io::stderr(), "muster: {text}");
}

fn act(action: Action) -> anyhow::Result<u8> {
    match action {
        Action::Check { file, policy } => check(&file, policy),
        Action::Run {
            file,
            policy,
            json,
            svg,
        } => run(&file, policy, json.as_deref(), svg.as_deref()),
        Action::Plan(options) => plan::plan(&options),
        Action::Simulate(options) => simulate::simulate(&options),
        Action::Status { file, watch, json } => status(&file, watch, json),
        Action::Abort { file, run } => settle(&file, run, &Wish::Abort),
        Action::Recover {
            file,
            run,
            fenced,
            value,
        } => {
            let value = match value {
                Value::Abort => Decision::Abort,
                Value::Commit => Decision::Commit,
            };
            let wish = fenced.map_or(Wish::Settle, |host| Wish::Fenced { host, value });
            settle(&file, run, &wish)
        }
        Action::Dirty(args) => dirty::run(args),
        Action::Traffic(args) => traffic::run(&args),
    }
}

fn check(file: &Path, policy: Option<Policy>) -> anyhow::Result<u8> {
    let app = Application::load(file)?;
    let policy = policy.unwrap_or(app.policy);
    let client = Client::connect(&app, &app.hosts_involved());
    let facts = preflight::gather(&app, &client);
    let verdict = preflight::judge(&app, policy, &facts);
    for note in &verdict.notes {
        out(&format!("note: {note}"));
    }
    if verdict.problems.is_empty() {
        out(&show::checked(&app, policy, &facts, &verdict));
        return Ok(0);
    }
    for problem in &verdict.problems {
        err(problem);
    }
    let count = verdict.problems.len();
    err(&format!(
        "{count} problem{}",
        if count == 1 { "" } else { "s" }
    ));
    Ok(EXIT_REFUSED)
}

fn run(
    file: &Path,
    policy: Option<Policy>,
    json: Option<&Path>,
    svg: Option<&Path>,
) -> anyhow::Result<u8> {
    let app = Application::load(file)?;
    // A place that cannot be written to is better known before the move than after it.
    for path in [json, svg]
        .into_iter()
        .flatten()
        .filter(|path| *path != Path::new("-"))
    {
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let options = RunOptions {
        policy,
        ..RunOptions::default()
    };
    signals::watch(&options.interrupt, signals::MOVE).context("cannot watch for signals")?;
    let mut live = coordinator::live::Live::new(json == Some(Path::new("-")));
    let report = coordinator::run(&app, &options, &mut live)?;
    live.finish();
    let mut code = report.result.exit_code();
    let mut save = |path: &Path, text: &str| {
        let result = if path == Path::new("-") {
            std::io::stdout().write_all(text.as_bytes())
        } else {
            std::fs::write(path, text)
        };
        if let Err(error) = result {
            err(&format!("cannot write {}: {error}", path.display()));
            code = code.max(EXIT_REFUSED);
        }
    };
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&report).context("cannot write the report")?;
        save(path, &(text + "\n"));
    }
    let reports = [report];
    if let Some(path) = svg {
        save(path, &timeline(&reports));
    }
    let [report] = &reports;
    let text = format!("\n{}", table(&reports));
    if json == Some(Path::new("-")) {
        err(&text);
    } else {
        out(&text);
    }
    for notice in &report.notices {
        err(notice);
    }
    if let Some(reason) = &report.reason {
        err(&format!("{}: {reason}", report.result));
    }
    Ok(code)
}

fn status(file: &Path, watch: bool, json: bool) -> anyhow::Result<u8> {
    let app = Application::load(file)?;
    loop {
        let hosts = operate::look(&app);
        let text = if json {
            serde_json::to_string(&hosts).context("cannot write the status")?
        } else {
            show::status(&hosts)
        };
        if watch && !json {
            // Clear the screen, cursor home.
            out(&format!("\x1b[2J\x1b[H{text}"));
        } else {
            out(&text);
        }
        if !watch {
            return Ok(show::status_code(&hosts));
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn settle(file: &Path, run: Option<Uuid>, wish: &Wish) -> anyhow::Result<u8> {
    let app = Application::load(file)?;
    let settled = match operate::settle(&app, run, wish, &mut |text| out(text)) {
        Ok(settled) => settled,
        Err(error @ OperateError::NoHost { .. }) => {
            err(&error.to_string());
            return Ok(EXIT_ATTENTION);
        }
        Err(error) => return Err(error.into()),
    };
    if settled.is_empty() {
        out("no run is under way");
    }
    let mut code = 0;
    for Settled {
        run,
        vms,
        outcome,
        notes,
    } in &settled
    {
        out(&format!("run {run} ({}): {outcome}", vms.join(", ")));
        for note in notes {
            err(note);
        }
        code = match (code, outcome) {
            (EXIT_ATTENTION, _) | (_, Outcome::NeedsAttention) => EXIT_ATTENTION,
            (code, outcome) => outcome.exit_code().max(code),
        };
    }
    Ok(code)
}
