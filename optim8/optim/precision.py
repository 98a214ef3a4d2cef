"""The names that bitsandbytes has beside each `<Name>8bit`, for code that was written for it: `import optim8 as bnb`.

`<Name>` keeps state in 32 bits unless `optim_bits=8`, `<Name>32bit` always does. An argument means what it means in
torch.optim: Adam's weight decay is an L2 penalty here. docs/migrate.md lists what differs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

from optim8.optim.base import BlockwiseOptimizer

T = TypeVar("T", bound=BlockwiseOptimizer)


class _In32Bits:
    """Stands before an optimizer among the bases of a class, and makes optim_bits=32 the default."""

    def __init_subclass__(cls) -> None:
        """Give the class the optimizer's signature with this default: programs read it to learn their options."""
        super().__init_subclass__()
        behind = next((base for base in cls.__bases__ if not issubclass(base, _In32Bits)), None)
        if behind is not None:
            signature = inspect.signature(behind)
            in_32_bits = signature.parameters["optim_bits"].replace(default=32)
            changed = [{"optim_bits": in_32_bits}.get(p.name, p) for p in signature.parameters.values()]
            cls.__signature__ = signature.replace(parameters=changed)  # type: ignore[attr-defined]

    if not TYPE_CHECKING:  # type checkers see the arguments of the optimizer behind

        def __init__(self, params: Any, *args: Any, optim_bits: Any = 32, **kwargs: Any) -> None:
            super().__init__(params, *args, optim_bits=optim_bits, **kwargs)


class _Always32Bits(_In32Bits):
    """Does what _In32Bits does, and refuses other `optim_bits`."""

    if not TYPE_CHECKING:

        def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(params, *args, **kwargs)
            bits, name = self.defaults["optim_bits"], type(self).__name__
            if bits != 32:
                raise ValueError(
                    f"{name}: optim_bits must be 32, got {bits!r}. Use {name.replace('32', '8')} for 8-bit state."
                )


def in_32_bits(optimizer: type[T]) -> tuple[type[T], type[T]]:
    """The classes that bitsandbytes has beside `<Name>8bit`: `<Name>`, whose state is in 32 bits unless
    `optim_bits=8`, and `<Name>32bit`, whose state is always in 32 bits."""
    stem = optimizer.__name__.removesuffix("8bit")
    own = {"__module__": optimizer.__module__, "__doc__": f"{stem}8bit with 32-bit state unless `optim_bits=8`."}
    always = {**own, "__doc__": f"{stem}8bit with 32-bit state."}
    return type(stem, (_In32Bits, optimizer), own), type(f"{stem}32bit", (_Always32Bits, optimizer), always)
