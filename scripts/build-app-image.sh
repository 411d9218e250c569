#!/bin/bash
# Builds the image of the application guests: target/app-image/vmlinuz and target/app-image/initrd.
# The kernel, nginx, redis, busybox and the libraries they need are the distribution's packages,
# fetched by apt-get from the sources that this machine has and unpacked here; nothing is installed.
# The app server is integration/app-server, linked statically. When nothing of ours has changed,
# nothing is done; with argument `fresh`, the packages are looked up and fetched anew.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly ROOTS=(nginx redis-tools)
readonly SOURCES=integration/app-image SERVER=integration/app-server

die() {
    echo "app-image: $*" >&2
    exit 1
}

case "${1:-}" in
'' | fresh) ;;
*) die "unknown argument \`$1'; expected nothing or \`fresh'" ;;
esac
target=${CARGO_TARGET_DIR:-target}/app-image
mkdir -p "$target/packages" || die "cannot make $target"
target=$(realpath "$target")
readonly target stamp=$target/stamp tree=$target/tree unpacked=$target/unpacked
readonly lists=$target/lists

exec 9>"$target/lock"
flock 9

wanted=$(cat scripts/build-app-image.sh "$SOURCES"/* "$SERVER/Cargo.toml" "$SERVER"/src/* | sha256sum | cut -d ' ' -f 1)
if [ -z "${1:-}" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
    die "the guests are made of Debian's packages: apt-get and dpkg-deb are needed"

# Package lists of our own are used once the machine's own turn out to be missing or too old.
own=()
apt_cache() {
    apt-cache "${own[@]}" "$@"
}

use_own_lists() {
    [ ${#own[@]} -eq 0 ] || return 1
    echo "app-image: fetching package lists"
    mkdir -p "$lists/partial"
    own=(-o Dir::State::lists="$lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
        -o APT::Sandbox::User=root)
    # One source that is out of reach is no reason to do without the others.
    apt-get "${own[@]}" -qq update -o Acquire::Retries=2 -o Acquire::http::Timeout=20 || true
}

depends() {
    apt_cache depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances "$1" 2>/dev/null | sed -n 's/^ [ |]\(Pre\)\?Depends: \([a-z0-9.+-]*\)$/\2/p'
}

# Prints the packages that are needed, one a line.
closure() {
    local queue=("${ROOTS[@]}") seen=' ' package kernel
    kernel=$(depends linux-image-cloud-amd64 | grep '^linux-image-[0-9]' | head -n 1)
    [ -n "$kernel" ] || return 1
    printf '%s\n' "$kernel" busybox-static cpio
    while [ ${#queue[@]} -gt 0 ]; do
        package=${queue[0]}
        queue=("${queue[@]:1}")
        [[ $seen != *" $package "* ]] || continue
        seen+="$package "
        echo "$package"
        # Libraries only: what installs and configures is not needed.
        mapfile -t -O ${#queue[@]} queue < <(depends "$package" | grep -E '^(lib|zlib1g)')
    done
}

fetch() {
    local packages
    packages=$(closure) || return 1
    rm -f "$target"/packages/*.deb
    # shellcheck disable=SC2086
    (cd "$target/packages" && apt-get "${own[@]}" -qq -o APT::Sandbox::User=root \
        -o Acquire::Retries=2 -o Acquire::http::Timeout=20 download $packages)
}

if [ "${1:-}" = fresh ] || ! ls "$target"/packages/linux-image-*.deb >/dev/null 2>&1; then
    echo "app-image: fetching the packages of kernel, nginx and redis"
    if ! fetch; then
        use_own_lists && fetch || die "packages could not be fetched; see above"
    fi
fi

rm -rf "$tree" "$unpacked" "$stamp"
mkdir -p "$tree" "$unpacked"
for package in "$target"/packages/*.deb; do
    dpkg-deb -x "$package" "$unpacked"
done

mkdir -p "$tree"/{bin,etc,modules,usr/bin,usr/sbin,var/log/nginx,var/lib/nginx,root,dev}
busybox=$(find "$unpacked" -path '*bin/busybox' -type f | head -n 1)
[ -n "$busybox" ] || die "busybox-static holds no busybox"
cp "$busybox" "$tree/bin/busybox"
cp "$SOURCES/nginx.conf.in" "$SOURCES/redis.conf" "$tree/etc/"
install -m 755 "$SOURCES/init" "$tree/init"
echo 'root:x:0:0::/root:/bin/busybox' >"$tree/etc/passwd"
echo 'root:x:0:' >"$tree/etc/group"
cp "$unpacked/usr/sbin/nginx" "$tree/usr/sbin/nginx"
# redis-server is another name of the program that checks its files.
cp "$unpacked/usr/bin/redis-check-rdb" "$tree/usr/bin/redis-server"

# The libraries that the two name, and those that these name.
libs=$(find "$unpacked" -type d -path '*/lib/x86_64-linux-gnu' | paste -sd :)
loader=$(find "$unpacked" -name 'ld-linux-x86-64.so.2' -path '*lib*' | head -n 1)
[ -n "$loader" ] || die "libc6 holds no loader"
loader=$(realpath "$loader")
mkdir -p "$tree/lib64" "$tree/lib/x86_64-linux-gnu"
cp "$loader" "$tree/lib64/ld-linux-x86-64.so.2"
for program in "$tree/usr/sbin/nginx" "$tree/usr/bin/redis-server"; do
    needed=$("$loader" --library-path "$libs" --list "$program") || die "$program cannot be loaded"
    ! grep 'not found' <<<"$needed" >&2 || die "the packages lack a library of $program"
    while read -r file; do
        cp -L "$file" "$tree/lib/x86_64-linux-gnu/"
    done < <(awk '$2 == "=>" && $3 ~ /^\// {print $3}' <<<"$needed")
done

# The modules of a virtio network card and disk, each after those that it needs.
modules=$(find "$unpacked" -type d -path '*lib/modules/*' -name kernel | head -n 1)
[ -n "$modules" ] || die "the kernel's package holds no modules"
module() {
    local name=$1 file
    [[ $order != *" $name.ko "* ]] || return 0
    file=$(find "$modules" -name "${name//_/[_-]}.ko*" | head -n 1)
    # What is not there is built in.
    [ -n "$file" ] || return 0
    case "$file" in
    *.xz) "$tree/bin/busybox" xzcat "$file" >"$tree/modules/$name.ko" ;;
    *) cp "$file" "$tree/modules/$name.ko" ;;
    esac
    local needs need
    needs=$(tr '\0' '\n' <"$tree/modules/$name.ko" | sed -n 's/^depends=//p' | tr ',' ' ')
    for need in $needs; do
        module "${need//-/_}"
    done
    order+="$name.ko "
}
order=' '
for name in virtio_pci virtio_net virtio_blk virtio_balloon; do
    module "$name"
done
echo "$order" >"$tree/modules/order"

echo "app-image: building the app server"
cargo rustc --locked --release --quiet -p muster-app-server --target-dir "$target/build" -- \
    -C target-feature=+crt-static
cp "$target/build/release/muster-app-server" "$tree/usr/bin/"

kernel=$(find "$unpacked/boot" -name 'vmlinuz-*' | head -n 1)
[ -n "$kernel" ] || die "the kernel's package holds no kernel"
cp "$kernel" "$target/vmlinuz"
cpio=$(find "$unpacked" -path '*bin/cpio' -type f | head -n 1)
(cd "$tree" && find . -print0 | LC_ALL=C sort -z |
    "$loader" --library-path "$libs" "$cpio" --null --create --quiet --format newc --owner 0:0) \
    >"$target/initrd"
# Guests of an older image, and whether it boots, are of no use any more.
rm -rf "$unpacked" "$tree" "$target/snapshots" "$target"/no-kvm-*
echo "$wanted" >"$stamp"
echo "app-image: $(basename "$kernel"), initrd of $(($(stat -c %s "$target/initrd") >> 20)) MiB, in $target"
