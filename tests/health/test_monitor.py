"""The monitor tells what the step's own codes lose, names what to do, and changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import reference
import torch
from cases import EVERY, Case
from support.harness import ALL, before_step, codes_of, hostile, moments, parameter, snapshot
from support.rounding import Rounded

import optim8
from optim8.health import advice, measures
from optim8.step import hypers

pytestmark = pytest.mark.filterwarnings("ignore:optim8.monitor")  # most of the data here is hostile


class Writer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.histograms: dict[tuple[str, int], np.ndarray] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value

    def add_histogram(self, tag: str, codes: torch.Tensor, step: int, bins: list[int]) -> None:
        self.histograms[tag, step] = np.histogram(codes.cpu().numpy(), bins)[0]


def watched(case: Case, hyper: Mapping[str, Any]) -> dict[str, bool]:
    """The states that are in 8 bits, and whether their codes are signed: those that the monitor looks at."""
    return {name: signed for name, signed in case.states_of(hyper).items() if not case.is_wide(name, hyper)}


def zero_stays_zero(case: Case) -> dict[str, Any]:
    """Row 0 of the hyper-parameters, with which states of elements without gradients and values are 0."""
    return {**case.hypers[0], **dict.fromkeys((*case.initial.values(), *case.least.values()), 0.0)}


def made(case: Case, device: torch.device, dtype: torch.dtype, row: int = 0) -> tuple[list[torch.Tensor], Any]:
    """Parameters of hostile sizes and strides with gradients, after two steps."""
    shapes = [(3000,), (70, 5, 3, 2), (257,), (1,)]
    params = [
        parameter(hostile(int(np.prod(s)), dtype, seed=i, small=-3, large=0).view(s).to(device))
        for i, s in enumerate(shapes)
    ]
    params[1] = parameter(params[1].data.to(memory_format=torch.channels_last))
    optimizer = case.make(params, case.hypers[row])
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = hostile(p.numel(), dtype, seed=100 * step + i, small=-6, large=1).view(p.shape).to(device)
        if step < 2:
            optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [0, 1, 2])
@ALL
def test_its_codes_are_those_that_the_step_writes(
    case: Case, row: int, dtype: torch.dtype, device: torch.device
) -> None:
    params, optimizer = made(case, device, dtype, row)
    params[0].grad[5:600:70] = float("nan")
    params[0].grad[7] = float("inf")
    watch = optim8.monitor(optimizer, Writer(), every=1)
    optimizer.step()
    for i, p in enumerate(params):
        health = watch.latest[f"group 0 parameter {i}"]
        assert health.size == health.sampled == p.numel()
        assert health.nonfinite == (10 if i == 0 else 0)
        assert health.moments.keys() == watched(case, case.hypers[row]).keys()
        for name in health.moments:
            codes = codes_of(optimizer.state[p][case.codes(name)])
            assert np.array_equal(health.moments[name].codes.cpu().numpy(), codes)


@ALL
def test_shares_and_errors_follow_their_definitions(case: Case, device: torch.device) -> None:
    # Over eight decades of v, none of them lost to float32 itself.
    spread = (torch.randn(3000) * torch.logspace(-2, 2, 3000)[torch.randperm(3000)]).to(device)
    p = parameter(spread.clone())
    optimizer = case.make([p])
    for factor in (1.0, 0.5, -0.7):
        p.grad = spread.roll(int(100 * factor)) * factor
        if factor > 0:
            optimizer.step()
    data, grad, old = before_step(optimizer, case, p)
    _, exact = case.rule(Rounded.exact(data), Rounded.exact(grad), old, t=3, **case.hypers[0])
    watch = optim8.monitor(optimizer, Writer(), every=1)
    optimizer.step()
    stored = moments(optimizer, case, p)
    for name in case.roots:  # what codes stand for
        old[name], exact[name], stored[name] = (each[name].sqrt() for each in (old, exact, stored))
    for name, signed in watched(case, case.hypers[0]).items():
        found = watch.latest["group 0 parameter 0"].moments[name]
        codes, value = codes_of(optimizer.state[p][case.codes(name)]), exact[name].value
        there = value != 0
        size = np.abs(value[there])
        error = np.minimum(np.abs(stored[name].value - value)[there] / size, 1)
        # float32 may miss the moment by `exact.error`, which moves numerator and denominator by as much.
        allowed = np.minimum(2 * exact[name].error[there] / size, 1).mean()
        assert allowed < 0.01
        assert abs(found.error - error.mean()) <= allowed
        assert found.saturated == np.mean((codes >= 254) | ((codes == 0) & signed))
        assert found.smallest == (None if signed else np.sum(codes == 1) / np.sum(codes > 0))
        assert found.saturated > 0
        after, exactly = np.abs(stored[name].value).sum(), np.abs(value).sum()
        assert abs(found.drift - (after / exactly - 1)) <= exact[name].error.sum() / exactly * 2
        # Where the nearest code is that of what was there, in the scale of the step.
        scale = np.repeat(optimizer.state[p][case.absmax(name)].cpu().double().numpy(), 256)[: value.size]
        table = reference.dynamic_map(signed)
        same = reference.nearest(table, value / scale) == reference.nearest(table, old[name].value / scale)
        # float32 may see a value on the other side of a midpoint, and no change where that is within its errors.
        change, hidden = np.abs(value - old[name].value), exact[name].error + old[name].error
        fewest, most = (np.mean(same & (change > least)) for least in (hidden, 0))
        assert fewest - 2 / value.size <= found.unseen <= most + 2 / value.size
        assert most < fewest + 0.1
        assert found.unseen > 0


@pytest.mark.parametrize("decades", [3, 9])
@ALL
def test_spread_and_what_lies_below_the_codes(case: Case, decades: int, device: torch.device) -> None:
    """Values over many decades, some of them always 0. float32 may miss each by its error, so an order statistic or a
    count lies between those of the values moved down, and up, by as much."""
    rng = np.random.default_rng(5)
    spread = rng.standard_normal(3000) * 10.0 ** rng.uniform(2 - decades, 2, 3000)
    spread[rng.random(3000) < 0.1] = 0
    p = parameter(torch.tensor(spread, dtype=torch.float32, device=device))
    # No decay, which would give every element gradients of the size of its parameter.
    hyper = {**zero_stays_zero(case), "weight_decay": 0.0}
    optimizer = case.make([p], hyper)
    watch = optim8.monitor(optimizer, Writer(), every=1)
    # The last is the largest, so that scales grow: with one that only decays, as the elements at the smallest code do,
    # these would lie just at the limit.
    for t, factor in enumerate((1.0, 0.5, 1.1), 1):
        p.grad = torch.tensor(spread * factor, dtype=torch.float32, device=device)
        value, grad, old = before_step(optimizer, case, p)
        _, exact = case.rule(Rounded.exact(value), Rounded.exact(grad), old, t=t, **hyper)
        optimizer.step()
    for name, signed in watched(case, hyper).items():
        found = watch.latest["group 0 parameter 0"].moments[name]
        kept = exact[name].sqrt() if name in case.roots else exact[name]
        there = kept.value != 0
        assert 0.85 < there.mean() < 0.95
        low, high = (np.abs(kept.value) + sign * kept.error for sign in (-1, 1))
        # The scale of each block, and the value that it gives the smallest code: three roundings.
        scale = np.repeat(optimizer.state[p][case.absmax(name)].cpu().double().numpy(), 256)[: there.size]
        table = reference.dynamic_map(signed).astype(np.float64)
        limit = table[table > 0][0] * scale
        fewest, most = ((each < limit * (1 + sign * 2.0**-21))[there].mean() for each, sign in ((high, -1), (low, 1)))
        assert fewest <= found.below <= most < fewest + 0.01
        if name not in case.of_others:  # which do not go over as many decades as the gradients
            assert (found.below > 0.01) is (decades == 9)
        if signed:
            assert found.spread is None
            continue
        tops = [reference.per_element(reference.block_max(each), there.size) for each in (high, low)]
        rank = -(-int(there.sum()) // 100) - 1
        least, greatest = (np.sort((each / top)[there])[rank] for each, top in zip((low, high), tops, strict=True))
        assert least * (1 - 2.0**-21) <= found.spread <= greatest * (1 + 2.0**-21)
        assert greatest < least * 1.001


@ALL
def test_zeros_have_no_spread(case: Case, device: torch.device) -> None:
    p = parameter(torch.zeros(700, device=device), torch.zeros(700, device=device))
    optimizer = case.make([p], zero_stays_zero(case))
    optimizer.step()
    watch = optim8.monitor(optimizer, Writer(), every=1)
    optimizer.step()
    (health,) = watch.latest.values()
    assert health.moments
    assert all((of.spread, of.below) == (None, 0) for of in health.moments.values())
    assert (health.advice.bits, health.advice.added, health.advice.reason) == (8, 0, "")


@ALL
def test_a_sample_is_of_whole_blocks(case: Case, device: torch.device) -> None:
    p = parameter(hostile(200 * 256 + 3, torch.float32, seed=3).to(device))
    optimizer = case.make([p])
    for seed in (1, 2):
        p.grad = hostile(p.numel(), torch.float32, seed=seed).to(device)
        optimizer.step()
    watch = optim8.monitor(optimizer, Writer(), every=1, sample=1000)
    optimizer.step()
    (health,) = watch.latest.values()
    assert (health.size, health.sampled) == (200 * 256 + 3, 3 * 256)
    assert health.moments.keys() == watched(case, case.hypers[0]).keys()
    for name in health.moments:
        blocks = codes_of(optimizer.state[p][case.codes(name)])[: 200 * 256].reshape(200, 256)[[0, 99, 199]]
        assert np.array_equal(health.moments[name].codes.cpu().numpy(), blocks.reshape(-1))


@ALL
def test_training_is_the_same_to_the_bit(case: Case, device: torch.device) -> None:
    (a, watched), (b, alone) = made(case, device, torch.float32), made(case, device, torch.float32)
    with optim8.monitor(watched, Writer(), every=1):
        watched.step()
        watched.step()
    alone.step()
    alone.step()
    assert snapshot(watched, a) == snapshot(alone, b)


def test_looks_at_every_nth_step_until_removed() -> None:
    p = parameter(torch.ones(5000), torch.ones(5000))
    optimizer = optim8.AdamW8bit([("weight", p)])
    writer = Writer()
    with optim8.monitor(optimizer, writer, every=3):
        for _ in range(7):
            optimizer.step()
    for _ in range(3):
        optimizer.step()
    assert sorted({step for _, step in writer.scalars}) == [3, 6]
    assert {tag for tag, _ in writer.scalars} == {
        "gradient_nonfinite/weight",
        "exp_avg_error/weight",
        "exp_avg_saturated/weight",
        "exp_avg_sq_error/weight",
        "exp_avg_sq_saturated/weight",
        "exp_avg_sq_at_smallest_code/weight",
        "exp_avg_unseen/weight",
        "exp_avg_sq_unseen/weight",
        "exp_avg_drift/weight",
        "exp_avg_sq_drift/weight",
        "exp_avg_below_codes/weight",
        "exp_avg_sq_below_codes/weight",
        "exp_avg_sq_spread/weight",
        "advised_bits/weight",
    }
    assert writer.scalars["exp_avg_sq_spread/weight", 6] == pytest.approx(1, rel=2.0**-20)
    assert writer.scalars["exp_avg_below_codes/weight", 6] == 0
    assert writer.scalars["advised_bits/weight", 6] == 8
    assert writer.histograms["exp_avg_codes/weight", 6].sum() == 5000
    assert writer.histograms["exp_avg_codes/weight", 6][254] == 5000  # all equal: each is its block's largest
    assert not optimizer._optimizer_step_pre_hooks


def test_gradients_of_a_closure_are_those_looked_at() -> None:
    for call in (lambda o, c: o.step(c), lambda o, c: o.step(closure=c)):
        p = parameter(torch.ones(5000))
        optimizer = optim8.Lion8bit([p])
        watch = optim8.monitor(optimizer, Writer(), every=1)

        def closure(p: torch.nn.Parameter = p) -> str:
            p.grad = torch.full_like(p, 2.0)
            p.grad[3] = float("inf")
            return "loss"

        for _ in range(2):
            assert call(optimizer, closure) == "loss"
            (health,) = watch.latest.values()
            assert health.nonfinite == 1
        assert np.array_equal(health.moments["exp_avg"].codes.numpy(), codes_of(optimizer.state[p]["exp_avg_codes"]))


def bytes_of(optimizer: Any, p: torch.Tensor) -> int:
    return sum(each.nbytes for each in optimizer.state[p].values())


def wide() -> torch.Tensor:
    """Values of which all but one in each block lie below what the block's codes reach."""
    values = torch.full((5120,), 1e-9)
    values[::256] = 1.0
    return values


def test_a_moment_that_does_not_survive_is_named_with_its_remedy() -> None:
    model = torch.nn.ModuleDict({"bad": torch.nn.Linear(512, 10, bias=False), "good": torch.nn.Linear(512, 10)})
    optimizer = optim8.AdamW8bit(model.parameters())
    with (
        optim8.monitor(optimizer, Writer(), every=1, model=model) as watch,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        for _ in range(3):
            model["bad"].weight.grad = wide().view(10, 512)
            model["good"].weight.grad = torch.ones(10, 512)
            optimizer.step()
        messages = [str(warning.message) for warning in said]
        assert len(messages) == 2  # once for each moment
        assert all("'bad.weight'" in message for message in messages)
        bad, good = watch.latest["bad.weight"], watch.latest["good.weight"]
        assert bad.moments["exp_avg_sq"].smallest == bad.moments["exp_avg_sq"].below == 255 / 256
        assert (bad.advice.bits, str(good.advice)) == (32, "8 bits are enough")
        assert str(bad.advice) == f"optim_bits=32 ({bad.advice.added:,} bytes more)"
        before = bytes_of(optimizer, model["bad"].weight)
        remedy = messages[0].split(f"in 32 bits, which takes {bad.advice.added:,} bytes more: ")[1].rstrip(".")
        with eval(remedy, {"optim8": optim8, "model": model}):
            optimizer.step()
            optimizer.step()
            assert optimizer.precision(model["bad"].weight) == "32bit"
            assert bytes_of(optimizer, model["bad"].weight) - before == bad.advice.added
            assert (watch.latest["bad.weight"].moments, watch.latest["bad.weight"].advice) == ({}, None)
            assert watch.latest["good.weight"].moments != {}


@pytest.mark.parametrize("named", [True, False])
def test_remedies_without_a_model(named: bool) -> None:
    p = parameter(torch.ones(5120), wide())
    optimizer = optim8.Lion8bit([("some.weight", p)] if named else [p])
    optim8.monitor(optimizer, Writer(), every=1, limit=0.3)
    optimizer.step()
    with pytest.warns(UserWarning, match="of '") as said:
        optimizer.step()
    remedy = str(said[0].message).split(" bytes more: ")[1].rstrip(".")
    with eval(remedy, {"optim8": optim8, "optimizer": optimizer}):
        assert optimizer.precision(p) == "32bit"


def test_overridden_options_count() -> None:
    p = parameter(torch.ones(5000), torch.linspace(-1, 1, 5000))
    optimizer = optim8.Lion8bit([p], betas=(0.9, 0.99))
    optimizer.step()
    with optim8.override(p, betas=(0.1, 0.2)):
        watch = optim8.monitor(optimizer, Writer(), every=1)
        optimizer.step()
        (health,) = watch.latest.values()
        assert np.array_equal(health.moments["exp_avg"].codes.numpy(), codes_of(optimizer.state[p]["exp_avg_codes"]))


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("c, bits", [(1e-2, 8), (3e-4, 8), (3e-5, 16), (3e-6, 16), (1e-7, 32), (1e-9, 32)])
def test_the_advice_follows_the_gradients_within_blocks_and_tells_its_bytes(c: float, bits: int, gaps: bool) -> None:
    """Every tenth element has gradients that are c times those of the rest."""
    grad = torch.where(torch.arange(3500) % 10 == 3, c, 1.0).view(70, 50)
    p = parameter(torch.zeros(70, 99)[:, :50] if gaps else torch.zeros(70, 50), grad)
    optimizer = optim8.AdamW8bit([p], min_8bit_size=0)
    watch = optim8.monitor(optimizer, Writer(), every=1, limit=1.0)
    for _ in range(3):
        optimizer.step()
    (health,) = watch.latest.values()
    assert health.advice.bits == (bits if bits in get_args(hypers.Bits) else 32)
    assert (health.advice.reason == "") is (bits == 8)
    before = bytes_of(optimizer, p)
    with optim8.override(p, optim_bits=health.advice.bits):
        optimizer.step()
        assert bytes_of(optimizer, p) - before == health.advice.added
        assert (health.advice.added == 0) is (bits == 8)


@pytest.mark.parametrize(
    "known, error, spread, below, bits",
    [
        ((8, 32), 0.1, 1e-4, 0.0, 8),  # at its limits
        ((8, 32), 0.1, 9.9e-5, 0.0, 32),
        ((8, 32), 0.11, None, 0.0, 32),
        ((8, 16, 32), 0.1, None, 0.1, 8),
        ((8, 16, 32), 0.11, None, 0.0, 16),
        ((8, 16, 32), 0.11, None, 0.09, 16),  # 0.09 and a 256th of 0.11 remain at most
        ((8, 16, 32), 0.11, None, 0.1, 32),
        ((8, 16, 32), 0.0, 1e-6, 0.0, 16),
        ((8, 16, 32), 0.0, 9.9e-7, 0.0, 32),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_the_first_precision_that_suffices_for_every_moment_is_advised(
    known: tuple[int, ...], error: float, spread: float | None, below: float, bits: int, place: int
) -> None:
    def of(error: float, spread: float | None, below: float) -> measures.MomentHealth:
        rest = {"smallest": None, "saturated": 0.0, "unseen": 0.0, "drift": 0.0, "codes": torch.zeros(0)}
        return measures.MomentHealth(error=error, spread=spread, below=below, **rest)

    seen = [of(0.0, 1.0, 0.0), of(error, spread, below)]
    advised, reason = advice.choose({"one": seen[place], "other": seen[1 - place]}, 0.1, known)
    assert advised == bits
    assert ("one" if place else "other") in reason if bits != 8 else reason == ""


@pytest.mark.parametrize("fused", [None, True])
def test_gradscaler(fused: bool | None, device: torch.device) -> None:
    """A step that is left out is looked at where it is called, which is with fused=True."""
    p = parameter(torch.ones(5000, device=device))
    optimizer = optim8.AdamW8bit([p], fused=fused)
    watch = optim8.monitor(optimizer, Writer(), every=1)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for bad in (False, False, True):
        scaler.scale((p * torch.linspace(1, 2, 5000, device=device)).sum()).backward()
        if bad:
            p.grad[0] = float("inf")
        before = optimizer.state[p]["exp_avg_codes"].clone() if optimizer.state else None
        scaler.step(optimizer)
        scaler.update()
        (health,) = watch.latest.values()
        assert health.nonfinite == int(bad and fused is True)
        if bad:
            assert (health.moments == {}) is (fused is True)
            assert torch.equal(optimizer.state[p]["exp_avg_codes"], before)
        elif before is not None:
            assert np.array_equal(
                health.moments["exp_avg"].codes.cpu().numpy(), codes_of(optimizer.state[p]["exp_avg_codes"])
            )
        optimizer.zero_grad()


def test_tensorboard_shows_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    p = parameter(torch.randn(5000), torch.randn(5000))
    optimizer = optim8.AdamW8bit([("layer.weight", p)])
    with SummaryWriter(str(tmp_path)) as writer, optim8.monitor(optimizer, writer, every=2) as watch:
        for _ in range(4):
            optimizer.step()
    events = EventAccumulator(str(tmp_path)).Reload()
    points = events.Scalars("exp_avg_sq_error/layer.weight")
    assert [point.step for point in points] == [2, 4]
    assert points[-1].value == pytest.approx(watch.latest["layer.weight"].moments["exp_avg_sq"].error)
    assert events.Histograms("exp_avg_codes/layer.weight")[-1].histogram_value.num == 5000


def test_counting_what_is_not_finite() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        grad = torch.full((300,), torch.finfo(dtype).max, dtype=dtype)  # sums overflow
        assert measures.nonfinite(grad) == 0
        grad[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0])
        assert measures.nonfinite(grad) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"optimizer": torch.optim.AdamW([torch.ones(1)])}, "must be one of optim8's, got AdamW"),
        ({"writer": None}, "writer must have add_scalar.*got NoneType"),
        ({"every": 0}, "every must be.*got 0"),
        ({"every": True}, "every must be.*got True"),
        ({"sample": 255}, "sample must be.*got 255"),
        ({"limit": 0}, "limit must be"),
        ({"limit": float("nan")}, "limit must be"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    optimizer = optim8.AdamW8bit([torch.ones(1)])
    with pytest.raises((TypeError, ValueError), match=message):
        optim8.monitor(**{"optimizer": optimizer, "writer": Writer(), **arguments})
    assert not optimizer._optimizer_step_pre_hooks


def test_every_case_is_watched() -> None:
    """Of each case's states each in 8 bits is watched, and nothing else."""
    for case in EVERY:
        params, optimizer = made(case, torch.device("cpu"), torch.float32)
        watch = optim8.monitor(optimizer, Writer(), every=1)
        optimizer.step()
        assert len(watch.latest) == len(params)
        names = watched(case, case.hypers[0]).keys()
        assert names
        assert all(health.moments.keys() == names for health in watch.latest.values())
    assert reference.BLOCK == 256
