"""Times optim8.functional against bitsandbytes and torch, in turn, in one process, on 1 thread and on all.

Every call allocates its result, as callers do. Ratios are of medians of the same rounds; `needed` is what the project
holds itself to. Where a function does little but read and write, the bytes per second that it must at least move are
compared with those of a copy that allocates its result too, in the same rounds.
"""

import argparse
import contextlib
import importlib.metadata
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from shared.common import add_json, json_path, provenance, table, time_interleaved, write_json

from optim8 import _native
from optim8 import functional as F

Call = Callable[[], object]
COPIED = 64 << 20  # bytes of the copy


@dataclass(frozen=True)
class Row:
    """One comparison: the same work by optim8 and by another."""

    name: str
    ours: Call
    peer: str
    theirs: Call
    needed: float | None = None  # ratio of their time to ours
    moves: int | None = None  # bytes read and written; None: it does more than that


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    every = torch.get_num_threads()
    parser.add_argument("--quick", action="store_true", help="small tensors: shows that it runs, says nothing of speed")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; fewer for a subject that is very slow")
    parser.add_argument("--threads", default=",".join(map(str, sorted({1, every}))), help="numbers of threads")
    add_json(parser, "bench_functional")
    return parser.parse_args()


def import_peer() -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            import bitsandbytes.functional as peer
        except ImportError as error:
            sys.exit(f"bench_functional: needs bitsandbytes to compare with ({error}). `pip install .[peers]` first.")
    return peer


def import_matmul() -> Any:
    import bitsandbytes

    return getattr(bitsandbytes, "matmul_4bit")  # noqa: B009  it does not say that it exports it


def rows(quick: bool) -> Iterator[Row]:
    """The comparisons, each with inputs of its own, which are freed when the next one is made."""
    B, side = import_peer(), 256 if quick else 4096
    name = "bitsandbytes"
    x = torch.randn(side * side)
    for dtype, needed in ((torch.float32, True), (torch.bfloat16, False)):
        v = x.to(dtype)
        kind = str(dtype).removeprefix("torch.")
        yield Row(
            f"quantize_blockwise {kind}",
            partial(F.quantize_blockwise, v),
            name,
            partial(B.quantize_blockwise, v),
            20.0 if needed else None,
            bytes_of(v) + v.numel(),
        )
        codes, state = F.quantize_blockwise(v)
        theirs = B.quantize_blockwise(v)
        yield Row(
            f"dequantize_blockwise {kind}",
            partial(F.dequantize_blockwise, codes, state),
            name,
            partial(B.dequantize_blockwise, *theirs),
            2.0 if needed else None,
            v.numel() + bytes_of(x),
        )
        for quant_type in ("nf4", "fp4"):
            yield Row(
                f"quantize_4bit {quant_type} {kind}",
                partial(F.quantize_4bit, v, quant_type=quant_type),
                name,
                partial(B.quantize_4bit, v, quant_type=quant_type),
                30.0 if needed else None,
                bytes_of(v) + v.numel() // 2,
            )
            packed, state4 = F.quantize_4bit(v, quant_type=quant_type)
            theirs4 = B.quantize_4bit(v, quant_type=quant_type)
            yield Row(
                f"dequantize_4bit {quant_type} {kind}",
                partial(F.dequantize_4bit, packed, state4),
                name,
                partial(B.dequantize_4bit, *theirs4),
                1.0 if needed else None,
                bytes_of(v) + v.numel() // 2,
            )
    matrix = x.view(side, side)
    for dtype, threshold in ((torch.float16, 0.0), (torch.float16, 6.0), (torch.float32, 0.0)):
        cast = matrix.to(dtype)
        yield Row(
            f"int8_vectorwise_quant {str(dtype).removeprefix('torch.')}, threshold {threshold}",
            partial(F.int8_vectorwise_quant, cast, threshold),
            name,
            partial(B.int8_vectorwise_quant, cast, threshold),
            3.0 if threshold == 0 else None,
            bytes_of(cast) + cast.numel(),
        )
    yield from int8_rows(B, name, matrix)
    for quant_type in ("nf4", "fp4"):
        packed, state = F.quantize_4bit(matrix, quant_type=quant_type)
        weight, row = F.dequantize_4bit(packed, state), torch.randn(1, side)
        yield Row(
            f"gemv_4bit {quant_type} {side}x{side}",
            partial(F.gemv_4bit, row, packed, state=state),
            "torch, float32 weight",
            partial(torch.matmul, row, weight.t()),
            5.0,
            bytes_of(packed, state.absmax),
        )
    peer_packed, peer_state = B.quantize_4bit(matrix, quant_type="nf4", blocksize=64)
    packed, state = F.quantize_4bit(matrix, quant_type="nf4")
    for count, dtype in ((1, torch.float32), (16, torch.float32), (16, torch.bfloat16), (512, torch.bfloat16)):
        left = torch.randn(count, side, dtype=dtype)
        yield Row(
            f"matmul_4bit nf4 {str(dtype).removeprefix('torch.')}, {count} rows {side}x{side}",
            partial(F.matmul_4bit, left, packed, state),
            name,
            partial(import_matmul(), left, peer_packed, peer_state),
            1.0,
        )
    m, k, n = (32, 128, 128) if quick else (512, 2048, 2048)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    yield Row(
        f"int8_linear_matmul {m}x{k}x{n}",
        lambda: F.int8_linear_matmul(a, b),
        name,
        lambda: B.int8_linear_matmul(a, b),
        1.0,
    )
    sa, sb = torch.rand(m), torch.rand(n)
    yield Row(
        f"int8_scaled_mm {m}x{k}x{n}",
        lambda: F.int8_scaled_mm(a, b, sa, sb),
        name + ", two calls",
        lambda: B.int8_mm_dequant(B.int8_linear_matmul(a, b), sa, sb),
        None,
    )


def int8_rows(B: Any, name: str, matrix: torch.Tensor) -> Iterator[Row]:
    """LLM.int8()'s ways out of int8. Of int8_double_quant bitsandbytes has no CPU kernel."""
    half = matrix.half()
    codes, stats, _ = F.int8_vectorwise_quant(half)
    yield Row(
        "int8_vectorwise_dequant",
        partial(F.int8_vectorwise_dequant, codes, stats),
        name,
        partial(B.int8_vectorwise_dequant, codes, stats),
        moves=codes.numel() + bytes_of(matrix),
    )
    sums, columns = codes.int() * 1000, torch.rand(matrix.shape[1])
    yield Row(
        "int8_mm_dequant",
        partial(F.int8_mm_dequant, sums, stats, columns),
        name,
        partial(B.int8_mm_dequant, sums, stats, columns),
        moves=bytes_of(sums, half),
    )


def measure(row: Row, threads: int, repeats: int) -> dict[str, Any]:
    calls = {"optim8": row.ours, row.peer: row.theirs}
    if row.moves is not None:
        source = torch.zeros(COPIED, dtype=torch.uint8)
        calls["copy"] = source.clone
    timings = time_interleaved(calls, repeats)
    of_copy = None
    if row.moves is not None:
        of_copy = row.moves / timings["optim8"]["median_ms"] / (2 * COPIED / timings["copy"]["median_ms"])
    return {
        "name": row.name,
        "threads": threads,
        "peer": row.peer,
        "optim8_timing": timings["optim8"],
        "peer_timing": timings[row.peer],
        "speed_ratio": timings[row.peer]["median_ms"] / timings["optim8"]["median_ms"],
        "needed": row.needed,
        "bytes": row.moves,
        "of_copy": of_copy,
    }


def main() -> None:
    arguments = parse_arguments()
    result: dict[str, Any] = {
        **provenance(vars(arguments)),
        "isa": _native.cpu().isa_info()["used"],
        "peers": {"bitsandbytes": importlib.metadata.version("bitsandbytes")},
        "timings": [],
    }
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        for row in rows(arguments.quick):
            result["timings"].append(measure(row, threads, arguments.repeats))
    print(
        table(
            ["function", "threads", "optim8 ms", "peer ms", "peer", "times as fast", "needed", "of a copy's bandwidth"],
            [
                [
                    row["name"],
                    row["threads"],
                    f"{row['optim8_timing']['median_ms']:.2f}",
                    f"{row['peer_timing']['median_ms']:.2f}",
                    row["peer"],
                    f"{row['speed_ratio']:.2f}",
                    "" if row["needed"] is None else f"{row['needed']:g}",
                    "" if row["of_copy"] is None else f"{row['of_copy']:.0%}",
                ]
                for row in result["timings"]
            ],
        )
    )
    path = json_path(arguments, "bench_functional")
    write_json(path, result)
    print(f"\noptim8 used {result['isa']}. Written: {path}")


if __name__ == "__main__":
    main()
