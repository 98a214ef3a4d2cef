"""What bitsandbytes' optimizers save: `state1`, `state2` as float32, or as codes with a table and scales.

The dict does not say which optimizer wrote it. Those with one state have the same keys: what they keep in `betas` and
`eps` tells them apart (bitsandbytes_groups.py). AdEMAMix has two moments in `state1`. Of an optimizer with one state
the table is the signed one, whatever the state is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optim8 import codec
from optim8.checkpoint.formats import bitsandbytes_groups, common
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
    for key, what in (("gnorm_vec", "percentile_clipping"), ("max1", "block_wise=False")):
        if key in flat:
            common.fail(where, f"[{key!r}]", f"is of {what}, which is not supported", "Delete it to go on without.")
    read: Entry = {"step": common.step(where, flat)}
    known = ["step"]
    for number, together in enumerate(_stacks(moments), 1):
        known += _read_state(where, number, together, param, flat, read, signed=len(moments) == 1)
    if "unorm_vec" in flat:
        known.append("unorm_vec")
        if flat["state1"].dtype != torch.uint8:
            common.fail(where, "['unorm_vec']", _CAPPED, _UNCAPPED)
    common.no_other_keys(where, flat, known)
    first = read[moments[0].name]
    if isinstance(first, Codes) and first.table is None:
        report.note(f"{where}['state1']", lambda: _cpu_zeros(flat), _MOVED)
    return read


# Their 8-bit step knows no cap: such state goes on here as there.
_CAPPED = (
    "is of max_unorm, which is not supported: bitsandbytes' LAMB is Adam with decoupled weight decay, and its LARS is "
    "SGD, whose update of 32-bit state is at most max_unorm times as long as the parameter"
)
_UNCAPPED = "Delete it to go on without that."


def _stacks(moments: Sequence[Moment]) -> list[Sequence[Moment]]:
    """The moments of state1, state2: AdEMAMix has its two first moments in state1."""
    firsts, second = moments[:-1], moments[-1:]
    return [each for each in (firsts, second) if each]


def _read_state(
    where: str,
    number: int,
    together: Sequence[Moment],
    param: torch.Tensor,
    flat: Mapping[str, Any],
    read: Entry,
    *,
    signed: bool,
) -> list[str]:
    """Put the moments of `state<number>` into `read`.

    Args:
        together: one moment, or those that are stacked in it.
        signed: whether it has the signed table, whatever the moment is.

    Returns:
        The keys that are of it.
    """
    state, absmax, qmap = f"state{number}", f"absmax{number}", f"qmap{number}"
    stack = (len(together),) if len(together) > 1 else ()
    values = common.tensor(where, flat, state, (torch.uint8, torch.float32), (*stack, *param.shape))
    if not values.is_contiguous():
        common.fail(
            where,
            f"[{state!r}]",
            f"has strides {values.stride()}, which bitsandbytes' CPU code heeds and its CUDA code does not",
            "Lay it out row after row first: t.contiguous() after training on a CPU, "
            "torch.as_strided(t, (t.numel(),), (1,)).view(t.shape) after training on a GPU.",
        )
    parts = list(values) if stack else [values]
    if values.dtype != torch.uint8:
        read.update((moment.name, part) for moment, part in zip(together, parts, strict=True))
        return [state]
    scales = flat.get(absmax)
    if not isinstance(scales, torch.Tensor) or scales.dtype != torch.float32 or scales.ndim != 1 + len(stack):
        dimensions = "two dimensions" if stack else "one dimension"
        common.fail(where, f"[{absmax!r}]", f"must be float32 of {dimensions}, got {common.describe(scales)}")
    if stack and len(scales) != len(together):
        common.fail(where, f"[{absmax!r}]", f"must have {len(together)} rows, got {len(scales)}")
    blocksize = _blocksize(where, absmax, param.numel(), scales.shape[-1])
    table = common.tensor(where, flat, qmap, (torch.float32,), (256,))
    if not bool(table.isfinite().all()):
        common.fail(where, f"[{qmap!r}]", "must be finite", "The checkpoint is damaged.")
    rows = list(common.absmax(where, absmax, scales)) if stack else [common.absmax(where, absmax, scales)]
    for moment, part, row in zip(together, parts, rows, strict=True):
        own = None if same_table(moment, table) else table
        if own is not None and signed and not moment.signed:
            if bool((own[part.unique().long()] < 0).any()):
                common.fail(where, f"[{state!r}]", "must not be negative", "The checkpoint is damaged.")
            own = own.clamp(min=0)  # no code that is there stands for less
        read[moment.name] = Codes(part, row, own, blocksize)
    return [state, absmax, qmap]


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


def keeps_squares(group: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether the only state is a sum or mean of squares, as of RMSprop and Adagrad: those alone have an eps then."""
    flat = {**entry, **(entry.get(_WRAPPED) or {})}
    return bool(group.get("eps")) and "state2" not in flat


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


_NAMESAKES = {
    "lamb": "bitsandbytes' LAMB is Adam with decoupled weight decay and a cap on the update, its LAMB8bit is AdamW8bit "
    "to the bit: load such a dict into AdamW8bit.",
    "lars": "bitsandbytes' LARS is SGD with a cap on the update, its LARS8bit is SGD8bit to the bit, and its momentum "
    "sums the gradients themselves, without a ratio: load such a dict into SGD8bit.",
}

FORMAT = common.Format(
    "bitsandbytes",
    False,
    _claims,
    bitsandbytes_groups.read,
    _read_entry,
    bitsandbytes_groups.options,
    bitsandbytes_groups.has,
    _NAMESAKES,
)


def write_entry(moments: Sequence[Moment], entry: Entry) -> dict[str, Any]:
    """A state in the flat layout, which every version reads, in memory of its own."""
    written: dict[str, Any] = {"step": int(entry["step"])}
    for number, together in enumerate(_stacks(moments), 1):
        parts = [_write_moment(moment, entry[moment.name], signed=len(moments) == 1) for moment in together]
        for key in parts[0]:
            tensors = [part[key] for part in parts]
            is_stack = len(parts) > 1 and key != "qmap"
            written[f"{key}{number}"] = torch.stack(tensors) if is_stack else tensors[0]
    return written


def _write_moment(moment: Moment, source: Source, *, signed: bool) -> dict[str, torch.Tensor]:
    """The tensors of a moment by their keys, less the number; `signed`: with the signed table, whatever it is."""
    if isinstance(source, torch.Tensor):
        return {"state": source.to(torch.float32, memory_format=torch.contiguous_format, copy=True)}
    codes, scales, signed = source.codes, source.absmax, signed or moment.signed
    if codes.is_contiguous() and not source.root and source.low is None and signed == moment.signed:
        codes, scales = codes.clone(), scales.clone()
    else:
        # Its blocks run row after row, ours in memory order; and it keeps neither roots nor low bytes.
        floats = values(moment, source, codes.device).contiguous()
        codes = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
        scales = torch.empty_like(scales)
        codec.quantize(floats, codes, scales, signed=signed)
    return {"state": codes, "absmax": scales, "qmap": codec.code_table(signed, codes.device).clone()}


def as_source(moments: Sequence[Moment], number: int, written: dict[str, Any]) -> Source:
    """A moment of what `write_entry` gave."""
    stacks = _stacks(moments)
    at = next(i for i, together in enumerate(stacks) if moments[number] in together)
    state: torch.Tensor = written[f"state{at + 1}"]
    scales: torch.Tensor | None = written.get(f"absmax{at + 1}")
    if len(stacks[at]) > 1:
        row = list(stacks[at]).index(moments[number])
        state, scales = state[row], None if scales is None else scales[row]
    return state if scales is None else Codes(state, scales, written[f"qmap{at + 1}"])
