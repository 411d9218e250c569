#!/bin/bash
# Drives a sidecar with qemu.qmp, QEMU's own QMP client for Python.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=${CARGO_TARGET_DIR:-target}/venv PACKAGE=qemu.qmp==0.0.6
readonly TESTS=integration/protocol

if [ ! -e "$VENV/$PACKAGE" ]; then
    python3 -m venv --clear "$VENV"
    "$VENV/bin/pip" install --quiet --disable-pip-version-check "$PACKAGE"
    touch "$VENV/$PACKAGE"
fi
exec "$VENV/bin/python" -m unittest discover --verbose --start-directory "$TESTS" "$@"
