"""Packed 4-bit codes: the order of their bytes, and checks of packed tensors and their states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optim8.functional import _check
from optim8.functional.blockwise import need_state

QUANT_TYPES = ("nf4", "fp4")
STORAGES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def packed_shape(size: int, storage: torch.dtype) -> tuple[int, int]:
    """The shape of `size` packed values, stored as this dtype."""
    return _check.blocks(byte_count(size), storage.itemsize), 1


def byte_count(size: int) -> int:
    """Bytes of `size` codes."""
    return (size + 1) // 2


def as_bytes(contiguous: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as bytes. A single value may have any stride, which `view` refuses."""
    return contiguous.as_strided((contiguous.numel(),), (1,)).view(torch.uint8)


def stored_bytes(packed: torch.Tensor, size: int) -> torch.Tensor:
    """The bytes that hold `size` values."""
    return as_bytes(_check.plain(packed))[: byte_count(size)]


def check_type(who: str, quant_type: object) -> None:
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"{who}: quant_type must be 'nf4' or 'fp4', got {quant_type!r}.")


def check_packed(who: str, name: str, packed: torch.Tensor, size: int) -> None:
    items = packed_shape(size, packed.dtype)[0]
    if packed.numel() != items:
        raise ValueError(
            f"{who}: {name} must have {items} entries of {_check.name_of(packed.dtype)} ({size} values, 2 to a byte), "
            f"got {packed.numel()}. Pass the packed tensor that belongs to the state."
        )


def read_state(who: str, name: str, state: object) -> tuple[torch.Size, torch.dtype, int, str]:
    """Shape, dtype, block size and type of a 4-bit state, after a check that they fit together."""
    checked, dtype = need_state(who, name, state)
    shape, blocksize, quant_type = checked.shape, checked.blocksize, checked.quant_type
    if quant_type not in QUANT_TYPES or blocksize is None:
        raise ValueError(
            f"{who}: {name} must have quant_type 'nf4' or 'fp4' and a blocksize, got {quant_type!r} and {blocksize!r}. "
            "8-bit codes go to dequantize_blockwise."
        )
    _check.blocksize_4bit(who, blocksize)
    if not isinstance(shape, tuple) or not all(map(_check.is_extent, shape)):
        raise ValueError(f"{who}: {name}.shape must be the torch.Size of the values, got {shape!r}.")
    return torch.Size(shape), dtype, blocksize, str(quant_type)


def check_matrix(who: str, name: str, shape: Sequence[int]) -> None:
    if len(shape) != 2:
        raise ValueError(f"{who}: {name} must be (N, K), got {tuple(shape)}. Quantize a matrix.")
