"""Functions on quantized tensors, without state: names, parameters and results are those of `bitsandbytes.functional`,
on CPU and on CUDA. docs/functional.md lists them."""

from optim8.functional import lib as lib  # bitsandbytes' name
from optim8.functional import ops as _ops  # noqa: F401  registers torch.ops.optim8
from optim8.functional import ops_matmul as _ops_matmul  # noqa: F401
from optim8.functional import ops_steps as _ops_steps  # noqa: F401
from optim8.functional.blockwise import dequantize_blockwise, quantize_blockwise
from optim8.functional.codebooks import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from optim8.functional.fourbit import (
    dequantize_4bit,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)
from optim8.functional.int8 import int8_double_quant, int8_vectorwise_dequant, int8_vectorwise_quant
from optim8.functional.int8_matmul import int8_linear_matmul, int8_mm_dequant, int8_scaled_mm
from optim8.functional.matmul import matmul_4bit
from optim8.functional.quant_state import QuantState
from optim8.functional.steps import optimizer_update_8bit_blockwise, optimizer_update_32bit
from optim8.functional.utility import get_ptr, is_on_gpu

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "get_ptr",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "matmul_4bit",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]
