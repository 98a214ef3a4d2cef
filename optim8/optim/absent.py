"""Names of bitsandbytes.optim that have no optimizer here yet. Code can import them; an error says what to use when it
makes one."""

from __future__ import annotations

from typing import Any

import torch

# For each: the stem of the names, their prefixes and suffixes, and what to use instead.
_ABSENT: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    ("LARS", ("Pytorch",), ("",), "optim8.LARS8bit with optim_bits=32"),
)


class AbsentOptimizer(torch.optim.Optimizer):
    """Stands for an optimizer that optim8 does not have. Making one raises NotImplementedError."""

    instead: str

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__}: optim8 has no such optimizer yet. Use {self.instead}.")


ABSENT: dict[str, type[AbsentOptimizer]] = {
    name: type(name, (AbsentOptimizer,), {"instead": instead, "__doc__": f"Not here yet; use {instead}."})
    for stem, starts, ends, instead in _ABSENT
    for name in (f"{start}{stem}{end}" for start in starts for end in ends)
}
