"""Run a fixed table of hostile cases and print, as JSON, a SHA-256 of all resulting bytes of each.

Started by test_numerics_bits.py once per instruction set, since OPTIM8_CPU_ISA is read when the module is loaded.
Usage: python bits_worker.py THREADS [THREADS ...], or python bits_worker.py every-pattern for the whole codec.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from typing import Any

import torch
from cases import EVERY, Case
from support.harness import DTYPES, bits, hostile, parameter, set_grad

from optim8 import _native, codec, functional

SIZES = (0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1000, 4095, 40_003)
NAN, INF = float("nan"), float("inf")


@cache
def tensors(p_dtype: str, g_dtype: str, round_: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Parameters and gradients of all sizes, at odd addresses too, with bad elements and subnormals."""
    made = []
    for n in SIZES:
        data = hostile(n, DTYPES[p_dtype], seed=n, small=-6, large=1)
        grad = hostile(n, DTYPES[g_dtype], seed=n + 1 + round_)
        if n > 300:
            grad[7], grad[130], grad[-1] = NAN, INF, -INF
            grad[260:280] = 2.0**-140
            grad[281] = 3e38 if g_dtype == "float32" else 6e4
        made.append((data, grad))
    return tuple(made)


def step_hash(case: Case, row: int, p_dtype: str, g_dtype: str, state_bits: int, **weights: Any) -> str:
    params = []
    for data, _ in tensors(p_dtype, g_dtype, 0):
        copy = torch.empty(data.numel() + 1, dtype=data.dtype)[1:]  # clone() would align it
        params.append(parameter(copy.copy_(data)))
    optimizer = case.make(params, case.hypers[row], optim_bits=state_bits, **weights)
    digest = hashlib.sha256()
    for round_ in range(3):
        for p, (_, grad) in zip(params, tensors(p_dtype, g_dtype, round_), strict=True):
            set_grad(p, grad)
        optimizer.step()
        for p in params:
            # Bits of a NaN are not fixed by IEEE 754 (its sign and payload depend on the order of operands).
            digest.update(bits(torch.nan_to_num(p.detach(), nan=12345.0)))
            for key, value in sorted(optimizer.state[p].items()):
                value = torch.nan_to_num(value, nan=12345.0) if value.is_floating_point() else value
                digest.update(key.encode() + bits(value))
    return digest.hexdigest()


def functional_hash(dtype: str, blocksize: int, signed: bool) -> str:
    code = None if signed else functional.create_dynamic_map(signed=False)
    digest = hashlib.sha256()
    for n in SIZES:
        x = hostile(n + 1, DTYPES[dtype], seed=n)[1:]
        if n > 300:
            x[7], x[130], x[-1], x[260:280] = NAN, INF, -INF, 2.0**-140
        codes, state = functional.quantize_blockwise(x, code=code, blocksize=blocksize)
        back = functional.dequantize_blockwise(codes, state)
        for t in (codes, state.absmax, back):
            digest.update(bits(t))
    return digest.hexdigest()


def number_hash(signed: bool) -> str:
    """The values of all numbers of 16 bits, those that no step stores among them."""
    codes, low = torch.arange(65536).div(256, rounding_mode="floor"), torch.arange(65536) % 256
    absmax = torch.linspace(0.1, 3, 256)
    value = codec.dequantize16(codes.to(torch.uint8), low.to(torch.uint8), absmax, signed=signed)
    return hashlib.sha256(bits(value)).hexdigest()


def sweep_hash(signed: bool, stride: int, threads: int) -> str:
    """Codes of every `stride`-th float32 bit pattern of [0, 1], and for the signed code of the negatives."""
    digest, chunk = hashlib.sha256(), 1 << 24
    for start in range(0, 0x3F800001, chunk * stride):
        end = min(start + chunk * stride, 0x3F800001)
        y = torch.arange(start, end, stride, dtype=torch.int32).view(torch.float32)
        for quotients in (y, -y) if signed else (y,):
            codes = torch.empty(y.numel(), dtype=torch.uint8)
            _native.cpu().encode_quotients(quotients, codes, signed, threads)
            digest.update(bits(codes))
    return digest.hexdigest()


def main() -> None:
    if sys.argv[1] == "every-pattern":
        print(json.dumps([sweep_hash(signed, 1, torch.get_num_threads()) for signed in (True, False)]))
        return
    out: dict[str, dict[str, str]] = {}
    used = _native.cpu().isa_info()["used"]
    for threads in map(int, sys.argv[1:]):
        torch.set_num_threads(threads)
        table = {f"sweep {signed}": sweep_hash(signed, 1021, threads) for signed in (True, False)}
        table |= {f"numbers {signed}": number_hash(signed) for signed in (True, False)}
        for case in EVERY:
            for row in range(3):
                for p_dtype, g_dtype in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")):
                    for state_bits in (8, 16, 32):
                        key = f"{case} row {row} {p_dtype} {state_bits}-bit"
                        table[key] = step_hash(case, row, p_dtype, g_dtype, state_bits)
            for p_dtype in ("bfloat16", "float16"):
                for state_bits, weights in ((8, {"param_rounding": "dithered"}), (8, {"master_bits": 24})):
                    table[f"{case} {p_dtype} {weights}"] = step_hash(case, 0, p_dtype, p_dtype, state_bits, **weights)
                table[f"{case} {p_dtype} 32 bits"] = step_hash(case, 0, p_dtype, p_dtype, 32, master_bits=32)
            if hasattr(torch.Tensor, "grad_dtype"):
                for p_dtype in ("bfloat16", "float16"):
                    table[f"{case} {p_dtype}, float32 gradient"] = step_hash(case, 0, p_dtype, "float32", 8)
        for dtype in DTYPES:
            for blocksize in (64, 4096):
                for signed in (True, False):
                    table[f"functional {dtype} {blocksize} {signed}"] = functional_hash(dtype, blocksize, signed)
        out[str(threads)] = table
    print(json.dumps({"used": used, "by_threads": out}))


if __name__ == "__main__":
    main()
