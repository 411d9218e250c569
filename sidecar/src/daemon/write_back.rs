//! Has images of disks that move written back from the page cache all the time.
//!
//! QEMU flushes them while the guest stands still: the source's when it stops, the destination's when its
//! mirror ends (and before that when everything is copied). What had gathered in the page cache until then
//! would be written in that time: half a second and more, on either side.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use crossbeam::channel::{RecvTimeoutError, Sender, bounded};

use super::log;

/// Hardly more than what is written in this time is left for a flush.
const PERIOD: Duration = Duration::from_millis(200);

/// Goes on until it is dropped. On a thread of its own: a file system may hang.
#[derive(Debug)]
pub struct WriteBack {
    _until: Sender<()>,
}

impl WriteBack {
    /// Begins with these images. Where no thread can be started the flush takes longer.
    #[must_use]
    pub fn start(images: Vec<PathBuf>) -> Option<Self> {
        if images.is_empty() {
            return None;
        }
        let (until, ended) = bounded(0);
        let thread = std::thread::Builder::new().name("write-back".into());
        let started = thread.spawn(move || {
            while ended.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                images.iter().for_each(write_back);
            }
        });
        match started {
            Ok(_) => Some(Self { _until: until }),
            Err(error) => {
                log(&format!("images are not written back meanwhile: {error}"));
                None
            }
        }
    }
}

/// An error is QEMU's to find: it flushes the same file.
fn write_back(image: &PathBuf) {
    if let Ok(file) = File::open(image) {
        let _ = file.sync_data();
    }
}
