//! What a control client or another sidecar may send, in any pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidecar::protocol::codec::{read_request, read_server_message};
use sidecar::protocol::lines::{Line, LineBuffer};

fuzz_target!(|pieces: Vec<Vec<u8>>| {
    let mut lines = LineBuffer::new(4096);
    for piece in pieces {
        lines.push(&piece);
        while let Some(line) = lines.next_line() {
            if let Line::Whole(line) = line {
                assert!(line.len() <= 4096);
                let request = read_request(&line);
                if let Ok(command) = request.command {
                    let mut again = command.to_line(1);
                    again.pop();
                    assert_eq!(read_request(&again).command, Ok(command));
                }
                let _ = read_server_message(&line);
            }
        }
    }
});
