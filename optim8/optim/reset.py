"""State made what it is before a first step, where it lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from optim8.optim import states
from optim8.optim.states import Moment
from optim8.paging.files import fill


def chosen(
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


def in_place(moments: Sequence[Moment], entry: Mapping[str, Any], in_8_bits: bool) -> None:
    """Zero state, as new state is."""
    for name in states.names(moments, in_8_bits):
        fill(entry[name], 0)
    if in_8_bits:
        for moment in moments:
            fill(entry[moment.codes], moment.zero)
