"""The steps of single tensors where torch records or replaces operations: operators that change what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.harness import bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from optim8 import functional as F

OPS = torch.ops.optim8
MAPS = F.create_dynamic_map(True), F.create_dynamic_map(False)  # torch.compile does not follow how they are made
Tensors = tuple[torch.Tensor, ...]


def start(name: str, in_codes: bool, device: torch.device | str) -> Tensors:
    """A gradient, a parameter and its state: moments, then scales."""
    g, p = torch.randn(2, 20, 30, device=device)
    second = name == "adam"
    if not in_codes:
        return g, p, *(torch.zeros_like(p) for _ in range(1 + second))
    codes = [torch.full((20, 30), code, dtype=torch.uint8, device=device) for code in (127, 0)[: 1 + second]]
    return g, p, *codes, *(torch.zeros(3, device=device) for _ in range(1 + second))


def step(name: str, in_codes: bool, tensors: Tensors, number: int) -> None:
    g, p, *state = tensors
    second = name == "adam"
    scalars: tuple[Any, ...] = (0.9, 0.99, 0.0, 0.0, 1e-8, number, 0.1)
    if not in_codes:
        F.optimizer_update_32bit(name, g, p, state[0], 0.9, 1e-8, number, 0.1, state[1] if second else None, 0.99)
        return
    maps = MAPS[0].to(p.device), MAPS[1].to(p.device)
    codes, scales = (state[:2], state[2:]) if second else ((state[0], None), (state[1], None))
    F.optimizer_update_8bit_blockwise(
        name, g, p, *codes, *scalars, maps[0], maps[1] if second else None, *scales, weight_decay=0.1
    )


def two_steps(name: str, in_codes: bool) -> Callable[..., Tensors]:
    def program(*tensors: torch.Tensor) -> Tensors:
        copies = tuple(t.clone() for t in tensors)
        for number in (1, 2):
            step(name, in_codes, copies, number)
        return copies

    return program


WAYS: dict[str, Callable[..., Any]] = {
    "torch.compile": lambda program, _: torch.compile(program, fullgraph=True, backend="aot_eager"),
    "make_fx": lambda program, tensors: make_fx(program)(*tensors),
    "make_fx fake": lambda program, tensors: make_fx(program, tracing_mode="fake", _allow_non_fake_inputs=True)(
        *tensors
    ),
}
KINDS = pytest.mark.parametrize("name, in_codes", [("adam", True), ("adam", False), ("lion", True), ("lion", False)])


@pytest.mark.parametrize("way", WAYS)
@KINDS
def test_a_recorded_step_has_the_bits_of_the_function(
    name: str, in_codes: bool, way: str, device: torch.device
) -> None:
    torch._dynamo.reset()
    first, second = start(name, in_codes, device), start(name, in_codes, device)
    recorded = WAYS[way](two_steps(name, in_codes), first)
    for tensors in (first, second):
        expected = two_steps(name, in_codes)(*tensors)
        assert [bits(t) for t in recorded(*tensors)] == [bits(t) for t in expected]
        assert bits(expected[1]) != bits(tensors[1])


def test_what_torch_cannot_functionalize_is_refused(device: torch.device) -> None:
    """torch.func.functionalize takes no operator of others that changes its inputs."""
    with pytest.raises(RuntimeError, match="optim8::optimizer_update_32bit"):
        torch.func.functionalize(two_steps("adam", False))(*start("adam", False, device))


@KINDS
def test_a_parameter_that_is_trained(name: str, in_codes: bool, device: torch.device) -> None:
    """In place, whether or not it is a leaf that requires a gradient, as the function does."""
    torch._dynamo.reset()
    results = []
    for is_compiled in (False, True):
        torch.manual_seed(7)
        g, p, *state = start(name, in_codes, device)
        tensors = (g, torch.nn.Parameter(p), *state)
        call = torch.compile(step, fullgraph=True, backend="aot_eager") if is_compiled else step
        for number in (1, 2, 3):
            call(name, in_codes, tensors, number)
        results.append([bits(t) for t in tensors])
    assert results[0] == results[1]


def test_fake_tensors_reach_no_native_code() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, in_codes in (("adam", True), ("lion", False)):
            tensors = start(name, in_codes, "cpu")
            step(name, in_codes, tensors, 1)
        with pytest.raises(ValueError, match="optimizer_update_32bit: g must have p's shape"):
            step("lion", False, (torch.zeros(3), *tensors[1:]), 1)


def test_opcheck(device: torch.device) -> None:
    g, p, m, v, a, b = start("adam", True, device)
    scalars: tuple[Any, ...] = (0.9, 0.99, 0.0, 0.0, 1e-8, 1, 0.1)
    maps = MAPS[0].to(device), MAPS[1].to(device)
    torch.library.opcheck(OPS.optimizer_update_8bit_blockwise.default, ("adam", g, p, m, v, *scalars, *maps, a, b))
    g, p, m, v = start("adam", False, device)
    torch.library.opcheck(OPS.optimizer_update_32bit.default, ("adam", g, p, m, v, *scalars))
