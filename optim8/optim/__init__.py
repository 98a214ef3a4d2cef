"""The optimizers: drop-in replacements for those of torch.optim, with state in 8 bits."""

from optim8.checkpoint import former_names
from optim8.optim import aliases
from optim8.optim.absent import ABSENT
from optim8.optim.adadelta import Adadelta8bit, PagedAdadelta8bit
from optim8.optim.adagrad import Adagrad8bit, PagedAdagrad8bit
from optim8.optim.adam import Adam8bit, AdamW8bit, PagedAdam8bit, PagedAdamW8bit
from optim8.optim.adamax import Adamax8bit, PagedAdamax8bit
from optim8.optim.ademamix import AdEMAMix8bit, PagedAdEMAMix8bit
from optim8.optim.aliases import (
    LAMB,
    LARS,
    SGD,
    Adagrad,
    Adagrad32bit,
    Adam,
    Adam32bit,
    AdamW,
    AdamW32bit,
    AdEMAMix,
    AdEMAMix32bit,
    LAMB32bit,
    LARS32bit,
    Lion,
    Lion32bit,
    PagedAdagrad,
    PagedAdagrad32bit,
    PagedAdam,
    PagedAdam32bit,
    PagedAdamW,
    PagedAdamW32bit,
    PagedAdEMAMix,
    PagedAdEMAMix32bit,
    PagedLAMB,
    PagedLAMB32bit,
    PagedLARS,
    PagedLARS32bit,
    PagedLion,
    PagedLion32bit,
    PagedRMSprop,
    PagedRMSprop32bit,
    PagedSGD,
    PagedSGD32bit,
    RMSprop,
    RMSprop32bit,
    SGD32bit,
)
from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.lamb import LAMB8bit, PagedLAMB8bit
from optim8.optim.lars import LARS8bit, PagedLARS8bit
from optim8.optim.lion import Lion8bit, PagedLion8bit
from optim8.optim.manager import GlobalOptimManager
from optim8.optim.muon import Muon8bit, PagedMuon8bit
from optim8.optim.muon_groups import muon_groups
from optim8.optim.nadam import NAdam8bit, PagedNAdam8bit
from optim8.optim.override import override
from optim8.optim.radam import PagedRAdam8bit, RAdam8bit
from optim8.optim.rmsprop import PagedRMSprop8bit, RMSprop8bit
from optim8.optim.sgd import PagedSGD8bit, SGD8bit

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adadelta8bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "Adamax8bit",
    "BlockwiseOptimizer",
    "GlobalOptimManager",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "Muon8bit",
    "NAdam8bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdadelta8bit",
    "PagedAdagrad",
    "PagedAdagrad8bit",
    "PagedAdagrad32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedAdamax8bit",
    "PagedLAMB",
    "PagedLAMB8bit",
    "PagedLAMB32bit",
    "PagedLARS",
    "PagedLARS8bit",
    "PagedLARS32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "PagedMuon8bit",
    "PagedNAdam8bit",
    "PagedRAdam8bit",
    "PagedRMSprop",
    "PagedRMSprop8bit",
    "PagedRMSprop32bit",
    "PagedSGD",
    "PagedSGD8bit",
    "PagedSGD32bit",
    "RAdam8bit",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
    "muon_groups",
    "override",
]

# Code written for bitsandbytes may import these names along with others. __all__ lists only optimizers that exist.
globals().update({name: cls for name, cls in ABSENT.items() if name not in __all__})
former_names.register(vars(aliases))
