"""Moments as checkpoints hold them, ours or others', and their way into the state of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from optim8 import codec
from optim8.rules import Moment
from optim8.state import report
from optim8.state.mapped import copy
from optim8.state.mapped import fill as fill_tensor


@dataclass(frozen=True)
class Codes:
    """A quantized moment. Blocks run in memory order of `codes`, which is dense; the last may be shorter.

    codes: uint8, of the parameter's shape.
    absmax: float32, one for each block.
    table: float32 [256], the value of each code; None is the dynamic code of the moment's sign.
    blocksize: values of one absmax.
    root: whether they stand for the square roots of the moment's values.
    low: in 16 bits uint8, like the codes, with the dynamic code and blocks of 256; else None.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor | None = None
    blocksize: int = codec.BLOCK
    root: bool = False
    low: torch.Tensor | None = None


@dataclass(frozen=True)
class Tiled:
    """A quantized moment in the form in which sharded state is saved (tiles.py). It is made into Codes to be read.

    codes: uint8, of the parameter's shape.
    tiles: float32 [..., 2].
    root, low: as of Codes.
    """

    codes: torch.Tensor
    tiles: torch.Tensor
    root: bool = False
    low: torch.Tensor | None = None


# A float moment is a tensor of any float dtype. An entry has `step`, a number, and one source for each moment; in dicts
# of our own also what others keep there (layout.others).
Source: TypeAlias = torch.Tensor | Codes
Entry: TypeAlias = dict[str, Any]


def bits_of_sources(entry: Entry, moments: Sequence[Moment]) -> int:
    """The bits of a state that is read: 8, 16 or 32."""
    in_codes = [(moment, entry[moment.name]) for moment in moments if isinstance(entry[moment.name], Codes)]
    if not in_codes:
        return 32
    return 16 if any(source.low is not None and not moment.wide for moment, source in in_codes) else 8


def same_table(moment: Moment, table: torch.Tensor) -> bool:
    """Whether a table is the dynamic code of the moment's sign, up to the rounding of those who computed it."""
    ours = codec.code_table(moment.signed, torch.device("cpu"))
    # Each value takes some float32 operations; 8 units in the last place are far below the spacing of the table.
    return bool(torch.allclose(table.cpu(), ours, rtol=8 * 2.0**-24, atol=0))


def source_of(moment: Moment, entry: Mapping[str, Any]) -> Source:
    """A moment of a state of an optimizer here, unchecked."""
    goal = moment.values(entry)
    if moment.absmax not in entry:
        return goal
    return Codes(goal, entry[moment.absmax], root=moment.root, low=entry.get(moment.low))


def values(moment: Moment, source: Source, device: torch.device) -> torch.Tensor:
    """A moment in float32 on `device`, of the shape of its source."""
    if isinstance(source, torch.Tensor):
        return source.to(device, torch.float32)
    decoded = _decode(moment, source, device)
    return decoded.square_() if source.root else decoded


def code_values(moment: Moment, source: Source, device: torch.device) -> torch.Tensor:
    """What codes of a moment stand for, values or roots, in float32 on `device`, of the shape of its source."""
    if isinstance(source, Codes) and source.root == moment.root:
        return _decode(moment, source, device)
    floats = values(moment, source, device)
    return codec.square_root(floats) if moment.root else floats


def _decode(moment: Moment, source: Codes, device: torch.device) -> torch.Tensor:
    codes, absmax = source.codes.to(device), source.absmax.to(device).contiguous()
    if source.low is not None:
        return codec.dequantize16(codes, source.low.to(device), absmax, signed=moment.signed)
    return codec.dequantize(codes, absmax, signed=moment.signed, table=source.table, blocksize=source.blocksize)


def check_values(where: str, moments: Sequence[Moment], entry: Entry, bits: int) -> None:
    """Raise ValueError where values of another library's state would be lost on the way into ours."""
    for moment in moments:
        source = entry[moment.name]
        # A table speaks for all values, since scales are not negative.
        values_ = source if isinstance(source, torch.Tensor) else source.table
        if values_ is not None and not moment.signed and bool((values_ < 0).any()):
            raise ValueError(f"{where}[{moment.name!r}] must not be negative. The checkpoint is damaged.")
        if bits != 32 and isinstance(source, torch.Tensor) and not bool(source.isfinite().all()):
            raise ValueError(
                f"{where}[{moment.name!r}] must be finite to be quantized. Repair the checkpoint, or load it with "
                "optim_bits=32."
            )


def check_scales(where: str, moment: Moment, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Raise ValueError where codes stand for values and their scale is 0, as when scales were lost on the way.

    Other libraries may write any code into a block of zeros, but the same code throughout the block.

    Args:
        where: names the state, for messages.
        moment: which state it is.
        codes: uint8 [n], in the order of the scales.
        scales: float32 [ceil(n / 256)].
    """
    zero = (scales == 0).nonzero()[:, 0]
    whole = codes.numel() // codec.BLOCK
    last = codes[whole * codec.BLOCK :]
    lost = bool((last != last[:1]).any()) and bool((zero == whole).any())
    for part in torch.split(zero[zero < whole], 2**12):  # a copy of a megabyte at a time
        rows = codes[: whole * codec.BLOCK].view(-1, codec.BLOCK)[part]
        lost = lost or bool((rows != rows[:, :1]).any())
    if lost:
        raise ValueError(
            f"{where}[{moment.codes!r}] has values where {moment.absmax!r} is 0: the scales were lost on the way. Load "
            "the whole checkpoint with load_state_dict."
        )


def check_low(where: str, moment: Moment, codes: torch.Tensor, low: torch.Tensor) -> None:
    """Raise ValueError where low bytes say that a value of an unsigned state is below 0: no step writes that, and a
    kernel would look beyond its tables.

    Args:
        where: names the state, for messages.
        moment: which state it is.
        codes, low: uint8, alike.
    """
    if not moment.signed and bool(((codes == moment.zero) & (low < moment.middle)).any()):
        raise ValueError(
            f"{where}[{moment.low!r}] must be at least {moment.middle} where {moment.codes!r} is {moment.zero}. The "
            "checkpoint is damaged."
        )


def fill(moment: Moment, source: Source, target: Entry, name: str) -> None:
    """Bring a moment into an allocated state, in the precision and the strides of that.

    Args:
        moment: which.
        source: of the shape of the target.
        target: the state of a parameter, as allocation.allocate gives it.
        name: for a report; "" for none.
    """
    goal = moment.values(target)
    if isinstance(source, Codes):
        if not source.codes.is_contiguous() and source.codes.stride() != goal.stride():
            # Keeps the strides of a dense tensor, and closes the gaps of others.
            source = replace(source, codes=source.codes.clone(), low=None if source.low is None else source.low.clone())
        codes = source.codes
        same_order = codes.is_contiguous() if goal.is_contiguous() else codes.stride() == goal.stride()
        same_code = source.table is None and source.blocksize == codec.BLOCK and source.root == moment.root
        # Codes without low bytes become state in 16 bits by low bytes that say nothing more.
        if moment.absmax in target and same_order and same_code and (moment.low in target or source.low is None):
            copy(goal, codes)
            copy(target[moment.absmax], source.absmax)
            if source.low is not None:
                copy(target[moment.low], source.low)
            elif moment.low in target:
                fill_tensor(target[moment.low], moment.middle)
            is_wider = moment.low in target and source.low is None
            _report(moment, source, target, name, "widened" if is_wider else "copied")
            return
    # Blocks run in memory order, so other strides mean other blocks: quantized anew.
    if moment.absmax not in target:
        copy(goal, values(moment, source, goal.device))
        _report(moment, source, target, name, "widened" if isinstance(source, Codes) else "copied")
        return
    relaid = torch.empty_strided(tuple(goal.shape), goal.stride(), dtype=torch.float32, device=goal.device)
    relaid.copy_(code_values(moment, source, goal.device))
    if moment.low in target:
        codec.quantize16(relaid, goal, target[moment.low], target[moment.absmax], signed=moment.signed)
    else:
        codec.quantize(relaid, goal, target[moment.absmax], signed=moment.signed)
    _report(moment, source, target, name, "requantized" if isinstance(source, Codes) else "quantized")


def _report(moment: Moment, source: Source, target: Entry, name: str, how: str) -> None:
    asked = report.current()
    if asked is None or not name:
        return
    goal = moment.values(target)
    written: Source = source_of(moment, target)
    asked.add(
        f"{name}[{moment.name!r}]", how, values(moment, source, goal.device), values(moment, written, goal.device)
    )
