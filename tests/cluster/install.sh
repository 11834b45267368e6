#!/usr/bin/env bash
# Install the programs that the tests on several hosts start: sshd, pdsh, ip, munge, SLURM. Debian and Ubuntu; as root.
# The packages' own services are kept from starting: only their programs are wanted. Where nothing can be installed this
# says so and returns 0: the tests that lack something are skipped then, each with what it lacks.
set -euo pipefail

if [[ $(id -u) != 0 ]]; then
    echo "not root: the tests on several hosts are skipped, as they make network namespaces" >&2
    exit 0
fi
absent=()
for package in openssh-server openssh-client pdsh iproute2 procps munge slurmctld slurmd slurm-client; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || absent+=("$package")
done
if [[ ${#absent[@]} == 0 ]]; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "no apt-get here; please install: ${absent[*]}" >&2
    exit 0
fi
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || true # one source of several may be out of reach
if ! apt-get install -y -qq --no-install-recommends "${absent[@]}" >/dev/null; then
    echo "could not be installed: ${absent[*]}; tests that need them are skipped" >&2
fi
