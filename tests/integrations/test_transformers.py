"""What transformers does with a model that is cut: texts that end at different times, new rows."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from tests.harness import run_ranks
from tests.model_io.test_families import gathered
from tests.model_io.test_load import zero3
from tests.tiny import write_tiny_folder

PROMPT = torch.tensor([[5, 6, 7]])
NUM_TOKENS, NUM_ROWS, SEED = 6, 305, 3


def generated(folder: str, end_of_rank: list[int]) -> list[int]:
    """Tokens that a rank generates until its own end-of-text token."""
    import deepspeed
    import torch.distributed as dist

    import lomo_ds
    from lomo_ds.model_io.load import load_pretrained

    deepspeed.init_distributed()
    engine = lomo_ds.initialize(model=load_pretrained(folder, zero3(0)), config=zero3(0))[0]
    engine.eval()
    tokens = engine.module.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=end_of_rank[dist.get_rank()],
    )
    engine.destroy()
    return tokens[0].tolist()


def test_ranks_that_meet_their_ends_at_different_times_generate(tmp_path: Path) -> None:
    model = write_tiny_folder(tmp_path / "model")
    expected = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=298,
    )[0].tolist()
    first, last = expected[3], 298
    assert last not in expected
    short, long = run_ranks(2, generated, str(tmp_path / "model"), [first, last], deadline_s=60)
    assert (short, long) == (expected[:4], expected)


def resized(folder: str) -> dict[str, torch.Tensor]:
    """A model's tensors after rows were added, as training begins with them."""
    import deepspeed
    import torch.distributed as dist

    import lomo_ds
    from lomo_ds.model_io.load import load_pretrained

    deepspeed.init_distributed()
    model = load_pretrained(folder, zero3(0))
    torch.manual_seed(SEED + 10 * dist.get_rank())
    model.resize_token_embeddings(NUM_ROWS)
    engine = lomo_ds.initialize(model=model, config=zero3(0))[0]
    tensors = gathered(engine.module)
    engine.destroy()
    return tensors


def test_new_rows_are_alike_on_all_ranks_and_as_in_one_process(tmp_path: Path) -> None:
    model = write_tiny_folder(tmp_path / "model", tied=False)
    ranks = run_ranks(2, resized, str(tmp_path / "model"))
    torch.manual_seed(SEED)
    model.resize_token_embeddings(NUM_ROWS)
    for tensors in ranks:
        for name, param in model.named_parameters():
            assert torch.equal(tensors[name], param), name


def zero3_known_before_and_after(folder: str) -> tuple[bool, bool]:
    import deepspeed
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from lomo_ds.model_io.load import load_pretrained

    deepspeed.init_distributed()
    gc.collect()
    model = load_pretrained(folder, zero3(0))
    known = is_deepspeed_zero3_enabled()
    del model
    gc.collect()
    return known, is_deepspeed_zero3_enabled()


def test_transformers_forgets_zero3_with_the_model(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "model")
    assert (
        run_ranks(2, zero3_known_before_and_after, str(tmp_path / "model"), fresh=True) == [(True, False)] * 2
    )
