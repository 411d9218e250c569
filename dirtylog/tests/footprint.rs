//! How well footprints are predicted on traces of known shape.
//!
//! `cargo test -p dirtylog --test footprint -- --nocapture` prints the errors.

mod traces;

use traces::{Errors, Trace, jittered_phases, phases, random_phases, sweep, uniform, zipf};

/// Measures and prints them.
fn errors(name: &str, trace: Trace, warm_up: u32, ticks: u32) -> Errors {
    let errors = traces::errors(trace, warm_up, ticks);
    let percent = [errors.mean, errors.phased, errors.linear, errors.next_write].map(|e| e * 100.0);
    let [mean, phased, linear, next_write] = percent;
    println!(
        "{name:>16}: mean {mean:5.1} %  phased {phased:5.1} %  linear {linear:5.1} %  next write {next_write:5.1} %"
    );
    errors
}

#[test]
fn stationary_traces_are_predicted_within_5_percent() {
    for (name, trace) in [("uniform", uniform()), ("zipf", zipf()), ("sweep", sweep())] {
        let errors = errors(name, trace, 100, 400);
        assert!(errors.mean <= 0.05, "{name}: {errors:?}");
        // Whoever does not know whether a guest has phases loses little by assuming it.
        assert!(errors.phased <= 0.05, "{name}: {errors:?}");
    }
}

#[test]
fn phases_of_30_seconds_are_predicted_within_25_percent() {
    let exact = errors("on-off 30 s", phases(), 180, 900);
    assert!(exact.phased <= 0.25, "{exact:?}");
    assert!(exact.phased < exact.mean / 2.0, "{exact:?}");
    assert!(
        exact.phased < exact.linear.min(exact.next_write),
        "{exact:?}"
    );

    let jittered = errors("on-off 27-33 s", jittered_phases(), 300, 1200);
    assert!(jittered.phased <= 0.25, "{jittered:?}");
}

/// Not a promise but a warning: nobody can know when a random phase ends.
#[test]
fn random_phases_are_hard() {
    let errors = errors("on-off random", random_phases(), 300, 1200);
    assert!(errors.phased < errors.mean, "{errors:?}");
}
