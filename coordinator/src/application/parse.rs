//! From the file's tables to an [`Application`]: keys, references, and what must fit together.

mod disks;
mod draft;
mod profile;
mod settings;

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use toml::de::{DeTable, DeValue};
use uuid::Uuid;

use super::reader::{Problem, Problems, TableReader, nearest};
use super::{
    Application, ControlAddress, FILE_VERSION, HostId, Link, Mac, Outline, OutlineHost, OutlineVm,
    Traffic, VmId,
};
use draft::{Draft, DraftHost, DraftVm};
use profile::{positive_rate, rate, read_profile};

const RATE: &str = "a rate such as \"400Mbit/s\" or \"50MiB/s\"";
const SIZE: &str = "a size such as \"512MiB\"";

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
    if let Some(settings) = &settings {
        check_reserve(settings, &hosts, &links, &mut problems);
    }
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

/// Something has to be left of every link and interface.
fn check_reserve(
    settings: &settings::Settings,
    hosts: &[DraftHost],
    links: &[Link],
    problems: &mut Problems<'_>,
) {
    let reserve = settings.application.allowance.reserve;
    let name = |host: HostId| hosts[host.0].known.name.as_str();
    let nics = hosts.iter().filter_map(|host| {
        let rate = host.known.nic?;
        Some((format!("`nic` of host `{}`", host.known.name), rate))
    });
    let links = links.iter().map(|link| {
        let [a, b] = link.between.map(name);
        (format!("[[link]] between `{a}` and `{b}`"), link.rate)
    });
    for (what, rate) in nics.chain(links) {
        if reserve.0 > 0 && rate <= reserve {
            let text =
                format!("`reserve` {reserve} in [application] leaves nothing of {what}, {rate}");
            problems.at(&(0..0), text);
        }
    }
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
pub(super) fn tables<'d, 'i>(
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
    let mut macs: HashMap<Mac, String> = HashMap::new();
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
        let expected = "a hardware address such as \"52:54:00:12:34:56\"";
        let mac = reader
            .parsed::<Mac>(problems, "mac", expected)
            .map(|found| {
                if let Some(other) = macs.insert(found.value, name.clone()) {
                    let text = format!("`mac` of {} is also that of VM `{other}`", reader.name);
                    problems.at(&found.span, text);
                }
                found.value
            });
        let transport = settings::read_transport(&mut reader, problems);
        // 0: it is never slowed.
        let max_throttle = settings::read_max_throttle(&mut reader, problems, 0);
        let disks = disks::read_disks(&mut reader, problems);
        let min_write_rate = positive_rate(&mut reader, problems, "min-write-rate");
        if min_write_rate.is_some() && disks.is_empty() {
            let text = format!(
                "`min-write-rate` in {} is about its `disks`: it has none",
                reader.name
            );
            problems.at(&reader.span, text);
        }
        let balloon = reader.boolean(problems, "balloon");
        let balloon_reserve = profile::read_balloon_reserve(&mut reader, problems);
        let profile = read_profile(&mut reader, problems);
        reader.finish(problems);
        vms.push(DraftVm {
            uuid,
            mac,
            transport,
            disks,
            min_write_rate,
            balloon,
            balloon_reserve,
            known: OutlineVm {
                name,
                max_throttle,
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
