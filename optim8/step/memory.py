"""Where the state of one optimizer lives, and what a step does there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from optim8.state.allocation import DEVICE, HOST, Resident
from optim8.step import run
from optim8.step.norms import Reduce
from optim8.step.scaling import UNSCALED, Scaling

Groups = list[dict[str, Any]]


class Memory(Resident):
    """Memory beside the parameters. An allocator of state and a runner of steps over it; optim8.paging.store has
    another, which keeps state elsewhere, and what this one has nothing to do for."""

    is_paged = False
    pinned_spans: Sequence[tuple[int, int]] = ()  # addresses of host memory that CUDA kernels may use

    def run_step(self, table: Any, who: str, scaling: Scaling = UNSCALED, reduce: Reduce | None = None) -> None:
        """Step all rows of a native StepTable (step.run.run_step)."""
        run.run_step(table, who, scaling.scale, scaling.found_inf, reduce)

    @contextmanager
    def stepping(self, who: str) -> Iterator[None]:
        """Around the calls of run_step in one step of an optimizer that has something to step.

        Raises:
            RuntimeError: the state cannot be stepped.
        """
        yield

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's values lie in memory that this object gave."""
        return False

    def place_of(self, tensor: torch.Tensor) -> tuple[str, str]:
        """The tier of a state tensor, and in words where that is."""
        if tensor.is_cuda:
            return DEVICE, str(tensor.device)
        return HOST, "pinned memory" if torch.cuda.is_available() and tensor.is_pinned() else "memory"

    def watch(self, groups: Groups, state: dict[Any, Any]) -> None:
        """Take these for the optimizer's groups and states from now on."""

    def resume(self, groups: Groups, first: int) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Options for the groups from `first` on, and (parameter, state), as an earlier run left them."""
        return iter(())

    def check_reach(self, params: Iterable[torch.Tensor]) -> None:
        """Raise ValueError where this memory can hold no state that the devices of these parameters reach."""

    def check_before_step(self, groups: Groups) -> None:
        """Raise ValueError where the parameters are not those whose state this is."""

    def check_others(self, where: str, others: dict[Any, Any]) -> None:
        """Raise ValueError where this memory would lose what others keep with a parameter's state."""

    def prepare(self, groups: Groups, state: dict[Any, Any]) -> None:
        """Get ready for a step over this state."""

    def keep_only(self, entries: Iterable[dict[str, Any]]) -> None:
        """Let go of memory in which none of these states lies."""

    @contextmanager
    def rewriting(self, groups: Groups, state: dict[Any, Any]) -> Iterator[None]:
        """Around changes of state that are no step."""
        yield

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the filling of new state from a state dict."""
        yield

    def end_loading(self) -> None:
        """The state that `watch` named last is what was loaded."""

    def note_state_dict(self) -> None:
        """Remember that a state dict was taken."""

    def note_checkpoint(self, who: str, path: str | os.PathLike[str]) -> None:
        """Keep a copy of the state that a later run can return to.

        Raises:
            ValueError: nothing of this state outlives the optimizer.
        """
        raise ValueError(
            f"{who}: needs paged=Pager(directory=..., keep=True). Leave it out: without a kept directory there is "
            "nothing to be found after a crash."
        )

    def flush(self) -> None:
        """Write what is to outlive the optimizer to the disk."""

    def close(self) -> None:
        """Write what is to outlive the optimizer to the disk, and give it back."""

    def abandon(self) -> None:
        """Give back what was opened for an optimizer that could not be made; nothing is written."""
