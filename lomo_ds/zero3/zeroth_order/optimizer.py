"""ZeRO-3 whose shards change once a step, by an estimate of the gradient from losses alone.

Groups of parameters may be trained by their gradients in the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.config import first_few
from lomo_ds.zero3._internals import ReducedGradient, full_numel, local_shard
from lomo_ds.zero3.apply.base import StepOutcome
from lomo_ds.zero3.apply.choose import Choice
from lomo_ds.zero3.optimizer import LomoZeroOptimizer
from lomo_ds.zero3.step import LossClosure
from lomo_ds.zero3.zeroth_order.forwards import Forwards
from lomo_ds.zero3.zeroth_order.losses import mean_losses
from lomo_ds.zero3.zeroth_order.random_state import RandomState
from lomo_ds.zero3.zeroth_order.tangents import TangentForwards
from lomo_ds.zo.blocks import blocks_by_layer
from lomo_ds.zo.conservative import CANDIDATES, chosen
from lomo_ds.zo.moves import Move, combination
from lomo_ds.zo.noise import Normal
from lomo_ds.zo.point import Directions, Point
from lomo_ds.zo.settings import DirectionSettings, ZerothOrderSettings
from lomo_ds.zo.sparsity import Kept
from lomo_ds.zo.table import CONSERVATIVE, METHODS

HOW_TO_STEP = (
    "makes its steps from forwards alone: call engine.train_batch([closure]), where closure() runs the model "
    "and returns the loss, in place of engine.backward(loss) and engine.step()"
)

NO_GRADIENTS = StepOutcome(grad_norm=0.0, applied=True)


class ZerothOrderOptimizer(LomoZeroOptimizer):
    """Stage 3 in which a step's estimate goes to the rules in the gradient's place.

    Args:
        settings: how the estimate is made.
        choice: when the shards of gradients are applied, of groups that are trained by them; None where there
            is no such group.
        stage3_arguments: of DeepSpeed's stage 3, by name.

    Attributes:
        by_gradient: the parameters of these groups. A step has a forward and a backward for them at its
            weights, with a graph from the first of them on; its forwards at other points leave them alone.
        random_states: of torch's generators, before the forwards of each micro-batch of a step.
    """

    to_thaw = (
        "a zeroth-order method perturbs what required one then; build the engine while it does, and freeze "
        "it afterwards"
    )

    def __init__(self, settings: DirectionSettings, choice: Choice | None, **stage3_arguments: Any) -> None:
        self._settings = settings
        self.reduces_gradients = choice is not None
        reason = str(settings)
        choice = (
            Choice(policy="immediate", reason=reason)
            if choice is None
            else replace(choice, reason=f"{choice.reason}; others by {reason}")
        )
        super().__init__(choice, **stage3_arguments | {"clip_grad": 0.0})

    def set_up(self) -> None:
        group_types = [group["type"] for group in self.optimizer.param_groups]
        groups = self.group_index()
        self.by_gradient = dict.fromkeys(
            p for p, group in groups.items() if group_types[group] not in METHODS
        )
        super().set_up()
        self.frozen_params.refuse(param for param in groups if not self.receives_gradient(param))
        entries = {
            param: entry for param, entry in self.updater.entries.items() if not self.receives_gradient(param)
        }
        self._forwards = (
            Forwards.at_points(self, list(entries), self._settings.forwards_at_once)
            if isinstance(self._settings, ZerothOrderSettings)
            else TangentForwards(self, list(entries))
        )
        names = [entry.spec.name if self._settings.block_wise else "" for entry in entries.values()]
        self._blocks = dict(zip(entries, blocks_by_layer(names), strict=True))
        self.random_states: list[RandomState] = []
        self._have_gradients: dict[Parameter, None] = {}
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
        mean = self._estimator.losses(own).mean()
        self._update = Point(coefficients=self._estimator.coefficients(losses))
        if type(self.optimizer).__name__ == CONSERVATIVE:
            candidates = [candidate.point(self._update) for candidate in CANDIDATES]
            _, losses = self._losses(closures, candidates)
            self._update = chosen(self._update, losses)
        return mean.float()

    def _losses(self, closures: Sequence[LossClosure], points: Sequence[Point]) -> tuple[Tensor, list[float]]:
        moves = [partial(self._move_gathered, point) for point in points]
        returned = []
        self.random_states.clear()
        for closure in closures:
            self.random_states.append(RandomState.now())
            returned.append(self._forwards.at(closure, moves))
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
        """Update every shard once, and make gathered copies new. Collective.

        Gradients that are not finite drop the whole step, unless ``immediate`` has applied others already.
        """
        self.begin_step()
        self.release_gathered_params()
        with self.stream.writing():
            outcome = self.policy.on_step(self.loss_scale) if self.by_gradient else NO_GRADIENTS
            if outcome.applied:
                self._update_shards()
            self._note_skipped(self.updater.end_step())
        self.stream.publish()
        norm = (outcome.grad_norm**2 + self._expected_norm() ** 2) ** 0.5
        self._note_outcome(replace(outcome, grad_norm=norm))
        self.gather_persistent_params(self.updater.entries)
        self.zero_grad()

    def _update_shards(self) -> None:
        """Each shard by its rule; the estimate is made for one shard at a time, all in the same memory."""
        moves = {param: self._move(self._update, param) for param in self._blocks}
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

    # Gradients ---------------------------------------------------------------------------------

    @property
    def at_step_boundary(self) -> bool:
        """Always: ``train_batch`` makes whole steps."""
        return True

    def backward_prologue(self) -> None:
        """Refuse a backward that is not part of a step."""
        if not self.accepts_gradients():
            raise RuntimeError(f"{type(self.optimizer).__name__} {HOW_TO_STEP}")
        super().backward_prologue()

    def receives_gradient(self, param: Parameter) -> bool:
        return param in self.by_gradient

    @contextmanager
    def others_frozen(self) -> Iterator[None]:
        """Let only ``by_gradient`` require gradients within the block, a forward and a backward.

        Raises:
            RuntimeError: some ran in a reentrant checkpoint that torch could not follow.
        """
        others = [param for param in self._blocks if param.requires_grad]
        self._forwards.run_without_graph.clear()
        self._have_gradients.clear()
        for param in others:
            param.requires_grad_(False)
        try:
            yield
        finally:
            for param in others:
                param.requires_grad_(True)
        self._refuse_lost_gradients()

    def _refuse_lost_gradients(self) -> None:
        in_checkpoints = self._forwards.run_without_graph.keys() - self._have_gradients.keys()
        trained = (param for param in self.by_gradient if param.requires_grad)
        lost = [self.name_of(param) for param in trained if param in in_checkpoints]
        if lost:
            raise RuntimeError(
                f"engine.train_batch: no gradient for {first_few(lost)}, run in a reentrant activation "
                "checkpoint whose inputs have none: turn checkpointing on with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )

    def on_gradients(self, gradients: Sequence[ReducedGradient]) -> None:
        self._have_gradients |= dict.fromkeys(gradient.param for gradient in gradients)
        super().on_gradients(gradients)
