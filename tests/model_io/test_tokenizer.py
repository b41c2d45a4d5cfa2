"""A folder with a sentencepiece model alone gives that model's own ids, as training and as an export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from lomo_ds.model_io.tokenizer import load_tokenizer
from tests.tiny import tiny_tokenizer

LLAMA = {"byte_fallback": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", **LLAMA},
    "bpe_normalized": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
    "no_begin": {"model_type": "unigram", "bos_id": -1, "pad_id": 3, "add_dummy_prefix": False},
}
SOURCE = Path(__file__).read_text(encoding="utf-8")


def texts() -> Iterator[str]:
    yield from ("", "a", " two  spaces ", "\n\n x", "ça 漢字 \U0001f600", "1234.5")
    yield from (SOURCE[start : start + start % 90] for start in range(0, len(SOURCE), 61))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_the_models_own(kind: str, tmp_path: Path) -> None:
    SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines()),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=350,
        hard_vocab_limit=False,
        minloglevel=2,
        **KINDS[kind],
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    own = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    start = [own.bos_id()] if own.bos_id() >= 0 else []
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        for text in texts():
            assert found(text)["input_ids"] == start + own.encode(text), text
        assert found.eos_token_id == own.eos_id()
        assert found.bos_token_id == (own.bos_id() if start else None)
        assert found.pad_token_id == (own.pad_id() if own.pad_id() >= 0 else None)
    ids = tokenizer("a film, 42")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == own.decode(ids)


def test_another_tokenizer_of_the_folder_comes_first(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"never read")
    assert load_tokenizer(tmp_path)("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]


def test_a_broken_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    with pytest.raises(ValueError, match=r"^model: [^\n]* cannot be used: [^\n]*$"):
        load_tokenizer(tmp_path)
