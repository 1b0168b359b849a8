#!/bin/bash
# Trains one run on two "hosts": network namespaces of this machine, connected by a virtual cable, with
# a torchrun in each. Then it kills a process of the second host, and the run continues.
# Needs root and iproute2:  docs/two_hosts.sh [FOLDER]
set -euo pipefail
folder=${1:-$(mktemp -d)}
python=${PYTHON:-python3}
run=$folder/run
mkdir -p "$folder"

hosts() { for host in a b; do "$@" $host; done; }
clean() {
    ip netns pids "simsiam-$1" 2> /dev/null | xargs -r kill 2> /dev/null || true
    ip netns del "simsiam-$1" 2> /dev/null || true
    rm -rf "/etc/netns/simsiam-$1"
}
trap 'hosts clean' EXIT
hosts clean
ip netns add simsiam-a
ip netns add simsiam-b
ip link add cable-a netns simsiam-a type veth peer name cable-b netns simsiam-b
address() { [ "$1" = a ] && echo 10.77.0.1 || echo 10.77.0.2; }
plug() {
    # `ip netns exec` shows these files in /etc: names for the addresses, and no name server.
    mkdir -p "/etc/netns/simsiam-$1"
    printf '%s\n' '127.0.0.1 localhost' {,::ffff:}'10.77.0.1 simsiam-a' \
        {,::ffff:}'10.77.0.2 simsiam-b' > "/etc/netns/simsiam-$1/hosts"
    echo > "/etc/netns/simsiam-$1/resolv.conf"
    ip -n "simsiam-$1" addr add "$(address "$1")/24" dev "cable-$1"
    ip -n "simsiam-$1" link set "cable-$1" up
    ip -n "simsiam-$1" link set lo up
}
hosts plug

# The same command on each host, except for its name and address. is_host is set because both have
# the same host name.
start() {
    GLOO_SOCKET_IFNAME=cable-$1 OMP_NUM_THREADS=1 ip netns exec "simsiam-$1" "$python" -m torch.distributed.run \
        --nnodes=2 --nproc-per-node=1 --max-restarts=3 --local-addr="$(address "$1")" \
        --rdzv-backend=c10d --rdzv-endpoint=10.77.0.1:29400 --rdzv-id=two-hosts \
        --rdzv-conf="is_host=$([ "$1" = a ] && echo 1 || echo 0)" \
        -m simsiam pretrain shapes --out "$run" --device cpu --limit 2048 --epochs 8 --log-every 1 \
        --save-seconds 5 \
        > "$folder/host-$1.log" 2>&1 &
    agents+=($!)
}
agents=()
hosts start
echo "two hosts, simsiam-a and simsiam-b, train shapes together"

logged() {
    [ -f "$run/metrics.jsonl" ] && tail -n 1 "$run/metrics.jsonl" |
        grep -o '"step": [0-9]*' | grep -o '[0-9]*' || echo 0
}
until [ "$(logged)" -ge 40 ]; do
    kill -0 "${agents[0]}" || { cat "$folder"/host-*.log; exit 1; }
    sleep 0.2
done
worker=$(ip netns pids simsiam-b | while read -r pid; do
    grep -qz '^RANK=' "/proc/$pid/environ" && echo "$pid" && break
done)
echo "after step $(logged): kill -9 the process of simsiam-b"
kill -9 "$worker"
wait "${agents[@]}"

for host in a b; do
    echo "--- host $host"
    grep -v -e '^W[0-9]' -e '^$' "$folder/host-$host.log" | cut -c1-150
done
echo "--- the run"
"$python" - "$run" <<'PYTHON'
import json, sys
from pathlib import Path

run = Path(sys.argv[1])
steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
environment = json.loads((run / "environment.json").read_text())
once = "once" if len(set(steps)) == len(steps) else "NOT ONCE"
print(f"{len(steps)} lines, steps {steps[0]} to {steps[-1]}, each {once};",
      f"{environment['processes']} processes")
assert steps == sorted(set(steps)), "steps are repeated or out of order"
PYTHON
