"""A step where torch's operations are recorded or replaced: FakeTensors, dispatch modes, MemTracker, make_fx."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import CASES, Case
from support.harness import ALL, bits, hostile, parameter, snapshot
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

import optim8
from optim8.step import record


def network(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(3)
    on: Any = {"device": device, "dtype": dtype}
    layers = torch.nn.Linear(64, 80, **on), torch.nn.GELU(), torch.nn.Linear(80, 3, **on), torch.nn.LayerNorm(3, **on)
    return torch.nn.Sequential(*layers)


def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - 1).square().mean()


def inputs(t: int, model: torch.nn.Module) -> torch.Tensor:
    like = next(model.parameters())
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(t)).to(like.device, like.dtype)


def train(model: torch.nn.Module, optimizer: Any, first: int, last: int) -> None:
    for t in range(first, last):
        optimizer.zero_grad()
        loss_of(model, inputs(t, model)).backward()
        optimizer.step()


def form(optimizer: Any, params: Any) -> list[dict[str, Any]]:
    """The state of each parameter: what is said of its tensors."""
    return [
        {key: (t.dtype, tuple(t.shape), t.stride(), t.device.type) for key, t in optimizer.state[p].items()}
        for p in params
    ]


OPTIONS = [{}, {"optim_bits": 16}, {"optim_bits": 32}, {"min_8bit_size": 100}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@ALL
def test_fake_tensors_get_state_of_the_form_of_real_ones(case: Case, options: dict[str, Any]) -> None:
    real = network()
    optimizer = case.make(real.parameters(), **options)
    train(real, optimizer, 0, 1)
    with FakeTensorMode():
        model = network()
        fake = case.make(model.parameters(), **options)
        train(model, fake, 0, 3)
    assert form(fake, model.parameters()) == form(optimizer, real.parameters())
    assert all("Fake" in type(t).__name__ for entry in fake.state.values() for t in entry.values())
    fake.step()  # the mode is left, and the tensors are what they were
    assert form(fake, model.parameters()) == form(optimizer, real.parameters())


@pytest.mark.parametrize("options", [{"master_bits": 24}, {"master_bits": 32}, {"param_rounding": "dithered"}], ids=str)
@ALL
def test_fake_tensors_with_wide_weights(case: Case, options: dict[str, Any]) -> None:
    real = network(dtype=torch.bfloat16)
    optimizer = case.make(real.parameters(), **options)
    train(real, optimizer, 0, 1)
    with FakeTensorMode():
        model = network(dtype=torch.bfloat16)
        fake = case.make(model.parameters(), **options)
        train(model, fake, 0, 2)
    assert form(fake, model.parameters()) == form(optimizer, real.parameters())


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_no_memory_is_touched(where: str) -> None:
    """A terabyte of parameters, on a device that need not be there."""
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(2**19, 2**19, device=where))
        optimizer = optim8.AdamW8bit([p])
        for _ in range(2):
            p.grad = torch.empty_like(p)
            optimizer.step()
    codes = [t for t in optimizer.state[p].values() if t.dtype == torch.uint8]
    assert [(tuple(t.shape), t.device.type) for t in codes] == [((2**19, 2**19), where)] * 2


@pytest.mark.parametrize("options", [{"capturable": True}, {"lr": 0.1}, {}], ids=str)
@pytest.mark.parametrize("name", ["AdamW8bit", "NAdam8bit"])
def test_counts_lie_where_a_gpu_would_have_them(name: str, options: dict[str, Any]) -> None:
    with FakeTensorMode():
        given = {key: torch.full((), value, device="cuda") if key == "lr" else value for key, value in options.items()}
        p = torch.nn.Parameter(torch.ones(300, device="cuda"))
        optimizer = CASES[name].with_defaults([p], **given)
        p.grad = torch.ones_like(p)
        optimizer.step()
    counts = [t.device.type for key, t in optimizer.state[p].items() if t.ndim == 0]
    assert counts == ["cuda" if options else "cpu"] * (2 if name == "NAdam8bit" else 1)


def test_matrices_and_overrides_under_a_fake_mode() -> None:
    def make(model: torch.nn.Sequential) -> Any:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        optim8.override(others[0], optim_bits=16, min_8bit_size=0)
        return optim8.Muon8bit([{"params": matrices}, {"params": others, "use_muon": False}])

    real = network()
    optimizer = make(real)
    train(real, optimizer, 0, 1)
    with FakeTensorMode():
        model = network()
        fake = make(model)
        train(model, fake, 0, 2)
    assert form(fake, model.parameters()) == form(optimizer, real.parameters())


def test_a_rule_without_state_under_a_fake_mode() -> None:
    with FakeTensorMode():
        model = network()
        optimizer = optim8.SGD8bit(model.parameters(), lr=0.1)
        train(model, optimizer, 0, 2)
    assert not any(optimizer.state.values())


def test_what_cannot_be_recorded_is_refused() -> None:
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(300))
        p.grad = torch.ones(300)
        with pytest.raises(
            RuntimeError, match=r"AdamW8bit: this step cannot be recorded: its state is paged.*Use paged"
        ):
            optim8.AdamW8bit([p], paged=True).step()
        scaled = optim8.AdamW8bit([p], fused=True)
        scaled.grad_scale = torch.ones(())
        with pytest.raises(RuntimeError, match=r"cannot be recorded: a GradScaler .*Use fused=False"):
            scaled.step()
        optimizer = optim8.AdamW8bit([p])
        with (
            optim8.override(p, lr=torch.tensor(0.1)),
            pytest.raises(RuntimeError, match=r"an override gives .* tensor"),
        ):
            optimizer.step()
        p.grad = None
        p.data = torch.ones(300, dtype=torch.bfloat16)
        p.grad = torch.ones(300, dtype=torch.bfloat16)
        optimizer.step()
        p.data = torch.ones(300, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"parameter 0 of group 0 needs a gradient of its shape, of its own dtype"):
            optimizer.step()


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@ALL
def test_a_dispatch_mode_sees_one_operator_and_the_bits_are_those_without(case: Case, device: torch.device) -> None:
    results = []
    for mode in (nullcontext(), FlopCounterMode(display=False), Watch()):
        model = network(device)
        optimizer = case.make(model.parameters())
        with mode:
            train(model, optimizer, 0, 3)
        train(model, optimizer, 3, 5)
        results.append(snapshot(optimizer, list(model.parameters())))
        if isinstance(mode, Watch):
            assert mode.seen.count("optim8.step.default") == 3
    assert results[0] == results[1] == results[2]


def test_what_is_no_operator_steps_beside_a_mode(device: torch.device) -> None:
    results = []
    for mode in (nullcontext(), Watch()):
        model = network(device)
        optimizer = CASES["AdamW8bit"].make(model.parameters(), paged=True)
        with mode:
            train(model, optimizer, 0, 3)
        results.append(snapshot(optimizer, list(model.parameters())))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["fake", "real"])
@ALL
def test_mem_tracker_counts_the_state_that_is_planned(case: Case, kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else nullcontext():
        model = network()
        optimizer = case.make(model.parameters(), min_8bit_size=100)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        counted = []
        with tracker:
            for t in range(3):
                train(model, optimizer, t, t + 1)
                counted.append(tracker.get_tracker_snapshot("current")[torch.device("cpu")][_MemRefType.OPT])
                tracker.reset_mod_stats()
    model = network()
    planned = optim8.memory.plan(model, case.make(model.parameters(), min_8bit_size=100))
    alignment = sum(row.nbytes for row in planned.rows if row.kind == "alignment")
    assert counted == [planned.state_bytes + alignment] * 3
    assert planned.state_bytes > 0


def test_mem_tracker_counts_paged_state_once() -> None:
    model = network()
    optimizer = CASES["AdamW8bit"].make(model.parameters(), paged=True)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        train(model, optimizer, 0, 1)
        counted = tracker.get_tracker_snapshot("current")[torch.device("cpu")][_MemRefType.OPT]
    tensors = [t for entry in optimizer.state.values() for t in entry.values()]
    assert counted == sum(t.untyped_storage().nbytes() for t in tensors)


def recorded(case_or_make: Any, device: torch.device, is_recorded: bool, **options: Any) -> tuple[Any, Any, Any]:
    model = network(device)
    optimizer = case_or_make(model.parameters(), **options)

    def iteration(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    program: Any = iteration
    if is_recorded:
        program = make_fx(iteration)(inputs(0, model))  # runs it once
    else:
        iteration(inputs(0, model))
    losses = [bits(program(inputs(t, model))) for t in range(1, 6)]
    return (losses, snapshot(optimizer, list(model.parameters()))), optimizer, program


@ALL
def test_a_program_of_make_fx_gives_the_bits_of_eager_steps(case: Case, device: torch.device) -> None:
    """It goes on with the optimizer's own state: counts and dithers advance."""
    expected, _, _ = recorded(case.make, device, False)
    actual, optimizer, program = recorded(case.make, device, True)
    assert actual == expected
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("optim8.step.default") == 1
    assert all(int(entry["step"]) == 6 for entry in optimizer.state.values())


def test_a_program_does_not_step_with_a_number_of_the_past(device: torch.device) -> None:
    _, optimizer, program = recorded(CASES["AdamW8bit"].make, device, True)
    x = torch.randn(8, 64, device=device)
    group = optimizer.param_groups[0]
    for name, value in (("lr", 0.5), ("betas", (0.8, 0.5)), ("maximize", True), ("lr", torch.tensor(0.5))):
        before, was = snapshot(optimizer, group["params"]), group[name]
        group[name] = value
        with pytest.raises(RuntimeError, match=f"was recorded with {name}=.*Record it again; or make {name} a tensor"):
            program(x)
        group[name] = was
        assert snapshot(optimizer, group["params"]) == before
        program(x)
    number = [float(entry["step"]) for entry in optimizer.state.values()]
    del optimizer, group  # what nobody can change is no longer asked for
    program(x)
    assert number == [10.0] * len(number)


def test_a_program_reads_a_tensor_in_each_run(device: torch.device) -> None:
    results = []
    for is_recorded in (False, True):
        lr = torch.tensor(0.1)
        model = network(device)
        optimizer = optim8.AdamW8bit(model.parameters(), lr=lr, min_8bit_size=0)
        train(model, optimizer, 0, 1)

        def step() -> None:
            optimizer.step()  # noqa: B023  called in this turn

        program = make_fx(step)() if is_recorded else step
        if not is_recorded:
            program()
        for t in range(5):
            lr.fill_(0.1 / (t + 1))
            program()
        results.append(snapshot(optimizer, list(model.parameters())))
    assert results[0] == results[1]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@ALL
def test_a_function_of_parameters_and_gradients(case: Case, mode: str) -> None:
    """An optimizer that is made in the program: its state is made there too, in every run."""

    def two_steps(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        p = p.detach().clone().requires_grad_()
        optimizer = case.make([p])
        for factor in (1.0, -0.5):
            p.grad = g * factor
            optimizer.step()
        return p.detach().clone()

    def values(seed: int) -> list[torch.Tensor]:
        return [hostile(600, torch.float32, seed=seed + i, small=-2, large=0).view(20, 30) for i in range(2)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = make_fx(two_steps, tracing_mode=mode)(*values(0))
    for seed in (0, 10, 20):
        assert bits(program(*values(seed))) == bits(two_steps(*values(seed)))


def test_closed_over_parameters_are_not_made_fake() -> None:
    p = parameter(torch.ones(300), torch.ones(300))
    optimizer = optim8.AdamW8bit([p])
    with pytest.raises(RuntimeError, match="FakeTensor"):
        make_fx(lambda x: optimizer.step(), tracing_mode="fake")(torch.ones(1))
    assert not optimizer.state


def arguments(plan_of: Callable[[str], str] = lambda plan: plan) -> tuple[Any, ...]:
    p = parameter(hostile(600, torch.float32, seed=1, small=-2, large=0), torch.ones(600))
    optimizer = CASES["AdamW8bit"].make([p])
    optimizer.step()
    params: list[torch.Tensor] = []
    grads: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    group = optimizer.param_groups[0]
    plan = record.record_group(optimizer, group, params, grads, states)
    numbers = record.numbers_of(group, record.number_names(optimizer.rule))
    return [p.detach() for p in params], grads, states, numbers, [plan_of(plan)], 0


def test_the_operator_keeps_the_contract_of_operators() -> None:
    torch.library.opcheck(torch.ops.optim8.step.default, arguments())


@pytest.mark.parametrize("at, name", [(0, "params"), (1, "grads"), (2, "states"), (3, "numbers")])
def test_lists_of_another_length_are_refused(at: int, name: str) -> None:
    for change in (lambda tensors: tensors[:-1], lambda tensors: [*tensors, torch.ones(600)]):
        given = list(arguments())
        before = [bits(p) for p in given[0]]
        params = given[0]
        given[at] = change(given[at])
        with pytest.raises(ValueError, match=f"optim8::step: {name} must have a tensor for each"):
            torch.ops.optim8.step(*given)
        assert [bits(p) for p in params] == before


def test_parameters_that_lie_otherwise_are_refused() -> None:
    given = list(arguments())
    given[0] = [given[0][0].view(20, 30).t()]
    given[1] = [torch.ones(30, 20)]
    given[2] = [t.view(30, 20) if t.numel() == 600 else t for t in given[2]]
    with pytest.raises(RuntimeError, match=r"other strides\. Record it again"):
        torch.ops.optim8.step(*given)


@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_tensors_are_left_to_the_eager_step() -> None:
    """What it says of them, it says under a mode and in a program too."""
    p = torch.nn.Parameter(TwoTensor(torch.ones(300), torch.ones(300)))
    optimizer = optim8.AdamW8bit([p])
    p.grad = TwoTensor(torch.ones(300), torch.ones(300))
    for mode in (nullcontext(), Watch()):
        with mode, pytest.raises(ValueError, match="parameter 0 of group 0"):
            optimizer.step()
    with _disable_current_modes(), FakeTensorMode(), pytest.raises(RuntimeError, match="must be a plain tensor, got a"):
        optimizer.step()
