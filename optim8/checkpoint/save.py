"""State dicts as an optimizer gives them."""

from __future__ import annotations

from typing import Any

from optim8.checkpoint import shards
from optim8.checkpoint.adopt import adopt_states
from optim8.checkpoint.formats import own
from optim8.checkpoint.optimizer import Checkpointed
from optim8.step import hypers, pending, supply


def prepare(optimizer: Checkpointed) -> None:
    """Bring state into the form in which it is saved, before torch.optim packs it.

    Raises:
        ValueError: parameters are those of FullyShardedDataParallel, and their state may be 8-bit.
    """
    optimizer.windows.sync()
    optimizer.memory.note_state_dict()
    adopt_states(optimizer)
    supply.resolve(optimizer)
    pending.wait()
    shards.check_can_save(type(optimizer).__name__, optimizer.param_groups)


def complete(optimizer: Checkpointed, packed: dict[str, Any]) -> dict[str, Any]:
    """The dict that torch.optim has packed, with what only ours have added."""
    owner, moments = type(optimizer).__name__, optimizer.moments
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [hypers.to_save(group) for group in packed["param_groups"]]
    state = {
        key: own.with_dim_order(moments, entry) if isinstance(entry, dict) and entry else entry
        for key, entry in packed["state"].items()
    }
    packed = {**packed, "state": state, "param_groups": groups}
    return shards.saved_state_dict(owner, moments, params, packed, optimizer.windows)
