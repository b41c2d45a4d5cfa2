"""One process of the checkpoint memory benchmark: make a model folder, load it as a rank, or export it."""

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

LIVE, OFFLINE = "exported_live", "exported_offline"
"""Folders of the model as the engine and as ``lomo-ds export`` wrote it."""
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


def start_engine(folder: Path) -> Any:
    """An engine with the model of ``folder``. Collective."""
    import lomo_ds
    from lomo_ds.model_io.load import load_pretrained

    ds_json = shipped_json()
    return lomo_ds.initialize(model=load_pretrained(str(folder), ds_json), config=ds_json)[0]


def shipped_json() -> dict[str, Any]:
    """The shipped DeepSpeed JSON, without its reports of steps."""
    return json.loads(SHIPPED_JSON.read_text()) | {"steps_per_print": 10**9}


def start_meter() -> tuple[PeakMeter, int]:
    """(a meter that begins now, the resident memory of this process now)."""
    meter, before = PeakMeter(), resident_bytes()
    meter.end_phase("before")
    return meter, before


def load(folder: Path) -> dict[str, Any]:
    """Load the model as one rank. Collective."""
    import deepspeed

    from lomo_ds.model_io.load import load_pretrained
    from lomo_ds.zero3._internals import local_shard

    deepspeed.init_distributed("gloo")
    start_engine(folder / "toy")
    torch.distributed.barrier()
    meter, before = start_meter()
    model = load_pretrained(str(folder / "model"), shipped_json())
    peak = meter.end_phase("load") - before
    params = list(model.parameters())
    return {
        "peak_bytes": peak,
        "shard_bytes": sum(local_shard(param).numel() for param in params) * 2,
        "largest_bytes": max(local_shard(param).numel() for param in params)
        * 2
        * torch.distributed.get_world_size(),
        "source": meter.source,
    }


def live(folder: Path) -> dict[str, Any]:
    """Export the model from its engine as one rank, then save a checkpoint of it. Collective.

    A toy is exported first, so that imports at first use do not count.
    """
    import deepspeed

    from lomo_ds.model_io.export import export_pretrained
    from lomo_ds.zero3._internals import local_shard

    deepspeed.init_distributed("gloo")
    export_pretrained(start_engine(folder / "toy"), folder / "toy_live")
    engine = start_engine(folder / "model")
    torch.distributed.barrier()
    meter, before = start_meter()
    export_pretrained(engine, folder / LIVE)
    peak = meter.end_phase("export") - before
    engine.save_checkpoint(folder / "checkpoints")
    shard_bytes = sum(local_shard(param).numel() for param in engine.module.parameters()) * 2
    return {"peak_bytes": peak, "shard_bytes": shard_bytes, "source": meter.source}


def export(folder: Path) -> dict[str, Any]:
    """Export the checkpoint that ``live`` saved, in this process."""
    from lomo_ds.checkpoint.offline_export import find_checkpoint
    from lomo_ds.cli.export import main

    checkpoint = find_checkpoint(folder / "checkpoints")
    torch.zeros(3).bfloat16().numel()
    meter, before = start_meter()
    if main([str(checkpoint), str(folder / OFFLINE)]):
        sys.exit(1)
    return {"peak_bytes": meter.end_phase("export") - before, "source": meter.source}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("make", "load", "live", "export"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workload", default="{}")
    args = parser.parse_args()
    if args.part == "make":
        result = make(dataclasses.replace(Workload(), **json.loads(args.workload)), args.folder)
    else:
        result = {"load": load, "live": live, "export": export}[args.part](args.folder)
    rank = os.environ.get("RANK", "0")
    (args.out / f"rank_{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
