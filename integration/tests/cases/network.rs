//! Hosts and links in the kernel.

use std::fs::Permissions;
use std::io::{self, BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rate_limiter::BytesPerSecond;
use testbed::lab::program;
use testbed::net::{Cut, Host, Network, remove_stale, throughput};
use testbed::process::{PidFd, Process};

use super::LIMIT;

const MEASURE: Duration = Duration::from_millis(1500);

fn rate(text: &str) -> Result<BytesPerSecond> {
    Ok(text.parse()?)
}

pub fn link_rate() -> Result<()> {
    let network = Network::create(&["a", "b"], rate("400Mbit/s")?)?;
    let (a, b) = (network.host("a")?, network.host("b")?);
    let link = network.link("b", "a")?;
    for (from, to, asked) in [
        (a, b, "400Mbit/s"),
        (b, a, "400Mbit/s"),
        (a, b, "100Mbit/s"),
    ] {
        let asked = rate(asked)?;
        link.set_rate(asked)?;
        let found = throughput(from, to, MEASURE)?.rate;
        println!(
            "{} to {}: {found}, shaped to {asked}",
            from.name(),
            to.name()
        );
        let allowed = asked.0 * 9 / 10..asked.0 * 11 / 10;
        ensure!(allowed.contains(&found.0), "{found}, asked for {asked}");
    }
    let carried = link.carried()?;
    ensure!(
        carried.first.0 == "a" && carried.first.1.0 > 60_000_000,
        "{carried:?}"
    );
    Ok(())
}

/// A user without root, and what the kernel lets users do decides what must come of it.
pub fn rootless() -> Result<()> {
    const NOBODY: u32 = 65534;
    let directory = tempfile::Builder::new().prefix("muster-").tempdir()?;
    std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755))?;
    let testbed = directory.path().join("muster-testbed");
    std::fs::copy(program("muster-testbed", "MUSTER_TESTBED")?, &testbed)?;
    let as_nobody = |program: &Path| {
        let mut command = Command::new(program);
        command.uid(NOBODY).gid(NOBODY).current_dir("/");
        command
    };
    let probe = as_nobody(Path::new("unshare"))
        .args(["--user", "--net", "--mount", "--map-root-user", "true"])
        .output()?;
    let output = as_nobody(&testbed)
        .args(["link", "--rate", "200Mbit/s", "--seconds", "1"])
        .output()?;
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said);
    println!("{said}");
    if probe.status.success() {
        ensure!(output.status.success(), "{said}");
        ensure!(said.contains("Mbit/s"), "{said}");
    } else {
        ensure!(output.status.code() == Some(1), "{said}");
        ensure!(said.contains("unprivileged_userns_clone"), "{said}");
    }
    Ok(())
}

fn connect(from: &Host, to: &Host, limit: Duration) -> Result<io::Result<TcpStream>> {
    let listener = to.enter(|| TcpListener::bind((to.address(), 0)))??;
    let address = listener.local_addr()?;
    Ok(from.enter(|| TcpStream::connect_timeout(&address, limit))?)
}

pub fn cut_and_restore() -> Result<()> {
    let network = Network::create(&["a", "b"], rate("400Mbit/s")?)?;
    let (a, b) = (network.host("a")?, network.host("b")?);
    let link = network.link("a", "b")?;
    connect(a, b, LIMIT)??;
    for cut in [Cut::Silent, Cut::Down] {
        link.cut(cut)?;
        let result = connect(a, b, Duration::from_millis(300))?;
        println!("{cut:?}: {result:?}");
        ensure!(result.is_err(), "a cut link ({cut:?}) carries");
        link.set_rate(rate("200Mbit/s")?)?;
        ensure!(connect(a, b, Duration::from_millis(300))?.is_err());
        link.restore()?;
        connect(a, b, LIMIT)??;
    }
    Ok(())
}

pub fn three_hosts() -> Result<()> {
    let network = Network::create(&["a", "b", "c"], rate("400Mbit/s")?)?;
    network.link("a", "c")?.cut(Cut::Silent)?;
    for (from, to, reaches) in [
        ("a", "b", true),
        ("b", "c", true),
        ("c", "b", true),
        ("a", "c", false),
    ] {
        let limit = if reaches {
            LIMIT
        } else {
            Duration::from_millis(200)
        };
        let result = connect(network.host(from)?, network.host(to)?, limit)?;
        ensure!(result.is_ok() == reaches, "{from} to {to}: {result:?}");
    }
    Ok(())
}

pub fn hosts_go() -> Result<()> {
    let network = Network::create(&["a", "b"], rate("400Mbit/s")?)?;
    let host = network.host("a")?;
    let path = Path::new("/run/netns").join(host.namespace());
    let mut command = Command::new("sh");
    // A process of its own session, as a sidecar's QEMU is.
    command.args(["-c", "setsid sleep 600 & wait"]);
    let process = Process::start("sh", command, &host.isolation(None))?;
    let deadline = Instant::now() + LIMIT;
    let inside = loop {
        let inside = host.processes();
        if inside.len() == 2 {
            break inside;
        }
        ensure!(Instant::now() < deadline, "found {inside:?}");
        std::thread::yield_now();
    };
    let handles: Vec<_> = inside
        .into_iter()
        .map(PidFd::open)
        .collect::<io::Result<_>>()?;
    ensure!(path.exists());
    drop(network);
    for handle in handles {
        ensure!(handle.wait(LIMIT)?, "a process outlives its host");
    }
    ensure!(!path.exists());
    drop(process);
    Ok(())
}

/// Starts `muster-testbed link`, and returns it with its namespaces once it has measured something.
fn running_testbed() -> Result<(std::process::Child, Vec<String>)> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_muster-testbed"))
        .args(["link", "--seconds", "60"])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = BufReader::new(child.stdout.take().context("no output")?);
    let mut line = String::new();
    output.read_line(&mut line)?;
    // It may go on writing.
    child.stdout = Some(output.into_inner());
    let names = namespaces(&format!("muster{}x", child.id()));
    ensure!(names.len() == 2, "{names:?} after `{line}`");
    Ok((child, names))
}

fn namespaces(start: &str) -> Vec<String> {
    std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(start))
        .collect()
}

pub fn killed_testbed() -> Result<()> {
    let (mut child, names) = running_testbed()?;
    child.kill()?;
    child.wait()?;
    ensure!(namespaces(&names[0]).len() == 1, "SIGKILL leaves it behind");
    let removed = remove_stale()?;
    ensure!(!removed.is_empty());
    for name in names {
        ensure!(namespaces(&name).is_empty(), "{name} is still there");
    }
    Ok(())
}

pub fn interrupted_testbed() -> Result<()> {
    let (mut child, names) = running_testbed()?;
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGINT)?;
    let ended = PidFd::open(child.id()).context("gone")?.wait(LIMIT)?;
    child.kill()?;
    let status = child.wait()?;
    ensure!(ended && status.code() == Some(130), "SIGINT: {status}");
    for name in names {
        ensure!(namespaces(&name).is_empty(), "{name} is still there");
    }
    Ok(())
}
