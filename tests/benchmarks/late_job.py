"""A job that writes a row and is then late; meanwhile it locks a file, as torch does while it compiles."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.job_arguments import job_parser

ROW = {"optimizer": "Lomo", "apply": "immediate", "dtype": "fp32", "name": "a row", "distance": 0.125}


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (args.folder / "child").write_text(str(child.pid))
    (args.folder / "lock").touch()
    try:
        (args.out / "rank_0.json").write_text(json.dumps({"rows": [ROW]}))
        time.sleep(600)
    finally:
        (args.folder / "lock").unlink()


if __name__ == "__main__":
    main()
