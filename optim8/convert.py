"""Checkpoints for other libraries. Theirs are read by every optimizer's `load_state_dict` (docs/migrate.md).

`report()` asks what a conversion cost, in either direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from optim8.checkpoint.formats import bitsandbytes, torch_optim
from optim8.checkpoint.formats.common import Format, check_rule
from optim8.optim import BlockwiseOptimizer
from optim8.rules import Moment, Moments
from optim8.state import report as reports
from optim8.state import shards
from optim8.state.conversion import as_sources
from optim8.state.layout import moments_of
from optim8.state.moments import Entry, Source, values
from optim8.state.report import Note, Report, Row, report
from optim8.step import hypers

__all__ = ["Note", "Report", "Row", "report", "to_bitsandbytes", "to_torch", "with_exact_zeros"]


def to_torch(optimizer: BlockwiseOptimizer) -> dict[str, Any]:
    """The state as a dict that `torch.optim.Adam`, `AdamW` or `SGD` loads; for Lion, that `lion_pytorch.Lion` loads.

    Codes become float32, exactly (torch's `load_state_dict` then rounds to the dtype of the parameter). Groups keep
    their hyper-parameters and options; those that exist only here are left out. The optimizer is not changed, and the
    dict shares no memory with it. What others keep in a parameter's state is left out.

    Raises:
        TypeError: no optimizer of this library.
        ValueError: parameters are DTensors; a parameter's hyper-parameters are overridden, which torch.optim cannot
            say; or a group maximizes and the dict is for lion-pytorch.

    Example:
        >>> import torch, optim8
        >>> p = torch.nn.Parameter(torch.ones(4096))
        >>> ours, theirs = optim8.AdamW8bit([p]), torch.optim.AdamW([p])
        >>> p.grad = torch.ones_like(p)
        >>> ours.step()
        >>> theirs.load_state_dict(optim8.convert.to_torch(ours))
        >>> theirs.step()
    """
    who = "to_torch"
    _check(who, optimizer, torch_optim.FORMAT)
    for index, group in enumerate(optimizer.param_groups):
        for at, param in enumerate(group["params"]):
            changed = sorted(optimizer.overridden(param).keys() - hypers.EXTRA_DEFAULTS)
            if changed:
                raise ValueError(
                    f"{who}: parameter {at} of group {index} has an override of {', '.join(changed)}, and torch.optim "
                    "has none. Make it a group of its own, or remove the override."
                )
    return _written(who, optimizer, torch_optim.write_group, torch_optim.write_entry, _torch_values)


def to_bitsandbytes(optimizer: BlockwiseOptimizer) -> dict[str, Any]:
    """The state as a dict that the optimizer of the same name in `bitsandbytes.optim` loads.

    Codes are taken over as they are. Roots are quantized anew, since bitsandbytes keeps second moments themselves; so
    is state in 16 bits; and so is all state of a parameter that does not lie row after row (channels last), since
    blocks run row after row there. The layout is the flat one, which every version reads. The optimizer is not changed,
    and the dict shares no memory with it. What others keep in a parameter's state is left out. No state dict holds
    overrides, neither theirs nor ours: repeat them.

    Raises:
        TypeError: no optimizer of this library.
        ValueError: the rule is SGD, which cannot be converted; parameters are DTensors; a group maximizes, or is Adam's
            with a weight decay (bitsandbytes' Adam decouples it).
    """
    who = "to_bitsandbytes"
    _check(who, optimizer, bitsandbytes.FORMAT)
    return _written(who, optimizer, bitsandbytes.write_group, bitsandbytes.write_entry, bitsandbytes.as_source)


def with_exact_zeros(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A dict of bitsandbytes, written on a CPU, with exact zeros in the first moments of its 8-bit state.

    Its CPU step stores an exact 0 as 2.1e-5 of the largest value of the block (code 131), so Lion would move values
    that have no gradient by lr in every step. Here they become 0 (code 127); in Adam, those whose second moment says
    so too. Only for dicts from a CPU: where CUDA wrote code 131, it is a value. The dict that was given stays as it is.

    Raises:
        TypeError: it is no state dict.

    Example:
        >>> import torch, optim8
        >>> table = torch.tensor(optim8.functional.create_dynamic_map(signed=True))
        >>> entry = {"step": 1, "state1": torch.full((4096,), 131, dtype=torch.uint8)}
        >>> entry |= {"absmax1": torch.ones(16), "qmap1": table}
        >>> fixed = optim8.convert.with_exact_zeros({"state": {0: entry}, "param_groups": []})
        >>> fixed["state"][0]["state1"].unique()
        tensor([127], dtype=torch.uint8)
    """
    state = state_dict.get("state") if isinstance(state_dict, dict) else None
    if not isinstance(state, dict):
        raise TypeError("with_exact_zeros: state_dict must be a dict with the dict 'state', as state_dict() gives it.")
    return {
        **state_dict,
        "state": {k: bitsandbytes.with_exact_zeros(e) if isinstance(e, dict) else e for k, e in state.items()},
    }


def _check(who: str, optimizer: Any, known: Format) -> None:
    if not isinstance(optimizer, BlockwiseOptimizer):
        raise TypeError(f"{who}: optimizer must be one of optim8, got {type(optimizer).__name__}.")
    check_rule(who, known, optimizer.rule)
    if any(shards.is_dtensor(param) for group in optimizer.param_groups for param in group["params"]):
        raise ValueError(
            f"{who}: parameters must be whole, got DTensors. Gather the state with get_optimizer_state_dict and "
            "StateDictOptions(full_state_dict=True), load it into an optimizer of the whole model, and convert that."
        )


def _torch_values(moments: Sequence[Moment], number: int, written: dict[str, Any]) -> Source:
    source: Source = written[moments[number].name]
    return source


def _written(
    who: str,
    optimizer: BlockwiseOptimizer,
    write_group: Callable[[str, str, dict[str, Any]], dict[str, Any]],
    write_entry: Callable[[Moments, Entry], dict[str, Any]],
    read_back: Callable[[Sequence[Moment], int, dict[str, Any]], Source],
) -> dict[str, Any]:
    saved = optimizer.state_dict()
    groups = [
        write_group(
            f"{who}: param_groups[{index}]",
            optimizer.rule,
            {name: value for name, value in group.items() if name not in hypers.EXTRA_DEFAULTS},
        )
        for index, group in enumerate(saved["param_groups"])
    ]
    ids = {id_ for group in groups for id_ in group["params"]}
    state: dict[Any, Any] = {}
    for key, entry in saved["state"].items():
        if key not in ids:
            state[key] = entry  # not of a parameter
            continue
        moments = moments_of(optimizer.moments, entry)
        sources = as_sources(moments, entry)
        state[key] = written = write_entry(moments, sources)
        asked = reports.current()
        if asked is not None:
            for number, moment in enumerate(moments):
                old, new = sources[moment.name], read_back(moments, number, written)
                _add(asked, f"state[{key!r}][{moment.name!r}]", moment, old, new)
    return {**saved, "state": state, "param_groups": groups}


def _add(asked: Report, name: str, moment: Moment, old: Source, new: Source) -> None:
    if isinstance(old, torch.Tensor):
        how = "copied"
    elif isinstance(new, torch.Tensor):
        how = "widened"
    else:
        how = "copied" if old.codes.is_contiguous() and not old.root and old.low is None else "requantized"
    device = old.device if isinstance(old, torch.Tensor) else old.codes.device
    asked.add(name, how, values(moment, old, device), values(moment, new, device))
