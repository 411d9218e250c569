//! What a QEMU, or what pretends to be one, may say on its monitor, between commands of ours.
#![no_main]

use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use sidecar::qmp::QmpClient;

fuzz_target!(|pieces: Vec<(Vec<u8>, bool)>| {
    let now = Instant::now();
    let mut qmp = QmpClient::new(now);
    for (tag, (piece, ask)) in pieces.into_iter().enumerate() {
        if ask {
            let nothing = Default::default();
            qmp.send(now, tag, "query-status", nothing, Duration::from_secs(1));
        }
        qmp.receive(&piece);
        loop {
            match qmp.poll(now) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
        qmp.written(qmp.output().len());
    }
});
