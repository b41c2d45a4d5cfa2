"""Steps on this device and those of plain torch, next to each other; started by ``run.py``."""

from __future__ import annotations

import torch

from benchmarks.common.rank_job import finish_rank, join_ranks, write_result
from benchmarks.gpu.job_arguments import attempt, job_parser
from tests.gpu.jobs import ALL_STEPS, Steps, compare_steps

TOY = 2


def check(steps: Steps) -> dict[str, float]:
    """The distance of some steps from plain torch's, in tolerances.

    Raises:
        AssertionError: they are not equal, or the comparison could not have told.
    """
    distance = compare_steps(steps)
    assert distance.steps <= 1.0, f"{distance.steps:.2f} tolerances off"
    assert distance.unmoved >= 3.0, f"unmoved weights would be {distance.unmoved:.2f} tolerances off"
    return {"distance": distance.steps, "unmoved": distance.unmoved}


def main() -> None:
    args = job_parser(__doc__).parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    join_ranks()
    rows = []
    for steps in ALL_STEPS[:TOY] if args.toy else ALL_STEPS:
        row = {**steps._asdict(), "name": str(steps)}
        rows.append(row | attempt(check, steps))
        write_result({"rows": rows}, args.out)
    finish_rank({"rows": rows}, args.out)


if __name__ == "__main__":
    main()
