//! From a case to an application that can be planned.

use std::path::Path;
use std::str::FromStr;

use rate_limiter::{Bytes, BytesPerSecond};

use super::StudyError;
use super::study::{Approach, Case, Study};
use crate::application::{HostId, Outline, OutlineVm, Traffic, VmId};
use crate::scheduler::random::Random;

/// The application of `study` as `approach` finds it in `case`; `draw` chooses among the random
/// rates.
///
/// # Errors
/// The study names what there is not, or the application in it is wrong.
pub fn outline(
    study: &Study,
    case: &Case,
    approach: &Approach,
    draw: u32,
) -> Result<Outline, StudyError> {
    let mut outline = match &study.outline {
        Some(outline) => outline.clone(),
        None => Outline::parse(&study.application, Path::new(&study.name))?,
    };
    let wrong = |text: String| StudyError::Study(format!("{}: {text}", study.name));
    if let Some(rate) = &case.bandwidth {
        outline.allowance.bandwidth = Some(quantity(rate).map_err(wrong)?);
    }
    if !case.vms.is_empty() {
        outline = only(outline, &case.vms).map_err(wrong)?;
    }
    if !approach.order.is_empty() {
        outline = only(outline, &approach.order).map_err(wrong)?;
    }
    place(&mut outline, &case.placement).map_err(wrong)?;
    for (name, size) in &case.writable_working_set {
        let vm = position(&outline, name).map_err(wrong)?;
        let size = quantity(size).map_err(wrong)?;
        outline.vms[vm].profile.writable_working_set = Some(size);
    }
    for (name, rate) in &approach.limits {
        let vm = position(&outline, name).map_err(wrong)?;
        let rate = quantity(rate).map_err(wrong)?;
        let Some(HostId(host)) = outline.vms[vm].from else {
            return Err(wrong(format!(
                "VM {name} has a limit of its own, but no host"
            )));
        };
        outline.hosts[host].nic = Some(rate);
    }
    if let Some(most) = &case.random_traffic {
        let most: BytesPerSecond = quantity(most).map_err(wrong)?;
        let traffic = draw_traffic(&outline, &case.links, most, draw).map_err(wrong)?;
        outline.traffic = traffic;
    }
    if let Some(rewriting) = &study.rewriting {
        for vm in &mut outline.vms {
            rewriting.describe(&mut vm.profile);
        }
    }
    if approach.ballooning {
        outline.vms.iter_mut().for_each(balloon);
    }
    Ok(outline)
}

fn quantity<T: FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| error.to_string())
}

fn position(outline: &Outline, name: &str) -> Result<usize, String> {
    let found = outline.vms.iter().position(|vm| vm.name == name);
    found.ok_or_else(|| format!("there is no VM {name}"))
}

/// Only these VMs, in this order, and what they say to each other.
fn only(outline: Outline, names: &[String]) -> Result<Outline, String> {
    let kept: Result<Vec<usize>, String> =
        names.iter().map(|name| position(&outline, name)).collect();
    let kept = kept?;
    let now = |VmId(before): VmId| kept.iter().position(|&vm| vm == before).map(VmId);
    let traffic = outline.traffic.iter().filter_map(|traffic| {
        let [a, b] = traffic.between;
        Some(Traffic {
            between: [now(a)?, now(b)?],
            rate: traffic.rate,
        })
    });
    Ok(Outline {
        traffic: traffic.collect(),
        vms: kept.iter().map(|&vm| outline.vms[vm].clone()).collect(),
        ..outline
    })
}

/// Puts each set of VMs onto a source host, and onto the destination that belongs to it.
fn place(outline: &mut Outline, placement: &[Vec<String>]) -> Result<(), String> {
    let sources = outline.hosts.len() / 2;
    if placement.len() > sources {
        return Err(format!(
            "{} hosts are no sources and destinations for {} sets of VMs",
            outline.hosts.len(),
            placement.len()
        ));
    }
    for (host, names) in placement.iter().enumerate() {
        for name in names {
            let vm = position(outline, name)?;
            outline.vms[vm].from = Some(HostId(host));
            outline.vms[vm].to = Some(HostId(sources + host));
        }
    }
    Ok(())
}

fn draw_traffic(
    outline: &Outline,
    links: &[[String; 2]],
    most: BytesPerSecond,
    draw: u32,
) -> Result<Vec<Traffic>, String> {
    let mut random = Random(u64::from(draw));
    let mut traffic = Vec::new();
    for [a, b] in links {
        let between = [position(outline, a)?, position(outline, b)?].map(VmId);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a part of a rate"
        )]
        let rate = BytesPerSecond((most.0 as f64 * random.unit()) as u64);
        traffic.push(Traffic { between, rate });
    }
    Ok(traffic)
}

/// Half of the memory that is in no writable working set is free, and given back.
fn balloon(vm: &mut OutlineVm) {
    let set = vm.profile.writable_working_set.map_or(0, |size| size.0);
    if let Some(memory) = &mut vm.profile.memory {
        *memory = Bytes(memory.0 - memory.0.saturating_sub(set) / 2);
    }
}
