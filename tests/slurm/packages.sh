#!/usr/bin/env bash
# Installs Debian's packages for the tests on a real Slurm, and prints their names. It starts no services.
set -euo pipefail

packages=(slurmctld slurmd slurm-client slurmdbd mariadb-server munge iproute2 util-linux)
missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "error: make test-cluster installs ${missing[*]} and makes network namespaces: it needs root" >&2
    exit 2
fi
echo "installing ${missing[*]}"
policy=/usr/sbin/policy-rc.d # While this file exists, Debian starts no installed service.
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
log=$(mktemp)
apt-get update >"$log" 2>&1 || true # An old list of packages may be enough.
if ! DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends \
    "${missing[@]}" >>"$log" 2>&1; then
    cat "$log"
    exit 1
fi
rm -f "$log"
