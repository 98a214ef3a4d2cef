"""Which tensors the state of a parameter consists of: their keys, shapes, strides, bytes. Only this module decides it.

State in 8 bits is `name_codes` (uint8, of the parameter's shape and strides) and `name_absmax` (float32, one for each
256 consecutive values in memory order) for each moment; `name_root_codes` and `name_root_absmax` where they stand for
the square roots of its values. In 16 bits there is `name_low` (or `name_root_low`) besides, uint8, which like codes has
the parameter's shape and strides. In 32 bits it is `name` alone, float32. Codes never stand under `name`: other
optimizers would take them for values. Every state has a count of steps, `step`. A weight of 24 or 32 bits has beside
its parameter of 16 the bits that this lacks, `param_low`, uint8 or int16 of its shape and strides (weights.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch

from optim8.codec import blocks
from optim8.rules import Moment, Moments

STEP = "step"
PARAM_LOW = "param_low"
LOW_DTYPES = {24: torch.uint8, 32: torch.int16}  # of PARAM_LOW, by the bits of the weight

Role = Literal["step", "values", "scales"]


@dataclass(frozen=True)
class Part:
    """One tensor of a state: its key, role and kind. `fill`: what stands for 0, or what a scalar starts as."""

    key: str
    role: Role
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    fill: float = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The state of one parameter.

    moments: the states of the rule.
    shape, stride: of the parameter's state, dense (dense_stride).
    bits: 8, 16 or 32.
    """

    moments: Moments
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    bits: int

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Its tensors, in the order in which a step asks for them."""
        parts = [Part(STEP, "step", torch.float32, (), ())]
        parts += [Part(scalar.name, "step", torch.float32, (), (), scalar.start) for scalar in self.moments.scalars]
        for moment in self.moments:
            if self.bits == 32:
                parts.append(Part(moment.name, "values", torch.float32, self.shape, self.stride))
            else:
                scales = (blocks(math.prod(self.shape)),)
                parts.append(Part(moment.codes, "values", torch.uint8, self.shape, self.stride, moment.zero))
                if moment.low in moment.keys_in(self.bits):
                    parts.append(Part(moment.low, "values", torch.uint8, self.shape, self.stride, moment.middle))
                parts.append(Part(moment.absmax, "scales", torch.float32, scales, (1,)))
        if self.moments.master_bits != 16:
            dtype = LOW_DTYPES[self.moments.master_bits]
            parts.append(Part(PARAM_LOW, "values", dtype, self.shape, self.stride))
        return tuple(parts)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(part.size * part.dtype.itemsize for part in self.parts)

    @property
    def keys(self) -> list[str]:
        return [part.key for part in self.parts]

    def lies_in(self, entry: Mapping[str, Any]) -> bool:
        """Whether the values of a state lie in memory as they do here."""
        return all(entry[part.key].stride() == part.stride for part in self.parts if part.role == "values")

    def fits(
        self, entry: Mapping[str, Any], param: torch.Tensor, reaches: Callable[[torch.Tensor, torch.Tensor], bool]
    ) -> bool:
        """Whether a state has these tensors, whatever their values.

        Args:
            param: whose state it is, or its local shard.
            reaches: (tensor, param) -> whether a tensor of values or scales lies where it may (Allocator).
        """
        own = set(self.keys)
        if entry.keys() - others(self.moments, entry).keys() != own:
            return False
        for part in self.parts:
            tensor = entry[part.key]
            if not torch.is_tensor(tensor) or (tensor.dtype, tuple(tensor.shape)) != (part.dtype, part.shape):
                return False
            if part.role == "values" and tensor.stride() != part.stride:
                return False
            if not (
                part.role == "step" or ((tensor.is_contiguous() or part.role == "values") and reaches(tensor, param))
            ):
                return False
        return True


@lru_cache(maxsize=4096)
def _layout(moments: Moments, shape: tuple[int, ...], stride: tuple[int, ...], bits: int) -> Layout:
    return Layout(moments, shape, stride, bits)


def layout_of(moments: Moments, param: torch.Tensor, bits: int) -> Layout:
    """The layout of the state of a parameter, or of the local shard of one, in 8, 16 or 32 bits; `moments` are those
    of one variant of a rule."""
    # A tracer's sizes may vary; its state is for those that it has now.
    return _layout(moments, tuple(map(int, param.shape)), tuple(map(int, dense_stride(param))), bits)


def bits_of(moments: Sequence[Moment], entry: Mapping[str, Any]) -> int:
    """The bits of a state: 32 without scales, 16 where low bytes are not only those of wide moments."""
    if isinstance(moments, Moments):
        moments = moments_of(moments, entry)  # one may be wide in some variants only
    in_codes = [moment for moment in moments if moment.absmax in entry]
    if not in_codes:
        return 32
    return 16 if any(moment.low in entry and not moment.wide for moment in in_codes) else 8


def moments_of(moments: Moments, entry: Mapping[str, Any]) -> Moments:
    """The moments that a state has, of the variant of the rule that has most of those that are there; and the bits of
    its weight."""
    moments = moments.beside(master_bits_of(entry))
    if not moments.variants:
        return moments
    complete = (m for m in moments.variants if all(not entry.keys().isdisjoint(moment.keys) for moment in m))
    return moments.only(next(complete, moments.variants[-1]))


def master_bits_of(entry: Mapping[str, Any]) -> int:
    """The bits of the weight that a state belongs to: 16, 24 or 32."""
    low = entry.get(PARAM_LOW)
    return 16 if low is None else next((bits for bits, dtype in LOW_DTYPES.items() if low.dtype == dtype), 16)


def moments_in(moments: Moments, entry: Mapping[str, Any]) -> Moments:
    """The same without roots where the state is of an earlier version, which kept none."""
    there = moments_of(moments, entry)
    return there.only([moment.direct if moment.direct.absmax in entry else moment for moment in there])


def count_keys(moments: Moments) -> tuple[str, ...]:
    """The keys of the numbers that a state has beside its moments."""
    return STEP, *(scalar.name for scalar in moments.scalars)


def keys_of(moments: Moments, bits: int) -> list[str]:
    """The keys of a state in 8, 16 or 32 bits."""
    low = [PARAM_LOW] if moments.master_bits != 16 else []
    return [*count_keys(moments), *(key for moment in moments for key in moment.keys_in(bits)), *low]


@lru_cache
def own_keys(moments: Moments) -> frozenset[str]:
    """All keys under which a state may have something of the optimizer."""
    return frozenset((*count_keys(moments), PARAM_LOW, *(key for moment in moments for key in moment.keys)))


def is_earlier(moments: Moments, entry: Mapping[str, Any]) -> bool:
    """Whether a state is of an earlier version, which kept no roots."""
    return any(moment.root and moment.direct.absmax in entry for moment in moments)


def others(moments: Moments, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept with a parameter's state and is not the optimizer's, such as the slow weights of Lookahead."""
    own = own_keys(moments)
    return {key: value for key, value in entry.items() if key not in own}


def under_present_names(moments: Sequence[Moment], entry: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state under the names of today: version 0.1.0 kept codes under `name`. Any other state comes back
    as it is."""
    direct = [moment.direct for moment in moments]
    if not any(moment.absmax in entry and moment.name in entry for moment in direct):
        return entry
    codes = {moment.name: moment.codes for moment in direct if moment.absmax in entry}
    return {codes.get(name, name): value for name, value in entry.items()}


def dense_stride(param: torch.Tensor) -> tuple[int, ...]:
    """The strides of a parameter's state: the parameter's own, or where it has gaps, as a slice has, those of
    torch.empty_like, which keep the order of the dimensions and leave no gaps."""
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


def dense_grad(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A copy of a gradient with the strides of a dense parameter."""
    copy = torch.empty_strided(tuple(param.shape), param.stride(), dtype=grad.dtype, device=grad.device)
    return copy.copy_(grad)
