#!/bin/bash
# Runs QEMU's own test of migration (its default set) and the tests of the series on the patched
# QEMU, and sums up. Takes KVM where it is to be had, else TCG; arguments `kvm` and `tcg` choose.
#
# MUSTER_QEMU_CHECK_LIMIT is how many seconds each of the programs may take.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly LIMIT=${MUSTER_QEMU_CHECK_LIMIT:-900}

die() {
    echo "check-qemu: $*" >&2
    exit 1
}

scripts/build-qemu.sh tests
target=$(realpath "${CARGO_TARGET_DIR:-target}/qemu")
readonly target log=$target/check.log qemu=$target/qemu-system-x86_64

tests=$(mktemp -d)
trap 'rm -rf "$tests"' EXIT
# QEMU's tests ask for KVM first and for TCG after it. They know by the program's name what it is.
mkdir "$tests/tcg"
cat >"$tests/tcg/qemu-system-x86_64" <<EOF
#!/bin/bash
exec "$qemu" "\${@/#kvm/tcg}"
EOF
chmod 755 "$tests/tcg/qemu-system-x86_64"

status=0

# run ACCELERATOR NAME PROGRAM ARGUMENT...: one program, and what came of it.
run() {
    local accel=$1 name=$2 program=$qemu begin code=0 tap=$tests/tap
    shift 2
    [ "$accel" = kvm ] || program=$tests/tcg/qemu-system-x86_64
    begin=$(date +%s)
    echo "check-qemu: $name, $accel"
    (
        cd "$target/build"
        export TMPDIR=$tests QTEST_QEMU_BINARY=$program PYTHON=$target/venv/bin/python3
        exec timeout --kill-after=10 "$LIMIT" "$@" --tap -k
    ) >"$tap" 2>&1 || code=$?
    {
        echo "== $name, $accel: $*"
        cat "$tap"
    } >>"$log"
    awk -v code="$code" -v limit="$LIMIT" -v seconds="$(($(date +%s) - begin))" '
        /^ok .*# SKIP by request/ { planned--; next }
        /^ok .*# SKIP/ { skipped++; print "  skipped: " $0; next }
        /^ok / { passed++ }
        /^not ok / { failed++; print "  FAILED: " $0 }
        /^Bail out!/ { print "  FAILED: " $0 }
        /^1\.\.[0-9]/ { planned += substr($0, 4) }
        END {
            if (code == 124 || code == 137) print "  FAILED: not done within " limit " s"
            ok = code == 0 && passed > 0 && passed + skipped == planned
            if (code == 0 && !ok) print "  FAILED: " planned + 0 " tests were to run"
            printf "  %s: %d passed, %d failed, %d skipped, %d s\n",
                ok ? "ok" : "FAILED", passed, failed, skipped, seconds
            exit !ok
        }' "$tap" || status=1
}

# all ACCELERATOR: everything with it.
all() {
    local test=tests/qtest/migration-test hold=/x86_64/migration/hold
    run "$1" migration-test "$test" -x "$hold"
    run "$1" "hold tests" "$test" --full -r "$hold"
    run "$1" dirty-log-export-test tests/qtest/dirty-log-export-test
}

accels=("$@")
if [ ${#accels[@]} -eq 0 ]; then
    accels=(tcg)
    { : <>/dev/kvm; } 2>/dev/null && accels=(kvm)
fi
: >"$log"
for accel in "${accels[@]}"; do
    case "$accel" in
    kvm) { : <>/dev/kvm; } 2>/dev/null || die "/dev/kvm cannot be opened; \`tcg' does without it" ;;
    tcg) ;;
    *) die "unknown accelerator \`$accel'; expected kvm or tcg" ;;
    esac
    all "$accel"
done
[ "$status" = 0 ] || die "not all passed; all of the output is in $log"
