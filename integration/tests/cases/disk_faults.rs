//! What happens to the disk of a guest while its copy fails.

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coordinator::MoveReport;
use coordinator::application::Policy;
use coordinator::engine::Step;
use coordinator::observer::{GroupName, Nobody, Observer};
use coordinator::report::Outcome;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use testbed::clock::Micros;
use testbed::guest::check;
use testbed::lab::Lab;
use testbed::memory::GuestRam;
use testbed::proof::{self, wait_for_mirror};
use testbed::qemu::Accel;
use testbed::signals::Interrupt;

use super::LIMIT;
use super::disks::{At, all_as_before, with_disks};
use super::groups::{check_all, go, lab};

/// The guest's disk goes on within this time: `disk-stall`, as it is by itself.
pub const LONGEST: Duration = Duration::from_secs(2);

/// How long a disk acknowledged nothing to a guest.
#[derive(Debug, Clone, Copy)]
pub struct Silence {
    /// From the first look at a count of writes to the last look at the same one: so long it certainly
    /// was, however seldom the watcher came to look.
    longest: Duration,
    /// The longest time between two looks.
    blind: Duration,
    /// Ticks of the guest in the longest silence.
    ticks: u32,
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            longest,
            blind,
            ticks,
        } = self;
        write!(
            f,
            "the guest's disk acknowledged nothing for {longest:?}, in which the guest ticked {ticks} \
             times (looks were {blind:?} apart at most)"
        )
    }
}

impl Silence {
    pub fn at_most(self, limit: Duration) -> Result<()> {
        ensure!(self.longest < limit, "{self}; at most {limit:?} are fine");
        Ok(())
    }
}

fn longest_silence(lab: &Lab, guest: &str, stop: &AtomicBool) -> Result<Silence> {
    let spec = lab.guest(guest)?;
    let ram = GuestRam::open(&mut lab.monitor(guest, "a")?, spec.memory)?;
    let mut silence = Silence {
        longest: Duration::ZERO,
        blind: Duration::ZERO,
        ticks: 0,
    };
    let (mut first, mut since) = (check::state(&ram)?, Instant::now());
    let mut looked = since;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(5));
        // The time before the look: the count was the same at least until then.
        let now = Instant::now();
        let state = check::state(&ram)?;
        silence.blind = silence.blind.max(now - looked);
        looked = now;
        if state.disk_done != first.disk_done {
            (first, since) = (state, Instant::now());
        } else if now.saturating_duration_since(since) > silence.longest {
            silence.longest = now - since;
            silence.ticks = state.ticks.wrapping_sub(first.ticks);
        }
    }
    Ok(silence)
}

/// Does something while the disk of a guest on `a` is watched.
pub fn watched<T: fmt::Debug>(
    lab: &Lab,
    guest: &str,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Silence)> {
    let stop = AtomicBool::new(false);
    let (done, silence) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| longest_silence(lab, guest, &stop));
        let done = work();
        stop.store(true, Ordering::Relaxed);
        (done, watch.join())
    });
    let silence = silence.map_err(|_| anyhow::anyhow!("the watcher ended"))?;
    // What was done tells more than that its guest could not be watched to the end.
    let done = done?;
    let silence = silence.with_context(|| {
        let log = lab.host_directory("a").join(format!("run/{guest}.log"));
        let said = std::fs::read_to_string(log).unwrap_or_default();
        format!("{done:?}; its QEMU says: {said}")
    })?;
    Ok((done, silence))
}

/// Does something at a step.
struct Blow<'a, F> {
    lab: &'a Lab,
    at: At,
    blow: F,
    done: Option<Result<()>>,
}

impl<F: FnMut(&Lab) -> Result<()>> Observer for Blow<'_, F> {
    fn step(&mut self, _group: &GroupName, step: &Step) {
        if self.done.is_none() && (self.at)(step) {
            self.done = Some((self.blow)(self.lab));
        }
    }
}

/// The group went back, for a reason that says all of this.
fn went_back(report: &MoveReport, says: &[&str]) -> Result<()> {
    ensure!(
        report.result == Outcome::RolledBack,
        "{}: {:?} {:?}",
        report.result,
        report.reason,
        report.notices
    );
    let reason = report.reason.as_deref().context("no reason")?;
    for word in says {
        ensure!(reason.contains(word), "`{word}` is not said: {reason}");
    }
    ensure!(!reason.contains('\n'), "more than one reason: {reason}");
    Ok(())
}

/// Its NBD server drops the connections of a guest's disks, of which something is copied already.
fn drop_nbd(lab: &Lab, guest: &str) -> Result<()> {
    wait_for_mirror(lab, guest, "a")?;
    let mut monitor = lab.monitor(guest, "b")?;
    monitor.execute("nbd-server-stop", json!({}), LIMIT)?;
    Ok(())
}

pub fn cut(accel: Accel) -> Result<()> {
    let lab = lab(with_disks(accel)?)?;
    let steps: [At; 3] = [
        |step| matches!(step, Step::Started),
        |step| matches!(step, Step::AllHeld),
        |step| matches!(step, Step::AllStopped { .. }),
    ];
    for at in steps {
        let since = Micros::now();
        let mut blow = Blow {
            lab: &lab,
            at,
            blow: |lab: &Lab| drop_nbd(lab, "log"),
            done: None,
        };
        let move_them = || go(&lab, Policy::Muster, "a", "b", &mut blow);
        let (report, silence) = watched(&lab, "log", move_them)?;
        blow.done.context("the step never came")??;
        went_back(&report, &["log", "NBD", "destination"])?;
        silence.at_most(LONGEST)?;
        all_as_before(&lab, since)?;
    }
    Ok(())
}

/// A file system of its own, of a few pages.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn make(path: PathBuf, bytes: u64) -> Result<Self> {
        std::fs::create_dir(&path)?;
        let size = format!("size={bytes}");
        let (kind, flags) = (Some("tmpfs"), MsFlags::empty());
        mount(kind, &path, kind, flags, Some(size.as_str())).context("mounting a tmpfs")?;
        Ok(Self(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

pub fn full(accel: Accel) -> Result<()> {
    let mut spec = with_disks(accel)?;
    // There is something in the image from the beginning.
    if let Some(disk) = &mut spec.guests[2].disk {
        disk.rate = rate_limiter::BytesPerSecond(2_000_000);
    }
    let lab = lab(spec)?;
    let image = lab.image("log", "b")?;
    let small = SmallDisk::make(lab.directory().join("small"), 1 << 20)?;
    let inner = small.0.join("log.img");
    File::create(&inner)?.set_len(16 << 20)?;
    std::os::unix::fs::symlink(&inner, &image)?;
    written(&lab, "log", 512)?;
    let since = Micros::now();
    let move_them = || go(&lab, Policy::Muster, "a", "b", &mut Nobody);
    let (report, silence) = watched(&lab, "log", move_them)?;
    went_back(
        &report,
        &["log", "disk0", "No space left", "destination", "make room"],
    )?;
    silence.at_most(LONGEST)?;
    // It was there before, and stays.
    std::fs::remove_file(&image)?;
    all_as_before(&lab, since)?;
    drop(small);
    let report = go(&lab, Policy::Muster, "a", "b", &mut Nobody)?;
    ensure!(report.result == Outcome::Committed, "{:?}", report.reason);
    check_all(&lab, "b", since)
}

/// Waits until a guest has written so many blocks.
fn written(lab: &Lab, guest: &str, blocks: u32) -> Result<()> {
    let spec = lab.guest(guest)?;
    let ram = GuestRam::open(&mut lab.monitor(guest, "a")?, spec.memory)?;
    let by = Instant::now() + LIMIT;
    while check::state(&ram)?.disk_done < blocks {
        ensure!(Instant::now() < by, "{guest} does not write");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Locks an image as a QEMU does that lets nobody else write to it: the byte that stands for that is
/// locked for reading (block/file-posix.c there).
#[allow(
    clippy::cast_possible_truncation,
    reason = "small constants of the kernel's"
)]
fn lock(image: &File) -> Result<()> {
    const NOBODY_WRITES: i64 = 200 + 1;
    let lock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: NOBODY_WRITES,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(image, FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(())
}

pub fn locked(accel: Accel) -> Result<()> {
    let lab = lab(with_disks(accel)?)?;
    let image = lab.image("log", "b")?;
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&image)?;
    file.set_len(16 << 20)?;
    lock(&file)?;
    let since = Micros::now();
    let move_them = || go(&lab, Policy::Muster, "a", "b", &mut Nobody);
    let (report, silence) = watched(&lab, "log", move_them)?;
    let shown = image.display().to_string();
    went_back(
        &report,
        &[
            "log",
            "disk0",
            "lock",
            &shown,
            "another process",
            "end that",
        ],
    )?;
    silence.at_most(Duration::from_millis(500))?;
    drop(file);
    ensure!(image.exists(), "an image of somebody else's was removed");
    std::fs::remove_file(&image)?;
    all_as_before(&lab, since)
}

pub fn nothing_is_lost(accel: Accel) -> Result<()> {
    let proof = proof::prove(accel, 5, &Interrupt::install()?, &|_| {})?;
    ensure!((proof.committed, proof.aborted) == (5, 5), "{proof:?}");
    ensure!(proof.faults.len() == 5, "{proof:?}");
    Ok(())
}
