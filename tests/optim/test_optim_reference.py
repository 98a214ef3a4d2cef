"""The references themselves: against torch.optim in float64, published numbers, and float32 done by numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
import reference
import torch
from cases import EVERY, Case
from hypothesis import given
from hypothesis import strategies as st
from support.rounding import Rounded

f32 = np.float32


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_published_one(signed: bool) -> None:
    table = reference.dynamic_map(signed)
    assert hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == reference.MAP_SHA256[signed]
    assert table[reference.zero_code(signed)] == 0
    assert table[255] == 1
    assert (np.diff(table) > 0).all()


def test_nearest_by_hand() -> None:
    table = np.array([-1, 0, 0.5, 1], np.float32)
    y = [-9, -0.5, -0.4, 0, 0.25, 0.26, 0.75, 0.76, 9]
    assert reference.nearest(table, y).tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3]


def test_wrong_codes_sees_one_wrong_code() -> None:
    rng = np.random.default_rng(0)
    for signed in (True, False):
        x = rng.standard_normal(1000) if signed else rng.standard_normal(1000) ** 2
        codes, absmax = reference.encode(x, signed)
        assert (absmax == [abs(x[i : i + 256]).max() for i in range(0, 1000, 256)]).all()
        assert not reference.wrong_codes(codes, Rounded.exact(x), signed).size
        codes[777] ^= 2
        assert reference.wrong_codes(codes, Rounded.exact(x), signed).tolist() == [777]
    zero = np.zeros(300, np.uint8)
    v = np.full(300, 1e-9)
    v[5] = 1
    assert reference.wrong_codes(zero, Rounded.exact(v), signed=False).size == 300, "a positive v may not code to 0"


@pytest.fixture
def float64() -> Iterator[None]:
    """As torch's default dtype: that of the scalars that it keeps for each parameter."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("case", [c for c in EVERY if c.torch_class], ids=str)
def test_rules_equal_torch_in_float64(case: Case, row: int) -> None:
    hyper = {**case.hypers[row]}
    rng = np.random.default_rng(row)
    x = rng.standard_normal(100)
    p = torch.nn.Parameter(torch.from_numpy(x.copy()))
    assert case.torch_class is not None
    peer = case.torch_class([p], **hyper)
    ours, states = Rounded.exact(x), {name: Rounded.exact(start) for name, start in case.running.items()}
    kept = {name: np.full(100, case.start(name, hyper)) for name in case.states_of(hyper)}
    states |= {name: Rounded.exact(start) for name, start in kept.items()}
    for t in range(1, 10):
        g = rng.standard_normal(100)
        p.grad = torch.from_numpy(g)
        peer.step()
        ours, states = case.rule(Rounded.exact(ours.value), Rounded.exact(g), states, t=t, **hyper)
        # Both are float64: at most some tens of roundings of 2^-53 apart.
        np.testing.assert_allclose(ours.value, p.detach().numpy(), rtol=1e-14, atol=1e-15)
        assert set(peer.state[p]) - {"step"} == set(states) == {*kept, *case.running}
        for name in states:
            np.testing.assert_allclose(states[name].value, peer.state[p][name].numpy(), rtol=1e-14, atol=1e-15)


def test_lion_by_hand() -> None:
    """arXiv 2302.06675, alg. 2: c = .5 * .2 - .5 * .4 = -.1, p = 2 (1 - .1 * .5) + .1, m = .75 * .2 - .25 * .4."""
    p, new = reference.lion(
        Rounded.exact([2.0]), Rounded.exact([-0.4]), {"exp_avg": Rounded.exact([0.2])},
        t=1, lr=0.1, betas=(0.5, 0.75), weight_decay=0.5,
    )  # fmt: skip
    assert p.value[0] == pytest.approx(2.0, rel=1e-15)
    assert new["exp_avg"].value[0] == pytest.approx(0.05, rel=1e-14)


numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=True)


@given(a=numbers, b=numbers, c=st.floats(0.01, 100), k=st.integers(-140, 20))
def test_float32_stays_within_the_bound(a: float, b: float, c: float, k: int) -> None:
    """(a b + c a) / (sqrt(b^2) + c), in float32 step by step, with `a` anywhere down to the subnormals."""
    a = float(f32(a * 2.0**k))
    with np.errstate(under="ignore"):
        x, y, z = f32(a), f32(b), f32(c)
        got = (x * y + x * z) / (np.sqrt(y * y) + z)
    ra, rb = Rounded.exact([a]), Rounded.exact([b])
    expected = (ra * rb + ra * c) / ((rb * rb).sqrt() + c)
    assert abs(float(got) - expected.value[0]) <= expected.error[0]
    assert expected.error[0] <= 2e-6 * (abs(expected.value[0]) + abs(a) * (abs(b) + c) / c) + 1e-43 / c
