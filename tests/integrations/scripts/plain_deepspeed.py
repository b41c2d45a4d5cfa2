"""A script as users have it: DeepSpeed's own loop, configured by a file, unaware of lomo_ds."""

import argparse
import json
from pathlib import Path

import deepspeed
import torch
from deepspeed import initialize

from tests.tiny import tiny_llama

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--local_rank", type=int, default=-1)
deepspeed.add_config_arguments(parser)
args = parser.parse_args()

model = tiny_llama()
engine, _, _, scheduler = initialize(args, model, model_parameters=model.parameters())
rank, num_ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
ids = torch.randint(2, 299, (16, 9), generator=torch.Generator().manual_seed(1))
log = []
for batch in ids.split(2)[rank::num_ranks]:
    loss = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss)
    engine.step()
    deepspeed.comm.all_reduce(mean := loss.detach().clone())
    log.append(
        {
            "loss": mean.item() / num_ranks,
            "grad_norm": engine.get_global_grad_norm(),
            "learning_rate": engine.get_lr()[0],
        }
    )
engine.save_16bit_model(args.folder, "pytorch_model.bin")
if rank == 0:
    (args.folder / "log.json").write_text(json.dumps(log))
