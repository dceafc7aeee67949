#!/bin/sh
# install_arm.sh DIRECTORY PYTHON: what the tests run ARM code with, and llvm-mca. QEMU and arm64's C and
# C++ libraries come from Debian's packages, installed by root and else unpacked into DIRECTORY;
# TVM's libraries for arm64 go to DIRECTORY/runtime, Debian's musl for arm64 to DIRECTORY/musl.
set -e
packages="libc6-arm64-cross libgcc-s1-arm64-cross libstdc++6-arm64-cross"
if command -v qemu-aarch64 >/dev/null && [ -e /usr/aarch64-linux-gnu/lib/libstdc++.so.6 ]; then
  :
elif [ "$(id -u)" = 0 ]; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends qemu-user $packages
elif [ ! -x "$1/usr/bin/qemu-aarch64-static" ]; then
  mkdir -p "$1/packages"
  (cd "$1/packages" && apt-get download -qq qemu-user-static $packages)
  for package in "$1"/packages/*.deb; do dpkg-deb --extract "$package" "$1"; done
  rm -r "$1/packages"
fi
if ! command -v llvm-mca-19 >/dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -qq && apt-get install -y -qq --no-install-recommends llvm-19 ||
    echo "llvm-19 cannot be installed: tests of --runner mca are skipped" >&2
fi
mkdir -p "$1"
if [ ! -e "$1/musl/lib/ld-musl-aarch64.so.1" ]; then
  place=$(cd "$1" && pwd)/apt  # arm64's lists, beside the machine's own
  mkdir -p "$place/lists/partial" "$place/archives/partial"
  options="-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State=$place"
  options="$options -o Dir::State::status=/dev/null -o Dir::Cache=$place"
  if (cd "$place" && apt-get $options update && apt-get $options download musl); then
    dpkg-deb --extract "$place"/musl_*.deb "$1/musl"
  else
    echo "musl cannot be fetched: the test of a bundle for musl is skipped" >&2
  fi
  rm -r "$place"
fi
exec "$2" - "$1/runtime" <<'END'
import shutil, sys, tempfile
from bertile.bundle import runtime_libraries
from bertile.targets import rows
with tempfile.TemporaryDirectory() as cache:
    found = runtime_libraries.find(rows.resolve("aarch64"), None, cache)
    shutil.copytree(found, sys.argv[1], dirs_exist_ok=True)
END
