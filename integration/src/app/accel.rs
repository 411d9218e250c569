//! KVM or TCG for guests that run Linux, chosen by really trying: the guest's first process must
//! speak.
//!
//! A KVM that runs the testbed's tiny guests may be unable to run Linux, so this is tried apart. What
//! was found out about a kernel, a QEMU and an image is noted beside the image, because a guest that
//! does not boot is waited for in vain each time.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rate_limiter::Bytes;

use super::image::AppImage;
use super::machine::{AppLaunch, Start, kernel_line, machines};
use crate::demo::kernel;
use crate::process::Isolation;
use crate::qemu::{self, Accel, AccelChoice, ChosenAccel, installed};
use crate::signals::Interrupt;

const TRY_FOR: Duration = Duration::from_secs(20);
/// The kernel has said something by then, or the firmware is executed too slowly (or not at all):
/// with KVM on bare metal it takes less than a second.
const FIRST_WORD: Duration = Duration::from_secs(4);
const MONITOR_LIMIT: Duration = Duration::from_secs(5);
/// What the guest's first process says, whatever comes after.
const SPOKEN: &str = "muster: ";

/// Chooses the accelerator.
///
/// # Errors
/// KVM is asked for and does not run Linux, or it cannot be tried.
pub fn choose(choice: AccelChoice, interrupt: &Interrupt) -> Result<ChosenAccel> {
    if choice == AccelChoice::Tcg {
        return Ok(ChosenAccel {
            accel: Accel::Tcg,
            reason: "TCG, as asked".to_owned(),
        });
    }
    let image = AppImage::find()?;
    let note = note_of(&image)?;
    let noted = match choice {
        AccelChoice::Auto => std::fs::read_to_string(&note).ok(),
        _ => None,
    };
    if let Some(reason) = noted {
        return Ok(ChosenAccel {
            accel: Accel::Tcg,
            reason: format!("TCG, because {reason} ({} has it)", note.display()),
        });
    }
    match (try_kvm(image, interrupt)?, choice) {
        (Ok(took), _) => Ok(ChosenAccel {
            accel: Accel::Kvm,
            reason: format!("KVM: Linux was up after {:.1} s", took.as_secs_f64()),
        }),
        (Err(reason), AccelChoice::Kvm) => bail!("KVM is asked for, but {reason}"),
        (Err(reason), _) => {
            std::fs::write(&note, &reason)
                .with_context(|| format!("cannot write {}", note.display()))?;
            Ok(ChosenAccel {
                accel: Accel::Tcg,
                reason: format!("TCG, because {reason}"),
            })
        }
    }
}

/// Where it is noted that this image does not boot under KVM here.
fn note_of(image: &AppImage) -> Result<PathBuf> {
    let qemu = installed()?;
    let name = format!(
        "no-kvm-{}-{}-{}-{:016x}",
        kernel(),
        qemu.version,
        qemu.build,
        image.hash
    );
    Ok(image.directory.join(name))
}

fn try_kvm(image: AppImage, interrupt: &Interrupt) -> Result<Result<Duration, String>> {
    if let Err(error) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return Ok(Err(format!("/dev/kvm cannot be opened: {error}")));
    }
    let directory = tempfile::Builder::new().prefix("muster-kvm-").tempdir()?;
    let vms = machines(1);
    let launch = AppLaunch {
        vm: vms[0].clone(),
        // The kernel speaks as soon as it has been loaded.
        kernel_line: kernel_line(&vms[0], &vms).replace("quiet", "earlyprintk=ttyS0"),
        accel: Accel::Kvm,
        memory: Bytes(192 << 20),
        image,
        console: directory.path().join("console"),
        observe: directory.path().join("observe"),
        networked: false,
    };
    let isolation = Isolation {
        netns: None,
        log: Some(directory.path().join("log")),
    };
    let template = launch.template(&Start::Boot)?;
    let began = Instant::now();
    let qmp = directory.path().join("qmp");
    let mut qemu = match qemu::start("trial", &template, &qmp, &launch.observe, &isolation) {
        Ok(qemu) => qemu,
        Err(error) => return Ok(Err(error.to_string())),
    };
    while began.elapsed() < TRY_FOR {
        interrupt.sleep(Duration::from_millis(20))?;
        let said = std::fs::read(&launch.console).unwrap_or_default();
        if String::from_utf8_lossy(&said).contains(SPOKEN) {
            return Ok(Ok(began.elapsed()));
        }
        if said.is_empty() && began.elapsed() > FIRST_WORD {
            return Ok(Err(format!(
                "under KVM no kernel was up within {FIRST_WORD:?}"
            )));
        }
        if let Err(error) = qemu.process.must_run() {
            return Ok(Err(error.to_string()));
        }
        match qemu.monitor.run_state(MONITOR_LIMIT)?.as_str() {
            "running" => {}
            state => return Ok(Err(format!("Linux does not boot under KVM here ({state})"))),
        }
    }
    Ok(Err(format!(
        "Linux did not boot under KVM within {TRY_FOR:?}"
    )))
}
