//! Who sends how much to whom over the bridges of this host, counted by the kernel.
//!
//! A table of nftables holds a set of sender and receiver that fills by itself and counts. It is
//! there for as long as is counted: a count that was killed leaves it behind, the next one replaces
//! it. nft has to run as root; a count blocks, so it has a thread of its own.

use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::log;
use crate::protocol::traffic::{PairCount, TrafficCount};

/// The file that nft reads: an empty table first, so that there is one to delete.
const RULES: &str = "\
table bridge muster_traffic
delete table bridge muster_traffic
table bridge muster_traffic {
	set pairs {
		type ether_addr . ether_addr
		size 65536
		flags dynamic
		counter
	}
	chain count {
		type filter hook prerouting priority -300; policy accept;
		update @pairs { ether saddr . ether daddr counter }
	}
}
";
/// nft writes JSON of what it is asked for in arguments, not of what a file asks.
const READ: [&str; 6] = ["-j", "list", "set", "bridge", "muster_traffic", "pairs"];
const FROM_INPUT: [&str; 2] = ["-f", "-"];
const REMOVE: [&str; 4] = ["delete", "table", "bridge", "muster_traffic"];
/// The kernel counts from the network's header on.
const ETHERNET_HEADER: u64 = 14;
/// nft answers in that time.
const NFT_WITHIN: Duration = Duration::from_secs(10);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(5);
/// The longest answer: a full set takes less.
const ANSWER: u64 = 32 << 20;

/// One count at a time: there is one table.
static COUNTING: AtomicBool = AtomicBool::new(false);

/// Counts for so long.
///
/// # Errors
/// nft is missing, is not allowed to, or does not answer; or a count is under way.
pub fn count(time: Duration) -> Result<TrafficCount, String> {
    if COUNTING.swap(true, Ordering::AcqRel) {
        return Err("traffic is being counted for somebody else: try again later".to_owned());
    }
    let counted = count_alone(time);
    COUNTING.store(false, Ordering::Release);
    counted
}

fn count_alone(time: Duration) -> Result<TrafficCount, String> {
    nft(&FROM_INPUT, RULES)?;
    let began = Instant::now();
    std::thread::sleep(time);
    let read = nft(&READ, "");
    let took = began.elapsed();
    if let Err(error) = nft(&REMOVE, "") {
        log(&format!(
            "the table that counts traffic is left behind: {error}"
        ));
    }
    Ok(TrafficCount {
        duration_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        pairs: pairs(&read?)?,
    })
}

/// Runs nft, which reads `input`; what it says.
fn nft(arguments: &[&str], input: &str) -> Result<String, String> {
    let cannot = |error: io::Error| {
        format!("nft cannot be run: {error}; traffic is counted with it (package nftables)")
    };
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err("nft has no pipes".to_owned());
    };
    // Shorter than any pipe: it does not block.
    let written = stdin.write_all(input.as_bytes());
    drop(stdin);
    let said = std::thread::spawn(move || read_all(stdout));
    let complained = std::thread::spawn(move || read_all(stderr));
    let by = Instant::now() + NFT_WITHIN;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < by => std::thread::sleep(LOOK),
            ended => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(match ended {
                    Err(error) => cannot(error),
                    _ => format!("nft does not answer within {NFT_WITHIN:?}"),
                });
            }
        }
    };
    let joined = |thread: std::thread::JoinHandle<String>| thread.join().unwrap_or_default();
    let (said, complained) = (joined(said), joined(complained));
    match written {
        Ok(()) if status.success() => Ok(said),
        Err(error) if complained.is_empty() => Err(cannot(error)),
        _ => Err(format!("nft says: {}", complained.trim())),
    }
}

fn read_all(pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    // What was read until it broke is judged as what it is.
    let _ = pipe.take(ANSWER).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The counters in what `nft -j list set` says.
fn pairs(said: &str) -> Result<Vec<PairCount>, String> {
    let value: Value = serde_json::from_str(said)
        .map_err(|error| format!("what nft says is not understood: {error}"))?;
    let items = value["nftables"].as_array().into_iter().flatten();
    let Some(set) = items.map(|item| &item["set"]).find(|set| set.is_object()) else {
        return Err("nft says nothing of the set that counts".to_owned());
    };
    let elements = set["elem"].as_array().into_iter().flatten();
    let pair = |element: &Value| {
        let element = &element["elem"];
        let address = |at: usize| element["val"]["concat"][at].as_str();
        let counter = &element["counter"];
        let (bytes, packets) = (counter["bytes"].as_u64()?, counter["packets"].as_u64()?);
        Some(PairCount {
            from: address(0)?.to_owned(),
            to: address(1)?.to_owned(),
            bytes: bytes.saturating_add(packets.saturating_mul(ETHERNET_HEADER)),
            packets,
        })
    };
    elements
        .map(|element| pair(element).ok_or_else(|| format!("nft counts `{element}`")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"set": {"family":
        "bridge", "name": "pairs", "table": "muster_traffic", "type": ["ether_addr", "ether_addr"],
        "elem": [{"elem": {"val": {"concat": ["c6:ea:37:ea:4b:6d", "33:33:00:00:00:16"]},
        "counter": {"packets": 3, "bytes": 228}}}], "stmt": [{"counter": null}]}}]}"#;

    #[test]
    fn counters_are_read_with_their_headers() {
        let counted = pairs(SAID).unwrap();
        let expected = PairCount {
            from: "c6:ea:37:ea:4b:6d".to_owned(),
            to: "33:33:00:00:00:16".to_owned(),
            bytes: 228 + 3 * 14,
            packets: 3,
        };
        assert_eq!(counted, [expected]);
    }

    #[test]
    fn a_set_without_elements_is_no_traffic() {
        let said = r#"{"nftables": [{"metainfo": {}}, {"set": {"name": "pairs"}}]}"#;
        assert_eq!(pairs(said), Ok(Vec::new()));
    }

    #[test]
    fn what_nft_does_not_say_is_no_traffic_matrix() {
        for said in [
            "",
            "{}",
            r#"{"nftables": []}"#,
            r#"{"nftables": [{"set": {"elem": [{"elem": {"val": "x"}}]}}]}"#,
        ] {
            assert!(pairs(said).is_err(), "{said}");
        }
    }
}
