//! One conformance test for all backends, and what is special about KVM's.
//!
//! Tests that need KVM are listed as ignored, with the reason, where /dev/kvm does not open, and
//! fail there if MUSTER_REQUIRE_KVM=1.

mod conformance;
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
mod kvm;

use libtest_mimic::{Arguments, Failed, Trial};

type Case = (&'static str, fn() -> Result<(), Failed>);

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for (name, case) in conformance::CASES {
        trials.push(Trial::test(*name, *case));
    }
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    let required = std::env::var("MUSTER_REQUIRE_KVM").is_ok_and(|v| !v.is_empty() && v != "0");
    for (name, case) in KVM_CASES {
        let skip = kvm.is_err() && !required;
        if let (true, Err(error)) = (skip, &kvm) {
            eprintln!("not run: {name}, because /dev/kvm cannot be opened: {error}");
        }
        trials.push(Trial::test(*name, *case).with_ignored_flag(skip));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
const KVM_CASES: &[Case] = kvm::CASES;
#[cfg(not(all(feature = "kvm", target_arch = "x86_64")))]
const KVM_CASES: &[Case] = &[];
