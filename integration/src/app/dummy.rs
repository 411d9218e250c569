//! A stream of the same bytes at the same pace as a move's, without a move: what the application
//! feels of the traffic alone.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use coordinator::MoveReport;

use crate::net::Host;
use crate::signals::Interrupt;

/// Sent this often, as a pacer does.
const STEP: Duration = Duration::from_millis(5);
const BLOCK: usize = 64 << 10;
const STALL_LIMIT: Duration = Duration::from_secs(10);

/// Bytes sent until a time since a move began; both grow.
pub(super) type Pace = Vec<(Duration, u64)>;

/// The pace of a move's streams, all together, as they were reported.
pub(super) fn pace(movement: &MoveReport) -> Pace {
    let mut reports: Vec<(i64, usize, u64)> = Vec::new();
    for (vm, moved) in movement.vms.iter().enumerate() {
        let of_it = moved.samples.iter();
        reports.extend(of_it.map(|sample| (sample.at_us, vm, sample.transferred_bytes)));
    }
    reports.sort_unstable();
    let mut sent = vec![0; movement.vms.len()];
    let mut pace = vec![(Duration::ZERO, 0)];
    let mut most = 0;
    for (at_us, vm, bytes) in reports {
        sent[vm] = bytes.max(sent[vm]);
        let after = u64::try_from(at_us - movement.started_at_us).unwrap_or(0);
        most = most.max(sent.iter().sum());
        pace.push((Duration::from_micros(after), most));
    }
    let end = Duration::from_secs_f64(movement.total_s.max(0.0));
    pace.retain(|(at, _)| *at < end);
    pace.push((end, movement.sent_bytes.max(most)));
    pace
}

/// How many bytes are to be sent by then.
fn due(pace: &[(Duration, u64)], at: Duration) -> u64 {
    let after = pace.partition_point(|(time, _)| *time <= at);
    let Some((from, sent)) = after.checked_sub(1).and_then(|last| pace.get(last)) else {
        return 0;
    };
    let Some((to, then)) = pace.get(after) else {
        return *sent;
    };
    let share = (at - *from).as_secs_f64() / (*to - *from).as_secs_f64();
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a part of the bytes of one move, far below 2^53"
    )]
    let more = ((then - sent) as f64 * share) as u64;
    sent + more
}

/// Sends as a move did, from one host to another; returns when all has arrived.
pub(super) fn send(
    from: &Host,
    to: &Host,
    pace: &[(Duration, u64)],
    interrupt: &Interrupt,
) -> Result<()> {
    let listener = to.enter(|| TcpListener::bind((to.address(), 0)))??;
    let address = listener.local_addr()?;
    let mut stream = from.enter(|| TcpStream::connect_timeout(&address, STALL_LIMIT))??;
    let (mut sink, _) = listener.accept()?;
    sink.set_read_timeout(Some(STALL_LIMIT))?;
    stream.set_write_timeout(Some(STALL_LIMIT))?;
    std::thread::scope(|scope| {
        let sink = scope.spawn(move || drain(&mut sink));
        let block = vec![0x5a; BLOCK];
        let (began, mut sent) = (Instant::now(), 0);
        let all = pace.last().map_or(0, |(_, bytes)| *bytes);
        while sent < all {
            interrupt.sleep(STEP)?;
            let behind = due(pace, began.elapsed()).saturating_sub(sent);
            let mut left = usize::try_from(behind).unwrap_or(BLOCK);
            while left > 0 {
                let part = left.min(BLOCK);
                stream.write_all(&block[..part])?;
                left -= part;
            }
            sent += behind;
        }
        drop(stream);
        let arrived = sink.join().map_err(|_| anyhow::anyhow!("the sink broke"))?;
        arrived.context("the dummy stream did not arrive")
    })
}

fn drain(sink: &mut TcpStream) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    while sink.read(&mut block)? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_due_as_they_were_sent() {
        let pace = [(0, 0), (2, 200), (2, 260), (4, 300)].map(|(s, b)| (Duration::from_secs(s), b));
        let at = |ms| due(&pace, Duration::from_millis(ms));
        assert_eq!(
            [at(0), at(500), at(2000), at(3000), at(9000)],
            [0, 50, 260, 280, 300]
        );
        assert_eq!(due(&[], Duration::ZERO), 0);
    }
}
