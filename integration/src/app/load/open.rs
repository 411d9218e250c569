//! An open loop: requests at moments that are fixed beforehand, whatever becomes of those before.
//!
//! A response time counts from the moment at which its request was meant to be sent, so a system
//! that stands still is charged with every request that it keeps waiting, and not with one per
//! connection (coordinated omission). Workers hold one connection each and take the next request that
//! is due; connections are opened before the first, and one that is lost is opened again and counted.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};

use super::client::Client;
use super::dice::Dice;
use super::{Action, Ending, LIMIT, Line, LoadSpec, STEP, Shape, Told, choose};
use crate::clock::Micros;

/// Requests that are due and not taken yet; more are counted as failed.
const WAITING: usize = 65_536;

#[derive(Debug, Clone, Copy)]
struct Order {
    action: Action,
    due: Micros,
    number: u64,
    id: u64,
}

/// Connects, and starts the threads, in the caller's namespace.
pub(super) fn start(
    spec: &LoadSpec,
    rate: Shape,
    connections: usize,
    end: &Arc<AtomicBool>,
    told: &Told,
) -> io::Result<Vec<JoinHandle<()>>> {
    let (orders, due) = bounded::<Order>(WAITING);
    let mut threads = Vec::new();
    for _ in 0..connections {
        let line = Line {
            front: spec.front,
            kept: Some(Client::connect(spec.front, LIMIT)?),
        };
        let (due, told) = (due.clone(), told.clone());
        threads.push(std::thread::spawn(move || work(line, &due, &told)));
    }
    let (writes, end, told) = (spec.writes, Arc::clone(end), told.clone());
    threads.push(std::thread::spawn(move || {
        order(writes, rate, &end, &orders, &told);
    }));
    Ok(threads)
}

/// Makes every request due at its moment.
fn order(writes: f64, rate: Shape, end: &AtomicBool, orders: &Sender<Order>, told: &Told) {
    let start = Micros::now();
    let mut dice = Dice(1);
    let mut at_s = 0.0;
    for number in 1.. {
        at_s = rate.next_due(at_s);
        let due = start + Duration::from_secs_f64(at_s);
        loop {
            if end.load(Ordering::Relaxed) {
                return;
            }
            let left = due.since(Micros::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(STEP));
        }
        let action = choose(writes, dice.roll(), dice.roll());
        let order = Order {
            action,
            due,
            number,
            id: u64::from(dice.next()),
        };
        told.begin((due, number));
        if orders.try_send(order).is_err() {
            told.tell((due, number), action, Ending::Lost);
        }
    }
}

/// Sends what is due over one connection.
fn work(mut line: Line, due: &Receiver<Order>, told: &Told) {
    for order in due {
        if told.abandoned.load(Ordering::Relaxed) {
            return;
        }
        let ending = line.ask(order.action, order.id);
        told.tell((order.due, order.number), order.action, ending);
    }
}
