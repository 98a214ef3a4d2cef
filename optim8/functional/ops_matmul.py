"""The operators of products with a packed 4-bit weight. The gradient of each is the other."""

from __future__ import annotations

from typing import Any

import torch

from optim8.functional import matmul
from optim8.functional.ops import define, library

_WEIGHT = "Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type"
_NESTED = "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None"


def _fake_gemm_4bit(A: torch.Tensor, B: torch.Tensor, shapeB: list[int], *_others: Any, **_named: Any) -> torch.Tensor:
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _fake_transposed(A: torch.Tensor, B: torch.Tensor, shapeB: list[int], *_others: Any, **_named: Any) -> torch.Tensor:
    return A.new_empty((*A.shape[:-1], shapeB[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    # Tensors go to save_for_backward, so that autograd notices a weight that is changed before the backward pass.
    _, B, shape, absmax, blocksize, quant_type, *rest = inputs
    ctx.bias_dtype = None
    if len(rest) == 4:
        bias, *rest = rest
        ctx.bias_dtype, ctx.bias_shape = (None, None) if bias is None else (bias.dtype, bias.shape)
    ctx.save_for_backward(B, absmax, *rest)
    ctx.options = shape, blocksize, quant_type


def _weight_of(ctx: Any) -> tuple[list[Any], list[Any]]:
    B, absmax, *nested = ctx.saved_tensors
    shape, blocksize, quant_type = ctx.options
    return [B, shape, absmax, blocksize, quant_type], nested


def _gemm_4bit_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, nested = _weight_of(ctx)
    of_left = torch.ops.optim8.gemm_4bit_transposed(grad, *weight, *nested) if ctx.needs_input_grad[0] else None
    of_bias = None
    if any(ctx.needs_input_grad[6:7]):  # shorter where arguments have their defaults
        rows = grad.sum(list(range(grad.dim() - 1)), dtype=torch.float32) if grad.dim() > 1 else grad
        of_bias = rows.to(ctx.bias_dtype).view(ctx.bias_shape)
    return (of_left, *[None] * 5, of_bias, *[None] * 3)


def _transposed_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, nested = _weight_of(ctx)
    return (torch.ops.optim8.gemm_4bit(grad, *weight, None, *nested), *[None] * 8)


define(
    f"gemm_4bit(Tensor A, {_WEIGHT}, Tensor? bias=None, {_NESTED}) -> Tensor",
    matmul.gemm_4bit,
    _fake_gemm_4bit,
)
define(
    f"gemm_4bit_transposed(Tensor A, {_WEIGHT}, {_NESTED}) -> Tensor",
    matmul.gemm_4bit_transposed,
    _fake_transposed,
)
torch.library.register_autograd("optim8::gemm_4bit", _gemm_4bit_gradient, setup_context=_save, lib=library)
torch.library.register_autograd("optim8::gemm_4bit_transposed", _transposed_gradient, setup_context=_save, lib=library)
