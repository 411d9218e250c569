//! What the numbers were measured on.

use serde::Serialize;
use sidecar::protocol::types::QemuBuild;

use crate::qemu::{Accel, Installed};

/// The machine and what ran on it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// Release of the kernel.
    pub kernel: String,
    /// Model of the processor.
    pub processor: String,
    /// Cores that may be used.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Version of QEMU.
    pub qemu_version: String,
    /// `stock` or `patched`.
    pub qemu: QemuBuild,
    /// Machine type of the guests.
    pub machine: String,
    /// Who executed the guests.
    pub accelerator: Accel,
    /// Load average over the minute before the first benchmark: others disturb the numbers.
    pub load_before: f64,
}

impl Machine {
    /// This machine, now.
    #[must_use]
    pub fn here(qemu: &Installed, accel: Accel) -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let value = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key));
            let value = line.and_then(|line| line.split_once(':'));
            value.map_or(String::new(), |(_, value)| value.trim().to_owned())
        };
        let memory = value(&read("/proc/meminfo"), "MemTotal");
        let load = read("/proc/loadavg");
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: value(&read("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: first(&memory).unwrap_or(0) >> 10,
            qemu_version: qemu.version.clone(),
            qemu: qemu.build,
            machine: qemu.machine.clone(),
            accelerator: accel,
            load_before: first(&load).unwrap_or(f64::NAN),
        }
    }

    /// In one line.
    #[must_use]
    pub fn line(&self) -> String {
        format!(
            "{} cores of {}, {} MiB, Linux {}, QEMU {} ({}), {} guests of type {}, load {:.2} before",
            self.cores,
            self.processor,
            self.memory_mib,
            self.kernel,
            self.qemu_version,
            self.qemu,
            self.accelerator,
            self.machine,
            self.load_before,
        )
    }
}

fn first<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.split_whitespace().next()?.parse().ok()
}
