"""What docs/switching.md says of the optimizers here, and its recipes with the libraries themselves, where they are
installed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import EVERY, Case
from support.harness import bits, parameter
from test_docs import blocks

import optim8
from optim8 import rules

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "switching.md"
LR = 1e-3
EPS = 1e-8


def updates(cls: Any, gradients: list[float], start: float = 0.0, n: int = 64, **hyper: Any) -> list[float]:
    """The mean update of each step, in learning rates, of a parameter whose elements have the same gradient."""
    p = parameter(torch.full((n,), start))
    optimizer = cls([p], lr=LR, optim_bits=32, **hyper)
    made = []
    for gradient in gradients:
        before, p.grad = p.detach().double(), torch.full((n,), gradient)
        optimizer.step()
        made.append(float((before - p.detach().double()).mean()) / LR)
    return made


def gradient(shape: tuple[int, ...], t: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(t))


# First updates for a gradient of 1, by hand.
FIRST: dict[str, tuple[type, dict[str, Any], float]] = {
    "Adam": (optim8.AdamW8bit, {}, 1.0),
    "RMSprop": (optim8.RMSprop8bit, {}, 10.0),
    "RMSprop as timm's RMSpropTF and optax": (optim8.RMSprop8bit, {"alpha": 0.9}, math.sqrt(10)),
    "NAdam": (optim8.NAdam8bit, {}, 1.056),
    "Adagrad": (optim8.Adagrad8bit, {}, 1.0),
    "Adagrad as optax and keras": (optim8.Adagrad8bit, {"initial_accumulator_value": 0.1}, 1 / math.sqrt(1.1)),
    "RAdam": (optim8.RAdam8bit, {}, 1.0),
    "AdEMAMix": (optim8.AdEMAMix8bit, {"weight_decay": 0.0}, 1 + 5 * 1e-4),
    "LARS": (optim8.LARS8bit, {}, 1.0),  # its parameter is 0: ratio 1
}


@pytest.mark.parametrize("what", FIRST)
def test_the_first_update(what: str) -> None:
    cls, hyper, expected = FIRST[what]
    assert updates(cls, [1.0], **hyper)[0] == pytest.approx(expected, rel=1e-3)


def test_nadam_has_the_schedule_of_torch() -> None:
    mu = [0.9 * (1 - 0.5 * 0.96 ** (0.004 * t)) for t in (1, 2)]
    exact = mu[1] * (1 - 0.9) / (1 - mu[0] * mu[1]) + (1 - mu[0]) / (1 - mu[0])
    assert updates(optim8.NAdam8bit, [1.0])[0] == pytest.approx(exact, rel=1e-4)


def test_eps_is_added_after_the_correction() -> None:
    """keras' of t steps is one of eps / sqrt(1 - beta2^t) here."""
    eps = 1e-4
    assert updates(optim8.AdamW8bit, [eps], eps=eps)[0] == pytest.approx(0.5, rel=1e-4)
    as_keras = eps / math.sqrt(1 - 0.999)
    assert updates(optim8.AdamW8bit, [eps], eps=as_keras)[0] == pytest.approx(0.0307, rel=2e-3)


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.99, 0.999])
def test_radam_rectifies_from_the_sixth_step(beta2: float) -> None:
    """Before, a step is the corrected first moment, as large as the gradient; decay acts there too."""
    made = updates(optim8.RAdam8bit, [1e3] * 7, betas=(0.9, beta2))
    assert made[:5] == pytest.approx([1e3] * 5, rel=1e-3)
    assert all(0 < each < 1 for each in made[5:])
    decayed = updates(optim8.RAdam8bit, [0.0] * 5, start=2.0, weight_decay=0.5, decoupled_weight_decay=True)
    assert decayed == pytest.approx([1.0] * 5, rel=0.01)


# alpha and beta3 at some steps, of T = 100 and the defaults.
SCHEDULES = [(1, 0.05, 0.9909), (2, 0.1, 0.995233), (50, 2.5, 0.9998), (100, 5.0, 0.9999), (101, 5.0, 0.9999)]


@pytest.mark.parametrize("t, alpha, beta3", SCHEDULES)
@pytest.mark.parametrize("only", ["", "t_alpha", "t_beta3"])
def test_the_schedules_of_ademamix(t: int, alpha: float, beta3: float, only: str) -> None:
    """Read off a step from a state that is set: slow moment 1, fast one 0, corrected second moment 1, gradient 0."""
    p = parameter(torch.zeros(64))
    schedules = {name: 100 for name in ("t_alpha", "t_beta3") if only in ("", name)}
    optimizer = optim8.AdEMAMix8bit([p], lr=1.0, optim_bits=32, weight_decay=0.0, **schedules)
    p.grad = torch.zeros(64)
    optimizer.step()
    state = optimizer.state[p]
    state["step"].fill_(t - 1)
    state["exp_avg"].zero_()
    state["exp_avg_slow"].fill_(1.0)
    state["exp_avg_sq"].fill_((1 - 0.999**t) / 0.999)
    before = p.detach().clone()
    optimizer.step()
    there = float(state["exp_avg_slow"][0])
    assert there == pytest.approx(0.9999 if only == "t_alpha" else beta3, abs=6e-5)
    assert float((before - p.detach())[0]) == pytest.approx((5.0 if only == "t_beta3" else alpha) * there, rel=1e-4)


def test_the_slow_moment_of_ademamix_turns_in_8_bits() -> None:
    """Half of each block turns its gradients after a while: parameters then go back as with float32 state."""
    turned = {}
    for optim_bits in (8, 32):
        p = parameter(torch.zeros(4096))
        optimizer = optim8.AdEMAMix8bit([p], betas=(0.9, 0.999, 0.9999), weight_decay=0.0, optim_bits=optim_bits)
        for t in range(300):
            p.grad = torch.full((4096,), 0.5)
            if t == 100:
                farthest = p.detach()[::2].mean()
            if t >= 100:
                p.grad[::2] = -0.5
            optimizer.step()
        turned[optim_bits] = float(p.detach()[::2].mean() - farthest)
    assert turned[32] > 100 * LR
    assert turned[8] == pytest.approx(turned[32], rel=0.01)


@pytest.mark.parametrize("cls", [optim8.LAMB8bit, optim8.LARS8bit])
def test_lamb_and_lars_have_a_ratio_whatever_the_decay_and_the_shape(cls: Any) -> None:
    """They move by norm(p), not cut and not clipped, a tensor of one dimension too, and without a weight decay."""
    more = {} if cls is optim8.LAMB8bit else {"trust_coefficient": 1.0}
    for start, gradient in ((1.0, 1.0), (1.0, 1e6), (1e3, 1.0)):
        assert updates(cls, [gradient], start=start, **more)[0] == pytest.approx(start, rel=2e-3)


@pytest.mark.parametrize("weight_decay", [1e-3, 0.5, 10.0])
def test_without_a_gradient_lamb_shrinks_by_lr_whatever_the_decay(weight_decay: float) -> None:
    assert updates(optim8.LAMB8bit, [0.0], start=2.0, weight_decay=weight_decay)[0] == pytest.approx(2.0, rel=1e-3)
    assert updates(optim8.LAMB8bit, [0.0], start=2.0)[0] == 0.0


def test_muon_steps_matrices_without_values() -> None:
    params = [parameter(torch.ones(shape)) for shape in ((0, 3), (3, 0), (3, 3))]
    optimizer = optim8.Muon8bit(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert float(params[2].detach().max()) < 1.0
    assert [tuple(p.shape) for p in params] == [(0, 3), (3, 0), (3, 3)]


def test_a_change_of_lr_acts_at_once_on_a_momentum() -> None:
    for cls in (optim8.LARS8bit, optim8.RMSprop8bit, optim8.SGD8bit):
        p = parameter(torch.ones(64))
        optimizer = cls([p], lr=0.1, momentum=0.9)
        p.grad = torch.ones(64)
        optimizer.step()
        before = bits(p)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        assert bits(p) == before, cls.__name__
        momentum = next(value for key, value in optimizer.state[p].items() if key.startswith("momentum"))
        assert float(momentum[0]) > 0, "the sign of the gradient"


def test_the_cycle_turns_the_momentum_and_no_alpha() -> None:
    for cls, key in ((optim8.RMSprop8bit, "momentum"), (optim8.SGD8bit, "momentum"), (optim8.AdamW8bit, "betas")):
        optimizer = cls([parameter(torch.ones(3))], lr=0.1, **({"momentum": 0.5} if key == "momentum" else {}))
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        group = optimizer.param_groups[0]
        assert (group[key] if key == "momentum" else group[key][0]) == 0.95
        assert group.get("alpha", 0.99) == 0.99
        assert "betas" not in group or key == "betas"


ARGUMENTS = [(case, hyper.name) for case in EVERY for hyper in rules.rule(case.cls.rule).hypers]


CHANGED: dict[str, Any] = {
    "lr": 3e-2,
    "betas": (0.5, 0.6),
    "eps": 100.0,
    "weight_decay": 0.1,
    "momentum": 0.3,
    "alpha": 0.3,
    "amsgrad": True,
    "dampening": 0.4,
    "centered": True,
    "rho": 0.3,
    "lr_decay": 0.5,
    "initial_accumulator_value": 0.5,
    "momentum_decay": 0.5,
    "decoupled_weight_decay": True,
    "t_alpha": 5,
    "t_beta3": 5,
    "trust_coefficient": 0.5,
    "maximize": True,
    "use_muon": False,
}


@pytest.mark.parametrize("case, name", ARGUMENTS, ids=lambda value: str(value))
def test_no_argument_is_without_effect(case: Case, name: str) -> None:
    """Each changes where some steps end, beside what it needs to matter."""
    hypers = {hyper.name: hyper.default for hyper in rules.rule(case.cls.rule).hypers}
    beside: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.5, **({"momentum": 0.7} if "momentum" in hypers else {})}
    if name == "betas" and "use_muon" in hypers:
        beside["use_muon"] = False
    changed = not hypers["nesterov"] if name == "nesterov" else CHANGED[name]
    if name == "betas" and len(hypers["betas"]) == 3:
        changed = (*changed, 0.7)

    def end(options: dict[str, Any]) -> bytes:
        p = parameter(gradient((6, 6), 99))
        group = {"params": [p], **{key: value for key, value in options.items() if key == "use_muon"}}
        optimizer = case.cls(
            [group], **{key: value for key, value in options.items() if key != "use_muon"}, optim_bits=32
        )
        for t in range(8):
            p.grad = gradient((6, 6), t) * (50.0 if t == 0 else 1.0)
            optimizer.step()
        return bits(p)

    assert end(beside) != end({**beside, name: changed})


def test_the_momentum_of_muon_on_bfloat16_stays_the_mean_of_the_gradients() -> None:
    p = parameter(gradient((32, 16), 0).bfloat16())
    optimizer = optim8.Muon8bit([p], lr=LR, nesterov=False, optim_bits=32)
    mean = torch.zeros(32, 16)
    for t in range(4):
        p.grad = gradient((32, 16), 1 + t).bfloat16()
        optimizer.step()
        mean = 0.95 * mean + 0.05 * p.grad.float()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], mean)


def test_a_sum_times_one_minus_the_momentum_is_the_mean_of_muon() -> None:
    p, q = parameter(torch.ones(4, 4)), parameter(torch.ones(4, 4))
    mean, total = optim8.Muon8bit([p], optim_bits=32), optim8.SGD8bit([q], momentum=0.95, optim_bits=32)
    for t in range(5):
        p.grad = q.grad = gradient((4, 4), t)
        mean.step()
        total.step()
    scaled = total.state[q]["momentum_buffer"] * (1 - 0.95)
    torch.testing.assert_close(mean.state[p]["momentum_buffer"], scaled)


def test_float32_weights_of_flashoptim_load() -> None:
    model = torch.nn.Linear(70, 70).bfloat16()
    optimizer = optim8.AdamW8bit(model.parameters(), lr=LR, master_bits=24)
    assert optim8.AdamW8bit(model.parameters()).defaults["master_bits"] == 16
    wide = {name: p.detach().float() + 1e-4 for name, p in model.named_parameters()}
    optim8.load_master_state_dict(model, optimizer, wide)
    weights = optim8.master_state_dict(model, optimizer)
    for name, value in wide.items():
        torch.testing.assert_close(weights[name], value, rtol=2.0**-15, atol=0)


def test_a_decay_over_the_first_lr_is_that_of_decouple_lr() -> None:
    """A step shrinks by weight_decay lr / lr_0."""
    made = updates(optim8.AdamW8bit, [0.0], start=1.0, weight_decay=1e-4 / LR)
    assert made[0] * LR == pytest.approx(1e-4, rel=1e-2)


# The recipes, with the libraries whose state they read.


def recipes() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in blocks(DOCUMENT.read_text(encoding="utf-8")):
        if not block.needs or "h5py" in block.needs:
            exec(block.code, names)
    return names


@pytest.mark.peers
def test_optax_goes_on_here() -> None:
    optax = pytest.importorskip("optax")
    pytest.importorskip("h5py")
    start = {"kernel": np.ones((6, 5), np.float32), "bias": np.zeros(5, np.float32)}
    theirs, rule = {"Dense_0": dict(start)}, optax.adamw(1e-2, weight_decay=0.1)
    state = rule.init(theirs)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    optimizer = optim8.AdamW8bit(model.named_parameters(), lr=1e-2, weight_decay=0.1)

    def step(t: int, *, here: bool) -> None:
        nonlocal state, theirs
        grads = {"Dense_0": {"kernel": gradient((6, 5), t).numpy(), "bias": gradient((5,), t + 50).numpy()}}
        change, state = rule.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, change)
        if here:
            model[0].weight.grad, model[0].bias.grad = gradient((6, 5), t).T.contiguous(), gradient((5,), t + 50)
            optimizer.step()

    for t in range(3):
        step(t, here=False)
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(np.array(theirs["Dense_0"]["kernel"])).T)
        model[0].bias.copy_(torch.from_numpy(np.array(theirs["Dense_0"]["bias"])))
    place = {"0.weight": (("Dense_0", "kernel"), True), "0.bias": (("Dense_0", "bias"), False)}
    recipes()["load_optax"](optimizer, state, place)
    for t in range(3, 6):
        step(t, here=True)
    for p, value in ((model[0].weight, theirs["Dense_0"]["kernel"].T), (model[0].bias, theirs["Dense_0"]["bias"])):
        torch.testing.assert_close(p.detach(), torch.from_numpy(np.array(value)), rtol=1e-5, atol=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_keras_goes_on_here(suffix: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    pytest.importorskip("h5py")
    keras = pytest.importorskip("keras")
    theirs = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5), keras.layers.Dense(5), keras.layers.Dense(3)])
    decay = {"weight_decay": 0.1} if kind == "AdamW" else {}
    theirs.compile(optimizer=getattr(keras.optimizers, kind)(1e-2, epsilon=0.0, **decay), loss="mse")
    variables = [v.value for v in theirs.trainable_variables]
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 5), torch.nn.Linear(5, 3))
    optimizer = getattr(optim8, f"{kind}8bit")(model.parameters(), lr=1e-2, eps=0.0, **decay)
    grads = [[gradient(tuple(v.shape), 10 * t + i) for i, v in enumerate(variables)] for t in range(6)]
    for t in range(3):
        theirs.optimizer.apply(grads[t], theirs.trainable_variables)
    theirs.save(tmp_path / f"model.{suffix}")
    names = recipes()
    names["load_keras"](optimizer, names["variables_of"](tmp_path / f"model.{suffix}"))
    with torch.no_grad():
        for p, v in zip(model.parameters(), theirs.trainable_variables, strict=True):
            p.copy_(v.value.detach().T if p.dim() == 2 else v.value.detach())
    for t in range(3, 6):
        theirs.optimizer.apply([g.clone() for g in grads[t]], theirs.trainable_variables)
        for p, g in zip(model.parameters(), grads[t], strict=True):
            p.grad = g.T.contiguous() if p.dim() == 2 else g
        optimizer.step()
    for p, v in zip(model.parameters(), theirs.trainable_variables, strict=True):
        value = v.value.detach()
        torch.testing.assert_close(p.detach(), value.T if p.dim() == 2 else value, rtol=1e-5, atol=1e-6)
