"""LLM.int8() against its definition in float64 and the exact integer product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import functional_reference as ref
from support.harness import DTYPES, bits, torch_threads
from support.rounding import half_ulp

from optim8 import functional as F
from optim8.functional.int8_matmul import _has_int8_instructions, _torch_serves

SHAPES = [(0, 5), (5, 0), (1, 1), (3, 7), (4, 63), (4, 64), (5, 65), (2, 3, 130), (9,), (300, 257)]


def rows_of(x: torch.Tensor) -> ref.Array:
    return ref.values_of(x).reshape(int(np.prod(x.shape[:-1])), x.shape[-1])


def finite_part(x: ref.Array, limit: float) -> ref.Array:
    """Magnitudes that take part in absmax: finite, and below the threshold."""
    return np.where(np.isfinite(x) & (np.abs(x) < limit), np.abs(x), 0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vectorwise_quant(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for seed, bad in ((1, False), (2, True)):
        x = ref.awkward(shape, dtype, seed, bad).to(device)
        before = bits(x)
        codes, stats, columns = F.int8_vectorwise_quant(x)
        values = rows_of(x)
        absmax = finite_part(values, np.inf).max(axis=1, initial=0)
        assert (codes.dtype, codes.shape, columns) == (torch.int8, x.shape, None)
        assert (stats.dtype, stats.shape) == (torch.float32, (values.shape[0],))
        assert np.array_equal(ref.values_of(stats), absmax)
        assert np.array_equal(rows_of(codes), ref.int8_codes(values, absmax[:, None]))
        assert bits(x) == before


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("threshold", [1e-60, 0.5, 2.0, 3.0, 1e4, 1e300])
def test_outlier_columns(device: torch.device, threshold: float, dtype: torch.dtype) -> None:
    for shape, bad in (((6, 300), False), ((6, 300), True), ((2, 3, 65), True), ((0, 4), False), ((3, 0), False)):
        x = (torch.randn(shape) * torch.linspace(0.01, 2, shape[-1])).to(dtype)
        if bad:
            x[..., 5], x[..., 1, 7], x[..., 0, 8] = 2.0, float("inf"), float("nan")
        x = x.to(device)
        before = bits(x)
        values, limit = rows_of(x), min(threshold, 2.0**127)
        outlier = (np.abs(values) >= max(limit, 1e-45)).any(axis=0)
        absmax = finite_part(values, max(limit, 1e-45)).max(axis=1, initial=0)
        codes, stats, columns = F.int8_vectorwise_quant(x, threshold)
        assert columns.dtype == torch.int32
        assert columns.tolist() == np.flatnonzero(outlier).tolist()
        assert np.array_equal(ref.values_of(stats), absmax)
        expected = ref.int8_codes(np.where(outlier, 0.0, values), absmax[:, None])
        assert np.array_equal(rows_of(codes), expected)
        assert bits(x) == before


def test_ties_go_to_even(device: torch.device) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]], device=device)
    for scale in (1.0, 2.0**-100, 3.0, 7 / 127):
        codes, _, _ = F.int8_vectorwise_quant((x.double() * scale).float())
        exact = (x.double() * scale).float().double()
        assert codes.tolist() == torch.round(127 * exact / exact.abs().max()).tolist()
    assert F.int8_vectorwise_quant(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, 126, -126]]


def test_rounding_is_exact_near_ties(device: torch.device) -> None:
    """Values within some float32 spacings of a tie, for absmax with a full mantissa."""
    rng = np.random.default_rng(0)
    absmax = np.float32(1) + rng.random(200, dtype=np.float32)
    half = np.arange(-126, 127) + 0.5
    x = (half[None, :] * absmax[:, None] / 127).astype(np.float32)
    for _ in range(2):
        x = np.concatenate([np.nextafter(x, np.float32(-4)), x, np.nextafter(x, np.float32(4))], axis=1)
    x = np.concatenate([x, absmax[:, None]], axis=1)
    codes, stats, _ = F.int8_vectorwise_quant(torch.from_numpy(x).to(device))
    assert np.array_equal(ref.values_of(stats), absmax)
    assert np.array_equal(rows_of(codes), ref.int8_codes(x.astype(np.float64), absmax[:, None].astype(np.float64)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vectorwise_dequant(device: torch.device, shape: tuple[int, ...]) -> None:
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
    stats = torch.rand(int(np.prod(shape[:-1])), device=device) * 100
    found = F.int8_vectorwise_dequant(codes, stats)
    assert (found.dtype, found.shape) == (torch.float32, codes.shape)
    expected = rows_of(codes) * ref.values_of(stats)[:, None] / 127
    assert (np.abs(rows_of(found) - expected) <= 1.0001 * half_ulp("float32", expected)).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_double_quant(device: torch.device, threshold: float, dtype: torch.dtype) -> None:
    for shape in ((6, 130), (2, 3, 64), (1, 1), (0, 4), (3, 0), (70, 65)):
        x = torch.randn(shape).to(dtype)
        if shape == (6, 130):
            x[2, 3], x[4, 5], x[1, 8] = float("nan"), float("inf"), float("-inf")
        x = x.to(device)
        rows, columns, row_stats, col_stats, outliers = F.int8_double_quant(x, threshold=threshold)
        expected = F.int8_vectorwise_quant(x, threshold)
        for found, wanted in zip((rows, row_stats, outliers), expected):
            assert found is wanted is None or torch.equal(found, wanted)
        values, limit = rows_of(x), threshold or np.inf
        absmax = finite_part(values, limit).max(axis=0, initial=0)
        assert (columns.dtype, columns.shape) == (torch.int8, x.shape)
        assert np.array_equal(ref.values_of(col_stats), absmax)
        kept = np.where(np.abs(values) >= limit, 0.0, values) if threshold else values
        assert np.array_equal(rows_of(columns), ref.int8_codes(kept, absmax[None, :]))


def test_double_quant_fills_its_buffers(device: torch.device) -> None:
    x = torch.randn(6, 10, device=device)
    given = {
        "out_row": torch.zeros(6, 10, dtype=torch.int8, device=device),
        "out_col": torch.zeros(6, 10, dtype=torch.int8, device=device),
        "row_stats": torch.zeros(6, device=device),
        "col_stats": torch.zeros(10, device=device),
    }
    found = F.int8_double_quant(x, **given)[:4]
    for buffer, result, wanted in zip(given.values(), found, F.int8_double_quant(x)[:4]):
        assert result is buffer
        assert torch.equal(buffer, wanted)


@pytest.mark.parametrize(
    "left, columns",
    [
        ((3, 5), 4),
        ((1, 1), 1),
        ((0, 8), 3),
        ((3, 0), 2),
        ((3, 8), 0),
        ((2, 3, 17), 33),
        ((64,), 5),
        ((17, 2048), 16),
        ((33, 64), 24),
    ],
    ids=str,
)
def test_linear_matmul_is_exact(device: torch.device, left: tuple[int, ...], columns: int) -> None:
    a = torch.randint(-128, 128, left, dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (columns, left[-1]), dtype=torch.int8, device=device)
    expected = (a.cpu().long() @ b.cpu().long().t()).int()
    found = F.int8_linear_matmul(a, b)
    assert found.dtype == torch.int32
    assert torch.equal(found.cpu(), expected)
    out = torch.full(expected.shape, 7, dtype=torch.int32, device=device)
    assert F.int8_linear_matmul(a, b, out=out) is out
    assert torch.equal(out.cpu(), expected)
    strided = torch.zeros(columns, 2 * left[-1], dtype=torch.int8, device=device)[:, ::2]
    strided.copy_(b)
    assert torch.equal(F.int8_linear_matmul(a.expand(2, *left), strided).cpu(), expected.expand(2, *expected.shape))


@pytest.mark.parametrize("k", [4095, 65_537, 131_071])
def test_sums_beyond_float32_are_exact(device: torch.device, k: int) -> None:
    a = torch.full((2, k), -128, dtype=torch.int8, device=device)
    a[1] = 127
    a[:, 0] = 1
    b = torch.stack([a[0], a[1], torch.randint(-128, 128, (k,), dtype=torch.int8, device=device)])
    expected = (a.cpu().long() @ b.cpu().long().t()).int()
    assert torch.equal(F.int8_linear_matmul(a, b).cpu(), expected)


def test_the_native_product_is_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where torch's own int8 product is missing, or saturates."""
    a = torch.randint(-128, 128, (9, 700), dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (21, 700), dtype=torch.int8, device=device)
    expected = F.int8_linear_matmul(a, b)
    monkeypatch.setattr("optim8.functional.int8_matmul._torch_serves", lambda *_: False)
    assert torch.equal(F.int8_linear_matmul(a, b), expected)
    out = torch.empty_like(expected)
    assert F.int8_linear_matmul(a[:, ::2], b[:, ::2], out=out) is out
    assert torch.equal(out.cpu(), (a[:, ::2].cpu().long() @ b[:, ::2].cpu().long().t()).int())


@pytest.mark.parametrize(
    "extents, serves",
    [
        ((17, 8, 8), True),
        ((4096, 4096, 1024), True),
        *[(extents, False) for extents in ((16, 8, 8), (17, 7, 8), (17, 8, 12), (17, 0, 8), (17, 8, 0), (0, 8, 8))],
    ],
    ids=str,
)
def test_on_a_gpu_torchs_product_has_the_shapes_that_it_takes(extents: tuple[int, int, int], serves: bool) -> None:
    """More than 16 rows, and multiples of 8; other shapes are those of the module's own kernel."""
    assert _torch_serves("cuda", *extents) == serves


@pytest.mark.parametrize(
    "known, has",
    [
        ({"architecture": "x86_64", "avx512_vnni": False, "avx_vnni": False, "amx_int8": False}, False),
        ({"architecture": "x86_64", "avx512_vnni": False, "avx_vnni": True, "amx_int8": False}, True),
        ({"architecture": "aarch64"}, True),
        ({}, True),
    ],
    ids=["Skylake", "Alder Lake", "Arm", "unknown"],
)
def test_without_instructions_for_bytes_torchs_product_is_left(
    known: dict[str, object], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own product is taken then; where nobody knows, torch's."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr("optim8.functional.int8_matmul._torch_is_exact", lambda *_: True)
    _has_int8_instructions.cache_clear()
    try:
        assert _torch_serves("cpu", 4096, 4096, 1024) == has
    finally:
        _has_int8_instructions.cache_clear()


@pytest.mark.parametrize("bias", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 4), (4, 0), (2, 3, 65), (7,), (40, 128)], ids=str)
def test_mm_dequant(device: torch.device, shape: tuple[int, ...], bias: str | None) -> None:
    sums = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device)
    rows = torch.rand(int(np.prod(shape[:-1])), device=device) * 0.02
    columns = torch.rand(shape[-1], device=device) * 0.02
    added = None if bias is None else torch.randn(shape[-1], device=device).to(DTYPES[bias])
    exact = rows_of(sums) * ref.values_of(rows)[:, None] * ref.values_of(columns) / 127**2
    exact = exact + (0 if added is None else ref.values_of(added))
    found = F.int8_mm_dequant(sums, rows, columns, bias=added)
    assert (found.dtype, found.shape) == (torch.float16, sums.shape)
    # Rounded to float32, then to float16.
    slack = half_ulp("float16", exact) + 2 * half_ulp("float32", exact)
    assert (np.abs(rows_of(found) - exact) <= slack).all()
    out = torch.empty(shape, dtype=torch.float16, device=device)
    assert F.int8_mm_dequant(sums, rows, columns, out, added) is out
    assert torch.equal(out, found)


def test_the_constant_is_one_over_127_squared(device: torch.device) -> None:
    """Seen in float32: 1.8e-5 too much would show."""
    sums = torch.tensor([[127 * 127 * 100]], dtype=torch.int32, device=device)
    one = torch.ones(1, device=device)
    found = torch.ops.optim8.int8_mm_dequant(sums, one, one, dtype=torch.float32)
    assert found.item() == 100.0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 33), (0, 8), (4, 0), (600, 70)], ids=str)
def test_scaled_mm_is_the_two_in_one(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for n in (0, 1, 9, 500):
        a = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        b = torch.randint(-127, 128, (n, shape[-1]), dtype=torch.int8, device=device)
        rows, columns = torch.rand(int(np.prod(shape[:-1])), device=device), torch.rand(n, device=device)
        for bias in (None, torch.randn(n, device=device).half()):
            found = F.int8_scaled_mm(a, b, rows, columns, bias, dtype)
            sums = F.int8_linear_matmul(a, b)
            expected = torch.ops.optim8.int8_mm_dequant(sums, rows, columns, dtype, bias)
            assert found.dtype == dtype
            assert found.shape == (*shape[:-1], n)
            assert torch.equal(found, expected)


def test_scaled_mm_holds_no_large_intermediate() -> None:
    """1 MiB of int32 at a time: watched through torch's own allocations."""
    a = torch.ones(2048, 8, dtype=torch.int8)
    b = torch.ones(4096, 8, dtype=torch.int8)
    stats = torch.ones(2048), torch.ones(4096)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        F.int8_scaled_mm(a, b, *stats)
    events = profile.profiler.kineto_results.events()
    allocated = sorted(event.nbytes() for event in events if event.name() == "[memory]")
    assert allocated[-1] == 2048 * 4096 * 2
    assert 0 < allocated[-2] <= 1 << 20


def test_a_whole_layer(device: torch.device) -> None:
    """Quantize, multiply, scale back: the error of 8 bits, and no more."""
    x, w = torch.randn(64, 256, device=device), torch.randn(32, 256, device=device)
    (qx, sx, _), (qw, sw, _) = F.int8_vectorwise_quant(x), F.int8_vectorwise_quant(w)
    found = F.int8_scaled_mm(qx, qw, sx, sw, dtype=torch.float32).double()
    expected = x.double() @ w.double().t()
    # Each factor is off by half a step of absmax / 127.
    steps = (sx[:, None].double() * w.abs().sum(1).double() + x.abs().sum(1).double()[:, None] * sw.double()) / 254
    assert ((found - expected).abs() <= 1.01 * steps + 256 * sx[:, None] * sw / 254**2).all()


def test_threads_change_nothing(device: torch.device) -> None:
    x = ref.awkward((200, 300), torch.float32, 1, True).to(device)
    seen = set()
    for count in (1, 2, 5):
        with torch_threads(count):
            results = F.int8_double_quant(x, threshold=3.0)
            back = F.int8_vectorwise_dequant(results[0], results[2])
            product = F.int8_scaled_mm(results[0], results[0], results[2], results[2])
            seen.add(b"".join(map(bits, (*results, back, product))))
    assert len(seen) == 1


@pytest.mark.slow
def test_more_than_2_to_the_31_values(device: torch.device) -> None:
    rows, columns = 2**16 + 1, 2**15 + 1
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    x[-1, -1], x[-1, 0], x[-2, 5] = -2.0, 1.0, 8.0
    codes, stats, outliers = F.int8_vectorwise_quant(x, 6.0)
    del x
    assert outliers.tolist() == [5]
    assert stats[-2:].tolist() == [0, 2]
    assert codes[-1, [0, -1]].tolist() == [64, -127]
    assert codes.count_nonzero() == 2
