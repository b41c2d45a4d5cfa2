"""``lomo-ds report``: a run's folder, or several, as one page for a browser."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lomo_ds.cli.main import USAGE_ERROR
from lomo_ds.cli.outputs import refuse_unwritable
from lomo_ds.report.page import MAX_RUNS, html_page
from lomo_ds.report.record import RunRecord, read_record

PLAN_FILE = "plan.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after ``lomo-ds report``; None takes them from the command line.

    Returns:
        0, or 2 after one line on standard error that says what is wrong.
    """
    arguments = make_parser().parse_args(argv)
    out = arguments.out or arguments.runs[0] / "report.html"
    try:
        if len(arguments.runs) > MAX_RUNS:
            raise ValueError(f"{len(arguments.runs)} runs: at most {MAX_RUNS} fit side by side")
        refuse_unwritable("--out", out)
        records = [with_plan(read_record(run), run / PLAN_FILE) for run in arguments.runs]
        out.write_text(html_page(records), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    print(out)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Of this command."""
    parser = argparse.ArgumentParser(
        prog="lomo-ds report",
        description="Write one HTML page about a run, or about several side by side: curves, memory, "
        "settings, environment, samples. It needs no network and works while the run is on its way.",
        epilog=f"Where a run's folder has a {PLAN_FILE}, of lomo-ds plan --json, the planned peak is drawn "
        "with the memory.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="the output folder of a recipe")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html in the first RUN")
    return parser


def with_plan(record: RunRecord, path: Path) -> RunRecord:
    """The record with the peak of a plan, where there is one.

    Raises:
        ValueError: the file is not a plan.
    """
    if not path.is_file():
        return replace(record, plan_note=f"none: lomo-ds plan --json RUN/{PLAN_FILE} adds it")
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        planned, shape = int(plan["peak_device_bytes"]), f"{plan['micro_batch']} x {plan['seq_len']} tokens"
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not what lomo-ds plan --json writes") from None
    return replace(
        record, planned_bytes=planned, plan_note=f"of tensors, {plan['num_gpus']} GPUs, {shape} a forward"
    )


if __name__ == "__main__":
    sys.exit(main())
