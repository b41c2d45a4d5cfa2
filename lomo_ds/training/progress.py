"""What rank 0 shows during a run: a progress bar on a terminal, elsewhere a line from time to time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from lomo_ds.byte_units import GIB
from lomo_ds.training.metrics import StepMetrics

_Item = TypeVar("_Item")

_NUM_LINES = 16
"""About how many lines a run prints where there is no terminal."""

_NUM_SCORING_LINES = 4


def describe(metrics: StepMetrics) -> str:
    """Loss, learning rate, norm, speed and memory of a step, in a line of fixed width."""
    return (
        f"loss {metrics.loss:6.3f}  lr {metrics.lr:8.2e}  grad norm {metrics.grad_norm:8.2f}  "
        f"{metrics.tokens_per_s:6.0f} tokens/s  {metrics.peak_memory_bytes / GIB:5.2f} GiB"
    )


class TrainingProgress:
    """A context that shows each step's figures; silent on ranks other than 0.

    Args:
        num_steps: of the run.
        visible: whether this rank shows anything.
    """

    def __init__(self, num_steps: int, visible: bool) -> None:
        self._console = Console(soft_wrap=True, highlight=False, quiet=not visible)
        self._every = max(1, num_steps // _NUM_LINES)
        self._num_steps = num_steps
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not (visible and self._console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=num_steps, figures="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, metrics: StepMetrics) -> None:
        """Show the figures of a step that is done."""
        if not self._bar.disable:
            self._bar.update(self._task, completed=metrics.step, figures=describe(metrics))
        elif metrics.step in (1, self._num_steps) or metrics.step % self._every == 0:
            self._console.print(f"step {metrics.step:5d}/{self._num_steps}  {describe(metrics)}")

    def scoring(self, batches: Sequence[_Item]) -> Iterable[_Item]:
        """The batches, with how many of them are done on the screen."""
        if self._bar.disable:
            return self._scoring_in_lines(batches)
        return track(batches, "scoring", console=self._console, transient=True)

    def _scoring_in_lines(self, batches: Sequence[_Item]) -> Iterator[_Item]:
        num_said = 0
        for num_done, batch in enumerate(batches):
            if num_done * _NUM_SCORING_LINES // len(batches) > num_said:
                num_said += 1
                self._console.print(f"scored {num_done}/{len(batches)} batches")
            yield batch

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text)
