"""Wrong calls: the documented error, a message that names argument, need and what came, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.harness import bits
from torch._subclasses.fake_tensor import FakeTensorMode

import optim8
from optim8 import functional as F

X = torch.linspace(-1, 1, 1000)
BYTES = torch.zeros(1000, dtype=torch.uint8)
CODES, STATE = F.quantize_blockwise(X, blocksize=256)
PACKED, STATE4 = F.quantize_nf4(X.view(10, 100))
NESTED = F.quantize_nf4(X, compress_statistics=True)[1]
I8 = torch.ones(3, 8, dtype=torch.int8)
I32 = torch.ones(3, 5, dtype=torch.int32)
SIGNED, UNSIGNED = F.create_dynamic_map(True), F.create_dynamic_map(False)


def changed(state: F.QuantState, **fields: Any) -> F.QuantState:
    copy = F.QuantState(state.absmax, state.shape, state.code, state.blocksize, state.quant_type, state.dtype)
    copy.offset, copy.state2 = state.offset, state.state2
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


def step8(**fields: Any) -> None:
    p = torch.zeros(300)
    given: dict[str, Any] = {
        "optimizer_name": "adam",
        "g": torch.ones(300),
        "p": p,
        "state1": torch.zeros(300, dtype=torch.uint8),
        "state2": torch.zeros(300, dtype=torch.uint8),
        "beta1": 0.9,
        "beta2": 0.99,
        "beta3": 0.0,
        "alpha": 0.0,
        "eps": 1e-8,
        "step": 1,
        "lr": 0.1,
        "qmap1": SIGNED,
        "qmap2": UNSIGNED,
        "absmax1": torch.zeros(2),
        "absmax2": torch.zeros(2),
    }
    try:
        F.optimizer_update_8bit_blockwise(**{**given, **fields})
    finally:
        assert not p.any()


def step32(**fields: Any) -> None:
    given: dict[str, Any] = {
        "optimizer_name": "adam",
        "g": torch.ones(3),
        "p": torch.zeros(3),
        "state1": torch.zeros(3),
        "beta1": 0.9,
        "eps": 1e-8,
        "step": 1,
        "lr": 0.1,
        "state2": torch.zeros(3),
    }
    F.optimizer_update_32bit(**{**given, **fields})


PACK = "quant_state.bitsandbytes__nf4"


def text(value: str) -> torch.Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def gone(like: torch.Tensor) -> torch.Tensor:
    """A tensor whose storage was resized away, as sharding libraries do."""
    copy = like.clone()
    copy.untyped_storage().resize_(0)
    return copy


def packed_dict(**fields: Any) -> dict[str, Any]:
    return {**STATE4.as_dict(packed=True), **fields}


def plain_dict(drop: str = "", **fields: Any) -> dict[str, Any]:
    entries = {**NESTED.as_dict(), **fields}
    entries.pop(drop, None)
    return entries


def read(entries: Any) -> F.QuantState:
    return F.QuantState.from_dict(entries, "cpu")


def on_cuda(size: int) -> torch.Tensor:
    """What has the device and shape of a CUDA tensor, where there is no GPU."""
    with FakeTensorMode():
        return torch.empty(size, device="cuda")


LEARNT = X[:100].clone().requires_grad_()
V, T = ValueError, TypeError
Call = Callable[[], Any]
# name, call, error, words of the message
WRONG: list[tuple[str, Call, type[Exception], str]] = [
    ("q8 list", lambda: F.quantize_blockwise([1.0]), T, "A must be a torch.Tensor, got list"),
    ("q8 float64", lambda: F.quantize_blockwise(X.double()), V, "A must be float32, bfloat16 or float16, got float64"),
    ("q8 int", lambda: F.quantize_blockwise(X.int()), V, "got int32"),
    ("q8 complex", lambda: F.quantize_blockwise(X.cfloat()), V, "got complex64"),
    ("q8 sparse", lambda: F.quantize_blockwise(X.to_sparse()), T, r"dense.*to_dense"),
    ("q8 blocksize 0", lambda: F.quantize_blockwise(X, blocksize=0), V, "blocksize must be at least 1, got 0"),
    ("q8 blocksize 100", lambda: F.quantize_blockwise(on_cuda(300), blocksize=100), V, "from 32 to 4096 for CUDA.*100"),
    ("q8 blocksize 16", lambda: F.quantize_blockwise(on_cuda(300), blocksize=16), V, "power of two.*got 16"),
    ("q8 blocksize 8192", lambda: F.quantize_blockwise(on_cuda(300), blocksize=8192), V, "power of two.*got 8192"),
    ("q8 blocksize -64", lambda: F.quantize_blockwise(X, blocksize=-64), V, "got -64"),
    ("q8 blocksize float", lambda: F.quantize_blockwise(X, blocksize=64.0), T, "blocksize must be an int, got float"),
    ("q8 code of 16", lambda: F.quantize_blockwise(X, code=SIGNED[:16]), V, r"code must have 256 entries.*got 16"),
    ("q8 code float64", lambda: F.quantize_blockwise(X, code=SIGNED.double()), V, "code must be float32, got float64"),
    ("q8 code falling", lambda: F.quantize_blockwise(X, code=SIGNED.flip(0)), V, r"code must be finite and sorted"),
    ("q8 code NaN", lambda: F.quantize_blockwise(X, code=SIGNED * float("nan")), V, "code must be finite"),
    ("q8 code list", lambda: F.quantize_blockwise(X, code=SIGNED.tolist()), T, "code must be a torch.Tensor"),
    ("q8 code device", lambda: F.quantize_blockwise(X, code=SIGNED.to("meta")), V, "code must be on cpu.*got meta"),
    (
        "q8 short absmax",
        lambda: F.quantize_blockwise(X, absmax=torch.empty(3), blocksize=256),
        V,
        r"quantize_blockwise: absmax must have 4 entries \(1000 values / blocksize 256, rounded up\), got 3. "
        r"Pass absmax=None to allocate it\.",
    ),
    ("q8 absmax half", lambda: F.quantize_blockwise(X, absmax=torch.empty(1).half()), V, "absmax must be float32"),
    ("q8 absmax stride", lambda: F.quantize_blockwise(X, absmax=torch.empty(32)[::2], blocksize=64), V, "contiguous"),
    ("q8 out dtype", lambda: F.quantize_blockwise(X, out=torch.empty(1000)), V, "out must be uint8, got float32"),
    (
        "q8 out shape",
        lambda: F.quantize_blockwise(X, out=BYTES[:999]),
        V,
        r"out must have shape \(1000,\), got \(999,\)",
    ),
    ("q8 out stride", lambda: F.quantize_blockwise(X[:500], out=BYTES[::2]), V, "out must be contiguous"),
    ("q8 out meta", lambda: F.quantize_blockwise(X, out=BYTES.to("meta")), V, "out must be on cpu"),
    ("q8 no memory", lambda: F.quantize_blockwise(gone(X)), V, "A must have memory, got float32"),
    ("q8 zeros unwritten", lambda: F.quantize_blockwise(torch._efficientzerotensor(9)), V, "A must have memory"),
    ("q8 out no memory", lambda: F.quantize_blockwise(X, out=gone(BYTES)), V, "out must have memory"),
    ("q4 no memory", lambda: F.quantize_4bit(gone(X)), V, "A must have memory"),
    ("gemv no memory", lambda: F.gemv_4bit(gone(X[:100]), PACKED, state=STATE4), V, "A must have memory"),
    ("i8 no memory", lambda: F.int8_vectorwise_quant(gone(X)), V, "A must have memory"),
    ("mm A no memory", lambda: F.int8_linear_matmul(gone(I8), I8), V, "A must have memory"),
    ("mm B no memory", lambda: F.int8_linear_matmul(I8, gone(I8)), V, "B must have memory"),
    ("d8 nothing", lambda: F.dequantize_blockwise(CODES), V, "needs quant_state or absmax"),
    ("d8 float A", lambda: F.dequantize_blockwise(X, STATE), V, "A must be uint8, got float32"),
    ("d8 short A", lambda: F.dequantize_blockwise(CODES[:700], STATE), V, r"absmax must have 3 entries.*got 4"),
    ("d8 short absmax", lambda: F.dequantize_blockwise(CODES, absmax=X[:3], blocksize=256), V, "absmax must have 4"),
    (
        "d8 absmax uint8",
        lambda: F.dequantize_blockwise(CODES, absmax=BYTES[:1]),
        V,
        "absmax must be float32, got uint8",
    ),
    (
        "d8 blocksize",
        lambda: F.dequantize_blockwise(CODES, absmax=X[:10], blocksize=True),
        T,
        "blocksize must be an int",
    ),
    ("d8 code of 255", lambda: F.dequantize_blockwise(CODES, absmax=X[:1], code=SIGNED[1:]), V, "code must have 256"),
    ("d8 out dtype", lambda: F.dequantize_blockwise(CODES, STATE, out=X.half()), V, "out must be float32, got float16"),
    (
        "d8 out int",
        lambda: F.dequantize_blockwise(CODES, absmax=X[:1], out=X.int()),
        V,
        "out must be float32, bfloat16",
    ),
    ("d8 out shape", lambda: F.dequantize_blockwise(CODES, STATE, out=torch.empty(10)), V, "out must have shape"),
    ("d8 state type", lambda: F.dequantize_blockwise(CODES, STATE.as_dict()), T, "quant_state must be an optim8"),
    ("d8 state dtype", lambda: F.dequantize_blockwise(CODES, changed(STATE, dtype=torch.int8)), V, "dtype must be"),
    ("d8 state code", lambda: F.dequantize_blockwise(CODES, changed(STATE, code=None)), V, "must have a code"),
    (
        "d8 state code 16",
        lambda: F.dequantize_blockwise(CODES, changed(STATE, code=SIGNED[:16])),
        V,
        "code must have 256",
    ),
    ("d8 state blocks", lambda: F.dequantize_blockwise(CODES, changed(STATE, blocksize=64)), V, "absmax must have 16"),
    (
        "d8 state absmax",
        lambda: F.dequantize_blockwise(CODES, changed(STATE, absmax=None)),
        T,
        "absmax must be a torch",
    ),
    ("d8 nested flat", lambda: F.dequantize_blockwise(CODES, STATE, nested=True), V, "nested=True needs a nested"),
    ("d8 nested bare", lambda: F.dequantize_blockwise(CODES, absmax=X[:1], nested=True), V, "nested=True needs"),
    ("d8 deep", lambda: F.dequantize_4bit(PACKED, changed(NESTED, state2=NESTED)), V, "state2 must not be nested"),
    ("d8 no offset", lambda: F.dequantize_4bit(PACKED, changed(NESTED, offset=None)), T, "offset must be a torch"),
    ("d8 offsets", lambda: F.dequantize_4bit(PACKED, changed(NESTED, offset=X)), V, "offset must have 1 entries"),
    (
        "d8 out grad",
        lambda: F.dequantize_blockwise(CODES, STATE, out=X.clone().requires_grad_()),
        V,
        "require gradients",
    ),
    ("q4 float64", lambda: F.quantize_4bit(X.double()), V, "got float64"),
    ("q4 blocksize 16", lambda: F.quantize_4bit(X, blocksize=16), V, r"one of \(32.*got 16"),
    ("q4 type", lambda: F.quantize_4bit(X, quant_type="int4"), V, "quant_type must be 'nf4' or 'fp4', got 'int4'"),
    ("q4 type None", lambda: F.quantize_4bit(X, quant_type=None), V, "got None"),
    ("q4 storage bool", lambda: F.quantize_4bit(X, quant_storage=torch.bool), V, "quant_storage must be.*torch.bool"),
    ("q4 storage word", lambda: F.quantize_4bit(X, quant_storage="uint8"), V, "quant_storage"),
    ("q4 short absmax", lambda: F.quantize_4bit(X, absmax=torch.empty(15)), V, "absmax must have 16 entries"),
    ("q4 out shape", lambda: F.quantize_4bit(X, out=BYTES[:500]), V, r"out must have shape \(500, 1\), got \(500,\)"),
    ("q4 out dtype", lambda: F.quantize_4bit(X, out=torch.empty(500, 1)), V, "out must be uint8"),
    ("d4 nothing", lambda: F.dequantize_4bit(PACKED), V, "needs quant_state, or both absmax and out"),
    ("d4 no out", lambda: F.dequantize_4bit(PACKED, absmax=X[:16]), V, "both absmax and out"),
    ("d4 short A", lambda: F.dequantize_4bit(PACKED[:-1], STATE4), V, r"A must have 500 entries of uint8.*got 499"),
    ("d4 long A", lambda: F.dequantize_4bit(PACKED.repeat(2, 1), STATE4), V, "A must have 500 entries.*got 1000"),
    ("d4 A bool", lambda: F.dequantize_4bit(PACKED.bool(), STATE4), V, "A must be uint8.*got bool"),
    ("d4 A meta", lambda: F.dequantize_4bit(PACKED.to("meta"), STATE4), V, "absmax must be on meta"),
    ("d4 8-bit state", lambda: F.dequantize_4bit(PACKED, STATE), V, "dequantize_blockwise"),
    (
        "d4 state shape",
        lambda: F.dequantize_4bit(PACKED, changed(STATE4, shape=None)),
        V,
        "shape must be the torch.Size",
    ),
    ("d4 state shape 2", lambda: F.dequantize_4bit(PACKED, changed(STATE4, shape=(10, -1))), V, "shape must be"),
    ("d4 state huge", lambda: F.dequantize_4bit(PACKED, changed(STATE4, shape=(2**40, 2**40))), V, "A must have"),
    ("d4 state absmax", lambda: F.dequantize_4bit(PACKED, changed(STATE4, absmax=X[:15])), V, "absmax must have 16"),
    ("d4 state nested", lambda: F.dequantize_4bit(PACKED, changed(NESTED, absmax=X[:16])), V, "must be uint8"),
    ("d4 state blocksize", lambda: F.dequantize_4bit(PACKED, changed(STATE4, blocksize=48)), V, "blocksize must be"),
    ("d4 state type", lambda: F.dequantize_4bit(PACKED, changed(STATE4, quant_type="af4")), V, "quant_type"),
    ("d4 out shape", lambda: F.dequantize_4bit(PACKED, STATE4, out=X.clone()), V, r"out must have shape \(10, 100\)"),
    ("d4 out dtype", lambda: F.dequantize_4bit(PACKED, STATE4, out=X.view(10, 100).half()), V, "out must be float32"),
    ("d4 type", lambda: F.dequantize_4bit(PACKED, absmax=X[:16], out=X.clone(), quant_type="x"), V, "quant_type"),
    ("gemv no state", lambda: F.gemv_4bit(X[None, :100], PACKED), V, "state must be the state.*got None"),
    ("gemv row", lambda: F.gemv_4bit(X[None, :99], PACKED, state=STATE4), V, r"one row of 100 values.*\(1, 99\)"),
    ("gemv rows", lambda: F.gemv_4bit(X.view(10, 100), PACKED, state=STATE4), V, "A must be one row"),
    ("gemv scalar", lambda: F.gemv_4bit(X[0], PACKED, state=STATE4), V, "A must be one row"),
    ("gemv A dtype", lambda: F.gemv_4bit(X[None, :100].double(), PACKED, state=STATE4), V, "A must be float32"),
    ("gemv short B", lambda: F.gemv_4bit(X[None, :100], PACKED[1:], state=STATE4), V, "B must have 500 entries"),
    ("gemv 1-D weight", lambda: F.gemv_4bit(X[None, :100], PACKED, state=NESTED), V, r"state.shape must be \(N, K\)"),
    ("gemv transposed", lambda: F.gemv_4bit(X, PACKED, transposed_B=True, state=STATE4), V, "must be False"),
    ("gemv out", lambda: F.gemv_4bit(X[None, :100], PACKED, X[:9], state=STATE4), V, r"out must have shape \(1, 10\)"),
    ("gemv 8-bit state", lambda: F.gemv_4bit(X[None, :100], PACKED, state=STATE), V, "quant_type"),
    (
        "mm4 no state",
        lambda: F.matmul_4bit(X.view(10, 100), PACKED, None),
        T,
        "quant_state must be.*NoneType",
    ),
    ("mm4 list", lambda: F.matmul_4bit([1.0], PACKED, STATE4), T, "A must be a torch.Tensor, got list"),
    ("mm4 A", lambda: F.matmul_4bit(X.view(20, 50), PACKED, STATE4), V, r"A must be \[..., 100\].*\(20, 50\)"),
    ("mm4 1-D", lambda: F.matmul_4bit(X, PACKED, NESTED), V, r"quant_state.shape must be \(N, K\)"),
    ("mm4 B", lambda: F.matmul_4bit(X.view(10, 100), PACKED[1:], STATE4), V, "B must have 500 entries"),
    ("mm4 bias", lambda: F.matmul_4bit(X.view(10, 100), PACKED, STATE4, bias=X), V, "bias must have 10 entries"),
    (
        "mm4 bias list",
        lambda: F.matmul_4bit(X.view(10, 100), PACKED, STATE4, bias=[1]),
        T,
        "bias must be a torch.Tensor",
    ),
    ("mm4 out", lambda: F.matmul_4bit(X.view(10, 100), PACKED, STATE4, X), V, r"out must have shape \(10, 10\)"),
    ("mm4 out, gradient", lambda: F.matmul_4bit(LEARNT, PACKED, STATE4, torch.empty(10)), V, "out must be None where"),
    ("i8 int", lambda: F.int8_vectorwise_quant(I8), V, "A must be float32, bfloat16 or float16, got int8"),
    ("i8 scalar", lambda: F.int8_vectorwise_quant(X[0]), V, "at least one dimension"),
    ("i8 threshold", lambda: F.int8_vectorwise_quant(X, -1.0), V, "threshold must be finite and at least 0, got -1.0"),
    ("i8 threshold NaN", lambda: F.int8_vectorwise_quant(X, float("nan")), V, "threshold must be finite"),
    ("i8 threshold word", lambda: F.int8_vectorwise_quant(X, "6"), T, "threshold must be a float, got str"),
    ("i8 dequant A", lambda: F.int8_vectorwise_dequant(X, X[:1]), V, "A must be int8"),
    ("i8 dequant stats", lambda: F.int8_vectorwise_dequant(I8, X[:4]), V, "stats must have 3 entries.*got 4"),
    ("i8 dequant half", lambda: F.int8_vectorwise_dequant(I8, X[:3].half()), V, "stats must be float32"),
    (
        "double out_row",
        lambda: F.int8_double_quant(X.view(10, 100), out_row=I8),
        V,
        r"out_row must have shape \(10, 100\)",
    ),
    ("double out_col", lambda: F.int8_double_quant(X, out_col=BYTES), V, "out_col must be int8, got uint8"),
    ("double row_stats", lambda: F.int8_double_quant(X.view(10, 100), row_stats=X[:9]), V, "row_stats must have shape"),
    ("double col_stats", lambda: F.int8_double_quant(X.view(10, 100), col_stats=X[:9]), V, "col_stats must have shape"),
    ("mm float", lambda: F.int8_linear_matmul(X[None], I8), V, "A must be int8"),
    ("mm B", lambda: F.int8_linear_matmul(I8, I8.float()), V, "B must be int8"),
    ("mm columns", lambda: F.int8_linear_matmul(I8, I8[:, 1:]), V, r"B must be a matrix with 8 columns.*\(3, 7\)"),
    ("mm B 1-D", lambda: F.int8_linear_matmul(I8, I8[0]), V, "B must be a matrix"),
    (
        "mm dtype",
        lambda: F.int8_linear_matmul(I8, I8, dtype=torch.int8),
        V,
        "dtype must be torch.int32, got torch.int8",
    ),
    ("mm out shape", lambda: F.int8_linear_matmul(I8, I8, out=I32), V, r"out must have shape \(3, 3\), got \(3, 5\)"),
    ("mm out dtype", lambda: F.int8_linear_matmul(I8, I8, out=torch.empty(3, 3)), V, "out must be int32"),
    ("mm device", lambda: F.int8_linear_matmul(I8, I8.to("meta")), V, "B must be on cpu, as A is, got meta"),
    ("scale A", lambda: F.int8_mm_dequant(I8, X[:3], X[:8]), V, "A must be int32, got int8"),
    ("scale rows", lambda: F.int8_mm_dequant(I32, X[:2], X[:5]), V, "row_stats must have 3 entries.*got 2"),
    ("scale columns", lambda: F.int8_mm_dequant(I32, X[:3], X[:3]), V, "col_stats must have 5 entries"),
    ("scale bias", lambda: F.int8_mm_dequant(I32, X[:3], X[:5], bias=X[:4]), V, "bias must have 5 entries"),
    ("scale bias int", lambda: F.int8_mm_dequant(I32, X[:3], X[:5], bias=I32[0]), V, "bias must be float32"),
    ("scale out", lambda: F.int8_mm_dequant(I32, X[:3], X[:5], out=torch.empty(3, 5)), V, "out must be float16"),
    ("scaled mm dtype", lambda: F.int8_scaled_mm(I8, I8, X[:3], X[:3], dtype=torch.int32), V, "dtype must be float32"),
    ("scaled mm rows", lambda: F.int8_scaled_mm(I8, I8, X[:4], X[:3]), V, "row_stats must have 3"),
    ("map bits", lambda: F.create_dynamic_map(True, 7, 9), V, "total_bits=9"),
    ("map exponent", lambda: F.create_dynamic_map(False, 8, 8), V, "max_exponent_bits=8"),
    ("map exponent 9", lambda: F.create_dynamic_map(True, 9, 8), V, "max_exponent_bits=9"),
    ("linear bits", lambda: F.create_linear_map(True, 1), V, "total_bits must be from 2 to 8, got 1"),
    ("fp8 bits", lambda: F.create_fp8_map(True, 5, 3, 8), V, "must make total_bits=8"),
    ("normal offset", lambda: F.create_normal_map(1.0), V, "offset must be a quantile"),
    ("4-bit type", lambda: F.get_4bit_type("nf8", "cpu"), V, "typename must be.*got 'nf8'"),
    ("af4 blocksize", lambda: F.get_4bit_type("af4", "cpu", 128), V, "blocksize 64 only, got 128"),
    ("4-bit type device", lambda: F.get_4bit_type("nf4", "gpu"), V, "device must be one of torch's, got 'gpu'"),
    ("from device", lambda: F.QuantState.from_dict(plain_dict(), "gpu"), V, "device must be one of torch's"),
    ("get_ptr", lambda: F.get_ptr(3), T, "A must be a torch.Tensor or None, got int"),
    ("is_on_gpu", lambda: F.is_on_gpu([None, X]), RuntimeError, r"got item 1 \(float32 \(1000,\)\) on cpu"),
    ("is_on_gpu item", lambda: F.is_on_gpu([3]), T, "item 0 must be a torch.Tensor or None"),
    ("packed 8-bit state", lambda: STATE.as_dict(packed=True), V, "packed=True is the form of 4-bit states"),
    ("from list", lambda: read([1]), T, "qs_dict must be a dict, got list"),
    ("from nothing", lambda: read({}), V, "must hold 'quant_type' or a key"),
    ("from no absmax", lambda: read(plain_dict("absmax")), V, "lacks 'absmax'"),
    ("from no shape", lambda: read(plain_dict("shape")), V, "lacks 'shape'"),
    ("from no map", lambda: read(plain_dict("quant_map")), V, "lacks 'quant_map'"),
    ("from no nested map", lambda: read(plain_dict("nested_quant_map")), V, "lacks 'nested_quant_map'"),
    ("from type", lambda: read(plain_dict(quant_type="nf5")), V, "quant_type must be.*'nf5'"),
    ("from dtype", lambda: read(plain_dict(dtype="float99")), V, "dtype must be one of.*'float99'"),
    ("from float absmax", lambda: read(plain_dict(absmax=X[:16])), V, "absmax must be uint8, got float32"),
    ("from list absmax", lambda: read(plain_dict(absmax=[1.0])), T, "absmax must be a torch.Tensor, got list"),
    ("from short map", lambda: read(plain_dict(quant_map=X[:15])), V, "quant_map must have 16 entries, got 15"),
    ("from blocksize", lambda: read(plain_dict(blocksize=65)), V, "blocksize must be one of.*got 65"),
    ("from shape", lambda: read(plain_dict(shape=[10, -1])), V, r"shape must be a list of extents.*\[10, -1\]"),
    ("from huge shape", lambda: read(plain_dict(shape=[2**40, 2**40])), V, "shape must be that of a tensor"),
    ("from offset", lambda: read(plain_dict(nested_offset="1")), V, "nested_offset must be a number"),
    ("from two", lambda: read({"a.absmax": X, "b.absmax": X, "quant_type": "nf4"}), V, "'absmax' twice"),
    ("from two packed", lambda: read(packed_dict(**{"b." + PACK: BYTES})), V, "must hold one state"),
    ("from no JSON", lambda: read(packed_dict(**{PACK: BYTES})), V, "must be JSON as UTF-8 bytes"),
    ("from no UTF-8", lambda: read(packed_dict(**{PACK: BYTES + 255})), V, "must be JSON as UTF-8 bytes"),
    ("from JSON list", lambda: read(packed_dict(**{PACK: text("[1]")})), V, "must hold a JSON object"),
    ("from other type", lambda: read(packed_dict(**{PACK: text('{"quant_type": "fp4"}')})), V, "as in the key"),
    ("from JSON floats", lambda: read(packed_dict(**{PACK: X})), V, "must be uint8, got float32"),
    ("step8 name", lambda: step8(optimizer_name="sgd"), V, "optimizer_name must be one of.*'sgd'"),
    ("step8 shape", lambda: step8(g=torch.ones(299)), V, r"g must have p's shape \(300,\), got \(299,\)"),
    ("step8 g dtype", lambda: step8(g=torch.ones(300).half()), V, "g must be float32, got float16"),
    ("step8 state", lambda: step8(state1=torch.zeros(300)), V, "state1 must be uint8"),
    ("step8 no state2", lambda: step8(state2=None), T, "state2 must be a torch.Tensor, got NoneType"),
    ("step8 absmax", lambda: step8(absmax2=torch.zeros(1)), V, r"absmax2 must have 2 entries \(300 values"),
    ("step8 qmap", lambda: step8(qmap1=UNSIGNED), V, "qmap1 must be create_dynamic_map"),
    ("step8 zeros", lambda: step8(skip_zeros=True), V, "skip_zeros must be False"),
    ("step8 alpha", lambda: step8(alpha=2.0), V, "beta3 and alpha must be 0"),
    ("step8 step", lambda: step8(step=0), V, "step must be at least 1, got 0"),
    ("step8 lion", lambda: step8(optimizer_name="lion"), V, "state2 must be None, lion has one state"),
    ("step32 state", lambda: step32(state1=torch.zeros(4)), V, "state1 must have p's shape"),
    ("step32 stride", lambda: step32(state1=torch.zeros(6)[::2]), V, "state1 must have p's shape .* and strides"),
    ("step32 unorm", lambda: step32(max_unorm=1.0), V, "max_unorm 0"),
    ("step32 p", lambda: step32(p=torch.zeros(3).double()), V, "p must be float32"),
]


def test_the_table_is_long_and_its_names_are_unique() -> None:
    assert len(WRONG) >= 60
    assert len({name for name, *_ in WRONG}) == len(WRONG)


@pytest.mark.parametrize("call, error, words", [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_calls(call: Call, error: type[Exception], words: str) -> None:
    shared = (X, BYTES, CODES, PACKED, I8, I32, SIGNED, UNSIGNED, STATE.absmax, STATE4.absmax, NESTED.absmax)
    before = [bits(tensor) for tensor in shared]
    with pytest.raises(error, match=words) as caught:
        call()
    assert type(caught.value) is error
    assert ": " in str(caught.value)
    assert [bits(tensor) for tensor in shared] == before


def test_outputs_are_untouched_when_a_call_raises(device: torch.device) -> None:
    x, falling = torch.randn(300, device=device), SIGNED.flip(0).to(device)
    out = torch.full((300,), 7, dtype=torch.uint8, device=device)
    absmax = torch.full((5,), 7.0, device=device)
    if device.type == "cpu":  # a table on a GPU is not looked at
        with pytest.raises(ValueError, match="code"):
            F.quantize_blockwise(x, code=falling, absmax=absmax, out=out, blocksize=64)
    with pytest.raises(ValueError, match="out"):
        F.quantize_blockwise(x, absmax=absmax, out=out[:5], blocksize=64)
    assert (out == 7).all()
    assert (absmax == 7).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.quantize_blockwise(X, SIGNED, 0, BYTES, X[:1], 1),
        lambda m: m.quantize_blockwise(X, SIGNED, 64, BYTES, X[:15], 1),
        lambda m: m.dequantize_blockwise(CODES, X[:1], SIGNED, 64, X.clone(), 1),
        lambda m: m.quantize_4bit(X, "nf4", 100, BYTES[:500], X[:10], 1),
        lambda m: m.quantize_4bit(X, "nf5", 64, BYTES[:500], X[:16], 1),
        lambda m: m.quantize_4bit(X, "nf4", 64, BYTES[:499], X[:16], 1),
        lambda m: m.dequantize_4bit(BYTES[:499], X[:16], "nf4", 64, X.clone(), 1),
        lambda m: m.dequantize_4bit(BYTES[:500], X[:15], "nf4", 64, X.clone(), 1),
        lambda m: m.gemv_4bit(X[:100], BYTES[:500], X[:16], SIGNED, 64, X[:10].clone(), 1),
        lambda m: m.gemv_4bit(X[:100], BYTES[:500], X[:1], SIGNED[:16], 64, X[:10].clone(), 1),
        lambda m: m.gemv_4bit(X[:100], BYTES[:5], X[:16], SIGNED[:16], 64, X[:10].clone(), 1),
        lambda m: m.int8_vectorwise_quant(X, 1.0, I8, X[:1], None, 1),
        lambda m: m.int8_vectorwise_quant(X[:24].view(3, 8), 1.0, I8.clone(), X[:3].clone(), BYTES[:7].clone(), 1),
        lambda m: m.int8_columnwise_quant(X[:24].view(3, 8), 1.0, I8.clone(), X[:3].clone(), 1),
        lambda m: m.int8_vectorwise_dequant(I8, X[:2], X[:24].clone(), 1),
        lambda m: m.int8_mm_dequant(I32, X[:3], X[:4], None, X[:15].clone(), 1),
        lambda m: m.int8_linear_matmul(I8, I8[:, :7].contiguous(), I32, 1),
        lambda m: m.int8_linear_matmul(I8, I8, I32, 1),
        lambda m: m.int8_linear_matmul(I8.t(), I8.t(), I32, 1),
        lambda m: m.gemv_4bit(3, BYTES, X, SIGNED, 64, X, 1),
    ],
)
def test_native_code_trusts_nobody(call: Callable[[Any], Any]) -> None:
    """The same checks hold for whoever calls the compiled module without the functions."""
    with pytest.raises((TypeError, ValueError)):
        call(optim8._native.cpu())
