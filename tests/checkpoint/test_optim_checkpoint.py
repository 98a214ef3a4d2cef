"""Checkpoints: a resumed run has the same bits, whatever carried the state; what does not fit is refused whole."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from support.harness import (
    ALL,
    DTYPES,
    bits,
    flat,
    hostile,
    hostile_parameters,
    parameter,
    snapshot,
    state_bits,
    through_a_file,
)
from support.pairs import pairwise

import optim8

SHAPES: tuple[tuple[int, ...], ...] = ((700,), (), (0,), (3,), (2, 3, 10, 20))


def _steps(params: list[torch.nn.Parameter], optimizer: Any, first: int, last: int) -> None:
    for t in range(first, last):
        for i, p in enumerate(params):
            p.grad = torch.empty_like(p)
            p.grad.copy_(hostile(p.numel(), p.dtype, seed=100 * t + i).view(p.shape))
        optimizer.step()


def _through_safetensors(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tensors flat, in memory order, by flat names; strides and groups are numbers and travel elsewhere."""
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {f"{i}.{key}": t for i, entry in state["state"].items() for key, t in entry.items()}
    safetensors.save_file({name: flat(t) for name, t in tensors.items()}, folder / "state.safetensors")
    back: dict[int, dict[str, torch.Tensor]] = {}
    for name, t in safetensors.load_file(folder / "state.safetensors").items():
        i, key = name.split(".")
        back.setdefault(int(i), {})[key] = t.as_strided(tensors[name].shape, tensors[name].stride())
    return {"state": back, "param_groups": state["param_groups"]}


def _through_contiguous(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """As people write safetensors, which refuses tensors that do not lie row after row."""
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {f"{i}.{key}": t.contiguous() for i, entry in state["state"].items() for key, t in entry.items()}
    safetensors.save_file({name: t.clone() for name, t in tensors.items()}, folder / "state.safetensors")
    back: dict[int, dict[str, torch.Tensor]] = {}
    for name, t in safetensors.load_file(folder / "state.safetensors").items():
        i, key = name.split(".")
        back.setdefault(int(i), {})[key] = t
    return {"state": back, "param_groups": state["param_groups"]}


CARRIERS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "as it is": lambda state, _: copy.deepcopy(state),
    "torch.save": lambda state, _: through_a_file(state),
    "pickle": lambda state, _: pickle.loads(pickle.dumps(state)),
    "safetensors": _through_safetensors,
    "safetensors, contiguous": _through_contiguous,
}


# Of 16-bit parameters; each way of carrying a checkpoint takes another.
WEIGHTS: tuple[dict[str, Any], ...] = ({"master_bits": 24}, {"master_bits": 32}, {"param_rounding": "dithered"}, {})


@pairwise(dtype=DTYPES, optim_bits=[8, 16, 32], carrier=CARRIERS)
@ALL
def test_resume_has_the_same_bits(
    case: Case, dtype: str, optim_bits: int, carrier: str, device: torch.device, tmp_path: Path
) -> None:
    """Three steps, a checkpoint into a fresh optimizer with other options, three more: as six steps without."""
    params = hostile_parameters(SHAPES, DTYPES[dtype], device)
    weights = WEIGHTS[list(CARRIERS).index(carrier) % len(WEIGHTS)] if dtype != "float32" else {}
    optimizer = case.make(params, optim_bits=optim_bits, **weights)
    _steps(params, optimizer, 0, 3)
    saved = CARRIERS[carrier](optimizer.state_dict(), tmp_path)
    others = [parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    fresh = case.make(others, case.hypers[1])
    fresh.load_state_dict(saved)
    assert snapshot(fresh) == snapshot(optimizer)
    _steps(params, optimizer, 3, 6)
    _steps(others, fresh, 3, 6)
    assert snapshot(fresh) == snapshot(optimizer)
    assert [fresh.precision(p) for p in others] == [optimizer.precision(p) for p in params]


@ALL
def test_loading_into_a_used_optimizer(case: Case, device: torch.device) -> None:
    """What was there is gone, and neither optimizer sees the other's later steps."""
    params = hostile_parameters(SHAPES, torch.float32, device)
    optimizer = case.make(params)
    _steps(params, optimizer, 0, 2)
    saved = optimizer.state_dict()
    others = [parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    used = case.make(others)
    _steps(others, used, 7, 9)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    used.load_state_dict(saved)
    at_loading = snapshot(used)
    assert at_loading == snapshot(optimizer)
    _steps(params, optimizer, 2, 4)
    assert snapshot(used) == at_loading, "loading copies"
    _steps(others, used, 2, 4)
    assert snapshot(used) == snapshot(optimizer)


@ALL
def test_8bit_and_32bit_checkpoints_keep_their_precision(case: Case, device: torch.device) -> None:
    for bits_saved, bits_here in ((8, 32), (32, 8)):
        p, q = (parameter(torch.linspace(-1, 1, 600, device=device)) for _ in range(2))
        optimizer, fresh = case.make([p], optim_bits=bits_saved), case.make([q], optim_bits=bits_here)
        _steps([p], optimizer, 0, 2)
        q.data.copy_(p.data)
        fresh.load_state_dict(optimizer.state_dict())
        assert fresh.precision(q) == optimizer.precision(p)
        _steps([p], optimizer, 2, 4)
        _steps([q], fresh, 2, 4)
        assert bits(p) == bits(q)
        assert state_bits(fresh, q) == state_bits(optimizer, p)


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@ALL
def test_before_the_first_step_and_with_partial_state(case: Case, optim_bits: int, device: torch.device) -> None:
    params = hostile_parameters(SHAPES, torch.float32, device)
    optimizer = case.make(params, optim_bits=optim_bits)
    assert optimizer.state_dict()["state"] == {}
    case.make(hostile_parameters(SHAPES, torch.float32, device)).load_state_dict(optimizer.state_dict())
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    others = [parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    fresh = case.make(others, optim_bits=optim_bits)
    fresh.load_state_dict(optimizer.state_dict())
    _steps(params, optimizer, 0, 2)
    _steps(others, fresh, 0, 2)
    assert snapshot(fresh) == snapshot(optimizer)
    assert fresh.state[others[0]]["step"] == 3
    assert fresh.state[others[3]]["step"] == 2


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@ALL
def test_deepcopy_and_pickle(case: Case, how: str, optim_bits: int, device: torch.device) -> None:
    """A copy has parameters and state of its own, with the same future."""
    dtype, master_bits = {8: (torch.bfloat16, 24), 16: (torch.float16, 32), 32: (torch.float32, 16)}[optim_bits]
    model = torch.nn.ParameterList(hostile_parameters(SHAPES, dtype, device))
    optimizer = case.make(model.parameters(), optim_bits=optim_bits, master_bits=master_bits)
    _steps(list(model), optimizer, 0, 2)
    pair = model, optimizer
    twin, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert all(a is b for a, b in zip(twin.parameters(), copied.param_groups[0]["params"], strict=True))
    at_copy = snapshot(copied)
    assert at_copy == snapshot(optimizer)
    _steps(list(model), optimizer, 2, 4)
    assert snapshot(copied) == at_copy, "the copy shares memory with the original"
    _steps(list(twin), copied, 2, 4)
    assert snapshot(copied) == snapshot(optimizer)
    never_stepped = case.make([parameter(torch.ones(3))])
    assert len(pickle.loads(pickle.dumps(never_stepped)).state) == 0
    assert len(copy.deepcopy(never_stepped).state) == 0


@ALL
def test_a_saved_checkpoint_is_small(case: Case, device: torch.device) -> None:
    """About one byte per moment, two for one in 16 bits: no float32 copy and no slack of an arena goes to the file."""
    params = [parameter(torch.ones(100_000, device=device)) for _ in range(3)]
    optimizer = case.make(params)
    _steps(params, optimizer, 0, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    wide = sum(case.is_wide(name, case.hypers[0]) for name in case.states)
    exact = 300_000 * (len(case.states) * (1 + 4 / 256) + wide)
    assert exact <= file.getbuffer().nbytes <= 1.05 * exact + 20_000


Change = Callable[[torch.Tensor], Any]
Break = Callable[[dict[str, Any], str, str], Any]  # of a state dict and the keys of the first state: codes, absmax


def _codes(i: int, change: Change) -> Break:
    return lambda d, codes, absmax: d["state"][i].update({codes: change(d["state"][i][codes])})


def _absmax(i: int, change: Change) -> Break:
    return lambda d, codes, absmax: d["state"][i].update({absmax: change(d["state"][i][absmax])})


def _dict(change: Callable[[dict[str, Any]], Any]) -> Break:
    return lambda d, codes, absmax: change(d)


BROKEN: dict[str, Break] = {
    "a group too many": _dict(lambda d: d["param_groups"].append(copy.deepcopy(d["param_groups"][0]))),
    "a parameter too few": _dict(lambda d: d["param_groups"][0]["params"].pop()),
    "codes of another shape": _codes(0, lambda t: t[:-1].clone()),
    "codes of another order": _codes(4, lambda t: t.flatten()),
    "codes as float": _codes(4, lambda t: t.float()),
    "codes as int8": _codes(0, lambda t: t.to(torch.int8)),
    "no codes": lambda d, codes, absmax: d["state"][4].pop(codes),
    "no absmax": lambda d, codes, absmax: d["state"][4].pop(absmax),
    "short absmax": _absmax(0, lambda t: t[:-1]),
    "long absmax": _absmax(4, lambda t: torch.ones(9999)),
    "absmax as float16": _absmax(4, lambda t: t.half()),
    "negative absmax": _absmax(4, lambda t: t.neg().sub(1)),
    "absmax NaN": _absmax(4, lambda t: torch.full_like(t, float("nan"))),
    "no step": _dict(lambda d: d["state"][4].pop("step")),
    "step of two numbers": _dict(lambda d: d["state"][4].update(step=torch.ones(2))),
    "negative step": _dict(lambda d: d["state"][4].update(step=torch.tensor(-1.0))),
    "a moment of another rule": _dict(lambda d: d["state"][4].update(max_exp_avg_sq=torch.ones(2, 3, 10, 20))),
    "an order of other dimensions": _dict(lambda d: d["state"][4].update(dim_order=torch.tensor([0, 2, 3]))),
    "an order with a dimension twice": _dict(lambda d: d["state"][4].update(dim_order=torch.tensor([0, 2, 2, 1]))),
    "an order of fractions": _dict(lambda d: d["state"][4].update(dim_order=torch.tensor([0.0, 2.0, 3.0, 1.0]))),
    "codes that are a list": _codes(0, lambda t: t.tolist()),
    "no state at all": _dict(lambda d: d.pop("state")),
    "a state for no parameter": _dict(lambda d: d["state"].update({17: d["state"].pop(4)})),
}


@pytest.mark.parametrize("what", BROKEN)
@ALL
def test_an_inconsistent_checkpoint_is_refused_whole(case: Case, what: str, device: torch.device) -> None:
    params = hostile_parameters(SHAPES, torch.float32, device)
    donor = case.make(params, case.hypers[1])
    _steps(params, donor, 0, 2)
    others = hostile_parameters(SHAPES, torch.float32, device)
    optimizer = case.make(others)
    _steps(others, optimizer, 5, 7)
    broken = copy.deepcopy(donor.state_dict())
    BROKEN[what](broken, case.codes(case.state), case.absmax(case.state))
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError, KeyError)) as error:
        optimizer.load_state_dict(broken)
    assert str(error.value).strip("'\""), "an error says what is wrong"
    assert snapshot(optimizer) == before
    _steps(others, optimizer, 7, 8)  # and it goes on as if nothing had been
    twins = hostile_parameters(SHAPES, torch.float32, device)
    reference = case.make(twins)
    _steps(twins, reference, 5, 8)
    assert snapshot(optimizer) == snapshot(reference)


LOW_BROKEN: dict[str, Callable[[dict[str, Any], str, str], Any]] = {
    "no low bytes": lambda entry, codes, low: entry.pop(low),
    "low bytes of another shape": lambda entry, codes, low: entry.update({low: entry[low][:-1].clone()}),
    "low bytes as floats": lambda entry, codes, low: entry.update({low: entry[low].float()}),
    "low bytes below 0": lambda entry, codes, low: (entry[codes].zero_(), entry[low].zero_()),
}


@pytest.mark.parametrize("what", LOW_BROKEN)
def test_low_bytes_that_do_not_fit_are_refused(what: str, device: torch.device) -> None:
    params = hostile_parameters(SHAPES, torch.float32, device)
    optimizer = optim8.AdamW8bit(params, min_8bit_size=0, optim_bits=16)
    _steps(params, optimizer, 0, 2)
    second = optimizer.moments[1]
    broken = copy.deepcopy(optimizer.state_dict())
    LOW_BROKEN[what](broken["state"][0], second.codes, second.low)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=second.low):
        optimizer.load_state_dict(broken)
    assert snapshot(optimizer) == before
    # What somebody has put there by hand is found by the next step of an optimizer that has not looked yet.
    other = copy.deepcopy(optimizer)
    entry = other.state[other.param_groups[0]["params"][0]]
    LOW_BROKEN[what](entry, second.codes, second.low)
    for p, own in zip(other.param_groups[0]["params"], params, strict=True):
        p.grad = own.grad
    with pytest.raises(ValueError, match=second.low):
        other.step()
