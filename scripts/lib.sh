# Shared by scripts/demo, scripts/test and scripts/bench; sourced, not run.
# shellcheck shell=bash

set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
guest_elf=$repository/guest/ledger/target/x86_64-unknown-linux-gnu/release/ledger
# shellcheck disable=SC2034 # for those who source this
release_dir=${CARGO_TARGET_DIR:-$repository/target}/release

die() {
  echo "${0##*/}: $*" >&2
  exit 3
}

# Installs a Debian package for a missing command, or says what to install.
need_command() {
  command -v "$1" >/dev/null || need_package "$2" "$1"
}

# Installs a Debian package, or says that it is needed for something.
need_package() {
  local package=$1 command=$2
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing $package" >&2
    { apt-get install -qq -y "$package" || { apt-get update -qq && apt-get install -qq -y "$package"; }; } \
      >/dev/null 2>&1 || die "\`apt-get install $package\` failed; it is needed for \`$command\`"
    return
  fi
  die "\`$command\` is missing: install the package $package (Debian, Ubuntu: apt-get install $package)"
}

# The newest of the rust-version fields: the workspace's and the guest's.
rust_version_needed() {
  sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repository/Cargo.toml" "$repository/guest/ledger/Cargo.toml" | sort -V | tail -n 1
}

need_cargo() {
  local needed found
  needed=$(rust_version_needed)
  command -v cargo >/dev/null || [ ! -x "$HOME/.cargo/bin/cargo" ] || PATH=$HOME/.cargo/bin:$PATH
  command -v cargo >/dev/null || die "cargo is missing: install Rust $needed or newer with rustup (https://rustup.rs)"
  found=$(rustc --version | sed -n 's/^rustc \([0-9.]*\).*/\1/p')
  [ "$(printf '%s\n' "$needed" "$found" | sort -V | head -n 1)" = "$needed" ] ||
    die "Rust $found is too old, $needed is needed: \`rustup update stable\` (https://rustup.rs)"
}

need_tools() {
  # Root's own directories are not in every user's PATH, and `ip` is there.
  PATH=$PATH:/usr/sbin:/sbin
  need_command ip iproute2
  need_command unshare util-linux
  need_command cc gcc
  need_command protoc protobuf-compiler
  # A separate package, which protobuf-compiler only recommends.
  protoc --descriptor_set_out=/dev/null google/protobuf/descriptor.proto 2>/dev/null || need_package libprotobuf-dev protoc
  need_cargo
}

# The devices a machine needs, with one clear line for each way to be without them.
need_devices() {
  local device
  for device in /dev/kvm /dev/net/tun; do
    [ -e "$device" ] || die "$device is missing: $(device_advice "$device")"
    need_access "$device"
  done
}

need_access() {
  { [ -r "$1" ] && [ -w "$1" ]; } ||
    die "$1 may not be opened by user $(id -un): run as root, or let that user in ($(access_advice "$1"))"
}

device_advice() {
  case $1 in
    /dev/kvm) echo "load kvm_intel or kvm_amd (virtualization enabled in the firmware), or switch nested virtualization on" ;;
    *) echo "load the module tun" ;;
  esac
}

access_advice() {
  case $1 in
    /dev/kvm) echo "usermod -aG kvm $(id -un), then log in again" ;;
    *) echo "chmod 666 $1" ;;
  esac
}

# Runs a command as root of the laboratory: as it is for root, otherwise in a user namespace.
in_lab() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
    return
  fi
  unshare --user --map-root-user --net true 2>/dev/null ||
    die "this user may not create user namespaces: run as root, or allow them (sysctl kernel.unprivileged_userns_clone=1; on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0)"
  unshare --user --map-root-user -- "$@"
}

build_guest() {
  (cd "$repository/guest/ledger" && cargo build --release --locked "$@")
  [ -f "$guest_elf" ] || die "the guest was built, but $guest_elf is missing"
}

build_release() {
  (cd "$repository" && cargo build --release --locked --workspace "$@")
}

# The Linux demo guest: Debian's own kernel, the ledger service, busybox' httpd; made once for each kernel and each change of those.
# Sets linux_guest to its directory.
need_linux_guest() {
  local kernel=$1 stamp build
  build=$(mktemp -d)
  (
    cd "$repository"
    cargo rustc --quiet --release --locked -p ledger-linux --bin ledger-linux -- -C target-feature=+crt-static -C strip=symbols
    cp "$release_dir/ledger-linux" "$build/"
  )
  # The file that the witness fetches: see tests/harness/src/download.rs.
  awk 'BEGIN { for (n = 1; n <= 524288; n++) printf "%07d\n", n }' >"$build/numbers"
  linux_guest=${FT_CACHE_DIR:-${CARGO_TARGET_DIR:-$repository/target}/stock}/linux-$kernel
  stamp=$(cat "$repository/scripts/guest-image" "$repository"/guest/ledger-linux/{init,load} "$build"/* | sha256sum)
  if [ "$stamp" != "$(cat "$linux_guest/stamp" 2>/dev/null)" ]; then
    "$repository/scripts/guest-image" --kernel "$kernel" --out "$linux_guest" --init "$repository/guest/ledger-linux/init" \
      --module virtio_mmio --module virtio_blk --module virtio_net --program "$build/ledger-linux" \
      --file "$repository/guest/ledger-linux/load=usr/bin/load" --file "$build/numbers=www/numbers"
    echo "$stamp" >"$linux_guest/stamp"
  fi
  rm -r "$build"
}

# Whether this host's KVM executes all of a Linux kernel: the shim that was just built examines it.
kvm_runs_linux() {
  [ -e /dev/kvm ] || return 1
  need_access /dev/kvm
  "$release_dir/ft-vcpu-shim" check --json 2>/dev/null | grep -qE '"linux": *\{"works": *true'
}

# lab_with_pair SEED [LAB OPTION]... -- COMMAND...: the lab with everything a pair with the guest of need_linux_guest needs.
lab_with_pair() {
  local seed=$1 program options=()
  shift
  for program in ft-demo ft-bench ft-log vhost-ft-blk vhost-ft-net ft-vcpu-shim; do
    options+=(--program "$release_dir/$program")
  done
  "$repository/scripts/lab" run --seed "$seed" "${options[@]}" \
    --file "$linux_guest/vmlinuz=guest/vmlinuz" --file "$linux_guest/initrd=guest/initrd" \
    --file "$repository/tests/nested/run-linux=usr/bin/run-linux" "$@"
}

# run_in_lab ft-demo|ft-bench SEED [ARGUMENT]...: files that the arguments name for writing come back to where they were named.
run_in_lab() {
  local program=$1 seed=$2 results=$repository/out/$1 arguments=() returned=() index status=0
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in
      --json=* | --svg=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
      --json | --svg)
        [ $# -ge 2 ] || die "$1 wants a file"
        returned+=("${1#--}=$2")
        arguments+=("$1" "/results/report.${1#--}")
        shift
        ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  rm -rf "$results"
  lab_with_pair "$seed" --results "$results" -- sh /usr/bin/run-linux "$program" "${arguments[@]}" || status=$?
  for index in "${returned[@]}"; do
    [ ! -e "$results/report.${index%%=*}" ] || cp "$results/report.${index%%=*}" "${index#*=}"
  done
  return "$status"
}

# Debian's own kernel with what the jobs of tests/stock need; made once for each kernel and each change of those.
need_stock_guest() {
  local kernel=$1 stamp
  need_command qemu-system-x86_64 qemu-system-x86
  need_command fio fio
  need_command mkfs.ext4 e2fsprogs
  need_command blkdiscard util-linux
  stock_guest=${FT_CACHE_DIR:-${CARGO_TARGET_DIR:-$repository/target}/stock}/guest-$kernel
  stamp=$(cat "$repository"/scripts/guest-image "$repository"/tests/stock/init "$repository"/tests/stock/jobs/* | sha256sum)
  [ "$stamp" != "$(cat "$stock_guest/stamp" 2>/dev/null)" ] || return 0
  "$repository/scripts/guest-image" --kernel "$kernel" --out "$stock_guest" --module virtio_blk --module virtio_net --module virtio_pci \
    --program fio --program mkfs.ext4 --program e2fsck --program blkdiscard --program fstrim
  echo "$stamp" >"$stock_guest/stamp"
}

# A machine whose memory a vhost-user backend can share.
stock_qemu_options() {
  echo "-machine q35,memory-backend=memory -accel ${FT_ACCEL:-tcg} -cpu max -smp 2 -m 768" \
    "-object memory-backend-memfd,id=memory,size=768M,share=on" \
    "-nodefaults -no-reboot -nographic -serial stdio -monitor none"
}
