#!/bin/sh
# install_arm_python.sh DIRECTORY PYTHON: Debian for arm64 with Python 3.11 and the aarch64 wheels of
# TVM, for the test of tuning on an ARM server. Packages are unpacked, not configured: nothing of
# them runs but under `qemu-aarch64 -L DIRECTORY`. debootstrap wants root.
set -e
if [ "$(id -u)" != 0 ]; then
  echo "debootstrap wants root: the test of tuning on an ARM server is skipped" >&2
  exit 0
fi
if ! command -v debootstrap >/dev/null; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends debootstrap
fi
rm -rf "$1.part"
mkdir -p "$1.part"
debootstrap --arch=arm64 --variant=minbase --download-only \
  --include=python3.11-minimal,libpython3.11-stdlib,libstdc++6 bookworm "$1.part" >"$1.log"
for package in "$1.part"/var/cache/apt/archives/*.deb; do
  dpkg-deb --extract "$package" "$1.part"
  rm "$package"
done
wheels=$(sed -n 's/^\([a-z].*==[^ ]*\).*/\1/p' pipeline/bundle/wheels-aarch64.txt)
"$2" -m pip install --quiet --disable-pip-version-check --only-binary=:all: --python-version=3.11 \
  --platform=manylinux_2_28_aarch64 --platform=manylinux_2_27_aarch64 \
  --platform=manylinux_2_17_aarch64 --target "$1.part/usr/lib/python3/dist-packages" $wheels
rm -rf "$1"
mv "$1.part" "$1"
