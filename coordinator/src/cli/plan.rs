//! `muster plan`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use coordinator::application::{Application, Outline, Policy};
use coordinator::report::planned::{Planned, SCHEMA_VERSION, picture, text};
use coordinator::scheduler::order::Search;
use coordinator::scheduler::plan::{Inputs, Plan, Stage, plan as plan_of};
use coordinator::survey::{Wanted, before_a_plan};

use super::{err, out, signals};

/// What `muster plan` takes.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// The application file; it need not name hosts.
    file: PathBuf,
    /// sequential, parallel, lll, vmbuddies, comma or muster, instead of the file's.
    #[arg(long, value_name = "POLICY")]
    policy: Option<Policy>,
    /// How groups and their order are looked for: heuristic, brute, exact, large or auto.
    #[arg(long, value_name = "SEARCH", default_value = "auto")]
    search: Search,
    /// The whole migration, or only what is dirty after the bulk copy.
    #[arg(long, value_name = "STAGE", default_value = "whole")]
    stage: Part,
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// Writes the plans as a picture (SVG).
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Part {
    Whole,
    Two,
}

pub(super) fn plan(options: &Options) -> anyhow::Result<u8> {
    let mut outline = Outline::load(&options.file)?;
    let stage = match options.stage {
        Part::Whole => Stage::Whole,
        Part::Two => Stage::Two,
    };
    let mut notes = Vec::new();
    // Without hosts, and where VMs are, there is nothing to ask.
    if let Ok(mut app) = Application::load(&options.file) {
        notes = measure(&mut app, stage)?;
        outline = app.outline();
    }
    let inputs = Inputs::new(&outline, stage).with_context(|| {
        let mut text = format!("{}: not enough for a plan", options.file.display());
        for note in &notes {
            text += &format!(" ({note})");
        }
        text
    })?;
    let policy = options.policy.unwrap_or(outline.policy);
    let others = Policy::ALL.into_iter().filter(|other| *other != policy);
    let mut planned = Planned {
        schema_version: SCHEMA_VERSION,
        application: outline.name,
        stage: stage.to_string(),
        search: options.search.to_string(),
        plan: plan_of(&inputs, policy, options.search)
            .with_context(|| options.file.display().to_string())?,
        others: others
            .map(|other| {
                let plan = plan_of(&inputs, other, options.search);
                let plan = plan.or_else(|_| plan_of(&inputs, other, Search::Auto));
                plan.unwrap_or_else(|error| Plan::without_times(other, error.to_string()))
            })
            .collect(),
    };
    planned.plan.notes.splice(0..0, notes);
    if let Some(path) = &options.svg {
        std::fs::write(path, picture::picture(&planned))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if options.json {
        out(&serde_json::to_string_pretty(&planned).context("cannot write the plan")?);
    } else {
        out(text(&planned).trim_end());
    }
    Ok(0)
}

/// Measures what the file leaves out, where sidecars answer; notes of what was found.
fn measure(app: &mut Application, stage: Stage) -> anyhow::Result<Vec<String>> {
    if Wanted::of(app, stage).is_empty() {
        return Ok(Vec::new());
    }
    let interrupt = Arc::new(AtomicU8::new(0));
    signals::watch(&interrupt, signals::MEASUREMENT).context("cannot watch for signals")?;
    let notes = before_a_plan(app, stage, &interrupt, &mut |what| err(what))?;
    if interrupt.load(Ordering::Relaxed) > 0 {
        bail!("interrupted");
    }
    Ok(notes)
}
