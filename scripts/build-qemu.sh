#!/bin/bash
# Builds the patched QEMU: target/qemu/qemu-system-x86_64, which runs where it lies. With argument
# `tests`, QEMU's own tests of migration and those of the series too, in target/qemu/build. With
# argument `base`, the same source with the same options and without the series instead, as
# target/qemu-base/qemu-system-x86_64: what a plain migration of the patched one is compared with.
#
# The source is, in this order: MUSTER_QEMU_SOURCE (Debian's unpatched source, as a directory or as
# the .orig.tar.xz), or the tarball from the Debian mirror that this machine's apt uses, or from
# Debian's archive of old packages. Whatever it is, qemu-patches/BASE pins what must be in it.
#
# It is unpacked into a Git tree of its own, outside of Muster's. Base and series become commits
# there, and checking out another commit touches only files that differ: that makes a build after
# a changed patch an incremental one. When nothing has changed, nothing is done.
#
# MUSTER_QEMU_CACHE names a directory where finished programs are kept and taken from.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PATCHES=qemu-patches
readonly WHAT=${1:-}
readonly TESTS=(tests/qtest/migration-test tests/qtest/dirty-log-export-test)
# What the source with its Git tree takes, and what a build takes.
readonly SOURCE_MIB=900 BUILD_MIB=300
readonly OPTIONS=(
    --target-list=x86_64-softmmu --without-default-features --enable-kvm --enable-tcg
    # Warnings are for those who write patches, not for other compilers than theirs.
    --disable-werror --disable-debug-info --disable-download --disable-install-blobs --with-pkgversion=muster
    # Firmware of seabios, qemu-system-data and ipxe-qemu, which Debian's source is without.
    --firmwarepath=/usr/share/qemu:/usr/share/seabios:/usr/lib/ipxe/qemu
)

die() {
    echo "build-qemu: $*" >&2
    exit 1
}

say() {
    echo "build-qemu: $*"
}

# Fails, with the end of the log, because of step $1.
failed() {
    tail -n 25 "$log" >&2
    die "$1 failed; all of it is in $log"
}

# shellcheck source=qemu-patches/BASE
. "$PATCHES/BASE"
case "$WHAT" in
'' | tests) name=qemu ;;
base) name=qemu-base ;;
*) die "unknown argument \`$WHAT'; expected nothing, \`tests' or \`base'" ;;
esac
target=${CARGO_TARGET_DIR:-target}/$name
# Both keep their tarball here.
downloads=${CARGO_TARGET_DIR:-target}/qemu
mkdir -p "$target" "$downloads" || die "cannot make $target"
target=$(realpath "$target")
downloads=$(realpath "$downloads")
readonly name target downloads log=$target/log src=$target/src
readonly program=$target/qemu-system-x86_64 stamp=$target/stamp

# Git without anybody's settings; the directory may be another user's, if sudo was used before.
src_git() {
    env -u GIT_INDEX_FILE GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null \
        GIT_AUTHOR_NAME=Muster GIT_AUTHOR_EMAIL=muster@example.org GIT_AUTHOR_DATE='1600000000 +0000' \
        GIT_COMMITTER_NAME=Muster GIT_COMMITTER_EMAIL=muster@example.org \
        GIT_COMMITTER_DATE='1600000000 +0000' ${index:+GIT_INDEX_FILE="$index"} \
        git -c 'safe.directory=*' -c gc.auto=0 -c core.fileMode=true \
        --git-dir="$target/git" --work-tree="$src" "$@"
}

# The patches of the series, one a line; none for the base.
series() {
    [ "$name" = qemu ] || return 0
    [ -e "$PATCHES/series" ] || die "$PATCHES/series is missing"
    sed -e 's/[[:space:]]*#.*//' -e '/^[[:space:]]*$/d' "$PATCHES/series"
}

# What the program depends on, as one number. Libraries differ between distributions.
wanted() {
    local patch
    {
        echo "$VERSION $DEBIAN_SHA256 ${OPTIONS[*]} $(uname -m)"
        grep -E '^(ID|VERSION_ID)=' /etc/os-release || true
        for patch in "${patches[@]}"; do
            echo "$patch"
            cat "$PATCHES/$patch"
        done
    } | sha256sum | cut -d ' ' -f 1
}

runs() {
    [ -x "$1" ] && "$1" -version >/dev/null 2>&1
}

# Fails if fewer than $1 MiB are free.
need_space() {
    local free
    free=$(df -Pk "$target" | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free" -ge "$1" ] ||
        die "$free MiB are free at $target, QEMU's source and its build need $1; free some, or set CARGO_TARGET_DIR"
}

is_pinned() {
    echo "$DEBIAN_SHA256  $1" | sha256sum --check --status
}

# Puts the pinned tarball to $tarball, from a mirror.
download() {
    local mirror url part=$target/$DEBIAN_SOURCE.part helper=/usr/lib/apt/apt-helper
    local mirrors=()
    if command -v apt-get >/dev/null; then
        # All suites of a mirror share its pool, so it does not matter which one this machine uses.
        # shellcheck disable=SC2016
        mapfile -t mirrors < <(apt-get indextargets --no-release-info \
            --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' 2>/dev/null |
            awk '$2 ~ /^(bookworm|trixie|forky|sid|stable|oldstable)$/ && $3 == "main" && !seen[$1]++ {
                print $1 }')
    fi
    [ ${#mirrors[@]} -gt 0 ] || mirrors=(http://deb.debian.org/debian/)
    local urls=()
    for mirror in "${mirrors[@]}"; do
        urls+=("${mirror%/}/pool/main/q/qemu/$DEBIAN_SOURCE")
    done
    urls+=("http://snapshot.debian.org/file/$DEBIAN_SHA1")
    for url in "${urls[@]}"; do
        rm -f "$part"
        say "fetching $url"
        if [ -x "$helper" ]; then
            "$helper" -o Acquire::Retries=2 -o Acquire::http::Timeout=20 -o APT::Sandbox::User= \
                download-file "$url" "$part" "SHA256:$DEBIAN_SHA256" >>"$log" 2>&1 || continue
        elif command -v curl >/dev/null; then
            curl -fsSL --retry 2 --connect-timeout 20 -o "$part" "$url" >>"$log" 2>&1 || continue
        else
            die "neither apt nor curl is here to fetch $DEBIAN_SOURCE; fetch it otherwise and name it in MUSTER_QEMU_SOURCE"
        fi
        if is_pinned "$part"; then
            mv "$part" "$tarball"
            return
        fi
        echo "build-qemu: what came from $url is not the pinned $DEBIAN_SOURCE" >&2
    done
    die "$DEBIAN_SOURCE could not be fetched (see $log); fetch it otherwise and name it in MUSTER_QEMU_SOURCE"
}

# Puts the verified source to $src, as commit refs/muster/base.
unpack() {
    local from=${MUSTER_QEMU_SOURCE:-} tarball=$downloads/$DEBIAN_SOURCE tree
    rm -rf "$src" "$target/git" "$target/build"
    need_space $((SOURCE_MIB + BUILD_MIB))
    mkdir "$src"
    if [ -d "$from" ]; then
        say "copying $from"
        (cd "$from" && tar -cf - --exclude=./.git .) | tar -C "$src" --no-same-owner -xf - ||
            die "cannot copy $from to $src"
    else
        if [ -n "$from" ]; then
            [ -f "$from" ] || die "MUSTER_QEMU_SOURCE=$from does not exist"
            tarball=$from
            is_pinned "$tarball" ||
                die "$tarball is not $DEBIAN_SOURCE: its sha256 is $(sha256sum <"$tarball" | cut -d ' ' -f 1), expected $DEBIAN_SHA256"
        else
            { [ -f "$tarball" ] && is_pinned "$tarball"; } || download
        fi
        say "unpacking $tarball"
        tar -C "$src" --strip-components=1 --no-same-owner -xf "$tarball" || die "cannot unpack $tarball"
    fi
    src_git init -q --object-format=sha256 >>"$log" 2>&1 || failed "git init (2.29 or newer is needed)"
    src_git add -Af . >>"$log" 2>&1 || failed "git add"
    tree=$(src_git write-tree)
    [ "$tree" = "$DEBIAN_TREE" ] ||
        die "${from:-$tarball} is not QEMU $VERSION as Debian packs it, unpatched: its Git tree is $tree, expected $DEBIAN_TREE"
    src_git update-ref refs/muster/base "$(src_git commit-tree -m "QEMU $VERSION" "$tree")"
    src_git update-ref --no-deref HEAD refs/muster/base
}

# Makes $src what base and series say, touching only files that differ.
apply() {
    local patch tree commit index
    if ! src_git diff --quiet HEAD -- 2>>"$log"; then
        src_git diff HEAD -- >"$target/by-hand.diff"
        die "$src was changed by hand: the difference is in $target/by-hand.diff; make a patch of it in $PATCHES, then remove $src and run this again"
    fi
    index=$target/git/series-index
    src_git read-tree refs/muster/base
    commit=$(src_git rev-parse refs/muster/base)
    for patch in "${patches[@]}"; do
        src_git apply --cached --whitespace=nowarn "$PWD/$PATCHES/$patch" 2>>"$log" ||
            failed "applying $PATCHES/$patch to QEMU $VERSION with what precedes it in $PATCHES/series"
        tree=$(src_git write-tree)
        commit=$(src_git commit-tree -p "$commit" -m "$patch" "$tree")
    done
    rm -f "$index"
    index=
    src_git read-tree -m -u HEAD "$commit" 2>>"$log" || failed "checking out the series"
    src_git update-ref --no-deref HEAD "$commit"
}

# Makes $target/build, unless it is there with the same options.
configure() {
    local python=$target/venv/bin/python3 key
    key=$(echo "${OPTIONS[*]}" | cat - "$PATCHES/requirements.txt" | sha256sum)
    if [ -e "$target/build/build.ninja" ] && [ "$(cat "$target/build/muster-options" 2>/dev/null)" = "$key" ]; then
        return
    fi
    say "configuring"
    rm -rf "$target/build" "$target/venv"
    python3 -m venv "$target/venv" >>"$log" 2>&1 || failed "making a Python venv"
    "$target/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --require-hashes \
        -r "$PATCHES/requirements.txt" >>"$log" 2>&1 || failed "installing meson from PyPI"
    # Debian's source is without these, and configuring fails where they are missing and bzip2 is
    # not. Nothing that is built here uses them.
    sed -n "s|^ *'\(edk2-.*\.fd\)',$|$src/pc-bios/\1.bz2|p" "$src/pc-bios/meson.build" | xargs touch
    mkdir "$target/build"
    (cd "$target/build" && "$src/configure" --python="$python" "${OPTIONS[@]}") >>"$log" 2>&1 ||
        failed "configuring QEMU"
    echo "$key" >"$target/build/muster-options"
}

# Makes source and build directory what base and series say.
prepare() {
    scripts/setup.sh qemu
    : >"$log"
    if ! [ -d "$src" ] || ! src_git rev-parse -q --verify refs/muster/base >/dev/null 2>&1; then
        unpack
    fi
    need_space "$BUILD_MIB"
    apply
    configure
}

finish() {
    chmod 755 "$1"
    mv -f "$1" "$program"
    echo "$hash" >"$stamp"
}

# Fails if there is no finished program in the cache, or it does not run here.
take_from_cache() {
    [ -n "$cache" ] && [ -f "$cache/$hash/qemu-system-x86_64" ] || return
    cp "$cache/$hash/qemu-system-x86_64" "$program.new" || return
    if ! runs "$program.new"; then
        say "the program in $cache does not run here; building it"
        return 1
    fi
    finish "$program.new" || return
    say "$program taken from $cache"
}

build() {
    local begin
    begin=$(date +%s)
    prepare
    say "building QEMU $VERSION with ${#patches[@]} patches; log: $log"
    ninja -C "$target/build" qemu-system-x86_64 >>"$log" 2>&1 || failed "building QEMU"
    cp "$target/build/qemu-system-x86_64" "$program.new"
    runs "$program.new" || die "the QEMU that was built does not run: $("$program.new" -version 2>&1 | head -n 3)"
    if [ -n "$cache" ]; then
        if ! { mkdir -p "$cache/$hash" && cp "$program.new" "$cache/$hash/.$$" &&
            mv -f "$cache/$hash/.$$" "$cache/$hash/qemu-system-x86_64"; }; then
            say "the program could not be kept in $cache"
        fi
    fi
    finish "$program.new"
    say "$program built in $(($(date +%s) - begin)) s"
}

build_tests() {
    prepare
    say "building QEMU's tests; log: $log"
    ninja -C "$target/build" "${TESTS[@]}" >>"$log" 2>&1 || failed "building QEMU's tests"
}

mapfile -t patches < <(series)
for patch in "${patches[@]}"; do
    [ -f "$PATCHES/$patch" ] || die "$PATCHES/$patch, named in $PATCHES/series, is missing"
done
hash=$(wanted)
cache=${MUSTER_QEMU_CACHE:-}
readonly hash patches cache

exec 9>"$target/lock"
flock 9
if ! { [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ] && runs "$program"; } && ! take_from_cache; then
    build
fi
[ "$WHAT" != tests ] || build_tests
