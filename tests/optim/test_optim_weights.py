"""Steps of weights that are wider than their parameter, or dithered: float32's steps, and the reference's rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import Case
from support.harness import ALL, bits, hostile, load_state, parameter, random_state, shards_from, torch_threads, values
from support.weights import kept

import optim8
from optim8.state.weights import join

DTYPES16 = {"bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS: dict[str, dict[str, Any]] = {
    "dithered": {"param_rounding": "dithered"},
    "24": {"master_bits": 24},
    "32": {"master_bits": 32},
}
LOW = {24: torch.uint8, 32: torch.int16}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
SIZES = (0, 1, 255, 257, 4095)


def _weights(n: int, dtype: torch.dtype, seed: int, kind: Mapping[str, Any]) -> tuple[torch.Tensor, Any]:
    """Parameters of which some are 0, and any low bits."""
    param = hostile(n, dtype, seed=seed, small=-3, large=0)
    low_dtype = LOW.get(kind.get("master_bits", 16))
    if low_dtype is None:
        return param, None
    rng = np.random.default_rng(seed)
    low = torch.from_numpy(rng.integers(-(2**15), 2**15, n).astype(np.int16))
    low = low if low_dtype == torch.int16 else (low // 256).to(torch.int8).view(torch.uint8)
    low[param == 0] = 0
    return param, low


def _whole(p: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
    return p.detach().float() if low is None else join(p, low)


@ALL
@EACH_KIND
@pytest.mark.parametrize("state_bits", [8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES16)
def test_a_step_is_that_of_float32_and_then_rounded(case: Case, dtype: str, state_bits: int, kind: str) -> None:
    of, options = DTYPES16[dtype], KINDS[kind]
    made = [_weights(n, of, n, options) for n in SIZES]
    params = [parameter(param) for param, _ in made]
    wide = [parameter(_whole(param, low)) for param, low in made]
    ours = case.make(params, optim_bits=state_bits, **options)
    float32 = case.make(wide, optim_bits=state_bits)
    states = [random_state(case, n, state_bits, 3, seed=n) for n in SIZES]
    load_state(float32, dict(enumerate(states)))
    lows = [{} if low is None else {"param_low": low} for _, low in made]
    load_state(ours, {i: {**state, **low} for i, (state, low) in enumerate(zip(states, lows, strict=True))})
    for t in (4, 5):
        for i, n in enumerate(SIZES):
            grad = hostile(n, of, seed=10 * t + i, small=-4, large=0)
            params[i].grad, wide[i].grad = grad, grad.float()
        ours.step()
        float32.step()
        for n, p, w in zip(SIZES, params, wide, strict=True):
            u = reference.dither(t, np.arange(-(-n // 256)), 3).ravel()[:n]
            wanted, wanted_low = kept(values(w), of, ours.param_groups[0]["master_bits"], u)
            state, low = ours.state[p], ours.state[p].get("param_low")
            assert bits(p) == bits(wanted)
            assert (low is None) == (wanted_low is None)
            if low is not None and wanted_low is not None:
                assert bits(low) == bits(wanted_low)
            assert {key: bits(value) for key, value in state.items() if key != "param_low"} == {
                key: bits(value) for key, value in float32.state[w].items()
            }
            w.data.copy_(_whole(p, low))


@ALL
@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES16)
def test_bits_do_not_depend_on_threads_or_shards(case: Case, dtype: str, kind: str) -> None:
    of, options, n = DTYPES16[dtype], KINDS[kind], 70_000
    results = []
    # State in codes has blocks that a shard must not cut; the rounding of a parameter does not.
    state_bits, cut = (8, 256 * 100) if kind == "24" else (32, 25_777)
    ways = [(1, [n]), (2, [n])]
    if not case.has_norms:  # those of shards are added up over ranks: tests/distributed
        ways.append((2, [cut, n - cut]))
    for threads, pieces in ways:
        param, low = _weights(n, of, 1, options)
        grad = hostile(n, of, seed=2, small=-4, large=0)
        begins = np.cumsum([0, *pieces[:-1]]).tolist()
        params = [parameter(param[b : b + size].clone()) for b, size in zip(begins, pieces, strict=True)]
        optimizer = case.make(params, optim_bits=state_bits, **options)
        firsts = dict(zip(params, begins, strict=True)) if len(pieces) > 1 else {}
        with torch_threads(threads), shards_from(firsts):
            for _ in range(3):
                for p, b, size in zip(params, begins, pieces, strict=True):
                    p.grad = grad[b : b + size].clone()
                optimizer.step()
        lows = [optimizer.state[p]["param_low"] for p in params] if low is not None else []
        results.append((b"".join(map(bits, params)), b"".join(map(bits, lows))))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("kind", KINDS)
def test_no_global_generator_is_used(kind: str) -> None:
    before = torch.get_rng_state()
    p = parameter(torch.ones(600, dtype=torch.bfloat16), torch.ones(600, dtype=torch.bfloat16))
    optim8.AdamW8bit([p], **KINDS[kind]).step()
    assert torch.equal(torch.get_rng_state(), before)


def test_plain_sgd_counts_steps_where_a_dither_needs_it() -> None:
    p = parameter(torch.ones(600, dtype=torch.bfloat16), torch.ones(600, dtype=torch.bfloat16))
    plain = optim8.SGD8bit([p], lr=1e-3)
    plain.step()
    assert not plain.state[p]
    for kind, keys in (("dithered", ["step"]), ("24", ["step", "param_low"]), ("32", ["step", "param_low"])):
        optimizer = optim8.SGD8bit([p], lr=1e-3, **KINDS[kind])
        optimizer.step()
        optimizer.step()
        assert list(optimizer.state[p]) == keys
        assert float(optimizer.state[p]["step"]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_muon(kind: str) -> None:
    """Its weights move as those in float32 do, to the rounding of float32 and of what is kept."""
    options = KINDS[kind]
    rng = torch.Generator().manual_seed(0)
    start = (torch.randn(64, 96, generator=rng) * 0.02).bfloat16()
    p, w = parameter(start.clone()), parameter(start.float())
    ours = optim8.Muon8bit([p], lr=1e-3, momentum=0.9, **options)
    float32 = optim8.Muon8bit([w], lr=1e-3, momentum=0.9)
    largest = start.float().abs()
    for _ in range(20):
        grad = torch.randn(64, 96, generator=rng).bfloat16()
        p.grad, w.grad = grad, grad.float()
        ours.step()
        float32.step()
        largest = torch.maximum(largest, w.detach().abs())
    moved, wanted = _whole(p, ours.state[p].get("param_low")) - start.float(), w.detach() - start.float()
    # Each step rounds once to what is kept, and some times to float32.
    ulp = 2.0 ** (torch.frexp(largest + 2.0**-8 * largest).exponent - 8)
    parts = {"dithered": 1, "24": 2.0**-8, "32": 4 * 2.0**-16}[kind]
    assert bool(((moved - wanted).abs() <= 20 * parts * ulp).all())
    assert float((moved * wanted).sum() / (wanted * wanted).sum()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_float32_parameters_are_refused(options: dict[str, Any]) -> None:
    p = parameter(torch.ones(3))
    with pytest.raises(
        ValueError, match=r"AdamW8bit: parameter 0 of group 0 must be bfloat16 or float16 for .*float32"
    ):
        optim8.AdamW8bit([p], **options)
    half = parameter(torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16))
    optimizer = optim8.AdamW8bit([half], **options)
    half.data, half.grad = half.data.float(), None
    half.grad = torch.ones(3)
    with pytest.raises(ValueError, match="must be bfloat16 or float16 for master_bits or a dithered param_rounding"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master_bits": 8}, "master_bits must be 16, 24 or 32, got 8"),
        ({"master_bits": "24"}, "master_bits must be 16, 24 or 32, got '24'"),
        ({"param_rounding": "random"}, "param_rounding must be 'dithered' or 'nearest', got 'random'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim8.AdamW8bit([parameter(torch.ones(3, dtype=torch.bfloat16))], **options)


def test_state_of_another_width_is_refused() -> None:
    p = parameter(torch.ones(300, dtype=torch.bfloat16), torch.ones(300, dtype=torch.bfloat16))
    optimizer = optim8.AdamW8bit([p], master_bits=24)
    optimizer.step()
    before = bits(p)
    optimizer.param_groups[0]["master_bits"] = 32
    with pytest.raises(ValueError, match=r"state\['param_low'\] of int16.*load_state_dict"):
        optimizer.step()
    assert bits(p) == before
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[p]["param_low"].dtype == torch.int16


def test_an_override_sets_the_bits_of_one_parameter() -> None:
    one, other = (parameter(torch.ones(300, dtype=torch.bfloat16), torch.ones(300, dtype=torch.bfloat16)) for _ in "ab")
    optimizer = optim8.AdamW8bit([one, other], lr=1e-5)
    optimizer.step()
    with optim8.override(one, master_bits=32):
        optimizer.step()
        assert optimizer.state[one]["param_low"].dtype == torch.int16
        assert "param_low" not in optimizer.state[other]


def test_resetting_state_resets_low_bits() -> None:
    p = parameter(torch.ones(300, dtype=torch.bfloat16), torch.ones(300, dtype=torch.bfloat16))
    optimizer = optim8.AdamW8bit([p], lr=1e-4, master_bits=32)
    optimizer.step()
    assert bool(optimizer.state[p]["param_low"].any())
    optimizer.reset_state(p)
    assert not bool(optimizer.state[p]["param_low"].any())


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_was_changed_is_taken_as_it_is(kind: str) -> None:
    """To within half of its last bit; exactly where it became 0."""
    p = parameter(torch.full((300,), 1.5, dtype=torch.bfloat16), torch.ones(300, dtype=torch.bfloat16))
    optimizer = optim8.SGD8bit([p], lr=1e-5, **KINDS[kind])
    for _ in range(3):
        optimizer.step()
    p.data[:150] = 0
    p.data[150:] = -3
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert bool((p[:150] == 0).all())
    assert bool((p[150:] == -3).all())


def test_a_preview_sees_the_whole_weight() -> None:
    p = parameter(torch.full((300,), 1.5, dtype=torch.bfloat16), torch.ones(300, dtype=torch.bfloat16))
    optimizer = optim8.Adam8bit([p], lr=1e-5, master_bits=32, weight_decay=0.5, optim_bits=32)
    for _ in range(3):
        optimizer.step()
    _, after = optimizer.stepper.preview(optimizer, optimizer.param_groups[0], p)
    optimizer.step()
    assert bits(after["exp_avg"]) == bits(optimizer.state[p]["exp_avg"])


def test_gaps_between_elements() -> None:
    both = torch.ones(40, 600, dtype=torch.bfloat16)
    strided, dense = parameter(both[:, ::2]), parameter(both[:, ::2].clone())
    results = []
    for p in (strided, dense):
        optimizer = optim8.AdamW8bit([p], lr=1e-4, master_bits=24, min_8bit_size=0)
        for t in range(3):
            p.grad = torch.full_like(p, 0.1 * t)
            optimizer.step()
        results.append((bits(p.detach().contiguous()), bits(optimizer.state[p]["param_low"])))
    assert results[0] == results[1]


def test_channels_last_and_moved() -> None:
    x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    p = parameter(x.clone())
    optimizer = optim8.SGD8bit([p], lr=1e-4, master_bits=32)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = join(p, optimizer.state[p]["param_low"])
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    low = optimizer.state[p]["param_low"]
    assert low.stride() == p.stride()
    assert torch.equal(join(p, low), before)
