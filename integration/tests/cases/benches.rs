//! The benchmarks in their smallest form: that they run and find what they look for.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde_json::json;
use testbed::bench::{BenchOptions, Name, bench, output};
use testbed::qemu::{Accel, AccelChoice, installed};
use testbed::signals::Interrupt;

const WITHIN: Duration = Duration::from_secs(300);

pub fn every_benchmark(_kvm: Accel) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (json, markdown) = (
        directory.path().join("bench.json"),
        directory.path().join("bench.md"),
    );
    std::fs::write(&markdown, format!("{}\n{}\n", output::BEGIN, output::END))?;
    // The distribution's QEMU, which is not patched, will do to see that `plain` runs.
    let base_qemu = Some("qemu-system-x86_64".to_owned());
    let build = installed()?.build;
    println!("under test: {build} QEMU");
    let possible = |name: &Name| name.lacks(build, base_qemu.as_deref()).is_none();
    // `policies-hot` is `policies` with other guests.
    let all = Name::value_variants().iter().copied();
    let names = all.filter(|name| *name != Name::PoliciesHot && possible(name));
    let options = BenchOptions {
        names: names.collect(),
        quick: true,
        accel: AccelChoice::Kvm,
        base_qemu: base_qemu.clone(),
        json: Some(json.clone()),
        markdown: Some(markdown.clone()),
    };
    let began = Instant::now();
    bench(&options, &Interrupt::install()?)?;
    ensure!(began.elapsed() < WITHIN, "took {:?}", began.elapsed());
    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(json)?)?;
    let sections = report["benchmarks"].as_array().context("no benchmarks")?;
    ensure!(sections.len() == options.names.len());
    ensure!(report["machine"]["qemu"] == json!(build));
    for section in sections {
        let figures = section["figures"].as_array().context("no figures")?;
        ensure!(!figures.is_empty());
        for figure in figures {
            ensure!(figure["spread"].is_object(), "not measured: {figure}");
        }
    }
    let text = std::fs::read_to_string(markdown)?;
    ensure!(text.contains("### `relay`"), "{text}");
    Ok(())
}
