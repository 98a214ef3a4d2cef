"""Against bitsandbytes on the CPU: equal where it is right, and right where it is wrong."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from support import functional_reference as ref
from support.harness import DTYPES, bits

from optim8 import functional as F

pytestmark = pytest.mark.peers

# Its CPU code of a quotient comes from a table of 2^16 entries over [-1, 1]: the quotient is off by a cell at most.
LOOKUP_CELL = 2.0**-15


@pytest.fixture(scope="module")
def B() -> ModuleType:
    return pytest.importorskip("bitsandbytes.functional")


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_8bit_codes(B: ModuleType, blocksize: int, dtype: torch.dtype) -> None:
    x = (torch.randn(60_001) * torch.logspace(-3, 3, 60_001)).to(dtype)
    ours, state = F.quantize_blockwise(x, blocksize=blocksize)
    theirs, their_state = B.quantize_blockwise(x, blocksize=blocksize)
    assert equal_bits(state.absmax, their_state.absmax)
    assert equal_bits(state.code, their_state.code)
    values = ref.values_of(x)
    y = ref.quotients(values, ref.values_of(state.absmax).repeat(blocksize)[: values.size], 1)
    assert ref.not_nearest(theirs.numpy(), y, state.code.numpy(), LOOKUP_CELL).tolist() == []
    assert ref.not_nearest(ours.numpy(), y, state.code.numpy(), 1e-6).tolist() == []
    back = F.dequantize_blockwise(theirs, state)
    assert torch.equal(back, B.dequantize_blockwise(theirs, their_state))


@pytest.mark.parametrize("shape", [(64, 128), (8, 48), (1001,), (7, 65), (2, 3, 5), (1,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_bytes(B: ModuleType, quant_type: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        x = torch.randn(shape).to(dtype)
        # Quotients on and around the midpoints of the code, in whole blocks: in a short last block the peer divides by
        # absmax instead of multiplying by its reciprocal, which rounds to the other side of a midpoint at times.
        entries = torch.from_numpy(ref.TABLES[quant_type]).sort().values
        middle = ((entries[1:] + entries[:-1]) / 2)[torch.randint(0, 15, (x.numel() // blocksize * blocksize // 2,))]
        x.view(-1)[: middle.numel()] = (middle * x.abs().max()).to(dtype)
        ours, state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        theirs, their_state = B.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        assert equal_bits(ours, theirs)
        assert equal_bits(state.absmax, their_state.absmax)
        assert equal_bits(state.code, their_state.code)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32, torch.int32], ids=str)
def test_storages(B: ModuleType, storage: torch.dtype) -> None:
    x = torch.randn(64, 32)
    assert equal_bits(F.quantize_nf4(x, quant_storage=storage)[0], B.quantize_nf4(x, quant_storage=storage)[0])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_packed_dicts(B: ModuleType, quant_type: str, dtype: torch.dtype, compressed: bool) -> None:
    x = torch.randn(300, 128).to(dtype)
    packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=compressed)
    their_packed, their_state = B.quantize_4bit(x, quant_type=quant_type, compress_statistics=compressed)
    ours, theirs = state.as_dict(packed=True), their_state.as_dict(packed=True)
    assert list(ours) == list(theirs)
    for key in ours:
        if key == "absmax" and compressed:  # 8-bit codes, which their table of 2^16 entries gets wrong at times
            scale = state.state2.absmax.repeat_interleave(256)[: ours[key].numel()]
            y = ref.values_of((F.quantize_4bit(x, quant_type=quant_type)[1].absmax - state.offset) / scale)
            assert ref.not_nearest(theirs[key].numpy(), y, state.state2.code.numpy(), LOOKUP_CELL).tolist() == []
        else:
            assert equal_bits(ours[key], theirs[key]), key
    plain, their_plain = state.as_dict(), their_state.as_dict()
    assert list(plain) == list(their_plain)
    assert all(plain[key] == their_plain[key] for key in plain if not isinstance(plain[key], torch.Tensor))
    assert equal_bits(packed, their_packed)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("form", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_states_are_read_by_either(B: ModuleType, quant_type: str, form: bool, compressed: bool) -> None:
    x = torch.randn(96, 128).bfloat16()
    packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=compressed)
    their_packed, their_state = B.quantize_4bit(x, quant_type=quant_type, compress_statistics=compressed)
    cpu = torch.device("cpu")
    ours = F.QuantState.from_dict(their_state.as_dict(packed=form), cpu)
    theirs = B.QuantState.from_dict(state.as_dict(packed=form), cpu)
    # Where the processor has no AVX-512, bitsandbytes gives FP4's code 8 as -0, which 0 added to it makes 0.
    assert equal_bits(F.dequantize_4bit(their_packed, ours), B.dequantize_4bit(their_packed, their_state) + 0)
    assert equal_bits(B.dequantize_4bit(packed, theirs) + 0, F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_int8(B: ModuleType, threshold: float, dtype: str) -> None:
    x = torch.randn(60, 300).to(DTYPES[dtype])
    codes, stats, columns = F.int8_vectorwise_quant(x, threshold)
    their_codes, their_stats, their_columns = B.int8_vectorwise_quant(x, threshold)
    assert equal_bits(stats, their_stats)
    if threshold:
        assert columns.tolist() == their_columns.tolist()
    y = 127 * x.double() / stats[:, None].double()
    # Theirs is rounded in float32, so it may miss a tie.
    near_tie = ((y - y.floor()) - 0.5).abs() < 1e-4
    assert ((codes == their_codes) | near_tie).all()
    a, b = (torch.randint(-128, 128, (size, 77), dtype=torch.int8) for size in (30, 20))
    assert equal_bits(F.int8_linear_matmul(a, b), B.int8_linear_matmul(a, b))
    back, theirs = F.int8_vectorwise_dequant(codes, stats), B.int8_vectorwise_dequant(codes, stats)
    assert torch.allclose(back, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    "bits_",
    [
        (True, 7, 8),
        (False, 7, 8),
        (True, 3, 8),
        (True, 1, 8),
        (True, 8, 8),
        (True, 4, 4),
        (True, 3, 4),
        (False, 3, 4),
        (True, 4, 5),
    ],
)
def test_dynamic_maps(B: ModuleType, bits_: tuple[bool, int, int]) -> None:
    assert equal_bits(F.create_dynamic_map(*bits_), B.create_dynamic_map(*bits_))


def test_other_maps(B: ModuleType) -> None:
    for arguments in ((True, 5, 2, 8), (True, 4, 3, 8), (False, 5, 3, 8), (True, 2, 1, 4)):
        assert torch.equal(F.create_fp8_map(*arguments), B.create_fp8_map(*arguments))
    for arguments in ((True, 8, True), (False, 8, True), (True, 8, False), (True, 4, True)):
        # Theirs is a float32 grid laid from both ends, so its zero is 4e-9 or -4e-8.
        assert (F.create_linear_map(*arguments) - B.create_linear_map(*arguments)).abs().max() <= 2.0**-24
    for name in ("nf4", "fp4", "af4"):
        assert equal_bits(F.get_4bit_type(name, "cpu"), B.get_4bit_type(name, "cpu"))


@pytest.mark.parametrize("decades, least, most", [(2, 2.5, 9), (3, 15, 90)])
def test_compressed_statistics_of_rows_of_very_different_size(
    B: ModuleType, decades: int, least: float, most: float
) -> None:
    """What docs/functional.md says: the small rows lose their scale, here as there."""
    weight = torch.randn(64, 256) * torch.logspace(-decades, 0, 64)[:, None]

    def worst(M: ModuleType, nested: bool) -> float:
        packed, state = M.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
        return float(((M.dequantize_4bit(packed, state) - weight).norm(dim=1) / weight.norm(dim=1)).max())

    assert worst(F, False) == worst(B, False)
    assert math.isclose(worst(F, True), worst(B, True), rel_tol=1e-3)
    assert least < worst(F, True) / worst(F, False) < most


# Where the peer is wrong and we are not. Each test shows both.


def test_zero_stays_zero(B: ModuleType) -> None:
    x = torch.tensor([0.0, 1.0])
    assert B.quantize_blockwise(x)[0][0] != 127
    codes, state = F.quantize_blockwise(x)
    assert codes[0] == 127
    assert F.dequantize_blockwise(codes, state)[0] == 0


def test_a_short_absmax_is_an_error() -> None:
    """There it reads past the end; that is not tried here, since it may end the process."""
    codes, absmax = torch.zeros(2**20, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(ValueError, match=r"absmax must have 16384 entries .*, got 1"):
        F.dequantize_blockwise(codes, absmax=absmax, blocksize=64)
    packed = codes[: 2**19, None]
    with pytest.raises(ValueError, match=r"absmax must have 16384 entries .*, got 1"):
        F.dequantize_4bit(packed, absmax=absmax, out=torch.empty(2**20))


def test_buffers_and_double_quant_exist_on_the_cpu(B: ModuleType) -> None:
    x = torch.randn(8, 64)
    packed, state = B.quantize_nf4(x)
    with pytest.raises(NotImplementedError):
        B.dequantize_4bit(packed, state, out=torch.empty(8, 64))
    with pytest.raises(NotImplementedError):
        B.int8_double_quant(x.half())
    packed, state = F.quantize_nf4(x)
    out = torch.empty(8, 64)
    assert torch.equal(F.dequantize_4bit(packed, state, out=out), F.dequantize_4bit(packed, state))
    assert F.int8_double_quant(x.half())[1].shape == (8, 64)


def test_rows_that_are_no_multiple_of_the_block(B: ModuleType) -> None:
    """Theirs is wrong with AVX-512 only; ours agrees with the definition (test_functional_fourbit.py) everywhere."""
    x = torch.randn(8, 48)
    packed, state = F.quantize_nf4(x)
    expected = torch.from_numpy(ref.NF4[ref.unpack(packed, 384)]) * state.absmax.repeat_interleave(64)
    assert torch.equal(F.dequantize_nf4(packed, state).flatten(), expected)
    if not torch.equal(B.dequantize_nf4(*B.quantize_nf4(x)).flatten(), expected):
        assert torch.backends.cpu.get_cpu_capability() == "AVX512"


def test_gemv_needs_no_private_packing() -> None:
    weight, x = torch.randn(16, 256), torch.randn(1, 256)
    packed, state = F.quantize_nf4(weight)
    found = F.gemv_4bit(x, packed, state=state)
    assert torch.allclose(found, x @ F.dequantize_nf4(packed, state).t(), atol=1e-4)


def test_int4_exists(B: ModuleType) -> None:
    with pytest.raises(RuntimeError):
        B.get_4bit_type("int4", "cpu")
    assert F.get_4bit_type("int4", "cpu").shape == (16,)


@pytest.mark.parametrize(
    "code", [torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 256).double()], ids=["16", "float64"]
)
def test_a_table_of_another_kind_is_an_error(B: ModuleType, code: torch.Tensor) -> None:
    B.quantize_blockwise(torch.randn(100), code=code)
    with pytest.raises(ValueError, match="code"):
        F.quantize_blockwise(torch.randn(100), code=code)


def test_the_int8_constant(B: ModuleType) -> None:
    """float16 hides most of it: sums for which the two constants round to different values."""
    sums = torch.arange(1, 60_000, dtype=torch.int32)[:, None]
    stats = torch.ones(sums.shape[0]), torch.ones(1)
    exact = sums.double() / 127**2
    ours = (F.int8_mm_dequant(sums, *stats).double() / exact - 1).mean().item()
    theirs = (B.int8_mm_dequant(sums, *stats).double() / exact - 1).mean().item()
    assert abs(ours) < 4e-6
    assert math.isclose(theirs, 1.8e-5, rel_tol=0.3) or abs(theirs) > 2 * abs(ours)


def test_nan_stays_one_element(B: ModuleType) -> None:
    x = torch.tensor([1.0, math.nan, 0.5])
    codes, state = F.quantize_blockwise(x)
    assert codes[1] == 127
    assert torch.equal(F.dequantize_blockwise(codes, state)[[0, 1]], torch.tensor([1.0, 0.0]))
    their_codes, _ = B.quantize_blockwise(x)
    assert their_codes[1] != 127
