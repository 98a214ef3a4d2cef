"""What the tests of conversions share: parameters, steps with the same gradients, and what must agree."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import reference
import torch
from cases import CASES, Case

import optim8
from support.harness import codes_of, through_a_file, values
from support.rounding import Rounded

# 20 blocks and a short one; small tensors, none, one value; two orders of memory.
SHAPES: tuple[tuple[int, ...], ...] = ((5003,), (70, 60), (10,), (0,), (), (8, 16, 8, 8))
Params = list[torch.nn.Parameter]


def make_params(dtype: torch.dtype = torch.float32, *, channels_last: bool = True, seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in SHAPES:
        data = torch.randn(shape, generator=generator).to(dtype)
        if data.ndim == 4 and channels_last:
            data = data.contiguous(memory_format=torch.channels_last)
        params.append(torch.nn.Parameter(data))
    return params


def twins(params: Sequence[torch.nn.Parameter]) -> Params:
    """Copies with the same strides, without gradients."""
    return [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]


def steps(params: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps `first` to `last` (not included); the gradients depend on the number of the step only."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(1000 + t)
        for p in params:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator) * 1e-2)
        optimizer.step()


CARRIERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "as it is": lambda state_dict: state_dict,
    "a copy": copy.deepcopy,
    "torch.save": through_a_file,
}


def converted_scales(x: reference.Array, signed: bool, actual: reference.Array) -> reference.Array:
    """What the scales of converted values may be, the one that is nearer to `actual`: with them the largest magnitude
    of a block falls on 1, or on the last value before, as dithered steps leave it. If it is negative it falls on the
    lowest code: there is none for -1."""
    top = reference.block_max(x).astype(np.float32)
    last = (top / np.float32(reference.largest_value(signed))).astype(np.float32)
    choose = np.abs(actual - last) < np.abs(actual - top)
    if signed and x.size:
        choose |= np.minimum.reduceat(x, np.arange(0, x.size, reference.BLOCK)) == -top
    return np.where(choose, last, top).astype(np.float64)


def assert_holds(optimizer: Any, case: Case, p: torch.Tensor, expected: Mapping[str, torch.Tensor]) -> None:
    """The state of `p` is `expected` (floats by moment): bit for bit in 32 bits, else the nearest codes, in 16 bits
    with the nearest low bytes, whichever of the two scales blocks have."""
    state = optimizer.state[p]
    (group,) = (group for group in optimizer.param_groups if any(p is each for each in group["params"]))
    for name, signed in case.states_of(group).items():
        if optimizer.precision(p) == "32bit":
            assert torch.equal(state[name], expected[name].to(torch.float32)), name
            assert state[name].stride() == p.stride()
            continue
        floats = torch.empty_like(p, dtype=torch.float32).copy_(expected[name])
        exact = Rounded.exact(np.sqrt(values(floats)) if name in case.roots else values(floats))
        scales = state[case.absmax(name)].double().numpy()
        if optimizer.precision(p) == "16bit" or case.is_wide(name, group):
            codes, low = codes_of(state[case.codes(name)]), codes_of(state[case.low(name)])
            scale = reference.per_element(scales, exact.value.size)
            y = np.divide(np.abs(exact.value), scale, out=np.zeros_like(scale), where=scale > 0)
            number = reference.number16(codes, low, signed)
            there = np.where(y > 0, reference.position16(np.minimum(y, 1), signed), 0)
            assert (np.abs(np.abs(number) / 256 - there) <= 0.5 / 256 + 2.0**-13).all(), name
            assert (np.sign(number) * np.sign(exact.value) >= 0).all(), name
            continue
        assert np.array_equal(scales, converted_scales(exact.value, signed, scales)), name
        assert not reference.wrong_codes(codes_of(state[case.codes(name)]), exact, signed, scales).size, name


def assert_same_step(
    params: Params, optimizer: Any, others: Params, other: Any, t: int, *, within: float = 0.0
) -> None:
    """One step from the same state moves parameters alike: they differ by float32 roundings of p, and of the update,
    some of its last bits; or by the share `within` of the step, where state was quantized anew between. A wrong count
    of steps, moment or order of values differs by about the step."""
    before = [p.detach().clone() for p in params]
    steps(params, optimizer, t, t + 1)
    steps(others, other, t, t + 1)
    for p, q, old in zip(params, others, before, strict=True):
        if within and optimizer.precision(p) == "8bit":
            assert (p - q).norm() <= within * (p - old).norm()
        else:
            largest = float((q.detach() - old).abs().max()) if q.numel() else 0.0
            torch.testing.assert_close(p, q, rtol=4e-7, atol=1e-4 * largest)


# Mean error of a root that is quantized anew, relative to the root: some 1 to 2 %.
REQUANTIZED = 0.03


def ours(name: str, params: Any, **options: Any) -> Any:
    return getattr(optim8, name)(params, **options)


WITH_TORCH = [case for case in CASES.values() if case.torch_class is not None]


def of_torch(case: Case, params: Any, hyper: Mapping[str, Any], **more: Any) -> torch.optim.Optimizer:
    """The namesake in torch.optim, in its form of one tensor after another. It lacks what only exists here."""
    cls: Any = case.torch_class
    known = inspect.signature(cls).parameters
    options = {"foreach": False, **hyper, **more}
    return cls(params, **{name: value for name, value in options.items() if name in known})  # type: ignore[no-any-return]


def case_of(name: str) -> Case:
    return CASES[name]
