"""What others keep in a parameter's state, such as Lookahead its slow weights: it stays, is saved and comes back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from support.harness import ALL, bits, hostile, parameter, snapshot, state_bits, through_a_file

import optim8
from optim8 import rules
from optim8.paging import Pager

BOTH = pytest.mark.parametrize("optim_bits", [8, 16, 32])
PAGED = pytest.mark.parametrize("paged", [False, True], ids=["resident", "paged"])


def _params(device: torch.device) -> list[torch.nn.Parameter]:
    return [parameter(hostile(600, torch.float32, seed=i, small=-2, large=0).to(device)) for i in range(2)]


def _step(optimizer: Any, params: list[torch.nn.Parameter], t: int) -> None:
    for i, p in enumerate(params):
        p.grad = hostile(p.numel(), torch.float32, seed=10 * t + i).to(p.device).view(p.shape)
    optimizer.step()


def _values(p: torch.Tensor) -> dict[Any, Any]:
    return {
        "lookahead_slow_buff": p.detach() * 3,
        "ema_grad_norm": torch.tensor(1.5, dtype=torch.float64),
        "of another dtype": torch.arange(5, dtype=torch.float16),
        "count": torch.tensor(7),
        "note": 3,
        "history": [torch.ones(2), {"at": torch.zeros(3, dtype=torch.bool)}],
        17: "a key that is no text",
    }


def _as_bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, bits(value)
    if isinstance(value, (list, dict)):
        return [_as_bytes(each) for each in (value.values() if isinstance(value, dict) else value)]
    return value


def _seen(optimizer: Any, p: torch.Tensor) -> dict[Any, Any]:
    return {key: _as_bytes(value) for key, value in optimizer.state[p].items() if key in _values(p)}


def _with_values(
    case: Case, device: torch.device, optim_bits: int, paged: bool
) -> tuple[list[torch.nn.Parameter], Any, dict[Any, Any]]:
    if paged and device.type != "cpu":
        pytest.skip("the disk is out of a GPU's reach")
    params = _params(device)
    optimizer = case.make(params, optim_bits=optim_bits, paged=Pager() if paged else None)
    _step(optimizer, params, 0)
    optimizer.state[params[0]].update(_values(params[0]))
    return params, optimizer, _seen(optimizer, params[0])


@PAGED
@BOTH
@ALL
def test_a_checkpoint_brings_it_back(case: Case, optim_bits: int, paged: bool, device: torch.device) -> None:
    params, optimizer, before = _with_values(case, device, optim_bits, paged)
    assert len(before) == len(_values(params[0]))
    _step(optimizer, params, 1)
    assert _seen(optimizer, params[0]) == before, "a step leaves it alone"
    for saved in (optimizer.state_dict(), through_a_file(optimizer.state_dict())):
        others = _params(device)
        fresh = case.make(others, paged=Pager() if paged else None)
        fresh.load_state_dict(saved)
        assert _seen(fresh, others[0]) == before
        assert set(fresh.state[others[1]]) == set(optimizer.state[params[1]])
        slow = fresh.state[others[0]]["lookahead_slow_buff"]
        slow.zero_()
        fresh.state[others[0]]["history"][0].zero_()
        assert _seen(optimizer, params[0]) == before, "loading copies"
        _step(fresh, others, 2)
        fresh.load_state_dict(saved)
        assert _seen(fresh, others[0]) == before, "loading into a used optimizer"


@PAGED
@BOTH
@ALL
def test_a_change_of_precision_or_layout_keeps_it(
    case: Case, optim_bits: int, paged: bool, device: torch.device
) -> None:
    """As the same objects: whoever keeps them may hold them too."""
    params, optimizer, before = _with_values(case, device, optim_bits, paged)
    held = optimizer.state[params[0]]["lookahead_slow_buff"]
    with optim8.override(params[0], optim_bits=32 if optim_bits == 8 else 8):
        _step(optimizer, params, 1)
        assert optimizer.precision(params[0]) == ("32bit" if optim_bits == 8 else "8bit")
        assert _seen(optimizer, params[0]) == before
    _step(optimizer, params, 2)
    assert _seen(optimizer, params[0]) == before
    for t, shape in enumerate(((30, 20), (20, 30)), 3):
        fresh = parameter(torch.ones(shape, device=device))
        moved = case.make([fresh], optim_bits=optim_bits, paged=Pager() if paged else None)
        _step(moved, [fresh], 0)
        moved.state[fresh]["ema_grad_norm"] = held
        fresh.data = fresh.data.T.contiguous().T
        _step(moved, [fresh], t)
        assert moved.state[fresh]["ema_grad_norm"] is held
    assert optimizer.state[params[0]]["lookahead_slow_buff"] is held


@PAGED
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@BOTH
@ALL
def test_copies_have_their_own(case: Case, optim_bits: int, how: str, paged: bool, device: torch.device) -> None:
    params, optimizer, before = _with_values(case, device, optim_bits, paged)
    pair = params, optimizer
    twins, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert _seen(twin, twins[0]) == before
    twin.state[twins[0]]["lookahead_slow_buff"].zero_()
    twin.state[twins[0]]["history"].clear()
    assert _seen(optimizer, params[0]) == before


@BOTH
@ALL
def test_a_kept_directory_refuses_what_it_would_lose(case: Case, optim_bits: int, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    _, donor, _ = _with_values(case, cpu, optim_bits, False)
    params = _params(cpu)
    optimizer = case.make(params, optim_bits=optim_bits, paged=Pager(directory=tmp_path / "state", keep=True))
    _step(optimizer, params, 0)
    before = [bits(p) for p in params], [state_bits(optimizer, p) for p in params]
    words = r"is not the optimizer's, and .*state holds nothing else"
    with pytest.raises(ValueError, match=rf"state\[0\]\['lookahead_slow_buff'\] {words}"):
        optimizer.load_state_dict(donor.state_dict())
    optimizer.state[params[1]]["note"] = 3
    with pytest.raises(ValueError, match=rf"parameter 1 of group 0: state\['note'\] {words}"):
        optimizer.step()
    del optimizer.state[params[1]]["note"]
    assert ([bits(p) for p in params], [state_bits(optimizer, p) for p in params]) == before
    _step(optimizer, params, 1)
    optimizer.close()


FOREIGN_MOMENTS = ["max_exp_avg_sq", "exp_avg_slow", "exp_avg_codes_of_old"]


@pytest.mark.parametrize("name", FOREIGN_MOMENTS)
@ALL
def test_a_moment_of_another_rule_is_refused(case: Case, name: str, device: torch.device) -> None:
    params = _params(device)
    optimizer = case.make(params)
    _step(optimizer, params, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    if any(name == moment.name for moment in rules.rule(case.cls.rule).moments):
        pytest.skip("a state of this rule, or of a variant")
    saved["state"][1][name] = torch.zeros(600)
    before = [state_bits(optimizer, p) for p in params]
    with pytest.raises(ValueError, match=rf"state\[1\]\['{name}'\] is no state of this optimizer"):
        optimizer.load_state_dict(saved)
    assert [state_bits(optimizer, p) for p in params] == before


@ALL
def test_a_dict_of_adam_is_not_one_of_lion_with_more(case: Case, device: torch.device) -> None:
    """The second moment is no value that somebody keeps, nor is the first where the rule has another."""
    params = _params(device)
    donor = optim8.Adam8bit(params, min_8bit_size=0)
    _step(donor, params, 0)
    saved = donor.state_dict()
    others = _params(device)
    optimizer = case.make(others)
    if case.cls.rule in ("adam", "adamw"):
        optimizer.load_state_dict(saved)
        return
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"\['\w+'\] (is no|is missing|must be)"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before
