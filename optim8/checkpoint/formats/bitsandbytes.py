"""What bitsandbytes' Adam, AdamW and Lion save: `state1`, `state2` as float32, or as codes with a table and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optim8 import codec
from optim8.checkpoint.formats import common, groups
from optim8.rules import Moment
from optim8.state import report
from optim8.state.moments import Codes, Entry, Source, same_table, values

# Around the tensors that FSDP must not gather, since version 0.46.
_WRAPPED = "__bnb_optimizer_quant_state__"
_BLOCKSIZES = (256, 64, 128, 512, 1024, 2048, 4096)  # 2048 until version 0.43


def _claims(groups: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> bool:
    if not entries:
        return any("t_alpha" in group for group in groups)
    return any(_WRAPPED in entry or "state1" in entry for entry in entries)


def _read_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    if len(group.get("betas", (0, 0))) != 2:
        common.fail(where, "['betas']", f"must be two numbers, got {group['betas']}")
    groups.check(where, rule, {"t_alpha": None, **group})  # which older versions do not write
    read = groups.known_only(group)
    # Its SGD, RMSprop and Adagrad also have one state, under Lion's name.
    if rule == "lion" and (read.pop("eps", 0.0) or not group.get("betas", (0, 1))[1]):
        key = "eps" if group.get("eps") else "betas"
        common.fail(where, f"[{key!r}]", f"is {group[key]}, which is no Lion's", "Load a dict of Lion.")
    return read


def _blocksize(where: str, key: str, size: int, count: int) -> int:
    fitting = next((blocksize for blocksize in _BLOCKSIZES if -(-size // blocksize) == count), None)
    if fitting is None:
        known = ", ".join(map(str, sorted(_BLOCKSIZES)))
        common.fail(where, f"[{key!r}]", f"has {count} entries for {size} values, which fits no block size of {known}")
    return fitting


def _read_entry(where: str, moments: Sequence[Moment], param: torch.Tensor, entry: dict[str, Any]) -> Entry:
    flat = {key: value for key, value in entry.items() if key != _WRAPPED}
    wrapped = entry.get(_WRAPPED, {})
    if not isinstance(wrapped, dict):
        common.fail(where, f"[{_WRAPPED!r}]", f"must be a dict, got {type(wrapped).__name__}")
    for key in wrapped:
        if key in flat:
            common.fail(where, f"[{key!r}]", f"stands twice, also in {_WRAPPED!r}")
    flat.update(wrapped)
    for key, what in (("gnorm_vec", "percentile_clipping"), ("unorm_vec", "max_unorm"), ("max1", "block_wise=False")):
        if key in flat:
            common.fail(where, f"[{key!r}]", f"is of {what}, which is not supported", "Delete it to go on without.")
    read: Entry = {"step": common.step(where, flat)}
    known = ["step"]
    for number, moment in enumerate(moments, 1):
        state, absmax, qmap = f"state{number}", f"absmax{number}", f"qmap{number}"
        values = common.tensor(where, flat, state, (torch.uint8, torch.float32), param.shape)
        known.append(state)
        if not values.is_contiguous():
            common.fail(
                where,
                f"[{state!r}]",
                f"has strides {values.stride()}, which bitsandbytes' CPU code heeds and its CUDA code does not",
                "Lay it out row after row first: t.contiguous() after training on a CPU, "
                "torch.as_strided(t, (t.numel(),), (1,)).view(t.shape) after training on a GPU.",
            )
        read[moment.name] = values
        if values.dtype == torch.uint8:
            known += [absmax, qmap]
            scales = flat.get(absmax)
            if not isinstance(scales, torch.Tensor) or scales.dtype != torch.float32 or scales.ndim != 1:
                common.fail(where, f"[{absmax!r}]", f"must be float32 of one dimension, got {common.describe(scales)}")
            blocksize = _blocksize(where, absmax, param.numel(), scales.numel())
            table = common.tensor(where, flat, qmap, (torch.float32,), (256,))
            if not bool(table.isfinite().all()):
                common.fail(where, f"[{qmap!r}]", "must be finite", "The checkpoint is damaged.")
            own = None if same_table(moment, table) else table
            read[moment.name] = Codes(values, common.absmax(where, absmax, scales), own, blocksize)
    common.no_other_keys(where, flat, known)
    first = read[moments[0].name]
    if isinstance(first, Codes) and first.table is None:
        report.note(f"{where}['state1']", lambda: _cpu_zeros(flat), _MOVED)
    return read


_FIRST = Moment("exp_avg", signed=True)  # state1 of every rule that is read here

# The codes that bitsandbytes' CPU step writes for an exact 0, of a signed and of an unsigned state: 2.1e-5 and 1.6e-5
# of the absmax.
_CPU_ZERO, _CPU_ZERO_SQ = 131, 7
_MOVED = (
    f"have code {_CPU_ZERO}, which bitsandbytes' CPU step writes for an exact 0: without a gradient Lion moves each by "
    "lr in every step, Adam by a small part of it. If a CPU wrote this dict, load "
    "optim8.convert.with_exact_zeros(state_dict)."
)


def _cpu_zeros(entry: Mapping[str, Any]) -> torch.Tensor:
    """Where the first moment of a quantized state may stand for an exact 0: with two moments, where both do."""
    zeros: torch.Tensor = entry["state1"] == _CPU_ZERO
    return zeros & (entry["state2"] == _CPU_ZERO_SQ) if "state2" in entry else zeros


def with_exact_zeros(entry: dict[str, Any]) -> dict[str, Any]:
    """A state whose first moment is 0 where bitsandbytes' CPU step meant 0, in memory of its own where it changes."""
    if isinstance(entry.get(_WRAPPED), dict):
        return {**entry, _WRAPPED: with_exact_zeros(entry[_WRAPPED])}
    codes, table = entry.get("state1"), entry.get("qmap1")
    if not isinstance(codes, torch.Tensor) or codes.dtype != torch.uint8 or not isinstance(table, torch.Tensor):
        return entry
    if not same_table(_FIRST, table):
        return entry
    return {**entry, "state1": codes.masked_fill(_cpu_zeros(entry), _FIRST.zero)}


def _has(rule: str) -> bool:
    return rule in ("adam", "adamw", "lion")


def _options(rule: str) -> tuple[str, ...]:
    return ("lr", "betas", "weight_decay", *(() if rule == "lion" else ("eps",)))


FORMAT = common.Format("bitsandbytes", False, _claims, _read_group, _read_entry, _options, _has)


def write_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group as bitsandbytes writes it; `group` has no options that exist only here."""
    if group["maximize"]:
        common.fail(where, "['maximize']", "must be False, got True", "bitsandbytes only descends.")
    if rule == "adam" and float(group["weight_decay"]):
        common.fail(
            where,
            "['weight_decay']",
            f"is {float(group['weight_decay']):g}, an L2 penalty: bitsandbytes' Adam decouples weight decay",
            "Set it to 0, or use AdamW8bit.",
        )
    dropped = ("amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable")
    written = {name: value for name, value in group.items() if name not in dropped}
    written["lr"] = float(group["lr"])
    written["betas"] = tuple(float(beta) for beta in group["betas"])
    if rule == "lion":
        return {**written, "eps": 0.0}
    return {**written, "alpha": 0.0, "t_alpha": None, "t_beta3": None}


def write_entry(moments: Sequence[Moment], entry: Entry) -> dict[str, Any]:
    """A state in the flat layout, which every version reads, in memory of its own."""
    written: dict[str, Any] = {"step": int(entry["step"])}
    for number, moment in enumerate(moments, 1):
        source = entry[moment.name]
        if isinstance(source, torch.Tensor):
            written[f"state{number}"] = source.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            continue
        codes, scales = source.codes, source.absmax
        if codes.is_contiguous() and not source.root and source.low is None:
            codes, scales = codes.clone(), scales.clone()
        else:
            # Its blocks run row after row, ours in memory order; and it keeps neither roots nor low bytes.
            floats = values(moment, source, codes.device).contiguous()
            codes = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
            scales = torch.empty_like(scales)
            codec.quantize(floats, codes, scales, signed=moment.signed)
        table = codec.code_table(moment.signed, codes.device).clone()
        written.update({f"state{number}": codes, f"absmax{number}": scales, f"qmap{number}": table})
    return written


def as_source(moments: Sequence[Moment], number: int, written: dict[str, Any]) -> Source:
    """A moment of what `write_entry` gave."""
    state: torch.Tensor = written[f"state{number + 1}"]
    return Codes(state, written[f"absmax{number + 1}"]) if state.dtype == torch.uint8 else state
