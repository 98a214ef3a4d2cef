"""Times on a GPU, by CUDA events: `python -m gpu.measure MEASUREMENT`.

The step beside device copy, its own accesses alone, torch and the peers; what launches cost; quantization and 4-bit
products; paged steps are in paged.py. Prints what it finds as `ROW` and JSON, row by row.
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
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from shared import subjects
from torch import Tensor
from torch.nn import Parameter

import optim8.functional as F
from gpu.ceiling import Ceiling

REPEATS = 15
AT_ONCE = 4  # calls between two looks at the clock: as in a training, the host is ahead of the device where it can be
SETS = 3  # of buffers in turn, so that a small set is not found in the cache
COPY_BYTES = 1 << 30
PEERS = ("bitsandbytes", "flashoptim", "torchao")
FIRST = ("optim8 AdamW8bit", "optim8 Lion8bit")  # what is measured before the other rules
MAIN_KERNELS = {
    f"{name} {str(dtype)[6:]}": (name, dtype)
    for name in ("AdamW8bit", "Lion8bit")
    for dtype in (torch.float32, torch.bfloat16)
}


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


def _ours(small: bool, first: bool) -> dict[str, subjects.Make]:
    made = subjects.optim8_subjects(small)
    return {name: make for name, make in made.items() if (" ".join(name.split()[:2]) in FIRST) == first}


def measure_ours(quick: bool) -> None:
    measure_steps(quick, lambda small: {**_ours(small, True), **subjects.torch_subjects()})


def measure_rules(quick: bool) -> None:
    measure_steps(quick, lambda small: _ours(small, False))


def measure_ceiling(quick: bool) -> None:
    """The step's loads and stores, of one tensor, for one state and two."""
    size = 1 << 20 if quick else 1 << 28
    for dtype in (torch.float32, torch.bfloat16):
        for states in (1, 2):
            row: dict[str, Any] = {"subject": f"ceiling of {states} states, {str(dtype)[6:]}"}
            try:
                ceiling = Ceiling(size, dtype, states)
                milliseconds = median_ms([ceiling], quick)
                row |= {"ms": milliseconds, "bytes_per_second": ceiling.nbytes / (1e-3 * milliseconds)}
            except (OSError, RuntimeError) as error:  # no nvcc, or a GPU that takes nothing of it
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            give(row)


def measure_launches(quick: bool) -> None:
    """A step of so many tensors of a block each: on the device, and until the call is back at the host."""
    for count in (1, 64) if quick else (1, 64, 300, 1024, 4096):
        params = _parameters([(256,)] * count, torch.float32)
        optimizer = subjects.optim8_subjects(small=True)["optim8 AdamW8bit min_8bit_size=0"](params)
        optimizer.step()
        milliseconds = median_ms([optimizer.step], quick)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(AT_ONCE):
            optimizer.step()
        host = 1e3 * (time.perf_counter() - begin) / AT_ONCE
        torch.cuda.synchronize()
        give({"subject": f"step of {count} tensors of a block", "ms": milliseconds, "host_ms": host})


def step_once(kernel: str, quick: bool) -> None:
    """Two steps over one tensor, for a profiler."""
    import optim8

    name, dtype = MAIN_KERNELS[kernel]
    optimizer = getattr(optim8, name)(_parameters([(1 << 20 if quick else 1 << 28,)], dtype))
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()


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
    "ceiling": measure_ceiling,
    "steps": measure_ours,
    "launches": measure_launches,
    "rules": measure_rules,
    "functions": measure_functions,
    **{library: functools.partial(measure_peer, library) for library in PEERS},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=[*MEASURES, "one"])
    parser.add_argument("--kernel", choices=list(MAIN_KERNELS), default=next(iter(MAIN_KERNELS)), help="of `one`")
    parser.add_argument("--quick", action="store_true", help="in small: shows that it runs, its figures say nothing")
    arguments = parser.parse_args()
    if arguments.measurement == "one":
        step_once(arguments.kernel, arguments.quick)
    else:
        MEASURES[arguments.measurement](arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
