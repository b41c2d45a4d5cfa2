"""A plan as a person reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from lomo_ds.byte_units import gib
from lomo_ds.model_io.model_class import CAUSAL_LM
from lomo_ds.planner.job import Job
from lomo_ds.planner.ledger import Block, Peak
from lomo_ds.planner.plan import Plan

_NUM_ROWS = 12


def print_plan(plan: Plan, console: Console) -> None:
    """Verdict first, then where the memory is, what is sent and computed, and the time estimate."""
    for line in (_headline(plan), _verdict(plan), _formula(plan), ""):
        console.print(line, highlight=False)
    console.print(_card_table(plan))
    console.print(_roles_table(plan))
    console.print(_peak_table(plan.run.device))
    for line in (*_host_lines(plan), *_traffic_lines(plan), *_time_lines(plan), *_batch_lines(plan.job)):
        console.print(line, highlight=False)


def _headline(plan: Plan) -> str:
    job, run = plan.job, plan.run
    model_class = "" if job.model_class == CAUSAL_LM else f" as {job.model_class}"
    return (
        f"{plan.model_name}{model_class}: {run.num_params / 1e9:.2f}e9 parameters, "
        f"{job.optimizer} on {job.num_gpus} GPUs of {gib(job.gpu_memory_bytes)} GiB, "
        f"{job.micro_batch} x {job.seq_len} tokens each, checkpointing: {job.checkpointing.replace('_', '-')}"
    )


def _verdict(plan: Plan) -> str:
    reserved = plan.run.reserved
    where = (
        f"torch reserves {gib(reserved.usual.peak_bytes)} GiB in {reserved.usual.phase}, "
        f"{gib(plan.job.reserve_bytes)} GiB are left free for what is outside torch"
    )
    if plan.fits:
        return f"fits: {where}, {gib(-plan.missing_bytes)} GiB remain{_flushes(plan)}"
    if plan.missing_bytes > 0:
        lags = " where the device lags" if reserved.worst_on_card.is_out_of_memory else ""
        return f"does not fit: {where}, {gib(plan.missing_bytes)} GiB are missing{lags}; {plan.remedy}"
    return f"does not fit: {gib(plan.host_peak_bytes_per_node)} GiB of host memory per node; {plan.remedy}"


def _flushes(plan: Plan) -> str:
    """Nothing, or that a slow device would have to be waited for."""
    count = plan.run.reserved.worst_on_card.num_flushes
    if not count:
        return ""
    return f"; in the worst case torch's allocator empties its cache {count} times in loading and two steps"


def _formula(plan: Plan) -> str:
    formula = plan.formula
    if isinstance(formula, str):
        return formula.partition(": use a dry run")[0]
    return f"closed form: {gib(formula.peak_bytes)} GiB in {formula.peak_moment}"


def _card_table(plan: Plan) -> Table:
    """Live, reserved, worst case, and the parts of the reserve."""
    table = Table(title="the card", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    table.add_column("from")
    reserved = plan.run.reserved
    for name, num_bytes, source in (
        ("live tensors", plan.run.device.num_bytes, f"{plan.run.device.phase}"),
        ("reserved by torch", reserved.usual.peak_bytes, f"{reserved.usual.phase}, expandable segments"),
        ("worst case", reserved.worst.peak_bytes, "a device as slow as the program lets it be"),
        ("without expandable segments", reserved.whole_segments.peak_bytes, "torch's default"),
    ):
        table.add_row(name, gib(num_bytes), source)
    table.add_section()
    for part in plan.job.reserve_parts:
        table.add_row(f"left free: {part.name}", gib(part.num_bytes), part.source)
    return table


def _roles_table(plan: Plan) -> Table:
    table = Table(title="live tensors at their peak, by purpose", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for role, num_bytes in plan.run.device.by_role().items():
        table.add_row(role, gib(num_bytes))
    table.add_row("all", gib(plan.run.device.num_bytes), style="bold")
    return table


def _peak_table(peak: Peak) -> Table:
    table = Table(title=f"live tensors at the peak, after {peak.operation}", title_justify="left")
    for column, justify in (("GiB", "right"), ("what", "left"), ("shape", "left"), ("made by", "left")):
        table.add_column(column, justify=justify)
    for row in largest_blocks(peak, _NUM_ROWS):
        table.add_row(*row)
    return table


def largest_blocks(peak: Peak, num_rows: int) -> Iterator[tuple[str, str, str, str]]:
    """(GiB, what, shape, made by) of the live storages at a peak, equal ones together, largest first.

    Rows after ``num_rows`` are summed in a last one, so that the rows add up.
    """
    totals: Counter[tuple[str, str, str]] = Counter()
    counts: Counter[tuple[str, str, str]] = Counter()
    for block in peak.blocks:
        key = _key(block)
        totals[key] += block.num_bytes
        counts[key] += 1
    rows = totals.most_common()
    for key, num_bytes in rows[:num_rows]:
        what, shape, made_by = key
        times = f"{counts[key]} x " if counts[key] > 1 else ""
        yield gib(num_bytes, 3), f"{times}{what}", shape, made_by
    rest = rows[num_rows:]
    if rest:
        count, num_bytes = sum(counts[key] for key, _ in rest), sum(size for _, size in rest)
        yield gib(num_bytes, 3), f"others ({count})", "", ""


def _key(block: Block) -> tuple[str, str, str]:
    if block.role.value == "parameters":
        return "parameters (shards)", "", ""
    what = f"{block.role.value} {block.name}".strip()
    return what, str(tuple(block.shape)), f"{block.operation.partition('.')[2]} {block.origin}"


def _host_lines(plan: Plan) -> Iterator[str]:
    yield (
        f"host, per node of {plan.job.num_local}: {gib(plan.gradient_host_bytes_per_node)} GiB of "
        f"offloaded gradients; at most {gib(plan.host_peak_bytes_per_node)} GiB in {plan.run.host.phase}"
    )
    if plan.run.policy:
        yield plan.run.policy


def _traffic_lines(plan: Plan) -> Iterator[str]:
    sent = plan.run.sent_bytes
    parts = ", ".join(f"{kind} {gib(sent[kind])} ({plan.run.calls[kind]} calls)" for kind in sorted(sent))
    yield f"sent by each rank in a step, GiB: {parts or 'nothing'}; all {gib(sum(sent.values()))}"
    yield f"arithmetic of each rank in a step: {plan.run.flops:.3e} FLOP"


def _time_lines(plan: Plan) -> Iterator[str]:
    time = plan.time
    if time is None:
        return
    low, high = time.tokens / time.slowest_s, time.tokens / time.fastest_s
    yield (
        f"estimate, not a measurement: a step in {time.fastest_s:.2f} to {time.slowest_s:.2f} s "
        f"({low:.1f} to {high:.1f} tokens per GPU and second): arithmetic {time.compute_s:.2f}, wire "
        f"{time.wire_s:.2f}, host {time.host_s:.2f} s"
    )
    yield from (f"  assumed: {assumption}" for assumption in time.assumptions)


def _batch_lines(job: Job) -> Iterator[str]:
    """Accumulation, and a ``train_batch_size`` that the search changed; nothing where there is neither."""
    asked = job.ds_json.get("train_batch_size", job.train_batch)
    if job.num_micro_batches == 1 and asked == job.train_batch:
        return
    changed = "" if asked == job.train_batch else f' (the JSON\'s "train_batch_size" was {asked})'
    yield (
        f"a step has {job.train_batch} sequences: {job.num_gpus} GPUs x {job.num_micro_batches} "
        f"micro-batches x {job.micro_batch}{changed}"
    )
