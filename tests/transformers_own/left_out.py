"""Which of transformers' tests do not apply, and why."""

from __future__ import annotations

import re

STAGE_2 = (
    "zero2",
    "test_hf_ds_config_mismatch",
    "test_auto_value_resolution",
    "test_ds_config_dtype_resolution",
    "test_ds_config_no_optimizer_no_scheduler",
    "test_ds_config_auto_vs_missing_fields",
    "test_optimizer_scheduler_combos",
    "ulysses",
)
REASONS: dict[str, tuple[str, ...]] = {
    "ZeRO stage 2": STAGE_2,
    "DeepSpeed's own engine: the test, or Trainer to evaluate alone, takes the method out of the JSON": (
        "_hf_optim_",
        "test_optimizer_with_cpu_offload_zero3_True",
        "test_load_best_model",
        "Common::test_eval",
    ),
    "no engine: transformers loads a model": ("TestNonTrainerIntegrationDeepSpeed",),
    "models of the hub": ("TestDeepSpeedModelZoo",),
    "looks for the files of DeepSpeed's own checkpoints, which `lomo-ds export` takes the place of": (
        "test_save_checkpoints",
        "test_load_state_dict_from_zero_checkpoint",
    ),
    "looks for fp32 copies of the weights, which do not exist here": (
        "test_mixed_precision_model_and_optimizer_dtypes",
    ),
    "offloads optimizer states, of which there are none: refused by name": (
        "test_optimizer_with_cpu_offload_zero3_False",
        "test_stage3_nvme_offload",
        "test_basic_run_with_cpu_offload",
    ),
    "looks for CUDA devices": ("env_parity",),
    "needs optuna": ("test_hyperparameter_search",),
    "fp16 in ranks of their own, which DeepSpeed refuses on most CPUs": (
        r"Common::test_training\w*_zero3_fp16",
    ),
}
"""Reason -> patterns of a test's id; the first one that fits counts."""


def reason_of(test_id: str) -> str | None:
    """Why a test is left out; None for one that is run."""
    fitting = (why for why, patterns in REASONS.items() if any(re.search(one, test_id) for one in patterns))
    return next(fitting, None)
