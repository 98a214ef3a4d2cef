"""reset_state: what the state of a parameter has learnt is gone, wherever it lives, and all else stays."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from cases import Case
from support.harness import ALL, bits, hostile_parameters, hostile_steps, parameter, snapshot, state_bits

import optim8
from optim8.paging import Pager

SHAPES: tuple[tuple[int, ...], ...] = ((700,), (), (0,), (2, 3, 10, 20))
HOMES = pytest.mark.parametrize("home", ["resident", "paged", "limited", "kept"])
BOTH = pytest.mark.parametrize("optim_bits", [8, 16, 32])


def _pager(home: str, folder: Path, device: torch.device) -> Pager | None:
    if home != "resident" and device.type != "cpu":
        pytest.skip("the disk is out of a GPU's reach")
    return {
        "resident": None,
        "paged": Pager(),
        "limited": Pager(host_budget="1MiB", bucket="256KiB"),
        "kept": Pager(directory=folder / "state", keep=True),
    }[home]


def _twins(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [parameter(p.detach().clone()) for p in params]


@HOMES
@BOTH
@ALL
def test_the_next_step_is_a_first_one(
    case: Case, optim_bits: int, home: str, device: torch.device, tmp_path: Path
) -> None:
    params = hostile_parameters(SHAPES, torch.float32, device)
    optimizer = case.make(params, optim_bits=optim_bits, paged=_pager(home, tmp_path, device))
    hostile_steps(params, optimizer, 0, 3)
    where = [t.data_ptr() for p in params for t in optimizer.state[p].values()]
    optimizer.reset_state()
    assert [t.data_ptr() for p in params for t in optimizer.state[p].values()] == where, "a CUDA graph may use it"
    twins = _twins(params)
    fresh = case.make(twins, optim_bits=optim_bits)
    for t in (3, 4):
        hostile_steps(params, optimizer, t, t + 1)
        hostile_steps(twins, fresh, t, t + 1)
        assert snapshot(optimizer, params) == snapshot(fresh, twins)


@BOTH
@ALL
def test_only_the_parameters_that_are_named(case: Case, optim_bits: int, device: torch.device) -> None:
    params = hostile_parameters(SHAPES, torch.float32, device)
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], optim_bits=optim_bits)
    hostile_steps(params, optimizer, 0, 2)
    for named, chosen in ((params[3], [3]), (params[:2], [0, 1]), (iter(params[1:3]), [1, 2]), ([], [])):
        kept = copy.deepcopy(optimizer.state_dict())
        others = [state_bits(optimizer, p) for p in params]
        optimizer.reset_state(named)
        for i, p in enumerate(params):
            if i in chosen:
                assert float(optimizer.state[p]["step"]) == 0
            else:
                assert state_bits(optimizer, p) == others[i]
        optimizer.load_state_dict(kept)
        assert [state_bits(optimizer, p) for p in params] == others


@ALL
def test_others_are_refused_and_nothing_is_reset(case: Case, device: torch.device) -> None:
    params = hostile_parameters(SHAPES, torch.float32, device)
    optimizer = case.make(params)
    hostile_steps(params, optimizer, 0, 2)
    before = snapshot(optimizer, params)
    stranger = parameter(params[0].detach().clone())
    with pytest.raises(ValueError, match=r"reset_state: params must be parameters of this optimizer, .* \(700,\) at 1"):
        optimizer.reset_state([params[0], stranger])
    with pytest.raises(ValueError, match="reset_state"):
        optimizer.reset_state(stranger)
    with pytest.raises(TypeError, match=r"reset_state: params must be a parameter or an iterable .* got str at 0"):
        optimizer.reset_state(["weight"])
    with pytest.raises(TypeError, match=r"reset_state: params must be .* got dict at 0"):
        optimizer.reset_state(optimizer.param_groups)
    with pytest.raises(TypeError):
        optimizer.reset_state(3)
    assert snapshot(optimizer, params) == before


@ALL
def test_before_the_first_step_there_is_nothing_to_reset(case: Case, device: torch.device) -> None:
    params = hostile_parameters(SHAPES, torch.float32, device)
    optimizer = case.make(params)
    optimizer.reset_state()
    optimizer.reset_state(params[0])
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("paged", [False, True])
@ALL
def test_precision_is_that_of_new_state(case: Case, paged: bool, device: torch.device) -> None:
    """A loaded dict keeps the precision in which it was saved; new state has that of the options."""
    if paged and device.type != "cpu":
        pytest.skip("the disk is out of a GPU's reach")
    for saved_bits, here in ((8, 32), (32, 8)):
        params, others = (
            hostile_parameters(SHAPES, torch.float32, device),
            hostile_parameters(SHAPES, torch.float32, device),
        )
        donor = case.make(others, optim_bits=saved_bits)
        hostile_steps(others, donor, 0, 2)
        optimizer = case.make(params, optim_bits=here, paged=paged)
        optimizer.load_state_dict(donor.state_dict())
        optimizer.state[params[0]]["ema_grad_norm"] = norm = torch.tensor(1.5)
        assert optimizer.precision(params[0]) == f"{saved_bits}bit"
        optimizer.param_groups[0]["optim_bits"] = here  # as it was before the dict came with its own
        optimizer.reset_state()
        assert optimizer.precision(params[0]) == f"{here}bit"
        assert optimizer.state[params[0]].pop("ema_grad_norm") is norm
        twins = _twins(params)
        fresh = case.make(twins, optim_bits=here)
        hostile_steps(params, optimizer, 2, 4)
        hostile_steps(twins, fresh, 2, 4)
        for p, q in zip(params, twins, strict=True):
            assert bits(p) == bits(q)
            assert state_bits(optimizer, p) == state_bits(fresh, q)


@ALL
def test_state_that_was_spoilt_by_hand_is_new_again(case: Case, device: torch.device) -> None:
    params = hostile_parameters(SHAPES, torch.float32, device)
    optimizer = case.make(params)
    hostile_steps(params, optimizer, 0, 2)
    for name in case.states:
        optimizer.state[params[0]][name] = torch.zeros_like(params[0])
        optimizer.state[params[3]][case.absmax(name)] = torch.zeros(2, device=device)
    optimizer.reset_state()
    twins = _twins(params)
    fresh = case.make(twins)
    hostile_steps(params, optimizer, 2, 4)
    hostile_steps(twins, fresh, 2, 4)
    assert snapshot(optimizer, params) == snapshot(fresh, twins)


@ALL
def test_a_kept_directory_has_the_state_that_was_reset(case: Case, tmp_path: Path) -> None:
    params = hostile_parameters(SHAPES, torch.float32, torch.device("cpu"))
    pager = Pager(directory=tmp_path / "state", keep=True)
    optimizer = case.make(params, paged=pager)
    hostile_steps(params, optimizer, 0, 3)
    optimizer.reset_state(params[:3])
    hostile_steps(params, optimizer, 3, 4)
    optimizer.reset_state(params[3])
    expected = snapshot(optimizer)
    optimizer.close()
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.reset_state()
    again = case.make(params, paged=Pager(directory=tmp_path / "state", keep=True, resume=True))
    assert snapshot(again) == expected
    hostile_steps(params, again, 4, 5)
    assert float(again.state[params[3]]["step"]) == 1
    assert float(again.state[params[0]]["step"]) == 2


@ALL
def test_zeroing_codes_by_hand_fails(case: Case, device: torch.device) -> None:
    """Code 0 of a signed moment is -0.993 absmax: code that means to zero values must not find codes, and values that
    it puts beside them must not be ignored."""
    params = hostile_parameters(SHAPES, torch.float32, device)
    optimizer = case.make(params)
    hostile_steps(params, optimizer, 0, 2)
    with pytest.raises(KeyError, match=case.state):
        optimizer.state[params[0]][case.state].zero_()
    for name in case.states:
        optimizer.state[params[0]][name] = torch.zeros_like(params[0])
    before = bits(params[0])
    both = rf"parameter 0 of group 0 has both state\['{case.state}'\] and .*\.reset_state"
    with pytest.raises(ValueError, match=both):
        optimizer.step()
    assert bits(params[0]) == before


def test_the_example_of_the_documentation() -> None:
    model = torch.nn.Linear(80, 80)
    optimizer = optim8.AdamW8bit(model.named_parameters())
    model(torch.ones(2, 80)).sum().backward()
    optimizer.step()
    optimizer.reset_state(model.weight)
    assert float(optimizer.state[model.weight]["step"]) == 0
    assert float(optimizer.state[model.bias]["step"]) == 1
