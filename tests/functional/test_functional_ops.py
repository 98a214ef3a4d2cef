"""The registered operators: opcheck for each, and torch.compile over functions that use them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from optim8 import functional as F

OPS = torch.ops.optim8
SCHEMAS = {
    "quantize_blockwise": "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "dequantize_blockwise": "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    "quantize_4bit": "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    "dequantize_4bit": (
        "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor"
    ),
    "gemv_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    "gemm_4bit": (
        "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
        "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
    ),
    "gemm_4bit_transposed": (
        "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
        "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
    ),
    "int8_linear_matmul": "(Tensor A, Tensor B) -> Tensor",
    "int8_vectorwise_quant": "(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor?)",
    "int8_vectorwise_dequant": "(Tensor A, Tensor stats) -> Tensor",
    "int8_mm_dequant": (
        "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor"
    ),
    "int8_scaled_mm": (
        "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None) -> Tensor"
    ),
    "int8_double_quant": "(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
}
WITH_OUT = ("dequantize_blockwise", "dequantize_4bit", "gemv_4bit", "int8_linear_matmul")


def samples(device: torch.device) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for each operator, defaults and all of them given."""
    x = torch.randn(6, 66, device=device)
    codes, state = F.quantize_blockwise(x, blocksize=64)
    packed, state4 = F.quantize_nf4(x.bfloat16(), blocksize=32)
    a, row_stats, _ = F.int8_vectorwise_quant(x)
    b, col_stats, _ = F.int8_vectorwise_quant(torch.randn(9, 66, device=device))
    sums = F.int8_linear_matmul(a, b)
    bias = torch.randn(9, device=device)
    nf4 = F.get_4bit_type("nf4", device)
    nested, state5 = F.quantize_fp4(x.half(), compress_statistics=True, quant_storage=torch.bfloat16)
    nested_weight = (nested, [6, 66], state5.state2.absmax, 64, "fp4")
    nested_scales = (state5.absmax, state5.state2.code, state5.offset.bfloat16())
    return {
        "quantize_blockwise": [(x, state.code, 64), (x.t().half(), state.code, 128), (x[:0], state.code, 64)],
        "dequantize_blockwise": [(codes, state.absmax, state.code, 64, torch.float16)],
        "quantize_4bit": [(x, 64, "nf4", torch.uint8), (x[1, 1:].bfloat16(), 32, "fp4", torch.float32)],
        "dequantize_4bit": [(packed, state4.absmax, 32, "nf4", [6, 66], torch.bfloat16)],
        "gemv_4bit": [
            (x[:1], packed, [6, 66], state4.absmax, nf4, 32),
            (x[0], packed, [6, 66], state4.absmax, nf4, 32),
        ],
        "gemm_4bit": [
            (x, packed, [6, 66], state4.absmax, 32, "nf4"),
            (x.bfloat16().view(2, 3, 66), packed, [6, 66], state4.absmax, 32, "nf4", x[:, 0]),
            (x[:1].requires_grad_(), *nested_weight, x[0, :6].requires_grad_(), *nested_scales),
            (x[0].half(), *nested_weight, None, *nested_scales),
        ],
        "gemm_4bit_transposed": [
            (x[:, :6].requires_grad_(), packed, [6, 66], state4.absmax, 32, "nf4"),
            (x[:, :6].half(), *nested_weight, *nested_scales),
        ],
        "int8_linear_matmul": [(a, b), (a.view(2, 3, 66), b)],
        "int8_vectorwise_quant": [(x,), (x, 2.0), (x.view(2, 3, 66).half(), 0.0)],
        "int8_vectorwise_dequant": [(a, row_stats)],
        "int8_mm_dequant": [(sums, row_stats, col_stats), (sums, row_stats, col_stats, torch.float32, bias)],
        "int8_scaled_mm": [(a, b, row_stats, col_stats), (a, b, row_stats, col_stats, bias, torch.bfloat16)],
        "int8_double_quant": [(x,), (x, 2.0)],
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(name: str) -> None:
    assert str(getattr(OPS, name).default._schema) == f"optim8::{name}{SCHEMAS[name]}"
    if name in WITH_OUT:
        arguments = SCHEMAS[name].split(") -> ")[0]
        assert str(getattr(OPS, name).out._schema) == f"optim8::{name}.out{arguments}, Tensor(a!) out) -> ()"


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(device: torch.device, name: str) -> None:
    for arguments in samples(device)[name]:
        torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("name", WITH_OUT)
def test_opcheck_of_out(device: torch.device, name: str) -> None:
    for arguments in samples(device)[name]:
        expected = getattr(OPS, name)(*arguments)
        out = torch.empty_like(expected)
        torch.library.opcheck(getattr(OPS, name).out, (*arguments, out))
        assert getattr(OPS, name).out(*arguments, out) is None
        assert torch.equal(out, expected)


def test_operators_do_what_the_functions_do(device: torch.device) -> None:
    given = samples(device)
    x = given["quantize_blockwise"][0][0]
    codes, state = F.quantize_blockwise(x, blocksize=64)
    assert torch.equal(OPS.quantize_blockwise(x, state.code, 64)[0], codes)
    packed, state4 = F.quantize_fp4(x)
    assert torch.equal(OPS.quantize_4bit(x, 64, "fp4", torch.uint8)[0], packed)
    back = OPS.dequantize_4bit(packed, state4.absmax, 64, "fp4", [6, 66], torch.float32)
    assert torch.equal(back, F.dequantize_4bit(packed, state4))
    assert OPS.int8_vectorwise_quant(x)[2] is None
    assert OPS.int8_vectorwise_quant(x, 1.0)[2].dtype == torch.int32
    assert OPS.int8_mm_dequant(*given["int8_mm_dequant"][0]).dtype == torch.float16
    # Any table of 16 values.
    weight, shape, absmax = given["gemv_4bit"][0][1], [6, 66], given["gemv_4bit"][0][3]
    doubled = OPS.gemv_4bit(x[:1], weight, shape, absmax, 2 * F.get_4bit_type("nf4", device), 32)
    assert torch.equal(doubled, 2 * OPS.gemv_4bit(*given["gemv_4bit"][0]))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: OPS.quantize_blockwise(x, F.create_dynamic_map(), 0), "blocksize"),
        (lambda x: OPS.dequantize_4bit(x.char()[0], x, 64, "nf4", [999], torch.float32), "A must have"),
        (lambda x: OPS.dequantize_4bit(x.char()[0, :2], x, 64, "nf4", [4], torch.int8), "dtype"),
        (lambda x: OPS.int8_linear_matmul(x, x), "int8"),
        (lambda x: OPS.gemv_4bit(x[0], x.char(), [3, 5], x, x, 64), "A must be one row"),
        (lambda x: OPS.gemv_4bit(x[0, :5], x.char()[0, :5].contiguous(), [2, 5], x[0, :1], x[0, :3], 64), "code"),
        (lambda x: OPS.gemv_4bit(x[0, :5], x.char()[0, :5].contiguous(), [2, 5], x[0, :2], x[0, :16], 64), "absmax"),
    ],
)
def test_operators_check_their_arguments(call: Callable[[torch.Tensor], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call(torch.randn(3, 66))


def everything(x: torch.Tensor, w: torch.Tensor, packed: torch.Tensor, state: F.QuantState) -> list[torch.Tensor]:
    codes, s8 = F.quantize_blockwise(x * 2, blocksize=64)
    nested, s8n = F.quantize_blockwise(x, blocksize=64, nested=True)
    p4, s4 = F.quantize_nf4(x + 1)
    p4c, s4c = F.quantize_4bit(x, compress_statistics=True, quant_storage=torch.bfloat16)
    qx, sx, _ = F.int8_vectorwise_quant(x)
    qw, sw, _ = F.int8_vectorwise_quant(w)
    rows, columns, row_stats, col_stats, _ = F.int8_double_quant(x)
    sums = F.int8_linear_matmul(qx, qw)
    out = torch.zeros_like(x)
    F.dequantize_blockwise(codes, s8, out=out)
    return [
        out + 1,
        F.dequantize_blockwise(codes, s8),
        F.dequantize_blockwise(nested, s8n),
        F.dequantize_4bit(p4, s4),
        F.dequantize_4bit(p4c, s4c),
        F.dequantize_4bit(packed, state).sum(0),
        F.gemv_4bit(x[:1], packed, state=state),
        F.matmul_4bit(x, packed, state, bias=w[:, 0]),
        sums.float(),
        F.int8_mm_dequant(sums, sx, sw),
        F.int8_scaled_mm(qx, qw, sx, sw, bias=w[:, 0], dtype=torch.float32),
        F.int8_vectorwise_dequant(rows, row_stats),
        columns.float() * col_stats,
    ]


def test_compile_without_graph_breaks_or_recompiles(device: torch.device) -> None:
    torch._dynamo.reset()
    w = torch.randn(9, 128, device=device)
    packed, state = F.quantize_nf4(w, compress_statistics=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, fullgraph=True, backend=counter)
    for _ in range(4):
        x = torch.randn(5, 128, device=device)
        for found, expected in zip(compiled(x, w, packed, state), everything(x, w, packed, state)):
            assert torch.equal(found, expected)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compile_with_the_default_backend(device: torch.device) -> None:
    torch._dynamo.reset()
    w = torch.randn(9, 128, device=device)
    packed, state = F.quantize_nf4(w)
    compiled = torch.compile(everything, fullgraph=True)
    x = torch.randn(5, 128, device=device)
    for found, expected in zip(compiled(x, w, packed, state), everything(x, w, packed, state)):
        assert torch.allclose(found.float(), expected.float(), rtol=1e-3)


def test_a_state_made_while_compiling_can_be_returned(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.quantize_nf4(x), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 40, device=device)
    packed, state = compiled(x)
    expected, expected_state = F.quantize_nf4(x)
    assert torch.equal(packed, expected)
    assert state == expected_state


def test_outliers_while_compiling(device: torch.device) -> None:
    """Their number is known only when the code runs."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda x: F.int8_vectorwise_quant(x, 2.0), fullgraph=True, backend="aot_eager")
        for scale in (1.0, 2.0, 0.01):
            x = torch.randn(5, 40, device=device) * scale
            for found, expected in zip(compiled(x), F.int8_vectorwise_quant(x, 2.0)):
                assert torch.equal(found, expected)


def test_export(device: torch.device) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed, self.state = F.quantize_nf4(torch.randn(8, 64, device=device))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ F.dequantize_4bit(self.packed, self.state).t()

    layer, x = Layer(), torch.randn(3, 64, device=device)
    exported = torch.export.export(layer, (x,), strict=False)
    assert "optim8.dequantize_4bit" in str(exported.graph)
    assert torch.allclose(exported.module()(x), layer(x))


def test_a_tensor_subclass_without_a_dispatch_of_its_own(device: torch.device) -> None:
    class Named(torch.Tensor):
        pass

    x = torch.randn(100, device=device)
    codes, state = F.quantize_blockwise(x.as_subclass(Named))
    assert torch.equal(codes, F.quantize_blockwise(x)[0])
    assert F.dequantize_blockwise(codes, state).shape == (100,)
    parameter = torch.nn.Parameter(x)
    assert torch.equal(F.quantize_nf4(parameter)[0], F.quantize_nf4(x)[0])


def test_fake_tensors_never_reach_native_code() -> None:
    with FakeTensorMode():
        codes, state = F.quantize_blockwise(torch.randn(300), blocksize=64)
        assert state.absmax.shape == (5,)
        assert F.dequantize_blockwise(codes, state).dtype == torch.float32
    # What a tracer saw must not stay behind.
    assert F.quantize_blockwise(torch.ones(3))[0].tolist() == [255] * 3
