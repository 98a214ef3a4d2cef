"""What bitsandbytes.optim.optimizer has: the manager, and base classes of others' optimizers, which are not here.

A subclass of bitsandbytes' bases brings `init_state` and `update_step`, which its step calls for one parameter after
another. A step here is one native call over all tensors, so nothing would call them.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from optim8.optim.manager import GlobalOptimManager

__all__ = ["GlobalOptimManager", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]

_HOOKS = ("init_state", "update_step")
_NEED_IT = "galore_torch, q_galore_torch, apollo_torch, ms_swift, unsloth and axolotl"


def refuse_hooks(cls: type) -> None:
    """Raise TypeError for a subclass of an optimizer that would be stepped without its own `init_state` or
    `update_step`."""
    for name in _HOOKS:
        if hasattr(cls, name):
            raise TypeError(
                f"{cls.__name__}: a subclass of an optimizer of optim8 must not define {name}, which only "
                "bitsandbytes' step calls: it would be stepped without. Override step(), or subclass bitsandbytes' "
                "own optimizer."
            )


class Optimizer8bit(torch.optim.Optimizer):
    """Stands for the base of bitsandbytes' optimizers, so that code can import it and ask isinstance.

    Raises:
        NotImplementedError: it is subclassed or made.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ != __name__:
            _refuse(cls.__name__, next(base.__name__ for base in cls.__mro__ if base.__module__ == __name__))

    def __init__(self, *_: Any, **__: Any) -> None:
        _refuse(type(self).__name__, type(self).__name__)


class Optimizer1State(Optimizer8bit):
    """As Optimizer8bit."""


class Optimizer2State(Optimizer8bit):
    """As Optimizer8bit."""


def _refuse(who: str, base: str) -> NoReturn:
    raise NotImplementedError(
        f"{who}: optim8 has no {base} to build on, which {_NEED_IT} use: its methods are called by bitsandbytes' step "
        "only. For these packages install bitsandbytes and leave it its name; or train with optim8.AdamW8bit without "
        "them."
    )
