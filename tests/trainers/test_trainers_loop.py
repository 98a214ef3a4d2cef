"""What PyTorch itself puts around an optimizer: compilation, every schedule, averaged weights, gradient scaling,
accumulation, clipping, frozen parameters; all in one training loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, EVERY, Case
from support.harness import ALL, bits, state_bits
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from optim8 import rules

STEPS = 6
# How each schedule is made. `test_no_schedule_is_left_out` compares with what torch has.
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 2),  # moves betas or momentum too
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=STEPS + 1),
    "SWALR": lambda o: SWALR(o, 1e-4, anneal_epochs=3),
}

MOVES_MOMENTUM = ("CyclicLR", "OneCycleLR")  # which refuse an optimizer that has neither betas nor momentum


def test_no_schedule_is_left_out() -> None:
    """Every schedule that torch exports and that can be made."""
    found = {
        name
        for name in lr_scheduler.__all__
        if inspect.isclass(getattr(lr_scheduler, name)) and name not in ("LRScheduler", "_LRScheduler")
    }
    assert found <= set(SCHEDULES)


def network(device: torch.device, seed: int = 3) -> torch.nn.Sequential:
    """With a matrix large enough for 8-bit state, and batch norm."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.GELU(), torch.nn.Linear(64, 70)
    ).to(device)


def batch(t: int, device: torch.device) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(t)).to(device)


def loss_of(model: torch.nn.Module, t: int, device: torch.device) -> torch.Tensor:
    return (model(batch(t, device)) - 1).square().mean()


def ended(model: torch.nn.Module, optimizer: Any) -> list[Any]:
    return [(bits(p), state_bits(optimizer, p)) for p in model.parameters() if p in optimizer.state]


@pytest.mark.parametrize("name", SCHEDULES)
@ALL
def test_schedule(case: Case, name: str, device: torch.device) -> None:
    """A schedule moves lr, betas or momentum, and a step takes what it says: as if the options were set by hand."""
    model, twin = network(device), network(device)
    optimizer, by_hand = (case.make(m.parameters(), min_8bit_size=4096) for m in (model, twin))
    if name in MOVES_MOMENTUM and optimizer.defaults.keys().isdisjoint({"betas", "momentum"}):
        with pytest.raises(ValueError, match="momentum"):  # as with torch's own
            SCHEDULES[name](optimizer)
        return
    schedule = SCHEDULES[name](optimizer)
    seen = set()
    for t in range(STEPS):
        for group, other in zip(optimizer.param_groups, by_hand.param_groups, strict=True):
            now = {hyper.name: group[hyper.name] for hyper in rules.rule(case.cls.rule).hypers}
            now["lr"] = float(now["lr"])
            other.update(now)
            seen.add(tuple(now.values()))
        for m, o in ((model, optimizer), (twin, by_hand)):
            o.zero_grad()
            loss_of(m, t, device).backward()
            o.step()
        schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(seen) > 1, "nothing was scheduled"
    assert ended(model, optimizer) == ended(twin, by_hand)


@pytest.mark.parametrize("multi", [False, True])
def test_averaged_model(multi: bool, device: torch.device) -> None:
    """AveragedModel sees what the optimizer changes in place, and its average trains on its own."""
    case = CASES["AdamW8bit"]
    model = network(device)
    optimizer = case.make(model.parameters(), min_8bit_size=4096)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if multi else None)
    history = []
    for t in range(3):
        optimizer.zero_grad()
        loss_of(model, t, device).backward()
        optimizer.step()
        average.update_parameters(model)
        history.append(model[0].weight.detach().clone())
    expected = (history[0] + history[1]) / 4 + history[2] / 2 if multi else torch.stack(history).mean(0)
    torch.testing.assert_close(average.module[0].weight.detach(), expected)
    update_bn([batch(t, device) for t in range(3)], average)
    assert int(average.module[1].num_batches_tracked) == 3


def train(
    case: Case, device: torch.device, compiled: str, accumulate: int, scaled: bool, backend: str = "aot_eager"
) -> tuple[list[Any], list[float]]:
    """A loop with everything on: a schedule, accumulation, gradient scaling, clipping, a frozen layer, a closure."""
    model = network(device)
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = case.make(model.parameters(), min_8bit_size=4096)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, 12)
    scaler = torch.amp.GradScaler(device.type, enabled=scaled, init_scale=256.0)
    forward = torch.compile(model, backend=backend) if compiled == "model" else model
    step = torch.compile(optimizer.step, backend=backend) if compiled == "step" else optimizer.step
    losses = []

    def iteration(t: int) -> None:
        optimizer.zero_grad()
        for part in range(accumulate):
            loss = loss_of(forward, accumulate * t + part, device) / accumulate
            losses.append(loss.detach())
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if scaled:
            scaler.step(optimizer)
        else:
            step()
        scaler.update()

    run = torch.compile(iteration, backend=backend) if compiled == "loop" else iteration
    for t in range(12):
        run(t)
        schedule.step()
    assert all(p not in optimizer.state for p in model[0].parameters())
    return ended(model, optimizer), [float(x) for x in losses]


@pytest.mark.parametrize("accumulate, scaled", [(1, False), (3, False), (1, True), (3, True)])
@ALL
def test_loop(case: Case, accumulate: int, scaled: bool, device: torch.device) -> None:
    _, losses = train(case, device, "", accumulate, scaled)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("compiled", ["model", "step", "loop"])
def test_compiled(compiled: str, device: torch.device) -> None:
    """The bits of the eager loop, and a schedule does not make the step compile again and again."""
    case = CASES["AdamW8bit"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    actual = train(case, device, compiled, 1, False)
    assert actual == train(case, device, "", 1, False)
    # Twelve values of lr, and not one graph more for it.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["recompile_limit"]


@pytest.mark.slow
def test_compiled_to_machine_code(device: torch.device) -> None:
    case = CASES["AdamW8bit"]
    for compiled in ("step", "loop", "model"):
        torch._dynamo.reset()
        _, losses = train(case, device, compiled, 1, False, "inductor")
        assert losses[-1] < losses[0]


@ALL
def test_a_compiled_closure_stays_compiled(case: Case, device: torch.device) -> None:
    """The step is left out of compilation; what its closure calls is not."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = network(device)
    optimizer = case.make(model.parameters(), min_8bit_size=4096)
    forward = torch.compile(model, backend=backend)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(forward, 0, device)
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    for _ in range(3):
        last = float(optimizer.step(closure).detach())
    assert last < first
    assert graphs


def test_parameters_that_are_frozen_and_thawed(device: torch.device) -> None:
    """Adapters: only some parameters have gradients; state begins with the first one."""
    for case in EVERY:
        model = network(device)
        optimizer = case.make(model.parameters(), min_8bit_size=4096)
        model[3].requires_grad_(False)
        before = bits(model[3].weight)
        for t in range(2):
            optimizer.zero_grad()
            loss_of(model, t, device).backward()
            optimizer.step()
        assert bits(model[3].weight) == before
        assert model[3].weight not in optimizer.state
        model[3].requires_grad_(True)
        loss_of(model, 2, device).backward()
        optimizer.step()
        assert optimizer.precision(model[3].weight) == "8bit"
        assert optimizer.state[model[3].weight]["step"] == 1
        assert optimizer.state[model[0].weight]["step"] == 3
