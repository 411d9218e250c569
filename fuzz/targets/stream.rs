//! What may come in over the network on a stream: the hello, and the return path through the gate.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidecar::relay::hello::Hello;
use sidecar::relay::return_path::AckGate;

fuzz_target!(|pieces: Vec<Vec<u8>>| {
    let all = pieces.concat();
    if Hello::missing(&all) == 0 {
        if let Ok(hello) = Hello::decode(&all) {
            assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }
    }
    let mut gate = AckGate::new();
    let mut out = Vec::new();
    for piece in &pieces {
        if gate.pass(piece, &mut out).is_err() {
            return;
        }
    }
    // Nothing is made up: what passed and what is kept is no more than what came.
    assert!(out.len() + gate.open().len() <= all.len());
});
