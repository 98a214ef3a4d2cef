"""What the tests of the optimizers share: data, snapshots, and the comparison with the float64 reference."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from cases import EVERY, Case
from reference import BLOCK

from support.rounding import FLT_MAX, Array, Rounded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = (0, 1, 255, 256, 257, 4095)
ALL = pytest.mark.parametrize("case", EVERY, ids=str)


def flat(t: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order in which they lie in memory, as a view."""
    t = t.detach()
    return t.as_strided((t.numel(),), (1,), t.storage_offset())


def values(t: torch.Tensor) -> Array:
    """The elements as float64, in memory order."""
    return flat(t).to("cpu", torch.float64).numpy()


def codes_of(t: torch.Tensor) -> npt.NDArray[np.uint8]:
    assert t.dtype == torch.uint8
    return flat(t).cpu().numpy()


def bits(t: torch.Tensor) -> bytes:
    """The bytes of a tensor in memory order: NaN equals NaN, and 0 differs from -0."""
    if not t.untyped_storage().nbytes():
        return b""  # empty, or its memory was taken away
    if not all(t.stride()):
        t = t.contiguous()  # expanded: there are fewer values in memory than elements
    return flat(t).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def parameter(data: torch.Tensor, grad: torch.Tensor | None = None) -> torch.nn.Parameter:
    p = torch.nn.Parameter(data)
    if grad is not None:
        set_grad(p, grad)
    return p


def set_grad(p: torch.nn.Parameter, grad: torch.Tensor) -> None:
    """Give `p` this gradient; one of another dtype only where torch has a way to."""
    if grad.dtype != p.dtype:
        if not hasattr(p, "grad_dtype"):
            pytest.skip("this torch has no Tensor.grad_dtype, so a gradient has its parameter's dtype")
        p.grad_dtype = grad.dtype
    p.grad = grad


def hostile_parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[torch.nn.Parameter]:
    """Parameters of these shapes; one of four dimensions lies channels last."""
    params = []
    for i, shape in enumerate(shapes):
        data = hostile(torch.Size(shape).numel(), dtype, seed=i, small=-2, large=0).to(device).view(shape)
        params.append(parameter(data.contiguous(memory_format=torch.channels_last) if data.ndim == 4 else data))
    return params


def hostile_steps(params: Sequence[torch.nn.Parameter], optimizer: Any, first: int, last: int) -> None:
    """Steps `first` to `last` (not included), each with gradients of its own."""
    for t in range(first, last):
        for i, p in enumerate(params):
            p.grad = hostile(p.numel(), p.dtype, seed=100 * t + i).to(p.device).view(p.shape)
        optimizer.step()


def small_set(case: Case, device: torch.device, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    """Parameters of 600, 0, 1 and 3 elements with gradients, and their optimizer."""
    params = [parameter(hostile(n, torch.float32, seed=n, small=-2, large=0).to(device)) for n in (600, 0, 1, 3)]
    for i, p in enumerate(params):
        p.grad = hostile(p.numel(), torch.float32, seed=90 + i).to(device)
    return params, case.make(params, **options)


def through_a_file(content: Any, *, weights_only: bool = True) -> Any:
    """What torch.load gives of what torch.save wrote."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch works with this many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def shards_from(firsts: Mapping[torch.Tensor, int]) -> Iterator[None]:
    """Steps in here take each of these plain parameters for the local shard of a DTensor that begins at this element of
    it."""
    starts = {id(param): first for param, first in firsts.items()}
    instead = {
        "is_dtensor": lambda tensor: id(tensor) in starts,
        "dtensor_class": lambda: torch.nn.Parameter if starts else None,
        "local": lambda tensor: tensor.detach() if id(tensor) in starts else tensor,
        "first_of": lambda tensor: starts[id(tensor)],
        "_local_grad": lambda who, param, grad: grad,
    }
    with ExitStack() as patches:
        for name, function in instead.items():
            patches.enter_context(mock.patch(f"optim8.step.parts.{name}", function))
        yield


def snapshot(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor] = ()) -> dict[str, Any]:
    """All that a step may change, by name, as bytes."""
    seen: dict[str, Any] = {f"parameter {i}": bits(p) for i, p in enumerate(parameters)}
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key != "params":
                seen[f"group {i} {key}"] = value.item() if isinstance(value, torch.Tensor) else value
        for j, p in enumerate(group["params"]):
            seen[f"group {i} parameter {j}"] = bits(p) if p.device.type != "meta" and not p.is_sparse else None
            for key, value in optimizer.state.get(p, {}).items():
                seen[f"group {i} parameter {j} {key}"] = bits(value) if isinstance(value, torch.Tensor) else value
    return seen


def state_bits(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, bytes]:
    return {key: bits(value) for key, value in optimizer.state[p].items()}


def moments(optimizer: torch.optim.Optimizer, case: Case, p: torch.Tensor) -> dict[str, Rounded]:
    """The moments as float32 decodes them, 8-bit or 32-bit, in memory order; before the first step what they
    start as."""
    state = optimizer.state.get(p, {})
    if state:
        return decode_state(case, state)
    group = group_of(optimizer, p)
    starts = {name: np.float32(case.start(name, group)) for name in case.states_of(group)}
    return {name: Rounded.exact(np.full(p.numel(), start)) for name, start in starts.items()}


def group_of(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, Any]:
    (group,) = (group for group in optimizer.param_groups if any(p is each for each in group["params"]))
    return group


def before_step(
    optimizer: torch.optim.Optimizer, case: Case, p: torch.Tensor
) -> tuple[Array, Array, dict[str, Rounded]]:
    """What a step starts from, for assert_step: the parameter, its gradient, its moments and scalars."""
    state = optimizer.state.get(p, {})
    scalars = {name: Rounded.exact(float(state.get(name, start))) for name, start in case.running.items()}
    return values(p), values(p.grad), {**moments(optimizer, case, p), **scalars}  # type: ignore[arg-type]


def decode_state(case: Case, state: Mapping[str, torch.Tensor]) -> dict[str, Rounded]:
    """The same of a state."""
    out: dict[str, Rounded] = {}
    for name, signed in case.states.items():
        if case.codes(name) in state:
            absmax = state[case.absmax(name)].cpu().numpy()
            codes, root = codes_of(state[case.codes(name)]), name in case.roots
            if case.low(name) in state:
                out[name] = reference.decode16(codes, codes_of(state[case.low(name)]), absmax, signed, root)
            else:
                out[name] = reference.decode(codes, absmax, signed, root)
        elif name in state:
            out[name] = Rounded.exact(values(state[name]))
    return out


def hostile(n: int, dtype: torch.dtype, seed: int, *, small: float = -12, large: float = 3) -> torch.Tensor:
    """`n` values over many decades, with zeros, an all-zero block, a block of tiny values and one huge value."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * 10.0 ** rng.uniform(small, large, n)
    x[rng.random(n) < 0.1] = 0
    x[2 * BLOCK : 3 * BLOCK] = 0
    x[3 * BLOCK : 4 * BLOCK] *= 1e-25
    x[5 * BLOCK : 5 * BLOCK + 1] = 3e4
    return torch.from_numpy(x).to(dtype)


def random_state(
    case: Case, n: int, bits_of_state: int, t: int, seed: int, hyper: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Any state that `t` steps may have left for `n` elements, with row 0 of the hyper-parameters unless told; absmax
    over ten decades, some blocks all zero."""
    hyper = case.hypers[0] if hyper is None else hyper
    rng = np.random.default_rng(seed)
    state = {"step": torch.tensor(float(t)), **{name: torch.tensor(0.7**t) for name in case.running}}
    for name, signed in case.states_of(hyper).items():
        absmax = (10.0 ** rng.uniform(-8, 2, -(-n // BLOCK))).astype(np.float32)
        codes = rng.integers(0, 256, n, dtype=np.uint8)
        absmax[1::7] = 0
        codes[reference.per_element(absmax.astype(np.float64), n) == 0] = reference.zero_code(signed)
        if bits_of_state != 32:
            if bits_of_state == 16 or case.is_wide(name, hyper):
                low = rng.integers(0, 256, n, dtype=np.uint8)
                low[(codes == (0 if signed else 1)) | (codes >= 254)] = 128  # no step leaves more than the last value
                low[codes == reference.zero_code(signed)] = 128
                state[case.low(name)] = torch.from_numpy(low)
            state[case.codes(name)] = torch.from_numpy(codes)
            state[case.absmax(name)] = torch.from_numpy(absmax)
        else:
            exact = reference.decode(codes, absmax, signed, name in case.roots).value
            state[name] = torch.from_numpy(exact.astype(np.float32))
    return state


def load_state(optimizer: torch.optim.Optimizer, states: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
    """Put the optimizer into these states, by position of the parameter."""
    saved = optimizer.state_dict()
    optimizer.load_state_dict({"state": dict(states), "param_groups": saved["param_groups"]})


def assert_step(
    optimizer: torch.optim.Optimizer,
    case: Case,
    p: torch.Tensor,
    before: tuple[Array, Array, dict[str, Rounded]],
    hyper: Mapping[str, Any],
    t: int,
) -> None:
    """One step took what `before_step` gave where float32 arithmetic may take it, and no farther."""
    state = optimizer.state[p]
    assert float(state["step"]) == t
    assert_stepped(case, p, state, before, hyper, t, dithered=group_of(optimizer, p)["rounding"] == "dithered")


def assert_stepped(
    case: Case,
    p: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    before: tuple[Array, Array, dict[str, Rounded]],
    hyper: Mapping[str, Any],
    t: int,
    *,
    dithered: bool,
) -> None:
    """The same of a parameter and its state, without an optimizer."""
    old_p, g, old = before
    dtype = str(p.dtype).removeprefix("torch.")
    expected, new = case.rule(Rounded.exact(old_p), Rounded.exact(g), old, t=t, **hyper)
    expected = expected.stored(dtype)
    actual = values(p)
    overflows = np.abs(expected.value) + expected.error > torch.finfo(p.dtype).max
    overflows &= actual == np.copysign(np.inf, expected.value)
    wrong = np.flatnonzero(~(overflows | (np.abs(actual - expected.value) <= expected.error)))
    assert not wrong.size, _first(wrong, "parameter", actual, expected)
    for name in case.running:
        running = values(state[name])
        assert (np.abs(running - new[name].value) <= new[name].error).all(), f"{name}: {running}, needed {new[name]}"
    for at, (name, signed) in enumerate(case.states_of(hyper).items()):
        if name in state:
            actual = values(state[name])
            wrong = np.flatnonzero(~(np.abs(actual - new[name].value) <= new[name].error))
            assert not wrong.size, _first(wrong, name, actual, new[name])
            continue
        absmax = state[case.absmax(name)].cpu().double().numpy()
        kept = new[name].sqrt() if name in case.roots else new[name]
        top = Rounded(reference.block_max(kept.value), reference.block_max(kept.error))
        if dithered or case.low(name) in state:
            top = top * Rounded.of(1 / reference.largest_value(signed))
        wrong = np.flatnonzero(~(np.abs(absmax - np.minimum(top.value, FLT_MAX)) <= top.error))
        assert not wrong.size, _first(wrong, case.absmax(name), absmax, top)
        codes = codes_of(state[case.codes(name)])
        low = codes_of(state[case.low(name)]) if case.low(name) in state else None
        if low is not None and not dithered:
            wrong = reference.wrong_dithered_codes(codes, kept, signed, np.full(codes.size, 0.5), low)
        elif dithered:
            u = reference.dither(t, np.arange(absmax.size), at).ravel()[: codes.size]
            wrong = reference.wrong_dithered_codes(codes, kept, signed, u, low)
        else:
            wrong = reference.wrong_codes(codes, kept, signed)
        assert not wrong.size, _first(wrong, f"{name} codes", codes.astype(np.float64), new[name])


def _first(wrong: npt.NDArray[np.intp], what: str, actual: Array, expected: Rounded) -> str:
    i = wrong[0]
    return (
        f"{what}: {wrong.size} of {actual.size} elements differ; element {i} is {actual[i]!r}, "
        f"needed {expected.value[i]!r} within {expected.error[i]:.3g}"
    )
