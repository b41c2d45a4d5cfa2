#!/usr/bin/env bash
# One node, every GPU on it (two CPU ranks where there is none).
#
#   launch/local.sh RECIPE.yaml [key=value ...] [--num-ranks N]
#
# `lomo-ds train` starts DeepSpeed's launcher itself; the same by hand, for 8 GPUs:
#   deepspeed --num_gpus 8 --module lomo_ds.cli.train RECIPE.yaml [key=value ...]
set -euo pipefail
exec "${PYTHON:-python}" -m lomo_ds.cli.main train "$@"
