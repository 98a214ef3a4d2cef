"""The dynamic 8-bit code, of the functional API and of the optimizers: exact values, nearest codes, bad values."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from support.harness import DTYPES, codes_of, load_state, parameter, values
from support.rounding import UNIT

from optim8 import _native
from optim8 import functional as F

SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def _code(signed: bool, device: torch.device) -> torch.Tensor | None:
    """How a caller names the map: the signed one is the default."""
    return None if signed else F.create_dynamic_map(signed=False).to(device)


def _sweep() -> npt.NDArray[np.float32]:
    """Float32 values of [0, 1]: every 1021st bit pattern, and all patterns within 40 of each midpoint and value."""
    patterns = [np.arange(0, 0x3F800001, 1021, dtype=np.int32)]
    for signed in (True, False):
        table = reference.dynamic_map(signed).astype(np.float64)
        table = table[table >= 0]
        marks = np.concatenate([table, (table[1:] + table[:-1]) / 2]).astype(np.float32).view(np.int32)
        patterns.append((marks[:, None] + np.arange(-40, 41, dtype=np.int32)).ravel())
    together = np.unique(np.concatenate(patterns))
    return together[(together >= 0) & (together <= 0x3F800000)].view(np.float32)


def _assert_nearest(
    codes: npt.NDArray[np.uint8], y: npt.NDArray[np.float32], signed: bool, roundings: npt.ArrayLike = 0
) -> None:
    """Each code is the nearest entry, or a neighbour where `y` is within the encoder's rounding of the midpoint.

    `roundings`: by how many units of 2^-24 the quotient that the encoder saw may differ from `y`.
    """
    exact, table = y.astype(np.float64), reference.dynamic_map(signed)
    best = table[reference.nearest(table, exact)].astype(np.float64)
    chosen = table[codes].astype(np.float64)
    excess = np.abs(chosen - exact) - np.abs(best - exact)
    slack = reference.code_slack(exact) + np.asarray(roundings) * UNIT * np.abs(exact)
    wrong = np.flatnonzero(excess > 2 * slack)
    assert not wrong.size, f"{wrong.size} codes are not the nearest, first: {y[wrong[0]]!r} -> {codes[wrong[0]]}"
    assert (codes[y == 0] == reference.zero_code(signed)).all()


@SIGNED
def test_the_map(signed: bool) -> None:
    table = F.create_dynamic_map(signed=signed)
    assert table.dtype == torch.float32
    digest = hashlib.sha256(table.cpu().numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == reference.MAP_SHA256[signed]
    zero = _native.cpu().zero_code(signed)
    assert zero == reference.zero_code(signed)
    assert table[zero] == 0


@pytest.mark.parametrize("absmax", [1.0, 2.0**-149, 2.0**-140, 1e-30, 0.3, 3e38])
@SIGNED
def test_every_code_decodes_to_its_table_value(signed: bool, absmax: float, device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    code = F.create_dynamic_map(signed=signed).to(device)
    ours = F.dequantize_blockwise(codes, absmax=torch.tensor([absmax], device=device), code=code, blocksize=256)
    expected = reference.dynamic_map(signed) * np.float32(absmax)
    assert np.array_equal(ours.cpu().numpy(), expected)


@SIGNED
def test_table_values_encode_to_themselves(signed: bool, device: torch.device) -> None:
    table = torch.from_numpy(reference.dynamic_map(signed)).to(device)
    codes, state = F.quantize_blockwise(table, code=_code(signed, device), blocksize=256)
    assert codes.tolist() == list(range(256))
    assert state.absmax.tolist() == [1.0]


@SIGNED
def test_dense_sweep_is_nearest(signed: bool, device: torch.device) -> None:
    y = _sweep()
    y = np.concatenate([y, -y]) if signed else y
    lanes = 63  # and a 1.0, so that the quotient is the value itself
    y = np.resize(y, (-(-y.size // lanes), lanes))
    x = np.concatenate([y, np.ones((len(y), 1), np.float32)], 1)
    codes, state = F.quantize_blockwise(torch.from_numpy(x).to(device), code=_code(signed, device), blocksize=64)
    assert (state.absmax == 1).all()
    ours = codes_of(codes).reshape(x.shape)
    _assert_nearest(ours.ravel(), x.ravel(), signed)
    order = np.argsort(x.ravel(), kind="stable")
    assert (np.diff(ours.ravel()[order].astype(int)) >= 0).all(), "codes must not fall while values rise"


@pytest.mark.slow
@SIGNED
def test_every_float32_pattern_is_nearest(signed: bool) -> None:
    """All of [0, 1], 2^30 values: codes never fall, and each of the steps between codes is near its midpoint."""
    native, last, chunk = _native.cpu(), reference.zero_code(signed), 1 << 24
    for start in range(0, 0x3F800001, chunk):
        y = np.arange(start, min(start + chunk, 0x3F800001), dtype=np.int32).view(np.float32)
        codes = torch.empty(y.size, dtype=torch.uint8)
        native.encode_quotients(torch.from_numpy(y), codes, signed, torch.get_num_threads())
        steps = np.diff(codes.numpy().astype(np.int16), prepend=last)
        last = codes[-1].item()
        assert ((steps == 0) | (steps == 1)).all()
        up = np.flatnonzero(steps)
        around = np.union1d(up, np.maximum(up - 1, 0))
        _assert_nearest(codes.numpy()[around], y[around], signed)
    assert last == 255


# The optimizer has encoders and decoders of its own, one per instruction set. With both betas 0 the new moments are g
# and g^2, so it encodes what it is given.


def _moments_of(name: str, g: npt.NDArray[np.float32], device: torch.device) -> Any:
    p = parameter(torch.zeros(g.size, device=device), torch.from_numpy(g.ravel()).to(device))
    hyper = {**CASES[name].without_decay(), "betas": (0.0, 0.0)}
    optimizer = CASES[name].make([p], hyper, maximize=False, rounding="nearest")
    optimizer.step()
    return optimizer.state[p]


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_the_step_encodes_m_to_the_nearest(name: str, device: torch.device) -> None:
    y = _sweep()
    y = np.concatenate([y, -y])
    y = np.resize(y, (-(-y.size // 255), 255))
    g = np.concatenate([y, np.ones((len(y), 1), np.float32)], 1)
    state = _moments_of(name, g, device)
    assert (state["exp_avg_absmax"] == 1).all()
    codes = codes_of(state["exp_avg_codes"])
    _assert_nearest(codes, g.ravel(), signed=True)
    functional, _ = F.quantize_blockwise(torch.from_numpy(g), blocksize=256)
    assert np.array_equal(codes, codes_of(functional)), "step and functional API have different codes"


def test_the_step_encodes_v_to_the_nearest(device: torch.device) -> None:
    root = _sweep()
    root = np.resize(root[root > 2.0**-74], (-(-root.size // 255), 255))  # their squares are positive
    g = np.concatenate([root, np.ones((len(root), 1), np.float32)], 1)
    state = _moments_of("AdamW8bit", g, device)
    assert (state["exp_avg_sq_root_absmax"] == 1).all()
    codes, y = codes_of(state["exp_avg_sq_root_codes"]), g.ravel()
    smallest = reference.dynamic_map(signed=False)[1]
    assert (codes[y < smallest] == 1).all(), "a positive v takes the smallest positive code at least"
    _assert_nearest(codes[y >= smallest], y[y >= smallest], signed=False)


def test_the_adam_step_decodes_m_exactly(device: torch.device) -> None:
    """With b1 = 1/2, g = v = 0, eps = lr = 1 and 1 - b1^t = 1 the step is p = -m / 2, without a rounding."""
    p = parameter(torch.zeros(256, device=device), torch.zeros(256, device=device))
    hyper = {"lr": 1.0, "betas": (0.5, 0.5), "eps": 1.0, "weight_decay": 0.0}
    optimizer = CASES["AdamW8bit"].make([p], hyper, rounding="nearest")
    codes = torch.arange(256, dtype=torch.uint8)
    zero, one = torch.zeros(256, dtype=torch.uint8), torch.ones(1)
    state = {"exp_avg_codes": codes, "exp_avg_absmax": one}
    state |= {"exp_avg_sq_root_codes": zero, "exp_avg_sq_root_absmax": torch.zeros(1)}
    load_state(optimizer, {0: {"step": torch.tensor(4000.0), **state}})
    optimizer.step()
    assert np.array_equal(values(p), -0.5 * reference.dynamic_map(signed=True).astype(np.float64))
    # Half of every value is half of the absmax.
    assert codes_of(optimizer.state[p]["exp_avg_codes"]).tolist() == list(range(256))
    assert optimizer.state[p]["exp_avg_absmax"].item() == 0.5


def test_the_adam_step_decodes_v_exactly(device: torch.device) -> None:
    """With m = 2, b1 = b2 = 1/2, g = eps = 0 and lr = 1 the step is p = -1 / sqrt(v / 2), IEEE root and division, and v
    is the square of a value of the code."""
    p = parameter(torch.zeros(256, device=device), torch.zeros(256, device=device))
    hyper = {"lr": 1.0, "betas": (0.5, 0.5), "eps": 0.0, "weight_decay": 0.0}
    optimizer = CASES["AdamW8bit"].make([p], hyper, rounding="nearest")
    codes = torch.arange(256, dtype=torch.uint8)
    full = torch.full((256,), 255, dtype=torch.uint8)
    state = {"exp_avg_codes": full, "exp_avg_absmax": torch.tensor([2.0]), "exp_avg_sq_root_codes": codes}
    load_state(optimizer, {0: {"step": torch.tensor(4000.0), **state, "exp_avg_sq_root_absmax": torch.ones(1)}})
    optimizer.step()
    half = np.square(reference.dynamic_map(signed=False)[1:]) * np.float32(0.5)
    assert np.array_equal(values(p)[1:], (-np.float32(1) / np.sqrt(half)).astype(np.float64))
    assert codes_of(optimizer.state[p]["exp_avg_sq_root_codes"]).tolist() == list(range(256))


def test_the_lion_step_decodes_m_exactly(device: torch.device) -> None:
    """With b1 = 1/2 the sign of m - table[c] is 0 if and only if the step decodes c to exactly table[c]."""
    table = reference.dynamic_map(signed=True)
    for nudge, moved in ((0, False), (1, True), (-1, True)):
        g = -(table.view(np.int32) + np.where(table == 0, abs(nudge), nudge)).astype(np.int32).view(np.float32)
        p = parameter(torch.zeros(256, device=device), torch.from_numpy(g).to(device))
        hyper = {"lr": 1.0, "betas": (0.5, 0.5), "weight_decay": 0.0}
        optimizer = CASES["Lion8bit"].make([p], hyper, rounding="nearest")
        state = {"exp_avg_codes": torch.arange(256, dtype=torch.uint8), "exp_avg_absmax": torch.ones(1)}
        load_state(optimizer, {0: {"step": torch.tensor(3.0), **state}})
        optimizer.step()
        # The half of the smallest subnormal underflows to 0: the nudge of 0 is not seen.
        seen = np.full(256, moved) & (table != 0)
        assert np.array_equal(values(p) != 0, seen)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOATS, min_size=1, max_size=300), st.sampled_from(BLOCKSIZES), st.booleans())
def test_round_trip_error(x: list[float], blocksize: int, signed: bool) -> None:
    """Nearest entries, so within half the widest gap of the map, or its distance from -1: 0.0071 of absmax."""
    a = np.array(x, np.float32) if signed else np.abs(np.array(x, np.float32))
    code = None if signed else F.create_dynamic_map(signed=False)
    codes, state = F.quantize_blockwise(torch.from_numpy(a), code=code, blocksize=blocksize)
    back = F.dequantize_blockwise(codes, state).numpy().astype(np.float64)
    starts = np.arange(0, a.size, blocksize)
    top = np.maximum.reduceat(np.abs(a), starts)
    assert np.array_equal(state.absmax.numpy(), top)
    top = np.repeat(top.astype(np.float64), blocksize)[: a.size]
    table = reference.dynamic_map(signed).astype(np.float64)
    assert np.isfinite(back).all()
    assert (back[a == 0] == 0).all()
    assert (np.sign(back) * np.sign(a) >= 0).all()
    normal = top >= 2.0**-120  # smaller blocks only promise to stay finite: their products are subnormal
    gap = np.diff(table).max() / 2 if not signed else 1 - 0.99296875
    assert (np.abs(back - a) <= top * (gap + 4e-7))[normal].all()
    y = np.divide(a, top, out=np.zeros(a.size), where=normal)
    # The reciprocal, the product, and y itself; the reciprocal of more than 2^126 is subnormal: four units more.
    roundings = np.where(top > 2.0**126, 7, 3)[normal]
    _assert_nearest(codes_of(codes)[normal], y[normal].astype(np.float32), signed, roundings)


BAD_ROWS = [(float("nan"), 0.0), (float("inf"), 1.0), (-float("inf"), -0.99296875)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bad", "decoded"), BAD_ROWS)
def test_non_finite_inputs_do_not_spread(bad: float, decoded: float, dtype: str, device: torch.device) -> None:
    x = torch.linspace(-2, 2, 700).to(device, DTYPES[dtype])
    x[[0, 255, 300, 699]] = bad
    clean = x.clone()
    clean[[0, 255, 300, 699]] = 0
    codes, state = F.quantize_blockwise(x, blocksize=256)
    expected, clean_state = F.quantize_blockwise(clean, blocksize=256)
    others = [i for i in range(700) if i not in (0, 255, 300, 699)]
    assert torch.equal(state.absmax, clean_state.absmax)
    assert torch.equal(codes[others], expected[others])
    assert (reference.dynamic_map(signed=True)[codes_of(codes[[0, 255, 300, 699]])] == np.float32(decoded)).all()
    all_bad, bad_state = F.quantize_blockwise(torch.full((70,), bad, device=device), blocksize=64)
    assert (bad_state.absmax == 0).all()
    assert F.dequantize_blockwise(all_bad, bad_state).isfinite().all()


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 4095, 4096, 4097, 100_003])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_sizes_dtypes_and_blocksizes(n: int, dtype: str, blocksize: int, device: torch.device) -> None:
    rng = np.random.default_rng(n)
    x = torch.from_numpy(rng.standard_normal(n)).to(device, DTYPES[dtype])
    codes, state = F.quantize_blockwise(x, blocksize=blocksize)
    assert codes.shape == x.shape
    assert codes.dtype == torch.uint8
    assert state.absmax.shape == (-(-n // blocksize),)
    back = F.dequantize_blockwise(codes, state)
    assert back.dtype == x.dtype
    if n:
        a = values(x).astype(np.float32)
        top = np.maximum.reduceat(np.abs(a), np.arange(0, n, blocksize))
        assert np.array_equal(state.absmax.cpu().numpy(), top)
        scale = np.repeat(top, blocksize)[:n]
        y = (a * (np.float32(1) / scale)).astype(np.float32)
        _assert_nearest(codes_of(codes), y, signed=True)
        exact = torch.from_numpy(reference.dynamic_map(signed=True)[codes_of(codes)] * scale)
        assert torch.equal(back.cpu(), exact.to(x.dtype)), "table value times absmax in float32, rounded once"
