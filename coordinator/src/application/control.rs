//! Where a sidecar's control socket is: `unix:PATH` or `tcp:HOST:PORT`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Address of a control socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ControlAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// TCP: host and port, as `connect` resolves them.
    Tcp(String),
}

/// Why an address could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no control address; expected `unix:/path/to/socket` or `tcp:host:port`")]
pub struct ParseControlAddressError {
    text: String,
}

impl FromStr for ControlAddress {
    type Err = ParseControlAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseControlAddressError {
            text: text.to_owned(),
        };
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() || path.len() > 107 {
                return Err(error());
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let address = text.strip_prefix("tcp:").ok_or_else(error)?;
        let (host, port) = address.rsplit_once(':').ok_or_else(error)?;
        let port: u16 = port.parse().map_err(|_| error())?;
        if host.is_empty() || port == 0 {
            return Err(error());
        }
        Ok(Self::Tcp(address.to_owned()))
    }
}

impl fmt::Display for ControlAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read_and_written() {
        for text in ["unix:/run/a", "tcp:10.0.0.2:4600", "tcp:[::1]:4600"] {
            assert_eq!(
                text.parse::<ControlAddress>().map(|a| a.to_string()),
                Ok(text.to_owned())
            );
        }
        for text in [
            "",
            "unix:",
            "tcp:",
            "tcp:a",
            "tcp:a:0",
            "tcp::1",
            "10.0.0.2:1",
        ] {
            assert!(text.parse::<ControlAddress>().is_err(), "{text}");
        }
    }
}
