"""A step in a program of torch.compile: one operator in one graph, with the bits of the eager step, and nothing of what
changes from step to step is frozen in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case
from support.compilation import compiled, give_grads, make_params
from support.harness import ALL, parameter, snapshot
from torch.optim import lr_scheduler

import optim8

STEPS = 10


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


Make = Callable[[list[torch.nn.Parameter]], Any]
Change = Callable[[int, Any, list[torch.nn.Parameter]], None]


def nothing(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    """No change between steps."""


def run(
    make: Make,
    device: torch.device,
    is_compiled: bool,
    change: Change = nothing,
    dtype: torch.dtype = torch.float32,
    backend: str = "aot_eager",
) -> tuple[Any, Any]:
    """Ten steps under a schedule; `change` is called before each."""
    params = make_params(device, dtype)
    optimizer = make(params)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    step = compiled(optimizer, backend) if is_compiled else optimizer.step
    for t in range(STEPS):
        give_grads(params, t)
        change(t, optimizer, params)
        step()
        schedule.step()
    return snapshot(optimizer, params), optimizer


def check_alike(make: Make, device: torch.device, change: Change = nothing, **options: Any) -> None:
    expected, _ = run(make, device, False, change, **options)
    actual, _ = run(make, device, True, change, **options)
    assert actual == expected
    assert not torch._dynamo.utils.counters["graph_break"]


def graphs() -> int:
    found: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


@ALL
def test_ten_steps_under_a_schedule_have_the_bits_of_eager_ones(case: Case, device: torch.device) -> None:
    """Neither the count of steps, nor the dither that it begins, nor lr is frozen, though each is new in every step.
    There is one graph for the first lr, and one with lr as its input."""
    check_alike(case.make, device)
    assert graphs() == 2


PRECISIONS = [
    {"optim_bits": 16},
    {"optim_bits": 32},
    {"master_bits": 24},
    {"master_bits": 32},
    {"param_rounding": "dithered"},
]


@ALL
def test_another_precision(case: Case, device: torch.device) -> None:
    """One for each class, in turn: a program takes seconds to compile. Eager steps have tests of all of them."""
    options: dict[str, Any] = PRECISIONS[list(CASES).index(case.name) % len(PRECISIONS)]
    dtype = torch.float32 if "optim_bits" in options else torch.bfloat16
    check_alike(lambda params: case.make(params, **options), device, dtype=dtype)


def test_matrices(device: torch.device) -> None:
    def make(params: list[torch.nn.Parameter]) -> Any:
        groups = [{"params": params[:1]}, {"params": params[1:], "use_muon": False, "lr": 2e-3}]
        return optim8.Muon8bit(groups, lr=0.02, min_8bit_size=0)

    check_alike(make, device)


def test_compiled_to_machine_code(device: torch.device) -> None:
    make = CASES["AdamW8bit"].make
    assert run(make, device, True, backend="inductor")[0] == run(make, device, False)[0]
    assert graphs() == 2


def test_a_rule_without_state(device: torch.device) -> None:
    check_alike(lambda params: optim8.SGD8bit(params, lr=0.1), device)


def test_groups_overrides_and_strides(device: torch.device) -> None:
    def make(params: list[torch.nn.Parameter]) -> Any:
        params[3].data = params[3].data.to(memory_format=torch.channels_last)
        params[0].data = torch.zeros(60, 40, device=device)[::2].t()  # with gaps
        optim8.override(params[1], weight_decay=0.5, lr=0.01)
        groups = [{"params": params[:2], "maximize": True}, {"params": params[2:], "lr": 0.03, "betas": (0.5, 0.7)}]
        return optim8.AdamW8bit(groups, lr=0.02, min_8bit_size=0)

    check_alike(make, device)


def set_option(name: str, value: Any, at: int = 3) -> Change:
    def change(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
        if t == at:
            optimizer.param_groups[0][name] = value

    return change


def drop_gradient(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    if t % 3 == 1:
        params[t % 2].grad = None


def override_late(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    if t in (3, 5, 7):
        optim8.override(params[t % 4], weight_decay=0.1 * t)


def override_precision(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    if t in (3, 6):
        optim8.override(params[t % 4], optim_bits=32 if t == 3 else 16)


def reload(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    if t == 4:
        optimizer.load_state_dict(optimizer.state_dict())


def reset(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    if t in (2, 6):
        optimizer.reset_state(params[0] if t == 2 else None)


def add_group(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    if t == 3:
        more = parameter(torch.ones(70, device=params[0].device))
        optimizer.add_param_group({"params": [more], "lr": 0.5})
    for group in optimizer.param_groups[1:]:
        group["params"][0].grad = torch.ones_like(group["params"][0])
        params[3].data.mul_(group["params"][0].sum() / 70)  # so that the snapshot has it


def take_other_memory(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    if t == 5:
        params[0].data = params[0].data.clone()
        entry = optimizer.state[params[1]]
        entry.update({key: value.clone() for key, value in entry.items()})


def lose_state(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    if t == 3:
        optimizer.state.clear()
    if t == 6:
        optimizer.state = {}


def take_state_of_torch(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    if t == 4:
        for p in params:
            values = {key: torch.full_like(p, 0.5) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(7.0), **values}


CHANGES: dict[str, Change] = {
    "weight_decay": set_option("weight_decay", 0.25),
    "betas": set_option("betas", (0.6, 0.7)),
    "a flag": set_option("maximize", True),
    "rounding": set_option("rounding", "nearest"),
    "gradients come and go": drop_gradient,
    "overrides": override_late,
    "overrides of precision": override_precision,
    "load_state_dict": reload,
    "reset_state": reset,
    "add_param_group": add_group,
    "other memory": take_other_memory,
    "state is lost": lose_state,
    "state of another optimizer": take_state_of_torch,
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_between_steps_is_seen(what: str, device: torch.device) -> None:
    check_alike(CASES["AdamW8bit"].make, device, CHANGES[what])


def test_a_tensor_as_lr_is_read_in_each_step(device: torch.device) -> None:
    def change(t: int, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
        optimizer.param_groups[0]["lr"].fill_(0.1 / (t + 1))

    check_alike(lambda params: optim8.AdamW8bit(params, lr=torch.tensor(0.1), min_8bit_size=0), device, change)
    assert graphs() == 1


def test_numbers_of_any_size_from_the_start(device: torch.device) -> None:
    """dynamic=True, under which every number of a group is an input."""
    results = []
    for is_compiled in (False, True):
        params = make_params(device)
        optimizer = CASES["AdamW8bit"].make(params)
        step = optimizer.step
        if is_compiled:
            step = torch.compile(lambda: optimizer.step(), fullgraph=True, dynamic=True, backend="aot_eager")  # noqa: B023
        for t in range(5):
            give_grads(params, t)
            optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
            step()
        results.append(snapshot(optimizer, params))
    assert results[0] == results[1]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_what_changes_in_the_program_itself(as_tensor: bool, device: torch.device) -> None:
    """Two steps in one program, with other gradients and another lr behind the first."""

    def twice(optimizer: Any, params: list[torch.nn.Parameter]) -> None:
        for p in params:
            p.grad.mul_(0.5)  # type: ignore[union-attr]
        optimizer.step()
        if as_tensor:
            optimizer.param_groups[0]["lr"].mul_(0.5)
        else:
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
        optimizer.step()

    results = []
    for is_compiled in (False, True):
        params = make_params(device)
        optimizer = optim8.AdamW8bit(params, lr=torch.tensor(0.1) if as_tensor else 0.1, min_8bit_size=0)
        step = torch.compile(twice, fullgraph=True, backend="aot_eager") if is_compiled else twice
        for t in range(3):
            give_grads(params, t)
            step(optimizer, params)
        # torch.compile writes capturable=True into a group that a program changes; it does not stay there.
        assert optimizer.state_dict()["param_groups"][0]["capturable"] is False
        optimizer.step()
        results.append(snapshot(optimizer, params))
    assert results[0] == results[1]


@pytest.mark.parametrize("name, value", [("maximize", True), ("rounding", "nearest"), ("optim_bits", 32)])
def test_a_flag_that_changes_in_the_program_itself(name: str, value: Any, device: torch.device) -> None:
    def change_and_step(optimizer: Any) -> None:
        optimizer.param_groups[0][name] = value
        optimizer.step()

    results = []
    for way in ("eager", "compiled", "fullgraph"):
        params = make_params(device)
        optimizer = CASES["AdamW8bit"].make(params)
        give_grads(params, 0)
        if way == "fullgraph":
            with pytest.raises(torch._dynamo.exc.Unsupported, match="changes an option of a parameter group"):
                torch.compile(change_and_step, fullgraph=True, backend="aot_eager")(optimizer)
            continue
        (torch.compile(change_and_step, backend="aot_eager") if way == "compiled" else change_and_step)(optimizer)
        assert optimizer.state_dict()["param_groups"][0]["capturable"] is False
        results.append(snapshot(optimizer, params))
    assert results[0] == results[1]


def test_training_goes_on_from_eager_to_compiled_and_back(device: torch.device) -> None:
    results = []
    for is_compiled in (False, True):
        params = make_params(device)
        optimizer = CASES["AdamW8bit"].make(params)
        step = compiled(optimizer) if is_compiled else optimizer.step
        for t in range(9):
            give_grads(params, t)
            (step if 3 <= t < 6 else optimizer.step)()
        results.append(snapshot(optimizer, params))
    assert results[0] == results[1]


def test_one_operator_in_the_graph(device: torch.device) -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    params = make_params(device)
    optimizer = CASES["AdamW8bit"].make(params)
    give_grads(params, 0)
    torch.compile(lambda: optimizer.step(), fullgraph=True, backend=backend)()
    assert sum("optim8" in str(target) for target in seen) == 1
