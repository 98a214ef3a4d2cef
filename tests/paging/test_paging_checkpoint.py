"""Checkpoints and copies of paged state: the same future, on whichever side of the file they end."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, EVERY, Case
from support.harness import bits, hostile, parameter, snapshot, through_a_file
from support.pairs import pairwise

from optim8.paging import Pager

SHAPES = ((70_001,), (3,), (0,), (2, 3, 70, 90), (300, 300))


# Of the parameters and their weights, by where the state is that is carried.
FORMS: dict[str, tuple[torch.dtype, int]] = {"paged": (torch.bfloat16, 24), "resident": (torch.float32, 16)}


def _model(dtype: torch.dtype = torch.float32) -> torch.nn.ParameterList:
    params = []
    for i, shape in enumerate(SHAPES):
        data = hostile(torch.Size(shape).numel(), dtype, seed=i, small=-2, large=0).view(shape)
        params.append(parameter(data.contiguous(memory_format=torch.channels_last) if data.ndim == 4 else data))
    return torch.nn.ParameterList(params)


def _steps(model: torch.nn.ParameterList, optimizer: Any, first: int, last: int) -> None:
    for t in range(first, last):
        for i, p in enumerate(model):
            p.grad = torch.empty_like(p)
            p.grad.copy_(hostile(p.numel(), p.dtype, seed=100 * t + i).view(p.shape))
            if i == 4 and t < 2:
                p.grad = None  # its first gradient comes late
        optimizer.step()


def _pager(folder: Path) -> Pager:
    return Pager(directory=folder, host_budget="100KiB", bucket="64KiB")


Pair = tuple[torch.nn.ParameterList, Any]


def _loaded(paged: bool, through_file: bool) -> Callable[[Pair, Path, Case], Pair]:
    def load(pair: Pair, folder: Path, case: Case) -> Pair:
        model = copy.deepcopy(pair[0])
        fresh = case.make(model.parameters(), case.hypers[1], paged=_pager(folder) if paged else None)
        saved = pair[1].state_dict()
        if through_file:
            torch.save(saved, folder / "state.pt")
            saved = torch.load(folder / "state.pt", mmap=True)
        fresh.load_state_dict(saved)
        return model, fresh

    return load


def _loaded_over(pair: Pair, folder: Path, case: Case) -> Pair:
    """Into an optimizer that has stepped with the same states: its state is filled where it is."""
    hyper = {**case.hypers[1], **{option: case.hypers[0][option] for option in case.only_with.values()}}
    model, used, before = _used(pair, folder, case, hyper)
    _load_into(used, model, pair)
    late = 4  # had no state in the checkpoint of step 2
    assert [used.moments[0].values(used.state[p]).data_ptr() for p in model if used.state.get(p)] == before[:late]
    return model, used


def _loaded_over_others(pair: Pair, folder: Path, case: Case) -> Pair:
    """The same with options that may ask for other states, which then give way to those that are loaded."""
    model, used, _ = _used(pair, folder, case, case.hypers[1])
    _load_into(used, model, pair)
    return model, used


def _used(
    pair: Pair, folder: Path, case: Case, hyper: Mapping[str, Any]
) -> tuple[torch.nn.ParameterList, Any, list[int]]:
    """A model, its optimizer after four steps, and where the first moment of each parameter lies."""
    model = _model(pair[0][0].dtype)
    master_bits = pair[1].param_groups[0]["master_bits"]
    used = case.make(model.parameters(), hyper, min_8bit_size=100, master_bits=master_bits, paged=_pager(folder))
    _steps(model, used, 0, 4)
    return model, used, [used.moments[0].values(used.state[p]).data_ptr() for p in model]


def _load_into(used: Any, model: torch.nn.ParameterList, pair: Pair) -> None:
    with torch.no_grad():
        for p, q in zip(model, pair[0], strict=True):
            p.copy_(q)
    used.load_state_dict(copy.deepcopy(pair[1].state_dict()))


CARRIERS: dict[str, Callable[[Pair, Path, Case], Pair]] = {
    "deepcopy": lambda pair, _, __: copy.deepcopy(pair),
    "pickle": lambda pair, _, __: pickle.loads(pickle.dumps(pair)),
    "pickle, protocol 2": lambda pair, _, __: pickle.loads(pickle.dumps(pair, protocol=2)),
    "pickle, protocol 5": lambda pair, _, __: pickle.loads(pickle.dumps(pair, protocol=5)),
    "torch.save": lambda pair, _, __: through_a_file(pair, weights_only=False),
    "state dict to paged": _loaded(True, False),
    "state dict to resident": _loaded(False, False),
    "file to paged": _loaded(True, True),
    "file to resident": _loaded(False, True),
    "state dict over paged": _loaded_over,
    "state dict over other paged state": _loaded_over_others,
}


@pairwise(case=EVERY, source=["paged", "resident"], carrier=CARRIERS)
def test_the_future_is_the_same(case: Case, source: str, carrier: str, tmp_path: Path) -> None:
    """8-bit and 32-bit state, two steps, a copy, two more: the copy has the original's bits, and memory of its own."""
    dtype, master_bits = FORMS[source]
    model, paged_by = _model(dtype), _pager(tmp_path) if source == "paged" else None
    optimizer = case.make(model.parameters(), min_8bit_size=100, master_bits=master_bits, paged=paged_by)
    _steps(model, optimizer, 0, 2)
    twin, other = CARRIERS[carrier]((model, optimizer), tmp_path, case)
    at_copy = snapshot(other)
    assert at_copy == snapshot(optimizer)
    _steps(model, optimizer, 2, 4)
    assert snapshot(other) == at_copy, "the copy shares memory with the original"
    _steps(twin, other, 2, 4)
    assert snapshot(other) == snapshot(optimizer)
    paged = "disk" in other.placement().bytes_by_tier()
    assert paged == ("paged" in carrier or (source == "paged" and "resident" not in carrier))


def test_loading_its_own_state_with_parameters_exchanged(tmp_path: Path) -> None:
    """The source lies in the memory that is loaded into: nothing is read after it was overwritten."""
    ends = []
    for paged in (None, _pager(tmp_path)):
        params = [parameter(torch.full((70_000,), 0.5)) for _ in range(2)]
        optimizer = CASES["AdamW8bit"].make(params, paged=paged)
        for i, p in enumerate(params):
            p.grad = hostile(70_000, torch.float32, seed=i)
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"] = {0: saved["state"][1], 1: saved["state"][0]}
        optimizer.load_state_dict(saved)
        optimizer.step()
        ends.append([bits(p) for p in params])
    assert ends[0] == ends[1]


def test_groups_and_conversions(tmp_path: Path) -> None:
    """A group added late, a parameter whose strides change, and state of torch.optim: as without paging."""
    ends = []
    for paged in (None, _pager(tmp_path)):
        model = _model()
        optimizer = CASES["AdamW8bit"].make(list(model)[:3], paged=paged)
        for t in range(3):
            if t == 1:
                optimizer.add_param_group({"params": list(model)[3:], "lr": 0.5, "optim_bits": 32})
            if t == 2:
                with torch.no_grad():
                    model[3].data = model[3].data.contiguous()
            _steps(model, optimizer, t, t + 1)
        reference = torch.optim.AdamW(copy.deepcopy(model).parameters())
        for p in reference.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        reference.step()
        other = CASES["AdamW8bit"].make(model.parameters(), paged=paged)
        other.load_state_dict(reference.state_dict())
        other.step()
        ends.append((snapshot(optimizer), snapshot(other)))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("where", ["resident", "paged", "kept", "resumed"])
def test_the_state_of_one_parameter_is_saved_and_copied_alone(where: str, tmp_path: Path) -> None:
    """And not with the memory of all."""
    keep = {"directory": tmp_path / "kept", "keep": True}
    pager = {"resident": None, "paged": Pager(directory=tmp_path)}.get(where, Pager(**keep))
    params = [
        parameter(hostile(n, torch.float32, seed=n), hostile(n, torch.float32, seed=1)) for n in (40_000, 5000, 3)
    ]
    optimizer = CASES["AdamW8bit"].make(params, paged=pager)
    optimizer.step()
    if where == "resumed":
        optimizer.close()
        optimizer = CASES["AdamW8bit"].make(params, paged=Pager(**keep, resume=True))
    for p in params:
        entry = optimizer.state[p]
        sizes = {name: tensor.untyped_storage().nbytes() for name, tensor in entry.items()}
        assert all(sizes[name] - tensor.nbytes < 64 for name, tensor in entry.items())
        file = io.BytesIO()
        torch.save(entry, file)
        assert file.tell() < sum(sizes.values()) + 4096
        file.seek(0)
        for saved in (torch.load(file), copy.deepcopy(entry)):
            assert {name: bits(tensor) for name, tensor in saved.items()} == {
                name: bits(tensor) for name, tensor in entry.items()
            }
    before = {name: bits(tensor) for name, tensor in optimizer.state[params[1]].items()}
    alone = optimizer.state[params[1]]
    del optimizer  # its memory stays as long as any of its tensors
    assert {name: bits(tensor) for name, tensor in alone.items()} == before
