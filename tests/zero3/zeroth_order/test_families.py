"""The families and tuning schemes of the benchmark paper, as tiny random models of their architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.reference.model import rank_batch
from tests.reference.zeroth_order import Predictor, Settings, worst
from tests.zero3 import jobs as engine_jobs
from tests.zero3.zeroth_order import jobs

MASK = 22
DECODER = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
NUM_STEPS = 2
LRS, EPS = {"prompt": 0.1}, 1e-2
"""Virtual tokens are large next to what moves the loss of a tiny model."""


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**DECODER, intermediate_size=24, pad_token_id=1))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(**DECODER, ffn_dim=24, word_embed_proj_dim=16))


def llama() -> nn.Module:
    """Vicuna's architecture, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**DECODER, intermediate_size=24, num_key_value_heads=1))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**DECODER, intermediate_size=24, num_key_value_heads=1))


def mixtral() -> nn.Module:
    """Its loss has a term of the routers, which hooks on them collect."""
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "output_router_logits": True}
    config = MixtralConfig(**DECODER, **experts, intermediate_size=24, num_key_value_heads=1)
    return MixtralForCausalLM(config)


def with_adapters(kind: str) -> nn.Module:
    """LLaMA with one of peft's schemes; the base is frozen."""
    import peft

    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[kind]()
    return peft.get_peft_model(llama(), config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "roberta": roberta,
    "opt": opt,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    **{kind: (lambda kind=kind: with_adapters(kind)) for kind in ("lora", "prefix", "prompt")},
}


class Scored(nn.Module):
    """The loss of a model on tokens: of the next ones, or of those that are masked."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = MODELS[name]().eval()
        self._is_masked = name == "roberta"

    def forward(self, tokens: Tensor) -> Tensor:
        if not self._is_masked:
            return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        at = torch.arange(tokens.shape[1]) == 2
        return self.model(input_ids=tokens.masked_fill(at, MASK), labels=tokens.masked_fill(~at, -100)).loss


def train(name: str, paired: bool, **params: Any) -> list[dict[str, Tensor]]:
    import lomo_ds

    zero = {"stage3_param_persistence_threshold": 20}
    ds_json = jobs.zo_json(lr=LRS.get(name, 1e-4), eps=EPS, paired=paired, zero=zero, **params)
    engine = lomo_ds.initialize(model=Scored(name), config=ds_json)[0]
    engine.eval()
    history = []
    for step in range(NUM_STEPS):
        engine.train_batch(jobs.closures_of(engine, step))
        history.append(engine_jobs.whole_params(engine.module))
    return history


@pytest.mark.parametrize(
    "name", ["roberta", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "roberta")]
)
def test_a_step_is_the_equation(name: str) -> None:
    """RoBERTa's head has a parameter of its own above modules that have theirs."""
    if name in ("lora", "prefix", "prompt"):
        pytest.importorskip("peft")
    history = run_ranks(2, train, name, True)[0]
    model = Scored(name)
    predictor = Predictor(model, Settings(lr=LRS.get(name, 1e-4), eps=EPS))
    before = {key: param.detach().clone() for key, param in model.named_parameters()}
    for number, after in enumerate(history):
        step = predictor.step(before, number, [rank_batch(number, rank, 2) for rank in range(2)])
        assert worst(after, step) <= 1 < worst(before, step)
        before = after
    apart = run_ranks(2, train, name, False)[0]
    assert all(torch.equal(apart[-1][key], history[-1][key]) for key in apart[-1])


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mixtral",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "opt", "mistral", "lora")),
    ],
)
def test_blocks_share_what_they_may(name: str) -> None:
    """Mixtral's loss is not made of what its layers return alone, and they share nothing there."""
    if name == "lora":
        pytest.importorskip("peft")
    together, apart = (run_ranks(2, train, name, paired, block_wise=True)[0] for paired in (True, False))
    assert all(torch.equal(apart[-1][key], together[-1][key]) for key in apart[-1])
