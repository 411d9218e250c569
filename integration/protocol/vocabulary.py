"""What docs/protocol.md gives: the version, names of commands and events, the fields of a report."""

import uuid

PROTOCOL = {"major": 1, "minor": 6}
COMMANDS = {
    "qmp_capabilities", "query-muster-schema", "query-status", "query-host", "query-vms",
    "query-vm", "query-settings", "query-run", "query-decision", "prepare", "start", "pace", "hold",
    "arm", "disarm", "release", "continue", "back", "decide", "commit", "abort", "finish", "throttle", "yank",
    "keep-alive", "set-report-interval", "recover", "forget", "dirty-start", "dirty-stop", "query-dirty",
    "probe-listen", "probe", "throttle-disks", "query-traffic",
}
EVENTS = {
    "PREPARED", "ROUND", "HELD", "ARMED", "STOPPED", "SWITCHING", "ARRIVED", "COMMITTED",
    "ROLLED_BACK", "DIVERGED", "FAILED", "COORDINATOR_LOST", "IN_DOUBT", "DECIDED", "THROTTLED",
    "STATUS", "RUN_ENDED", "DIRTY_STARTED", "DIRTY_ROUND", "DIRTY_ENDED", "PROBED",
    "DISKS_COPIED",
}
VM_REPORT = {
    "vm", "uuid", "role", "transport", "qemu_build", "phase", "round", "total_bytes", "transferred_bytes", "remaining_bytes",
    "dirty_rate_bytes_per_s", "rate_bytes_per_s", "limit_bytes_per_s", "throttle_percent", "history",
    "remaining_at_release_bytes", "stopped_at_us", "resumed_at_us", "rounds", "error",
    "link_wait_ms",
}


def prepare_arguments(sidecar, **changes):
    """A `prepare` that would be accepted."""
    vm = {"vm": "web", "uuid": str(uuid.uuid4()), "token": "ab" * 32}
    arguments = {
        "run": str(uuid.uuid4()), "epoch": 1, "role": "source", "register": sidecar.address, "vms": [vm],
    }
    for key, value in changes.items():
        if key in vm:
            vm[key] = value
        else:
            arguments[key] = value
    return arguments
