"""What an optimizer tells of its state, and does with it, beside torch.optim's contract."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from optim8.checkpoint.adopt import adopt_states
from optim8.optim import reset
from optim8.paging import Place, Placement, Store
from optim8.rules import Moment
from optim8.state.mapped import tensors_of
from optim8.state.states import States
from optim8.step import overrides, supply
from optim8.step.memory import Memory


class StateAccess(torch.optim.Optimizer):
    """An optimizer that answers for its state."""

    rule: ClassVar[str]
    state: States
    memory: Memory
    known_overrides: overrides.Resolved | None

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The states of the rule, in order."""
        raise NotImplementedError

    @property
    def turn(self) -> Any:
        """Held by the thread that steps or loads: native code may not see state or scratch change meanwhile."""
        raise NotImplementedError

    def precision(self, param: torch.Tensor) -> str:
        """How the state of `param` is kept, or will be once it has had a gradient: "8bit" or "32bit".

        Raises:
            ValueError: the optimizer does not have this parameter.
        """
        adopt_states(self)
        supply.resolve(self)
        for group in self.param_groups:
            if any(param is candidate for candidate in group["params"]):
                return f"{supply.bits_now(self, group, param)}bit"
        raise ValueError(f"{type(self).__name__}.precision: the tensor must be a parameter of this optimizer.")

    def overridden(self, param: torch.Tensor) -> dict[str, Any]:
        """The options that `param` has otherwise than its group (optim8.override)."""
        supply.resolve(self)
        return dict(supply.changes_of(self, param))

    def reset_state(self, params: torch.Tensor | Iterable[torch.Tensor] | None = None) -> None:
        """Forget what the state of parameters has learnt: their next step is a first one, bit for bit.

        Zeroing state by hand would not do: 8-bit state consists of codes, and code 0 is not the value 0. State stays
        where it lies (in a file, in a CUDA graph) unless it has another precision than new state would have. What
        others keep with a parameter's state stays as it is.

        Args:
            params: parameters of this optimizer, one or several; None: all.

        Raises:
            TypeError, ValueError: something else than parameters of this optimizer; nothing was reset.
        """
        reset.reset_state(self, params)

    def placement(self) -> Placement:
        """Where the state of each parameter is: in memory of its device, in memory of the host, or on the disk.

        Returns:
            One optim8.paging.Place for each parameter, in order; printed, a table, which also has the copy of the state
            at the checkpoint that was noted last, if there is one.
        """
        adopt_states(self)
        supply.resolve(self)
        places = []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names", [""] * len(group["params"]))
            for index, (param, name) in enumerate(zip(group["params"], names, strict=True)):
                tensors = tensors_of(self.state.get(param) or {})
                # An empty tensor has no address; the count of steps has.
                largest = max(tensors, key=lambda t: t.nbytes, default=None)
                tier, where = ("none", "") if largest is None else self.memory.place_of(largest)
                size = sum(tensor.nbytes for tensor in tensors)
                precision = f"{supply.bits_now(self, group, param)}bit"
                places.append(Place(number, index, name, tuple(param.shape), precision, tier, where, size))
        copy = self.memory.checkpoint_copy if isinstance(self.memory, Store) else ("", 0)
        return Placement(places, *copy)

    def flush(self) -> None:
        """Write state that is kept in a directory to the disk; waits for it.

        After it the directory is a checkpoint of this step, which may be copied, also when the power fails. Without
        it that holds once the optimizer is gone. Does nothing for other state.
        """
        self.memory.flush()

    def close(self) -> None:
        """Write state that is kept in a directory to the disk, and give the directory back, so that another optimizer
        can go on with it; this one cannot be stepped any more. The end of the optimizer does the same."""
        self.memory.close()

    def note_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Say that the parameters, and whatever else a run needs, were saved to `path` as they are now. All state is
        written to the disk, and copied there. A run that is killed later is resumed from here, with the same bits:
        with the parameters of `path` and Pager(..., resume=True). The copy is as large as the state and replaces that
        of the checkpoint before.

        Raises:
            ValueError: the optimizer keeps no directory.
            OSError: there is no room on the disk for the copy. The state is unharmed, and the checkpoint noted before
                is still there.
            RuntimeError: the state is half stepped because of an error, or the optimizer was closed.
        """
        with self.turn:
            self.memory.note_checkpoint(f"{type(self).__name__}.note_checkpoint", path)
