"""The tokenizer of a model folder, also where there is only a sentencepiece model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lomo_ds.model_io.remote_code import plain_refusals

_SENTENCEPIECE = "tokenizer.model"
_OTHERS = ("tokenizer.json", "tokenizer_config.json", "tekken.json", "vocab.json")
_PROBES = ("The film, 42 years on:\n  3.14 ", "ça va? 漢字 \U0001f600 don't", " two  spaces", "a", "")
"""Texts that both tokenizers have to cut alike before the model's own is trusted to another library."""


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, of transformers.

    A folder that has ``tokenizer.model`` and nothing else to tokenize with gives the ids of that
    sentencepiece model, after its beginning-of-text token where it has one. ``AutoTokenizer`` would guess the
    kind of tokenizer from the kind of model, and gives other ids.

    Args:
        folder: in Hugging Face format.
        trust_remote_code: allow a tokenizer that brings its own code.

    Raises:
        ValueError: there is none, or it is broken; in one line.
    """
    from transformers import AutoTokenizer

    with plain_refusals(folder):
        alone = not any((folder / name).exists() for name in _OTHERS)
        if alone and (folder / _SENTENCEPIECE).is_file():
            return _of_sentencepiece(folder / _SENTENCEPIECE)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _of_sentencepiece(path: Path) -> Any:
    """A fast tokenizer with a sentencepiece model's ids, which saves them for everybody as tokenizer.json."""
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerFast

    own = SentencePieceProcessor(model_file=str(path))
    special = {"bos": own.bos_id(), "eos": own.eos_id(), "unk": own.unk_id(), "pad": own.pad_id()}
    tokens = {f"{kind}_token": own.id_to_piece(number) for kind, number in special.items() if number >= 0}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_converted(path, own), **tokens)
    start = [own.bos_id()] if own.bos_id() >= 0 else []
    for text in _PROBES:
        if tokenizer(text)["input_ids"] != start + own.encode(text):
            raise ValueError(
                f"model: {path} is a sentencepiece model whose ids the package tokenizers does not give; "
                "save its tokenizer with transformers (tokenizer.json) first"
            )
    return tokenizer


def _converted(path: Path, own: Any) -> Any:
    """The same as a tokenizer of the package ``tokenizers``."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, processors

    proto = vars(sentencepiece_model_pb2)["ModelProto"].FromString(path.read_bytes())
    tokenizer = Tokenizer(_pieces(path, own, proto))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    whole = [piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(one.piece, normalized=False, special=one.type == one.CONTROL) for one in whole]
    )
    spaces = [decoders.Strip(" ", left=1)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *spaces]
    )
    if own.bos_id() >= 0:
        bos = own.id_to_piece(own.bos_id())
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, own.bos_id())]
        )
    return tokenizer


def _pieces(path: Path, own: Any, proto: Any) -> Any:
    """The model of ``tokenizers`` with the pieces of a sentencepiece model, of either kind."""
    from tokenizers import models
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    settings = proto.trainer_spec
    if settings.model_type == settings.UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(pieces, own.unk_id(), settings.byte_fallback)
    if settings.model_type != settings.BPE:
        raise ValueError(f"model: {path} is a sentencepiece model neither of BPE nor of unigrams")
    vocabulary, _, merges = SentencePieceExtractor(str(path)).extract()
    return models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=own.id_to_piece(own.unk_id()),
        fuse_unk=True,
        byte_fallback=settings.byte_fallback,
    )


def _normalizer(rules: Any) -> Any:
    """What a sentencepiece model does to a text before it cuts it."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
