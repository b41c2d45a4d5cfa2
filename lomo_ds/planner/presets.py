"""Models by name, from their published dimensions, and any model from its config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lomo_ds.config import did_you_mean


@dataclass(frozen=True)
class Preset:
    """The dimensions of a decoder.

    Attributes:
        family: "llama", "qwen2" or "mistral", as transformers calls it.
        hidden, intermediate: widths of the residual stream and of the MLP.
        layers, heads, kv_heads: numbers of them.
        vocabulary: rows of the embedding.
        positions: longest sequence.
        tied: whether the embedding is also the head.
        head_dim: of one head; None for hidden / heads.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    tied: bool = False
    head_dim: int | None = None

    def config(self) -> Any:
        """The transformers config."""
        from transformers import CONFIG_MAPPING

        settings: dict[str, Any] = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": self.tied,
        }
        if self.head_dim is not None:
            settings["head_dim"] = self.head_dim
        if self.family == "mistral":
            settings["sliding_window"] = None
        return CONFIG_MAPPING[self.family](**settings)


PRESETS: dict[str, Preset] = {
    "llama-7b": Preset("llama", 4096, 11008, 32, 32, 32, 32000, 2048),
    "llama-13b": Preset("llama", 5120, 13824, 40, 40, 40, 32000, 2048),
    "llama-30b": Preset("llama", 6656, 17920, 60, 52, 52, 32000, 2048),
    "llama-65b": Preset("llama", 8192, 22016, 80, 64, 64, 32000, 2048),
    "llama-3-8b": Preset("llama", 4096, 14336, 32, 32, 8, 128256, 8192),
    "llama-3-70b": Preset("llama", 8192, 28672, 80, 64, 8, 128256, 8192),
    "qwen2.5-0.5b": Preset("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, tied=True),
    "qwen2.5-1.5b": Preset("qwen2", 1536, 8960, 28, 12, 2, 151936, 32768, tied=True),
    "qwen2.5-3b": Preset("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, tied=True),
    "qwen2.5-7b": Preset("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768),
    "qwen2.5-14b": Preset("qwen2", 5120, 13824, 48, 40, 8, 152064, 32768),
    "qwen2.5-32b": Preset("qwen2", 5120, 27648, 64, 40, 8, 152064, 32768),
    "qwen2.5-72b": Preset("qwen2", 8192, 29568, 80, 64, 8, 152064, 32768),
    "mistral-7b": Preset("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, head_dim=128),
    "mistral-nemo-12b": Preset("mistral", 5120, 14336, 40, 32, 8, 131072, 131072, head_dim=128),
    "mistral-small-24b": Preset("mistral", 5120, 32768, 40, 32, 8, 131072, 32768, head_dim=128),
}
"""Name -> dimensions, as each model's paper or its published config.json gives them."""


def model_config(name: str) -> Any:
    """The transformers config of a preset, of a folder with a config.json, or of a config.json.

    Raises:
        ValueError: neither; the closest preset is named. Or a config that transformers does not read.
    """
    preset = PRESETS.get(name.lower().rpartition("/")[2])
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _read_config(path)
    if preset is None:
        raise ValueError(f"model {name!r} is neither a folder with a config.json nor a preset; "
                         + did_you_mean(name.lower(), PRESETS))  # fmt: skip
    return preset.config()


def _read_config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"model: transformers does not read {path}: {reason}") from None
    if getattr(config, "num_hidden_layers", None) is None or getattr(config, "vocab_size", None) is None:
        raise ValueError(f"model: {path} is not the config of a language model")
    return config
