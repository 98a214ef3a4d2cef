"""8-bit optimizers on blockwise dynamic quantization, and the functional API they stand on.

Example:
    >>> import torch, optim8
    >>> model = torch.nn.Linear(256, 256)
    >>> optimizer = optim8.AdamW8bit(model.parameters(), lr=1e-3)
    >>> model(torch.ones(1, 256)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.precision(model.weight), optimizer.precision(model.bias)
    ('8bit', '32bit')
"""

from importlib.metadata import PackageNotFoundError, version

from optim8 import convert, functional, memory, nn, optim, paging
from optim8.health import monitor
from optim8.optim import (
    Adam8bit,
    AdamW8bit,
    Lion8bit,
    PagedAdam8bit,
    PagedAdamW8bit,
    PagedLion8bit,
    PagedSGD8bit,
    SGD8bit,
    override,
)

try:
    __version__ = version("optim8")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "Adam8bit",
    "AdamW8bit",
    "Lion8bit",
    "PagedAdam8bit",
    "PagedAdamW8bit",
    "PagedLion8bit",
    "PagedSGD8bit",
    "SGD8bit",
    "convert",
    "functional",
    "memory",
    "monitor",
    "nn",
    "optim",
    "override",
    "paging",
]
