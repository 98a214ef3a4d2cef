"""The same memory under two parameters: refused, since threads would step it twice at once."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import Case
from support.harness import ALL, bits, parameter, snapshot

import optim8


@pytest.mark.parametrize("later", [False, True], ids=["constructor", "add_param_group"])
@ALL
def test_a_parameter_twice_in_a_group(case: Case, later: bool) -> None:
    """After torch's own warning, which says that it will be an error."""
    p, q, first = (parameter(torch.ones(300)) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = case.make([first])
        with pytest.raises(ValueError, match=r"parameter 2 of group . is parameter 0 again.* Pass each once"):
            optimizer.add_param_group({"params": [p, q, p]}) if later else case.make([p, q, p])
        with pytest.raises(ValueError, match=r"parameter 1 'b' of group 0 is parameter 0 'a' again"):
            case.make([("a", p), ("b", p)])
    assert len(optimizer.param_groups) == 1
    with pytest.warns(UserWarning, match="duplicate parameters"), pytest.raises(ValueError, match="again"):
        case.make([p, p])


def test_a_parameter_in_two_groups() -> None:
    p = parameter(torch.ones(300))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optim8.AdamW8bit([{"params": [p]}, {"params": [p]}])
    optimizer = optim8.AdamW8bit([{"params": [p]}, {"params": [parameter(torch.ones(3))]}])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})


@pytest.mark.parametrize("how", ["the same object in a list", "the same memory"])
@pytest.mark.parametrize("with_state", [False, True])
@ALL
def test_memory_that_became_shared_later(case: Case, with_state: bool, how: str, device: torch.device) -> None:
    """Such as weights tied by `.data`, as old models do. The step names both and changes nothing."""
    params = [parameter(torch.ones(300, device=device), torch.ones(300, device=device)) for _ in range(4)]
    names = [f"layer{i}" for i in range(4)]
    groups = [{"params": list(zip(names, params))[:2]}, {"params": list(zip(names, params))[2:], "lr": 0.5}]
    optimizer = case.make(groups)
    if with_state:
        optimizer.step()
    if how == "the same memory":
        params[3].data = params[1].data
        message = r"parameter 1 'layer3' of group 1 has the memory of parameter 1 'layer1' of group 0"
    else:
        optimizer.param_groups[1]["params"][1] = params[1]
        message = r"parameter 1 .* of group . has the memory of parameter 1 .* of group ."
    before = [bits(p) for p in params]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert [bits(p) for p in params] == before
    params[3].data = params[3].data.clone()
    optimizer.param_groups[1]["params"][1] = params[3]
    optimizer.step()
    assert optimizer.state[params[3]]["step"] == 1 + with_state


def test_neighbours_and_empty_ones_are_apart(device: torch.device) -> None:
    """Views of one buffer (a flat parameter), of which one is empty, and parameters without gradients."""
    flat = torch.ones(600, device=device)
    params = [torch.nn.Parameter(flat[a:b]) for a, b in ((0, 300), (300, 300), (300, 600), (0, 300))]
    for p in params[:3]:
        p.grad = torch.ones_like(p)
    optimizer = optim8.AdamW8bit(params)
    optimizer.step()
    before = snapshot(optimizer)
    params[3].grad = torch.ones_like(params[3])
    with pytest.raises(ValueError, match="parameter 3 of group 0 has the memory of parameter 0"):
        optimizer.step()
    assert {key: before[key] for key in before if "exp_avg" in key} == {
        key: value for key, value in snapshot(optimizer).items() if key in before and "exp_avg" in key
    }
