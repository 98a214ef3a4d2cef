"""Lightning moves all state of an optimizer to the device of the parameters after a resume: a callback against that."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from optim8.optim import BlockwiseOptimizer
from optim8.paging import Store

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_class() -> Any:
    """The base class of the package that the program uses, or else of one that is installed."""
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ModuleNotFoundError(
        f"optim8.integrations.lightning: needs one of {', '.join(_PACKAGES)}, and none is installed. Install lightning."
    )


class PagedStateCallback(_callback_class()):  # type: ignore[misc]
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
