//! Tables of what is watched beside the users: the WAN that is shared, spacing, and the search.

use super::{Run, row};
use crate::app::search::{Search, told};

/// What migration traffic leaves the application.
pub(super) fn shared(runs: &[Run]) -> Vec<Vec<String>> {
    let mut rows = vec![row(&[
        "policy",
        "before",
        "in pre-copy",
        "relative",
        "stream alone",
        "relative",
    ])];
    for run in runs {
        let (before, precopy) = (run.feel.before_p95_ms, run.feel.precopy_p95_ms);
        let mut cells = vec![
            run.title(),
            format!("{before:.0} ms"),
            format!("{precopy:.0} ms"),
            times(precopy / before),
        ];
        if let Some(alone) = &run.dummy {
            cells.push(format!("{:.0} ms", alone.p95_ms));
            cells.push(times(precopy / alone.p95_ms));
        }
        rows.push(cells);
    }
    rows
}

fn times(factor: f64) -> String {
    if factor.is_finite() {
        format!("{factor:.2}×")
    } else {
        "?".to_owned()
    }
}

/// When the next move could begin.
pub(super) fn spacings(runs: &[Run]) -> Vec<Vec<String>> {
    let after = |seconds: Option<f64>| {
        seconds.map_or_else(
            || "not while it was watched".to_owned(),
            |seconds| format!("{seconds:.1} s"),
        )
    };
    let mut rows = vec![row(&[
        "policy",
        "every action within its limit",
        "all within 10 % of before",
    ])];
    rows.extend(runs.iter().map(|run| {
        vec![
            run.title(),
            after(run.spacing.within_limits_s),
            after(run.spacing.as_before_s),
        ]
    }));
    rows
}

/// How the WAN changed.
pub(super) fn changes(runs: &[Run]) -> Vec<Vec<String>> {
    let mut rows = vec![row(&[
        "policy",
        "since the move began",
        "the WAN from then on",
    ])];
    for run in runs {
        rows.extend(run.wan_changes.iter().map(|mark| {
            let at = format!("{:.2} s", mark.at_s);
            vec![run.title(), at, mark.what.clone()]
        }));
    }
    rows
}

/// The loads that were tried.
pub(super) fn tries(search: &Search) -> Vec<Vec<String>> {
    let mut rows = vec![row(&["load", "of it"])];
    rows.extend(search.tries.iter().map(|tried| {
        let load = format!("{:.1} requests/s", tried.rate);
        vec![load, told(&tried.violated)]
    }));
    rows.push(vec!["found".to_owned(), search.text()]);
    rows
}
