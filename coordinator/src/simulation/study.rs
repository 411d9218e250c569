//! What a study says: the file format of `scenarios/*.toml`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sidecar::protocol::command::Termination;

use crate::application::{Outline, Policy};

use super::StudyError;

/// The named studies: name and file.
pub const NAMED: [(&str, &str); 5] = [
    (
        "comma-table-2",
        include_str!("scenarios/comma-table-2.toml"),
    ),
    (
        "comma-table-3",
        include_str!("scenarios/comma-table-3.toml"),
    ),
    (
        "comma-table-5",
        include_str!("scenarios/comma-table-5.toml"),
    ),
    (
        "vmbuddies-figures-13-15",
        include_str!("scenarios/vmbuddies-figures-13-15.toml"),
    ),
    (
        "vmbuddies-figure-16",
        include_str!("scenarios/vmbuddies-figure-16.toml"),
    ),
];

/// The study of this name; nothing if there is none.
///
/// # Errors
/// Its file is wrong.
pub fn named(name: &str) -> Option<Result<Study, StudyError>> {
    let (_, text) = NAMED.iter().find(|(known, _)| *known == name)?;
    Some(Study::parse(name, text))
}

/// A set-up, and what its source says of it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Study {
    /// Its name.
    #[serde(skip)]
    pub name: String,
    /// What it is.
    pub title: String,
    /// Where it is from: paper, section, table or figure.
    pub source: String,
    /// The application, in the format of application files.
    #[serde(default)]
    pub application: String,
    /// A file's own application, already read.
    #[serde(skip)]
    pub outline: Option<Outline>,
    /// How the VMs rewrite their writable working sets, where the mean dirty rate is not all.
    pub rewriting: Option<Rewriting>,
    /// What the source leaves open, and what was taken.
    #[serde(default)]
    pub open: Vec<Open>,
    /// Ways to move it.
    pub approach: Vec<Approach>,
    /// Circumstances in which it moves.
    pub case: Vec<Case>,
    /// The source's numbers.
    #[serde(default)]
    pub table: Vec<Table>,
    /// What its text says in words.
    #[serde(default)]
    pub claim: Vec<Claim>,
}

/// D(w) = W·(h·(1 − e^(−w/a)) + (1 − h)·(1 − e^(−w/b))): a hot part of the writable working set is
/// rewritten often, the rest seldom. The times are those of a load with `speed` 1.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rewriting {
    /// h, 0 to 1.
    pub hot_share: f64,
    /// a, in seconds.
    pub hot_s: f64,
    /// b, in seconds.
    pub cold_s: f64,
}

/// An input that the source leaves open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Open {
    /// Which.
    pub what: String,
    /// What was taken, and why.
    pub assumed: String,
    /// Whether it was fitted to a figure that is printed beside ours: that one is then no test.
    #[serde(default)]
    pub fitted: bool,
}

/// When pre-copy of a VM ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// QEMU's: when what remains fits the application's `max-downtime`. Without bounds.
    Qemu,
    /// Xen's: 50 pages, or a number of rounds, or a multiple of the memory.
    Xen,
    /// Also when a round dirties as much as it sends (VMbuddies 4.2).
    #[default]
    Intelligent,
}

impl Ending {
    /// The rule that an application file asks for.
    #[must_use]
    pub fn of(termination: &Termination) -> Self {
        let bounds = (termination.max_rounds, termination.max_memory_factor);
        match bounds {
            _ if termination.stall_rounds.is_some() => Self::Intelligent,
            (None, None) => Self::Qemu,
            _ => Self::Xen,
        }
    }
}

/// Which part of a migration is planned and simulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// All of it.
    #[default]
    Whole,
    /// What is left after the bulk copy: each VM's `dirty-set`.
    Two,
}

/// A way to move an application.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Approach {
    /// Its name.
    pub name: String,
    /// The policy.
    #[serde(deserialize_with = "parsed")]
    pub policy: Policy,
    /// When pre-copy ends.
    #[serde(default)]
    pub termination: Ending,
    /// Whether free memory is taken from the guests first; see [`Study::open`] for how much.
    #[serde(default)]
    pub ballooning: bool,
    /// What is planned and simulated.
    #[serde(default)]
    pub stage: Part,
    /// heuristic, brute, exact, large or auto.
    #[serde(default = "auto")]
    pub search: String,
    /// The order of the VMs, where it is not the file's.
    #[serde(default)]
    pub order: Vec<String>,
    /// Upper limits of single VMs.
    #[serde(default)]
    pub limits: BTreeMap<String, String>,
    /// OBA's window, in seconds.
    #[serde(default = "thirty")]
    pub window_s: f64,
    /// Whether a group is released as soon as all of it is ready, however much is left (VMbuddies'
    /// synchropoint), instead of when what is left fits `max-downtime`.
    #[serde(default)]
    pub at_once: bool,
}

/// Circumstances of a move.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Case {
    /// Its name.
    pub name: String,
    /// Instead of the application's.
    pub bandwidth: Option<String>,
    /// Only these VMs, in this order; all where it is empty.
    #[serde(default)]
    pub vms: Vec<String>,
    /// Which VMs share a source host. The first hosts of the application are the sources, the same
    /// number after them the destinations.
    #[serde(default)]
    pub placement: Vec<Vec<String>>,
    /// Who talks to whom, at rates of `random-traffic`.
    #[serde(default)]
    pub links: Vec<[String; 2]>,
    /// The rate of each link is random from 0 to this …
    pub random_traffic: Option<String>,
    /// … in so many draws, of which the results are means.
    #[serde(default)]
    pub draws: u32,
    /// Writable working sets, by VM.
    #[serde(default)]
    pub writable_working_set: BTreeMap<String, String>,
    /// How the load changes: phases that follow each other and begin anew.
    #[serde(default)]
    pub load: Vec<LoadPhase>,
    /// How far into its phases the load is when the move begins, in seconds.
    #[serde(default)]
    pub begins_s: f64,
}

/// A part of a changing load.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct LoadPhase {
    /// How long it lasts.
    pub duration_s: f64,
    /// How fast the VMs write, in parts of [`Rewriting`].
    pub speed: f64,
}

/// A quantity of a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Figure {
    /// Until the last VM runs at its destination; in seconds.
    Completion,
    /// Sent in all; in MB.
    Traffic,
    /// How long at least one VM is paused; in seconds.
    Downtime,
    /// What was said between the sites (COMMA, Eq. 1); in MB.
    Impact,
    /// From the first VM's arrival to the last one's; in seconds.
    Split,
}

/// One figure, for cases (rows) and approaches (columns).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Table {
    /// Which.
    pub figure: Figure,
    /// The columns.
    pub approaches: Vec<String>,
    /// The rows, by case: a value for each approach, in the figure's unit.
    pub rows: BTreeMap<String, Vec<Cell>>,
}

/// A value in a table of a paper.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Cell {
    /// A number.
    Number(f64),
    /// `INF`: it does not converge.
    Text(String),
}

/// How a figure relates to a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Relation {
    /// It is that value.
    #[default]
    #[serde(rename = "=")]
    Is,
    /// It is at least that.
    #[serde(rename = ">=")]
    AtLeast,
    /// It is at most that.
    #[serde(rename = "<=")]
    AtMost,
}

/// Something that the source says of an approach, in absolute terms or relative to another.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Claim {
    /// In which case.
    pub case: String,
    /// What.
    pub figure: Figure,
    /// Of which approach.
    pub of: String,
    /// Then the value is a ratio: to this approach's …
    pub to: Option<String>,
    /// … in this case, where it is another.
    pub in_case: Option<String>,
    /// Of this VM only (traffic).
    pub vm: Option<String>,
    /// How it relates to `value`.
    #[serde(default)]
    pub relation: Relation,
    /// In the figure's unit, or a ratio.
    pub value: f64,
    /// Where it is said.
    #[serde(rename = "where")]
    pub place: String,
}

fn auto() -> String {
    "auto".into()
}

fn thirty() -> f64 {
    30.0
}

fn parsed<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Policy, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(serde::de::Error::custom)
}

impl Study {
    /// Reads a study.
    ///
    /// # Errors
    /// It is no TOML, a key is not known, or it names a case or an approach that there is not.
    pub fn parse(name: &str, text: &str) -> Result<Self, StudyError> {
        let wrong = |reason: String| StudyError::Study(format!("scenario {name}: {reason}"));
        let mut study: Self = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
        name.clone_into(&mut study.name);
        let case = |name: &String| study.case.iter().any(|case| case.name == *name);
        let approach = |name: &String| study.approach.iter().any(|known| known.name == *name);
        for table in &study.table {
            for (row, cells) in &table.rows {
                if !case(row) || cells.len() != table.approaches.len() {
                    return Err(wrong(format!("the table's row `{row}` fits no case")));
                }
            }
            if let Some(column) = table.approaches.iter().find(|name| !approach(name)) {
                return Err(wrong(format!("there is no approach `{column}`")));
            }
        }
        for claim in &study.claim {
            let cases = [Some(&claim.case), claim.in_case.as_ref()];
            let approaches = [Some(&claim.of), claim.to.as_ref()];
            if !cases.into_iter().flatten().all(case)
                || !approaches.into_iter().flatten().all(approach)
            {
                return Err(wrong(format!("`{}` claims of nothing", claim.place)));
            }
        }
        Ok(study)
    }

    /// A file's application, moved by every policy.
    #[must_use]
    pub fn of_file(outline: Outline, termination: Ending, stage: Part) -> Self {
        let approach = |policy: Policy| Approach {
            name: policy.to_string(),
            policy,
            termination,
            ballooning: false,
            stage,
            search: auto(),
            order: Vec::new(),
            limits: BTreeMap::new(),
            window_s: thirty(),
            at_once: false,
        };
        Self {
            name: outline.name.clone(),
            title: "an application file".into(),
            source: "the file".into(),
            application: String::new(),
            rewriting: None,
            open: Vec::new(),
            approach: Policy::ALL.map(approach).to_vec(),
            case: vec![Case {
                name: outline.name.clone(),
                ..Case::default()
            }],
            table: Vec::new(),
            claim: Vec::new(),
            outline: Some(outline),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_study_is_sound_and_says_what_is_open() {
        for (name, _) in NAMED {
            let study = named(name).expect("there").expect("sound");
            assert!(
                !study.open.is_empty() && !study.approach.is_empty(),
                "{name}"
            );
            assert!(study.table.len() + study.claim.len() > 0, "{name}");
            assert_eq!(study.name, name);
        }
        assert!(named("comma-table-4").is_none());
    }

    #[test]
    fn what_fits_no_case_or_approach_is_refused() {
        let (name, text) = NAMED[1];
        for (from, to, needle) in [
            (
                "\"50 clients\" = [265",
                "\"5 clients\" = [265",
                "fits no case",
            ),
            (", 0.2]", "]", "fits no case"),
            (
                "name = \"comma\"",
                "name = \"other\"",
                "no approach `comma`",
            ),
            ("policy = \"comma\"", "policy = \"coma\"", "is no policy"),
            ("fitted = true", "fited = true", "fited"),
        ] {
            let error = Study::parse(name, &text.replace(from, to)).expect_err(to);
            assert!(error.to_string().contains(needle), "{error}");
        }
    }
}
