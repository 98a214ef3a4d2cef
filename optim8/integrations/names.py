"""The optimizers of optim8.optim by name."""

from __future__ import annotations

from optim8 import optim


def optimizers() -> dict[str, type[optim.BlockwiseOptimizer]]:
    """Every optimizer by the name of its class, with those in 32 bits and paged ones."""
    named = {name: getattr(optim, name) for name in optim.__all__ if name != "BlockwiseOptimizer"}
    return {name: it for name, it in named.items() if isinstance(it, type) and issubclass(it, optim.BlockwiseOptimizer)}


def in_small_letters() -> dict[str, type[optim.BlockwiseOptimizer]]:
    """The same in small letters, without underscores: "pagedadamw8bit", "rmsprop"."""
    return {name.lower(): optimizer for name, optimizer in optimizers().items()}
