//! Reading TOML tables key by key, collecting every problem with its line.
//!
//! A [`TableReader`] is asked for the keys it may hold; [`TableReader::finish`] then names those
//! that nobody asked for, with the nearest known key as a suggestion.

use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use rate_limiter::units::parse_duration;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One thing that is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1.
    pub line: usize,
    /// What was found, and what was expected.
    pub text: String,
}

/// Collects problems and turns offsets into lines.
#[derive(Debug)]
pub(super) struct Problems<'t> {
    text: &'t str,
    found: Vec<Problem>,
}

impl<'t> Problems<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self {
            text,
            found: Vec::new(),
        }
    }

    pub(super) fn line(&self, span: &Range<usize>) -> usize {
        let end = span.start.min(self.text.len());
        self.text.as_bytes()[..end]
            .iter()
            .filter(|&&b| b == b'\n')
            .count()
            + 1
    }

    pub(super) fn at(&mut self, span: &Range<usize>, text: impl Into<String>) {
        let line = self.line(span);
        self.found.push(Problem {
            line,
            text: text.into(),
        });
    }

    /// The problems in the file's order.
    pub(super) fn finish(mut self) -> Vec<Problem> {
        self.found.sort_by_key(|problem| problem.line);
        self.found
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Found<T> {
    pub value: T,
    pub span: Range<usize>,
}

/// One table of the file.
#[derive(Debug)]
pub(super) struct TableReader<'d, 'i> {
    /// As messages name it, such as `[[vm]]`.
    pub name: String,
    pub span: Range<usize>,
    table: &'d DeTable<'i>,
    known: Vec<&'static str>,
}

impl<'d, 'i> TableReader<'d, 'i> {
    pub(super) fn new(name: impl Into<String>, span: Range<usize>, table: &'d DeTable<'i>) -> Self {
        Self {
            name: name.into(),
            span,
            table,
            known: Vec::new(),
        }
    }

    pub(super) fn get(&mut self, key: &'static str) -> Option<&'d Spanned<DeValue<'i>>> {
        self.known.push(key);
        self.table
            .iter()
            .find(|(name, _)| name.get_ref().as_ref() == key)
            .map(|(_, value)| value)
    }

    fn wrong_type(
        &self,
        problems: &mut Problems<'_>,
        key: &str,
        value: &Spanned<DeValue<'i>>,
        expected: &str,
    ) {
        let text = format!(
            "`{key}` in {}: expected {expected}, found {}",
            self.name,
            described(value.get_ref())
        );
        problems.at(&value.span(), text);
    }

    pub(super) fn text(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
        expected: &str,
    ) -> Option<Found<String>> {
        let value = self.get(key)?;
        let Some(text) = value.get_ref().as_str() else {
            self.wrong_type(problems, key, value, expected);
            return None;
        };
        Some(Found {
            value: text.to_owned(),
            span: value.span(),
        })
    }

    /// A value that is written as text and parsed with `FromStr`.
    pub(super) fn parsed<T: FromStr>(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
        expected: &str,
    ) -> Option<Found<T>>
    where
        T::Err: std::fmt::Display,
    {
        let found = self.text(problems, key, expected)?;
        match found.value.parse() {
            Ok(value) => Some(Found {
                value,
                span: found.span,
            }),
            Err(error) => {
                problems.at(&found.span, format!("`{key}` in {}: {error}", self.name));
                None
            }
        }
    }

    pub(super) fn duration(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
        allowed: Range<Duration>,
    ) -> Option<Duration> {
        let found = self.text(problems, key, "a duration such as \"300ms\"")?;
        match parse_duration(&found.value) {
            Ok(value) if allowed.contains(&value) => Some(value),
            Ok(value) => {
                let text = format!(
                    "`{key}` in {} is {value:?}; expected at least {:?} and less than {:?}",
                    self.name, allowed.start, allowed.end
                );
                problems.at(&found.span, text);
                None
            }
            Err(error) => {
                problems.at(&found.span, format!("`{key}` in {}: {error}", self.name));
                None
            }
        }
    }

    /// A quantity that must not be zero.
    pub(super) fn positive<T: FromStr + Default + PartialEq>(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
        expected: &str,
    ) -> Option<Found<T>>
    where
        T::Err: std::fmt::Display,
    {
        let found = self.parsed::<T>(problems, key, expected)?;
        if found.value == T::default() {
            problems.at(
                &found.span,
                format!("`{key}` in {} is 0; expected {expected}", self.name),
            );
            return None;
        }
        Some(found)
    }

    pub(super) fn integer(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
        allowed: Range<i64>,
    ) -> Option<i64> {
        let value = self.get(key)?;
        let expected = format!(
            "a whole number from {} to {}",
            allowed.start,
            allowed.end - 1
        );
        let number = value
            .get_ref()
            .as_integer()
            .and_then(|i| i64::from_str_radix(i.as_str(), i.radix()).ok())
            .filter(|number| allowed.contains(number));
        if number.is_none() {
            self.wrong_type(problems, key, value, &expected);
        }
        number
    }

    pub(super) fn number(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
        allowed: Range<f64>,
    ) -> Option<f64> {
        let value = self.get(key)?;
        let float = value.get_ref().as_float().map(|f| f.as_str().to_owned());
        let integer = value.get_ref().as_integer().map(|i| i.as_str().to_owned());
        let number = float
            .or(integer)
            .and_then(|text| text.parse::<f64>().ok())
            .filter(|number| allowed.contains(number));
        if number.is_none() {
            let expected = format!("a number from {} to {}", allowed.start, allowed.end);
            self.wrong_type(problems, key, value, &expected);
        }
        number
    }

    pub(super) fn boolean(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
    ) -> Option<bool> {
        let value = self.get(key)?;
        let found = value.get_ref().as_bool();
        if found.is_none() {
            self.wrong_type(problems, key, value, "true or false");
        }
        found
    }

    /// Two names, as in `between = ["a", "b"]`.
    pub(super) fn pair(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
    ) -> Option<Found<[String; 2]>> {
        let value = self.get(key)?;
        let names: Option<Vec<String>> = value.get_ref().as_array().and_then(|array| {
            array
                .iter()
                .map(|item| item.get_ref().as_str().map(str::to_owned))
                .collect()
        });
        match names.map(<[String; 2]>::try_from) {
            Some(Ok(pair)) => Some(Found {
                value: pair,
                span: value.span(),
            }),
            _ => {
                self.wrong_type(problems, key, value, "two names, such as [\"a\", \"b\"]");
                None
            }
        }
    }

    pub(super) fn missing(&self, problems: &mut Problems<'_>, key: &str, expected: &str) {
        let text = format!("`{key}` is missing in {}; expected {expected}", self.name);
        problems.at(&self.span, text);
    }

    /// Whether the key is there at all, right or wrong.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.keys().any(|name| name.get_ref().as_ref() == key)
    }

    /// Names the keys that nobody asked for.
    pub(super) fn finish(self, problems: &mut Problems<'_>) {
        for name in self.table.keys() {
            let key = name.get_ref().as_ref();
            if self.known.contains(&key) {
                continue;
            }
            let hint = nearest(key, &self.known).map_or_else(
                || format!("known are {}", self.known.join(", ")),
                |known| format!("did you mean `{known}`?"),
            );
            let text = format!("unknown key `{key}` in {}; {hint}", self.name);
            problems.at(&name.span(), text);
        }
    }
}

fn described(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("the text \"{text}\""),
        DeValue::Integer(number) => format!("the number {}", number.as_str()),
        DeValue::Float(number) => format!("the number {}", number.as_str()),
        DeValue::Boolean(value) => format!("{value}"),
        DeValue::Datetime(_) => "a date".into(),
        DeValue::Array(_) => "an array".into(),
        DeValue::Table(_) => "a table".into(),
    }
}

/// The known key that `key` was probably meant to be.
pub(super) fn nearest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    let plain = |text: &str| text.to_lowercase().replace(['_', ' '], "-");
    let wanted = plain(key);
    known
        .iter()
        .map(|&candidate| (distance(&wanted, candidate), candidate))
        .filter(|(distance, known)| *distance <= 1 + known.len() / 4 && *distance < known.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Edits (insert, delete, replace) between two words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_the_nearest_key() {
        let known = ["policy", "bandwidth", "max-downtime", "name"];
        assert_eq!(nearest("polcy", &known), Some("policy"));
        assert_eq!(nearest("max_downtime", &known), Some("max-downtime"));
        assert_eq!(nearest("bandwith", &known), Some("bandwidth"));
        assert_eq!(nearest("colour", &known), None);
    }

    #[test]
    fn distance_is_symmetric_and_exact() {
        for (a, b, expected) in [("", "abc", 3), ("kitten", "sitting", 3), ("a", "a", 0)] {
            assert_eq!(distance(a, b), expected);
            assert_eq!(distance(b, a), expected);
        }
    }
}
