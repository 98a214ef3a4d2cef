"""Numbers of groups as configs, sweeps and schedules give them: stored as plain ones, saved so that all can read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case
from support.harness import ALL, bits, parameter, through_a_file

import optim8


class ConfigList(Sequence[float]):
    """A sequence that is neither list nor tuple, as OmegaConf's."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __iter__(self) -> Iterator[float]:
        return iter(self.values)


# (option, value, as it is stored)
GIVEN: dict[str, tuple[str, Any, Any]] = {
    "list": ("betas", [0.5, 0.25], (0.5, 0.25)),
    "sequence": ("betas", ConfigList([0.5, 0.25]), (0.5, 0.25)),
    "array": ("betas", np.array([0.5, 0.25], np.float32), (0.5, 0.25)),
    "numpy floats": ("betas", (np.float32(0.5), np.float64(0.25)), (0.5, 0.25)),
    "string": ("betas", "(0.5, 0.25)", (0.5, 0.25)),
    "ints": ("betas", [0, 0], (0.0, 0.0)),
    "lr of numpy": ("lr", np.float32(0.5), 0.5),
    "lr, an array": ("lr", np.array(0.5), 0.5),
    "lr, an array of one": ("lr", np.array([0.5]), 0.5),
    "lr, an int": ("lr", 1, 1.0),
    "lr, a fraction": ("lr", Fraction(1, 2), 0.5),
    "weight_decay of numpy": ("weight_decay", np.int64(1), 1.0),
    "eps of numpy": ("eps", np.float64(0.5), 0.5),
    "min_8bit_size of numpy": ("min_8bit_size", np.int64(7), 7),
    "min_8bit_size, a whole float": ("min_8bit_size", 4096.0, 4096),
    "optim_bits of numpy": ("optim_bits", np.int32(32), 32),
}


def kinds(value: Any) -> Any:
    return tuple(map(type, value)) if isinstance(value, tuple) else type(value)


@pytest.mark.parametrize("where", ["argument", "group", "add_param_group", "edited", "loaded"])
@pytest.mark.parametrize("what", GIVEN)
def test_numbers_are_stored_plain(what: str, where: str, device: torch.device) -> None:
    name, value, plain = GIVEN[what]

    def make(given: Any) -> tuple[Any, torch.nn.Parameter]:
        p = parameter(torch.ones(300, device=device), torch.ones(300, device=device))
        if where == "argument":
            optimizer = optim8.AdamW8bit([p], **{name: given})
        elif where == "group":
            optimizer = optim8.AdamW8bit([{"params": [p], name: given}])
        elif where == "add_param_group":
            optimizer = optim8.AdamW8bit([parameter(torch.ones(1, device=device))])
            optimizer.add_param_group({"params": [p], name: given})
        else:
            optimizer = optim8.AdamW8bit([p])
            if where == "edited":
                optimizer.param_groups[-1][name] = given
            else:
                state_dict = optimizer.state_dict()
                state_dict["param_groups"][0][name] = given
                optimizer.load_state_dict(state_dict)
        return optimizer, p

    optimizer, p = make(copy.deepcopy(value))
    if where != "edited":
        assert optimizer.param_groups[-1][name] == plain
    optimizer.step()
    stored = optimizer.param_groups[-1][name]
    assert stored == plain
    assert kinds(stored) == kinds(plain)
    assert through_a_file(optimizer.state_dict())["param_groups"][-1][name] == plain
    other, q = make(plain)
    other.step()
    assert bits(p) == bits(q)


@ALL
def test_numpy_scalars_of_a_group_are_saved_as_numbers(case: Case) -> None:
    """Whoever wrote them, under whatever name; also before a step."""
    optimizer = case.make([parameter(torch.ones(3), torch.ones(3))])
    group = optimizer.param_groups[0]
    group.update(lr=np.float64(0.5), initial_lr=np.float32(0.5), tags=[np.int64(3), {"scale": np.float64(2)}])
    for _ in range(2):
        loaded = through_a_file(optimizer.state_dict())["param_groups"][0]
        assert (loaded["lr"], loaded["initial_lr"], loaded["tags"]) == (0.5, 0.5, [3, {"scale": 2.0}])
        optimizer.step()
    assert isinstance(group["initial_lr"], np.float32), "what is another's stays as it is"


def test_tensors_stay_and_are_read_anew(device: torch.device) -> None:
    beta = torch.tensor(0.5)
    params = [parameter(torch.ones(3, device=device), torch.ones(3, device=device)) for _ in range(2)]
    optimizer = optim8.AdamW8bit([params[0]], betas=[beta, 0.75], lr=torch.tensor([0.5]))
    other = optim8.AdamW8bit([params[1]], betas=(0.25, 0.75), lr=0.5)
    assert optimizer.param_groups[0]["betas"][0] is beta
    beta.fill_(0.25)
    for each in (optimizer, other):
        each.step()
        each.step()
    assert bits(params[0]) == bits(params[1])


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("lr", "1e-4", "lr must be a number, got '1e-4'. .*1.0e-4"),
        ("lr", True, "lr must be a number"),
        ("lr", np.bool_(True), "lr must be a number"),
        ("lr", np.ones(2), "lr must be a number"),
        ("lr", 1j, "lr must be a number"),
        ("betas", {0.9, 0.99}, "betas must be a pair"),
        ("betas", {0.9: 1, 0.99: 2}, "betas must be a pair"),
        ("betas", np.array(0.9), "betas must be a pair"),
        ("betas", np.ones((2, 2)), "betas must be a pair"),
        ("betas", ["a", "b"], r"betas\[0\] must be a number"),
        ("betas", None, "betas must be a pair"),
        ("min_8bit_size", np.float64(4096.5), "min_8bit_size must be a whole number"),
        ("min_8bit_size", float("nan"), "min_8bit_size must be a whole number"),
        ("min_8bit_size", True, "min_8bit_size must be a whole number"),
        ("optim_bits", np.int64(4), "optim_bits must be 8, 16 or 32"),
    ],
)
def test_what_is_no_number_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        optim8.AdamW8bit([parameter(torch.ones(3))], **{name: value})


def test_overrides_too(device: torch.device) -> None:
    p = parameter(torch.ones(3, device=device), torch.ones(3, device=device))
    optimizer = optim8.AdamW8bit([p])
    with optim8.override(p, lr=np.float32(0.5), betas=ConfigList([0.5, 0.25])):
        assert optimizer.overridden(p) == {"lr": 0.5, "betas": (0.5, 0.25)}
        assert type(optimizer.overridden(p)["lr"]) is float
        optimizer.param_groups[0]["weight_decay"] = np.float64(0)
        optimizer.step()
    assert type(optimizer.param_groups[0]["weight_decay"]) is float
