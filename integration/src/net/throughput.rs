//! What a link really carries: one TCP connection, counted at the receiver.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rate_limiter::{Bytes, BytesPerSecond};

use super::{Host, NetError};

/// TCP has found its rate after this.
const WARM_UP: Duration = Duration::from_millis(500);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const STALL_LIMIT: Duration = Duration::from_secs(2);

/// What one TCP connection carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throughput {
    /// Bytes of payload.
    pub payload: Bytes,
    /// In this time.
    pub time: Duration,
    /// Payload per second. Headers take 4 to 5 % of a link with an MTU of 1500.
    pub rate: BytesPerSecond,
}

/// Sends from one host to another as fast as the link lets, and counts for `time`.
///
/// # Errors
/// If no connection comes about or it stalls.
pub fn throughput(from: &Host, to: &Host, time: Duration) -> Result<Throughput, NetError> {
    let failed = |error| NetError::Traffic {
        from: from.name.clone(),
        to: to.name.clone(),
        error,
    };
    let listener = to
        .enter(|| TcpListener::bind((to.address, 0)))?
        .map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    std::thread::scope(|scope| {
        // Connected before it is accepted: the kernel does that on its own.
        let stream = from
            .enter(|| TcpStream::connect_timeout(&address, CONNECT_LIMIT))?
            .map_err(failed)?;
        let sender = scope.spawn(move || send(stream));
        let result = listener
            .accept()
            .and_then(|(stream, _): (TcpStream, SocketAddr)| receive(stream, time));
        let _ = sender.join();
        result.map_err(failed)
    })
}

/// Sends until the receiver closes.
fn send(mut stream: TcpStream) {
    let block = vec![0x5a; 256 * 1024];
    let _ = stream.set_write_timeout(Some(STALL_LIMIT));
    while stream.write_all(&block).is_ok() {}
}

fn receive(mut stream: TcpStream, time: Duration) -> io::Result<Throughput> {
    let mut block = vec![0; 256 * 1024];
    stream.set_read_timeout(Some(STALL_LIMIT))?;
    let begin = Instant::now();
    let (mut start, mut payload) = (None, 0);
    loop {
        let count = stream.read(&mut block)?;
        let now = Instant::now();
        match start {
            None if now - begin >= WARM_UP => start = Some(now),
            None => {}
            Some(start) => {
                payload += u64::try_from(count).unwrap_or(0);
                let time_taken = now - start;
                if time_taken >= time {
                    return Ok(Throughput {
                        payload: Bytes(payload),
                        time: time_taken,
                        rate: per_second(payload, time_taken),
                    });
                }
            }
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

fn per_second(bytes: u64, time: Duration) -> BytesPerSecond {
    let rate = u128::from(bytes) * 1_000_000_000 / time.as_nanos().max(1);
    BytesPerSecond(u64::try_from(rate).unwrap_or(u64::MAX))
}
