"""DeepSpeed's stage 3 with its reduced gradients handed to this project."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor
from torch.nn import Parameter

from lomo_ds.zero3._internals.dtypes import TRAINABLE, Dtypes
from lomo_ds.zero3._internals.forward import is_gathered
from lomo_ds.zero3._internals.params import full_numel, process_group, shard_spec


class ReducedGradient(NamedTuple):
    """A gradient that has been averaged over the ranks and cut like its parameter.

    Attributes:
        param: the parameter it belongs to.
        shard: this rank's real elements, shape (shard_numel,), in ``Dtypes.accumulated``; empty on a rank
            that holds only padding. A view of a buffer that is used again: copy what is to be kept.
    """

    param: Parameter
    shard: Tensor


class ReducingStage3(DeepSpeedZeroOptimizer_Stage3):
    """Stage 3 whose reduced gradients go to ``on_gradients``, bucket by bucket, a bucket for each dtype.

    Frozen parameters of the optimizer's groups have all that it takes to train them later, but for memory.

    A subclass implements ``accepts_gradients``, ``on_gradients`` (called inside backward, once a reduce
    bucket) and ``on_stray_gradient`` (a gradient came while none was accepted).

    Args:
        dtypes: of the JSON.
        stage3_arguments: of DeepSpeed's stage 3, by name.

    Attributes:
        reduces_gradients: whether there are gradients at all, and with them reduce buckets.
        dtype: DeepSpeed takes it for every parameter's: the loss is scaled where it is fp16, and gradients
            of another dtype than this are converted before they are sent.
    """

    reduces_gradients = True
    ipg_buckets: dict[torch.dtype, Any]

    def __init__(self, dtypes: Dtypes, **stage3_arguments: Any) -> None:
        self.dtypes = dtypes
        super().__init__(
            communication_data_type=dtypes.communication,
            gradient_accumulation_dtype=dtypes.accumulation,
            **stage3_arguments,
        )

    def accepts_gradients(self) -> bool:
        raise NotImplementedError

    def on_gradients(self, gradients: Sequence[ReducedGradient]) -> None:
        raise NotImplementedError

    def on_stray_gradient(self, param: Parameter) -> None:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype | None:
        return self.dtype_before_sending

    @dtype.setter
    def dtype(self, of_first_param: torch.dtype) -> None:
        self.dtype_before_sending: torch.dtype | None = self.dtypes.model

    # Which parameters --------------------------------------------------------------------------

    def owned_params(self) -> list[Parameter]:
        """The parameters of the optimizer's groups, frozen ones included, in ZeRO-3's order."""
        return [param for group in self.fp16_groups for param in group]

    def _get_trainable_parameter_groups(self) -> list[dict[str, Any]]:
        with self.all_thawed():
            return super()._get_trainable_parameter_groups()

    def create_reduce_and_remove_grad_hooks(self) -> None:
        """Register the hooks. DeepSpeed gathers each parameter for it, which torch does not need."""
        with self.all_thawed(), _never_gathered(self.owned_params()):
            super().create_reduce_and_remove_grad_hooks()

    @contextmanager
    def all_thawed(self) -> Iterator[None]:
        """Let every parameter of the optimizer's groups that can require a gradient do so for a while."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        frozen = [p for p in params if p.dtype in TRAINABLE and not p.requires_grad]
        frozen = frozen if self.reduces_gradients else []
        for param in frozen:
            param.requires_grad_(True)
        try:
            yield
        finally:
            for param in frozen:
                param.requires_grad_(False)

    # Buckets -----------------------------------------------------------------------------------

    def _setup_for_real_optimizer(self) -> None:
        bucket_type = type(next(iter(self.ipg_buckets.values())))
        self.ipg_buckets = {
            dtype: bucket_type() for dtype in map(self.get_param_comm_dtype, self.owned_params())
        }

    def get_param_comm_dtype(self, param: Parameter) -> torch.dtype:
        return self.dtypes.communicated(param.dtype)

    def allocate_buckets(self, params: Iterable[Parameter]) -> None:
        """Allocate the buckets of ``params`` that are not there yet.

        Cost: ``reduce_bucket_size`` elements of the model's dtype; of another one at most as many as its
            parameters have.
        """
        if not (self.contiguous_gradients and self.reduces_gradients):
            return
        for dtype in dict.fromkeys(map(self.get_param_comm_dtype, params)):
            bucket = self.ipg_buckets[dtype]
            if bucket.buffer is None:
                device = get_accelerator().current_device_name()
                bucket.buffer = torch.empty(self.bucket_numel(dtype), dtype=dtype, device=device)

    def bucket_numel(self, dtype: torch.dtype) -> int:
        if dtype == self.dtypes.communication:
            return self.reduce_bucket_size
        own = (full_numel(p) for p in self.owned_params() if self.get_param_comm_dtype(p) == dtype)
        return min(self.reduce_bucket_size, sum(own))

    # Inside backward ---------------------------------------------------------------------------

    def reduce_ready_partitions_and_remove_grads(self, param: Parameter) -> None:
        if not param.requires_grad:
            drop_grad(param)  # zeros, which ZeRO-3 gives to all of a leaf module
        elif self.accepts_gradients():
            super().reduce_ready_partitions_and_remove_grads(param)
            self.reduce_full_bucket(self.get_param_comm_dtype(param))
        else:
            self.on_stray_gradient(param)
            drop_grad(param)

    def reduce_full_bucket(self, dtype: torch.dtype) -> None:
        """Reduce a gradient that fills the bucket at once; DeepSpeed would keep it until the next comes."""
        if self.ipg_buckets[dtype].elements >= self.reduce_bucket_size:
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)

    def _DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(
        self, communication_data_type: torch.dtype
    ) -> None:
        """Reduce a bucket, whose gradients keep its dtype until ``partition_grads`` gives each its own."""
        self.gradient_accumulation_dtype = communication_data_type
        super()._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(communication_data_type)

    def partition_grads(self, params_to_release: list[Parameter], grad_partitions: list[Tensor]) -> None:
        pairs = zip(params_to_release, grad_partitions, strict=True)
        self.on_gradients([self.reduced(param, part) for param, part in pairs])
        for param in params_to_release:
            drop_grad(param)

    def reduced(self, param: Parameter, partition: Tensor) -> ReducedGradient:
        real = partition.view(-1).narrow(0, 0, shard_spec(param).shard_numel)
        return ReducedGradient(param, real.to(self.dtypes.accumulated(param.dtype)))

    def independent_gradient_partition_epilogue(self) -> None:
        """End a backward. The host waits for R, not for order's sake: what R has released is free then."""
        for dtype in list(self.ipg_buckets):
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
        if not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.synchronize()
        self._epilogue_ran_this_backward = True

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params_to_reduce: list[Parameter], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """Reduce a gradient that comes alone in its own memory; else as DeepSpeed does.

        The same sums; DeepSpeed also cuts each gradient into a view for every rank, which takes long where
        there are many.
        """
        param = params_to_reduce[0]
        if len(params_to_reduce) > 1 or not self.can_reduce_in_place(param, communication_data_type):
            dtypes = {param.grad.dtype for param in params_to_reduce}
            self.dtype_before_sending = dtypes.pop() if len(dtypes) == 1 else None
            return super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
                params_to_reduce, communication_data_type
            )
        group = process_group(param)
        flat = param.grad.view(-1).div_(dist.get_world_size(group))
        own = flat.narrow(0, dist.get_rank(group) * param.ds_tensor.ds_numel, param.ds_tensor.ds_numel)
        dist.reduce_scatter_fn(own, flat, group=group)
        return [own]

    def can_reduce_in_place(self, param: Parameter, communication_data_type: torch.dtype) -> bool:
        world_size = dist.get_world_size(process_group(param))
        plain = communication_data_type == param.grad.dtype and self.all2all_process_group is None
        predivides = self.postscale_gradients and self.gradient_predivide_factor != 1.0
        averages = self._gradient_averaging_world_size([param], world_size) == world_size
        return plain and not predivides and averages and param.grad.numel() % world_size == 0

    def forget_buckets(self) -> None:
        """Empty the reduce buckets after a backward that raised."""
        for bucket in self.ipg_buckets.values():
            bucket.clear_params()


@contextmanager
def _never_gathered(params: Iterable[Parameter]) -> Iterator[None]:
    """Leave out gathers of ``params``, and with them their release, for a while."""
    with ExitStack() as stack:
        for param in params:
            if not is_gathered(param):
                for name in ("all_gather", "partition"):
                    stack.enter_context(mock.patch.object(param, name, _nothing))
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a gather."""


def drop_grad(param: Parameter) -> None:
    """Release a full gradient, which the current stream may still be reading."""
    if param.grad is not None and not get_accelerator().is_synchronized_device():
        param.grad.record_stream(get_accelerator().current_stream())
    param.grad = None
