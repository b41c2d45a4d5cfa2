#!/usr/bin/env bash
# Train on one node with all of its GPUs (two CPU ranks where there are none).
#
#   launch/local.sh RECIPE.yaml [key=value ...] [--num-ranks N]
#   MAX_RESTARTS=5 launch/local.sh RECIPE.yaml checkpoint.every=100     # restarts after a crash
#
# `lomo-ds train` starts the ranks itself; with DeepSpeed's launcher, for 8 GPUs:
#   deepspeed --num_gpus 8 --module lomo_ds.cli.train RECIPE.yaml [key=value ...]
set -euo pipefail

restarts="${MAX_RESTARTS:-0}"
if ((restarts == 0)); then
  exec "${PYTHON:-python}" -m lomo_ds.cli.main train "$@"
fi

# Runs the command as a child, so that a signal to this script reaches it; returns its exit code.
train() {
  local code signal interrupted=1
  "${PYTHON:-python}" -m lomo_ds.cli.main train "$1" resume=auto "${@:2}" &
  child=$!
  for signal in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064
    trap "interrupted=1; kill -$signal $child 2>/dev/null || true" "$signal"
  done
  while ((interrupted)); do
    interrupted=0 code=0
    wait "$child" || code=$?
  done
  return "$code"
}

# 0: done. 2: a mistake in the recipe. 75: told to stop, and can be resumed. 129, 130: hangup, Ctrl-C. After any
# other exit code the run is resumed from its latest checkpoint.
for ((attempt = 0; ; attempt++)); do
  code=0
  train "$@" || code=$?
  case "$code" in 0 | 2 | 75 | 129 | 130) exit "$code" ;; esac
  if ((attempt == restarts)); then
    exit "$code"
  fi
  echo "exit code $code; restart $((attempt + 1)) of $restarts" >&2
done
