//! What a guest is asked to do, and how that is written: `NAME:MEMORY:DIRTY_RATE:WORKING_SET`.

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use rate_limiter::units::ParseQuantityError;
use rate_limiter::{Bytes, BytesPerSecond};
use sidecar::config::ImageFormat;
use sidecar::protocol::types::Chain;
use uuid::Uuid;

use super::{PAGE, PIT_HZ, Params, WORKING_SET_PAGE};

const MIB: u64 = 1 << 20;
/// Up to here a `pc` machine has all RAM in one piece below the PCI hole.
const MAX_MEMORY: Bytes = Bytes(3072 * MIB);
const MIN_MEMORY: Bytes = Bytes(4 * MIB);
const DEFAULT_TICK_HZ: u32 = 1000;

/// In which order the pages of the working set are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// One after the other, round and round.
    #[default]
    Sweep,
    /// Uniformly at random, from a fixed seed.
    Random,
}

/// Writing and quiet phases that alternate, beginning with a writing one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnOff {
    /// How long the guest writes.
    pub on: Duration,
    /// How long it is quiet after that.
    pub off: Duration,
}

/// One guest: its name, its size, and how it dirties its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestSpec {
    /// The VM's name: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// The VM's UUID, the same on both sides of a migration.
    pub uuid: Uuid,
    /// RAM; a multiple of 1 MiB.
    pub memory: Bytes,
    /// How much it writes, counted as whole pages.
    pub dirty_rate: BytesPerSecond,
    /// The part of RAM that it writes to; a multiple of 4 KiB.
    pub working_set: Bytes,
    /// Ticks per second.
    pub tick_hz: u32,
    /// Order of the writes.
    pub access: Access,
    /// Phases, if it does not write all the time.
    pub on_off: Option<OnOff>,
    /// Its disk, if it has one.
    pub disk: Option<DiskSpec>,
    /// Further disks, which it does not write.
    pub idle: Vec<IdleDisk>,
    /// Whether it has a balloon.
    pub balloon: bool,
}

/// A guest's disk: it writes block after block, round and round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSpec {
    /// Its size; a multiple of 4 KiB.
    pub size: Bytes,
    /// How much the guest writes to it, at most 4 KiB a tick.
    pub rate: BytesPerSecond,
    /// Every block of it holds something from the beginning ([`super::disk::fill`]); else it is a hole.
    pub filled: bool,
    /// When it moves, its writes wait until they are at the destination.
    pub write_blocking: bool,
    /// What kind of image it lies in.
    pub format: ImageFormat,
    /// Down to where the guest's writes may be slowed when it moves.
    pub least: Option<BytesPerSecond>,
}

/// A disk that the guest has and does not write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdleDisk {
    /// Its block node.
    pub node: String,
    /// Its size; a multiple of 64 KiB.
    pub size: Bytes,
    /// What it lies in.
    pub kind: IdleKind,
}

/// What an idle disk lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdleKind {
    /// A raw image.
    Raw,
    /// A qcow2 image, a medium that cannot be written.
    ReadOnly,
    /// A qcow2 image over a raw one that both hosts have.
    Layered(Chain),
    /// A raw image that both hosts have: it does not move.
    Shared,
}

/// Why a guest cannot be made as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuestSpecError {
    /// The text does not have four fields.
    #[error(
        "guest `{text}`: expected NAME:MEMORY:DIRTY_RATE:WORKING_SET, for example `db:512MiB:12MB/s:64MiB`"
    )]
    Fields {
        /// What was given.
        text: String,
    },
    /// The name is empty or has other characters than letters, digits, `-`, `_` and `.`.
    #[error("guest name `{name}`: expected 1 to 32 letters, digits, `-`, `_` or `.`")]
    Name {
        /// What was given.
        name: String,
    },
    /// A quantity could not be read.
    #[error("guest `{name}`, {field}: {error}")]
    Quantity {
        /// Which guest.
        name: String,
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        error: ParseQuantityError,
    },
    /// The size of the RAM is not possible.
    #[error(
        "guest `{name}`: memory {memory} is not possible; expected a multiple of 1 MiB from {MIN_MEMORY} to {MAX_MEMORY}"
    )]
    Memory {
        /// Which guest.
        name: String,
        /// What was asked for.
        memory: Bytes,
    },
    /// The working set is empty or larger than the RAM has room for.
    #[error("guest `{name}`: working set {working_set} is not possible; expected 4 KiB to {room}")]
    WorkingSet {
        /// Which guest.
        name: String,
        /// What was asked for.
        working_set: Bytes,
        /// What fits.
        room: Bytes,
    },
    /// The tick rate is outside of what the timer can do.
    #[error("guest `{name}`: {tick_hz} ticks per second are not possible; expected 19 to 4000")]
    TickRate {
        /// Which guest.
        name: String,
        /// What was asked for.
        tick_hz: u32,
    },
    /// More pages per tick than the guest can count.
    #[error("guest `{name}`: dirty rate {dirty_rate} is too high for its tick rate")]
    DirtyRate {
        /// Which guest.
        name: String,
        /// What was asked for.
        dirty_rate: BytesPerSecond,
    },
    /// The disk's size or rate is not possible.
    #[error(
        "guest `{name}`: a disk of {size} written at {rate} is not possible; expected 4 KiB to 1 GiB, at most 4 KiB a tick"
    )]
    Disk {
        /// Which guest.
        name: String,
        /// The size asked for.
        size: Bytes,
        /// The rate asked for.
        rate: BytesPerSecond,
    },
    /// A phase is shorter than a tick.
    #[error("guest `{name}`: a phase of {phase:?} is shorter than a tick or longer than 10 days")]
    Phase {
        /// Which guest.
        name: String,
        /// What was asked for.
        phase: Duration,
    },
}

impl GuestSpec {
    /// Checks that the guest can be made, and computes what its ROM is told.
    ///
    /// # Errors
    /// Says which quantity is out of range.
    pub fn params(&self) -> Result<Params, GuestSpecError> {
        let name = || self.name.clone();
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if !(1..=32).contains(&self.name.len()) || !self.name.chars().all(good) {
            return Err(GuestSpecError::Name { name: name() });
        }
        let bad_memory = || GuestSpecError::Memory {
            name: name(),
            memory: self.memory,
        };
        if self.memory.0 % MIB != 0 || !(MIN_MEMORY..=MAX_MEMORY).contains(&self.memory) {
            return Err(bad_memory());
        }
        let end_page = u32::try_from(self.memory.0 / PAGE).map_err(|_| bad_memory())?;
        let bad_set = || GuestSpecError::WorkingSet {
            name: name(),
            working_set: self.working_set,
            room: Bytes(u64::from(end_page - WORKING_SET_PAGE) * PAGE),
        };
        let pages = u32::try_from(self.working_set.0 / PAGE).map_err(|_| bad_set())?;
        if pages == 0 || pages > end_page - WORKING_SET_PAGE {
            return Err(bad_set());
        }
        if !(19..=4000).contains(&self.tick_hz) {
            return Err(GuestSpecError::TickRate {
                name: name(),
                tick_hz: self.tick_hz,
            });
        }
        let divisor = (PIT_HZ + self.tick_hz / 2) / self.tick_hz;
        // rate / 4096 pages per second, over PIT_HZ / divisor ticks per second, times 65536.
        let rate = u128::from(self.dirty_rate.0) * 16 * u128::from(divisor) / u128::from(PIT_HZ);
        let rate = u32::try_from(rate).map_err(|_| GuestSpecError::DirtyRate {
            name: name(),
            dirty_rate: self.dirty_rate,
        })?;
        let ticks = |phase: Duration| {
            u32::try_from(phase.as_millis() * u128::from(self.tick_hz) / 1000)
                .ok()
                .filter(|ticks| (1..=0x3fff_ffff).contains(ticks))
                .ok_or_else(|| GuestSpecError::Phase {
                    name: name(),
                    phase,
                })
        };
        let (ticks_on, ticks_off) = match self.on_off {
            Some(OnOff { on, off }) => (ticks(on)?, ticks(off)?),
            None => (1, 0),
        };
        let (disk_blocks, disk_rate) = self.disk_params(divisor)?;
        Ok(Params {
            disk_blocks,
            disk_rate,
            balloon: u32::from(self.balloon),
            end_page,
            base_page: WORKING_SET_PAGE,
            pages,
            rate,
            ticks_on,
            ticks_off,
            random: u32::from(self.access == Access::Random),
            divisor,
        })
    }

    fn disk_params(&self, divisor: u32) -> Result<(u32, u32), GuestSpecError> {
        let Some(DiskSpec { size, rate, .. }) = self.disk else {
            return Ok((0, 0));
        };
        let bad = || GuestSpecError::Disk {
            name: self.name.clone(),
            size,
            rate,
        };
        let blocks = u32::try_from(size.0 / PAGE).map_err(|_| bad())?;
        let per_tick = u128::from(rate.0) * 16 * u128::from(divisor) / u128::from(PIT_HZ);
        let per_tick = u32::try_from(per_tick).map_err(|_| bad())?;
        let fits = size.0 % PAGE == 0 && (1..=1 << 18).contains(&blocks) && per_tick <= 1 << 16;
        fits.then_some((blocks, per_tick)).ok_or_else(bad)
    }

    /// The guest's ROM: the same bytes wherever and whenever it is made.
    ///
    /// # Panics
    /// If a field was changed to something impossible; [`params`](Self::params) says what.
    #[must_use]
    pub fn rom(&self) -> Vec<u8> {
        match self.params() {
            Ok(params) => params.rom(),
            Err(error) => panic!("{error}"),
        }
    }

    /// Writes the guest's ROM to a file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_rom(&self, path: &Path) -> std::io::Result<()> {
        std::fs::write(path, self.rom())
    }

    /// The time from one tick to the next.
    #[must_use]
    pub fn tick_period(&self) -> Duration {
        Duration::from_secs(1) / self.tick_hz.max(1)
    }
}

impl FromStr for GuestSpec {
    type Err = GuestSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let [name, memory, dirty_rate, working_set] = text.split(':').collect::<Vec<_>>()[..]
            .try_into()
            .map_err(|_: std::array::TryFromSliceError| GuestSpecError::Fields {
                text: text.to_owned(),
            })?;
        let bad = |field| {
            move |error| GuestSpecError::Quantity {
                name: name.to_owned(),
                field,
                error,
            }
        };
        let spec = Self {
            name: name.to_owned(),
            uuid: Uuid::new_v4(),
            memory: memory.parse().map_err(bad("memory"))?,
            dirty_rate: dirty_rate.parse().map_err(bad("dirty rate"))?,
            working_set: working_set.parse().map_err(bad("working set"))?,
            tick_hz: DEFAULT_TICK_HZ,
            access: Access::Sweep,
            on_off: None,
            disk: None,
            idle: Vec::new(),
            balloon: false,
        };
        spec.params()?;
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_read_from_four_fields() {
        let spec: GuestSpec = "db:512MiB:12MB/s:64MiB".parse().unwrap();
        assert_eq!(spec.memory, Bytes(512 * MIB));
        let params = spec.params().unwrap();
        assert_eq!(params.end_page, 131_072);
        assert_eq!(params.pages, 16_384);
        assert_eq!(params.divisor, 1193);
        // 12 MB/s are 2929.7 pages a second, 2.93 a tick.
        assert_eq!(params.rate, 191_970);
    }

    #[test]
    fn impossible_guests_are_named() {
        for (text, expected) in [
            ("db", "NAME:MEMORY"),
            ("db:1:2:3:4", "NAME:MEMORY"),
            ("d b:64MiB:1MB/s:1MiB", "guest name"),
            ("db:64XiB:1MB/s:1MiB", "memory: unknown unit"),
            ("db:64MiB:1MB:1MiB", "dirty rate: unknown unit"),
            ("db:2MiB:1MB/s:1MiB", "multiple of 1 MiB"),
            ("db:65MB:1MB/s:1MiB", "multiple of 1 MiB"),
            ("db:8GiB:1MB/s:1MiB", "multiple of 1 MiB"),
            ("db:64MiB:1MB/s:63MiB", "4 KiB to 62.0 MiB"),
            ("db:64MiB:1MB/s:0B", "4 KiB to"),
            ("db:64MiB:900GB/s:1MiB", "too high"),
        ] {
            let error = text.parse::<GuestSpec>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
