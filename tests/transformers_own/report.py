"""The page of transformers' own tests: what passed, failed and was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.machine import describe_machine, describe_versions


@dataclass(frozen=True, kw_only=True)
class Case:
    """One test.

    Attributes:
        name: class and test.
        outcome: "passed", "failed", "skipped" (by the test itself) or "left out".
        reason: of the last three.
    """

    name: str
    outcome: str
    reason: str = ""


def page(cases: Sequence[Case], about: str) -> str:
    """docs/benchmarks/transformers_tests.md."""
    counts = Counter(case.outcome for case in cases)
    told = ", ".join(
        f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped", "left out")
    )
    facts = ", ".join(f"{name} {what}" for name, what in (describe_machine() | describe_versions()).items())
    return f"""# transformers' own tests

The tests that transformers has of its Trainer with DeepSpeed, with LOMO in their ZeRO-3 JSON in place of
AdamW. Tests in one process run within `lomo_ds.integrations.enable()`; launched ones start
`accelerate launch --module lomo_ds.run` with two CPU ranks and a tiny Qwen2 with random weights. Nothing else
of them is changed.

**{told}** of {len(cases)}.

{_passed(cases)}

| not run or not passed | tests | why |
|---|---|---|
{_others(cases)}

    make test-transformers

Source of the tests: {about}.

{facts}
"""


def _passed(cases: Sequence[Case]) -> str:
    names = [case.name for case in cases if case.outcome == "passed"]
    return "Passed:\n\n" + "\n".join(f"- `{name}`" for name in names)


def _others(cases: Sequence[Case]) -> str:
    """A line for each reason; failures one by one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        if case.outcome != "passed":
            about = case.name if case.outcome == "failed" else ""
            groups.setdefault((case.outcome + (f": `{about}`" if about else ""), case.reason), []).append(
                case.name
            )
    return "\n".join(
        f"| {what} | {len(names)} | {reason.replace('|', '/')} |" for (what, reason), names in groups.items()
    )
