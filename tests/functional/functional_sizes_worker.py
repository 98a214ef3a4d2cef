"""Run the functional API over every small size, and sizes around blocks and vectors, against plain definitions.

Started by test_functional_sizes.py once for each set of instructions, since those are chosen when modules are loaded.
Buffers hold values that no result has, so that memory which nobody writes is noticed. Prints, as JSON, the processor,
the number of results and those that differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
from conftest import processor
from reference import code_slack
from support.functional_reference import (
    TABLES,
    finite_max,
    int8_codes,
    not_nearest,
    quotients,
    spread,
    unpack,
    values_of,
)

from optim8 import functional as F

SMALL = (0, 1, 2, 3)
AROUND = (7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
Checks = Iterator[tuple[str, bool]]


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, 113, dtype=dtype)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return actual.shape == expected.shape and torch.equal(actual, expected.to(actual.dtype))


def vectors() -> Checks:
    for n in (*SMALL, *AROUND, 255, 256, 257, 4095, 4096, 4097):
        x = torch.randn(n)
        y = values_of(x)
        for block in (1, 3, 32, 64, 256, 4096):
            absmax = finite_max(y, block)
            scales = torch.from_numpy(spread(absmax, block, n)).float()
            out, buffer = filled((n,), torch.uint8), filled((-(-n // block),), torch.float32)
            codes, state = F.quantize_blockwise(x, absmax=buffer, out=out, blocksize=block)
            q = quotients(y, absmax, block)
            nearest = not_nearest(codes.numpy(), q, state.code.numpy(), code_slack(np.clip(q, -1, 1))).size == 0
            yield f"quantize_blockwise {n} by {block}", nearest and same(state.absmax, torch.from_numpy(absmax))
            back = F.dequantize_blockwise(codes, state, out=filled((n,), torch.float32))
            yield f"dequantize_blockwise {n} by {block}", same(back, state.code[codes.long()] * scales)
            if block < 32:
                continue
            for kind, table in TABLES.items():
                packed, state = F.quantize_4bit(x, absmax=buffer, blocksize=block, quant_type=kind)
                code = unpack(packed, n)
                nearest = not_nearest(code, q, table, 0.0).size == 0
                yield f"quantize_4bit {kind} {n} by {block}", nearest and same(state.absmax, torch.from_numpy(absmax))
                back = F.dequantize_4bit(packed, state, out=filled((n,), torch.float32))
                yield f"dequantize_4bit {kind} {n} by {block}", same(back, torch.from_numpy(table[code]) * scales)


def integers() -> Checks:
    for rows, inner, columns in [*product(SMALL, repeat=3), *product((1, 2, 33), (1, *AROUND), (1, 2, 17, 64))]:
        where = f"{rows} x {inner} x {columns}"
        a, b = (torch.randint(-128, 128, (n, inner), dtype=torch.int8) for n in (rows, columns))
        right = (a.long() @ b.long().t()).int()
        yield f"int8_linear_matmul {where}", same(F.int8_linear_matmul(a, b), right)
        out = filled((rows, columns), torch.int32)
        yield f"int8_linear_matmul {where}, out", same(F.int8_linear_matmul(a, b, out=out), right)
        across = torch.randint(-128, 128, (inner, rows), dtype=torch.int8).t()
        yield (
            f"int8_linear_matmul {where}, A.t()",
            same(F.int8_linear_matmul(across, b), (across.long() @ b.long().t())),
        )
        sa, sb, bias = torch.rand(rows), torch.rand(columns), torch.randn(columns)
        scaled = right.double() * (sa.double()[:, None] / 127) * (sb.double() / 127) + bias.double()
        for name, actual in (
            ("int8_scaled_mm", F.int8_scaled_mm(a, b, sa, sb, bias, torch.float32)),
            ("int8_mm_dequant", F.int8_mm_dequant(right, sa, sb, filled((rows, columns), torch.float16), bias)),
        ):
            eps = torch.finfo(actual.dtype).eps
            near = actual.shape == scaled.shape and torch.allclose(actual.double(), scaled, rtol=eps, atol=eps)
            yield f"{name} {where}", near


def matrices() -> Checks:
    for rows, columns in [*product(SMALL, repeat=2), *product((1, 2, 5), AROUND)]:
        where = f"{rows} x {columns}"
        x = torch.randn(rows, columns)
        y = values_of(x).reshape(rows, columns)
        largest = [np.abs(y).max(axis=axis, initial=0) for axis in (1, 0)]
        by_row, by_column = (
            torch.from_numpy(int8_codes(y, largest[0][:, None])),
            torch.from_numpy(int8_codes(y, largest[1])),
        )
        codes, stats, _ = F.int8_vectorwise_quant(x)
        yield f"int8_vectorwise_quant {where}", same(codes, by_row) and same(stats, torch.from_numpy(largest[0]))
        buffers = (filled((columns,), torch.float32), filled((rows,), torch.float32))
        outs = (filled((rows, columns), torch.int8), filled((rows, columns), torch.int8))
        a, b, sa, sb, _ = F.int8_double_quant(x, *buffers, *outs)
        right = same(a, by_row) and same(b, by_column) and same(sa, stats) and same(sb, torch.from_numpy(largest[1]))
        yield f"int8_double_quant {where}", right
        back = F.int8_vectorwise_dequant(codes, stats).double()
        exact = codes.double() * stats.double()[:, None] / 127
        yield f"int8_vectorwise_dequant {where}", torch.allclose(back, exact, rtol=2.0**-22, atol=0)


def packed_products() -> Checks:
    for count, rows, columns in [*product(SMALL, repeat=3), *product((1, 3), (1, 4, 5, 17), AROUND)]:
        where = f"{count} x {columns} x {rows}"
        x, bias = torch.randn(count, columns), torch.randn(rows)
        for block, nested in ((32, False), (64, True)):
            packed, state = F.quantize_nf4(torch.randn(rows, columns), blocksize=block, compress_statistics=nested)
            weight = F.dequantize_4bit(packed, state).double()
            bound = (x.double().abs() @ weight.abs().t() + bias.abs()) * (columns + 2) * 2.0**-23
            actual = F.matmul_4bit(x, packed, state, filled((count, rows), torch.float32), bias)
            near = actual.shape == bound.shape and bool(
                ((actual - (x.double() @ weight.t() + bias)).abs() <= bound).all()
            )
            yield f"matmul_4bit {where} by {block}", near
            leaf = x.clone().requires_grad_()
            gradient = torch.randn(count, rows)
            F.matmul_4bit(leaf, packed, state, bias=bias).backward(gradient)
            bound = (gradient.double().abs() @ weight.abs()) * (rows + 2) * 2.0**-23
            near = leaf.grad is not None and bool(((leaf.grad - gradient.double() @ weight).abs() <= bound).all())
            yield f"gradient of matmul_4bit {where} by {block}", near
            if count == 1:
                row = F.gemv_4bit(x, packed, filled((1, rows), torch.float32), state=state)
                bound = (x.double().abs() @ weight.abs().t()) * (columns + 2) * 2.0**-23
                yield f"gemv_4bit {where} by {block}", bool(((row - x.double() @ weight.t()).abs() <= bound).all())


def main() -> None:
    torch.manual_seed(20240229)
    count, wrong = 0, []
    for checks in (vectors, integers, matrices, packed_products):
        for name, right in checks():
            count += 1
            if not right:
                wrong.append(name)
    print(json.dumps({"processor": processor(), "count": count, "wrong": wrong}))


if __name__ == "__main__":
    main()
