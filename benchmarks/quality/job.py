"""One rank of the AdamW baseline: DeepSpeed's ZeRO-3 with torch.optim.AdamW, in the loop of `lomo-ds train`.

Usage, on each rank of a launcher: python -m benchmarks.quality.job RECIPE.yaml [key=value ...]

Data, order, batches, loss, schedule, clipping and scoring are those of any recipe; learning rate and weight
decay are those of the JSON's optimizer, whatever its type.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import Any

import deepspeed
import torch

from lomo_ds.cli.main import find_tools_of_this_environment
from lomo_ds.training.model import load_model, schedule_maker
from lomo_ds.training.plan import RunPlan
from lomo_ds.training.recipe_file import load_recipe
from lomo_ds.training.run import run
from lomo_ds.zero3.step import backward_and_step


def adamw_engine(plan: RunPlan) -> Any:
    """DeepSpeed's engine, with fp32 copies of the weights as ZeRO-3 makes them. Collective."""
    model = load_model(plan)
    settings = plan.ds_json["optimizer"]["params"]
    weight_decay = settings.get("weight_decay", 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=weight_decay)
    config = {key: value for key, value in plan.ds_json.items() if key != "optimizer"}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=config | {"zero_allow_untested_optimizer": True},
        lr_scheduler=schedule_maker(plan),
    )
    engine.optimizer.choice = "ZeRO-3 with torch.optim.AdamW"
    engine.optimizer.gradient_host_bytes = 0
    engine.wait_for_checkpoint = lambda: None
    engine.train_batch = partial(backward_and_step, engine)
    return engine


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    args = parser.parse_intermixed_args()
    find_tools_of_this_environment()
    return run(load_recipe(args.recipe, args.overrides), adamw_engine)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)  # libraries' threads sometimes abort a process that unloads them
