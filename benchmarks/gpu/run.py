"""What has to be measured on a GPU, on this one, in at most ten minutes; writes docs/benchmarks/gpu.md.

Usage: python -m benchmarks.gpu.run [--out FOLDER]

A part that fails or is late is named on the page, and the others are run all the same. Exit status: 0 where
all is well, 1 where something failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.common.paths import PAGES
from benchmarks.gpu.card import require_card


def require_cuda() -> None:
    """This process's torch can use the GPU, or this process ends."""
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(
            f"error: torch {torch.__version__} ({built}) cannot use the GPU of this machine: install another "
            "build, see https://pytorch.org/get-started",
            file=sys.stderr,
        )
        sys.exit(2)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of gpu.md, gpu.json and gpu.png")
    args = parser.parse_args()
    card = require_card()
    require_cuda()
    from benchmarks.gpu.check import check
    from benchmarks.gpu.parts import PARTS, Setup

    return check(PARTS, Setup(card=card), args.out)


if __name__ == "__main__":
    sys.exit(main())
