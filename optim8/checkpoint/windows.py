"""The tiles of sharded state that state dicts hold: copies that stay in step with the state.

torch.optim puts the state itself into a state dict: torch.distributed.checkpoint loads into it, and a dict that
outlives a step shows the newest state. Tiles are computed, so a window copies what others write into them to the state,
and what a step does to the state to the tiles. A dict that nobody holds any more costs nothing.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from optim8.rules import Moment
from optim8.state import tiles
from optim8.state.mapped import copy
from optim8.step import pending
from optim8.step.run import is_capturing


@dataclass(eq=False)
class Window:
    """One tensor of tiles, and the state of which it tells.

    where: names the state, for messages.
    shown: the tiles, in the memory of the tensor that was handed out.
    lead, size: how the tiles lie (tiles.tiling).
    """

    where: str
    moment: Moment
    codes: torch.Tensor
    low: torch.Tensor | None
    absmax: torch.Tensor
    shown: torch.Tensor
    lead: int
    size: int
    _then: torch.Tensor = field(init=False)  # the scales that were shown; versions of tensors miss writes to DTensors

    def __post_init__(self) -> None:
        self._then = self.absmax.clone()

    def sync(self) -> None:
        """Copy what was written into the tiles to the state; where nothing was, copy the present state to the tiles.

        Raises:
            ValueError: these are no tiles; the state is as it was.
        """
        if not torch.equal(self.shown, self._tiles()):
            codes, absmax, low = tiles.to_absmax(
                self.where, self.moment, self.codes, self.shown, self.codes.stride(), self.low
            )
            copy(self.codes, codes)
            if self.low is not None and low is not None:
                copy(self.low, low)
            copy(self.absmax, absmax)
            self.show()  # blocks that were put together have one scale now
        elif not torch.equal(self.absmax, self._then):
            self.show()

    def show(self) -> None:
        """Bring the state to the tiles."""
        self._then = self.absmax.clone()
        with torch.no_grad():
            self.shown.copy_(self._tiles())

    def _tiles(self) -> torch.Tensor:
        return tiles.from_absmax(tuple(self.codes.shape), self.codes.stride(), self._then, self.lead, self.size)


class Windows:
    """All windows of an optimizer. `turn` is held by the thread that steps or loads."""

    def __init__(self, turn: Any) -> None:
        self._turn = turn
        self._open: dict[int, tuple[weakref.ref[torch.Tensor], Window]] = {}

    def add(self, handed_out: torch.Tensor, window: Window) -> None:
        """Keep `window` for as long as someone holds `handed_out`, the tensor of its tiles."""
        reference = weakref.ref(handed_out, self._close)
        self._open[id(reference)] = reference, window

    def __bool__(self) -> bool:
        return bool(self._open)

    def sync(self) -> None:
        """Bring what was written into tiles to the state.

        Raises:
            ValueError: what was written into tiles is none; names the state.
        """
        if self._open and not is_capturing():
            pending.wait()
            for key, (reference, window) in list(self._open.items()):
                window.sync()
                if reference() is None:
                    self._open.pop(key, None)

    def show(self) -> None:
        """Bring the state to the tiles."""
        if self._open and not is_capturing():
            pending.wait()
            for _, window in list(self._open.values()):
                window.show()

    def _close(self, reference: weakref.ref[torch.Tensor]) -> None:
        """Nobody holds the tiles any more: copy what was written to the state now, so that whoever looks finds it. If
        that fails, the next step copies it, and reports what is wrong."""
        if sys.is_finalizing() or is_capturing() or not self._turn.acquire(blocking=False):
            return  # tensors cannot be made any more, or this thread may not
        try:
            pending.wait()
            self._open[id(reference)][1].sync()
            del self._open[id(reference)]
        except ValueError:
            pass
        finally:
            self._turn.release()
