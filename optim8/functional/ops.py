"""The operators torch.ops.optim8: the functions of this package for torch.compile and torch.export.

Each has a schema, a kernel (the function itself) and a fake kernel, which gives shapes and dtypes without values.
Eager code calls the functions directly: a call through an operator costs several times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from optim8.functional import _check, blockwise, fourbit, int8, int8_matmul
from optim8.functional.packed import check_packed, packed_shape

library = torch.library.Library("optim8", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema[: schema.index("(")]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]

    @wraps(kernel)
    def run(*args: Any, **named: Any) -> Any:
        was, _check.kernel.running = _check.kernel.running, True
        try:
            return kernel(*args, **named)
        finally:
            _check.kernel.running = was

    for key in ("CPU", "CUDA"):
        library.impl(name, run, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"optim8::{name}", fake, lib=library)


def _quantize_blockwise(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, state = blockwise.quantize_blockwise(A, code, blocksize=blocksize)
    return codes, state.absmax


def _fake_quantize_blockwise(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = A.new_empty(_check.blocks(A.numel(), blocksize), dtype=torch.float32)
    return A.new_empty(A.shape, dtype=torch.uint8), absmax


def _dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    out = _new("dequantize_blockwise", A, A.shape, dtype)
    return blockwise.dequantize_blockwise(A, None, absmax, code, out, blocksize)


def _dequantize_blockwise_out(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype, out: torch.Tensor
) -> None:
    _check.buffer("dequantize_blockwise", "out", out, dtype, A.shape, A.device)
    blockwise.dequantize_blockwise(A, None, absmax, code, out, blocksize)


def _fake_dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    return A.new_empty(A.shape, dtype=dtype)


def _quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    packed, state = fourbit.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type, quant_storage=quant_storage)
    return packed, state.absmax


def _fake_quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    packed = A.new_empty(packed_shape(A.numel(), quant_storage), dtype=quant_storage)
    return packed, A.new_empty(_check.blocks(A.numel(), blocksize), dtype=torch.float32)


def _dequantize_4bit(
    A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    check_packed("dequantize_4bit", "A", A, _check.product(shape))
    out = _new("dequantize_4bit", A, shape, dtype)
    return fourbit.dequantize_4bit(A, None, absmax, out, blocksize, quant_type)


def _dequantize_4bit_out(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    _check.buffer("dequantize_4bit", "out", out, dtype, shape, A.device)
    fourbit.dequantize_4bit(A, None, absmax, out, blocksize, quant_type)


def _fake_dequantize_4bit(
    A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    return A.new_empty(shape, dtype=dtype)


def _gemv_4bit(
    A: torch.Tensor, B: torch.Tensor, shapeB: list[int], absmax: torch.Tensor, code: torch.Tensor, blocksize: int
) -> torch.Tensor:
    return fourbit.packed_product("gemv_4bit", A, B, shapeB, absmax, code, blocksize, None)


def _gemv_4bit_out(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: list[int],
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
) -> None:
    fourbit.packed_product("gemv_4bit", A, B, shapeB, absmax, code, blocksize, out)


def _fake_gemv_4bit(
    A: torch.Tensor, B: torch.Tensor, shapeB: list[int], absmax: torch.Tensor, code: torch.Tensor, blocksize: int
) -> torch.Tensor:
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _int8_linear_matmul_out(A: torch.Tensor, B: torch.Tensor, out: torch.Tensor) -> None:
    int8_matmul.int8_linear_matmul(A, B, out)


def _fake_int8_linear_matmul(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32)


def _fake_outliers(A: torch.Tensor, threshold: float) -> torch.Tensor | None:
    if threshold == 0:
        return None
    return A.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)


def _fake_int8_vectorwise_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    stats = A.new_empty(_check.product(A.shape[:-1]), dtype=torch.float32)
    return A.new_empty(A.shape, dtype=torch.int8), stats, _fake_outliers(A, threshold)


def _fake_int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    return A.new_empty(A.shape, dtype=torch.float32)


def _int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return int8_matmul.scale_back("int8_mm_dequant", A, row_stats, col_stats, None, bias, dtype or torch.float16)


def _fake_int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return A.new_empty(A.shape, dtype=dtype or torch.float16)


def _int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return int8_matmul.int8_scaled_mm(A, B, row_stats, col_stats, bias, dtype or torch.float16)


def _fake_int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16)


def _int8_double_quant(A: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor | None, ...]:
    return int8.int8_double_quant(A, threshold=threshold)


def _fake_int8_double_quant(A: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor | None, ...]:
    codes = [A.new_empty(A.shape, dtype=torch.int8) for _ in range(2)]
    stats = [A.new_empty(size, dtype=torch.float32) for size in (_check.product(A.shape[:-1]), A.shape[-1])]
    return (*codes, *stats, _fake_outliers(A, threshold))


def _nothing(*_args: Any, **_named: Any) -> None:
    """The fake of an operator that fills its `out`."""


def _new(who: str, A: torch.Tensor, shape: Any, dtype: torch.dtype) -> torch.Tensor:
    if dtype not in _check.FLOATS:
        raise ValueError(f"{who}: dtype must be float32, bfloat16 or float16, got {dtype}.")
    return torch.empty(shape, dtype=dtype, device=A.device)


define(
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    _quantize_blockwise,
    _fake_quantize_blockwise,
)
define(
    "dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    _dequantize_blockwise,
    _fake_dequantize_blockwise,
)
define(
    "dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor(a!) out)"
    " -> ()",
    _dequantize_blockwise_out,
    _nothing,
)
define(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    _quantize_4bit,
    _fake_quantize_4bit,
)
define(
    "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    _dequantize_4bit,
    _fake_dequantize_4bit,
)
define(
    "dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype,"
    " Tensor(a!) out) -> ()",
    _dequantize_4bit_out,
    _nothing,
)
define(
    "gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    _gemv_4bit,
    _fake_gemv_4bit,
)
define(
    "gemv_4bit.out(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor(a!) out) -> ()",
    _gemv_4bit_out,
    _nothing,
)
define("int8_linear_matmul(Tensor A, Tensor B) -> Tensor", int8_matmul.int8_linear_matmul, _fake_int8_linear_matmul)
define("int8_linear_matmul.out(Tensor A, Tensor B, Tensor(a!) out) -> ()", _int8_linear_matmul_out, _nothing)
define(
    "int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    int8.int8_vectorwise_quant,
    _fake_int8_vectorwise_quant,
)
define(
    "int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor",
    int8.int8_vectorwise_dequant,
    _fake_int8_vectorwise_dequant,
)
define(
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None)"
    " -> Tensor",
    _int8_mm_dequant,
    _fake_int8_mm_dequant,
)
define(
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None)"
    " -> Tensor",
    _int8_scaled_mm,
    _fake_int8_scaled_mm,
)
define(
    "int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    _int8_double_quant,
    _fake_int8_double_quant,
)
