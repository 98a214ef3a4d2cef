"""Optimizer state as tensors: what a state is, its allocation, and its conversion between layouts.

Moments in 8 bits are `name_codes` (uint8, of the parameter's shape and strides) and `name_absmax` (float32, one for
each 256 consecutive values in memory order); in 32 bits `name` alone, float32. Codes never stand under `name`: other
optimizers would take them for values. The tensors of one allocation lie in a few flat arenas.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from optim8.codec import BLOCK, blocks
from optim8.paging.store import Store
from optim8.paging.tiers import DEVICE, TIERS

_ALIGN = 64  # bytes; a cache line, and the width of the widest vector


@dataclass(frozen=True)
class Moment:
    """One state of a rule: its name, and whether its code is signed.

    name: the key of its values in float32.
    codes, absmax: the keys of its codes and of their scales.
    """

    name: str
    signed: bool
    codes: str = field(init=False)
    absmax: str = field(init=False)

    def __post_init__(self) -> None:
        # Interned: a step compares the keys of an entry by identity.
        object.__setattr__(self, "codes", sys.intern(f"{self.name}_codes"))
        object.__setattr__(self, "absmax", sys.intern(f"{self.name}_absmax"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # keys are interned anew, and version 0.1.0 had none for codes

    @property
    def zero(self) -> int:
        """The code of 0: the middle of the signed map, the start of the unsigned one."""
        return 127 if self.signed else 0

    def key(self, in_8_bits: bool) -> str:
        """The key of the tensor that has one element for each value of the parameter."""
        return self.codes if in_8_bits else self.name

    def values(self, entry: Mapping[str, Any]) -> torch.Tensor:
        """That tensor of a parameter's state: codes, or float32."""
        tensor: torch.Tensor = entry[self.key(self.absmax in entry)]
        return tensor


EXP_AVG = Moment("exp_avg", signed=True)
EXP_AVG_SQ = Moment("exp_avg_sq", signed=False)


class _Arena:
    """One allocation of a dtype, from which tensors are cut."""

    def __init__(self, dtype: torch.dtype, device: torch.device, fill: int = 0, align: int = _ALIGN) -> None:
        self.dtype, self.device, self.fill = dtype, device, fill
        self.step = max(1, align // dtype.itemsize)
        self.size = 0
        self.flat = torch.empty(0, dtype=dtype)

    def place(self, shape: Sequence[int]) -> int:
        """Make room for a tensor; gives where it will be."""
        at = self.size
        self.size += self._room(shape)
        return at

    def _room(self, shape: Sequence[int]) -> int:
        return -(-math.prod(shape) // self.step) * self.step

    def cut(self, at: int, shape: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
        """The tensor for which room was made there; its storage goes up to the next one."""
        return _part(self.flat, at, self._room(shape), shape, stride)


def _beside(arenas: Sequence[_Arena]) -> None:
    """Memory for arenas where they say.

    Raises:
        RuntimeError: a tracer's mode makes tensors of another kind, which could not be stepped later.
    """
    for arena in arenas:
        arena.flat = torch.full((arena.size,), arena.fill, dtype=arena.dtype, device=arena.device)
        if type(arena.flat).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise RuntimeError(
                f"optim8: state must be plain tensors, and a mode is on that makes a {type(arena.flat).__name__} of "
                "each. Step outside of it (FakeTensorMode, FunctionalTensorMode, tracing)."
            )


def dense_stride(param: torch.Tensor) -> tuple[int, ...]:
    """The strides of a parameter's state: its own, or where it has gaps, as a slice has, those of torch.empty_like,
    without gaps in the same order of dimensions."""
    own, shape = tuple(param.stride()), param.shape
    if param.is_contiguous():
        return own
    stride, count = list(own), 1
    for d in sorted(range(len(own)), key=lambda d: (own[d], -d)):
        stride[d] = count
        count *= shape[d]
    # Of a dimension of one element a tensor may have any stride.
    return own if all(stride[d] == own[d] for d in range(len(own)) if shape[d] > 1) else tuple(stride)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or where it has gaps, a copy with the strides of its state."""
    return tensor if tuple(tensor.stride()) == dense_stride(tensor) else tensor.clone()


def state_bytes(moments: Sequence[Moment], size: int, in_8_bits: bool) -> int:
    """Bytes of the state of a parameter of `size` values."""
    return 4 + len(moments) * (size + 4 * blocks(size) if in_8_bits else 4 * size)


def names(moments: Sequence[Moment], in_8_bits: bool) -> list[str]:
    """The names of the tensors of a parameter's state."""
    return ["step", *(m.key(in_8_bits) for m in moments), *(m.absmax for m in moments if in_8_bits)]


def under_present_names(moments: Sequence[Moment], entry: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as version 0.1.0 kept it, with codes under `name`, under the names of today; any other as it
    is."""
    if not any(moment.absmax in entry and moment.name in entry for moment in moments):
        return entry
    codes = {moment.name: moment.codes for moment in moments if moment.absmax in entry}
    return {codes.get(name, name): value for name, value in entry.items()}


def others(moments: Sequence[Moment], entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept with a parameter's state and is not the optimizer's, such as the slow weights of Lookahead."""
    own = {name for in_8_bits in (False, True) for name in names(moments, in_8_bits)}
    return {key: value for key, value in entry.items() if key not in own}


def fits(
    moments: Sequence[Moment], entry: Mapping[str, Any], param: torch.Tensor, in_8_bits: bool, store: Store | None
) -> bool:
    """Whether a parameter's state is laid out as `allocate` would lay it out, whatever its values."""
    own = names(moments, in_8_bits)
    if entry.keys() - others(moments, entry).keys() != set(own) or not all(torch.is_tensor(entry[n]) for n in own):
        return False
    step = entry["step"]
    values = [entry[moment.key(in_8_bits)] for moment in moments]
    scales = [entry[moment.absmax] for moment in moments if in_8_bits]
    kind, number = torch.uint8 if in_8_bits else torch.float32, blocks(param.numel())
    return (
        (step.dtype, step.shape) == (torch.float32, ())
        and all((t.dtype, t.shape, t.stride()) == (kind, param.shape, dense_stride(param)) for t in values)
        and all((t.dtype, t.shape, t.is_contiguous()) == (torch.float32, (number,), True) for t in scales)
        and all(t.device == param.device or (store is not None and store.holds(t)) for t in (*values, *scales))
    )


def allocate(
    moments: Sequence[Moment], wanted: Sequence[tuple[torch.Tensor, bool]], store: Store | None = None
) -> list[dict[str, Any]]:
    """Zero state for parameters of one device, in order.

    Args:
        moments: the states of the rule.
        wanted: (parameter, whether its state is 8-bit).
        store: decides where the state lives; None: beside its parameter.

    Returns:
        For each parameter its state: `step` (float32, 0-dim, on the CPU) and the tensors of every moment.

    Raises:
        OSError: there is no room on the disk; nothing was allocated.
    """
    if not wanted:
        return []
    if store is None:
        return _allocate(moments, wanted, _beside)
    device = wanted[0][0].device
    tiers = store.assign([state_bytes(moments, param.numel(), in_8_bits) for param, in_8_bits in wanted], device)
    entries: list[dict[str, Any]] = [{}] * len(wanted)
    for tier in sorted(set(tiers), key=TIERS.index, reverse=True):  # the disk first, which may be full
        indices = [i for i, of_state in enumerate(tiers) if of_state == tier]
        make = _beside if tier == DEVICE else partial(store.allocate, tier, device)
        for i, entry in zip(indices, _allocate(moments, [wanted[i] for i in indices], make), strict=True):
            entries[i] = entry
    return entries


def _allocate(
    moments: Sequence[Moment],
    wanted: Sequence[tuple[torch.Tensor, bool]],
    make: Callable[[Sequence[_Arena]], None],
) -> list[dict[str, Any]]:
    device = wanted[0][0].device
    steps = _Arena(torch.float32, torch.device("cpu"), align=1)
    scales = _Arena(torch.float32, device, align=1)
    codes = {moment: _Arena(torch.uint8, device, moment.zero) for moment in moments}
    floats = _Arena(torch.float32, device)
    cuts: list[list[tuple[str, _Arena, tuple[int, ...], tuple[int, ...], int]]] = []
    for param, in_8_bits in wanted:
        shape, stride = tuple(param.shape), dense_stride(param)
        scales_shape = (blocks(param.numel()),)
        cut: list[tuple[str, _Arena, tuple[int, ...], tuple[int, ...], int]] = []
        cut.append(("step", steps, (), (), steps.place(())))
        for moment in moments:
            if in_8_bits:
                cut.append((moment.codes, codes[moment], shape, stride, codes[moment].place(shape)))
                cut.append((moment.absmax, scales, scales_shape, (1,), scales.place(scales_shape)))
            else:
                cut.append((moment.name, floats, shape, stride, floats.place(shape)))
        cuts.append(cut)
    make((steps, scales, *codes.values(), floats))
    # Parameter by parameter, so that the small objects a step must look at lie together.
    return [{name: arena.cut(at, shape, stride) for name, arena, shape, stride, at in cut} for cut in cuts]


def _part(flat: torch.Tensor, at: int, size: int, shape: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """A tensor in the memory of a flat one, with a storage of its own of `size` elements from `at` on: torch saves and
    copies a tensor with its whole storage, and who saves the state of one parameter does not mean that of all."""
    begin = flat.storage_offset() + at
    if flat.device.type == "meta":
        return flat.as_strided(shape, stride, begin)  # the planner counts allocations
    bytes_ = flat.dtype.itemsize
    storage = flat.untyped_storage()[begin * bytes_ : (begin + size) * bytes_]  # no copy; keeps the whole alive
    return torch.empty(0, dtype=flat.dtype, device=flat.device).set_(storage, 0, tuple(shape), tuple(stride))


def move_steps(entries: Sequence[tuple[torch.Tensor, dict[str, Any]]]) -> None:
    """Move the counts of steps of (parameter, state) beside the parameters, in one copy to each device."""
    by_device: dict[torch.device, list[dict[str, Any]]] = {}
    for param, entry in entries:
        by_device.setdefault(param.device, []).append(entry)
    for device, of_device in by_device.items():
        counts = torch.stack([entry["step"] for entry in of_device]).to(device)
        for at, entry in enumerate(of_device):
            entry["step"] = _part(counts, at, 1, (), ())


def check_scales(where: str, moment: Moment, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Raise ValueError where codes stand for values and their scale is 0, as when scales were lost on the way.

    Other libraries write any code into a block of zeros, but one and the same.

    Args:
        where: names the state, for messages.
        moment: which state it is.
        codes: uint8 [n], in the order of the scales.
        scales: float32 [ceil(n / 256)].
    """
    zero = (scales == 0).nonzero()[:, 0]
    whole = codes.numel() // BLOCK
    last = codes[whole * BLOCK :]
    lost = bool((last != last[:1]).any()) and bool((zero == whole).any())
    for part in torch.split(zero[zero < whole], 2**12):  # a copy of a megabyte at a time
        rows = codes[: whole * BLOCK].view(-1, BLOCK)[part]
        lost = lost or bool((rows != rows[:, :1]).any())
    if lost:
        raise ValueError(
            f"{where}[{moment.codes!r}] has values where {moment.absmax!r} is 0: the scales were lost on the way. Load "
            "the whole checkpoint with load_state_dict."
        )
