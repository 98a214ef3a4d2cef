"""Times on a GPU, by CUDA events: the step beside device copy, torch and the peers; quantization and 4-bit products."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import subjects
import torch
from common import table
from torch import Tensor
from torch.nn import Parameter

import optim8.functional as F

REPEATS = 20
SETS = 3  # of buffers in turn, so that a small set is not found in the cache
COPY_BYTES = 1 << 30


def median_ms(calls: Sequence[Callable[[], object]], repeats: int = REPEATS) -> float:
    """The median time of a call; the calls take turns."""
    for call in calls:
        call()
        call()
    times = []
    for turn in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        calls[turn % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times))


def copy_bandwidth() -> float:
    """Bytes a second that a device-to-device copy reads and writes."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * COPY_BYTES / (1e-3 * median_ms([lambda: target.copy_(source)]))


def shapes_of_layers(total: int) -> list[tuple[int, ...]]:
    """300 tensors in the proportions of a 7B model's layers: matrices of attention and MLP, and vectors of norms."""
    unit = int((total / (33 * (4 + 3 * 2.6875))) ** 0.5) // 64 * 64
    wide = int(2.6875 * unit)
    layer = [*[(unit, unit)] * 4, *[(wide, unit)] * 2, (unit, wide), (unit,), (unit,)]
    return (layer * 34)[:300]


def workloads() -> dict[str, list[tuple[int, ...]]]:
    return {
        "one tensor of 256 Mi": [(1 << 28,)],
        "300 tensors of a model's layers": shapes_of_layers(1 << 28),
        "4096 tensors of 1024": [(1024,)] * 4096,
    }


def _parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Parameter]:
    params = [Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-2
    return params


def measure_step(make: subjects.Make, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Any]:
    sets = SETS if sum(torch.Size(shape).numel() for shape in shapes) < 1 << 26 else 1
    steps, bytes_moved = [], 0
    for _ in range(sets):
        params = _parameters(shapes, dtype)
        optimizer = make(params)
        optimizer.step()
        bytes_moved = subjects.least_traffic(params, optimizer)
        steps.append(optimizer.step)
    milliseconds = median_ms(steps)
    return {"ms": milliseconds, "bytes": bytes_moved, "bytes_per_second": bytes_moved / (1e-3 * milliseconds)}


def all_subjects(small: bool) -> dict[str, subjects.Make]:
    folder = os.environ.get("OPTIM8_PEERS")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    found = {**subjects.optim8_subjects(small), **subjects.torch_subjects()}
    try:
        found.update(subjects.peer_subjects())
    except Exception as error:  # a peer that is there and does not import
        print(f"peers: {error}")
    try:
        found["flashoptim FlashAdamW"] = importlib.import_module("flashoptim").FlashAdamW
    except Exception as error:
        print(f"flashoptim: {error}")
    return found


def measure_steps(bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    for workload, shapes in workloads().items():
        for dtype in (torch.float32, torch.bfloat16):
            for name, make in all_subjects(small=shapes[0] == (1024,)).items():
                row: dict[str, Any] = {"workload": workload, "dtype": str(dtype), "subject": name}
                try:
                    row.update(measure_step(make, shapes, dtype))
                    row["of_copy"] = row["bytes_per_second"] / bandwidth
                except Exception as error:  # a peer that cannot take these tensors
                    row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                rows.append(row)
                print(row, flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    return rows


def _row(name: str, bytes_moved: int, calls: Sequence[Callable[[], object]], bandwidth: float) -> dict[str, Any]:
    milliseconds = median_ms(calls)
    rate = bytes_moved / (1e-3 * milliseconds)
    return {"subject": name, "ms": milliseconds, "bytes_per_second": rate, "of_copy": rate / bandwidth}


def measure_functions(bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1 << 28, device="cuda", dtype=dtype)
        for blocksize in (256, 4096):
            codes, state = F.quantize_blockwise(x, blocksize=blocksize)
            moved = x.nbytes + codes.nbytes + state.absmax.nbytes
            name = f"blockwise {blocksize} {dtype}"

            def quantize(x: Tensor = x, n: int = blocksize, out: Tensor = codes, absmax: Tensor = state.absmax) -> None:
                F.quantize_blockwise(x, absmax=absmax, out=out, blocksize=n)

            def dequantize(codes: Tensor = codes, state: Any = state, out: Tensor = x) -> None:
                F.dequantize_blockwise(codes, state, out=out)

            rows.append(_row(f"quantize {name}", moved, [quantize], bandwidth))
            rows.append(_row(f"dequantize {name}", moved, [dequantize], bandwidth))
        packed, state4 = F.quantize_4bit(x, quant_type="nf4")
        moved = x.nbytes + packed.nbytes + state4.absmax.nbytes

        def quantize4(x: Tensor = x, out: Tensor = packed, absmax: Tensor = state4.absmax) -> None:
            F.quantize_4bit(x, absmax=absmax, out=out, quant_type="nf4")

        def dequantize4(packed: Tensor = packed, state: Any = state4, out: Tensor = x) -> None:
            F.dequantize_4bit(packed, state, out=out)

        rows.append(_row(f"quantize_4bit {dtype}", moved, [quantize4], bandwidth))
        rows.append(_row(f"dequantize_4bit {dtype}", moved, [dequantize4], bandwidth))
        weight = torch.randn(16384, 16384, device="cuda", dtype=dtype)
        vector = torch.randn(1, 16384, device="cuda", dtype=dtype)
        held = [F.quantize_4bit(weight, quant_type="nf4") for _ in range(SETS)]
        products = [functools.partial(F.gemv_4bit, vector, p.t(), state=s) for p, s in held]
        rows.append(_row(f"gemv_4bit {dtype}", held[0][0].nbytes + held[0][1].absmax.nbytes, products, bandwidth))
        product = functools.partial(torch.matmul, vector, weight.t())
        rows.append(_row(f"torch product {dtype}", weight.nbytes, [product], bandwidth))
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times longer every other subject takes than optim8's AdamW8bit on the same tensors."""
    found = []
    for row in rows:
        own = next(
            (
                r
                for r in rows
                if r["subject"] == "optim8 AdamW8bit" and (r["workload"], r["dtype"]) == (row["workload"], row["dtype"])
            ),
            {},
        )
        if "ms" in row and "ms" in own:
            found.append({**{k: row[k] for k in ("workload", "dtype", "subject")}, "times": row["ms"] / own["ms"]})
    return found


def measure_everything() -> dict[str, Any]:
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    steps, functions = measure_steps(bandwidth), measure_functions(bandwidth)
    compared = ratios(steps)
    times = {(r["workload"], r["dtype"], r["subject"]): r["times"] for r in compared}
    cells = []
    for row in steps:
        of_copy = f"{row['of_copy']:.0%}" if "of_copy" in row else "-"
        ratio = times.get((row["workload"], row["dtype"], row["subject"]))
        cells.append(
            [row["workload"], row["dtype"][6:], row["subject"], f"{row.get('ms', float('nan')):.3f}", of_copy,
             "-" if ratio is None else f"{ratio:.2f}"]
        )  # fmt: skip
    print(table(["workload", "dtype", "subject", "ms", "of copy", "times optim8 AdamW8bit"], cells))
    names = [[r["subject"], f"{r['ms']:.3f}", f"{r['of_copy']:.0%}"] for r in functions]
    print(table(["function", "ms", "of copy"], names))
    return {"copy_bytes_per_second": bandwidth, "steps": steps, "functions": functions, "ratios": compared}
