//! Local disks: whether they are what the file says, and how large.

use sidecar::protocol::command::PrepareDisk;
use sidecar::protocol::types::{CopyMode, QemuBuild, VmEntry, VmInfo};

use super::Verdict;
use crate::application::{Application, VmId};

/// Looks for the disks of one VM.
pub(super) fn judge(
    app: &Application,
    info: &VmInfo,
    there: Option<&VmEntry>,
    id: VmId,
    verdict: &mut Verdict,
) {
    let vm = app.vm(id);
    let from = &app.host(vm.from).name;
    if vm.disks.is_empty() {
        return;
    }
    let build = info.qemu_build;
    let expected = there.and_then(|entry| entry.disks.as_ref());
    let mut found = Vec::new();
    for disk in &vm.disks {
        let node = &disk.node;
        if expected.is_some_and(|nodes| !nodes.contains(node)) {
            verdict.problems.push(format!(
                "VM {}: host {} has no place for its disk `{node}`; add a [[vm.disk]] to the \
                 sidecar's configuration there",
                vm.name,
                app.host(vm.to).name
            ));
        }
        match info.disks.iter().find(|info| info.node == *node) {
            None => {
                let known: Vec<&str> = info.disks.iter().map(|info| info.node.as_str()).collect();
                let known = match known.as_slice() {
                    [] => "it has none with a name (-blockdev node-name=…)".to_owned(),
                    known => format!("it has {}", known.join(", ")),
                };
                verdict.problems.push(format!(
                    "VM {} at {from}: there is no block node `{node}`; {known}",
                    vm.name
                ));
            }
            Some(info) => found.push(PrepareDisk {
                node: node.clone(),
                size_bytes: info.size_bytes,
                copy_mode: match disk.copy_mode {
                    _ if info.read_only => CopyMode::Background,
                    CopyMode::WriteBlocking if build != QemuBuild::Patched => {
                        verdict.notes.push(format!(
                            "VM {}: disk `{node}` is copied in the background: its QEMU is not \
                             patched, and may crash when a write-blocking copy is given up",
                            vm.name
                        ));
                        CopyMode::Background
                    }
                    mode => mode,
                },
                chain: disk.chain,
                read_only: info.read_only,
            }),
        }
    }
    verdict.disks.insert(id, found);
}
