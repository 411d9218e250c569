//! What an application file leaves out is measured through the sidecars, before a plan or a move.
//!
//! - `paths`: the bandwidth between the hosts, by probes that are bounded in time and bytes.
//! - `loads`: what a VM dirties, by the measurement that `muster dirty` shows.
//! - `again`: the same of VMs whose groups wait, while others move.
//! - [`crate::traffic`]: what the VMs send each other, where the file tells them apart.
//!
//! What the file says stands. Of a bandwidth that is given and probed as well, the lower counts.
//! What cannot be measured is said in a note, and the plan goes on without it as far as it can.

mod again;
mod loads;
mod paths;

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU8;
use std::time::Duration;

use rate_limiter::BytesPerSecond;

use crate::application::{Application, HostId, Policy, VmId, VmProfile};
use crate::client::Client;
use crate::scheduler::plan::Stage;
use crate::traffic::{self, Counted};

pub use again::Again;
pub use loads::{INTERVAL, INTERVALS};

/// Traffic is counted for so long.
const TRAFFIC_FOR: Duration = Duration::from_secs(5);
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// What is to be measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The bandwidth.
    pub bandwidth: bool,
    /// What these VMs dirty.
    pub vms: Vec<VmId>,
    /// Their dirty set after the bulk copy too.
    pub dirty_set: bool,
    /// What they send each other.
    pub traffic: bool,
}

/// Why nothing could be planned with what was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SurveyError {
    /// The bandwidth is neither given nor was it found.
    #[error(
        "the bandwidth could not be probed: {}; set `bandwidth` in [application]",
        errors.join("; ")
    )]
    Bandwidth {
        /// Why, path by path.
        errors: Vec<String>,
    },
    /// Less was found than is to be kept.
    #[error(
        "`reserve` ({reserve}) leaves nothing of the bandwidth that was found ({found}): lower it, \
         or move when the network is quieter"
    )]
    Reserve {
        /// What is to be kept.
        reserve: BytesPerSecond,
        /// What there is.
        found: BytesPerSecond,
    },
}

fn lacks(profile: &VmProfile, dirty_set: bool) -> bool {
    let rates = profile.dirty_rate.is_none() || profile.max_dirty_rate.is_none();
    let sizes = profile.memory.is_none() || profile.writable_working_set.is_none();
    rates || sizes || (dirty_set && profile.dirty_set.is_none())
}

impl Wanted {
    /// What the file leaves out and lets be measured, for a plan of this stage.
    #[must_use]
    pub fn of(app: &Application, stage: Stage) -> Self {
        let dirty_set = stage == Stage::Two;
        let vms = app.vm_ids();
        let lacking = vms.filter(|&id| app.measure && lacks(&app.vm(id).profile, dirty_set));
        Self {
            bandwidth: app.probe,
            vms: lacking.collect(),
            dirty_set,
            traffic: app.measure && app.traffic.is_empty() && traffic::can_count(app),
        }
    }

    /// What a move needs of that: only *lll* and *muster* ask what the VMs dirty beforehand, and of a
    /// single VM there is nothing to choose.
    #[must_use]
    pub fn of_move(app: &Application, policy: Policy) -> Self {
        let mut wanted = Self::of(app, Stage::Whole);
        if !matches!(policy, Policy::Lll | Policy::Muster) || app.vms.len() < 2 {
            wanted.vms.clear();
        }
        wanted
    }

    /// Whether there is nothing to measure.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.bandwidth && self.vms.is_empty() && !self.traffic
    }

    /// What is about to be done, for people.
    #[must_use]
    pub fn describe(&self, app: &Application) -> String {
        let mut parts = Vec::new();
        if self.bandwidth {
            parts.push("probing the bandwidth".to_owned());
        }
        if !self.vms.is_empty() {
            let names: Vec<&str> = self.vms.iter().map(|&id| &*app.vm(id).name).collect();
            let time = INTERVAL * INTERVALS;
            parts.push(format!("measuring {} for {time:?}", names.join(", ")));
        }
        if self.traffic {
            parts.push(format!("counting traffic for {TRAFFIC_FOR:?}"));
        }
        parts.join(", then ")
    }
}

/// Measures what is wanted and fills it in; what was measured, and what could not be, as notes.
/// The sidecars must be connected. An interrupt ends it early.
///
/// # Errors
/// No bandwidth is known afterwards.
pub fn complete(
    app: &mut Application,
    wanted: &Wanted,
    client: &Client,
    interrupt: &AtomicU8,
) -> Result<Vec<String>, SurveyError> {
    let mut notes = Vec::new();
    // The path first: measurements take none of it.
    if wanted.bandwidth {
        let found = paths::probe(app, client, interrupt);
        take_bandwidth(app, found, &mut notes)?;
    }
    let (counted, found) = std::thread::scope(|scope| {
        let shared = &*app;
        let counted = wanted
            .traffic
            .then(|| scope.spawn(|| traffic::count(shared, client, TRAFFIC_FOR)));
        let found = loads::measure(shared, wanted, interrupt);
        (counted.and_then(|thread| thread.join().ok()), found)
    });
    match counted {
        Some(Ok(counted)) => notes.push(take_traffic(app, &counted)),
        Some(Err(error)) => notes.push(format!(
            "{error}: what the VMs send each other is not known"
        )),
        None => {}
    }
    for (id, result) in found {
        let name = app.vm(id).name.clone();
        match result {
            Ok(load) => notes.push(load.fill(&name, &mut app.vms[id.0].profile, wanted.dirty_set)),
            Err(error) => notes.push(format!(
                "{error}: what {name} dirties is not known beforehand"
            )),
        }
    }
    Ok(notes)
}

/// Does it for a plan, with connections of its own: a plan can do without. `say` is told what is
/// going on.
///
/// # Errors
/// As for [`complete`], where a sidecar was there.
pub fn before_a_plan(
    app: &mut Application,
    stage: Stage,
    interrupt: &AtomicU8,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<String>, SurveyError> {
    let wanted = Wanted::of(app, stage);
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let ends = app.vms.iter().flat_map(|vm| [vm.from, vm.to]);
    let hosts: BTreeSet<HostId> = ends.collect();
    let hosts: Vec<HostId> = hosts.into_iter().collect();
    let client = Client::connect(app, &hosts);
    let connected = client.wait_connected(CONNECT_WITHIN);
    if !connected.iter().any(|(_, result)| result.is_ok()) {
        let errors = connected.iter().filter_map(|(host, result)| {
            let error = result.as_ref().err()?;
            Some(format!("host {}: {error}", app.host(*host).name))
        });
        let errors: Vec<String> = errors.collect();
        return Ok(vec![format!(
            "nothing was measured, no sidecar answers: {}",
            errors.join("; ")
        )]);
    }
    say(&wanted.describe(app));
    complete(app, &wanted, &client, interrupt)
}

fn take_traffic(app: &mut Application, counted: &Counted) -> String {
    app.traffic = counted.traffic();
    let pair = |pair: &traffic::Pair| {
        let rate = BytesPerSecond(pair.rate_bytes_per_s);
        format!("{} {rate}", pair.between.join("-"))
    };
    let pairs: Vec<String> = counted.pairs.iter().map(pair).collect();
    let found = match pairs.is_empty() {
        true => "none between VMs".to_owned(),
        false => pairs.join(", "),
    };
    format!("traffic, counted for {:.1} s: {found}", counted.duration_s)
}

fn take_bandwidth(
    app: &mut Application,
    found: paths::Found,
    notes: &mut Vec<String>,
) -> Result<(), SurveyError> {
    let given = app.allowance.bandwidth;
    notes.extend(found.notes);
    let probed = match (found.rate, given) {
        (Some(rate), _) => rate,
        (None, Some(given)) => {
            notes.push(format!(
                "the bandwidth could not be probed ({}); the file's {given} counts",
                found.errors.join("; ")
            ));
            return Ok(());
        }
        (None, None) => {
            let errors = found.errors;
            return Err(SurveyError::Bandwidth { errors });
        }
    };
    if let Some(given) = given {
        let lower = if probed < given { "probe's" } else { "file's" };
        notes.push(format!(
            "bandwidth: the file says {given}; the {lower} rate counts, the lower one"
        ));
    }
    let rate = given.map_or(probed, |given| given.min(probed));
    app.allowance.bandwidth = Some(rate);
    let reserve = app.allowance.reserve;
    if app.allowance.usable().is_none() {
        return Err(SurveyError::Reserve {
            reserve,
            found: rate,
        });
    }
    if reserve.0 > 0 {
        notes.push(format!(
            "{reserve} of {rate} stay reserved for the application"
        ));
    }
    Ok(())
}

/// A time as it stands in notes.
fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn app(keys: &str, vm: &str) -> Application {
        let text = format!(
            "version = 1\n[application]\nname = \"shop\"\n{keys}\n\
             [[host]]\nname = \"a\"\ncontrol = \"unix:/a\"\n\
             [[host]]\nname = \"b\"\ncontrol = \"unix:/b\"\n\
             [[vm]]\nname = \"db\"\nuuid = \"6f1c1c1e-8a52-4b6e-9a4e-3f0b3a6c1d01\"\n\
             from = \"a\"\nto = \"b\"\n{vm}\n"
        );
        Application::parse(&text, Path::new("shop.toml")).expect("good")
    }

    const ALL: &str = "memory = \"1GB\"\ndirty-rate = \"1MB/s\"\nmax-dirty-rate = \"2MB/s\"\n\
                       writable-working-set = \"8MB\"";

    #[test]
    fn only_what_the_file_leaves_out_is_wanted() {
        let wanted = |keys: &str, vm: &str| Wanted::of(&app(keys, vm), Stage::Whole);
        assert!(wanted("bandwidth = \"1MB/s\"", ALL).is_empty());
        assert!(wanted("", ALL).bandwidth);
        for line in ALL.lines() {
            let less = ALL.replace(line, "");
            let found = wanted("bandwidth = \"1MB/s\"", &less);
            assert_eq!(found.vms, [VmId(0)], "{line}");
            assert!(wanted("bandwidth = \"1MB/s\"\nmeasure = false", &less).is_empty());
        }
        assert!(!wanted("", "").traffic, "nobody is told apart");
        let two = Wanted::of(&app("bandwidth = \"1MB/s\"", ALL), Stage::Two);
        assert_eq!(two.vms, [VmId(0)]);
    }

    #[test]
    fn traffic_is_wanted_where_the_file_has_none_and_tells_vms_apart() {
        let other = "mac = \"52:54:00:00:00:0a\"\n[[vm]]\nname = \"web\"\n\
                     uuid = \"6f1c1c1e-8a52-4b6e-9a4e-3f0b3a6c1d02\"\nfrom = \"a\"\nto = \"b\"\n\
                     mac = \"52:54:00:00:00:0b\"\n";
        let given = "[[traffic]]\nbetween = [\"db\", \"web\"]\nrate = \"1MB/s\"\n";
        let wanted = |keys: &str, vms: &str| Wanted::of(&app(keys, vms), Stage::Whole);
        assert!(wanted("", other).traffic);
        assert!(!wanted("measure = false", other).traffic);
        assert!(!wanted("", &format!("{other}{given}")).traffic);
        let moved = Wanted::of_move(&app("", other), Policy::Parallel);
        assert!(moved.traffic && moved.vms.is_empty());
    }

    fn found(rate: Option<u64>) -> paths::Found {
        paths::Found {
            rate: rate.map(BytesPerSecond),
            notes: Vec::new(),
            errors: vec!["a to b: refused".into()],
        }
    }

    #[test]
    fn the_lower_of_file_and_probe_counts() {
        let take = |keys: &str, rate| {
            let mut app = app(keys, ALL);
            let mut notes = Vec::new();
            take_bandwidth(&mut app, found(rate), &mut notes)
                .map(|()| (app.allowance.usable().map(|rate| rate.0), notes.join("\n")))
        };
        let mb = 1_000_000;
        let (usable, _) = take("", Some(40 * mb)).expect("found");
        assert_eq!(usable, Some(40 * mb));
        let keys = "bandwidth = \"50MB/s\"\nprobe = true\nreserve = \"5MB/s\"";
        let (usable, notes) = take(keys, Some(40 * mb)).expect("found");
        assert_eq!(usable, Some(35 * mb), "{notes}");
        let (usable, notes) = take(keys, Some(60 * mb)).expect("found");
        assert_eq!(usable, Some(45 * mb), "{notes}");
        let (usable, notes) = take(keys, None).expect("given");
        assert_eq!(usable, Some(45 * mb));
        assert!(notes.contains("refused"), "{notes}");
        let nothing = take("", None).expect_err("not known");
        assert!(nothing.to_string().contains("set `bandwidth`"), "{nothing}");
        let all = take("reserve = \"5MB/s\"", Some(5 * mb)).expect_err("all reserved");
        assert!(matches!(all, SurveyError::Reserve { .. }), "{all}");
    }
}
