"""More of what code for bitsandbytes relies on: names of optimizers that are not here, a manager that begins anew."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from support.harness import parameter

import optim8
import optim8 as bnb
from optim8.optim.absent import ABSENT, AbsentOptimizer


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_a_name_that_is_not_here_says_what_to_use(name: str) -> None:
    """When it is made, not when it is imported, since libraries import it along with others."""
    namespace: dict[str, Any] = {}
    exec(f"from optim8.optim import {name}, AdamW", namespace)
    cls = namespace[name]
    assert issubclass(cls, torch.optim.Optimizer)
    assert not isinstance(optim8.AdamW8bit([parameter(torch.ones(3))]), cls)
    for arguments in (([parameter(torch.ones(3))],), ([parameter(torch.ones(3))], 0.1)):
        with pytest.raises(NotImplementedError, match=rf"^{name}: optim8 has no such optimizer yet. Use \w+"):
            cls(*arguments, optim_bits=8)


def test_what_to_use_is_there() -> None:
    for cls in ABSENT.values():
        library, *path = cls.instead.split(" ")[0].rstrip(",").split(".")
        thing: Any = {"torch": torch, "optim8": optim8}[library]
        for part in path:
            thing = getattr(thing, part)
        assert issubclass(thing, torch.optim.Optimizer)
        assert not issubclass(thing, AbsentOptimizer)


@pytest.mark.peers
def test_every_name_of_bitsandbytes_optim_answers() -> None:
    theirs = pytest.importorskip("bitsandbytes").optim
    names = {name for name in dir(theirs) if isinstance(getattr(theirs, name), type)}
    assert len(names) > 30
    assert names - set(dir(bnb.optim)) == set()
    assert set(ABSENT) == names - set(bnb.optim.__all__), "those that are not here, and no others"
    for name in names - {"GlobalOptimManager"}:
        assert issubclass(getattr(bnb.optim, name), torch.optim.Optimizer)


def test_the_manager_begins_anew() -> None:
    """`initialize` ends what was overridden through the manager, and nothing else."""
    model = torch.nn.ModuleList([torch.nn.Linear(70, 70, bias=False) for _ in range(4)])
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.override_config(model[0].weight, "optim_bits", 32)
    manager.register_module_override(model[1], "weight", {"optim_bits": 32})
    handle = optim8.override(model[2], optim_bits=32)
    optimizer = optim8.AdamW8bit(model.parameters())
    assert [optimizer.precision(p) for p in model.parameters()] == ["32bit"] * 3 + ["8bit"]
    manager.initialize()
    assert [optimizer.precision(p) for p in model.parameters()] == ["8bit", "8bit", "32bit", "8bit"]
    manager.override_config(model[3].weight, "optim_bits", 32)
    assert optimizer.precision(model[3].weight) == "32bit"
    manager.initialize()
    handle.remove()


@pytest.mark.parametrize("through", ["override", "manager"])
def test_a_leaf_that_needs_no_gradient_is_overridden(through: str) -> None:
    """Optimizers take such tensors; whoever sets `.grad` trains them."""
    leaf = torch.ones(5000)
    if through == "override":
        optim8.override(leaf, optim_bits=32)
    else:
        bnb.optim.GlobalOptimManager.get_instance().override_config(leaf, "optim_bits", 32)
    result = (torch.ones(5000, requires_grad=True) * 2).requires_grad_()
    result.retain_grad()
    optim8.override(result, optim_bits=32)
    optimizer = optim8.AdamW8bit([leaf, torch.ones(5000), result])
    leaf.grad = torch.ones(5000)
    optimizer.step()
    assert [optimizer.precision(p) for p in optimizer.param_groups[0]["params"]] == ["32bit", "8bit", "32bit"]


def test_a_target_that_is_gone_is_told() -> None:
    """`param.data` is a tensor of its own, which nobody holds: an override of it does nothing."""
    p = parameter(torch.ones(5000))
    optim8.override(p.data, optim_bits=32)
    gc.collect()
    optimizer = optim8.AdamW8bit([p])
    with pytest.warns(UserWarning, match=r"the tensor \(5000,\) that was meant is gone.* param.data"):
        assert optimizer.precision(p) == "8bit"
    leaf = torch.ones(5000)
    optim8.override(leaf, optim_bits=32)
    other = optim8.AdamW8bit([leaf])
    assert other.precision(leaf) == "32bit"
    del other, leaf
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim8.override(p, optim_bits=32)  # makes the optimizer look again
        assert optimizer.precision(p) == "32bit"
