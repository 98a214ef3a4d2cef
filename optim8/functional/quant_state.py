"""QuantState: what is needed beside the codes to get values back, and its form in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from reprlib import recursive_repr
from typing import Any

import torch

from optim8.functional import _check

_PACKED_PREFIX = "quant_state.bitsandbytes__"  # the key of every published 4-bit checkpoint
_TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_NESTED = ("nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset")
_KEYS = ("quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape", *_NESTED)
_QUANT_TYPES = (None, "nf4", "fp4")
_DTYPES = {_check.name_of(dtype): dtype for dtype in _check.FLOATS}


class QuantState:
    """The state of one quantized tensor.

    Attributes:
        absmax: float32 [blocks], or its uint8 codes when nested.
        shape: of the values; None for 8-bit codes, which have the same shape.
        code: the table, float32 [256] or [16].
        blocksize: values to a block.
        quant_type: "nf4", "fp4" or None (8-bit).
        dtype: of the values, before quantization and after dequantization.
        offset: float32 scalar that was subtracted from absmax before its quantization; None when not nested.
        state2: the QuantState of absmax itself; None when not nested.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> packed, state = F.quantize_4bit(torch.ones(100), quant_type="nf4")
        >>> F.QuantState.from_dict(state.as_dict(packed=True), "cpu") == state
        True
    """

    __hash__ = None  # type: ignore[assignment]  # states compare by value and can change

    def __init__(
        self,
        absmax: torch.Tensor,
        shape: torch.Size | None = None,
        code: torch.Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.offset = offset
        self.state2 = state2

    @property
    def nested(self) -> bool:
        """Whether absmax is quantized itself."""
        return self.state2 is not None

    @recursive_repr()
    def __repr__(self) -> str:
        return (
            f"QuantState(quant_type={self.quant_type!r}, shape={self.shape}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}, nested={self.nested})"
        )

    def __getitem__(self, index: int) -> Any:
        """Item of `[absmax, shape, dtype, blocksize, None or [offset, state2], quant_type]`."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.dtype == other.dtype
            and self.blocksize == other.blocksize
            and self.quant_type == other.quant_type
            and _same(self.absmax, other.absmax)
            and _same(self.code, other.code)
            and _same(self.offset, other.offset)
            and self.state2 == other.state2
        )

    def to(self, device: torch.device | str) -> QuantState:
        """Move all tensors to `device`, in place, and return self."""
        self.absmax = self.absmax.to(device)
        if self.code is not None:
            self.code = self.code.to(device)
        if self.offset is not None:
            self.offset = self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)
        return self

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a dict.

        Args:
            packed: tensors only, for safetensors; all other entries are UTF-8 JSON in a uint8 tensor under
                `quant_state.bitsandbytes__nf4` or `quant_state.bitsandbytes__fp4`. 4-bit states only.

        Returns:
            keys quant_type, absmax, blocksize, quant_map, dtype, shape, and when nested nested_absmax,
            nested_blocksize, nested_quant_map, nested_dtype, nested_offset. The tensors are not copied.

        Raises:
            ValueError: packed, and this is no 4-bit state.
        """
        entries: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": None if self.dtype is None else _check.name_of(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            entries["nested_absmax"] = self.state2.absmax
            entries["nested_blocksize"] = self.state2.blocksize
            entries["nested_quant_map"] = self.state2.code
            entries["nested_dtype"] = None if self.state2.dtype is None else _check.name_of(self.state2.dtype)
            entries["nested_offset"] = None if self.offset is None else self.offset.item()
        if not packed:
            return entries
        if self.quant_type is None:
            raise ValueError(
                "QuantState.as_dict: packed=True is the form of 4-bit states, and quant_type is None here. "
                "Use packed=False."
            )
        tensors = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor)}
        text = json.dumps({key: value for key, value in entries.items() if key not in tensors})
        tensors[_PACKED_PREFIX + self.quant_type] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return tensors

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str) -> QuantState:
        """The state of a dict that `as_dict` made, on `device`.

        Args:
            qs_dict: either form of `as_dict`, with any prefix before each key (such as "model.weight."); entries that
                belong to no state are ignored. It is not changed.
            device: where the tensors go.

        Raises:
            TypeError: qs_dict is no dict, or an entry has the wrong type.
            ValueError: entries are missing, or contradict each other.
        """
        device = _check.device(_WHO, device)
        entries = _unpack(qs_dict)
        state2, offset = None, None
        if "nested_absmax" in entries:
            state2 = cls(
                absmax=_tensor(entries, "nested_absmax", device, torch.float32),
                code=_tensor(entries, "nested_quant_map", device, torch.float32, 256),
                blocksize=_blocksize(entries, "nested_blocksize", None),
                dtype=_dtype(entries, "nested_dtype"),
            )
            offset = torch.tensor(_number(entries, "nested_offset"), dtype=torch.float32, device=device)
        quant_type = _need(entries, "quant_type")
        if quant_type not in _QUANT_TYPES:
            raise ValueError(f"{_WHO}: quant_type must be 'nf4', 'fp4' or None, got {quant_type!r}.")
        return cls(
            absmax=_tensor(entries, "absmax", device, torch.float32 if state2 is None else torch.uint8),
            shape=_shape(entries, needed=quant_type is not None),
            code=_tensor(entries, "quant_map", device, torch.float32, 256 if quant_type is None else 16),
            blocksize=_blocksize(entries, "blocksize", quant_type),
            quant_type=quant_type,
            dtype=_dtype(entries, "dtype"),
            offset=offset,
            state2=state2,
        )


_WHO = "QuantState.from_dict"


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _unpack(qs_dict: Mapping[str, Any]) -> dict[str, Any]:
    """All entries of either form under their plain keys."""
    if not isinstance(qs_dict, Mapping):
        raise TypeError(f"{_WHO}: qs_dict must be a dict, got {type(qs_dict).__name__}.")
    packed = [key for key in qs_dict if isinstance(key, str) and _PACKED_PREFIX in key]
    if len(packed) > 1:
        raise ValueError(f"{_WHO}: qs_dict must hold one state, got the keys {sorted(packed)}. Pass one at a time.")
    found: dict[str, Any] = {}
    for key, value in qs_dict.items():
        # The longest known ending: "w.nested_absmax" is no absmax.
        plain = key.rsplit(".", 1)[-1] if isinstance(key, str) else ""
        if plain not in _KEYS or (packed and plain not in _TENSORS):
            continue
        if plain in found:
            raise ValueError(f"{_WHO}: qs_dict must hold one state, got {plain!r} twice. Pass one at a time.")
        found[plain] = value
    if packed:
        found.update(_parse(packed[0], qs_dict[packed[0]]))
    elif "quant_type" not in found:
        raise ValueError(
            f"{_WHO}: qs_dict must hold 'quant_type' or a key with {_PACKED_PREFIX + 'nf4'!r} or 'fp4', "
            f"got the keys {sorted(map(str, qs_dict))[:8]}."
        )
    return found


def _parse(key: str, value: Any) -> dict[str, Any]:
    """The entries that a packed state has as JSON bytes."""
    value = _check.tensor(_WHO, key, value, (torch.uint8,))
    try:
        parsed = json.loads(bytes(value.flatten().tolist()).decode())
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{_WHO}: {key} must be JSON as UTF-8 bytes, got something else ({error}).") from error
    quant_type = key[key.index(_PACKED_PREFIX) + len(_PACKED_PREFIX) :]
    if not isinstance(parsed, dict) or parsed.get("quant_type") != quant_type or quant_type not in ("nf4", "fp4"):
        raise ValueError(f"{_WHO}: {key} must hold a JSON object with quant_type 'nf4' or 'fp4' as in the key.")
    return {name: entry for name, entry in parsed.items() if name in _KEYS and name not in _TENSORS}


def _need(entries: Mapping[str, Any], key: str) -> Any:
    if key not in entries:
        raise ValueError(f"{_WHO}: qs_dict lacks {key!r}, got the keys {sorted(entries)}.")
    return entries[key]


def _tensor(
    entries: Mapping[str, Any], key: str, device: torch.device | str, dtype: torch.dtype, count: int | None = None
) -> torch.Tensor:
    value = _check.tensor(_WHO, key, _need(entries, key), (dtype,))
    if count is not None and value.numel() != count:
        raise ValueError(f"{_WHO}: {key} must have {count} entries, got {value.numel()}.")
    return value.to(device)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _blocksize(entries: Mapping[str, Any], key: str, quant_type: str | None) -> int:
    value = _need(entries, key)
    if quant_type is None:
        if not _is_int(value) or value < 1:
            raise ValueError(f"{_WHO}: {key} must be an int of at least 1, got {value!r}.")
    elif not _is_int(value) or value not in _check.BLOCKSIZES_4BIT:
        raise ValueError(f"{_WHO}: {key} must be one of {_check.BLOCKSIZES_4BIT}, got {value!r}.")
    return int(value)


def _number(entries: Mapping[str, Any], key: str) -> float:
    value = _need(entries, key)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{_WHO}: {key} must be a number, got {value!r}.")
    return float(value)


def _dtype(entries: Mapping[str, Any], key: str) -> torch.dtype:
    value = _need(entries, key)
    name = _check.name_of(value) if isinstance(value, torch.dtype) else value
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"{_WHO}: {key} must be one of {sorted(_DTYPES)}, got {value!r}.")
    return _DTYPES[name]


def _shape(entries: Mapping[str, Any], needed: bool) -> torch.Size | None:
    value = _need(entries, "shape")
    if value is None and not needed:
        return None
    if not isinstance(value, (list, tuple)) or not all(_is_int(extent) and 0 <= extent < 2**63 for extent in value):
        raise ValueError(f"{_WHO}: shape must be a list of extents, got {value!r}.")
    if prod(extent for extent in value if extent) >= 2**63:
        raise ValueError(f"{_WHO}: shape must be that of a tensor, got {value!r}.")
    return torch.Size(value)
