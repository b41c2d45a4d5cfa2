#!/usr/bin/env bash
# Train on several nodes without a scheduler and without ssh between them: start this on every node.
#
#   launch/multinode.sh HOSTFILE RECIPE.yaml [key=value ...]
#
# HOSTFILE is DeepSpeed's (see hostfile.example), the same on every node; a node finds itself in it by its name or
# its addresses, or by NODE_RANK. The model, the data and the output folder have to be on storage that every node
# sees. Start the same command on all nodes again after a failure: it continues from the latest resumable
# checkpoint. SIGTERM, SIGUSR1 to any one node: all ranks of all nodes save and end, with exit code 75.
#
# Where the nodes have several networks, name the one to use: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.
# DEEPSPEED_TIMEOUT, in minutes, is how long ranks wait for one that cannot be reached.
set -euo pipefail

hostfile="$1"
shift
mapfile -t hosts < <(awk '!/^[[:space:]]*(#|$)/ { print $1 }' "$hostfile")
if [[ -z "${NODE_RANK:-}" ]]; then
  own=" $(hostname) $(hostname -s) $(hostname -I) "
  for index in "${!hosts[@]}"; do
    if [[ "$own" == *" ${hosts[index]} "* ]]; then
      NODE_RANK="$index"
    fi
  done
fi
if [[ -z "${NODE_RANK:-}" ]]; then
  echo "error: none of ${hosts[*]} in $hostfile is this node (${own# }): set NODE_RANK" >&2
  exit 2
fi

"${PYTHON:-python}" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" \
  --master_addr "${MASTER_ADDR:-${hosts[0]}}" --master_port "${MASTER_PORT:-29500}" \
  --module lomo_ds.cli.train "$1" resume=auto "${@:2}" &
runner=$!

# The runner starts a launcher and that one the ranks. A signal is for the ranks, which save and end by themselves.
# shellcheck disable=SC2329  # called by the traps
signal_ranks() {
  local launcher
  interrupted=1
  for launcher in $(pgrep -P "$runner"); do
    pkill "-$1" -P "$launcher" || true
  done
}
interrupted=1
for signal in TERM USR1 INT HUP; do
  # shellcheck disable=SC2064
  trap "signal_ranks $signal" "$signal"
done
while ((interrupted)); do
  interrupted=0 code=0
  wait "$runner" || code=$?
done
exit "$code"
