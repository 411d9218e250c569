//! The load at which a move violates no service level (the "safe load level" of Voorsluys et al.),
//! found by bisection.

use serde::Serialize;

/// What is found is exact to this factor.
const CLOSE: f64 = 1.1;
/// Nobody looks for less than so many requests per second.
const LEAST: f64 = 0.5;

/// One load that was tried with a move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Try {
    /// Requests per second.
    pub rate: f64,
    /// What it violated; nothing: it is safe.
    pub violated: Vec<String>,
}

/// The search: doubles while all is well and halves while it is not, then bisects.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Search {
    /// The highest load that is safe, of those tried.
    pub safe: Option<f64>,
    /// The lowest that is not.
    pub unsafe_at: Option<f64>,
    /// In their order.
    pub tries: Vec<Try>,
    #[serde(skip)]
    first: f64,
    /// More is not tried.
    #[serde(skip)]
    most: f64,
}

impl Search {
    /// From `first` requests per second on, up to `most`.
    #[must_use]
    pub fn new(first: f64, most: f64) -> Self {
        Self {
            safe: None,
            unsafe_at: None,
            tries: Vec::new(),
            first: first.min(most),
            most,
        }
    }

    /// What is to be tried next; nothing when it is found.
    #[must_use]
    pub fn next_rate(&self) -> Option<f64> {
        match (self.safe, self.unsafe_at) {
            (None, None) => Some(self.first),
            (Some(safe), None) => (safe < self.most).then(|| (safe * 2.0).min(self.most)),
            (None, Some(bad)) => (bad > LEAST).then(|| (bad / 2.0).max(LEAST)),
            (Some(safe), Some(bad)) => (bad > safe * CLOSE).then(|| f64::midpoint(safe, bad)),
        }
    }

    /// Takes what a try found.
    pub fn tell(&mut self, rate: f64, violated: Vec<String>) {
        if violated.is_empty() {
            self.safe = Some(self.safe.map_or(rate, |safe| safe.max(rate)));
        } else {
            self.unsafe_at = Some(self.unsafe_at.map_or(rate, |bad| bad.min(rate)));
        }
        self.tries.push(Try { rate, violated });
    }

    /// In a sentence.
    #[must_use]
    pub fn text(&self) -> String {
        match (self.safe, self.unsafe_at) {
            (Some(safe), Some(bad)) => {
                format!("safe load: {safe:.1} requests/s ({bad:.1} violated a service level)")
            }
            (Some(safe), None) => format!("safe load: at least {safe:.1} requests/s"),
            (None, Some(bad)) => {
                format!("no safe load: {bad:.1} requests/s violated a service level")
            }
            (None, None) => "nothing was tried".to_owned(),
        }
    }
}

/// What a try violated, in words.
#[must_use]
pub fn told(violated: &[String]) -> String {
    match violated {
        [] => "nothing is violated".to_owned(),
        all => format!("violated: {}", all.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches where loads above `limit` are not safe.
    fn search(first: f64, most: f64, limit: f64) -> Search {
        let mut search = Search::new(first, most);
        while let Some(rate) = search.next_rate() {
            assert!(search.tries.len() < 20, "{search:?}");
            let violated = (rate > limit).then(|| "home p99".to_owned());
            search.tell(rate, violated.into_iter().collect());
        }
        search
    }

    #[test]
    fn the_limit_is_found_to_a_tenth() {
        for (first, limit) in [(20.0, 137.0), (20.0, 3.3), (20.0, 20.0), (1.0, 399.0)] {
            let found = search(first, 1000.0, limit);
            let (safe, bad) = (found.safe.unwrap(), found.unsafe_at.unwrap());
            assert!(
                safe <= limit && bad > limit && bad <= safe * CLOSE,
                "{found:?}"
            );
        }
    }

    #[test]
    fn a_search_ends_at_both_ends() {
        let found = search(20.0, 50.0, 1e9);
        assert_eq!((found.safe, found.unsafe_at), (Some(50.0), None));
        assert_eq!(found.text(), "safe load: at least 50.0 requests/s");
        let found = search(20.0, 50.0, 0.0);
        assert_eq!((found.safe, found.unsafe_at), (None, Some(LEAST)));
    }
}
