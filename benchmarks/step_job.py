"""One rank of one variant: build the model sharded, train a few steps, write down time and memory.

Started by ``step.py``; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
from live_storages import LiveStorages
from resident import PeakMeter, resident_bytes
from step_variants import VARIANTS, Variant, Workload, deepspeed_config
from transformers import LlamaConfig, LlamaForCausalLM

import lomo_ds

SEED = 1234
IMPORTED_AT_FIRST_USE = (
    "torch._dynamo",  # by torch.optim and activation checkpointing
    "deepspeed.runtime.zero.muon.muon_optimizer",  # by deepspeed.initialize; brings torch's compiler along
    "lomo_ds.initialization",
    "lomo_ds.zero3.engine",
)


def llama_config(workload: Workload) -> LlamaConfig:
    """A LLaMA shape with untied embeddings and no key-value cache."""
    return LlamaConfig(
        hidden_size=workload.hidden_size,
        num_hidden_layers=workload.num_layers,
        intermediate_size=workload.intermediate_size,
        num_attention_heads=workload.num_heads,
        vocab_size=workload.vocab_size,
        max_position_embeddings=max(workload.sequence_length, 128),
        tie_word_embeddings=False,
        use_cache=False,
    )


def warm_up_imports() -> None:
    """Import what is imported at first use and take a toy model's step: imports are no variant's memory."""
    for name in IMPORTED_AT_FIRST_USE:
        importlib.import_module(name)
    toy = Workload(hidden_size=64, num_layers=1, intermediate_size=64, num_heads=2, vocab_size=16)
    model = LlamaForCausalLM(llama_config(toy)).to(torch.bfloat16)
    _checkpoint_activations(model)
    ids = torch.zeros(1, 8, dtype=torch.long)
    for optimizer_class in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = optimizer_class(model.parameters(), lr=0.0)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def build_model(workload: Workload, config: dict[str, Any]) -> LlamaForCausalLM:
    """The model, sharded as it is built; in bf16 when the config asks for it. Collective."""
    torch.manual_seed(SEED)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = LlamaForCausalLM(llama_config(workload))
    _checkpoint_activations(model)
    model.train()
    return model


def _checkpoint_activations(model: LlamaForCausalLM) -> None:
    """Reentrant: the other kind keeps aliases of a layer's gathered weights past ZeRO-3's release."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def build_engine(variant: Variant, model: LlamaForCausalLM, config: dict[str, Any]) -> Any:
    """lomo's engine, or DeepSpeed's own around an optimizer of torch. Collective."""
    if variant.optimizer == "lomo":
        return lomo_ds.initialize(model=model, config=config)[0]
    optimizer = getattr(torch.optim, variant.optimizer)(model.parameters(), lr=variant.lr)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train_step(engine: Any, ids: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Forward, backward, update. Returns the rank's loss and the seconds of each part. Collective."""
    clock = [time.perf_counter()]
    loss = engine(input_ids=ids, labels=ids).loss
    clock.append(time.perf_counter())
    engine.backward(loss)
    clock.append(time.perf_counter())
    engine.step()
    clock.append(time.perf_counter())
    parts = {name: clock[i + 1] - clock[i] for i, name in enumerate(("forward", "backward", "update"))}
    return float(loss.detach()), parts


def batches(workload: Workload, num_steps: int, rank: int) -> list[torch.Tensor]:
    """Random token ids, the same for every variant, another part on each rank."""
    generator = torch.Generator().manual_seed(SEED + rank)
    shape = (workload.micro_batch, workload.sequence_length)
    return [torch.randint(workload.vocab_size, shape, generator=generator) for _ in range(num_steps)]


def run_steps(engine: Any, inputs: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Train on each batch, timed between barriers. Returns each one's seconds, their parts, the loss."""
    steps = []
    for ids in inputs:
        torch.distributed.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        loss, parts = train_step(engine, ids)
        torch.distributed.barrier()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        steps.append({"seconds": seconds, "cpu_seconds": cpu_seconds, "parts": parts, "loss": loss})
    return steps


def start_rank(workload: Workload, num_batches: int) -> list[torch.Tensor]:
    """Process group, lazy imports and inputs: all that is not the model's. Collective."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    deepspeed.init_distributed("gloo")
    warm_up_imports()
    inputs = batches(workload, num_batches, int(os.environ["RANK"]))
    torch.distributed.barrier()
    return inputs


def measure(variant: Variant, workload: Workload, config: dict[str, Any], args: argparse.Namespace) -> dict:
    """Everything one rank can say about one variant. Collective."""
    inputs = start_rank(workload, args.warmup + args.steps)
    baseline_bytes = resident_bytes()
    meter = PeakMeter()
    model = build_model(workload, config)
    meter.end_phase("model")
    engine = build_engine(variant, model, config)
    meter.end_phase("engine")
    warmup = run_steps(engine, inputs[: args.warmup])
    meter.end_phase("warm-up steps")
    steps = run_steps(engine, inputs[args.warmup :])
    meter.end_phase("steps")
    at_rest_bytes = resident_bytes() - baseline_bytes
    with LiveStorages() as storages:
        run_steps(engine, inputs[-1:])
    return {
        "variant": variant.name,
        "rank": int(os.environ["RANK"]),
        "tokens_per_step": workload.micro_batch
        * workload.sequence_length
        * torch.distributed.get_world_size(),
        "num_parameters": sum(parameter.ds_numel for parameter in model.parameters()),
        "memory_source": meter.source,
        "baseline_bytes": baseline_bytes,
        "phase_peak_bytes": {name: peak - baseline_bytes for name, peak in meter.phases.items()},
        "at_rest_bytes": at_rest_bytes,
        "live_peak_bytes": storages.peak_bytes,
        "parked_bytes": int(getattr(engine.optimizer, "parked_host_bytes", 0)),
        "warmup": warmup,
        "steps": steps,
        "zero_optimization": config["zero_optimization"],
    }


def parse_arguments(description: str) -> argparse.Namespace:
    """What ``step.py`` tells each rank."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--workload", type=json.loads, default={}, help="JSON; fields of Workload")
    parser.add_argument("--config", type=Path, required=True, help="DeepSpeed JSON to take the limits from")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="folder; rank_<rank>.json is written there")
    args = parser.parse_args()
    args.workload = dataclasses.replace(Workload(), **args.workload)
    args.variant = VARIANTS[args.variant]
    return args


def finish_rank(result: dict[str, Any], out: Path) -> NoReturn:
    """Hand the result over, leave the process group together and end the process. Collective.

    Libraries are not unloaded: their threads now and then abort a process that does.
    """
    (out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


def main() -> None:
    args = parse_arguments(__doc__)
    config = deepspeed_config(args.variant, args.workload, args.config)
    finish_rank(measure(args.variant, args.workload, config, args), args.out)


if __name__ == "__main__":
    main()
