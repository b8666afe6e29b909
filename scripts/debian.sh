# Packages of Debian's archive, downloaded once to a package state of its own; this machine's is left alone. Sourced after lib.sh.
# shellcheck shell=bash
#
# A state is a directory of the cache, named after its suites.

PATH=$PATH:/usr/sbin:/sbin
need_command apt-get apt
need_command dpkg-deb dpkg
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || need_package debian-archive-keyring "$keyring"

cache=${FT_CACHE_DIR:-${CARGO_TARGET_DIR:-$repository/target}/stock}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

# The mirror this machine uses if it is a Debian.
debian_mirror() {
  { cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null || true; } |
    sed '/^#/d' | sed -n 's#.*\(https\?://[^ ]*/debian\)/\?\( .*\)\?$#\1#p' | sed -n 1p
}

# apt_in STATE COMMAND...
apt_in() {
  local state=$cache/$1 command=$2
  shift 2
  "$command" -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$state/lists" -o Dir::Cache="$state/cache" -o APT::Sandbox::User=root -o APT::Architecture=amd64 "$@"
}

# update_lists STATE SUITE...
update_lists() {
  local name=$1 state=$cache/$1 mirror suite
  shift
  mirror=$(debian_mirror)
  mirror=${mirror:-http://deb.debian.org/debian}
  mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
  for suite in "$@"; do
    case $suite in
      *-security) echo "deb [signed-by=$keyring] ${mirror%/debian}/debian-security $suite main" ;;
      *) echo "deb [signed-by=$keyring] $mirror $suite main" ;;
    esac
  done | sort -u >"$state/sources.list"
  apt_in "$name" apt-get update -qq
}

# unpack STATE PACKAGE DIRECTORY: downloads it at most once.
unpack() {
  local state=$1 package=$2 into=$3
  [ ! -e "$into/.complete" ] || return 0
  rm -rf "$into"
  mkdir -p "$into"
  (cd "$into" && apt_in "$state" apt-get download -qq "$package" && dpkg-deb -x ./*.deb . && rm ./*.deb) >/dev/null ||
    die "the package $package of Debian cannot be downloaded"
  touch "$into/.complete"
}

# unpack_with_dependencies STATE SUITE PACKAGE DIRECTORY: with everything it needs down to the C library.
unpack_with_dependencies() {
  local state=$1 suite=$2 package=$3 into=$4 archives=$cache/$1/cache/archives deb
  [ ! -e "$into/.complete" ] || return 0
  rm -rf "$into"
  mkdir -p "$into"
  # An empty status: as if nothing were installed.
  apt_in "$state" apt-get -o Dir::State::status=/dev/null -qq -y --no-install-recommends --download-only \
    install "$package/$suite" -t "$suite" >/dev/null || die "the package $package of Debian cannot be downloaded"
  for deb in "$archives"/*.deb; do
    dpkg-deb -x "$deb" "$into"
    rm "$deb"
  done
  touch "$into/.complete"
}
