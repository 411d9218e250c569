//! What the templates' QEMU programs are, found out aside when the sidecar starts: their version, and
//! whether they are patched.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::migration::identity::HOLD_CAPABILITY;
use crate::protocol::types::QemuBuild;

/// How long a program may take to say something.
const DEADLINE: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Asks for the capabilities and ends it. Without a machine no memory is taken, nothing is opened.
const QUESTIONS: &str = concat!(
    r#"{"execute":"qmp_capabilities"}"#,
    r#"{"execute":"query-migrate-capabilities"}"#,
    r#"{"execute":"quit"}"#
);
const NO_MACHINE: [&str; 7] = [
    "-M",
    "none",
    "-nodefaults",
    "-display",
    "none",
    "-qmp",
    "stdio",
];

#[derive(Debug, Clone, Default)]
struct Known {
    version: Option<String>,
    build: Option<QemuBuild>,
}

/// Every program of the templates.
#[derive(Debug)]
pub struct Programs {
    first: Option<String>,
    known: Arc<Mutex<BTreeMap<String, Known>>>,
}

impl Programs {
    /// Begins to ask the programs of this configuration.
    #[must_use]
    pub fn ask(config: &Config) -> Self {
        let programs = config.vms.iter().filter_map(|vm| vm.incoming.first());
        let mut programs: Vec<String> = programs.cloned().collect();
        let first = programs.first().cloned();
        programs.sort();
        programs.dedup();
        let known: Arc<Mutex<BTreeMap<String, Known>>> = Arc::default();
        let found = Arc::clone(&known);
        std::thread::spawn(move || {
            for program in programs {
                let answers = Known {
                    version: version_of(&program),
                    build: build_of(&program),
                };
                lock(&found).insert(program, answers);
            }
        });
        Self { first, known }
    }

    /// The version of the first template's program, once it is known.
    #[must_use]
    pub fn version(&self) -> Option<String> {
        let first = self.first.as_ref()?;
        lock(&self.known).get(first)?.version.clone()
    }

    /// Whether this program is patched, once that is known.
    #[must_use]
    pub fn build(&self, program: &str) -> Option<QemuBuild> {
        lock(&self.known).get(program)?.build
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a program writes for this input.
fn output_of(program: &str, arguments: &[&str], input: &str) -> Option<String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that has ended already said what it had to say.
        let _ = stdin.write_all(input.as_bytes());
        let by = Instant::now() + DEADLINE;
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < by {
            std::thread::sleep(LOOK_EVERY);
        }
    }
    // Gone already is as good.
    let _ = child.kill();
    let output = child.wait_with_output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What version a QEMU program says it is, such as `10.0.2`.
fn version_of(program: &str) -> Option<String> {
    let text = output_of(program, &["--version"], "")?;
    let version = text.split_once("version ")?.1;
    let end = version
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(version.len());
    (end > 0).then(|| version[..end].to_owned())
}

fn build_of(program: &str) -> Option<QemuBuild> {
    let said = output_of(program, &NO_MACHINE, QUESTIONS)?;
    if said.contains(&format!("\"{HOLD_CAPABILITY}\"")) {
        return Some(QemuBuild::Patched);
    }
    said.contains("\"return-path\"").then_some(QemuBuild::Stock)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> tempfile::TempPath {
        use std::os::unix::fs::PermissionsExt;
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        write!(file, "#!/bin/sh\n{text}\n").expect("writes");
        let mode = std::fs::Permissions::from_mode(0o755);
        file.as_file().set_permissions(mode).expect("executable");
        file.into_temp_path()
    }

    #[test]
    fn programs_say_what_they_are() {
        let stock = script(
            r#"[ "$1" = --version ] && echo "QEMU emulator version 10.0.2 (Debian)" || echo '[{"capability": "return-path"}]'"#,
        );
        let stock = stock.to_str().expect("UTF-8");
        assert_eq!(version_of(stock).as_deref(), Some("10.0.2"));
        assert_eq!(build_of(stock), Some(QemuBuild::Stock));
        let patched = script(r#"echo '["return-path", "switchover-hold"]'"#);
        assert_eq!(
            build_of(patched.to_str().expect("UTF-8")),
            Some(QemuBuild::Patched)
        );
        let other = script("exit 1");
        assert_eq!(build_of(other.to_str().expect("UTF-8")), None);
        assert_eq!(build_of("/no/such/qemu"), None);
    }
}
