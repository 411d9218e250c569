//! What a benchmark found: figures against their bounds, and the rows they were made from.

use serde::Serialize;

use super::stats::Spread;

/// Which number of a spread is held against the bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Statistic {
    /// The median.
    Median,
    /// The 95th percentile.
    P95,
    /// The greatest.
    Max,
}

impl Statistic {
    /// That number.
    #[must_use]
    pub fn of(self, spread: &Spread) -> f64 {
        match self {
            Self::Median => spread.median,
            Self::P95 => spread.p95,
            Self::Max => spread.max,
        }
    }

    /// As tables write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Median => "median",
            Self::P95 => "p95",
            Self::Max => "max",
        }
    }
}

/// What a figure has to keep.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// Not above.
    AtMost(f64),
    /// Not below.
    AtLeast(f64),
}

impl Bound {
    /// Whether `value` keeps it.
    #[must_use]
    pub fn holds(self, value: f64) -> bool {
        match self {
            Self::AtMost(bound) => value <= bound,
            Self::AtLeast(bound) => value >= bound,
        }
    }
}

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What was measured.
    pub what: String,
    /// Its unit.
    pub unit: &'static str,
    /// The measurements; nothing if none could be made.
    pub spread: Option<Spread>,
    /// What is held against the bound.
    pub statistic: Statistic,
    /// The bound, if there is one.
    pub bound: Option<Bound>,
}

impl Figure {
    /// A figure that is only told.
    #[must_use]
    pub fn told(what: impl Into<String>, unit: &'static str, values: &[f64]) -> Self {
        Self {
            what: what.into(),
            unit,
            spread: Spread::of(values),
            statistic: Statistic::Median,
            bound: None,
        }
    }

    /// A figure with a bound.
    #[must_use]
    pub fn bounded(
        what: impl Into<String>,
        unit: &'static str,
        values: &[f64],
        statistic: Statistic,
        bound: Bound,
    ) -> Self {
        Self {
            statistic,
            bound: Some(bound),
            ..Self::told(what, unit, values)
        }
    }

    /// Whether the bound is kept; nothing where there is none. What could not be measured keeps
    /// none.
    #[must_use]
    pub fn verdict(&self) -> Option<bool> {
        let bound = self.bound?;
        let spread = self.spread.as_ref();
        Some(spread.is_some_and(|spread| bound.holds(self.statistic.of(spread))))
    }
}

/// Rows as measured.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    /// What they are.
    pub title: String,
    /// Heads of the columns.
    pub columns: Vec<&'static str>,
    /// The rows.
    pub rows: Vec<Vec<String>>,
}

/// All that one benchmark found.
#[derive(Debug, Clone, Serialize)]
pub struct Section {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is about.
    pub title: &'static str,
    /// How it was set up, with the numbers of this run.
    pub setup: String,
    /// The command that makes it, where it is not `muster-testbed bench NAME`.
    #[serde(skip)]
    pub command: Option<String>,
    /// Whether it is the same whatever QEMU there is.
    pub without_qemu: bool,
    /// How long it took, in seconds.
    pub took_s: f64,
    /// The figures.
    pub figures: Vec<Figure>,
    /// The rows they were made from.
    pub tables: Vec<Table>,
    /// Anything to be known beside them.
    pub notes: Vec<String>,
}

impl Section {
    /// An empty one.
    #[must_use]
    pub fn new(name: &'static str, title: &'static str, setup: String) -> Self {
        Self {
            name,
            title,
            setup,
            command: None,
            without_qemu: false,
            took_s: 0.0,
            figures: Vec::new(),
            tables: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// How many bounds were missed.
    #[must_use]
    pub fn missed(&self) -> usize {
        let missed = |figure: &&Figure| figure.verdict() == Some(false);
        self.figures.iter().filter(missed).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_judged_by_its_statistic() {
        let values: Vec<f64> = (1..=20).map(f64::from).collect();
        let judge =
            |statistic, bound| Figure::bounded("x", "ms", &values, statistic, bound).verdict();
        assert_eq!(judge(Statistic::Median, Bound::AtMost(10.5)), Some(true));
        assert_eq!(judge(Statistic::P95, Bound::AtMost(18.0)), Some(false));
        assert_eq!(judge(Statistic::Max, Bound::AtLeast(20.0)), Some(true));
        assert_eq!(Figure::told("x", "ms", &values).verdict(), None);
        let unmeasured = Figure::bounded("x", "ms", &[], Statistic::Max, Bound::AtMost(1.0));
        assert_eq!(unmeasured.verdict(), Some(false));
    }
}
