"""The names of bitsandbytes.optim, for code that was written for it: `import optim8 as bnb`.

`Adam`, `AdamW`, `Lion`, `SGD`, `RMSprop`, `Adagrad`, `AdEMAMix`, `LAMB` and `LARS` keep state in 32 bits unless
`optim_bits=8`; names that end in `32bit` always do. Names that begin with `Paged` keep state in a file
(optim8.paging). An argument means what it means in torch.optim: Adam's weight decay is an L2 penalty here.
docs/migrate.md lists what differs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

from optim8.optim.adagrad import Adagrad8bit, PagedAdagrad8bit
from optim8.optim.adam import Adam8bit, AdamW8bit, PagedAdam8bit, PagedAdamW8bit
from optim8.optim.ademamix import AdEMAMix8bit, PagedAdEMAMix8bit
from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.lamb import LAMB8bit, PagedLAMB8bit
from optim8.optim.lars import LARS8bit, PagedLARS8bit
from optim8.optim.lion import Lion8bit, PagedLion8bit
from optim8.optim.rmsprop import PagedRMSprop8bit, RMSprop8bit
from optim8.optim.sgd import PagedSGD8bit, SGD8bit

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


def _names(optimizer: type[T]) -> tuple[type[T], type[T]]:
    """The classes that bitsandbytes has beside `<Name>8bit`: `<Name>`, whose state is in 32 bits unless
    `optim_bits=8`, and `<Name>32bit`, whose state is always in 32 bits."""
    stem = optimizer.__name__.removesuffix("8bit")
    own = {"__module__": __name__, "__doc__": f"{stem}8bit with 32-bit state unless `optim_bits=8`."}
    always = {**own, "__doc__": f"{stem}8bit with 32-bit state."}
    return type(stem, (_In32Bits, optimizer), own), type(f"{stem}32bit", (_Always32Bits, optimizer), always)


Adam, Adam32bit = _names(Adam8bit)
AdamW, AdamW32bit = _names(AdamW8bit)
Lion, Lion32bit = _names(Lion8bit)
PagedAdam, PagedAdam32bit = _names(PagedAdam8bit)
PagedAdamW, PagedAdamW32bit = _names(PagedAdamW8bit)
PagedLion, PagedLion32bit = _names(PagedLion8bit)
SGD, SGD32bit = _names(SGD8bit)
PagedSGD, PagedSGD32bit = _names(PagedSGD8bit)
RMSprop, RMSprop32bit = _names(RMSprop8bit)
PagedRMSprop, PagedRMSprop32bit = _names(PagedRMSprop8bit)
Adagrad, Adagrad32bit = _names(Adagrad8bit)
PagedAdagrad, PagedAdagrad32bit = _names(PagedAdagrad8bit)
AdEMAMix, AdEMAMix32bit = _names(AdEMAMix8bit)
PagedAdEMAMix, PagedAdEMAMix32bit = _names(PagedAdEMAMix8bit)
LAMB, LAMB32bit = _names(LAMB8bit)
PagedLAMB, PagedLAMB32bit = _names(PagedLAMB8bit)
LARS, LARS32bit = _names(LARS8bit)
PagedLARS, PagedLARS32bit = _names(PagedLARS8bit)
