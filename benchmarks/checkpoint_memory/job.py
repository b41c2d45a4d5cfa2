"""One process of the checkpoint memory benchmark: make a model folder, load it as a rank, or export."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.contestants import Workload
from benchmarks.common.paths import SHIPPED_JSON
from benchmarks.common.resident import PeakMeter, resident_bytes

TOY = Workload(hidden_size=64, num_layers=1, intermediate_size=64, num_heads=2, vocab_size=16)


def make(workload: Workload, folder: Path) -> dict[str, Any]:
    """Write the model, with random bf16 weights, and a toy to be loaded first, which imports everything."""
    from transformers import LlamaForCausalLM

    from benchmarks.common.trainers import llama_config

    for name, shape in (("toy", TOY), ("model", workload)):
        model = LlamaForCausalLM(llama_config(shape)).to(torch.bfloat16)
        model.save_pretrained(folder / name)
    params = list(model.parameters())
    return {
        "num_parameters": sum(param.numel() for param in params),
        "num_bytes": sum(param.numel() for param in params) * 2,
        "largest_bytes": max(param.numel() for param in params) * 2,
    }


def load(folder: Path, save: bool) -> dict[str, Any]:
    """Load the model as one rank. Collective."""
    import deepspeed

    import lomo_ds
    from lomo_ds.model_io.load import load_pretrained
    from lomo_ds.zero3._internals import local_shard

    deepspeed.init_distributed("gloo")
    ds_json = json.loads(SHIPPED_JSON.read_text()) | {"steps_per_print": 10**9}
    lomo_ds.initialize(model=load_pretrained(str(folder / "toy"), ds_json), config=ds_json)
    torch.distributed.barrier()
    meter, before = PeakMeter(), resident_bytes()
    meter.end_phase("before")
    model = load_pretrained(str(folder / "model"), ds_json)
    peak = meter.end_phase("load") - before
    params = list(model.parameters())
    result = {
        "peak_bytes": peak,
        "shard_bytes": sum(local_shard(param).numel() for param in params) * 2,
        "largest_bytes": max(local_shard(param).numel() for param in params)
        * 2
        * torch.distributed.get_world_size(),
        "source": meter.source,
    }
    if save:
        engine = lomo_ds.initialize(model=model, config=ds_json)[0]
        engine.save_checkpoint(folder / "checkpoints")
    return result


def export(folder: Path) -> dict[str, Any]:
    """Export the checkpoint that ``load`` saved, in this process."""
    from lomo_ds.checkpoint.offline_export import find_checkpoint
    from lomo_ds.cli.export import main

    checkpoint = find_checkpoint(folder / "checkpoints")
    torch.zeros(3).bfloat16().numel()
    meter, before = PeakMeter(), resident_bytes()
    meter.end_phase("before")
    if main([str(checkpoint), str(folder / "exported")]):
        sys.exit(1)
    return {"peak_bytes": meter.end_phase("export") - before, "source": meter.source}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("make", "load", "export"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workload", default="{}")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.part == "make":
        result = make(dataclasses.replace(Workload(), **json.loads(args.workload)), args.folder)
    else:
        result = load(args.folder, args.save) if args.part == "load" else export(args.folder)
    rank = os.environ.get("RANK", "0")
    (args.out / f"rank_{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
