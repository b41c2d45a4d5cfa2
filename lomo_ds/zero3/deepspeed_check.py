"""What DeepSpeed itself says of a JSON, asked before a model is built, and told in one line."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lomo_ds.config import shown
from lomo_ds.zero3._internals import DeepSpeedConfig
from lomo_ds.zero3.supported import BATCH_KEYS

_MAX_PROBLEMS = 5


def refuse_unreadable(ds_json: Mapping[str, Any]) -> None:
    """Let DeepSpeed read a JSON, apart from the batch, which ``supported.check_batch`` holds to the ranks.

    Raises:
        ValueError: DeepSpeed takes an exception to it; names the key where DeepSpeed does.
    """
    without_batch = {key: value for key, value in ds_json.items() if key not in BATCH_KEYS}
    try:
        DeepSpeedConfig(copy.deepcopy(without_batch) | {BATCH_KEYS[1]: 1})
    except ValidationError as error:
        section = error.title.removeprefix("DeepSpeed").removesuffix("Config")
        problems = "; ".join(_problem(entry) for entry in error.errors()[:_MAX_PROBLEMS])
        raise ValueError(f"the DeepSpeed JSON, in the section of {section}: {problems}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the DeepSpeed JSON cannot be read by DeepSpeed: {type(error).__name__}: {reason}"
        ) from None


def _problem(entry: Mapping[str, Any]) -> str:
    key = ".".join(str(part)[:100] for part in entry["loc"])
    return f'"{key}": {entry["msg"][:200]} (given: {shown(entry["input"])})'
