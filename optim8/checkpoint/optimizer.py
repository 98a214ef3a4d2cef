"""What is asked of an optimizer to save, load and copy it."""

from __future__ import annotations

from typing import Any, Protocol

from optim8.checkpoint.windows import Windows
from optim8.step.supply import Stateful


class Checkpointed(Stateful, Protocol):
    """An optimizer whose state can be saved.

    state_checked: whether all state was made or looked at here.
    turn: held by the thread that steps or loads.
    """

    state_checked: bool

    @property
    def turn(self) -> Any: ...

    @property
    def windows(self) -> Windows: ...
