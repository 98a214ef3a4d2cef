"""4-bit quantization and the packed product against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import functional_reference as ref
from support.harness import DTYPES, bits, torch_threads
from support.rounding import TINY, UNIT, half_ulp

from optim8 import functional as F

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORAGES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def check(x: torch.Tensor, packed: torch.Tensor, state: F.QuantState, blocksize: int, quant_type: str) -> None:
    values, table = ref.values_of(x), ref.TABLES[quant_type]
    assert packed.shape == (-(-values.size // 2), 1)
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (x.shape, x.dtype, blocksize, quant_type)
    assert bits(state.code) == table.tobytes()
    absmax = ref.finite_max(values, blocksize)
    assert np.array_equal(ref.values_of(state.absmax), absmax)
    codes = ref.unpack(packed, values.size)
    y = ref.quotients(values, absmax, blocksize)
    assert ref.not_nearest(codes, y, table, 0.0).tolist() == []
    assert (codes[(values == 0) | np.isnan(values)] == ref.ZERO[quant_type]).all()
    if values.size % 2:
        assert packed.cpu().view(-1)[-1].item() & 15 == ref.ZERO[quant_type]
    expanded = torch.from_numpy(ref.spread(absmax, blocksize, values.size).astype(np.float32))
    expected = (torch.from_numpy(table[codes]) * expanded).to(x.dtype).view(x.shape)
    back = F.dequantize_4bit(packed, state)
    assert back.dtype == x.dtype
    assert bits(back) == bits(expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_codes_are_the_nearest_entries(
    device: torch.device, dtype: torch.dtype, blocksize: int, quant_type: str
) -> None:
    for n in (0, 1, 2, 3, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize + 37, 4096 + blocksize + 5):
        for bad in (False, True):
            x = ref.awkward((n,), dtype, seed=n, bad=bad).to(device)
            packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
            check(x, packed, state, blocksize, quant_type)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quotients_around_every_midpoint(device: torch.device, quant_type: str) -> None:
    """A quotient that is exactly a midpoint takes the lower entry; the next float32 above takes the upper one."""
    entries = np.unique(ref.TABLES[quant_type])
    midpoints = (entries[1:] + entries[:-1]) / np.float32(2)
    y = np.stack([np.nextafter(midpoints, np.float32(-2)), midpoints, np.nextafter(midpoints, np.float32(2))])
    x = torch.zeros(y.size, 32)
    x[:, 0], x[:, 1] = 1.0, torch.from_numpy(y.flatten())
    packed, _ = F.quantize_4bit(x.to(device), blocksize=32, quant_type=quant_type)
    found = ref.TABLES[quant_type][ref.unpack(packed, x.numel()).reshape(-1, 32)[:, 1]].reshape(3, -1)
    assert np.array_equal(found[0], entries[:-1])
    assert np.array_equal(found[1], entries[:-1])
    assert np.array_equal(found[2], entries[1:])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_float32_quotient_of_a_stride(device: torch.device, quant_type: str) -> None:
    pattern = torch.arange(0, 0x3F800001, 9973, dtype=torch.int32).view(torch.float32)
    y = torch.cat([pattern, -pattern])
    x = torch.ones(y.numel(), 2)
    x[:, 1] = y
    packed, _ = F.quantize_4bit(x.to(device), blocksize=32, quant_type=quant_type)
    codes = ref.unpack(packed, x.numel())[1::2]
    assert ref.not_nearest(codes, y.double().numpy(), ref.TABLES[quant_type], 0.0).tolist() == []


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bad_values_stay_where_they_are(device: torch.device, quant_type: str) -> None:
    clean = torch.randn(64, device=device)
    bad = clean.clone()
    bad[10], bad[20], bad[30] = float("nan"), float("inf"), float("-inf")
    clean[[10, 20, 30]] = 0
    packed, state = F.quantize_4bit(bad, quant_type=quant_type)
    expected, expected_state = F.quantize_4bit(clean, quant_type=quant_type)
    codes, expected_codes = ref.unpack(packed, 64), ref.unpack(expected, 64)
    lowest, highest = ref.TOP[quant_type]
    assert codes[[10, 20, 30]].tolist() == [ref.ZERO[quant_type], highest, lowest]
    expected_codes[20], expected_codes[30] = highest, lowest
    assert np.array_equal(codes, expected_codes)
    assert torch.equal(state.absmax, expected_state.absmax)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (15,), (16,), (17,), (3, 5), (2, 3, 5)], ids=str)
def test_every_storage_and_shape(device: torch.device, storage: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=device)
    packed, state = F.quantize_4bit(x, quant_type="nf4", quant_storage=storage)
    plain, _ = F.quantize_4bit(x, quant_type="nf4")
    count = -(-plain.numel() // storage.itemsize)
    assert packed.dtype == storage
    assert packed.shape == (count, 1)
    stored = packed.flatten().view(torch.uint8)
    assert torch.equal(stored[: plain.numel()], plain.flatten())
    assert not stored[plain.numel() :].any()
    check(x, plain, state, 64, "nf4")
    assert torch.equal(F.dequantize_4bit(packed, state), F.dequantize_4bit(plain, state))


def test_8_by_48_in_blocks_of_64(device: torch.device) -> None:
    """Rows that are no multiple of the block."""
    x = torch.randn(8, 48, device=device)
    for quant_type in ("nf4", "fp4"):
        for dtype in DTYPES.values():
            packed, state = F.quantize_4bit(x.to(dtype), quant_type=quant_type)
            check(x.to(dtype), packed, state, 64, quant_type)


def test_strides_and_transposes(device: torch.device) -> None:
    x = torch.randn(48, 40, device=device)
    for view in (x.t(), x[::3, 1::2], x[:, :1].expand(48, 40), x.requires_grad_()):
        packed, state = F.quantize_4bit(view, quant_type="nf4")
        check(view, packed, state, 64, "nf4")
    values = F.dequantize_4bit(packed, state)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), values.t())
    gapped = torch.empty(1, 2, dtype=torch.int32, device=device)[:, ::2]
    single, single_state = F.quantize_4bit(x[0, :2], quant_storage=torch.int32, out=gapped)
    assert single.stride() == (2, 2)
    byte = torch.tensor([[single.item() & 255]], dtype=torch.uint8, device=device)
    check(x[0, :2], byte, single_state, 64, "fp4")
    assert torch.equal(F.dequantize_4bit(packed.expand(-1, 2)[:, :1], state), values)


def test_buffers_are_filled_and_returned(device: torch.device) -> None:
    x = torch.randn(7, 33, device=device)
    expected, expected_state = F.quantize_nf4(x, quant_storage=torch.int16)
    absmax = torch.full((4,), -1.0, device=device)
    out = torch.full((58, 1), 77, dtype=torch.int16, device=device)
    packed, state = F.quantize_nf4(x, absmax=absmax, out=out, quant_storage=torch.int16)
    assert packed is out
    assert state.absmax is absmax
    assert torch.equal(out, expected)
    assert torch.equal(absmax, expected_state.absmax)
    for dtype in DTYPES.values():
        values = torch.zeros(7, 33, dtype=dtype, device=device)
        assert F.dequantize_4bit(out, absmax=absmax, out=values, quant_type="nf4") is values
        assert torch.equal(values, F.dequantize_4bit(out, state).to(dtype))
    compressed = F.quantize_nf4(x, absmax=absmax.zero_(), compress_statistics=True)[1]
    assert torch.equal(absmax, expected_state.absmax)
    assert compressed.nested


def test_the_short_names(device: torch.device) -> None:
    x = torch.randn(100, device=device)
    for quant_type, quantize, dequantize in (
        ("nf4", F.quantize_nf4, F.dequantize_nf4),
        ("fp4", F.quantize_fp4, F.dequantize_fp4),
    ):
        packed, state = quantize(x, blocksize=32)
        expected, expected_state = F.quantize_4bit(x, blocksize=32, quant_type=quant_type)
        assert torch.equal(packed, expected)
        assert state == expected_state
        out = torch.empty(100, device=device)
        dequantize(packed, absmax=state.absmax, out=out, blocksize=32)
        assert torch.equal(out, dequantize(packed, state))
    assert F.quantize_4bit(x)[1].quant_type == "fp4"
    assert F.quantize_4bit(x, blocksize=None)[1].blocksize == 64


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_compressed_statistics(device: torch.device, quant_type: str) -> None:
    x = torch.randn(300, 64, device=device)
    plain, flat = F.quantize_4bit(x, quant_type=quant_type)
    packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=True)
    assert torch.equal(packed, plain)
    assert state.state2.blocksize == 256
    codes, inner = F.quantize_blockwise(flat.absmax - flat.absmax.mean(), blocksize=256)
    assert torch.equal(state.absmax, codes)
    assert state.state2 == inner
    absmax = F.dequantize_blockwise(codes, inner) + state.offset
    expected = F.dequantize_4bit(packed, absmax=absmax, out=torch.empty_like(x), quant_type=quant_type)
    assert torch.equal(F.dequantize_4bit(packed, state), expected)
    assert F.quantize_4bit(x[:0], compress_statistics=True)[1].nested


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "rows, columns, blocksize",
    [(1, 1, 64), (3, 5, 32), (5, 33, 64), (8, 48, 64), (7, 128, 32), (6, 256, 64), (9, 384, 128), (4, 640, 4096)],
)
def test_gemv(device: torch.device, rows: int, columns: int, blocksize: int, quant_type: str, dtype: str) -> None:
    for compressed in (False, True):
        weight = torch.randn(rows, columns, device=device)
        a = torch.randn(1, columns, device=device).to(DTYPES[dtype])
        packed, state = F.quantize_4bit(weight, None, None, blocksize, compressed, quant_type)
        found = F.gemv_4bit(a, packed, state=state)
        assert found.shape == (1, rows)
        assert found.dtype == a.dtype
        w = F.dequantize_4bit(packed, state).double().cpu().numpy()
        x = a.double().cpu().numpy()
        expected, magnitude = x @ w.T, np.abs(x) @ np.abs(w.T)
        # Each lane of 16 adds a sixteenth of the terms one after the other; then come 4 additions across lanes, the
        # product with absmax (or the rounding of the weight, in the reference too) and the last rounding.
        additions = -(-columns // 16) + 4 + 3
        slack = additions * UNIT * magnitude + TINY + half_ulp(dtype, np.abs(expected) + additions * UNIT * magnitude)
        assert (np.abs(found.double().cpu().numpy() - expected) <= slack).all()


def test_gemv_takes_every_form(device: torch.device) -> None:
    weight, a = torch.randn(6, 128, device=device), torch.randn(128, device=device)
    packed, state = F.quantize_nf4(weight)
    expected = F.gemv_4bit(a[None], packed, state=state)
    assert torch.equal(F.gemv_4bit(a, packed, state=state), expected[0])
    assert torch.equal(F.gemv_4bit(a[None, None], packed, state=state), expected[None])
    assert torch.equal(F.gemv_4bit(a[None], packed.t(), state=state), expected)
    assert torch.equal(F.gemv_4bit(a[None].requires_grad_(), packed, state=state), expected)
    other, other_state = F.quantize_nf4(weight, quant_storage=torch.bfloat16)
    assert torch.equal(F.gemv_4bit(a[None], other, state=other_state), expected)
    out = torch.empty(1, 6, device=device)
    assert F.gemv_4bit(a[None], packed, out=out, state=state) is out
    assert torch.equal(out, expected)
    empty, empty_state = F.quantize_nf4(weight[:0])
    assert F.gemv_4bit(a[None], empty, state=empty_state).shape == (1, 0)
    narrow, narrow_state = F.quantize_nf4(weight[:, :0])
    assert torch.equal(F.gemv_4bit(a[None, :0], narrow, state=narrow_state), torch.zeros(1, 6, device=device))


def test_threads_change_nothing(device: torch.device) -> None:
    x = ref.awkward((301, 640), torch.float32, seed=1, bad=True).to(device)
    seen = set()
    for count in (1, 2, 5):
        with torch_threads(count):
            packed, state = F.quantize_nf4(x)
            seen.add(bits(packed) + bits(state.absmax) + bits(F.dequantize_4bit(packed, state)))
    assert len(seen) == 1


def test_threads_change_nothing_in_a_product(device: torch.device) -> None:
    """As large a weight as two threads share; smaller ones have one."""
    stored = torch.randint(0, 256, (2101 * 4096,), dtype=torch.uint8, device=device)
    absmax, a = torch.rand(2101 * 128, device=device), torch.randn(8192, device=device)
    code = F.get_4bit_type("nf4", device)
    seen = set()
    for count in (1, 2, 5):
        with torch_threads(count):
            seen.add(bits(torch.ops.optim8.gemv_4bit(a, stored, [2101, 8192], absmax, code, 64)))
    assert len(seen) == 1


@pytest.mark.slow
def test_more_than_2_to_the_31_values(device: torch.device) -> None:
    n = 2**31 + 4097
    x = torch.zeros(n, dtype=torch.bfloat16, device=device)
    x[-1], x[2**31] = 3.0, -2.0
    packed, state = F.quantize_nf4(x)
    del x
    back = F.dequantize_nf4(packed, state)
    assert back[-1] == 3.0
    assert back[2**31] == -2.0
    assert back.count_nonzero() == 2
    rows, columns = 2**15 + 1, 2**16
    stored = torch.zeros(rows * columns // 2, dtype=torch.uint8, device=device)
    stored[-columns // 2 :] = 0x33  # the code of 1, twice
    absmax = torch.full((rows * columns // 4096,), 2.0, device=device)
    code = F.get_4bit_type("fp4", device)
    row = torch.ones(columns, device=device)
    found = torch.ops.optim8.gemv_4bit(row, stored, [rows, columns], absmax, code, 4096)
    assert found[-1] == 2 * columns
    assert found.count_nonzero() == 1
