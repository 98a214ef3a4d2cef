"""The optimizers: drop-in replacements for those of torch.optim, with state in 8 bits."""

from optim8.checkpoint import former_names
from optim8.optim import aliases
from optim8.optim.absent import ABSENT
from optim8.optim.adam import Adam8bit, AdamW8bit, PagedAdam8bit, PagedAdamW8bit
from optim8.optim.aliases import (
    SGD,
    Adam,
    Adam32bit,
    AdamW,
    AdamW32bit,
    Lion,
    Lion32bit,
    PagedAdam,
    PagedAdam32bit,
    PagedAdamW,
    PagedAdamW32bit,
    PagedLion,
    PagedLion32bit,
    PagedSGD,
    PagedSGD32bit,
    SGD32bit,
)
from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.lion import Lion8bit, PagedLion8bit
from optim8.optim.manager import GlobalOptimManager
from optim8.optim.override import override
from optim8.optim.sgd import PagedSGD8bit, SGD8bit

__all__ = [
    "SGD",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "BlockwiseOptimizer",
    "GlobalOptimManager",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "PagedSGD",
    "PagedSGD8bit",
    "PagedSGD32bit",
    "SGD8bit",
    "SGD32bit",
    "override",
]

# Code written for bitsandbytes may import these names along with others. __all__ lists only optimizers that exist.
globals().update({name: cls for name, cls in ABSENT.items() if name not in __all__})
former_names.register(vars(aliases))
