"""More of what code for bitsandbytes relies on: names of optimizers that are not here, its modules, what others build
on its classes, a manager that begins anew."""

from __future__ import annotations

import gc
import importlib
import pkgutil
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


# The names that packages on PyPI import from bitsandbytes, those of most packages first.
USED = {
    "optim": (
        *("AdamW8bit", "Lion8bit", "AdEMAMix8bit", "AdamW", "Lion", "RMSprop", "Adam8bit", "GlobalOptimManager"),
        *("PagedAdamW", "SGD8bit", "Adagrad8bit", "RMSprop8bit", "Adagrad", "AdEMAMix", "PagedAdEMAMix8bit", "Adam"),
        *("PagedAdamW8bit", "PagedLion8bit", "AdamW32bit", "Lion32bit", "LAMB", "LAMB8bit", "LARS", "LARS8bit"),
    ),
    "optim.adamw": ("AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"),
    "optim.lion": ("Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"),
    "optim.lars": ("LARS", "LARS8bit", "LARS32bit", "PytorchLARS"),
    "optim.optimizer": ("GlobalOptimManager", "Optimizer1State", "Optimizer2State", "Optimizer8bit"),
    "functional": (
        *("dequantize_4bit", "quantize_4bit", "QuantState", "int8_vectorwise_dequant", "dequantize_blockwise"),
        *("optimizer_update_32bit", "optimizer_update_8bit_blockwise", "get_ptr", "int8_vectorwise_quant", "lib"),
    ),
}


@pytest.mark.parametrize("module", USED)
def test_the_names_that_packages_import(module: str) -> None:
    found = importlib.import_module(f"optim8.{module}")
    assert [name for name in USED[module] if not hasattr(found, name)] == []
    for name in set(USED[module]) & set(bnb.optim.__all__):
        assert getattr(found, name) is getattr(bnb.optim, name)


def test_pickles_of_earlier_versions_find_the_names() -> None:
    for module in ("optim8.optim.names", "optim8.optim.aliases"):
        assert importlib.import_module(module).Lion32bit is bnb.optim.Lion32bit


@pytest.mark.peers
def test_every_module_of_bitsandbytes_optim_answers() -> None:
    theirs = pytest.importorskip("bitsandbytes").optim
    modules = [module.name for module in pkgutil.iter_modules(theirs.__path__)]
    assert len(modules) > 8
    for name in modules:
        there = importlib.import_module(f"bitsandbytes.optim.{name}")
        defined = {key for key, value in vars(there).items() if getattr(value, "__module__", "") == there.__name__}
        here = importlib.import_module(f"optim8.optim.{name}")
        assert {key for key in defined if key[0].isupper()} - vars(here).keys() - {"MockArgs"} == set()


@pytest.mark.parametrize("name", ["Optimizer1State", "Optimizer2State", "Optimizer8bit"])
def test_a_base_class_of_bitsandbytes_cannot_be_built_on(name: str) -> None:
    base = getattr(bnb.optim.optimizer, name)
    assert not isinstance(optim8.AdamW8bit([parameter(torch.ones(3))]), base)
    message = rf"optim8 has no {name} to build on, which galore_torch, .*install bitsandbytes.*optim8\.AdamW8bit"
    with pytest.raises(NotImplementedError, match=rf"^GaLore: {message}"):
        type("GaLore", (base,), {})
    with pytest.raises(NotImplementedError, match=rf"^{name}: {message}"):
        base("adam", [parameter(torch.ones(3))], 1e-3)


class Hooks:
    def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
        raise AssertionError


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion", "PagedSGD8bit", "Adam32bit"])
def test_a_subclass_that_would_be_stepped_without_its_methods_is_refused(name: str) -> None:
    cls = getattr(bnb.optim, name)
    with pytest.raises(TypeError, match=r"^Mine: a subclass .* must not define init_state, which only bitsandbytes'"):
        type("Mine", (cls,), {"init_state": lambda self, group, p, gindex, pindex: None})
    with pytest.raises(TypeError, match=r"^Mine: a subclass .* must not define update_step.* Override step\(\)"):
        type("Mine", (Hooks, cls), {})
    fine = type("Mine", (cls,), {"step": lambda self, closure=None: "stepped"})
    assert fine([parameter(torch.ones(3))]).step() == "stepped"


def test_the_library_behind_the_functions_says_what_it_is() -> None:
    with pytest.raises(AttributeError, match=r"functional\.lib: 'cgemm_4bit' is a C function .*dequantize_4bit"):
        bnb.functional.lib.cgemm_4bit  # noqa: B018
    assert not hasattr(bnb.functional.lib, "cdequantize_blockwise_fp32")


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
