"""Addresses and devices of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch

from optim8.functional import _check


def get_ptr(A: torch.Tensor | None) -> ctypes.c_void_p | None:
    """The address of a tensor's first element; None for None.

    Raises:
        TypeError: A is neither a tensor nor None.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> x = torch.ones(3)
        >>> F.get_ptr(x).value == x.data_ptr(), F.get_ptr(None)
        (True, None)
    """
    if A is None:
        return None
    if not isinstance(A, torch.Tensor):
        raise TypeError(f"get_ptr: A must be a torch.Tensor or None, got {type(A).__name__}.")
    return ctypes.c_void_p(A.data_ptr())


def is_on_gpu(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether all tensors are on one CUDA device. None and paged tensors (`tensor.is_paged`) are left out.

    Returns:
        True.

    Raises:
        TypeError: an item is neither a tensor nor None.
        RuntimeError: one is elsewhere; the message names it.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> F.is_on_gpu([None])
        True
        >>> F.is_on_gpu([None, torch.ones(3)])
        Traceback (most recent call last):
        RuntimeError: is_on_gpu: all tensors must be on one CUDA device, got item 1 (float32 (3,)) on cpu. Move it.
    """
    first: torch.device | None = None
    for i, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"is_on_gpu: item {i} must be a torch.Tensor or None, got {type(tensor).__name__}.")
        if getattr(tensor, "is_paged", False):
            continue
        if tensor.device.type != "cuda" or (first is not None and tensor.device != first):
            others = "one CUDA device" if first is None else f"{first}, as those before"
            raise RuntimeError(
                f"is_on_gpu: all tensors must be on {others}, got item {i} "
                f"({_check.name_of(tensor.dtype)} {tuple(tensor.shape)}) on {tensor.device}. Move it."
            )
        first = tensor.device
    return True
