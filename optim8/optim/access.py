"""Methods beyond torch.optim's contract, by which an optimizer reports on its state, resets it and writes it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from optim8.checkpoint.adopt import adopt_states
from optim8.optim import reset
from optim8.paging import Place, Placement, Store
from optim8.rules import Moments
from optim8.state.mapped import tensors_of
from optim8.state.states import States
from optim8.step import overrides, supply
from optim8.step.memory import Memory


class StateAccess(torch.optim.Optimizer):
    """An optimizer whose user can inspect, reset and write its state."""

    rule: ClassVar[str]
    state: States
    memory: Memory
    known_overrides: overrides.Resolved | None

    @property
    def moments(self) -> Moments:
        """The states of the rule, in order, and of its variants."""
        raise NotImplementedError

    @property
    def turn(self) -> Any:
        """The lock of the thread that steps or loads: state and scratch must not change while native code uses them."""
        raise NotImplementedError

    def precision(self, param: torch.Tensor) -> str:
        """The precision of the state of `param`, now or once it has had a gradient: "8bit", "16bit" or "32bit".

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
        """The options that overrides give `param` in place of its group's (optim8.override)."""
        supply.resolve(self)
        return dict(supply.changes_of(self, param))

    def reset_state(self, params: torch.Tensor | Iterable[torch.Tensor] | None = None) -> None:
        """Reset the state of parameters, so that their next step equals a first step, bit for bit.

        Do not write zeros into 8-bit state by hand: it consists of codes, and code 0 is not the value 0. State keeps
        its memory (in a file, in a CUDA graph) unless new state would have another precision. What others keep with a
        parameter's state stays as it is.

        Args:
            params: parameters of this optimizer, one or several; None: all.

        Raises:
            TypeError: `params` holds something other than tensors; nothing was reset.
            ValueError: a tensor is no parameter of this optimizer; nothing was reset.
        """
        reset.reset_state(self, params)

    def placement(self) -> Placement:
        """Where the state of each parameter is: in memory of its device, in memory of the host, or on the disk.

        Returns:
            One optim8.paging.Place for each parameter, in order. Printed, they are a table. It also shows the copy of
            the state at the checkpoint that was noted last, if there is one.
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
        """Write state that is kept in a directory to the disk, and wait until it is there.

        The directory is then a checkpoint of this step: you may copy it, and it survives a power failure. Without
        this call it becomes one when the optimizer is gone. Does nothing for other state.
        """
        self.memory.flush()

    def close(self) -> None:
        """Write state that is kept in a directory to the disk, and give the directory back, so that another optimizer
        can go on with it. This one cannot be stepped any more. The same happens when the optimizer is freed."""
        self.memory.close()

    def note_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Say that the parameters, and whatever else a run needs, were saved to `path` as they are now. The optimizer
        writes all state to the disk, and copies it there. If the run is killed later, another resumes from here, with
        the same bits: it loads the parameters of `path` and uses Pager(..., resume=True). The copy is as large as the
        state and replaces that of the checkpoint before.

        Raises:
            ValueError: the optimizer keeps no directory.
            OSError: there is no room on the disk for the copy. The state is unharmed, and the checkpoint noted before
                is still there.
            RuntimeError: the state is half stepped because of an error, or the optimizer was closed.
        """
        with self.turn:
            self.memory.note_checkpoint(f"{type(self).__name__}.note_checkpoint", path)
