"""The optimizers: drop-in replacements for those of torch.optim, with state in 8 bits."""

from optim8.optim.adam import Adam8bit, AdamW8bit, PagedAdam8bit, PagedAdamW8bit
from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.lion import Lion8bit, PagedLion8bit
from optim8.optim.overrides import override

__all__ = [
    "Adam8bit",
    "AdamW8bit",
    "BlockwiseOptimizer",
    "Lion8bit",
    "PagedAdam8bit",
    "PagedAdamW8bit",
    "PagedLion8bit",
    "override",
]
