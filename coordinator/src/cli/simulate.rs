//! `muster simulate`.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use coordinator::application::{Outline, Policy};
use coordinator::report::simulated::{SCHEMA_VERSION, Simulated, text};
use coordinator::simulation::study::{Ending, Part};
use coordinator::simulation::{NAMED, Study, compare, named, simulate as run};

use super::out;

/// What `muster simulate` takes.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// A named scenario (see --list), or an application file; it need not name hosts.
    #[arg(required_unless_present = "list", value_name = "SCENARIO|FILE")]
    what: Option<PathBuf>,
    /// Lists the scenarios.
    #[arg(long)]
    list: bool,
    /// Only the approaches of sequential, parallel, lll, vmbuddies, comma or muster.
    #[arg(long, value_name = "POLICY")]
    policy: Option<Policy>,
    /// When pre-copy of a VM ends, instead of the file's rule (application files).
    #[arg(long, value_name = "RULE")]
    termination: Option<Rule>,
    /// The whole migration, or only what is dirty after the bulk copy (application files).
    #[arg(long, value_name = "STAGE", default_value = "whole")]
    stage: Stage,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Rule {
    Qemu,
    Xen,
    Intelligent,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Stage {
    Whole,
    Two,
}

pub(super) fn simulate(options: &Options) -> anyhow::Result<u8> {
    let Some(what) = options.what.as_ref().filter(|_| !options.list) else {
        for (name, _) in NAMED {
            let study = study(Path::new(name), options)?;
            out(&format!("{name:24} {} ({})", study.title, study.source));
        }
        return Ok(0);
    };
    let study = study(what, options)?;
    let cases = run(&study, options.policy).with_context(|| what.display().to_string())?;
    if cases.iter().all(|case| case.approaches.is_empty()) {
        let names = study
            .approach
            .iter()
            .map(|approach| approach.policy.as_str());
        let mut names: Vec<&str> = names.collect();
        names.dedup();
        bail!(
            "{}: no approach has that policy; its policies are {}",
            what.display(),
            names.join(", ")
        );
    }
    let simulated = Simulated {
        schema_version: SCHEMA_VERSION,
        comparisons: compare(&study, &cases),
        scenario: study.name,
        title: study.title,
        source: study.source,
        open: study.open,
        cases,
    };
    if options.json {
        out(&serde_json::to_string_pretty(&simulated).context("cannot write the results")?);
    } else {
        out(text(&simulated).trim_end());
    }
    Ok(0)
}

fn study(what: &Path, options: &Options) -> anyhow::Result<Study> {
    if let Some(study) = what.to_str().and_then(named) {
        return Ok(study?);
    }
    let is_file = what.exists() || what.extension().is_some_and(|ending| ending == "toml");
    if !is_file {
        let names = NAMED.map(|(name, _)| name).join(", ");
        bail!(
            "`{}` is neither a scenario nor a file; the scenarios are {names}",
            what.display()
        );
    }
    let outline = Outline::load(what)?;
    let termination = match options.termination {
        Some(Rule::Qemu) => Ending::Qemu,
        Some(Rule::Xen) => Ending::Xen,
        Some(Rule::Intelligent) => Ending::Intelligent,
        None => Ending::of(&outline.termination),
    };
    let stage = match options.stage {
        Stage::Whole => Part::Whole,
        Stage::Two => Part::Two,
    };
    Ok(Study::of_file(outline, termination, stage))
}
