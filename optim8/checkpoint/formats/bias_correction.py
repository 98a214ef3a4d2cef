"""What optimi's and heavyball's Adams have in common: averages that hold their bias correction.

Their average after t steps is the weighted mean of t gradients, which torch's is only after a division by 1 - beta^t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from optim8.checkpoint.formats import common
from optim8.rules import Moments
from optim8.state.moments import Entry

BETAS = "betas"  # what `for_each_state` puts into a state, beside the count


def for_each_state(
    state_dict: dict[str, Any],
    change: Callable[[dict[str, Any], Any], dict[str, Any]],
    betas: tuple[str, ...],
    count: str,
) -> dict[str, Any]:
    """The dict with each group's count of steps and betas in the states of its parameters.

    Args:
        change: (group, state) -> the state under torch.optim's names.
        betas: the keys of the group with both betas, or with each.
        count: the key of the group with the count of steps; a state that has its own keeps it.
    """
    state = dict(state_dict["state"])
    for group in state_dict["param_groups"]:
        both = [group.get(name) for name in betas]
        shared = {"step": group.get(count), BETAS: both[0] if len(both) == 1 else both}
        for key in group["params"]:
            if state.get(key):
                state[key] = {**shared, **change(group, state[key])}
    return {**state_dict, "state": state}


def read(where: str, moments: Moments, entry: Mapping[str, Any], floats: Mapping[str, torch.Tensor]) -> Entry:
    """The state as torch.optim has it.

    Args:
        entry: has `step` and BETAS.
        floats: the averages by moment.
    """
    step = common.step(where, entry)
    factors = [1 - float(beta) ** step for beta in entry[BETAS]]
    read: Entry = {"step": step}
    for moment, factor in zip(moments, factors, strict=True):
        read[moment.name] = floats[moment.name].to(torch.float32) * factor
    return read
