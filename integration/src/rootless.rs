//! The testbed without root: in namespaces of its own, where it is root.
//!
//! A user namespace gives its first process every capability over the network and mount namespaces
//! made with it (user_namespaces(7)), which is all that hosts, bridges, taps, shaping and the counters
//! of nftables take. Outside nothing is changed, and nothing is left: with the last process the
//! namespaces go. What it cannot give is access to devices: `/dev/kvm` and `/dev/net/tun` must be the
//! user's to open, as most distributions have them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

/// Names of network namespaces, and locks on them, are kept below it.
const RUN: &str = "/run";

/// Makes this process root of namespaces of its own, if it is not root. To be called while it has one
/// thread.
///
/// # Errors
/// The kernel does not let users make namespaces.
pub fn become_root() -> Result<()> {
    let (user, group) = (geteuid(), getegid());
    if user.is_root() {
        return Ok(());
    }
    let all = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
    unshare(all).context(
        "without root the testbed needs namespaces of its own, and the kernel refuses them: allow \
         them (`sysctl kernel.unprivileged_userns_clone=1`, or `user.max_user_namespaces` and, where \
         AppArmor restricts them, `kernel.apparmor_restrict_unprivileged_userns=0`), or run it with \
         sudo",
    )?;
    // Without this a user may not map a group (user_namespaces(7)).
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("0 {user} 1"))?;
    write("/proc/self/gid_map", &format!("0 {group} 1"))?;
    let nothing: Option<&str> = None;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(nothing, "/", nothing, private, nothing).context("cannot make the mounts private")?;
    mount(Some("run"), RUN, Some("tmpfs"), MsFlags::empty(), nothing)
        .with_context(|| format!("cannot mount a {RUN} of its own"))?;
    Ok(())
}

fn write(path: &str, text: &str) -> Result<()> {
    fs::write(Path::new(path), text).with_context(|| format!("cannot write {path}"))
}
