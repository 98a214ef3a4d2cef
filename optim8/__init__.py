"""8-bit optimizers on blockwise dynamic quantization, and the functional API they stand on.

Examples:
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
from optim8.convert import from_torch
from optim8.health import monitor
from optim8.master import load_master_state_dict, master_state_dict
from optim8.optim import (
    Adadelta8bit,
    Adagrad8bit,
    Adam8bit,
    Adamax8bit,
    AdamW8bit,
    AdEMAMix8bit,
    LAMB8bit,
    LARS8bit,
    Lion8bit,
    Muon8bit,
    NAdam8bit,
    PagedAdadelta8bit,
    PagedAdagrad8bit,
    PagedAdam8bit,
    PagedAdamax8bit,
    PagedAdamW8bit,
    PagedAdEMAMix8bit,
    PagedLAMB8bit,
    PagedLARS8bit,
    PagedLion8bit,
    PagedMuon8bit,
    PagedNAdam8bit,
    PagedRAdam8bit,
    PagedRMSprop8bit,
    PagedSGD8bit,
    RAdam8bit,
    RMSprop8bit,
    SGD8bit,
    muon_groups,
    override,
)

try:
    __version__ = version("optim8")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AdEMAMix8bit",
    "Adadelta8bit",
    "Adagrad8bit",
    "Adam8bit",
    "AdamW8bit",
    "Adamax8bit",
    "LAMB8bit",
    "LARS8bit",
    "Lion8bit",
    "Muon8bit",
    "NAdam8bit",
    "PagedAdEMAMix8bit",
    "PagedAdadelta8bit",
    "PagedAdagrad8bit",
    "PagedAdam8bit",
    "PagedAdamW8bit",
    "PagedAdamax8bit",
    "PagedLAMB8bit",
    "PagedLARS8bit",
    "PagedLion8bit",
    "PagedMuon8bit",
    "PagedNAdam8bit",
    "PagedRAdam8bit",
    "PagedRMSprop8bit",
    "PagedSGD8bit",
    "RAdam8bit",
    "RMSprop8bit",
    "SGD8bit",
    "convert",
    "from_torch",
    "functional",
    "load_master_state_dict",
    "master_state_dict",
    "memory",
    "monitor",
    "muon_groups",
    "nn",
    "optim",
    "override",
    "paging",
]
