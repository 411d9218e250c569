//! The testbed against real QEMU, KVM, TCG and the kernel's network.
//!
//! Tests that need KVM are listed as ignored, with the reason, where /dev/kvm does not open, and
//! fail there if MUSTER_REQUIRE_KVM=1. All need root. They run one at a time: they measure.

mod cases;

use libtest_mimic::{Arguments, Failed, Trial};
use sidecar::protocol::types::QemuBuild;
use testbed::qemu::{self, Accel, accel};

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let kvm_missing = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .err();
    let mut trials = Vec::new();
    let both = cases::GUEST_CASES
        .iter()
        .map(|case| (case, &[Accel::Kvm, Accel::Tcg][..]));
    let is_kvm_there = kvm_missing.is_none() || accel::kvm_required();
    let either = cases::EITHER_CASES.iter().map(|case| {
        let accels = match is_kvm_there {
            true => &[Accel::Kvm][..],
            false => &[Accel::Tcg][..],
        };
        (case, accels)
    });
    let kvm_only = cases::KVM_CASES
        .iter()
        .map(|case| (case, &[Accel::Kvm][..]));
    let under_test = match qemu::installed() {
        Ok(qemu) => qemu,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    };
    eprintln!(
        "under test: QEMU {} ({})",
        under_test.version, under_test.build
    );
    let is_stock = under_test.build == QemuBuild::Stock;
    let patched = cases::PATCHED_CASES
        .iter()
        .map(|case| (case, &[Accel::Kvm, Accel::Tcg][..]));
    if is_stock {
        eprintln!(
            "not run: what needs a patched QEMU (`make qemu` builds it, MUSTER_QEMU names it)"
        );
    }
    let patched_kvm = cases::PATCHED_KVM_CASES
        .iter()
        .map(|case| (case, &[Accel::Kvm][..]));
    let patched = patched.chain(patched_kvm);
    let stock = both
        .chain(either)
        .chain(kvm_only)
        .zip(std::iter::repeat(false));
    for (((name, case), accels), needs_patches) in stock.chain(patched.zip(std::iter::repeat(true)))
    {
        for accel in accels.iter().copied() {
            let name = format!("{accel}::{name}");
            let skip = accel == Accel::Kvm && !is_kvm_there;
            let unpatched = needs_patches && is_stock;
            if let (true, Some(error)) = (skip, &kvm_missing) {
                eprintln!("not run: {name}, because /dev/kvm cannot be opened: {error}");
            }
            let run = move || case(accel).map_err(|error| Failed::from(format!("{error:#}")));
            trials.push(Trial::test(name, run).with_ignored_flag(skip || unpatched));
        }
    }
    for (name, case) in cases::OTHER_CASES.iter().chain(cases::COMMAND_CASES) {
        let run = move || case().map_err(|error| Failed::from(format!("{error:#}")));
        trials.push(Trial::test(*name, run));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
