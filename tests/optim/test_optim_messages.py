"""What an optimizer says: names of parameters in errors, misspelled arguments, tensors without values, its repr."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from support.harness import ALL, bits, parameter, snapshot
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import ParamsT

import optim8
from optim8 import rules


def fake(tensor: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(tensor)


WITHOUT_VALUES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "fake": (fake, "a FakeTensor"),
    "meta": (lambda tensor: tensor.to("meta"), "on meta"),
    "functional": (torch._to_functional_tensor, r"a (Tensor|Parameter) \("),
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    "kind, where",
    [
        (kind, where)
        for kind in WITHOUT_VALUES
        for where in ("parameter", "gradient", "exp_avg", "step")
        if (kind, where) != ("meta", "gradient")  # torch gives no real parameter such a gradient
    ],
)
def test_tensors_without_values(kind: str, where: str) -> None:
    """They are named for what they are, by parameter; nothing is read or written."""
    make, what = WITHOUT_VALUES[kind]
    real = parameter(torch.ones(300), torch.ones(300))
    odd = torch.nn.Parameter(make(torch.ones(300))) if where == "parameter" else parameter(torch.ones(300))
    optimizer = optim8.AdamW8bit([("real", real), ("odd", odd)])
    if where in ("parameter", "gradient"):
        odd.grad = make(torch.ones(300))
    else:
        odd.grad = torch.ones(300)
        optimizer.step()
        name = "step" if where == "step" else next(k for k in optimizer.state[odd] if k.startswith("exp_avg"))
        optimizer.state[odd][name] = make(optimizer.state[odd][name])
    before = bits(real)
    with pytest.raises(ValueError, match="parameter 1 'odd' of group 0") as error:
        optimizer.step()
    assert "freed" not in str(error.value)
    if where in ("parameter", "gradient"):
        assert re.search(what, str(error.value))
    assert bits(real) == before


def test_real_parameters_under_a_fake_mode() -> None:
    """State that such a mode would make is none; later steps start as if there had been no attempt."""
    p = parameter(torch.ones(300), torch.ones(300))
    optimizer = optim8.AdamW8bit([p])
    with FakeTensorMode(), pytest.raises(RuntimeError, match="FakeTensor"):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


@ALL
def test_names_of_parameters_are_in_errors(case: Case, device: torch.device) -> None:
    good, bad = (parameter(torch.ones(300, device=device), torch.ones(300, device=device)) for _ in range(2))
    optimizer = case.make([("good", good), ("a.weight", bad)])
    bad.grad = None
    bad.data = bad.data.double()
    bad.grad = torch.ones_like(bad)
    with pytest.raises(ValueError, match=r"parameter 1 'a\.weight' of group 0 must be float32"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"parameter 1 'a\.weight' of group 0 must be dense and float32"):
        case.make([("good", good), ("a.weight", bad)])
    optimizer.param_groups[0]["param_names"] = ["good"]  # edited by a user: too few are no reason to crash
    with pytest.raises(ValueError, match="parameter 1 of group 0 must be float32"):
        optimizer.step()


@pytest.mark.parametrize(
    "given, close",
    [
        ("weight_deacy", "weight_decay"),
        ("beta", "betas"),
        ("momentun", "momentum"),
        ("min_8bit_sizes", "min_8bit_size"),
        ("maximise", "maximize"),
        ("is_page", "is_paged"),
        ("blockwise", "block_wise"),
    ],
)
@ALL
def test_misspelled_arguments(case: Case, given: str, close: str) -> None:
    """What is close is only proposed where it is an argument."""
    of_rules = {hyper.name for rule in rules.every().values() for hyper in rule.hypers}
    lacks = close in of_rules and not rules.rule(case.cls.rule).has(close)
    if close == "momentum" and rules.rule(case.cls.rule).has("momentum_decay"):
        close, lacks = "momentum_decay", False
    end = "" if lacks else rf" Did you mean '{close}'\?"
    with pytest.raises(TypeError, match=rf"{case.name}: '{given}' is no argument of this optimizer\.{end}$"):
        case.with_defaults([parameter(torch.ones(3))], **{given: 1})


def test_arguments_that_are_like_no_other() -> None:
    with pytest.raises(TypeError, match=r"'qwertyuiop' is no argument of this optimizer\.$"):
        optim8.AdamW8bit([parameter(torch.ones(3))], qwertyuiop=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"'weight_deacy' cannot be overridden\. Did you mean 'weight_decay'"):
        optim8.override(parameter(torch.ones(3)), weight_deacy=1)


OPTIMIZERS = [
    name
    for name in optim8.optim.__all__
    if isinstance(getattr(optim8.optim, name), type) and issubclass(getattr(optim8.optim, name), torch.optim.Optimizer)
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arguments_have_types(name: str) -> None:
    """As a program sees them that is configured by signatures."""
    cls = getattr(optim8.optim, name)
    if name == "BlockwiseOptimizer":
        assert typing.get_type_hints(cls.__init__)["params"] == ParamsT
        return
    eight = next(c for c in cls.__mro__ if c.__name__.endswith("8bit") and "__init__" in vars(c))
    hints = typing.get_type_hints(eight.__init__)
    assert hints["params"] == ParamsT
    assert hints["lr"] == float | torch.Tensor
    assert hints["optim_bits"] == typing.Literal[8, 16, 32]
    assert Any not in hints.values()
    signature = inspect.signature(cls)
    assert list(signature.parameters) == list(inspect.signature(eight).parameters)
    assert signature.parameters["optim_bits"].default == (8 if name.endswith("8bit") else 32)


def test_repr(tmp_path: Path, device: torch.device) -> None:
    """The groups' options as torch writes them; precisions, bytes and place of state; no names of parameters."""
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 100)).to(device)
    model[1].bias.requires_grad_(False)
    optimizer = optim8.AdamW8bit(model.named_parameters(), lr=0.25)
    text = repr(optimizer)
    theirs = repr(torch.optim.AdamW(model.parameters(), lr=0.25))
    own = ("State", "    master_bits", "    min_8bit", "    optim_bits", "    param_rounding", "    rounding")
    ours = [line for line in text.splitlines() if not line.startswith(own)]
    assert [line for line in theirs.splitlines() if "decoupled" not in line] == [ours[0].replace("8bit", ""), *ours[1:]]
    assert "param_names" not in text
    assert "State: none yet; parameters: 2 in 8 bits, 1 in 32 bits, 1 frozen" in text
    model(torch.ones(2, 100, device=device)).sum().backward()
    optimizer.step()
    before = snapshot(optimizer)
    size = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    assert f"State: {size / 1024:.4g}KiB; parameters: 2 in 8 bits, 1 in 32 bits, 1 frozen" in repr(optimizer)
    with optim8.override(model[0].weight, optim_bits=32):
        assert "2 in 8 bits" in repr(optimizer), "printing converts nothing"
    assert snapshot(optimizer) == before
    assert "Paged" not in repr(optimizer)
    paged = optim8.PagedAdamW8bit(model.parameters(), paged=optim8.paging.Pager(directory=tmp_path))
    assert "Paged: nothing yet; Pager(directory=" in repr(paged)
    paged.step()
    assert "KiB on disk" in repr(paged) or device.type == "cuda"
