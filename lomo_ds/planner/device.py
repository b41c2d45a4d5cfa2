"""A fake accelerator: DeepSpeed and torch see a device, but nothing is ever stored on it.

For torch it is a backend written in Python. All its tensors are fake, so it needs no kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from lomo_ds.planner import stream_trace

DeviceKind = Literal["gpu", "cpu"]
"""An accelerator with its own memory, or a CPU rank, whose only memory is the host's."""


class _DeviceModule:
    """The module ``torch.gpu``: what torch expects of a backend."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        return

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        return


def register_gpu() -> None:
    """Register the device type ``gpu`` with torch, for the rest of this process.

    Raises:
        RuntimeError: this torch has no backends in Python.
    """
    if hasattr(torch, "gpu"):
        return
    from torch.utils import backend_registration

    register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if register is None:
        raise RuntimeError(
            "planning needs torch 2.10 or later, which supports backends in Python; "
            f"this is {torch.__version__}"
        )
    register("gpu", backend_module=_DeviceModule())
    for name in _whole_on_real_devices():
        _KERNELS.impl(name, _no_kernel)


_KERNELS = torch.library.Library("aten", "IMPL", "PrivateUse1")


def _whole_on_real_devices() -> list[str]:
    """Operations that real devices run whole and that torch would decompose on an unknown device.

    Registering a kernel for them, which fake tensors never run, keeps them whole (SiLU's backward is one).
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    decomposed = [name for name in names if has(name, "CompositeImplicitAutograd") and has(name, "CPU")]
    return [name.removeprefix("aten::") for name in decomposed]


def _no_kernel(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("the fake device has no data: nothing can run on it")


class FakeAccelerator(CPU_Accelerator):
    """An accelerator with streams, so that DeepSpeed runs the same code as on a GPU.

    Args:
        num_local: accelerators of a node.
        memory_bytes: of each.

    Attributes:
        streams: the device's streams and who observes them.
    """

    def __init__(self, num_local: int, memory_bytes: int) -> None:
        super().__init__()
        self._name = "gpu"
        self._num_local = num_local
        self._memory_bytes = memory_bytes
        self.streams = stream_trace.Streams()

    @property
    def Stream(self) -> Callable[..., stream_trace.Stream]:
        return self.streams.new_stream

    @property
    def Event(self) -> Callable[..., stream_trace.Event]:
        return self.streams.new_event

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return "gpu" if device_index is None else f"gpu:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device("gpu", device_index or 0)

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return "gpu:0"

    def device_count(self) -> int:
        return self._num_local

    def stream(self, stream: stream_trace.Stream | None) -> stream_trace.CurrentStream:
        return stream_trace.CurrentStream(self.streams, stream)

    def set_stream(self, stream: stream_trace.Stream) -> None:
        self.streams.current = stream

    def current_stream(self, device_index: int | None = None) -> stream_trace.Stream:
        return self.streams.current

    def default_stream(self, device_index: int | None = None) -> stream_trace.Stream:
        return self.streams.default

    def synchronize(self, device_index: int | None = None) -> None:
        self.streams.synchronize()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "gpu"

    def pin_memory(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.empty_like(tensor, pin_memory=True)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return False

    def is_bf16_supported(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        return True

    def total_memory(self, device_index: int | None = None) -> int:
        return self._memory_bytes

    def available_memory(self, device_index: int | None = None) -> int:
        return self._memory_bytes

    def memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    def communication_backend_name(self) -> str:
        return "fake"

    def create_op_builder(self, class_name: str) -> None:
        return None

    def get_op_builder(self, class_name: str) -> None:
        return None


class FakeCpuRank(CPU_Accelerator):
    """A CPU rank whose peers are fake."""

    def __init__(self, num_local: int) -> None:
        super().__init__()
        self._num_local = num_local

    def device_count(self) -> int:
        return self._num_local

    def communication_backend_name(self) -> str:
        return "fake"

    def create_op_builder(self, class_name: str) -> None:
        return None
