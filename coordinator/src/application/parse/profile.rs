//! Quantities that a machine can have, and what `[[vm]]` says of a VM's load.

use rate_limiter::{Bytes, BytesPerSecond};
use sidecar::protocol::command::RESERVE_BYTES;

use super::{RATE, SIZE};
use crate::application::VmProfile;
use crate::application::reader::{Found, Problems, TableReader};

/// More than any machine does: such a rate is a slip of the pen.
const HIGHEST_RATE: BytesPerSecond = BytesPerSecond(100_000_000_000_000);
/// And such a size.
const LARGEST_SIZE: Bytes = Bytes(1 << 60);

/// A rate that a machine can have.
pub(super) fn rate(
    reader: &mut TableReader<'_, '_>,
    problems: &mut Problems<'_>,
    key: &'static str,
) -> Option<BytesPerSecond> {
    let found = reader.parsed(problems, key, RATE)?;
    sane(reader, problems, key, &found, &HIGHEST_RATE)
}

/// A rate that a machine can have, and not 0.
pub(super) fn positive_rate(
    reader: &mut TableReader<'_, '_>,
    problems: &mut Problems<'_>,
    key: &'static str,
) -> Option<BytesPerSecond> {
    let found = reader.positive(problems, key, RATE)?;
    sane(reader, problems, key, &found, &HIGHEST_RATE)
}

/// A size that a machine can have.
fn size(
    reader: &mut TableReader<'_, '_>,
    problems: &mut Problems<'_>,
    key: &'static str,
) -> Option<Bytes> {
    let found = reader.parsed(problems, key, SIZE)?;
    sane(reader, problems, key, &found, &LARGEST_SIZE)
}

fn sane<T: PartialOrd + Copy + std::fmt::Display>(
    reader: &TableReader<'_, '_>,
    problems: &mut Problems<'_>,
    key: &str,
    found: &Found<T>,
    most: &T,
) -> Option<T> {
    if found.value > *most {
        let text = format!(
            "`{key}` in {} is {}, above {most}; check the number and its unit",
            reader.name, found.value
        );
        problems.at(&found.span, text);
        return None;
    }
    Some(found.value)
}

/// Reads `balloon-reserve`, of the application or of a VM.
pub(super) fn read_balloon_reserve(
    reader: &mut TableReader<'_, '_>,
    problems: &mut Problems<'_>,
) -> Option<Bytes> {
    let found = reader.parsed::<Bytes>(problems, "balloon-reserve", SIZE)?;
    if !RESERVE_BYTES.contains(&found.value.0) {
        let text = format!(
            "`balloon-reserve` in {} is {}; expected 1 MiB to 1 TiB",
            reader.name, found.value
        );
        problems.at(&found.span, text);
        return None;
    }
    Some(found.value)
}

/// What `[[vm]]` says of its memory and disk.
pub(super) fn read_profile(
    reader: &mut TableReader<'_, '_>,
    problems: &mut Problems<'_>,
) -> VmProfile {
    let memory = reader.positive(problems, "memory", SIZE);
    let profile = VmProfile {
        memory: memory.and_then(|found| sane(reader, problems, "memory", &found, &LARGEST_SIZE)),
        used_memory: size(reader, problems, "used-memory"),
        dirty_rate: rate(reader, problems, "dirty-rate"),
        max_dirty_rate: rate(reader, problems, "max-dirty-rate"),
        dirty_set: size(reader, problems, "dirty-set"),
        writable_working_set: size(reader, problems, "writable-working-set"),
        disk: size(reader, problems, "disk"),
    };
    let span = reader.span.clone();
    if let (Some(mean), Some(max)) = (profile.dirty_rate, profile.max_dirty_rate) {
        if mean > max {
            let text = format!(
                "{}: `dirty-rate` {mean} is above `max-dirty-rate` {max}",
                reader.name
            );
            problems.at(&span, text);
        }
    }
    let mut within = |key: &str, size: Option<Bytes>, whole: Option<Bytes>, named: &str| {
        if let (Some(size), Some(whole)) = (size, whole) {
            if size > whole {
                let text = format!("{}: `{key}` {size} is above {named} {whole}", reader.name);
                problems.at(&span, text);
            }
        }
    };
    let memory = profile.memory;
    within(
        "writable-working-set",
        profile.writable_working_set,
        memory,
        "`memory`",
    );
    within("used-memory", profile.used_memory, memory, "`memory`");
    // The dirty set is of memory and disk; a file may leave the disk out that made it.
    let both = memory.zip(profile.disk);
    let both = both.map(|(memory, disk)| Bytes(memory.0.saturating_add(disk.0)));
    within(
        "dirty-set",
        profile.dirty_set,
        both,
        "`memory` and `disk` together,",
    );
    profile
}
