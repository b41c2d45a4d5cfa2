"""Kernels compiled for GPUs that are not here: for each target what it takes, by NVIDIA's own tools in
Triton.

A program, in a process of its own, because Triton must not interpret. The functions of the rules are called
as on a GPU, on tensors of a CPU; each kernel that they ask for is compiled, not run. Prints a JSON object,
kernel and types of arguments -> what is wrong, "" for nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lomo_ds.rules.kernels import dispatch, operations
from tests.rules.kernels import cases

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
FORBIDDEN = (".ftz", ".approx", "div.full")
"""In PTX: arithmetic that is not the CPU's."""

found: dict[str, str] = {}


def signature_of(kernel: Any, flat: list[Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types, constants and divisibility, as Triton finds them when a kernel is called."""
    types, constants, attributes = {}, {}, {}
    for number, (param, value) in enumerate(zip(kernel.params, flat, strict=True)):
        if value is None or param.is_constexpr:
            types[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[param.name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[number,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[param.name] = "fp32"
        else:
            types[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[number,] = [["tt.divisibility", 16]]
    return types, constants, attributes


def problem_of(kernel: Any, types: Any, constants: Any, attributes: Any, capability: int) -> str:
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": False}
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
    problems = [word for word in FORBIDDEN if word in code["ptx"]]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(word.split(":") for word in usage.split() if word.startswith(("STACK:", "LOCAL:")))
    assert set(used) == {"STACK", "LOCAL"}, usage
    problems += [f"{size} bytes of spills ({name})" for name, size in used.items() if size != "0"]
    return ", ".join(problems)


def compiling(kernel: Any) -> Callable[..., None]:
    """In place of ``operations._launcher``."""

    def compile_for_all(*args: Any) -> None:
        *flat, _ = chain.from_iterable(arg if isinstance(arg, list) else [arg] for arg in args)
        parts = signature_of(kernel, flat)
        types = ", ".join(f"{name} {parts[1].get(name, kind)}" for name, kind in parts[0].items())
        name = f"{kernel.fn.__name__}({types})"
        if name not in found:
            problems = {number: problem_of(kernel, *parts, number) for number in targets()}
            found[name] = "; ".join(f"sm_{number}: {one}" for number, one in problems.items() if one)

    return compile_for_all


def targets() -> list[int]:
    return [int(number) for number in sys.argv[2].split(",")]


def calls(all_cells: bool) -> Iterator[cases.Call]:
    """Every function; the step along the gradient, whose epilogue all steps have, in all ways of rounding."""
    wide = ((64, 512), 1, 0)
    for dtype, rounding in cases.CELLS if all_cells else [cell for cell in cases.CELLS if cell[0] != "fp16"]:
        shard = cases.shard_of(((4096,), 1, 0), dtype, rounding, is_written=True)
        steps = cases.steps_by_elements(shard)
        is_plain = (dtype, rounding) == ("bf16", "stochastic")
        yield from steps.values() if all_cells or is_plain else [steps["gradient"]]
        tiles = cases.steps_by_tiles(cases.shard_of(wide, dtype, rounding, is_written=True))
        heaviest = rounding == "compensated8" and dtype == "bf16"
        yield from tiles.values() if all_cells or heaviest else []
    for dtype in ("fp32", "bf16", "fp16") if all_cells else ("bf16",):
        yield from cases.sums(cases.shard_of(wide, dtype)).values()


def main() -> None:
    operations._launcher = compiling  # type: ignore[assignment]
    operations.implement("CPU")
    dispatch.has_kernels = lambda device_type: True  # type: ignore[assignment]
    for function, shard, args in calls(sys.argv[1] == "all"):
        function(shard.param if function.__name__ == "sum_of_squares" else shard, *args)
    for function, args in cases.on_tensors(hard=False).values():
        function(*args)
    for dtype in cases.DTYPES:
        for move in cases.moves(dtype, hard=False).values():
            move()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
