//! An export whose words can be changed behind the writer's back.

#![allow(dead_code)] // each test crate uses a part of it

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use dirtylog::export::{BlockSpec, Limits, Mode, Reader, Sync, Writer, memfd};

/// A block of `pages` of 4 KiB.
pub fn block(name: &str, pages: u64) -> BlockSpec {
    BlockSpec {
        name: name.to_owned(),
        used_length_bytes: pages * 4096,
    }
}

/// A round of a second.
pub fn sync(round: u64) -> Sync {
    Sync {
        mode: Mode::Measuring,
        round,
        round_ended: true,
        round_begin: Duration::from_secs(round),
        time: Duration::from_secs(round + 1),
        finished: false,
        spent: Duration::ZERO,
    }
}

/// A file with one export in it.
pub struct RawExport(File);

impl RawExport {
    pub fn new(blocks: &[BlockSpec]) -> Self {
        let fd = memfd("raw").unwrap();
        let file = File::from(fd.try_clone().unwrap());
        Writer::new(fd, 4096, blocks)
            .unwrap()
            .begin()
            .finish(sync(1));
        Self(file)
    }

    pub fn reader(&self, limits: Limits) -> Reader {
        Reader::new(self.0.try_clone().unwrap().into(), limits).unwrap()
    }

    pub fn load(&self, word: usize) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, word as u64 * 8).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn store(&self, word: usize, value: u64) {
        let bytes = value.to_le_bytes();
        self.0.write_all_at(&bytes, word as u64 * 8).unwrap();
    }
}
