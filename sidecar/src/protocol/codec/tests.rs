use proptest::prelude::*;

use super::*;
use crate::protocol::lines::LineBuffer;
use uuid::Uuid;

use crate::protocol::dirty::{DirtyEnd, DirtyVmArgs};
use crate::protocol::event::Event;
use crate::protocol::probe::Probed;
use crate::protocol::types::{Role, RoundReport};

#[test]
fn every_command_survives_the_wire() {
    let run = Uuid::from_u128(7);
    let at = RunArgs { run, epoch: 3 };
    for command in [
        Command::QuerySchema,
        Command::Arm(at),
        Command::Abort(at),
        Command::KeepAlive(at),
        Command::QueryRun(super::super::command::QueryRunArgs { run }),
        Command::DirtyStop(DirtyVmArgs { vm: "db".into() }),
    ] {
        let mut text = command.to_line(9);
        text.pop();
        let request = read_request(&text);
        assert_eq!(request.command, Ok(command));
        assert_eq!(request.id, Some(json!(9)));
    }
}

#[test]
fn events_survive_the_wire() {
    let round = RoundReport {
        round: 2,
        sent_bytes: 3,
        dirtied_bytes: 4,
        duration_ms: 5,
    };
    for event in [
        Event::Round {
            vm: "db".into(),
            round,
        },
        Event::Arrived {
            vm: "db".into(),
            role: Role::Destination,
        },
        Event::Status { vms: vec![] },
    ] {
        let envelope = Envelope {
            run: Uuid::from_u128(1),
            seq: 5,
            at_us: 1_500_000,
            event,
        };
        let mut text = event_line(&envelope);
        text.pop();
        let message = read_server_message(&text);
        assert_eq!(message, Ok(Some(ServerMessage::Event(Box::new(envelope)))));
    }
}

#[test]
fn events_of_measurements_belong_to_no_run() {
    let event = DirtyEvent::DirtyEnded {
        vm: "db".into(),
        reason: DirtyEnd::Migration,
        error: None,
    };
    let mut text = dirty_event_line(&event, 1_500_000);
    text.pop();
    let expected = ServerMessage::Dirty {
        event: Box::new(event),
        at_us: 1_500_000,
    };
    assert_eq!(read_server_message(&text), Ok(Some(expected)));
}

#[test]
fn what_a_probe_found_survives_the_wire() {
    let event = ProbeEvent::Probed(Probed {
        probe: Uuid::from_u128(3),
        acked_bytes: 25_000_000,
        duration_us: 500_000,
        bytes_per_s: Some(50_000_000),
        settled: true,
        rtt_us: 300,
        error: None,
    });
    let mut text = probe_event_line(&event, 1_500_000);
    text.pop();
    let expected = ServerMessage::Probe(Box::new(event));
    assert_eq!(read_server_message(&text), Ok(Some(expected)));
}

#[test]
fn wrong_requests_are_answered_not_dropped() {
    for text in [
        "1",
        "{",
        "[]",
        "{}",
        r#"{"execute": 1}"#,
        r#"{"execute": "arm", "exec-oob": "arm"}"#,
        r#"{"execute": "arm"}"#,
        r#"{"execute": "arm", "arguments": []}"#,
        r#"{"execute": "arm", "arguments": {"run": "x", "epoch": 1}}"#,
        r#"{"execute": "query-status", "arguments": {"extra": 1}}"#,
        r#"{"execute": "query-status", "extra": 1}"#,
    ] {
        let request = read_request(text.as_bytes());
        let error = request.command.expect_err(text);
        assert_eq!(error.class, ErrorClass::GenericError, "{text}");
    }
    let unknown = read_request(br#"{"execute": "fly", "id": "a"}"#);
    assert_eq!(
        unknown.command.expect_err("unknown").class,
        ErrorClass::CommandNotFound
    );
    assert_eq!(unknown.id, Some(json!("a")));
}

proptest! {
    #[test]
    fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = read_request(&bytes);
        let _ = read_server_message(&bytes);
        let mut buffer = LineBuffer::new(50);
        buffer.push(&bytes);
        while buffer.next_line().is_some() {}
    }
}
