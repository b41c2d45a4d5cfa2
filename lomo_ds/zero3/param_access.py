"""What DeepSpeed's ``safe_get_*`` and ``safe_set_*`` functions ask of a ZeRO-3 optimizer, by its names.

They read and write a parameter's gradient between backward and step, its weight in fp32 (with what rounding
or master weights keep in addition to the shard) and its rule's state. As in DeepSpeed, "full" functions are
collective, "local" ones deal with this rank's part, shape (partition_numel,), padded with zeros, and all of
them answer None for a parameter that does not require a gradient, and leave it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.shards import ShardSpec
from lomo_ds.zero3._internals import all_gathered, local_shard
from lomo_ds.zero3.apply.base import ApplyPolicy
from lomo_ds.zero3.exact_weights import ExactWeights
from lomo_ds.zero3.shard_stream import ShardStream
from lomo_ds.zero3.updater import Entry, Updater

Cut = Callable[[ShardSpec, Tensor], Tensor]


class ParamAccess:
    """The part of ``LomoZeroOptimizer`` that gives single parameters to the user.

    Attributes:
        updater, policy, stream, exact_weights: of the optimizer.
        admit_thawed: makes a state for what was frozen and requires a gradient now.
    """

    updater: Updater
    policy: ApplyPolicy
    stream: ShardStream
    exact_weights: ExactWeights
    admit_thawed: Callable[[], None]

    # Gradients ---------------------------------------------------------------------------------

    def get_fp32_grad_for_param(self, param: Parameter) -> Tensor | None:
        """The averaged gradient since the last step, in fp32 and the parameter's shape. Collective.

        As it has added up: divided by ``gradient_accumulation_steps``, times the loss scale. None before
        there is one.

        Raises:
            RuntimeError: it has been applied and released inside backward.
        """
        local = self.get_local_fp32_grad_for_param(param)
        return None if local is None else all_gathered(param, local)

    def get_local_fp32_grad_for_param(self, param: Parameter) -> Tensor | None:
        """This rank's part of ``get_fp32_grad_for_param``."""
        if not param.requires_grad:
            return None
        spec = self._entry(param).spec
        grad_shard = self.policy.gradient_of(param)
        return None if grad_shard is None else _padded(spec, grad_shard.float())

    def set_fp32_grad_for_param(self, value: Tensor, param: Parameter) -> None:
        """Replace the gradient since the last step; ``value`` has as many elements as the parameter."""
        if param.requires_grad:
            self._replace_gradient(param, _cut(self._entry(param).spec, value))

    def set_local_grad_for_param(self, value: Tensor, param: Parameter) -> None:
        """Replace this rank's part of the gradient since the last step."""
        if param.requires_grad:
            self._replace_gradient(param, _unpadded(self._entry(param).spec, value))

    def update_fp32_grad_for_param_vectorized(
        self, update_func: Callable[[Tensor, Parameter], Tensor], param_list: Sequence[Parameter]
    ) -> None:
        """Replace gradients by a function of them, in the order of the list. Collective."""
        for param in param_list:
            grad = self.get_fp32_grad_for_param(param)
            if grad is not None:
                self.set_fp32_grad_for_param(update_func(grad, param), param)

    def _replace_gradient(self, param: Parameter, grad_shard: Tensor) -> None:
        with self.stream.writing(grad_shard):
            self.policy.replace_gradient(param, grad_shard)

    # Weights and states ------------------------------------------------------------------------

    def get_full_hp_param(self, param: Parameter, optim_state_key: str | None = None) -> Tensor | None:
        """The weight in fp32, or a tensor of the rule's state. Collective.

        Args:
            param: of the model.
            optim_state_key: of the state; None for the weight.

        Returns:
            In the parameter's shape; a state that every rank holds whole in its own.

        Raises:
            ValueError: the rule keeps no such state.
        """
        local = self.get_local_fp32_param(param, optim_state_key)
        if local is None or self._is_replicated(param, optim_state_key):
            return local
        return all_gathered(param, local)

    def get_local_fp32_param(self, param: Parameter, optim_state_key: str | None = None) -> Tensor | None:
        """This rank's part of ``get_full_hp_param``; a copy."""
        if not param.requires_grad:
            return None
        spec = self._entry(param).spec
        if optim_state_key is None:
            return _padded(spec, self.exact_weights.get(param))
        state = self._state(param, optim_state_key).float().clone()
        return state if self._is_replicated(param, optim_state_key) else _padded(spec, state)

    def set_full_hp_param(self, value: Tensor, param: Parameter, optim_state_key: str | None = None) -> None:
        """Replace the weight, or a tensor of the rule's state, by ``value`` of as many elements."""
        if param.requires_grad:
            self._replace(param, value, optim_state_key, _cut)

    def set_local_hp_param(self, value: Tensor, param: Parameter, optim_state_key: str | None = None) -> None:
        """Replace this rank's part of the weight, or of a tensor of the rule's state."""
        if param.requires_grad:
            self._replace(param, value, optim_state_key, _unpadded)

    def get_hp_param_device(
        self, param: Parameter, optim_state_key: str | None = None
    ) -> torch.device | None:
        """Where weight or state are."""
        if not param.requires_grad:
            return None
        tensor = local_shard(param) if optim_state_key is None else self._state(param, optim_state_key)
        return tensor.device

    @torch.no_grad()
    def _replace(self, param: Parameter, value: Tensor, key: str | None, cut: Cut) -> None:
        """Write ``value`` to the weight or to a state; ``cut`` takes this rank's elements of it."""
        entry = self._entry(param)
        own = value if self._is_replicated(param, key) else cut(entry.spec, value)
        with self.stream.writing(own):
            if key is None:
                self.exact_weights.set(param, own)
            else:
                state = self._state(param, key)
                state.copy_(own.view_as(state))
        self.stream.publish()

    # Common ------------------------------------------------------------------------------------

    def _entry(self, param: Parameter) -> Entry:
        if param not in self.updater.entries:
            self.admit_thawed()
        return self.updater.entries[param]

    def _state(self, param: Parameter, key: str) -> Tensor:
        entry = self._entry(param)
        if key not in entry.state:
            known = ", ".join(map(repr, entry.state)) or "nothing"
            rule = type(entry.rule).__name__.removesuffix("Rule")
            raise ValueError(f"{rule} keeps no state {key!r} for {entry.spec.name!r}; it keeps {known}")
        return entry.state[key]

    def _is_replicated(self, param: Parameter, key: str | None) -> bool:
        return key in self._entry(param).rule.replicated_state


def _padded(spec: ShardSpec, shard: Tensor) -> Tensor:
    """The shard with zeros up to ``partition_numel``."""
    return torch.nn.functional.pad(shard, (0, spec.padding)) if spec.padding else shard


def _unpadded(spec: ShardSpec, partition: Tensor) -> Tensor:
    """This rank's real elements of what it stores.

    Raises:
        ValueError: not ``partition_numel`` elements.
    """
    if partition.numel() != spec.partition_numel:
        raise ValueError(
            f"{partition.numel()} elements for a rank's part of a parameter, which has {spec.partition_numel}"
        )
    return partition.flatten()[: spec.shard_numel]


def _cut(spec: ShardSpec, whole: Tensor) -> Tensor:
    """This rank's part of a whole tensor.

    Raises:
        ValueError: not as many elements as the parameter.
    """
    if whole.numel() != spec.numel:
        raise ValueError(f"{whole.numel()} elements for a parameter of {spec.numel}")
    return whole.flatten()[spec.start : spec.stop]
