"""The optimizers: drop-in replacements for those of torch.optim, with state in 8 bits."""

from optim8.checkpoint import former_names
from optim8.optim import adamw as adamw
from optim8.optim import optimizer as optimizer
from optim8.optim.absent import ABSENT
from optim8.optim.adadelta import Adadelta8bit, PagedAdadelta8bit
from optim8.optim.adagrad import Adagrad, Adagrad8bit, Adagrad32bit, PagedAdagrad, PagedAdagrad8bit, PagedAdagrad32bit
from optim8.optim.adam import (
    Adam,
    Adam8bit,
    Adam32bit,
    AdamW,
    AdamW8bit,
    AdamW32bit,
    PagedAdam,
    PagedAdam8bit,
    PagedAdam32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
)
from optim8.optim.adamax import Adamax8bit, PagedAdamax8bit
from optim8.optim.ademamix import (
    AdEMAMix,
    AdEMAMix8bit,
    AdEMAMix32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
)
from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.lamb import LAMB, LAMB8bit, LAMB32bit, PagedLAMB, PagedLAMB8bit, PagedLAMB32bit
from optim8.optim.lars import LARS, LARS8bit, LARS32bit, PagedLARS, PagedLARS8bit, PagedLARS32bit
from optim8.optim.lion import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit
from optim8.optim.manager import GlobalOptimManager
from optim8.optim.muon import Muon8bit, PagedMuon8bit
from optim8.optim.muon_groups import muon_groups
from optim8.optim.nadam import NAdam8bit, PagedNAdam8bit
from optim8.optim.override import override
from optim8.optim.radam import PagedRAdam8bit, RAdam8bit
from optim8.optim.rmsprop import PagedRMSprop, PagedRMSprop8bit, PagedRMSprop32bit, RMSprop, RMSprop8bit, RMSprop32bit
from optim8.optim.sgd import SGD, PagedSGD, PagedSGD8bit, PagedSGD32bit, SGD8bit, SGD32bit

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
former_names.register({name: globals()[name] for name in __all__})
