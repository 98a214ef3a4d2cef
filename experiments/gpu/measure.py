"""Times on a GPU, by CUDA events: `python -m gpu.measure MEASUREMENT`.

The step beside device copy, torch and the peers; quantization and 4-bit products; paged steps are in paged.py.
Prints what it finds as `ROW` and JSON, row by row.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from shared import subjects
from torch import Tensor
from torch.nn import Parameter

import optim8.functional as F

REPEATS = 15
AT_ONCE = 4  # calls between two looks at the clock: as in a training, the host is ahead of the device where it can be
SETS = 3  # of buffers in turn, so that a small set is not found in the cache
COPY_BYTES = 1 << 30
PEERS = ("bitsandbytes", "flashoptim", "torchao")


def median_ms(calls: Sequence[Callable[[], object]], quick: bool) -> float:
    """The median time of a call, of AT_ONCE in a row; the calls take turns."""
    repeats, at_once = (1, 1) if quick else (REPEATS, AT_ONCE)
    for call in calls:
        call()
        call()
    times = []
    turns = itertools.cycle(calls)
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(at_once):
            next(turns)()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / at_once)
    return float(statistics.median(times))


def give(row: Mapping[str, Any]) -> None:
    """To the report, at once: what comes later may be ended."""
    print("ROW", json.dumps(row), flush=True)


def measure_copy(quick: bool) -> None:
    """Bytes a second that a device-to-device copy reads and writes."""
    size = COPY_BYTES >> 10 if quick else COPY_BYTES
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    milliseconds = median_ms([lambda: target.copy_(source)], quick)
    give({"subject": "copy", "ms": milliseconds, "bytes_per_second": 2 * size / (1e-3 * milliseconds)})


def shapes_of_layers(total: int) -> list[tuple[int, ...]]:
    """300 tensors in the proportions of a 7B model's layers: matrices of attention and MLP, and vectors of norms."""
    unit = int((total / (33 * (4 + 3 * 2.6875))) ** 0.5) // 64 * 64
    wide = int(2.6875 * unit)
    layer = [*[(unit, unit)] * 4, *[(wide, unit)] * 2, (unit, wide), (unit,), (unit,)]
    return (layer * 34)[:300]


def workloads(quick: bool) -> dict[str, list[tuple[int, ...]]]:
    one, many = (1 << 20, 64) if quick else (1 << 28, 4096)
    return {
        f"one tensor of {one >> 20} Mi": [(one,)],
        "300 tensors of a model's layers": shapes_of_layers(one),
        f"{many} tensors of 1024": [(1024,)] * many,
    }


def _parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Parameter]:
    params = [Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-2
    return params


def measure_step(
    make: subjects.Make, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, quick: bool
) -> dict[str, Any]:
    sets = SETS if sum(torch.Size(shape).numel() for shape in shapes) < 1 << 26 else 1
    steps, bytes_moved = [], 0
    for _ in range(sets):
        params = _parameters(shapes, dtype)
        optimizer = make(params)
        optimizer.step()
        bytes_moved = subjects.least_traffic(params, optimizer)
        steps.append(optimizer.step)
    milliseconds = median_ms(steps, quick)
    return {"ms": milliseconds, "bytes": bytes_moved, "bytes_per_second": bytes_moved / (1e-3 * milliseconds)}


def add_peers() -> None:
    """Has OPTIM8_PEERS imported from, after all that is installed."""
    folder = os.environ.get("OPTIM8_PEERS")
    if folder and folder not in sys.path:
        sys.path.append(folder)


def measure_steps(quick: bool, found: Callable[[bool], dict[str, subjects.Make]]) -> None:
    for workload, shapes in workloads(quick).items():
        for dtype in (torch.float32, torch.bfloat16):
            for name, make in found(shapes[0] == (1024,)).items():
                row: dict[str, Any] = {"workload": workload, "dtype": str(dtype)[6:], "subject": name}
                try:
                    row.update(measure_step(make, shapes, dtype, quick))
                except Exception as error:  # a peer that cannot take these tensors
                    row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                give(row)
                gc.collect()
                torch.cuda.empty_cache()


def measure_ours(quick: bool) -> None:
    measure_steps(quick, lambda small: {**subjects.optim8_subjects(small), **subjects.torch_subjects()})


def measure_peer(library: str, quick: bool) -> None:
    """The 8-bit AdamW of a peer; whether it is here shows."""
    add_peers()
    try:
        if library == "flashoptim":
            name, make = "flashoptim FlashAdamW", importlib.import_module("flashoptim").FlashAdamW
        else:
            name, make = f"{library} AdamW8bit", subjects.peer(library)
    except Exception as error:  # it is not here, or does not import
        give({"subject": library, "error": f"{type(error).__name__}: {str(error)[:200]}"})
        return
    measure_steps(quick, lambda small: {name: make})


def _row(name: str, bytes_moved: int, calls: Sequence[Callable[[], object]], quick: bool) -> None:
    milliseconds = median_ms(calls, quick)
    give({"subject": name, "ms": milliseconds, "bytes_per_second": bytes_moved / (1e-3 * milliseconds)})


def measure_functions(quick: bool) -> None:
    side = 256 if quick else 16384
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(side * side, device="cuda", dtype=dtype)
        for blocksize in (256, 4096):
            codes, state = F.quantize_blockwise(x, blocksize=blocksize)
            moved = x.nbytes + codes.nbytes + state.absmax.nbytes
            name = f"blockwise {blocksize} {str(dtype)[6:]}"

            def quantize(x: Tensor = x, n: int = blocksize, out: Tensor = codes, absmax: Tensor = state.absmax) -> None:
                F.quantize_blockwise(x, absmax=absmax, out=out, blocksize=n)

            def dequantize(codes: Tensor = codes, state: Any = state, out: Tensor = x) -> None:
                F.dequantize_blockwise(codes, state, out=out)

            _row(f"quantize {name}", moved, [quantize], quick)
            _row(f"dequantize {name}", moved, [dequantize], quick)
        packed, state4 = F.quantize_4bit(x, quant_type="nf4")
        moved = x.nbytes + packed.nbytes + state4.absmax.nbytes

        def quantize4(x: Tensor = x, out: Tensor = packed, absmax: Tensor = state4.absmax) -> None:
            F.quantize_4bit(x, absmax=absmax, out=out, quant_type="nf4")

        def dequantize4(packed: Tensor = packed, state: Any = state4, out: Tensor = x) -> None:
            F.dequantize_4bit(packed, state, out=out)

        _row(f"quantize_4bit {str(dtype)[6:]}", moved, [quantize4], quick)
        _row(f"dequantize_4bit {str(dtype)[6:]}", moved, [dequantize4], quick)
        weight = torch.randn(side, side, device="cuda", dtype=dtype)
        vector = torch.randn(1, side, device="cuda", dtype=dtype)
        held = [F.quantize_4bit(weight, quant_type="nf4") for _ in range(SETS)]
        products = [functools.partial(F.gemv_4bit, vector, p.t(), state=s) for p, s in held]
        _row(f"gemv_4bit {str(dtype)[6:]}", held[0][0].nbytes + held[0][1].absmax.nbytes, products, quick)
        product = functools.partial(torch.matmul, vector, weight.t())
        _row(f"torch product {str(dtype)[6:]}", weight.nbytes, [product], quick)


MEASURES: dict[str, Callable[[bool], None]] = {
    "copy": measure_copy,
    "steps": measure_ours,
    "functions": measure_functions,
    **{library: functools.partial(measure_peer, library) for library in PEERS},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=list(MEASURES))
    parser.add_argument("--quick", action="store_true", help="in small: shows that it runs, its figures say nothing")
    arguments = parser.parse_args()
    MEASURES[arguments.measurement](arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
