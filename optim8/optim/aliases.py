"""The names of bitsandbytes.optim, for code that was written for it: `import optim8 as bnb`.

`Adam`, `AdamW`, `Lion` keep state in 32 bits unless `optim_bits=8`; names that end in `32bit` always; names that begin
with `Paged` keep state in a file (optim8.paging). What an argument means is what it means in torch.optim: Adam's
weight decay is an L2 penalty here. docs/migrate.md lists what differs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from optim8.optim.adam import Adam8bit, AdamW8bit, PagedAdam8bit, PagedAdamW8bit
from optim8.optim.lion import Lion8bit, PagedLion8bit


class _In32Bits:
    """Before an optimizer among the bases: its default is optim_bits=32."""

    def __init_subclass__(cls) -> None:
        """The signature of the optimizer behind, with this default: programs that are configured by it read it."""
        super().__init_subclass__()
        behind = next((base for base in cls.__bases__ if not issubclass(base, _In32Bits)), None)
        if behind is not None:
            signature = inspect.signature(behind)
            in_32_bits = signature.parameters["optim_bits"].replace(default=32)
            changed = [{"optim_bits": in_32_bits}.get(p.name, p) for p in signature.parameters.values()]
            cls.__signature__ = signature.replace(parameters=changed)  # type: ignore[attr-defined]

    if not TYPE_CHECKING:  # which sees the arguments of the optimizer behind

        def __init__(self, params: Any, *args: Any, optim_bits: Any = 32, **kwargs: Any) -> None:
            super().__init__(params, *args, optim_bits=optim_bits, **kwargs)


class _Always32Bits(_In32Bits):
    """As _In32Bits; 8 is refused."""

    if not TYPE_CHECKING:

        def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(params, *args, **kwargs)
            bits, name = self.defaults["optim_bits"], type(self).__name__
            if bits != 32:
                raise ValueError(
                    f"{name}: optim_bits must be 32, got {bits!r}. Use {name.replace('32', '8')} for 8-bit state."
                )


class Adam(_In32Bits, Adam8bit):
    """Adam8bit with 32-bit state unless `optim_bits=8`."""


class Adam32bit(_Always32Bits, Adam8bit):
    """Adam8bit with 32-bit state."""


class AdamW(_In32Bits, AdamW8bit):
    """AdamW8bit with 32-bit state unless `optim_bits=8`."""


class AdamW32bit(_Always32Bits, AdamW8bit):
    """AdamW8bit with 32-bit state."""


class Lion(_In32Bits, Lion8bit):
    """Lion8bit with 32-bit state unless `optim_bits=8`."""


class Lion32bit(_Always32Bits, Lion8bit):
    """Lion8bit with 32-bit state."""


class PagedAdam(_In32Bits, PagedAdam8bit):
    """PagedAdam8bit with 32-bit state unless `optim_bits=8`."""


class PagedAdam32bit(_Always32Bits, PagedAdam8bit):
    """PagedAdam8bit with 32-bit state."""


class PagedAdamW(_In32Bits, PagedAdamW8bit):
    """PagedAdamW8bit with 32-bit state unless `optim_bits=8`."""


class PagedAdamW32bit(_Always32Bits, PagedAdamW8bit):
    """PagedAdamW8bit with 32-bit state."""


class PagedLion(_In32Bits, PagedLion8bit):
    """PagedLion8bit with 32-bit state unless `optim_bits=8`."""


class PagedLion32bit(_Always32Bits, PagedLion8bit):
    """PagedLion8bit with 32-bit state."""
