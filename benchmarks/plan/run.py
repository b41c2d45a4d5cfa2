"""Write the tables of docs/benchmarks/plan.md: large models, the floor, the paper's Table 1, runs with data.

Usage: python -m benchmarks.plan.run [models] [floor] [table1] [truth]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator

os.environ.setdefault("DS_ACCELERATOR", "cpu")
for variable in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
    os.environ.setdefault(variable, "262144")  # otherwise glibc keeps freed memory

from benchmarks.common.paths import PAGES, ROOT  # noqa: E402
from benchmarks.plan.cost_job import plan_measured  # noqa: E402
from benchmarks.plan.truth_job import observe_resident  # noqa: E402
from lomo_ds.byte_units import GIB  # noqa: E402
from lomo_ds.planner.closed_form import closed_form  # noqa: E402
from lomo_ds.planner.dry_run import DryRun, dry_run  # noqa: E402
from lomo_ds.planner.fit import fits  # noqa: E402
from lomo_ds.planner.job import Job, default_ds_json, read_planned_json  # noqa: E402
from lomo_ds.planner.presets import model_config  # noqa: E402
from tests.planner.child import in_child  # noqa: E402
from tests.planner.observe import predicted  # noqa: E402

PAGE = PAGES / "plan.md"
LOW_MEMORY = ROOT / "ds_configs" / "lomo_bf16_low_memory.json"
PAPER = {
    "AdamW": (12.55, 12.55, 75.31, 1.79, 102.20),
    "SGD": (12.55, 12.55, 25.10, 1.79, 51.99),
    "Lomo": (12.55, 0.24, 0.0, 1.79, 14.58),
}
"""LOMO (arXiv 2306.09782), Table 1: parameters, gradients, optimizer, activations, total; GiB."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = {"models": models, "floor": floor, "table1": table1, "truth": truth}
    parser.add_argument("tables", nargs="*", help="default: all", metavar="|".join(tables))
    for table in parser.parse_args().tables or tables:
        lines = tables[table]()
        put(table, "\n".join(lines))


def put(name: str, content: str) -> None:
    """Replace the text between a table's two marks in the page."""
    begin, end = f"<!-- {name}: written by benchmarks/plan/run.py -->", f"<!-- end of {name} -->"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")


# The paper's Table 1 ----------------------------------------------------------------------------


def table1() -> Iterator[str]:
    """LLaMA-7B, sequence 512, batch 8, one card with everything on it."""
    cases = [("AdamW", True), ("SGD", True), ("Lomo", True), ("Lomo", False)]
    jobs = [_table1_job(optimizer, tiled) for optimizer, tiled in cases]
    yield "| | parameters | gradients | optimizer | activations | total at the peak | reserved |"
    yield "|---|---|---|---|---|---|---|"
    for (optimizer, tiled), run in zip(cases, in_child(dry_run, jobs), strict=True):
        if tiled or optimizer != "Lomo":
            yield f"| {optimizer}, paper | {' | '.join(f'{value:.2f}' for value in PAPER[optimizer])} | |"
        name = f"{optimizer}{', whole vocabulary' if optimizer == 'Lomo' and not tiled else ''}"
        yield f"| {name}, dry run | {' | '.join(f'{value:.2f}' for value in _columns(run))} |"


def _table1_job(optimizer: str, tiled: bool) -> Job:
    ds_json = default_ds_json() | {"tiled_vocabulary": {"enabled": tiled}, "gradient_clipping": 0.0}
    settings = {"num_gpus": 1, "seq_len": 512, "micro_batch": 8, "gpu_memory_bytes": 160 * GIB}
    return Job(model=model_config("llama-7b"), ds_json=ds_json, optimizer=optimizer, **settings)


def _columns(run: DryRun) -> tuple[float, ...]:
    """Permanent gradients, or the peak of temporary ones; activations at the peak of backward."""
    roles = run.peaks["step 2: backward"]["device"].by_role()
    gradients = run.at_rest["gradients"] or run.peak_gradient_bytes
    activations = roles["activations"] + roles["checkpoints"]
    parts = (run.at_rest["parameters"], gradients, run.at_rest["rule state"], activations)
    totals = (run.device.num_bytes, run.reserved.usual.peak_bytes)
    return tuple(value / GIB for value in (*parts, *totals))


# The floor --------------------------------------------------------------------------------------


def floor() -> Iterator[str]:
    """The parts of the peak, in the backward of an MLP's last matrix, by formula."""
    names = ("llama-65b", "llama-3-70b", "qwen2.5-72b")
    columns = [closed_form(_large_job(name, False, 8)).layer_parts for name in names]
    yield f"| part of the peak | bytes | {' | '.join(f'{name}, GiB' for name in names)} |"
    yield "|---|---|---|---|---|"
    for part in columns[0]:
        if any(column[part] for column in columns):
            sizes = " | ".join(f"{column[part] / GIB:.3f}" for column in columns)
            yield f"| {FLOOR_ROWS[part]} | {sizes} |"
    yield f"| all | | {' | '.join(f'{sum(parts.values()) / GIB:.3f}' for parts in columns)} |"


FLOOR_ROWS = {
    "shards": "**shards** (floor) | 2 x parameters / n",
    "checkpoints": "**checkpoints** (floor, or on the host) | 2 x layers x T x H",
    "small parameters and the bucket": (
        "small parameters, which stay gathered, and the bucket | by the JSON's limits"
    ),
    "the weight": "the matrix's gathered weight | 2 x H x I",
    "its gradient": "its gradient | 2 x H x I",
    "activations: attention and norms": (
        "activations: both norms, q, k, v, attention, states and gradients | 2 x T x (10 H + 2 Q + 2 K)"
    ),
    "activations: MLP": "activations: the MLP's | 2 x T x 4 I",
    "the gradient's reduction, or one more activation": (
        "the gradient's shard on its way to the host, or one more MLP activation | 2 x max(H x I / n, T x I)"
    ),
}
"""Part of the closed form -> its name on the page, and its formula."""


# Large models -----------------------------------------------------------------------------------

LARGE = [
    ("llama-65b", False, 8),
    ("llama-65b", True, 8),
    ("llama-65b", False, 1024),
    ("llama-3-70b", False, 8),
    ("llama-3-70b", True, 8),
    ("qwen2.5-72b", False, 8),
]


def models() -> Iterator[str]:
    """Sequence 1024, micro-batch 1, bf16, clipping at 1.0: the card, then the host and planning's costs."""
    card = [
        "| model | GPUs | checkpoints | live | closed form | reserved | without expandable segments | "
        "worst case | flushes | fits 24 GiB |",
        "|---" * 10 + "|",
    ]
    costs = [
        "| model | GPUs | checkpoints | live while loading | offloaded gradients per node | "
        "host peak per node | planning, s | processor time, s | planning process |",
        "|---" * 9 + "|",
    ]
    for name, offloaded, count in LARGE:
        job = _large_job(name, offloaded, count)
        start_s = time.perf_counter()
        [planned] = in_child(plan_measured, [job])  # one process per plan, for its own peak
        wall_s = time.perf_counter() - start_s
        row = f"| {name} | {count} | {'host' if offloaded else 'device'} | "
        card.append(row + " | ".join(_on_card(job, planned.run)) + " |")
        taken = f" | {wall_s:.0f} | {planned.cpu_s:.0f} | {planned.resident_bytes / GIB:.2f} |"
        costs.append(row + " | ".join(_elsewhere(job, planned.run)) + taken)
    yield from [*card, "", *costs]


def _on_card(job: Job, run: DryRun) -> list[str]:
    """Live, closed form, reserved, without expandable segments, worst case; flushes, and the verdict."""
    reserved = run.reserved
    sizes = (
        run.device.num_bytes,
        closed_form(job).peak_bytes,
        reserved.usual.peak_bytes,
        reserved.whole_segments.peak_bytes,
        reserved.worst.peak_bytes,
    )
    verdict = "yes" if fits(job, run) else "no"
    return [*(f"{size / GIB:.2f}" for size in sizes), str(reserved.worst_on_card.num_flushes), verdict]


def _elsewhere(job: Job, run: DryRun) -> list[str]:
    """Live on the card while loading; offloaded gradients and host peak of a node."""
    loading = max(run.phase_peaks[phase][0] for phase in ("loading", "initialization"))
    host = (run.gradient_host_bytes * job.num_local, run.host.num_bytes * job.num_local)
    return [f"{size / GIB:.2f}" for size in (loading, *host)]


def _large_job(name: str, offloaded: bool, num_gpus: int) -> Job:
    ds_json = read_planned_json(str(LOW_MEMORY)) if offloaded else default_ds_json()
    return Job(model=model_config(name), ds_json=ds_json, num_gpus=num_gpus)


# Runs with data --------------------------------------------------------------------------------------


def truth() -> Iterator[str]:
    """Dry runs and the same steps with data, on CPU ranks."""
    from tests.harness import run_ranks
    from tests.planner.small_jobs import medium_jobs

    jobs = medium_jobs()
    runs = in_child(dry_run, jobs.values())
    yield "| job | dry run, MB | with data, MB | difference | growth of resident memory, MB |"
    yield "|---|---|---|---|---|"
    for (name, job), run in zip(jobs.items(), runs, strict=True):
        peak, growth = run_ranks(job.num_gpus, observe_resident, job, fresh=True, deadline_s=600)[0]
        expected = predicted(run).num_bytes
        change = expected / peak - 1
        dry, real, resident = (value / 1e6 for value in (expected, peak, growth))
        yield f"| {name} | {dry:.1f} | {real:.1f} | {change:+.2%} | {resident:.1f} |"


if __name__ == "__main__":
    main()
