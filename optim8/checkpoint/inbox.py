"""Tensors of a sharded state dict that take whatever torch.distributed.checkpoint.state_dict copies into them.

It loads a whole dict into the optimizer's own. With `broadcast_from_rank0=True` only rank 0 has the dict that is
loaded; to the others torch sends those tensors for which the optimizer's own state dict has the key, and copies the
part of each rank into the local tensor there. Moments in another precision must arrive too, and scales that are
not tiles. So a sharded state has every key that a dict may bring; where the optimizer has nothing, an empty tensor
keeps the key open.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from optim8.rules import Moments
from optim8.state.layout import keys_of


class Inbox(torch.Tensor):
    """A local tensor of a state dict. It keeps what torch copies into it and does not fit in `came`. Copied or
    saved, it is an ordinary tensor.

    came: what did not fit, or None.
    touched: whether anything was copied into it by its own method, as torch does where it loads a whole dict.
    home: id of the state that it was put into.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    came: torch.Tensor | None
    touched: bool
    home: int

    @classmethod
    def around(cls, tensor: torch.Tensor, home: int) -> Inbox:
        """An inbox with the memory and the version of `tensor`."""
        inbox = tensor.as_subclass(cls)
        inbox.came, inbox.touched, inbox.home = None, False, home
        return inbox

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Inbox:
        self.touched = True
        if source.shape == self.shape and source.is_floating_point() == self.is_floating_point():
            super().copy_(source, non_blocking)
        else:
            self.came = source.detach().clone()  # a part of a whole tensor, which goes
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return deepcopy(self.as_subclass(torch.Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def absent_keys(moments: Moments, bits: int) -> list[str]:
    """The keys under which a state in this precision has nothing."""
    there = keys_of(moments, bits)
    return [key for moment in moments for key in moment.keys if key not in there]


def nothing(param: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor under a key that is only kept open. It has one dimension more than the parameter, and size 0 in all
    of them, as no other tensor of a state has."""
    return torch.empty((0,) * (param.dim() + 1), dtype=torch.float32, device=device)


def is_nothing(value: Any, param: torch.Tensor) -> bool:
    """Whether a value of a saved state only keeps a key open."""
    if isinstance(value, torch.Tensor):
        return value.dim() == param.dim() + 1 and not any(value.shape)
    return isinstance(value, dict) and not value  # torch makes {} of keys that a flat dict lacks
