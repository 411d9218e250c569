//! The dirty log that a patched QEMU exports, against what the guest is known to write.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dirtylog::export::{BlockBits, Header, Limits, Mode, Reader, Retries, Snapshot, memfd};
use dirtylog::{PageSet, Pages};
use serde_json::{Value, json};
use testbed::guest::{GuestSpec, PAGE, Params, check::CONTROL_BLOCK};
use testbed::qemu::{Accel, Qemu, Role};

use super::{LIMIT, Lab};

/// RAM below 1 MiB: the guest keeps its counters there, and devices their own.
const LOW_PAGES: u64 = 256;

/// A patched QEMU that exports, and what reads it.
struct Exporting {
    qemu: Qemu,
    reader: Reader,
    snapshot: Snapshot,
    params: Params,
}

impl Exporting {
    fn start(lab: &Lab, spec: &GuestSpec, interval_ms: u64) -> Result<Self> {
        let mut qemu = lab.start(spec, "a", Role::Boot)?;
        lab.collector.wait_for_tick(&spec.name, "a", LIMIT)?;
        let fd = memfd("dirty-log")?;
        qemu.monitor.pass_fd("dirty-log", fd.as_fd(), LIMIT)?;
        let arguments = json!({"fdname": "dirty-log", "interval": interval_ms});
        qemu.monitor
            .execute("dirty-log-export-start", arguments, LIMIT)?;
        Ok(Self {
            qemu,
            reader: Reader::new(fd, Limits::default())?,
            snapshot: Snapshot::new(),
            params: spec.params()?,
        })
    }

    /// Reads until an export is as `wanted`.
    fn read_until(&mut self, wanted: impl Fn(&Header) -> bool) -> Result<Header> {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.reader
                .snapshot(&mut self.snapshot, Retries::default())?;
            let header = *self.snapshot.header().context("no header")?;
            if wanted(&header) {
                return Ok(header);
            }
            ensure!(
                Instant::now() < deadline,
                "still not as expected: {header:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn ram(&self) -> Result<&BlockBits> {
        let mut blocks = self.snapshot.blocks().iter();
        blocks
            .find(|block| block.name == "pc.ram")
            .context("no pc.ram")
    }

    /// How many pages of the working set are in `set`, and how many others above 1 MiB.
    fn split(&self, set: &PageSet) -> (u64, Vec<u64>) {
        let first = u64::from(self.params.base_page);
        let set_pages = first..first + u64::from(self.params.pages);
        let (mut inside, mut outside) = (0, Vec::new());
        for run in set.runs() {
            for page in run.first..run.end() {
                if set_pages.contains(&page) {
                    inside += 1;
                } else if page >= LOW_PAGES {
                    outside.push(page);
                }
            }
        }
        (inside, outside)
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.qemu.monitor.execute(command, arguments, LIMIT)?)
    }
}

/// The working set is written 10 times a second and more: each interval finds all of it.
pub fn measuring(accel: Accel) -> Result<()> {
    let lab = Lab::new(accel)?;
    let spec: GuestSpec = "db:128MiB:40MB/s:2MiB".parse()?;
    let mut export = Exporting::start(&lab, &spec, 500)?;
    let mut round = 0;
    for _ in 0..3 {
        let header = export.read_until(|header| header.round_ended && header.round > round)?;
        round = header.round;
        ensure!(header.mode == Mode::Measuring && !header.unsent_valid);
        let dirtied = &export.ram()?.dirtied;
        ensure!(dirtied.pages() == Pages(spec.memory.0 / PAGE));
        let (inside, outside) = export.split(dirtied);
        println!(
            "{accel} round {round}: {inside} of {} pages, {:?} spent",
            export.params.pages, header.spent
        );
        ensure!(inside == u64::from(export.params.pages), "{inside} pages");
        ensure!(outside.is_empty(), "not of the working set: {outside:?}");
        ensure!(
            dirtied.contains(CONTROL_BLOCK / PAGE),
            "the tick counter's page"
        );
    }
    // A guest that is paused writes nothing.
    export.execute("stop", json!({}))?;
    let stopped = round + 3;
    let header = export.read_until(|header| header.round_ended && header.round >= stopped)?;
    ensure!(export.ram()?.dirtied.is_empty(), "{header:?}");
    export.execute("cont", json!({}))?;

    export.execute("dirty-log-export-stop", json!({}))?;
    let header = export.read_until(|header| header.finished)?;
    let share = header.spent.as_secs_f64() / (header.syncs as f64 * 0.5);
    println!(
        "{accel}: {:.4} % of the time went to exporting",
        share * 1e2
    );
    ensure!(share < 0.01, "{header:?}");
    Ok(())
}

/// In the first round everything is unsent; what a round found dirty is the working set.
pub fn migrating(accel: Accel) -> Result<()> {
    let lab = Lab::new(accel)?;
    let spec: GuestSpec = "db:32MiB:40MB/s:2MiB".parse()?;
    let mut export = Exporting::start(&lab, &spec, 500)?;
    export.read_until(|header| header.round_ended)?;
    export.execute(
        "migrate-set-parameters",
        json!({"max-bandwidth": 8_000_000, "downtime-limit": 10}),
    )?;
    export.execute("migrate", json!({"uri": "exec:cat > /dev/null"}))?;
    let header = export.read_until(|header| header.mode == Mode::Migrating)?;
    ensure!(header.unsent_valid && header.round == 1, "{header:?}");
    ensure!(export.ram()?.unsent.count() == Pages(spec.memory.0 / PAGE));
    ensure!(export.ram()?.dirtied.is_empty(), "dirtied before its begin");

    let pages = u64::from(export.params.pages);
    let mut round = 0;
    for _ in 0..2 {
        let header = export.read_until(|header| header.round_ended && header.round > round)?;
        round = header.round;
        let ram = export.ram()?;
        let (inside, outside) = export.split(&ram.dirtied);
        let took = header.time.saturating_sub(header.round_begin);
        println!(
            "{accel} round {round}: {inside} of {pages} pages in {took:.0?}, {} unsent",
            ram.unsent.count()
        );
        ensure!(header.mode == Mode::Migrating && header.unsent_valid);
        ensure!(
            inside == pages || took < Duration::from_millis(200),
            "{inside} pages"
        );
        ensure!(outside.is_empty(), "not of the working set: {outside:?}");
        // All that was dirtied since it was sent is still to be sent.
        ensure!(!ram.unsent.is_empty());
    }
    export.execute("migrate_cancel", json!({}))?;
    let header = export.read_until(|header| {
        header.mode == Mode::Measuring && header.round_ended && header.round >= 2
    })?;
    let (inside, outside) = export.split(&export.ram()?.dirtied);
    ensure!(
        inside == pages && outside.is_empty(),
        "{inside}, {outside:?}, {header:?}"
    );
    Ok(())
}
