//! How a VM's stream is to go: what the file asks for, and what the QEMUs found can do.

use sidecar::protocol::types::{QemuBuild, Transport};

use crate::application::{Application, OnNonConvergence, TransportChoice, VmId};

/// What was found at both ends of a VM.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    /// The QEMU it runs in.
    pub source: QemuBuild,
    /// The one that is to receive it, where that is known.
    pub destination: Option<QemuBuild>,
    /// Whether the VM is to be held.
    pub hold: bool,
}

/// The transport of this VM, with a note where `auto` did not take the better one; or what stands in
/// the way.
pub(super) fn choose(
    app: &Application,
    id: VmId,
    found: Found,
) -> Result<(Transport, Option<String>), String> {
    let vm = app.vm(id);
    let throttles = found.hold && app.on_non_convergence == OnNonConvergence::Throttle;
    let against = if app.multifd_channels > 0 {
        Some("multifd needs several connections, transport direct has one")
    } else if !vm.disks.is_empty() {
        Some("its local disks need the relay")
    } else if throttles {
        Some("a patched QEMU does not throttle while it holds (on-non-convergence = throttle)")
    } else {
        None
    };
    let refused = |reason: &str| {
        Err(format!(
            "VM {}: transport direct: {reason}; use transport = \"relay\" or \"auto\"",
            vm.name
        ))
    };
    let patched = |build| build == QemuBuild::Patched;
    match app.transport_of(id) {
        TransportChoice::Relay => Ok((Transport::Relay, None)),
        TransportChoice::Direct => match against {
            Some(reason) => refused(reason),
            None if found.hold && !patched(found.source) => refused(&format!(
                "stock QEMU at {} is held by what the relay keeps back, and nothing would hold it",
                app.host(vm.from).name
            )),
            None => Ok((Transport::Direct, None)),
        },
        TransportChoice::Auto => {
            let both = patched(found.source) && found.destination.is_some_and(patched);
            Ok(match against.filter(|_| both) {
                Some(reason) => {
                    let note = format!("VM {} goes through the relay: {reason}", vm.name);
                    (Transport::Relay, Some(note))
                }
                None if both => (Transport::Direct, None),
                None => (Transport::Relay, None),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn app(extra: &str) -> Application {
        let text = format!(
            r#"
            version = 1
            application = {{ name = "shop", bandwidth = "50MB/s", {extra} }}
            host = [{{ name = "a", control = "unix:/a" }}, {{ name = "b", control = "unix:/b" }}]
            vm = [{{ name = "web", uuid = "00000000-0000-0000-0000-000000000001", from = "a", to = "b" }}]
        "#
        );
        Application::parse(&text, Path::new("test")).expect("good")
    }

    fn found(source: QemuBuild, destination: Option<QemuBuild>, hold: bool) -> Found {
        Found {
            source,
            destination,
            hold,
        }
    }

    const STOCK: QemuBuild = QemuBuild::Stock;
    const PATCHED: QemuBuild = QemuBuild::Patched;

    #[test]
    fn auto_is_direct_where_both_are_patched() {
        let choose = |extra, found| choose(&app(extra), VmId(0), found).expect("possible");
        let both = found(PATCHED, Some(PATCHED), true);
        assert_eq!(choose("", both), (Transport::Direct, None));
        for one in [
            found(STOCK, Some(PATCHED), true),
            found(PATCHED, Some(STOCK), true),
            found(PATCHED, None, true),
        ] {
            assert_eq!(choose("", one), (Transport::Relay, None));
        }
        for extra in ["multifd-channels = 2", "on-non-convergence = \"throttle\""] {
            let (transport, note) = choose(extra, both);
            assert_eq!(transport, Transport::Relay);
            assert!(note.is_some_and(|note| note.contains("web goes through the relay")));
        }
        assert_eq!(
            choose("transport = \"relay\"", both),
            (Transport::Relay, None)
        );
    }

    #[test]
    fn direct_needs_somebody_who_holds() {
        let direct = app("transport = \"direct\"");
        let stock = found(STOCK, Some(STOCK), true);
        let error = choose(&direct, VmId(0), stock).expect_err("nobody holds");
        assert!(error.contains("nothing would hold it"), "{error}");
        let free = found(STOCK, Some(STOCK), false);
        assert_eq!(
            choose(&direct, VmId(0), free),
            Ok((Transport::Direct, None))
        );
        let several = app("transport = \"direct\", multifd-channels = 2");
        assert!(choose(&several, VmId(0), free).is_err());
    }
}
