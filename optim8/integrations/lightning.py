"""Lightning moves all state of an optimizer to the device of the parameters after a resume: a callback against that."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

from optim8.optim import BlockwiseOptimizer
from optim8.paging import Store

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_classes() -> tuple[Any, ...]:
    """The base class of the package that the program uses (of both, if it uses both), or else of one that is there."""
    installed = [name for name in _PACKAGES if importlib.util.find_spec(name.partition(".")[0]) is not None]
    used = [name for name in installed if name in sys.modules]
    return tuple(importlib.import_module(name).Callback for name in used or installed[:1])


class PagedStateCallback(*_callback_classes()):  # type: ignore[misc]
    """Keeps paged state where its Pager has it when a run is resumed: `Trainer(callbacks=[PagedStateCallback()])`.

    Without it, Lightning moves all state to the device of the parameters right after loading it, and it stays there.
    Strategies that load optimizers in a way of their own (FSDP, DeepSpeed) do not do that, and stay as they are.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        own = trainer.strategy.load_optimizer_state_dict
        if stage == "fit" and getattr(own, "__qualname__", "") == "Strategy.load_optimizer_state_dict":
            trainer.strategy.load_optimizer_state_dict = functools.partial(_load, trainer.strategy, own)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        vars(trainer.strategy).pop("load_optimizer_state_dict", None)


def _is_paged(optimizer: Any) -> bool:
    return isinstance(optimizer, BlockwiseOptimizer) and isinstance(optimizer.memory, Store)


def _load(strategy: Any, own: Any, checkpoint: Any) -> None:
    """Load paged optimizers as they are, and the others as Lightning does, which moves their state."""
    optimizers, states = strategy.optimizers, checkpoint["optimizer_states"]
    others = []
    for optimizer, state in zip(optimizers, states):
        if _is_paged(optimizer):
            optimizer.load_state_dict(state)
        else:
            others.append((optimizer, state))
    if others:
        strategy.optimizers = [optimizer for optimizer, _ in others]
        try:
            own({**checkpoint, "optimizer_states": [state for _, state in others]})
        finally:
            strategy.optimizers = optimizers
