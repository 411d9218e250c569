//! From the file's tables to an [`Application`]: keys, references, and what must fit together.

mod settings;

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use rate_limiter::{Bytes, BytesPerSecond};
use toml::de::{DeTable, DeValue};
use uuid::Uuid;

use super::reader::{Found, Problem, Problems, TableReader, nearest};
use super::{
    Application, ControlAddress, FILE_VERSION, Host, HostId, Link, Outline, OutlineHost, OutlineVm,
    Traffic, TransportChoice, Vm, VmId, VmProfile,
};

const RATE: &str = "a rate such as \"400Mbit/s\" or \"50MiB/s\"";
const SIZE: &str = "a size such as \"512MiB\"";

/// More than any machine does: such a rate is a slip of the pen.
const HIGHEST_RATE: BytesPerSecond = BytesPerSecond(100_000_000_000_000);
/// And such a size.
const LARGEST_SIZE: Bytes = Bytes(1 << 60);

/// Reads the whole file, for a move.
pub(super) fn parse(text: &str) -> Result<Application, Vec<Problem>> {
    let (draft, problems) = read(text, Purpose::Move)?;
    let finished = draft.and_then(Draft::finish);
    finished.ok_or_else(|| problems.finish())
}

/// Reads as much of the file as a plan needs.
pub(super) fn parse_outline(text: &str) -> Result<Outline, Vec<Problem>> {
    let (draft, problems) = read(text, Purpose::Plan)?;
    draft.map(Draft::outline).ok_or_else(|| problems.finish())
}

/// What a file is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// A move: hosts, their sidecars, and where each VM is and goes.
    Move,
    /// A plan: these may be left out.
    Plan,
}

/// A file as it was read: what only a move needs may be missing.
struct Draft {
    settings: settings::Settings,
    hosts: Vec<DraftHost>,
    links: Vec<Link>,
    vms: Vec<DraftVm>,
    traffic: Vec<Traffic>,
}

struct DraftHost {
    control: Option<ControlAddress>,
    known: OutlineHost,
}

struct DraftVm {
    uuid: Option<Uuid>,
    transport: Option<TransportChoice>,
    known: OutlineVm,
}

impl Draft {
    fn outline(self) -> Outline {
        let app = self.settings.application;
        Outline {
            name: app.name,
            policy: app.policy,
            bandwidth: app.bandwidth,
            max_downtime: app.max_downtime,
            termination: app.termination,
            replica_groups: app.replica_groups,
            hosts: self.hosts.into_iter().map(|host| host.known).collect(),
            links: self.links,
            vms: self.vms.into_iter().map(|vm| vm.known).collect(),
            traffic: self.traffic,
        }
    }

    fn finish(self) -> Option<Application> {
        let hosts = self.hosts.into_iter().map(DraftHost::finish);
        let vms: Option<Vec<Vm>> = self.vms.into_iter().map(DraftVm::finish).collect();
        let vms = vms?;
        Some(Application {
            hosts: hosts.collect::<Option<_>>()?,
            links: self.links,
            traffic: self.traffic,
            register: self.settings.register.unwrap_or(vms.first()?.from),
            vms,
            ..self.settings.application
        })
    }
}

impl DraftHost {
    fn finish(self) -> Option<Host> {
        Some(Host {
            name: self.known.name,
            control: self.control?,
            nic: self.known.nic,
            disk: self.known.disk,
        })
    }
}

impl DraftVm {
    fn finish(self) -> Option<Vm> {
        Some(Vm {
            name: self.known.name,
            uuid: self.uuid?,
            tier: self.known.tier,
            from: self.known.from?,
            to: self.known.to?,
            transport: self.transport,
            profile: self.known.profile,
        })
    }
}

/// Reads every table. No draft where there is a problem.
fn read(text: &str, purpose: Purpose) -> Result<(Option<Draft>, Problems<'_>), Vec<Problem>> {
    let mut problems = Problems::new(text);
    let root = match DeTable::parse(text) {
        Ok(root) => root,
        Err(error) => {
            let span = error.span().unwrap_or(0..0);
            problems.at(&span, format!("this is no TOML: {}", error.message()));
            return Err(problems.finish());
        }
    };
    let mut top = TableReader::new("the file", 0..0, root.get_ref());
    check_version(&mut top, &mut problems);
    let hosts = read_hosts(&mut top, purpose, &mut problems);
    let names: Vec<&str> = hosts.iter().map(|host| host.known.name.as_str()).collect();
    let vms = read_vms(&mut top, &names, purpose, &mut problems);
    let links = read_links(&mut top, &names, &mut problems);
    let traffic = read_traffic(&mut top, &vms, &mut problems);
    let settings = settings::read_settings(&mut top, &names, &mut problems);
    top.finish(&mut problems);
    let draft = settings
        .filter(|_| problems.is_empty())
        .map(|settings| Draft {
            settings,
            hosts,
            links,
            vms,
            traffic,
        });
    Ok((draft, problems))
}

fn check_version(top: &mut TableReader<'_, '_>, problems: &mut Problems<'_>) {
    let expected = format!("`version = {FILE_VERSION}`");
    match top.get("version") {
        None => top.missing(problems, "version", &expected),
        Some(value) => {
            let found = value.get_ref().as_integer().map(|v| v.as_str().to_owned());
            if found.as_deref() != Some("1") {
                problems.at(
                    &value.span(),
                    format!("`version` is not one this program reads; expected {expected}"),
                );
            }
        }
    }
}

/// The tables of an array of tables, such as every `[[vm]]`.
fn tables<'d, 'i>(
    top: &mut TableReader<'d, 'i>,
    key: &'static str,
    problems: &mut Problems<'_>,
) -> Vec<TableReader<'d, 'i>> {
    let Some(value) = top.get(key) else {
        return Vec::new();
    };
    let mut readers = Vec::new();
    let DeValue::Array(items) = value.get_ref() else {
        problems.at(
            &value.span(),
            format!("`{key}` must be written as [[{key}]]"),
        );
        return readers;
    };
    for item in items.iter() {
        match item.get_ref().as_table() {
            Some(table) => {
                readers.push(TableReader::new(format!("[[{key}]]"), item.span(), table));
            }
            None => problems.at(
                &item.span(),
                format!("`{key}` must be written as [[{key}]]"),
            ),
        }
    }
    readers
}

fn name_of(
    reader: &mut TableReader<'_, '_>,
    seen: &mut HashMap<String, usize>,
    problems: &mut Problems<'_>,
) -> String {
    let Some(found) = reader.text(problems, "name", "a name") else {
        if !reader.has("name") {
            reader.missing(problems, "name", "a name");
        }
        return String::new();
    };
    if found.value.is_empty() || found.value.len() > 64 || found.value.chars().any(char::is_control)
    {
        problems.at(
            &found.span,
            format!("`name` in {}: expected 1 to 64 letters", reader.name),
        );
    }
    reader.name = format!("{} `{}`", reader.name, found.value);
    let line = problems.line(&found.span);
    if let Some(first) = seen.insert(found.value.clone(), line) {
        let text = format!("{} is there twice (first in line {first})", reader.name);
        problems.at(&found.span, text);
    }
    found.value
}

fn read_hosts(
    top: &mut TableReader<'_, '_>,
    purpose: Purpose,
    problems: &mut Problems<'_>,
) -> Vec<DraftHost> {
    let mut seen = HashMap::new();
    let mut controls: HashMap<String, String> = HashMap::new();
    let mut hosts = Vec::new();
    for mut reader in tables(top, "host", problems) {
        let name = name_of(&mut reader, &mut seen, problems);
        let expected = "\"unix:/path/to/socket\" or \"tcp:host:port\"";
        let control = reader.parsed::<ControlAddress>(problems, "control", expected);
        if purpose == Purpose::Move && control.is_none() && !reader.has("control") {
            reader.missing(problems, "control", expected);
        }
        let nic = positive_rate(&mut reader, problems, "nic");
        let disk = positive_rate(&mut reader, problems, "disk");
        let control = control.map(|found| {
            if let Some(other) = controls.insert(found.value.to_string(), name.clone()) {
                let text = format!(
                    "`control` of {} is also that of host `{other}`",
                    reader.name
                );
                problems.at(&found.span, text);
            }
            found.value
        });
        reader.finish(problems);
        hosts.push(DraftHost {
            control,
            known: OutlineHost { name, nic, disk },
        });
    }
    if purpose == Purpose::Move && hosts.is_empty() {
        top.missing(problems, "[[host]]", "at least two hosts");
    }
    hosts
}

fn host_named(
    hosts: &[&str],
    name: &str,
    at: (&str, &str, &Range<usize>),
    problems: &mut Problems<'_>,
) -> Option<HostId> {
    let (key, table, span) = at;
    let found = hosts.iter().position(|&host| host == name).map(HostId);
    if found.is_none() {
        let hint = nearest(name, hosts).map_or_else(
            || format!("known are {}", hosts.join(", ")),
            |host| format!("did you mean `{host}`?"),
        );
        problems.at(
            span,
            format!("`{key}` in {table}: there is no host `{name}`; {hint}"),
        );
    }
    found
}

fn read_vms(
    top: &mut TableReader<'_, '_>,
    hosts: &[&str],
    purpose: Purpose,
    problems: &mut Problems<'_>,
) -> Vec<DraftVm> {
    let mut seen = HashMap::new();
    let mut uuids: HashMap<Uuid, String> = HashMap::new();
    let mut vms = Vec::new();
    for mut reader in tables(top, "vm", problems) {
        let name = name_of(&mut reader, &mut seen, problems);
        let expected = "the UUID that QEMU's query-uuid answers";
        let uuid = reader.parsed::<Uuid>(problems, "uuid", expected);
        if purpose == Purpose::Move && uuid.is_none() && !reader.has("uuid") {
            reader.missing(problems, "uuid", expected);
        }
        let uuid = uuid.map(|found| {
            if let Some(other) = uuids.insert(found.value, name.clone()) {
                let text = format!("`uuid` of {} is also that of VM `{other}`", reader.name);
                problems.at(&found.span, text);
            }
            found.value
        });
        let tier = reader
            .text(problems, "tier", "a name")
            .map(|found| found.value);
        let mut end = |key: &'static str| {
            let Some(found) = reader.text(problems, key, "a host's name") else {
                if purpose == Purpose::Move && !reader.has(key) {
                    reader.missing(problems, key, "a host's name");
                }
                return None;
            };
            // A plan without hosts knows no limits between them: names then say nothing.
            if purpose == Purpose::Plan && hosts.is_empty() {
                return None;
            }
            let at = (key, reader.name.as_str(), &found.span);
            host_named(hosts, &found.value, at, problems).map(|host| (host, found.span))
        };
        let from = end("from");
        let to = end("to");
        if let (Some((from, _)), Some((to, span))) = (&from, &to) {
            if from == to {
                let host = hosts[to.0];
                let text = format!("`to` of {} is `{host}`, where it comes from", reader.name);
                problems.at(span, text);
            }
        }
        let transport = settings::read_transport(&mut reader, problems);
        let profile = read_profile(&mut reader, problems);
        reader.finish(problems);
        vms.push(DraftVm {
            uuid,
            transport,
            known: OutlineVm {
                name,
                tier,
                from: from.map(|(host, _)| host),
                to: to.map(|(host, _)| host),
                profile,
            },
        });
    }
    if vms.is_empty() {
        top.missing(problems, "[[vm]]", "at least one VM to move");
    }
    vms
}

/// A rate that a machine can have.
fn rate(
    reader: &mut TableReader<'_, '_>,
    problems: &mut Problems<'_>,
    key: &'static str,
) -> Option<BytesPerSecond> {
    let found = reader.parsed(problems, key, RATE)?;
    sane(reader, problems, key, &found, &HIGHEST_RATE)
}

/// A rate that a machine can have, and not 0.
fn positive_rate(
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

fn read_profile(reader: &mut TableReader<'_, '_>, problems: &mut Problems<'_>) -> VmProfile {
    let memory = reader.positive(problems, "memory", SIZE);
    let profile = VmProfile {
        memory: memory.and_then(|found| sane(reader, problems, "memory", &found, &LARGEST_SIZE)),
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

fn read_links(
    top: &mut TableReader<'_, '_>,
    hosts: &[&str],
    problems: &mut Problems<'_>,
) -> Vec<Link> {
    let mut links = Vec::new();
    for mut reader in tables(top, "link", problems) {
        let pair = reader.pair(problems, "between");
        if pair.is_none() && !reader.has("between") {
            reader.missing(problems, "between", "two hosts, such as [\"a\", \"b\"]");
        }
        let rate = positive_rate(&mut reader, problems, "rate");
        if rate.is_none() && !reader.has("rate") {
            reader.missing(problems, "rate", RATE);
        }
        let rtt = reader.duration(problems, "rtt", Duration::ZERO..Duration::from_secs(60));
        if let Some(found) = pair {
            let at = ("between", reader.name.as_str(), &found.span);
            let ends = found
                .value
                .each_ref()
                .map(|name| host_named(hosts, name, at, problems));
            if let [Some(a), Some(b)] = ends {
                if a == b {
                    problems.at(&found.span, "`between` in [[link]] names one host twice");
                }
                if let Some(rate) = rate {
                    links.push(Link {
                        between: [a, b],
                        rate,
                        rtt,
                    });
                }
            }
        }
        reader.finish(problems);
    }
    links
}

fn read_traffic(
    top: &mut TableReader<'_, '_>,
    vms: &[DraftVm],
    problems: &mut Problems<'_>,
) -> Vec<Traffic> {
    let names: Vec<&str> = vms.iter().map(|vm| vm.known.name.as_str()).collect();
    let mut traffic = Vec::new();
    for mut reader in tables(top, "traffic", problems) {
        let pair = reader.pair(problems, "between");
        if pair.is_none() && !reader.has("between") {
            reader.missing(problems, "between", "two VMs, such as [\"web\", \"db\"]");
        }
        let rate = rate(&mut reader, problems, "rate");
        if rate.is_none() && !reader.has("rate") {
            reader.missing(problems, "rate", RATE);
        }
        if let Some(found) = pair {
            let ends = found.value.each_ref().map(|name| {
                let index = names.iter().position(|known| known == name).map(VmId);
                if index.is_none() {
                    let hint = nearest(name, &names).map_or_else(
                        || format!("known are {}", names.join(", ")),
                        |vm| format!("did you mean `{vm}`?"),
                    );
                    let text = format!("`between` in [[traffic]]: there is no VM `{name}`; {hint}");
                    problems.at(&found.span, text);
                }
                index
            });
            if let [Some(a), Some(b)] = ends {
                if a == b {
                    problems.at(&found.span, "`between` in [[traffic]] names one VM twice");
                }
                if let Some(rate) = rate {
                    traffic.push(Traffic {
                        between: [a, b],
                        rate,
                    });
                }
            }
        }
        reader.finish(problems);
    }
    traffic
}

#[cfg(test)]
mod tests;
