"""Deep copies and pickles of an optimizer."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from optim8.checkpoint.adopt import put
from optim8.checkpoint.optimizer import Checkpointed
from optim8.checkpoint.pickling import PagedStates, copy_states
from optim8.paging import Store
from optim8.state.states import States
from optim8.step import hypers, pending, supply
from optim8.step.memory import Memory


def pickle_state(optimizer: Checkpointed, state: dict[str, Any]) -> dict[str, Any]:
    """What pickle gets of an optimizer; `state`: what torch.optim would give it."""
    optimizer.windows.sync()
    if isinstance(optimizer.memory, Store):
        pending.wait()
        supply.relay_states(optimizer)
        state["state"] = PagedStates(optimizer.memory, optimizer.moments, optimizer.state)
    return state


def copy_optimizer(optimizer: Any, state: dict[str, Any], memo: dict[int, Any]) -> Any:
    """A deep copy, whose parameters deepcopy and `memo` give; `state`: what torch.optim would copy."""
    optimizer.windows.sync()
    cls: Any = type(optimizer)
    twin = cls.__new__(cls)
    memo[id(optimizer)] = twin
    if not isinstance(optimizer.memory, Store):
        twin.__setstate__(deepcopy(state, memo))
        return twin
    del state["state"]
    pending.wait()
    store, states = copy_states(optimizer.memory, optimizer.moments, optimizer.state, memo)
    twin.memory = store
    twin.__setstate__({**deepcopy(state, memo), "state": states})
    return twin


def read_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What torch.optim gets of a pickle, of a copy, or of a state dict that was read."""
    if isinstance(state.get("state"), PagedStates):
        optimizer.memory = state["state"].store
        state = {**state, "state": state["state"].state}
    elif "memory" not in vars(optimizer):
        optimizer.memory = Memory()
    if "state_checked" not in vars(optimizer):  # it is made by this
        optimizer.state_checked, optimizer.known_overrides = False, None
    return state


def complete(optimizer: Any) -> None:
    """Bring an optimizer that a pickle has filled, maybe an older version's, into the form of this version."""
    optimizer.state = States(optimizer.state)
    for param, entry in optimizer.state.items():
        if isinstance(param, torch.Tensor) and isinstance(entry, dict):
            put(optimizer, param, entry)
    optimizer.memory.watch(optimizer.param_groups, optimizer.state)
    for group in optimizer.param_groups:
        for name, value in hypers.EXTRA_DEFAULTS.items():
            group.setdefault(name, value)
