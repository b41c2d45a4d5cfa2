"""One rank that counts the bytes of one clipped step; started by ``wire.py``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
from step_job import batches, build_model, finish_rank
from step_variants import Workload

import lomo_ds
from lomo_ds.zero3._internals import full_numel

WORKLOAD = Workload(hidden_size=256, num_layers=4, intermediate_size=704, num_heads=4, vocab_size=1000)
SHARE_ON_THE_WIRE = {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_reduce": 2}
"""Times (n - 1) / n of the whole message that each rank sends, by the ring algorithms NCCL uses."""


def ds_json(scheme: str) -> dict[str, Any]:
    """Our step as it is; the published scheme all-reduces whole gradients in place of scattering them."""
    apply = "two_pass" if scheme == "two_pass" else "deferred"
    return {
        "train_micro_batch_size_per_gpu": WORKLOAD.micro_batch,
        "optimizer": {"type": "Lomo", "params": {"lr": 0.01, "apply": apply}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
        "zero_optimization": {
            "stage": 3,
            "reduce_scatter": scheme != "published",
            "reduce_bucket_size": 1_000_000,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
        },
    }


def clipped_step(engine: Any, ids: torch.Tensor, scheme: str) -> None:
    """One step; the published scheme runs forward and backward once to measure and once to apply."""
    for _ in range(2 if scheme == "published" else 1):
        engine.optimizer.zero_grad()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def bytes_on_the_wire(num_ranks: int) -> dict[str, float]:
    """What DeepSpeed's communication logger has seen, as bytes that a rank sends, by operation."""
    seen = deepspeed.comm.comm.comms_logger.get_raw_data()
    sent = {}
    for operation, sizes in seen.items():
        kind = operation.partition(" ")[0]
        if kind in SHARE_ON_THE_WIRE:
            whole = num_ranks if kind == "all_gather_into_tensor" else 1  # logged by a rank's own part
            total = sum(size * record[0] for size, record in sizes.items())
            share = SHARE_ON_THE_WIRE[kind] * (num_ranks - 1) / num_ranks
            sent[kind] = sent.get(kind, 0.0) + total * whole * share
    return sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", choices=("published", "deferred", "two_pass"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    deepspeed.init_distributed("gloo")
    config = ds_json(args.scheme)
    model = build_model(WORKLOAD, config)
    engine, *_ = lomo_ds.initialize(model=model, config=config)
    warmup, measured = batches(WORKLOAD, 2, int(os.environ["RANK"]))
    clipped_step(engine, warmup, args.scheme)
    deepspeed.comm.comm.comms_logger.reset_data()
    clipped_step(engine, measured, args.scheme)
    num_ranks = torch.distributed.get_world_size()
    result = {
        "model_bytes": sum(2 * full_numel(param) for param in model.parameters()),
        "sent_bytes": bytes_on_the_wire(num_ranks),
    }
    finish_rank(result, args.out)


if __name__ == "__main__":
    main()
