"""Run the functional API over a fixed table of hostile inputs and print, as JSON, a SHA-256 of each result's bytes.

Started by test_functional_bits.py once per instruction set, since OPTIM8_CPU_ISA is read when the module is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable

import torch
from support.functional_reference import awkward
from support.harness import DTYPES, bits

from optim8 import functional as F
from optim8.functional import int8

SIZES = (0, 1, 15, 16, 63, 64, 65, 127, 128, 4095, 4096, 4097, 70_001)


def four_bit(dtype: torch.dtype, blocksize: int, quant_type: str) -> Iterable[torch.Tensor]:
    for n in SIZES:
        x = awkward((n,), dtype, seed=n, bad=True)
        packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        yield from (packed, state.absmax, F.dequantize_4bit(packed, state))


def product(dtype: torch.dtype, blocksize: int, columns: int) -> Iterable[torch.Tensor]:
    generator = torch.Generator().manual_seed(columns)
    for rows in (1, 3, 4, 5, 37):
        weight = torch.randn(rows, columns, generator=generator)
        packed, state = F.quantize_nf4(weight, blocksize=blocksize)
        yield F.gemv_4bit(torch.randn(columns, generator=generator).to(dtype), packed, state=state)


def integers(dtype: torch.dtype, threshold: float) -> Iterable[torch.Tensor]:
    for shape in ((3, 5), (4, 64), (5, 257)):
        x = awkward(shape, dtype, seed=shape[1], bad=True)
        codes, columns, row_stats, col_stats, outliers = F.int8_double_quant(x, threshold=threshold)
        yield from (codes, columns, row_stats, col_stats)
        if outliers is not None:
            yield outliers
        yield F.int8_vectorwise_dequant(codes, row_stats)
        sums = torch.empty(shape[0], shape[0], dtype=torch.int32)
        int8._native.cpu().int8_linear_matmul(codes, codes, sums, 1)
        yield from (sums, F.int8_mm_dequant(sums, row_stats, row_stats, bias=row_stats.nan_to_num()))
        yield F.int8_scaled_mm(codes, codes, row_stats, row_stats, dtype=dtype)


def main() -> None:
    cases: dict[str, Callable[[], Iterable[torch.Tensor]]] = {}
    for name, dtype in DTYPES.items():
        for blocksize in (32, 64, 128, 4096):
            for quant_type in ("nf4", "fp4"):
                key = f"{quant_type} {name} {blocksize}"
                cases[key] = lambda a=dtype, b=blocksize, c=quant_type: four_bit(a, b, c)
            for columns in (7, 64, 128, 384, 1000):
                cases[f"gemv {name} {blocksize} {columns}"] = lambda a=dtype, b=blocksize, c=columns: product(a, b, c)
        for threshold in (0.0, 2.0):
            cases[f"int8 {name} {threshold}"] = lambda a=dtype, b=threshold: integers(a, b)
    out: dict[str, str] = {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for name, case in cases.items():
            digest = hashlib.sha256()
            for result in case():
                # Bits of a NaN are not fixed by IEEE 754.
                digest.update(bits(result.nan_to_num(nan=12345.0) if result.is_floating_point() else result))
            out[f"{name}, {threads} threads"] = digest.hexdigest()
    print(json.dumps(out))


if __name__ == "__main__":
    main()
