//! The middle tier of the testbed's application.
//!
//! Every user action is one HTTP request, and costs a fixed number of turns to the database, one
//! after the other, as an application does that looks up one thing by what it found in another:
//!
//! | request | reads | writes |
//! |---|---|---|
//! | `GET /home` | 2 | |
//! | `GET /search?id=N` | 6 | |
//! | `GET /detail?id=N` | 4 | |
//! | `POST /add?id=N` | 2 | 2 |
//! | `POST /fill?id=N` | | N items |
//! | `GET /count` | how many were added | |
//!
//! A thread serves each connection; connections to the database are kept and shared. It uses
//! nothing but the standard library: it is linked statically and runs in a guest that has no other
//! program of ours.

#![forbid(unsafe_code)]

mod http;
mod redis;

use std::fmt::Write as _;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;

use http::{Request, Status};
use redis::Pool;

/// How many items there are to look up.
const ITEMS: u64 = 4096;
/// The size of an item.
const ITEM_BYTES: usize = 1024;
/// How many are written in one turn when the database is filled.
const FILLED_AT_ONCE: usize = 256;
const COUNTER: &str = "added";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(listen), Some(database)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: muster-app-server LISTEN DATABASE, such as 0.0.0.0:8080 10.0.0.3:6379");
        return ExitCode::from(1);
    };
    match serve(&listen, &database) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("muster-app-server: {error}");
            ExitCode::from(1)
        }
    }
}

fn serve(listen: &str, database: &str) -> io::Result<()> {
    let listener = TcpListener::bind(listen)?;
    let pool = Arc::new(Pool::new(database));
    for connection in listener.incoming() {
        let connection = connection?;
        let pool = Arc::clone(&pool);
        // One that goes wrong is closed: whoever sent it sees that.
        std::thread::spawn(move || drop(converse(connection, &pool)));
    }
    Ok(())
}

fn converse(connection: TcpStream, pool: &Pool) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut connection = http::Connection::new(connection);
    while let Some(request) = connection.next()? {
        match answer(&request, pool) {
            Ok(Some(body)) => connection.reply(Status::Ok, body.as_bytes())?,
            Ok(None) => connection.reply(Status::NotFound, b"no such action\n")?,
            Err(error) => connection.reply(Status::Failed, format!("{error}\n").as_bytes())?,
        }
    }
    Ok(())
}

/// What a request is answered with; nothing if there is no such action.
fn answer(request: &Request, pool: &Pool) -> io::Result<Option<String>> {
    let id = request.id;
    let body = match (request.method.as_str(), request.path.as_str()) {
        ("GET", "/home") => look_up(pool, id, 2)?,
        ("GET", "/search") => look_up(pool, id, 6)?,
        ("GET", "/detail") => look_up(pool, id, 4)?,
        ("POST", "/add") => add(pool, id)?,
        ("POST", "/fill") => fill(pool, id)?,
        ("GET", "/count") => pool.get(COUNTER)?.unwrap_or_else(|| "0".to_owned()),
        _ => return Ok(None),
    };
    Ok(Some(body))
}

/// Reads `turns` items, each found by the one before it.
fn look_up(pool: &Pool, id: u64, turns: u64) -> io::Result<String> {
    let mut body = String::new();
    let mut next = id;
    for _ in 0..turns {
        let key = key(next);
        let item = pool.get(&key)?.unwrap_or_default();
        let _ = writeln!(body, "{key} {}", item.len());
        next = next
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(item.len() as u64 | 1);
    }
    Ok(body)
}

fn add(pool: &Pool, id: u64) -> io::Result<String> {
    let mut body = look_up(pool, id, 2)?;
    pool.set(&key(id), &item(id))?;
    let count = pool.increment(COUNTER)?;
    let _ = writeln!(body, "{count}");
    Ok(body)
}

fn fill(pool: &Pool, count: u64) -> io::Result<String> {
    let count = count.min(ITEMS);
    let items: Vec<(String, String)> = (0..count).map(|id| (key(id), item(id))).collect();
    for some in items.chunks(FILLED_AT_ONCE) {
        pool.set_all(some)?;
    }
    Ok(format!("{count}\n"))
}

fn key(id: u64) -> String {
    format!("item:{}", id % ITEMS)
}

/// An item's text: letters that depend on its number.
fn item(id: u64) -> String {
    let mut state = id | 1;
    let letters = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        char::from(b'a' + (state >> 60) as u8)
    });
    letters.take(ITEM_BYTES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_of_one_size_and_differ() {
        assert_eq!(item(1).len(), ITEM_BYTES);
        assert_ne!(item(1), item(4));
        assert_eq!(key(ITEMS + 3), "item:3");
    }
}
