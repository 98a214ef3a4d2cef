"""The optimizers that can be compared, each with its settings."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from shared.subjects import PEERS, peer
from torch import nn

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """How to make an optimizer from parameter groups, its largest learning rate and its weight decay.

    `make` takes groups, learning rate and the number of values from which a tensor has 8-bit state.
    """

    label: str
    make: Callable[[Groups, float, int], torch.optim.Optimizer]
    lr: float
    weight_decay: float


# torch has no fused form of these, or (Adagrad, on CPU in 2.13) a wrong one.
NOT_FUSED = {"Adadelta", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop"}


def _torch(name: str, **options: Any) -> Callable[[Groups, float, int], torch.optim.Optimizer]:
    form = {"foreach": True} if name in NOT_FUSED else {"fused": True}

    def make(groups: Groups, lr: float, _: int) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(groups, lr=lr, **{**form, **options})
        return optimizer

    return make


def _optim8(name: str, **options: Any) -> Callable[[Groups, float, int], torch.optim.Optimizer]:
    def make(groups: Groups, lr: float, min_8bit_size: int) -> torch.optim.Optimizer:
        import optim8  # here, so that the 32-bit runs need no compiled module

        optimizer: torch.optim.Optimizer = getattr(optim8, name)(groups, lr=lr, min_8bit_size=min_8bit_size, **options)
        return optimizer

    return make


def _bitsandbytes(groups: Groups, lr: float, min_8bit_size: int) -> torch.optim.Optimizer:
    return peer("bitsandbytes")(groups, lr=lr, min_8bit_size=min_8bit_size)


# torch's optimizers run in their fastest form. The 8-bit ones get the settings of their 32-bit counterparts. Lion's
# learning rate is several times smaller and its decay as many times larger, as its authors advise (arXiv 2302.06675).
RECIPES = {
    "adamw": Recipe("torch AdamW", _torch("AdamW"), 1e-3, 0.1),
    "adam": Recipe("torch Adam", _torch("Adam"), 1e-3, 0.0),
    "adamw8bit": Recipe("optim8 AdamW8bit", _optim8("AdamW8bit"), 1e-3, 0.1),
    "adamw8bit-nearest": Recipe("optim8 AdamW8bit nearest", _optim8("AdamW8bit", rounding="nearest"), 1e-3, 0.1),
    "bitsandbytes-adamw8bit": Recipe("bitsandbytes AdamW8bit", _bitsandbytes, 1e-3, 0.1),
    "adam8bit": Recipe("optim8 Adam8bit", _optim8("Adam8bit"), 1e-3, 0.0),
    "lion": Recipe("optim8 Lion 32-bit", _optim8("Lion8bit", optim_bits=32), 3e-4, 0.3),
    "lion8bit": Recipe("optim8 Lion8bit", _optim8("Lion8bit"), 3e-4, 0.3),
    "sgd": Recipe("torch SGD", _torch("SGD", momentum=0.9), 0.1, 1e-4),
    "sgd8bit": Recipe("optim8 SGD8bit", _optim8("SGD8bit", momentum=0.9), 0.1, 1e-4),
    "rmsprop": Recipe("torch RMSprop", _torch("RMSprop", alpha=0.95), 1e-3, 0.0),
    "rmsprop8bit": Recipe("optim8 RMSprop8bit", _optim8("RMSprop8bit", alpha=0.95), 1e-3, 0.0),
    "adagrad": Recipe("torch Adagrad", _torch("Adagrad"), 1e-2, 0.0),
    "adagrad8bit": Recipe("optim8 Adagrad8bit", _optim8("Adagrad8bit"), 1e-2, 0.0),
    "adadelta": Recipe("torch Adadelta", _torch("Adadelta", rho=0.95), 1.0, 0.0),
    "adadelta8bit": Recipe("optim8 Adadelta8bit", _optim8("Adadelta8bit", rho=0.95), 1.0, 0.0),
    "adamax": Recipe("torch Adamax", _torch("Adamax"), 2e-3, 0.0),
    "adamax8bit": Recipe("optim8 Adamax8bit", _optim8("Adamax8bit"), 2e-3, 0.0),
    "nadam": Recipe("torch NAdam", _torch("NAdam", decoupled_weight_decay=True), 1e-3, 0.1),
    "nadam8bit": Recipe("optim8 NAdam8bit", _optim8("NAdam8bit", decoupled_weight_decay=True), 1e-3, 0.1),
    "radam": Recipe("torch RAdam", _torch("RAdam", decoupled_weight_decay=True), 1e-3, 0.1),
    "radam8bit": Recipe("optim8 RAdam8bit", _optim8("RAdam8bit", decoupled_weight_decay=True), 1e-3, 0.1),
    "ademamix": Recipe("optim8 AdEMAMix 32-bit", _optim8("AdEMAMix8bit", optim_bits=32), 1e-3, 0.1),
    "ademamix8bit": Recipe("optim8 AdEMAMix8bit", _optim8("AdEMAMix8bit"), 1e-3, 0.1),
    "lamb": Recipe("optim8 LAMB 32-bit", _optim8("LAMB8bit", optim_bits=32), 1e-2, 0.1),
    "lamb8bit": Recipe("optim8 LAMB8bit", _optim8("LAMB8bit"), 1e-2, 0.1),
    "lars": Recipe("optim8 LARS 32-bit", _optim8("LARS8bit", optim_bits=32, trust_coefficient=0.01), 1.0, 1e-4),
    "lars8bit": Recipe("optim8 LARS8bit", _optim8("LARS8bit", trust_coefficient=0.01), 1.0, 1e-4),
}

# The same update with 32-bit state, against which an 8-bit optimizer is checked.
COUNTERPART = {
    "adamw8bit": "adamw",
    "adamw8bit-nearest": "adamw",
    "bitsandbytes-adamw8bit": "adamw",
    "adam8bit": "adam",
    "lion8bit": "lion",
    "sgd8bit": "sgd",
    "rmsprop8bit": "rmsprop",
    "adagrad8bit": "adagrad",
    "adadelta8bit": "adadelta",
    "adamax8bit": "adamax",
    "nadam8bit": "nadam",
    "radam8bit": "radam",
    "ademamix8bit": "ademamix",
    "lamb8bit": "lamb",
    "lars8bit": "lars",
}

MIN_8BIT_SIZE = 4096  # optim8's default, and bitsandbytes'


def missing_library(name: str) -> str | None:
    """The library that the optimizer `name` needs and that is not installed, None where it can run."""
    library = name.partition("-")[0]
    return library if library in PEERS and importlib.util.find_spec(library) is None else None


def make_optimizer(
    name: str, model: nn.Module, rate: float = 1.0, min_8bit_size: int = MIN_8BIT_SIZE
) -> torch.optim.Optimizer:
    """The optimizer `name` (a key of RECIPES) for `model`: matrices decay, vectors (the norms' gains) do not.

    `rate` multiplies the recipe's learning rate.
    """
    recipe = RECIPES[name]
    parameters = list(model.parameters())
    groups: Groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return recipe.make(groups, rate * recipe.lr, min_8bit_size)
