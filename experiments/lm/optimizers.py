"""The optimizers that can be compared, each with its settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """How to make an optimizer from parameter groups, its largest learning rate and its weight decay."""

    label: str
    make: Callable[[Groups, float], torch.optim.Optimizer]
    lr: float
    weight_decay: float


def _optim8(name: str, **options: Any) -> Callable[[Groups, float], torch.optim.Optimizer]:
    def make(groups: Groups, lr: float) -> torch.optim.Optimizer:
        import optim8  # here, so that the 32-bit runs need no compiled module

        optimizer: torch.optim.Optimizer = getattr(optim8, name)(groups, lr=lr, **options)
        return optimizer

    return make


# torch's optimizers run fused, their fastest form. The 8-bit ones get the settings of their 32-bit counterparts. Lion's
# learning rate is several times smaller and its decay as many times larger, as its authors advise (arXiv 2302.06675).
RECIPES = {
    "adamw": Recipe("torch AdamW", lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True), 1e-3, 0.1),
    "adam": Recipe("torch Adam", lambda groups, lr: torch.optim.Adam(groups, lr=lr, fused=True), 1e-3, 0.0),
    "adamw8bit": Recipe("optim8 AdamW8bit", _optim8("AdamW8bit"), 1e-3, 0.1),
    "adam8bit": Recipe("optim8 Adam8bit", _optim8("Adam8bit"), 1e-3, 0.0),
    "lion": Recipe("optim8 Lion 32-bit", _optim8("Lion8bit", optim_bits=32), 3e-4, 0.3),
    "lion8bit": Recipe("optim8 Lion8bit", _optim8("Lion8bit"), 3e-4, 0.3),
    "sgd": Recipe("torch SGD", lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True), 0.1, 1e-4),
    "sgd8bit": Recipe("optim8 SGD8bit", _optim8("SGD8bit", momentum=0.9), 0.1, 1e-4),
}

# The same update with 32-bit state, against which an 8-bit optimizer is checked.
COUNTERPART = {"adamw8bit": "adamw", "adam8bit": "adam", "lion8bit": "lion", "sgd8bit": "sgd"}


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer `name` (a key of RECIPES) for `model`: matrices decay, vectors (the norms' gains) do not."""
    recipe = RECIPES[name]
    parameters = list(model.parameters())
    groups: Groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return recipe.make(groups, recipe.lr)
