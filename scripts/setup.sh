#!/bin/bash
# Installs what Muster's testbed needs on Debian 12 and 13: QEMU 8.1 or newer, qemu-utils, iproute2, nftables,
# procps, Python with venv, and a C linker for Rust; with argument `qemu`, what building the patched QEMU
# needs as well. Does nothing, and needs no root, when all is there.
set -euo pipefail

readonly QEMU=${MUSTER_QEMU:-qemu-system-x86_64}
readonly QEMU_MIN=8.1 RUST_MIN=1.85
readonly FOR=${1:-}
readonly BACKPORTS=/etc/apt/sources.list.d/muster-backports.list

die() {
    echo "setup: $*" >&2
    exit 1
}

# at_least FOUND MINIMUM: compares dotted versions.
at_least() {
    [ -n "$1" ] && [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

check_rust() {
    local found
    command -v cargo >/dev/null ||
        die "Rust is missing; get it with: curl https://sh.rustup.rs -sSf | sh (Debian 12's own rustc 1.63 is too old, Debian 13's will do)"
    found=$(rustc --version 2>/dev/null | awk '{print $2}') || true
    at_least "$found" "$RUST_MIN" ||
        die "Rust ${found:-without rustc} is too old, $RUST_MIN or newer is needed (Debian 12's own is 1.63); get it with: curl https://sh.rustup.rs -sSf | sh"
}

qemu_version() {
    "$QEMU" -version 2>/dev/null | sed -n 's/.*version \([0-9][0-9.]*\).*/\1/p' | head -n 1
}

# Prints the packages that are needed and not there.
missing() {
    at_least "$(qemu_version)" "$QEMU_MIN" || echo qemu-system-x86
    PATH=$PATH:/usr/sbin:/sbin
    command -v ip >/dev/null && command -v tc >/dev/null || echo iproute2
    command -v nft >/dev/null || echo nftables
    command -v ps >/dev/null || echo procps
    command -v qemu-img >/dev/null && command -v qemu-io >/dev/null || echo qemu-utils
    command -v python3 >/dev/null || echo python3
    python3 -c 'import venv, ensurepip' 2>/dev/null || echo python3-venv
    command -v cc >/dev/null || echo gcc
    local crt
    crt=$(cc -print-file-name=crt1.o 2>/dev/null || true)
    [ "${crt#/}" != "$crt" ] && [ -e /usr/include/stdio.h ] || echo libc6-dev
    [ "$FOR" != qemu ] || missing_for_qemu
}

# The same for building the patched QEMU. Firmware is there if Debian's QEMU is.
missing_for_qemu() {
    local pair
    for pair in git:git xz:xz-utils flex:flex bison:bison ninja:ninja-build \
        pkg-config:pkg-config make:make perl:perl flock:util-linux; do
        command -v "${pair%%:*}" >/dev/null || echo "${pair#*:}"
    done
    for pair in glib-2.0:libglib2.0-dev gio-2.0:libglib2.0-dev pixman-1:libpixman-1-dev \
        zlib:zlib1g-dev; do
        pkg-config --exists "${pair%%:*}" 2>/dev/null || echo "${pair#*:}"
    done | sort -u
    [ -e /usr/include/libfdt.h ] || echo libfdt-dev
    [ -e /usr/share/qemu/kvmvapic.bin ] || echo qemu-system-data
    [ -e /usr/share/seabios/bios-256k.bin ] || echo seabios
    [ -e /usr/lib/ipxe/qemu/efi-virtio.rom ] || echo ipxe-qemu
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        command -v sudo >/dev/null || die "root is needed to install ${packages[*]}; run this as root or install sudo"
        sudo "$@"
    fi
}

# Prints the sources that Debian's main comes from, as FILE URI SUITE.
debian_sources() {
    # shellcheck disable=SC2016
    apt-get indextargets --no-release-info --format '$(SOURCESENTRY) $(REPO_URI) $(RELEASE) $(COMPONENT)' \
        'Identifier: Packages' |
        awk -v suite="$codename" '$4 == "main" && ($3 == suite || index($3, suite "-") == 1) {
            sub(/:[0-9]+$/, "", $1); print $1, $2, $3 }' | sort -u
}

add_backports() {
    debian_sources | awk '{print $3}' | grep -qx "$codename-backports" && return
    local mirror
    mirror=$(debian_sources | awk -v suite="$codename" '$3 == suite {print $2; exit}')
    echo "setup: adding $codename-backports in $BACKPORTS"
    echo "deb ${mirror:-http://deb.debian.org/debian} $codename-backports main" |
        as_root tee "$BACKPORTS" >/dev/null
}

# Only Debian's own sources are updated: others may be out of reach, and are not needed.
update() {
    local file reached=
    for file in $(debian_sources | awk '{print $1}' | sort -u); do
        if as_root apt-get update -qq --error-on=any -o Dir::Etc::sourcelist="$file" \
            -o Dir::Etc::sourceparts=- -o APT::Get::List-Cleanup=0 -o Acquire::Retries=2 \
            -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20; then
            reached=yes
        else
            echo "setup: not all of $file could be updated; going on with the rest" >&2
        fi
    done
    # Sources may be called `stable`: then there is nothing to choose by.
    [ -n "$reached" ] || as_root apt-get update -qq ||
        echo "setup: no package list could be updated; trying with those there are" >&2
}

case "$FOR" in
'') check_rust ;;
qemu) ;;
*) die "unknown argument \`$FOR'; expected nothing or \`qemu'" ;;
esac
mapfile -t packages < <(missing)
if [ ${#packages[@]} -eq 0 ]; then
    exit 0
fi
if [ -n "${MUSTER_QEMU:-}" ] && [ "${packages[0]}" = qemu-system-x86 ]; then
    die "MUSTER_QEMU=$MUSTER_QEMU is no QEMU $QEMU_MIN or newer; unset it or name another"
fi

# shellcheck disable=SC1091
. /etc/os-release
case "${ID:-}:${VERSION_ID:-}" in
debian:12 | debian:13) codename=$VERSION_CODENAME ;;
*) die "packages are missing (${packages[*]}) and are only installed on Debian 12 and 13, this is ${PRETTY_NAME:-unknown}; install QEMU $QEMU_MIN or newer, iproute2, nftables, procps, python3 with venv, gcc and the C library's headers, then run this again" ;;
esac

echo "setup: installing ${packages[*]}"
from=()
if [ "$VERSION_ID" = 12 ] && [ "${packages[0]}" = qemu-system-x86 ]; then
    add_backports
    from=(-t "$codename-backports")
fi
update
as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    -o Dpkg::Use-Pty=0 "${from[@]}" "${packages[@]}" ||
    die "apt-get could not install ${packages[*]}; see above"

mapfile -t packages < <(missing)
[ ${#packages[@]} -eq 0 ] || die "still missing after the installation: ${packages[*]}"
