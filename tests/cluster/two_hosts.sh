#!/bin/bash
# make test-two-hosts: two network namespaces as two machines, joined by a wire, for check_two_hosts.py. Needs root.
set -euo pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mktemp -d /tmp/fm-stages-hosts.XXXXXX)
hosts=("fm$$a" "fm$$b")

clean_up() {
    status=$?
    trap '' INT TERM
    for host in "${hosts[@]}"; do
        ip netns pids "$host" 2>/dev/null | xargs --no-run-if-empty kill -KILL || true
        ip netns delete "$host" 2>/dev/null || true # and its end of the wire
        rm -rf "/etc/netns/$host"
    done
    rmdir --ignore-fail-on-non-empty /etc/netns 2>/dev/null || true
    rm -rf "$folder"
    exit $status
}
trap clean_up EXIT
trap 'exit 130' INT TERM

[ "$(id -u)" -eq 0 ] || { echo "Network namespaces need root."; exit 1; }
command -v ip >/dev/null || { apt-get update -qq && apt-get install -qq -y iproute2 >/dev/null; }

for i in 0 1; do
    host=${hosts[i]} other=${hosts[1 - i]}
    ip netns add "$host"
    ip -n "$host" link set lo up
    mkdir -p "/etc/netns/$host" # what lies there is /etc/... for processes that `ip netns exec` starts
    # as Debian writes it: a host's own name leads to itself alone, and gloo has to be told the interface
    printf '127.0.0.1 localhost\n127.0.1.1 %s\n10.177.0.%s %s\n' "$host" "$((2 - i))" "$other" >"/etc/netns/$host/hosts"
done
export GLOO_SOCKET_IFNAME=wire
ip link add wire netns "${hosts[0]}" type veth peer name wire netns "${hosts[1]}"
for i in 0 1; do
    ip -n "${hosts[i]}" address add "10.177.0.$((i + 1))/24" dev wire
    ip -n "${hosts[i]}" link set wire up
done
echo "Two network namespaces, ${hosts[*]}, are joined by a wire."

export PYTHONPATH=$repository OMP_NUM_THREADS=1
cd "$folder"
python "$repository/tests/cluster/check_two_hosts.py" "${hosts[@]}"
