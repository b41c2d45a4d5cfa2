"""One rank that counts the bytes of one clipped step; started by ``run.py``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch

import lomo_ds
from benchmarks.common.contestants import Workload
from benchmarks.common.rank_job import batches, finish_rank
from benchmarks.common.sent_bytes import counting
from benchmarks.common.trainers import sharded_model
from lomo_ds.zero3._internals import full_numel

WORKLOAD = Workload(hidden_size=256, num_layers=4, intermediate_size=704, num_heads=4, vocab_size=1000)


def ds_json(scheme: str) -> dict[str, Any]:
    """Our step as it is; the published scheme all-reduces whole gradients in place of scattering them."""
    apply = "two_pass" if scheme == "two_pass" else "deferred"
    return {
        "train_micro_batch_size_per_gpu": WORKLOAD.micro_batch,
        "optimizer": {"type": "Lomo", "params": {"lr": 0.01, "apply": apply}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", choices=("published", "deferred", "two_pass"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    deepspeed.init_distributed("gloo")
    config = ds_json(args.scheme)
    model = sharded_model(WORKLOAD, config)
    engine, *_ = lomo_ds.initialize(model=model, config=config)
    warmup, measured = batches(WORKLOAD, 2, int(os.environ["RANK"]))
    clipped_step(engine, warmup, args.scheme)
    with counting() as sent_bytes:
        clipped_step(engine, measured, args.scheme)
    result = {
        "model_bytes": sum(2 * full_numel(param) for param in model.parameters()),
        "sent_bytes": sent_bytes,
    }
    finish_rank(result, args.out)


if __name__ == "__main__":
    main()
