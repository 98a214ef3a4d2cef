"""Optimizers of torch.optim taken over in mid-run, and checkpoints for other libraries. Theirs are read by every
optimizer's `load_state_dict` (docs/migrate.md).

`report()` asks what a conversion cost, in either direction.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from optim8 import optim, rules
from optim8.checkpoint.formats import bitsandbytes, bitsandbytes_groups, torch_optim
from optim8.checkpoint.formats.common import Format, check_rule
from optim8.optim import BlockwiseOptimizer
from optim8.rules import Moment, Moments
from optim8.state import report as reports
from optim8.state import shards
from optim8.state.conversion import as_sources
from optim8.state.layout import moments_of
from optim8.state.moments import Entry, Source, values
from optim8.state.report import Note, Report, Row, report
from optim8.step import arguments, hypers

__all__ = ["Note", "Report", "Row", "from_torch", "report", "to_bitsandbytes", "to_torch", "with_exact_zeros"]


def from_torch(optimizer: torch.optim.Optimizer, **options: Any) -> BlockwiseOptimizer:
    """The 8-bit counterpart of a torch.optim optimizer, to go on with in the middle of a run.

    It has the same parameters, in the same groups with their names, hyper-parameters, notes and `initial_lr`, and the
    state, converted as by `load_state_dict`; `report()` says what that cost. The given optimizer is not changed, and
    nothing but the parameters is shared with it, so an `lr` that is a tensor is a copy: delete it to free its memory.
    Its hooks stay with it.

    Schedulers go on with the new optimizer: `scheduler.optimizer = new`, also for each of a chain's `_schedulers`; one
    that has not stepped yet then warns that `optimizer.step()` has been overridden. Or make a new scheduler of `new`,
    give it the old one's state dict, and then load `optimizer.state_dict()` into `new`, since a new scheduler begins
    with its first learning rate.

    Args:
        optimizer: of a class of torch.optim itself, such as AdamW; what steps like it under another name may differ.
        **options: `optim_bits`, `min_8bit_size`, `rounding`, `paged`, `foreach`, `fused`, `capturable`: for all groups.

    Raises:
        TypeError: there is no counterpart, and the message names the nearest; or an option is unknown.
        ValueError: an option or a parameter cannot be honoured, such as differentiable=True.

    Examples:
        >>> import torch, optim8
        >>> p = torch.nn.Parameter(torch.ones(4096))
        >>> theirs = torch.optim.NAdam([p], lr=1e-3)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 100)
        >>> ours = optim8.from_torch(theirs, optim_bits=8)
        >>> scheduler.optimizer = ours
        >>> type(ours).__name__, ours.param_groups[0]["lr"]
        ('NAdam8bit', 0.001)
    """
    who = "from_torch"
    cls = _counterpart(who, optimizer)
    known = (*hypers.EXTRA_DEFAULTS, "paged", "foreach", "fused", "capturable")
    for name in options:
        if name not in known:
            close = arguments.did_you_mean(name, known)
            raise TypeError(f"{who}: options must be of {', '.join(known)}, got {name!r}.{close}")
    by_group = {name: value for name, value in options.items() if name != "paged"}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        read = _as_ours(f"{who}: param_groups[{index}]", cls.rule, group)
        names, params = read.pop("param_names", None), group["params"]
        groups.append(
            {**read, **by_group, "params": params if names is None else list(zip(names, params, strict=True))}
        )
    defaults = _as_ours(f"{who}: defaults", cls.rule, optimizer.defaults)
    taken = inspect.signature(cls).parameters.keys() & defaults.keys()
    new: BlockwiseOptimizer = cls(groups, **{**{name: defaults[name] for name in taken}, **options})
    new.load_state_dict(optimizer.state_dict())
    return new


def _as_ours(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group of torch.optim under our names, with how it runs."""
    read = torch_optim.read_group(where, rule, {name: value for name, value in group.items() if name != "params"})
    return {**read, **{name: group[name] for name in torch_optim.WAYS_TO_RUN if name in group}}


# Of the classes of torch.optim that have no counterpart: the nearest, and how it differs.
_NEAREST = {
    "ASGD": ("SGD8bit", "which does not average parameters"),
    "Adafactor": ("AdamW8bit", "which has a first moment, and a second one for each value"),
    "LBFGS": ("SGD8bit", "which keeps no history of gradients"),
    "Rprop": ("RMSprop8bit", "which is made for gradients of mini-batches"),
    "SparseAdam": ("Adam8bit", "which needs dense gradients"),
}

_USUAL = "AdamW8bit"


def _counterpart(who: str, optimizer: Any) -> Any:
    """The class here of an optimizer of torch.optim."""
    ours = {name: getattr(optim, name) for name in optim.__all__ if name.endswith("8bit")}
    ours = {name: cls for name, cls in ours.items() if not cls.always_paged}
    by_torch = {rules.rule(cls.rule).torch_name: cls for cls in ours.values()}
    name = type(optimizer).__name__
    if getattr(torch.optim, name, None) is type(optimizer) and name in by_torch:
        return by_torch[name]
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, BlockwiseOptimizer):
        raise TypeError(f"{who}: optimizer must be one of torch.optim, got {name}.")
    needed = ", ".join(known for known in by_torch if known)
    nearest, how = _NEAREST.get(name, (None, "if it steps in the same way: make it, and load the state dict into it"))
    if nearest is None:
        above = (base.__name__ for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim."))
        of_base = next((by_torch[base].__name__ for base in above if base in by_torch), None)
        stems = {known.removesuffix("8bit").lower(): known for known in ours}
        stem = name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit").lower()
        close = difflib.get_close_matches(stem, stems, 1)
        nearest = of_base or (stems[close[0]] if close else _USUAL)
    raise TypeError(
        f"{who}: optimizer must be torch.optim's {needed}, got {type(optimizer).__module__}.{name}. The nearest here "
        f"is optim8.{nearest}, {how}."
    )


def to_torch(optimizer: BlockwiseOptimizer) -> dict[str, Any]:
    """The state as a dict that the namesake in torch.optim loads; for Lion, that `lion_pytorch.Lion` loads.

    Codes become float32, exactly (torch's `load_state_dict` then rounds to the dtype of the parameter). Groups keep
    their hyper-parameters and options; those that exist only here are left out. Adagrad's dict has the sums of all
    parameters, as torch's, also before their first step. The optimizer is not changed, and the dict shares no memory
    with it. What others keep in a parameter's state is left out.

    Raises:
        TypeError: no optimizer of this library.
        ValueError: neither library has such an optimizer; parameters are DTensors; a parameter's hyper-parameters are
            overridden, which torch.optim cannot say; a group maximizes, and the other optimizer only descends; or it
            is a group of Muon with use_muon=False.

    Examples:
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
    written = _written(who, optimizer, torch_optim.write_group, torch_optim.write_entry, _torch_values)
    for group, saved in zip(optimizer.param_groups, written["param_groups"], strict=True):
        for param, id_ in zip(group["params"], saved["params"], strict=True):
            if not written["state"].get(id_):
                first = torch_optim.initial_entry(rules.variant(optimizer.rule, group).moments, param, group)
                written["state"].update({} if first is None else {id_: first})
    return written


def to_bitsandbytes(optimizer: BlockwiseOptimizer) -> dict[str, Any]:
    """The state as a dict that the optimizer of the same name in `bitsandbytes.optim` loads.

    Codes are taken over as they are. Roots are quantized anew, since bitsandbytes keeps second moments themselves
    (those of RMSprop and Adagrad with the signed code, of which they use half); so is state in 16 bits, such as
    AdEMAMix's slow moment, which does not turn in bitsandbytes' 8 bits; and so is all state of a parameter that does
    not lie row after row (channels last), since blocks run row after row there. The layout is the flat one, which every
    version reads. The optimizer is not changed, and the dict shares no memory with it. What others keep in a
    parameter's state is left out. No state dict holds overrides, neither theirs nor ours: repeat them.

    Raises:
        TypeError: no optimizer of this library.
        ValueError: bitsandbytes has no optimizer with this rule (its LAMB and LARS are Adam and SGD); parameters are
            DTensors; or a group has what bitsandbytes cannot do: maximize, amsgrad, a weight decay of Adam (which it
            decouples), SGD's dampening, nesterov and missing momentum, RMSprop's momentum, centered and alpha 0,
            Adagrad's lr_decay and initial_accumulator_value.
    """
    who = "to_bitsandbytes"
    _check(who, optimizer, bitsandbytes.FORMAT)
    return _written(who, optimizer, bitsandbytes_groups.write, bitsandbytes.write_entry, bitsandbytes.as_source)


def with_exact_zeros(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A dict of bitsandbytes, written on a CPU, with exact zeros in the first moments of its 8-bit state.

    Its CPU step stores an exact 0 as 2.1e-5 of the largest value of the block (code 131), so Lion would move values
    that have no gradient by lr in every step. Here they become 0 (code 127); in Adam, those whose second moment says
    so too. Only for dicts from a CPU: where CUDA wrote code 131, it is a value. The dict that was given stays as it is,
    and so does state of RMSprop and Adagrad, whose sums of squares use code 131 for values.

    Raises:
        TypeError: it is no state dict.

    Examples:
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
    entries = {key: entry for key, entry in state.items() if isinstance(entry, dict)}
    squares = {
        key
        for group in state_dict.get("param_groups") or ()
        for key in group["params"]
        if key in entries and bitsandbytes.keeps_squares(group, entries[key])
    }
    exact = {key: bitsandbytes.with_exact_zeros(entry) for key, entry in entries.items() if key not in squares}
    return {**state_dict, "state": {**state, **exact}}


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
