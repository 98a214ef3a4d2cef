"""Bytes of state that other libraries' optimizers hold for a parameter. The tests compare them with the libraries, and
FlashOptim's, which need a GPU, with dicts as it writes them.

torch.optim.AdamW keeps two moments in the parameter's dtype, so of float32 in mixed precision with float32 parameters,
and of bfloat16 where the model is cast to it. bitsandbytes (0.50.2) keeps codes and a scale for each 256 values, of
tensors of 4096 values or more, and float32 for smaller ones; all tensors share its two tables. torchao (0.18.0) keeps
codes and scales where the number of values is a multiple of 256 as well, and the parameter's dtype elsewhere; every
8-bit tensor has a table. FlashOptim (0.1.4) keeps codes and a float16 scale for each 32 values, of tensors of any size,
and by default a byte that a 16-bit parameter lacks of its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_BLOCK = 256  # values of a scale, of both libraries
_LEAST = 4096  # values from which both keep 8-bit state
_TABLE = 256 * 4  # bytes of a table of codes
_FLASH_BLOCK = 32  # values of a scale, of FlashOptim
_COUNT = 4  # bytes of a count of steps, where it is a tensor
_FLASH_COUNT = 8  # the same, of FlashOptim

Bytes = dict[str, int]


def _torch(size: int, dtype: torch.dtype, moments: int) -> Bytes:
    return {f"{str(dtype).removeprefix('torch.')} state": moments * size * dtype.itemsize, "step counts": _COUNT}


def _bitsandbytes(size: int, dtype: torch.dtype, moments: int) -> Bytes:
    if size < _LEAST:
        return {"float32 state": moments * size * 4}
    return {"codes": moments * size, "absmax": moments * 4 * -(-size // _BLOCK)}


def _torchao(size: int, dtype: torch.dtype, moments: int) -> Bytes:
    if size < _LEAST or size % _BLOCK:
        return _torch(size, dtype, moments)
    scales = moments * 4 * (size // _BLOCK)
    return {"codes": moments * size, "absmax": scales, "tables": moments * _TABLE, "step counts": _COUNT}


def _flashoptim(size: int, dtype: torch.dtype, moments: int) -> Bytes:
    low = size if dtype.itemsize == 2 else 0
    count = _FLASH_COUNT if moments == 2 else 0  # its Lion counts no steps
    scales = moments * 2 * -(-size // _FLASH_BLOCK)
    return {"codes": moments * size, "absmax": scales, "low bits of weights": low, "step counts": count}


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library: its label, and the bytes of its state."""

    label: str
    moments: int
    of_parameter: Callable[[int, torch.dtype, int], Bytes]
    shared: int = 0  # bytes that all parameters share, as soon as one has codes

    def state(self, parameters: Sequence[tuple[int, torch.dtype]]) -> Bytes:
        """Bytes by kind for parameters of these sizes and dtypes."""
        total: Bytes = {}
        for size, dtype in parameters:
            for kind, count in self.of_parameter(size, dtype, self.moments).items():
                total[kind] = total.get(kind, 0) + count
        if self.shared and total.get("codes"):
            total["tables"] = self.shared
        return total


PEERS = {
    "torch-adamw": Peer("torch AdamW", 2, _torch),
    "bitsandbytes-adamw8bit": Peer("bitsandbytes AdamW8bit", 2, _bitsandbytes, 2 * _TABLE),
    "bitsandbytes-lion8bit": Peer("bitsandbytes Lion8bit", 1, _bitsandbytes, _TABLE),
    "torchao-adamw8bit": Peer("torchao AdamW8bit", 2, _torchao),
    "flashoptim-adamw": Peer("FlashOptim AdamW", 2, _flashoptim),
    "flashoptim-lion": Peer("FlashOptim Lion", 1, _flashoptim),
}
