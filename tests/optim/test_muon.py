"""The step of Muon8bit's matrices: against torch.optim.Muon and float64, and what it must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from support.harness import DTYPES, bits, parameter, set_grad, state_bits, values
from support.rounding import Rounded

import optim8
from optim8.paging import Pager
from optim8.step import matrices

SHAPES = [(32, 48), (48, 32), (40, 40), (1, 70), (70, 1), (3, 24, 32), (2, 32, 24)]
HYPERS: list[dict[str, Any]] = [
    {"lr": 3e-2, "weight_decay": 0.3, "momentum": 0.8, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    {"lr": 1e-3, "weight_decay": 0.0, "momentum": 0.3, "nesterov": True, "ns_steps": 3, "eps": 1e-3},
    {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.99, "ns_coefficients": (2, -1.5, 0.5), "adjust_lr_fn": "original"},
]
DTYPE_PAIRS = [(p, g) for p in DTYPES for g in dict.fromkeys((p, "float32"))]
Params = list[torch.nn.Parameter]


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def params_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Params:
    return [parameter(random(shape, i, dtype, 0.1)) for i, shape in enumerate(shapes)]


def take_steps(params: Params, optimizer: Any, first: int, last: int, sign: float = 1.0) -> None:
    for t in range(first, last):
        for i, p in enumerate(params):
            p.grad = random(tuple(p.shape), 1000 * t + i, p.dtype, sign)
        optimizer.step()


def ended(params: Params, optimizer: Any) -> list[Any]:
    return [(bits(p), state_bits(optimizer, p)) for p in params]


@pytest.mark.parametrize("hyper", HYPERS)
def test_50_steps_have_the_bits_of_torch(hyper: dict[str, Any]) -> None:
    """In 32 bits: the momentum is made with the operations of torch.lerp, and the products are torch's."""
    shapes = [shape for shape in SHAPES if len(shape) == 2]
    params, twins = params_of(shapes), params_of(shapes)
    ours, peer = optim8.Muon8bit(params, optim_bits=32, **hyper), torch.optim.Muon(twins, **hyper)
    take_steps(params, ours, 0, 50)
    take_steps(twins, peer, 0, 50)
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["momentum_buffer"], peer.state[q]["momentum_buffer"])
        assert ours.state[p].keys() == {"step", "momentum_buffer"}
        assert ours.state[p]["step"] == 50


def test_defaults_are_those_of_torch() -> None:
    ours, peer = optim8.Muon8bit(params_of([(2, 2)])), torch.optim.Muon(params_of([(2, 2)]))
    assert {name: ours.defaults[name] for name in peer.defaults} == peer.defaults


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("dtype, g_dtype", DTYPE_PAIRS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_against_float64(adjust: Any, dtype: str, g_dtype: str, nesterov: bool) -> None:
    """Momentum, normalization and what moves; the iteration has tests of its own."""
    hyper = {"lr": 0.03, "weight_decay": 0.3, "momentum": 0.8, "nesterov": nesterov, "adjust_lr_fn": adjust}
    hyper |= {"ns_coefficients": (1.0, 1.0, 1.0), "ns_steps": 0, "eps": 1e-7, "maximize": True}
    for shape in ((6, 40), (40, 6)):
        p = parameter(random(shape, 1, DTYPES[dtype]))
        optimizer = optim8.Muon8bit([p], optim_bits=32, **hyper)
        m = Rounded.exact(np.zeros(shape))
        for t in range(1, 4):
            set_grad(p, random(shape, 10 + t, DTYPES[g_dtype], 100.0))
            before, grad = values(p).reshape(shape), values(p.grad).reshape(shape)
            optimizer.step()
            expected, new = reference.muon(Rounded.exact(before), Rounded.exact(grad), {"momentum_buffer": m}, **hyper)
            expected = expected.stored(dtype)
            got = values(p).reshape(shape)
            assert (np.abs(got - expected.value) <= expected.error).all()
            moved = np.abs(expected.value - before).max()
            assert expected.error.max() < 0.1 * moved + 2.0**-8 * np.abs(before).max(), "a bound tests something"
            buffer = values(optimizer.state[p]["momentum_buffer"]).reshape(shape)
            assert (np.abs(buffer - new["momentum_buffer"].value) <= 2 * new["momentum_buffer"].error).all()
            m = Rounded.exact(buffer)


@pytest.mark.parametrize("optim_bits", [8, 16])
def test_momentum_in_fewer_bits_is_that_of_any_rule(optim_bits: int) -> None:
    """The same codes as SGD8bit's, whose momentum is the same sum where the gradient is not dampened otherwise."""
    shape = (48, 64)
    hyper = {"momentum": 0.75, "optim_bits": optim_bits, "min_8bit_size": 0}  # 0.25 is exact, and so are both forms
    p, q = params_of([shape])[0], params_of([shape])[0]
    ours = optim8.Muon8bit([p], **hyper)
    other = optim8.SGD8bit([q], dampening=0.25, **hyper)
    g = random(shape, 7)
    p.grad, q.grad = g, 0.25 * g  # SGD's first gradient is not dampened
    ours.step()
    other.step()
    own, sgd = ours.state[p], other.state[q]
    assert own.keys() == sgd.keys()
    assert all(torch.equal(own[key], sgd[key]) for key in own)
    assert ours.precision(p) == f"{optim_bits}bit"


def test_groups_without_muon_step_as_adamw() -> None:
    hyper = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.03}
    shapes: list[tuple[int, ...]] = [(70, 70), (5000,), (3,), (2, 3, 4, 5)]
    params, twins, hidden = params_of(shapes), params_of(shapes), params_of([(48, 48)])
    groups = [{"params": hidden}, {"params": params, "use_muon": False, **hyper}]
    ours, other = optim8.Muon8bit(groups, lr=0.5), optim8.AdamW8bit(twins, **hyper)
    take_steps(twins, other, 0, 3)
    for t in range(3):
        hidden[0].grad = random((48, 48), t)
        take_steps(params, ours, t, t + 1)
    assert ended(params, ours) == ended(twins, other)
    assert ours.state[hidden[0]].keys() == {"step", "momentum_buffer"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optim_bits", [8, 32])
def test_a_matrix_does_not_depend_on_others(dtype: str, optim_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together, alone, and in buckets of one or two matrices."""
    shapes = [*SHAPES, *SHAPES, (32, 48), (0, 5), (5, 0)]
    options = {"optim_bits": optim_bits, "min_8bit_size": 0}
    params = params_of(shapes, DTYPES[dtype])
    together = optim8.Muon8bit(params, **options)
    take_steps(params, together, 0, 3)
    expected = ended(params, together)

    alone = params_of(shapes, DTYPES[dtype])
    own = [optim8.Muon8bit([p], **options) for p in alone]
    for t in range(3):
        for i, (p, optimizer) in enumerate(zip(alone, own, strict=True)):
            p.grad = random(tuple(p.shape), 1000 * t + i, p.dtype)
            optimizer.step()
    assert [ended([p], optimizer)[0] for p, optimizer in zip(alone, own, strict=True)] == expected

    monkeypatch.setattr(matrices, "BUCKET_BYTES", 2 * 32 * 48 * 2)
    cut = params_of(shapes, DTYPES[dtype])
    optimizer = optim8.Muon8bit(cut, **options)
    take_steps(cut, optimizer, 0, 3)
    assert ended(cut, optimizer) == expected


def test_scratch_is_bounded_by_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = matrices._scratch

    def scratch(*args: Any) -> Any:
        flat, directions = original(*args)
        sizes.append((flat.nbytes, len(directions)))
        return flat, directions

    monkeypatch.setattr(matrices, "_scratch", scratch)
    monkeypatch.setattr(matrices, "BUCKET_BYTES", 3 * 64 * 64 * 2)
    params = params_of([(64, 64)] * 7 + [(5, 64, 64), (16, 64)])
    optimizer = optim8.Muon8bit(params)
    take_steps(params, optimizer, 0, 1)
    matrix = 64 * 64 * 2
    assert sizes == [(3 * matrix, 3), (3 * matrix, 3), (matrix, 1), (5 * matrix, 1), (matrix // 4, 1)]


def test_experts_are_matrices_each() -> None:
    experts, single = params_of([(4, 24, 32)]), [parameter(each.clone()) for each in random((4, 24, 32), 0, scale=0.1)]
    together, apart = (optim8.Muon8bit(params, optim_bits=32, adjust_lr_fn="original") for params in (experts, single))
    for t in range(3):
        experts[0].grad = random((4, 24, 32), 50 + t)
        for p, grad in zip(single, experts[0].grad, strict=True):
            p.grad = grad.clone()
        together.step()
        apart.step()
    assert torch.equal(experts[0], torch.stack(single))


@pytest.mark.parametrize("layout", ["transposed", "experts last", "gaps", "view"])
def test_other_strides(layout: str) -> None:
    make: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "transposed": lambda t: t.mT.contiguous().mT,
        "experts last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
        "gaps": lambda t: torch.cat([t, t], 1)[:, : t.size(1)],
        "view": lambda t: torch.cat([t, t])[t.size(0) :],
    }
    shapes: list[tuple[int, ...]] = [(24, 32), (24, 32), (32, 24), (3, 32, 24), (3, 24, 32), (3, 24, 32)]
    plain, other = params_of(shapes), params_of(shapes)
    other = [torch.nn.Parameter(make[layout](p.detach())) for p in other]
    ours, own = optim8.Muon8bit(plain, optim_bits=32), optim8.Muon8bit(other, optim_bits=32)
    take_steps(plain, ours, 0, 3)
    take_steps(other, own, 0, 3)
    for p, q in zip(plain, other, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["momentum_buffer"], own.state[q]["momentum_buffer"])


def test_gradient_and_generator_stay_as_they_are() -> None:
    params = params_of([(24, 32)], torch.bfloat16)
    optimizer = optim8.Muon8bit(params, nesterov=False, optim_bits=32)
    before = torch.get_rng_state()
    for t in range(3):
        params[0].grad = grad = random((24, 32), t, torch.bfloat16, 100.0)
        kept, version = grad.clone(), params[0]._version
        optimizer.step()
        assert params[0].grad is grad
        assert torch.equal(grad, kept)
        assert params[0]._version > version, "autograd must see the change"
    assert torch.equal(torch.get_rng_state(), before)
    # torch 2.13 divides this buffer by its norm in each step. The last gradient alone has a norm of 0.05 * 2770.
    assert optimizer.state[params[0]]["momentum_buffer"].norm() > 100


def test_a_gradient_of_nothing_moves_by_decay_alone() -> None:
    p = parameter(random((24, 32), 0), torch.zeros(24, 32))
    before = p.detach().clone()
    optim8.Muon8bit([p], lr=0.25, weight_decay=0.5).step()
    assert torch.equal(p, before * 0.875)


def test_without_gradients_nothing_moves() -> None:
    params = params_of([(24, 32), (24, 32)])
    optimizer = optim8.Muon8bit(params)
    params[1].grad = random((24, 32), 1)
    before = bits(params[0])
    optimizer.step()
    assert bits(params[0]) == before
    assert params[0] not in optimizer.state


def test_maximize_closure_schedule_and_tensor_lr() -> None:
    params, twins = params_of([(24, 32)]), params_of([(24, 32)])
    ours, other = optim8.Muon8bit(params, lr=torch.tensor(0.25), maximize=True), optim8.Muon8bit(twins, lr=0.25)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in (ours, other)]
    for t in range(3):
        params[0].grad, twins[0].grad = -random((24, 32), t), random((24, 32), t)
        assert ours.step(lambda: 3.0) == 3.0
        other.step()
        for schedule in schedules:
            schedule.step()
        assert bits(params[0]) == bits(twins[0])


@pytest.mark.parametrize("fused", [None, True])
def test_gradient_scaler(fused: bool | None) -> None:
    params, twins = params_of([(24, 32)]), params_of([(24, 32)])
    ours, other = optim8.Muon8bit(params, fused=fused), optim8.Muon8bit(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    g = random((24, 32), 1)
    scaler.scale((params[0] * g).sum()).backward()
    scaler.step(ours)
    scaler.update()
    twins[0].grad = g
    other.step()
    assert ended(params, ours) == ended(twins, other)
    params[0].grad = torch.full((24, 32), float("inf"))
    scaler.scale(torch.zeros((), requires_grad=True))
    scaler.step(ours)
    scaler.update()
    assert ended(params, ours) == ended(twins, other)


def test_what_is_found_on_a_device_moves_nothing() -> None:
    """As on a GPU, where the host does not know whether a gradient was infinite."""
    for lr in (0.25, torch.tensor(0.25)):
        p, update = random((4, 6), 0), random((4, 6), 1)
        given = {"lr": lr, "weight_decay": 0.5, "adjust_lr_fn": None}
        moved, stayed = p.clone(), p.clone()
        matrices.move([moved], [update], given, (4, 6), torch.zeros(()))
        assert torch.allclose(moved, p * 0.875 - 0.25 * update, rtol=1e-6)
        matrices.move([stayed], [update], given, (4, 6), torch.ones(()))
        assert torch.equal(stayed, p)


def test_override_of_one_matrix() -> None:
    params, twins = params_of([(24, 32), (24, 32)]), params_of([(24, 32), (24, 32)])
    with optim8.override(params[1], lr=0.5, momentum=0.5):
        ours = optim8.Muon8bit(params)
        take_steps(params, ours, 0, 3)
    other = optim8.Muon8bit([{"params": twins[:1]}, {"params": twins[1:], "lr": 0.5, "momentum": 0.5}])
    take_steps(twins, other, 0, 3)
    assert ended(params, ours) == ended(twins, other)


def test_resumed_from_its_own_state_dict() -> None:
    shapes = [(48, 64), (70,), (3, 24, 64)]
    params, twins = params_of(shapes), params_of(shapes)

    def make(params: Params) -> Any:
        return optim8.Muon8bit(
            [{"params": [params[0], params[2]]}, {"params": [params[1]], "use_muon": False}], min_8bit_size=100
        )

    whole, first = make(params), make(twins)
    take_steps(params, whole, 0, 4)
    take_steps(twins, first, 0, 2)
    second = make(twins)
    second.load_state_dict(first.state_dict())
    take_steps(twins, second, 2, 4)
    assert ended(params, whole) == ended(twins, second)


@pytest.mark.parametrize("keep", [False, True])
def test_paged(keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of resident state; a kept directory counts a step once, over all of its buckets."""
    monkeypatch.setattr(matrices, "BUCKET_BYTES", 2 * 48 * 64 * 2)
    shapes = [(48, 64)] * 3 + [(64, 64), (70, 80)]
    params, twins = params_of(shapes), params_of(shapes)
    pager = Pager(directory=tmp_path / "kept", keep=True) if keep else Pager(directory=tmp_path)

    def make(params: Params, **options: Any) -> Any:
        groups = [{"params": params[:-1]}, {"params": params[-1:], "use_muon": False}]
        return optim8.Muon8bit(groups, min_8bit_size=0, **options)

    paged, resident = make(params, paged=pager), make(twins)
    take_steps(params, paged, 0, 3)
    take_steps(twins, resident, 0, 3)
    assert ended(params, paged) == ended(twins, resident)
    if keep:
        assert paged.memory.kept.journal.steps == 3
        paged.close()
        resumed = make(params, paged=Pager(directory=tmp_path / "kept", keep=True, resume=True))
        take_steps(params, resumed, 3, 5)
        take_steps(twins, resident, 3, 5)
        assert ended(params, resumed) == ended(twins, resident)


def test_a_step_that_ends_between_phases_leaves_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = params_of([(48, 64)])
    optimizer = optim8.Muon8bit(params, paged=Pager(directory=tmp_path / "kept", keep=True), min_8bit_size=0)
    take_steps(params, optimizer, 0, 1)

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(matrices, "move", fail)
    with pytest.raises(MemoryError):
        take_steps(params, optimizer, 1, 2)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="stepping was interrupted"):
        take_steps(params, optimizer, 1, 2)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5)], ids=str)
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    message = r"Muon8bit: parameter 1 of group {} must be a matrix .* got .*Put it into a group with use_muon=False"
    good, bad = params_of([(4, 4), shape])
    with pytest.raises(ValueError, match=message.format(0)):
        optim8.Muon8bit([good, bad])
    optimizer = optim8.Muon8bit([good])
    with pytest.raises(ValueError, match=message.format(1)):
        optimizer.add_param_group({"params": [parameter(torch.zeros(2, 2)), bad]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [bad], "use_muon": False})
    optimizer.param_groups[1]["use_muon"] = True
    good.grad, bad.grad = torch.ones(4, 4), torch.ones(shape)
    before = bits(good)
    with pytest.raises(ValueError, match="parameter 0 of group 1 must be a matrix"):
        optimizer.step()
    assert bits(good) == before


@pytest.mark.parametrize("options, error, message", [
    ({"ns_coefficients": (1, 2)}, ValueError, "Muon8bit: ns_coefficients must be three"),
    ({"ns_steps": 1.5}, TypeError, "Muon8bit: ns_steps must be a whole number"),
    ({"adjust_lr_fn": "other"}, ValueError, "Muon8bit: adjust_lr_fn must be None"),
    ({"momentum": -1.0}, ValueError, "Muon8bit: momentum must be at least 0"),
    ({"use_muon": 1}, TypeError, "Muon8bit: use_muon must be True or False"),
    ({"eps": -1e-7}, ValueError, "Muon8bit: eps must be at least 0"),
])  # fmt: skip
def test_options_that_cannot_be_honoured(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optim8.Muon8bit(params_of([(4, 4)]), **options)
    optimizer = optim8.Muon8bit(params_of([(4, 4)]))
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": params_of([(4, 4)]), **options})
    optimizer.param_groups[0].update(options)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 4)
    with pytest.raises(error, match=message):
        optimizer.step()


def train(make: Callable[[torch.nn.Sequential], list[torch.optim.Optimizer]], outputs: int) -> tuple[float, float]:
    """300 steps of a small network on a noisy function: the loss at the start and at the end."""
    x, w = random((2048, 32), 1), random((32, outputs), 11)
    y = torch.sin(x @ w / 2) + 0.5 * random((2048, outputs), 21)
    torch.manual_seed(1)
    layers = torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.GELU()
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, outputs))
    optimizers = make(model)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300) for optimizer in optimizers]
    loss_of = torch.nn.functional.mse_loss
    start = loss_of(model(x), y).item()
    for t in range(300):
        batch = slice(128 * (t % 16), 128 * (t % 16 + 1))
        model.zero_grad()
        loss_of(model(x[batch]), y[batch]).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return start, loss_of(model(x), y).item()


@pytest.mark.parametrize("outputs, optim_bits", [(24, 8), (24, 16), (1, 16)])
def test_300_steps_end_within_one_percent_of_torch(outputs: int, optim_bits: int) -> None:
    """With one output gradients are nearly of rank 1, and the iteration makes the rest as large: in 8 bits that is the
    rounding of the momentum, and the loss ends some percent higher. 16 bits follow there too."""

    def ours(model: torch.nn.Sequential) -> list[torch.optim.Optimizer]:
        groups = optim8.muon_groups(model, lr=0.02, adamw={"lr": 3e-3, "weight_decay": 0.01})
        return [optim8.Muon8bit(groups, min_8bit_size=0, optim_bits=optim_bits)]

    def of_torch(model: torch.nn.Sequential) -> list[torch.optim.Optimizer]:
        hidden = [model[0].weight, model[2].weight]
        others = [p for p in model.parameters() if all(p is not each for each in hidden)]
        adamw = torch.optim.AdamW(others, lr=3e-3, weight_decay=0.01)
        return [torch.optim.Muon(hidden, lr=0.02), adamw]

    start, expected = train(of_torch, outputs)
    _, actual = train(ours, outputs)
    assert expected < 0.85 * start, "the problem must have been learned for the comparison to mean anything"
    assert abs(actual - expected) <= 0.01 * expected
