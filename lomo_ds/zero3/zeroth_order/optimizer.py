"""ZeRO-3 whose shards change once a step, by an estimate of the gradient from losses alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.zero3._internals import full_numel, local_shard
from lomo_ds.zero3.apply.choose import Choice
from lomo_ds.zero3.optimizer import LomoZeroOptimizer
from lomo_ds.zero3.step import LossClosure
from lomo_ds.zero3.zeroth_order.forwards import Forwards
from lomo_ds.zero3.zeroth_order.losses import mean_losses
from lomo_ds.zo.blocks import blocks_by_layer
from lomo_ds.zo.conservative import CANDIDATES, chosen
from lomo_ds.zo.moves import Move, combination
from lomo_ds.zo.noise import Normal
from lomo_ds.zo.point import Directions, Point
from lomo_ds.zo.settings import ZerothOrderSettings
from lomo_ds.zo.sparsity import Kept
from lomo_ds.zo.table import CONSERVATIVE

HOW_TO_STEP = (
    "makes its steps from forwards alone: call engine.train_batch([closure]), where closure() runs the model "
    "and returns the loss, in place of engine.backward(loss) and engine.step()"
)


class ZerothOrderOptimizer(LomoZeroOptimizer):
    """Stage 3 that has no gradients: a step's estimate goes to the rules in their place.

    Args:
        settings: how the estimate is made.
        stage3_arguments: of DeepSpeed's stage 3, by name.
    """

    reduces_gradients = False

    def __init__(self, settings: ZerothOrderSettings, **stage3_arguments: Any) -> None:
        self._settings = settings
        sides = "one side" if settings.sides == 1 else "two sides"
        reason = f"{settings.num_samples} direction(s) a step, {sides}, eps {settings.eps}"
        super().__init__(Choice(policy="immediate", reason=reason), **stage3_arguments | {"clip_grad": 0.0})

    def set_up(self) -> None:
        super().set_up()
        self._forwards = Forwards(self, list(self.updater.entries), self._settings.paired)
        entries = self.updater.entries
        names = [entry.spec.name if self._settings.block_wise else "" for entry in entries.values()]
        self._blocks = dict(zip(entries, blocks_by_layer(names), strict=True))
        self._estimator = self._settings.estimator(num_blocks=1 + max(self._blocks.values()))
        self._directions: Directions | None = None
        self._normal = Normal()
        self._kept: dict[Parameter, Kept] = {}
        self._update = Point(coefficients={})

    # The forwards ------------------------------------------------------------------------------

    @torch.no_grad()
    def estimate(self, closures: Sequence[LossClosure], num_steps: int) -> Tensor:
        """Run the forwards of a step and decide on its update; ``step`` makes it. Collective.

        Args:
            closures: one for each micro-batch of this rank.
            num_steps: before this one; with the seed it gives the directions.

        Returns:
            The mean of this rank's losses, 0-dim fp32.

        Raises:
            ValueError: see ``mean_losses``; nothing has changed then.
        """
        self._directions = Directions(seed=self.optimizer.seed, step=num_steps)
        self._kept.clear()
        own, losses = self._losses(closures, self._estimator.points)
        self._update = Point(coefficients=self._estimator.coefficients(losses))
        if type(self.optimizer).__name__ == CONSERVATIVE:
            candidates = [candidate.point(self._update) for candidate in CANDIDATES]
            _, losses = self._losses(closures, candidates)
            self._update = chosen(self._update, losses)
        return own.mean().float()

    def _losses(self, closures: Sequence[LossClosure], points: Sequence[Point]) -> tuple[Tensor, list[float]]:
        moves = [partial(self._move_gathered, point) for point in points]
        returned = [self._forwards.at(closure, moves) for closure in closures]
        return mean_losses(returned, torch.device(self.device))

    def _move_gathered(self, point: Point, param: Parameter) -> Move:
        """What leads one parameter, which is gathered, to ``point``."""
        sparsity, directions = self._settings.sparsity, self._directions
        assert directions is not None, "the step has begun"
        if sparsity is not None and param not in self._kept:
            key = (directions.seed, directions.step, self.updater.entries[param].index)
            self._kept[param] = sparsity.kept(param.data.view(-1), key)
        return self._move(point, param)

    def _move(self, point: Point, param: Parameter) -> Move:
        """The same for one that need not be gathered.

        It stays where it is frozen for the time being, or sparse and no forward used it.
        """
        assert self._directions is not None, "the step has begun"
        entry, kept = self.updater.entries[param], self._kept.get(param)
        if not param.requires_grad or kept is None and self._settings.sparsity is not None:
            return Move(terms=[], normal=self._normal)
        lr = float(self.optimizer.param_groups[entry.group_index]["lr"])
        terms = self._directions.terms(point, entry.index, lr, self._blocks[param])
        return Move(terms=terms, kept=kept, normal=self._normal)

    # The update --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every shard once, and make gathered copies new. Collective."""
        self.begin_step()
        self.release_gathered_params()
        with self.stream.writing():
            self._update_shards()
            self.updater.end_step()
        self.stream.publish()
        self._global_grad_norm = self._expected_norm()
        self.gather_persistent_params()

    def _update_shards(self) -> None:
        """Each shard by its rule; the estimate is made for one shard at a time, all in the same memory."""
        moves = {param: self._move(self._update, param) for param in self.updater.entries}
        moves = {param: move for param, move in moves.items() if move.terms}
        largest = max((local_shard(param).numel() for param in moves), default=0)
        estimate = torch.empty(largest, dtype=torch.float32, device=self.device)
        for param, move in moves.items():
            shard, start = local_shard(param), self.updater.entries[param].spec.start
            grad_shard = combination(shard, move, start, out=estimate[: shard.numel()])
            self.updater.begin(param, grad_shard, norm=None, loss_scale=1.0, is_view=True)
        self.updater.finish()

    def _expected_norm(self) -> float:
        """The estimate's 2-norm, with the squares of the directions' elements at their mean of 1."""
        share = 1.0 if self._settings.sparsity is None else self._settings.sparsity.share
        numel = dict.fromkeys(self._blocks.values(), 0)
        for param, block in self._blocks.items():
            numel[block] += full_numel(param)
        squares = (c**2 * numel[block] for (block, _), c in self._update.coefficients.items())
        return math.sqrt(share * sum(squares))

    # What there is none of ---------------------------------------------------------------------

    @property
    def at_step_boundary(self) -> bool:
        """Always: no gradient waits."""
        return True

    def accepts_gradients(self) -> bool:
        return False

    def backward_prologue(self) -> NoReturn:
        raise RuntimeError(f"{type(self.optimizer).__name__} {HOW_TO_STEP}")
