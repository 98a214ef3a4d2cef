"""Resets state, in its memory, to what it is before a first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from optim8.state.conversion import begin, zero
from optim8.state.layout import layout_of, others
from optim8.state.shards import local
from optim8.step import pending, supply


def _chosen(
    owner: str, groups: Sequence[dict[str, Any]], params: torch.Tensor | Iterable[torch.Tensor] | None
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """(parameter, its group) of the parameters that a user names; of all for None.

    Raises:
        TypeError: something else than tensors.
        ValueError: a tensor that is no parameter of these groups.
    """
    own = {id(param): (param, group) for group in groups for param in group["params"]}
    if params is None:
        return list(own.values())
    named = [params] if isinstance(params, torch.Tensor) else list(params)
    for index, param in enumerate(named):
        if not isinstance(param, torch.Tensor):
            raise TypeError(
                f"{owner}: params must be a parameter or an iterable of parameters, got {type(param).__name__} at "
                f"{index}. Pass optimizer.param_groups[i]['params'] for a group."
            )
        if id(param) not in own:
            raise ValueError(
                f"{owner}: params must be parameters of this optimizer, got another tensor {tuple(param.shape)} at "
                f"{index}. Nothing was reset."
            )
    return list({id(param): own[id(param)] for param in named}.values())


@torch.no_grad()
def reset_state(optimizer: Any, params: torch.Tensor | Iterable[torch.Tensor] | None) -> None:
    """Do what StateAccess.reset_state describes."""
    chosen = _chosen(f"{type(optimizer).__name__}.reset_state", optimizer.param_groups, params)
    memory = optimizer.memory
    with optimizer.turn:
        optimizer.windows.sync()
        supply.resolve(optimizer)
        pending.wait()
        stateful = [(param, group) for param, group in chosen if optimizer.state.get(param)]
        with memory.rewriting(optimizer.param_groups, optimizer.state):
            for param, group in stateful:
                entry, shard = optimizer.state[param], local(param)
                moments = supply.moments_wanted(optimizer, group, param)
                layout = layout_of(moments, shard, supply.bits_wanted(optimizer, group, param))
                if layout.fits(entry, shard, memory.reaches):
                    zero(layout, entry)
                    begin(moments, entry, supply.options_of(optimizer, group, param))
                else:
                    supply.allocate_states(optimizer, [(group, param)])
                    optimizer.state[param].update(others(optimizer.moments, entry))
