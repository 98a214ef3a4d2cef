"""quantize_blockwise and dequantize_blockwise against their definition in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from support import functional_reference as ref
from support.harness import DTYPES, bits, torch_threads

from optim8 import functional as F

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAPS = {
    "dynamic": lambda: F.create_dynamic_map(),
    "dynamic unsigned": lambda: F.create_dynamic_map(signed=False),
    "dynamic 4 bits": lambda: F.create_dynamic_map(True, 3, 4),
    "linear": lambda: F.create_linear_map(),
    "linear unsigned": lambda: F.create_linear_map(signed=False),
    "normal": lambda: F.create_normal_map(),
    "fp8": lambda: F.create_fp8_map(),
    "lopsided": lambda: torch.linspace(-0.1, 3.0, 256) ** 3,
}


def check(x: torch.Tensor, codes: torch.Tensor, state: F.QuantState, blocksize: int, dynamic: bool) -> None:
    """That codes and absmax of `x` are what the definition says, and that dequantization undoes them exactly."""
    values = ref.values_of(x)
    assert codes.shape == x.shape
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous()
    absmax = ref.finite_max(values, blocksize)
    assert state.absmax.dtype == torch.float32
    assert np.array_equal(ref.values_of(state.absmax), absmax)
    y = ref.quotients(values, absmax, blocksize)
    table = state.code.cpu().numpy()
    slack = reference.code_slack(np.clip(y, -1, 1)) if dynamic else 0.0
    found = codes.cpu().flatten().numpy()
    assert ref.not_nearest(found, y, table, slack).tolist() == []
    assert (table[found[values == 0]] == table[np.abs(table).argmin()]).all()
    back = F.dequantize_blockwise(codes, state)
    expanded = torch.from_numpy(ref.spread(absmax, blocksize, values.size).astype(np.float32))
    expected = (torch.from_numpy(table)[torch.from_numpy(found).long()] * expanded).to(x.dtype).view(x.shape)
    assert back.dtype == x.dtype
    assert bits(back) == bits(expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("blocksize", [1, 2, 3, 31, 33, 100, 257, 5000, 16384, 2**62])
def test_any_block_size_on_the_cpu(dtype: torch.dtype, blocksize: int) -> None:
    for n in (0, 1, 99, 20_001):
        x = ref.awkward((n,), dtype, seed=n, bad=True)
        codes, state = F.quantize_blockwise(x, blocksize=blocksize)
        assert state.blocksize == blocksize
        check(x, codes, state, min(blocksize, max(n, 1)), dynamic=True)
        assert F.QuantState.from_dict(state.as_dict(), "cpu") == state


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_codes_are_the_nearest_entries(device: torch.device, dtype: torch.dtype, blocksize: int) -> None:
    for n in (0, 1, 3, blocksize - 1, blocksize, blocksize + 1, 5 * blocksize + 7):
        for bad in (False, True):
            x = ref.awkward((n,), dtype, seed=n, bad=bad).to(device)
            before = bits(x)
            codes, state = F.quantize_blockwise(x, blocksize=blocksize)
            check(x, codes, state, blocksize, dynamic=True)
            assert bits(x) == before


@pytest.mark.parametrize("name", MAPS)
def test_any_sorted_map_is_searched_right(device: torch.device, name: str) -> None:
    code = MAPS[name]().to(device)
    for dtype in DTYPES.values():
        x = ref.awkward((1000,), dtype, seed=5, bad=True).to(device)
        codes, state = F.quantize_blockwise(x, code=code, blocksize=256)
        assert state.code.data_ptr() == code.data_ptr()
        check(x, codes, state, 256, dynamic=name.startswith("dynamic"))


@pytest.mark.parametrize(
    "case",
    [
        "scalar",
        "3-D",
        "empty 2-D",
        "transposed",
        "strided",
        "channels last",
        "expanded",
        "offset",
        "requires grad",
        "neg",
    ],
)
def test_any_shape_and_strides(device: torch.device, case: str) -> None:
    x = torch.randn(6, 10, 8, 8, device=device)
    x = {
        "scalar": lambda: torch.tensor(-2.5, device=device),
        "3-D": lambda: x[0],
        "empty 2-D": lambda: torch.empty(3, 0, device=device),
        "transposed": lambda: x[0, :, :, 0].t(),
        "strided": lambda: x[:, ::3, 1:7:2],
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "expanded": lambda: x[0, 0, 0].expand(40, 8),
        "offset": lambda: x.flatten()[3:],
        "requires grad": lambda: x.requires_grad_(),
        "neg": lambda: torch.view_as_complex(x.view(-1, 2)).conj().imag,
    }[case]()
    codes, state = F.quantize_blockwise(x, blocksize=64)
    check(x, codes, state, 64, dynamic=True)
    scattered = codes.t().contiguous().t() if codes.dim() == 2 else codes
    assert bits(F.dequantize_blockwise(scattered, state)) == bits(F.dequantize_blockwise(codes, state))


def test_constant_and_zero_blocks(device: torch.device) -> None:
    x = torch.cat([torch.zeros(64), torch.full((64,), -3.0), torch.full((64,), 1e-42), torch.full((5,), 7.0)]).to(
        device
    )
    codes, state = F.quantize_blockwise(x, blocksize=64)
    check(x, codes, state, 64, dynamic=True)
    back = F.dequantize_blockwise(codes, state)
    assert torch.equal(back[:64], x[:64])
    assert torch.equal(back[128:], x[128:])
    assert codes[:64].tolist() == [127] * 64


def test_buffers_are_filled_and_returned(device: torch.device) -> None:
    x = torch.randn(10, 50, device=device)
    absmax = torch.full((8,), -1.0, device=device)
    out = torch.zeros(10, 50, dtype=torch.uint8, device=device)
    codes, state = F.quantize_blockwise(x, absmax=absmax, out=out, blocksize=64)
    fresh, fresh_state = F.quantize_blockwise(x, blocksize=64)
    assert codes is out
    assert state.absmax is absmax
    assert torch.equal(out, fresh)
    assert torch.equal(absmax, fresh_state.absmax)
    for dtype in DTYPES.values():
        values = torch.zeros(10, 50, dtype=dtype, device=device)
        assert F.dequantize_blockwise(codes, absmax=absmax, out=values, blocksize=64) is values
        assert torch.equal(values, F.dequantize_blockwise(codes, state).to(dtype))
    nested = F.quantize_blockwise(x, absmax=absmax.zero_(), blocksize=64, nested=True)[1]
    assert torch.equal(absmax, fresh_state.absmax)
    assert nested.nested


@pytest.mark.parametrize("scale", [1.0, 2.0**-126, 1e38])
def test_nested_scales_do_not_depend_on_the_order_in_which_threads_add(scale: float) -> None:
    """Their mean is that of some 70,000 numbers, which torch adds with as many threads as it has."""
    absmax = torch.rand(70_001, dtype=torch.float64).float() * scale
    packed = {}
    for count in (1, 2, 3):
        with torch_threads(count):
            for name, order in (("forward", absmax), ("backward", absmax.flip(0))):
                x = order.repeat_interleave(32)
                packed[count, name] = F.quantize_4bit(x, blocksize=32, compress_statistics=True)[1].offset.item()
            packed[count, "8-bit"] = F.quantize_blockwise(absmax, blocksize=1, nested=True)[1].offset.item()
    assert set(packed.values()) == {torch.tensor(math.fsum(absmax.tolist()) / absmax.numel()).item()}


def test_the_mean_of_scales_far_apart() -> None:
    absmax = torch.tensor([3e38, 1.0, 2.0**-149, 0.0] * 50)
    _, state = F.quantize_blockwise(absmax, blocksize=1, nested=True)
    assert state.offset.item() == torch.tensor(math.fsum(absmax.tolist()) / 200).item()
    assert F.quantize_blockwise(torch.zeros(100), blocksize=1, nested=True)[1].offset.item() == 0


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_nesting_is_quantization_of_absmax_less_its_mean(device: torch.device, blocksize: int) -> None:
    x = torch.randn(300 * 64 + 5, device=device)
    flat_codes, flat = F.quantize_blockwise(x, blocksize=blocksize)
    codes, state = F.quantize_blockwise(x, blocksize=blocksize, nested=True)
    assert torch.equal(codes, flat_codes)
    assert state.nested
    assert state.absmax.dtype == torch.uint8
    mean = math.fsum(flat.absmax.tolist()) / flat.absmax.numel()
    assert torch.equal(state.offset, torch.tensor(mean, device=device))
    inner = flat.absmax - state.offset
    assert torch.equal(state.state2.absmax, F.quantize_blockwise(inner, blocksize=blocksize)[1].absmax)
    assert torch.equal(state.absmax, F.quantize_blockwise(inner, blocksize=blocksize)[0])
    absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    expected = F.dequantize_blockwise(codes, absmax=absmax, blocksize=blocksize)
    assert torch.equal(F.dequantize_blockwise(codes, state), expected)
    assert torch.equal(F.dequantize_blockwise(codes, state, nested=True), expected)


def test_nesting_an_empty_tensor(device: torch.device) -> None:
    codes, state = F.quantize_blockwise(torch.empty(0, 3, device=device), nested=True)
    assert F.dequantize_blockwise(codes, state).shape == (0, 3)


def test_bad_values_stay_where_they_are(device: torch.device) -> None:
    """A NaN is stored as 0 is, an infinity as the last code of its sign, and the rest of the block does not notice."""
    clean = torch.randn(256, device=device)
    bad = clean.clone()
    bad[10], bad[20], bad[30] = float("nan"), float("inf"), float("-inf")
    cleaned = clean.clone()
    cleaned[[10, 20, 30]] = 0
    codes, state = F.quantize_blockwise(bad, blocksize=256)
    expected, expected_state = F.quantize_blockwise(cleaned, blocksize=256)
    assert codes[[10, 20, 30]].tolist() == [127, 255, 0]
    expected[20], expected[30] = 255, 0
    assert torch.equal(codes, expected)
    assert torch.equal(state.absmax, expected_state.absmax)
    only_bad = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device)
    codes, state = F.quantize_blockwise(only_bad)
    assert codes.tolist() == [127, 255, 0]
    assert F.dequantize_blockwise(codes, state).tolist() == [0, 0, 0]


def test_threads_change_nothing(device: torch.device) -> None:
    x = ref.awkward((200_003,), torch.float32, seed=1, bad=True).to(device)
    seen = set()
    for count in (1, 2, 5):
        with torch_threads(count):
            codes, state = F.quantize_blockwise(x, blocksize=64)
            seen.add(bits(codes) + bits(state.absmax) + bits(F.dequantize_blockwise(codes, state)))
    assert len(seen) == 1


@pytest.mark.slow
def test_more_than_2_to_the_31_values(device: torch.device) -> None:
    n = 2**31 + 4097
    x = torch.zeros(n, dtype=torch.bfloat16, device=device)
    x[-1], x[2**31], x[2**31 + 1] = 3.0, -2.0, 1.0
    codes, state = F.quantize_blockwise(x)
    del x
    assert codes[-1] == 255
    assert codes[2**31] == 0
    back = F.dequantize_blockwise(codes, state)
    assert back[-1] == 3.0
    assert back[2**31 + 1].item() == pytest.approx(1.0, rel=2**-6)
    assert back[: 2**31].count_nonzero() == 0
