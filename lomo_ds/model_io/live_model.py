"""The model in an engine, as it is written: under the plain model's names, adapters merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from lomo_ds.model_io.adapters import Adapter, adapted_layers, adapters_of, plain_name
from lomo_ds.model_io.named_tensors import named_params, persistent_buffers, whole_shape
from lomo_ds.model_io.shard_exchange import ShardExchange
from lomo_ds.model_io.tensor_file import TensorRecord, host_pieces


@dataclass(frozen=True, kw_only=True)
class LiveTensor:
    """A tensor of the folder.

    Attributes:
        tensor: parameter, cut or whole, or buffer.
        adapters: what is merged into it.
    """

    tensor: Tensor
    adapters: tuple[Adapter, ...] = ()

    @property
    def record(self) -> TensorRecord:
        """Dtype and shape of the whole tensor."""
        return TensorRecord(dtype=self.tensor.dtype, shape=whole_shape(self.tensor))

    def parts(self) -> Iterator[Tensor]:
        """The tensor, and those of its adapters."""
        yield self.tensor
        for adapter in self.adapters:
            yield from (adapter.down, adapter.up)


def live_tensors(model: Module) -> dict[str, LiveTensor]:
    """What is written, by name: parameters and persistent buffers; a tied one only under its first name.

    Args:
        model: of ``plain_model``.

    Raises:
        ValueError: adapters that cannot be merged.
    """
    layers = adapted_layers(model)
    everything = named_params(model) | persistent_buffers(model)
    plain = ((plain_name(name, layers), tensor) for name, tensor in everything.items())
    named = {name: tensor for name, tensor in plain if name is not None}  # without the adapters themselves
    adapters = {f"{name}.weight": adapters_of(layer) for name, layer in layers.items()}
    for name in adapters:
        if name not in named:
            raise ValueError(f"{name} is tied to another parameter: an adapter cannot be merged into it")
    return {
        name: LiveTensor(tensor=tensor, adapters=adapters.get(name, ())) for name, tensor in named.items()
    }


class LiveModel:
    """An engine's model, of which rank 0 reads the tensors (a ``ModelTensors``) and the others send theirs.

    Args:
        model: of ``plain_model``.
        group: of ``host_group``.

    Raises:
        ValueError: adapters that cannot be merged; the same on all ranks.
    """

    def __init__(self, model: Module, group: dist.ProcessGroup) -> None:
        self._live = live_tensors(model)
        self.exchange = ShardExchange([part for one in self._live.values() for part in one.parts()], group)
        self.tensors = {name: one.record for name, one in self._live.items()}

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor's elements, row-major, in 1-D tensors on the host; for rank 0.

        Raises:
            RuntimeError: another rank could not send its part.

        Cost: host memory for a piece of ``tensor_file.PIECE_BYTES``; for a weight with an adapter two fp32
            copies of it.
        """
        live = self._live[name]
        return host_pieces(self._merged(live)) if live.adapters else self.exchange.pieces(live.tensor)

    def stretch(self, name: str, start: int, stop: int) -> Tensor:
        """See ``ModelTensors``; cost as of ``pieces``."""
        live = self._live[name]
        if live.adapters:
            return self._merged(live).view(-1)[start:stop]
        return self.exchange.stretch(live.tensor, start, stop)

    def _merged(self, live: LiveTensor) -> Tensor:
        """A weight with its adapters, in host memory."""
        weight = self.exchange.whole(live.tensor)
        for adapter in live.adapters:
            down, up = self.exchange.whole(adapter.down), self.exchange.whole(adapter.up)
            weight = replace(adapter, down=down, up=up).merge(weight)
        return weight
