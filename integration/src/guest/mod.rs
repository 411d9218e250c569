//! Guests of our own: a 64 KiB BIOS that ticks, dirties memory at a known rate, and leaves a
//! pattern by which every page can be checked.
//!
//! No firmware, kernel or disk: QEMU starts the ROM at the reset vector. The guest tags its RAM,
//! programs the timer, and then at every tick sends the low byte of its tick counter to port 0xE9
//! and writes its share of pages. Each page write is numbered: the number stands at offset 0 of
//! the page, and the number ^ page number ^ "MUST" at offset 4. The order of the pages is fixed
//! by the parameters, so the write counter alone says what every page must hold
//! ([`check`](check::check)): a page that a migration lost shows an old number.
//!
//! A guest with a disk writes numbered blocks to it in the same way, and counts those that the disk
//! has acknowledged ([`disk`]). A guest with a balloon gives the RAM behind its working set, and tags
//! what comes back as on its first day: it can be checked again when all has come back.

pub mod check;
mod spec;

pub mod disk;
pub use check::{GuestState, ImageError, PageReader};
pub use spec::{Access, DiskSpec, GuestSpec, GuestSpecError, IdleDisk, IdleKind, OnOff};

use crate::sys;

/// Size of a page.
pub const PAGE: u64 = 4096;
/// Size of the guest's ROM.
pub const ROM_SIZE: usize = 64 * 1024;
/// The first tagged page: RAM above 1 MiB.
pub const FIRST_PAGE: u32 = 256;
/// The first page of the working set.
pub const WORKING_SET_PAGE: u32 = 512;
/// What marks a guest that is ready, and what page tags are made with: "MUST".
pub const TAG: u32 = 0x4d55_5354;
/// The port on which the guest ticks.
pub const TICK_PORT: u16 = 0xe9;
/// Frequency of the timer's input.
const PIT_HZ: u32 = 1_193_182;

/// How many parameters there are.
pub const PARAMS: usize = 11;

/// What is written over the first words of the guest's code, in the order of rom.S.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    /// The first page number behind RAM.
    pub end_page: u32,
    /// The first page of the working set.
    pub base_page: u32,
    /// Pages in the working set.
    pub pages: u32,
    /// Pages written per tick, as a 16.16 fixed-point number.
    pub rate: u32,
    /// Ticks of a writing phase.
    pub ticks_on: u32,
    /// Ticks of a quiet phase; 0: there is none.
    pub ticks_off: u32,
    /// 1: random pages, 0: sweeping.
    pub random: u32,
    /// Divisor of the timer's 1 193 182 Hz.
    pub divisor: u32,
    /// Blocks of 4 KiB of its disk; 0: it has none.
    pub disk_blocks: u32,
    /// Disk writes per tick, as a 16.16 fixed-point number, at most one.
    pub disk_rate: u32,
    /// 1: it has a balloon, 0: it has none.
    pub balloon: u32,
}

impl Params {
    /// The parameters as words, in the order of rom.S.
    #[must_use]
    pub fn words(&self) -> [u32; PARAMS] {
        [
            self.end_page,
            self.base_page,
            self.pages,
            self.rate,
            self.ticks_on,
            self.ticks_off,
            self.random,
            self.divisor,
            self.disk_blocks,
            self.disk_rate,
            self.balloon,
        ]
    }

    /// The ROM of a guest with these parameters.
    #[must_use]
    pub fn rom(&self) -> Vec<u8> {
        let code = sys::rom_code();
        let mut rom = vec![0xf4; ROM_SIZE - code.len()];
        let start = rom.len();
        rom.extend_from_slice(code);
        for (slot, word) in rom[start..].chunks_exact_mut(4).zip(self.words()) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        rom
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rom_is_64_kib_and_jumps_at_the_reset_vector() {
        let spec: GuestSpec = "web:128MiB:1MB/s:8MiB".parse().unwrap();
        let rom = spec.rom();
        assert_eq!(rom.len(), ROM_SIZE);
        assert_eq!(sys::rom_code().len(), 4096);
        assert_eq!(rom[0xfff0], 0xea, "a far jump");
        assert_eq!(&rom[0xfff3..0xfff5], &[0x00, 0xf0], "to segment F000");
        assert_eq!(rom[0xf000..0xf004], (128_u32 * 256).to_le_bytes());
    }
}
