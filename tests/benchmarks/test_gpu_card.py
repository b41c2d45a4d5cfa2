"""Which GPU there is, and what `make gpu-check` says where there is none, or torch cannot use it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.gpu import card, run
from benchmarks.gpu.card import Card

GIB = 1 << 30


@pytest.mark.ranks
def test_without_a_gpu_one_line_says_so_before_anything_heavy_is_imported() -> None:
    code = "import sys; sys.argv[1:] = []\nfrom benchmarks.gpu import run\n"
    code += "try:\n    run.main()\nexcept SystemExit as end:\n"
    code += "    print(end.code, *{'torch', 'deepspeed', 'rich', 'matplotlib'} & set(sys.modules))"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "2\n"
    assert done.stderr == card.NO_GPU + "\n" and done.stderr.count("\n") == 1


class Driver:
    """Answers as NVIDIA's driver."""

    def __init__(self, number: int) -> None:
        self._number = number

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._number
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> None:
        device._obj.value = 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:
        name.value = b"NVIDIA Test"

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> None:
        total._obj.value = 24 * GIB

    def cuDriverGetVersion(self, version: Any) -> None:
        version._obj.value = 13010

    def cuDeviceGetAttribute(self, part: Any, attribute: int, device: Any) -> None:
        part._obj.value = {75: 8, 76: 9}[attribute]


def test_the_driver_tells_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(1))
    assert card.find_card() == Card(name="NVIDIA Test", total_bytes=24 * GIB, capability="8.9", driver="13.1")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(0))
    assert card.find_card() is None


@pytest.mark.parametrize(("cuda", "told"), [(None, "built without CUDA"), ("13.0", "built for CUDA 13.0")])
def test_a_torch_that_cannot_use_the_gpu_is_told_apart(
    cuda: str | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(SystemExit) as end:
        run.require_cuda()
    assert end.value.code == 2
    assert told in capsys.readouterr().err
