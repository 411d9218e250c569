//! Quantities with their unit in the type: bytes, bytes per second, and how people write them.
//!
//! Decimal prefixes are powers of 1000 (`MB`), binary ones powers of 1024 (`MiB`); bits are
//! written `bit`, as in `400Mbit/s`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An amount of data, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

/// A data rate, in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BytesPerSecond(pub u64);

/// Why a quantity could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseQuantityError {
    /// The text does not begin with a number.
    #[error("`{text}` does not begin with a number; expected for example `{example}`")]
    Number {
        /// What was given.
        text: String,
        /// A correct value.
        example: &'static str,
    },
    /// The unit behind the number is not known.
    #[error("unknown unit `{unit}` in `{text}`; expected for example `{example}`")]
    Unit {
        /// What was given.
        text: String,
        /// The unit found.
        unit: String,
        /// A correct value.
        example: &'static str,
    },
    /// The value is negative, not finite, or too large.
    #[error("`{text}` is out of range (0 to 2^63 bytes)")]
    Range {
        /// What was given.
        text: String,
    },
}

const SIZE_EXAMPLE: &str = "512MiB";
const RATE_EXAMPLE: &str = "400Mbit/s";

fn split(text: &str, example: &'static str) -> Result<(f64, String), ParseQuantityError> {
    let trimmed = text.trim();
    let end = trimmed
        .find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_'))
        .unwrap_or(trimmed.len());
    let number = trimmed[..end].replace('_', "");
    let value: f64 = number.parse().map_err(|_| ParseQuantityError::Number {
        text: text.to_owned(),
        example,
    })?;
    Ok((value, trimmed[end..].trim().to_owned()))
}

fn prefix(unit: &str) -> Option<(f64, &str)> {
    const PREFIXES: [(&str, f64); 9] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("k", 1e3),
        ("K", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
    ];
    for (name, factor) in PREFIXES {
        if let Some(rest) = unit.strip_prefix(name) {
            return Some((factor, rest));
        }
    }
    Some((1.0, unit))
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the range is checked just before the cast"
)]
fn whole(text: &str, value: f64) -> Result<u64, ParseQuantityError> {
    if !value.is_finite() || !(0.0..=9.223_372_036_854_775e18).contains(&value) {
        return Err(ParseQuantityError::Range {
            text: text.to_owned(),
        });
    }
    Ok(value.round() as u64)
}

impl FromStr for Bytes {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (value, unit) = split(text, SIZE_EXAMPLE)?;
        let bad = || ParseQuantityError::Unit {
            text: text.to_owned(),
            unit: unit.clone(),
            example: SIZE_EXAMPLE,
        };
        let (factor, rest) = prefix(&unit).ok_or_else(bad)?;
        if rest != "B" && !(rest.is_empty() && unit.is_empty()) {
            return Err(bad());
        }
        whole(text, value * factor).map(Bytes)
    }
}

impl FromStr for BytesPerSecond {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (value, unit) = split(text, RATE_EXAMPLE)?;
        let bad = || ParseQuantityError::Unit {
            text: text.to_owned(),
            unit: unit.clone(),
            example: RATE_EXAMPLE,
        };
        if unit.is_empty() {
            return whole(text, value).map(BytesPerSecond);
        }
        let per_second = unit.strip_suffix("/s").ok_or_else(bad)?;
        let (factor, rest) = prefix(per_second).ok_or_else(bad)?;
        let scale = match rest {
            "B" => 1.0,
            "bit" => 0.125,
            _ => return Err(bad()),
        };
        whole(text, value * factor * scale).map(BytesPerSecond)
    }
}

impl fmt::Display for Bytes {
    #[allow(
        clippy::cast_precision_loss,
        reason = "three significant digits are shown"
    )]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0 as f64;
        match self.0 {
            0..1024 => write!(f, "{} B", self.0),
            1024..1_048_576 => write!(f, "{:.1} KiB", value / 1024.0),
            1_048_576..1_073_741_824 => write!(f, "{:.1} MiB", value / 1_048_576.0),
            _ => write!(f, "{:.2} GiB", value / 1_073_741_824.0),
        }
    }
}

impl fmt::Display for BytesPerSecond {
    #[allow(
        clippy::cast_precision_loss,
        reason = "three significant digits are shown"
    )]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0 as f64;
        match self.0 {
            0..1000 => write!(f, "{} B/s", self.0),
            1000..1_000_000 => write!(f, "{:.1} kB/s", value / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB/s", value / 1e6),
            _ => write!(f, "{:.2} GB/s", value / 1e9),
        }
    }
}

impl BytesPerSecond {
    /// How long `bytes` take at this rate; `Duration::MAX` at rate zero.
    #[must_use]
    pub fn time_for(self, bytes: Bytes) -> Duration {
        if self.0 == 0 {
            return Duration::MAX;
        }
        let nanos = u128::from(bytes.0) * 1_000_000_000 / u128::from(self.0);
        u64::try_from(nanos).map_or(Duration::MAX, Duration::from_nanos)
    }

    /// How many bytes pass in `time` at this rate.
    #[must_use]
    pub fn in_time(self, time: Duration) -> Bytes {
        let bytes = u128::from(self.0) * time.as_nanos() / 1_000_000_000;
        Bytes(u64::try_from(bytes).unwrap_or(u64::MAX))
    }
}

macro_rules! serde_by_text {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_u64(self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                #[derive(Deserialize)]
                #[serde(untagged)]
                enum Raw {
                    Number(u64),
                    Text(String),
                }
                match Raw::deserialize(deserializer)? {
                    Raw::Number(value) => Ok(Self(value)),
                    Raw::Text(text) => text.parse().map_err(serde::de::Error::custom),
                }
            }
        }
    };
}

serde_by_text!(Bytes);
serde_by_text!(BytesPerSecond);

/// Serde for durations as people write them: `"300ms"`, `"5s"`, `"2m"`.
pub mod duration_text {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    /// Reads `"300ms"`.
    ///
    /// # Errors
    /// The text is no duration with a unit.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        super::parse_duration(&text).map_err(serde::de::Error::custom)
    }

    /// Writes `"300ms"`.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&humantime::format_duration(*value).to_string())
    }
}

/// Reads a duration with its unit, such as `300ms`, `5s`, `1m 30s`.
///
/// # Errors
/// What is wrong with the text, and an example.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text.trim())
        .map_err(|error| format!("`{text}` is no duration ({error}); expected for example `300ms`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        assert_eq!("128MiB".parse(), Ok(Bytes(128 << 20)));
        assert_eq!("1.5GB".parse(), Ok(Bytes(1_500_000_000)));
        assert_eq!("4096".parse(), Ok(Bytes(4096)));
        assert_eq!("400Mbit/s".parse(), Ok(BytesPerSecond(50_000_000)));
        assert_eq!("32 MB/s".parse(), Ok(BytesPerSecond(32_000_000)));
        assert_eq!("50MiB/s".parse(), Ok(BytesPerSecond(50 << 20)));
        assert_eq!("50KB/s".parse(), Ok(BytesPerSecond(50_000)));
    }

    #[test]
    fn refuses_the_rest_with_an_example() {
        for text in [
            "",
            "MiB",
            "12parsecs",
            "-1MB",
            "1MB/s",
            "99999999999999999999TB",
        ] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        for text in ["4MB", "4Mbit", "x", "4Mbyte/s", "-4MB/s"] {
            assert!(text.parse::<BytesPerSecond>().is_err(), "{text}");
        }
        let error = "12parsecs".parse::<Bytes>().unwrap_err().to_string();
        assert!(error.contains("512MiB"), "{error}");
    }

    #[test]
    fn time_and_amount_agree() {
        let rate = BytesPerSecond(50_000_000);
        assert_eq!(rate.time_for(Bytes(5_000_000)), Duration::from_millis(100));
        assert_eq!(rate.in_time(Duration::from_millis(100)), Bytes(5_000_000));
        assert_eq!(BytesPerSecond(0).time_for(Bytes(1)), Duration::MAX);
    }
}
