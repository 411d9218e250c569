//! What a plan says of a move, and how far the move went from it.
//!
//! The plan is made as `muster plan` makes it, from the application file; guest memory that it does
//! not name is taken from what QEMU said. Nothing else that was measured goes into it.

use rate_limiter::Bytes;
use serde::Serialize;

use super::{GroupMove, VmMove};
use crate::application::{Application, Policy};
use crate::scheduler::order::Search;
use crate::scheduler::plan::{Inputs, Plan, PlannedDeadline, Stage, plan};

/// Predicted against actual, for one move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// Why nothing could be predicted; then the rest is missing.
    pub reason: Option<String>,
    /// Until the last VM has arrived, in seconds.
    pub completion_s: Option<Compared>,
    /// Sent in all, in bytes.
    pub traffic_bytes: Option<Compared>,
    /// The longest stop of a group, from its first STOP to its last RESUME, in seconds.
    pub downtime_s: Option<Compared>,
    /// Communication impact in bytes (COMMA 2.2, Eq. 1).
    pub impact_bytes: Option<Compared>,
    /// The file's deadline beside what the slowest group was predicted to need.
    pub deadline: Option<PlannedDeadline>,
    /// The VMs, in the application file's order; empty where nothing could be predicted.
    pub vms: Vec<PredictedVm>,
}

/// Predicted against actual, for one VM.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PredictedVm {
    /// Its name.
    pub name: String,
    /// When it runs at its destination, in seconds from the begin of the move.
    pub finish_s: Compared,
}

/// One quantity, predicted and actual.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Compared {
    /// As planned.
    pub predicted: f64,
    /// As it was; `None` where the move was not committed.
    pub actual: Option<f64>,
    /// (predicted − actual) / actual, in percent; `None` without an actual value, or where it is 0.
    pub error_percent: Option<f64>,
}

impl Compared {
    fn new(predicted: f64, actual: Option<f64>) -> Self {
        let error = |actual: f64| (predicted - actual) / actual * 100.0;
        Self {
            predicted,
            actual,
            error_percent: actual.filter(|actual| *actual != 0.0).map(error),
        }
    }
}

/// What `policy` is predicted to do with the application. `memory` is the VMs' guest memory, in the
/// file's order, for those whose file does not name it, or names more; 0 where it is not known.
///
/// # Errors
/// Why nothing can be predicted: the file does not say enough, or the VMs do not converge.
pub fn predict(app: &Application, policy: Policy, memory: &[Bytes]) -> Result<Plan, String> {
    let mut outline = app.outline();
    for (vm, found) in outline.vms.iter_mut().zip(memory) {
        let found = Some(*found).filter(|bytes| bytes.0 > 0);
        let known = vm.profile.memory;
        // What was taken from a guest was not there to be sent.
        let least = known.map(|known| found.map_or(known, |found| known.min(found)));
        vm.profile.memory = least.or(found);
    }
    let one_line = |text: String| text.replace('\n', "; ");
    let inputs =
        Inputs::new(&outline, Stage::Whole).map_err(|error| one_line(error.to_string()))?;
    let plan = plan(&inputs, policy, Search::Auto).map_err(|error| one_line(error.to_string()))?;
    match &plan.reason {
        Some(reason) if !plan.converges => Err(reason.clone()),
        _ => Ok(plan),
    }
}

/// What a committed move came to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Actual<'a> {
    pub started_at_us: i64,
    pub completion_s: f64,
    pub traffic_bytes: f64,
    pub impact_bytes: f64,
    pub vms: &'a [VmMove],
    pub groups: &'a [GroupMove],
}

impl Actual<'_> {
    /// The longest stop of a group, in seconds.
    fn downtime_s(&self) -> Option<f64> {
        let stop = |group: &GroupMove| {
            let of = |vm: &&VmMove| group.vms.contains(&vm.name);
            let members = || self.vms.iter().filter(of);
            let first = members().filter_map(|vm| vm.stopped_at_us).min()?;
            let last = members().filter_map(|vm| vm.resumed_at_us).max()?;
            Some(seconds(first, last))
        };
        self.groups.iter().filter_map(stop).reduce(f64::max)
    }
}

impl Prediction {
    /// A plan, or why there is none, beside what the move came to (`None`: it was not committed).
    pub(super) fn beside(plan: Result<Plan, String>, actual: Option<&Actual<'_>>) -> Self {
        let plan = match plan {
            Ok(plan) => plan,
            Err(reason) => return Self::none(reason),
        };
        let compare = |predicted: Option<f64>, value: &dyn Fn(&Actual<'_>) -> Option<f64>| {
            Some(Compared::new(predicted?, actual.and_then(value)))
        };
        let vms = plan.vms.iter().map(|planned| PredictedVm {
            name: planned.name.clone(),
            finish_s: Compared::new(
                planned.finish_s,
                actual.and_then(|actual| {
                    let vm = actual.vms.iter().find(|vm| vm.name == planned.name)?;
                    Some(seconds(actual.started_at_us, vm.resumed_at_us?))
                }),
            ),
        });
        Self {
            reason: None,
            completion_s: compare(plan.completion_s, &|actual| Some(actual.completion_s)),
            traffic_bytes: compare(plan.traffic_bytes, &|actual| Some(actual.traffic_bytes)),
            downtime_s: compare(plan.downtime_s, &|actual| actual.downtime_s()),
            impact_bytes: compare(plan.impact_bytes, &|actual| Some(actual.impact_bytes)),
            deadline: plan.deadline,
            vms: vms.collect(),
        }
    }

    /// Nothing was predicted.
    pub(super) fn none(reason: String) -> Self {
        Self {
            reason: Some(reason),
            completion_s: None,
            traffic_bytes: None,
            downtime_s: None,
            impact_bytes: None,
            deadline: None,
            vms: Vec::new(),
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "microseconds of one move")]
fn seconds(from_us: i64, to_us: i64) -> f64 {
    to_us.saturating_sub(from_us) as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::report::example;

    const FILE: &str = r#"
        version = 1
        application = { name = "shop", bandwidth = "50MB/s" }
        host = [{ name = "a", control = "unix:/a" }, { name = "b", control = "unix:/b" }]
        vm = [
          { name = "web", uuid = "00000000-0000-0000-0000-000000000001", from = "a", to = "b",
            memory = "100MB", dirty-rate = "1MB/s" },
          { name = "app", uuid = "00000000-0000-0000-0000-000000000002", from = "a", to = "b",
            memory = "200MB", dirty-rate = "1MB/s" },
          { name = "db", uuid = "00000000-0000-0000-0000-000000000003", from = "a", to = "b",
            memory = "300MB", dirty-rate = "1MB/s" },
        ]
    "#;

    fn app(text: &str) -> Application {
        Application::parse(text, Path::new("test")).expect("good")
    }

    #[test]
    fn a_move_stands_beside_its_plan() {
        let plan = predict(&app(FILE), Policy::Muster, &[]).expect("converges");
        assert!(plan.completion_s.is_some_and(|s| s > 12.0 && s < 13.0));
        let report = &example::three_policies()[2];
        let actual = Actual {
            started_at_us: report.started_at_us,
            completion_s: report.total_s,
            traffic_bytes: 6e8,
            impact_bytes: 0.0,
            vms: &report.vms,
            groups: &report.groups,
        };
        let found = Prediction::beside(Ok(plan.clone()), Some(&actual));
        let completion = found.completion_s.expect("predicted");
        let error = (plan.completion_s.unwrap_or_default() / report.total_s - 1.0) * 100.0;
        assert!((completion.error_percent.expect("an error") - error).abs() < 1e-9);
        // From the first STOP to the last RESUME.
        let downtime = found.downtime_s.and_then(|one| one.actual);
        assert!(
            downtime.is_some_and(|s| (s - 0.13).abs() < 1e-6),
            "{downtime:?}"
        );
        // Nothing is divided by 0.
        assert_eq!(found.impact_bytes.map(|one| one.error_percent), Some(None));
        assert_eq!(found.vms.len(), 3);
        let db = found.vms[2].finish_s.actual;
        assert!(db.is_some_and(|s| (s - 24.3).abs() < 1e-6), "{db:?}");
        // A move that was rolled back has nothing to be held against.
        let found = Prediction::beside(Ok(plan), None);
        let completion = found.completion_s.expect("predicted");
        assert_eq!((completion.actual, completion.error_percent), (None, None));
    }

    #[test]
    fn memory_that_the_file_leaves_out_is_what_qemu_says() {
        let known = predict(&app(FILE), Policy::Sequential, &[]);
        let without = app(&FILE.replace("memory = \"100MB\", ", ""));
        let measured = [Bytes(100_000_000), Bytes(1 << 40), Bytes(0)];
        assert_eq!(predict(&without, Policy::Sequential, &measured), known);
        // Of a ballooned guest there is less than the file says.
        let ballooned = [Bytes(50_000_000), Bytes(0), Bytes(0)];
        let less = predict(&without, Policy::Sequential, &ballooned).expect("a plan");
        let all = known.expect("a plan");
        assert!(less.traffic_bytes < all.traffic_bytes, "{less:?}");
    }

    #[test]
    fn nothing_is_predicted_without_a_reason() {
        let without = app(&FILE.replace(", dirty-rate = \"1MB/s\"", ""));
        let reason = predict(&without, Policy::Muster, &[]).expect_err("not enough");
        assert!(reason.contains("VM web: give `dirty-rate`"), "{reason}");
        assert!(!reason.contains('\n'), "{reason}");
        let hot = app(&FILE.replace("dirty-rate = \"1MB/s\"", "dirty-rate = \"70MB/s\""));
        let reason = predict(&hot, Policy::Sequential, &[]).expect_err("does not converge");
        assert!(reason.contains("does not converge"), "{reason}");
        assert_eq!(Prediction::none(reason).completion_s, None);
    }
}
