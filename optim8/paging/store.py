"""The paged memory of one optimizer: which tier state goes to, and a step that streams it."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from optim8 import _native
from optim8.paging import files, launches
from optim8.paging.directory.journal import LOADING, RESETTING, STEPPING
from optim8.paging.directory.state import Groups, StateDirectory
from optim8.paging.files import Arena, Segment
from optim8.paging.pager import Pager
from optim8.paging.streaming import DIRECT, Stream
from optim8.paging.tiers import DEVICE, DISK, HOST, plan


class Store:
    """Made by an optimizer from its Pager; `params`: the local values of its parameters, for a kept directory.

    Raises:
        OSError: the directory is not there or cannot be written to.
    """

    def __init__(self, owner: str, rule: str, pager: Pager, params: Sequence[torch.Tensor] = ()) -> None:
        self.owner, self.rule, self.pager = owner, rule, pager
        self.directory = Path(pager.directory or tempfile.gettempdir()).absolute()
        self.segments: list[Segment] = []
        self.kept: StateDirectory | None = None
        self.groups: Groups = []  # of the optimizer
        self.state: dict[Any, Any] = {}  # of the optimizer
        self.local: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach  # the part of a parameter that is here
        if pager.keep:
            self.kept = StateDirectory(owner, rule, pager, params)
            self.segments += self.kept.reopened(self.limited)
        else:
            files.check_directory(self.directory)
        self._process = os.getpid()
        self._stream = Stream(owner, pager)
        weakref.finalize(self, launches.settle)  # before its memory goes

    @property
    def limited(self) -> bool:
        """Whether there is a limit on the pages of files that are in memory."""
        return self.pager.host_bytes is not None

    def assign(self, sizes: Sequence[int], device: torch.device) -> tuple[str, ...]:
        """The tier of each new state of `sizes` bytes of parameters on `device`: the first that has room for it.

        Raises:
            ValueError: that is the disk, which a GPU cannot reach.
        """
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        planned = plan(
            self.pager,
            sizes,
            device.type,
            device_free=free,
            device_taken=sum(t.nbytes for t in self._tensors() if t.device == device),
            host_taken=self._bytes_in(HOST),
            owner=self.owner,
        )
        return planned.tiers

    def check_reach(self, params: Iterable[torch.Tensor]) -> None:
        """Raise ValueError where state of these parameters can only be out of their reach."""
        for param in params:
            if self.kept is not None and param.device.type == "cuda":
                raise ValueError(
                    f"{self.owner}: a kept directory holds state of parameters on the CPU, got one on {param.device}: "
                    "a GPU cannot use a mapped file. Pass a Pager without keep, and save state dicts."
                )

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for entry in self.state.values() for tensor in files.tensors_of(entry)]

    def _bytes_in(self, tier: str) -> int:
        return sum(segment.memory.numel() for segment in self.segments if segment.tier == tier)

    @property
    def pinned_spans(self) -> list[tuple[int, int]]:
        """The addresses of this store's memory that CUDA kernels may use."""
        return [segment.span for segment in self.segments if segment.pinned]

    def allocate(self, tier: str, device: torch.device, arenas: Sequence[Arena]) -> None:
        """Memory of a tier other than the device for all arenas, filled.

        Raises:
            OSError: the disk is full, or the file cannot be made.
        """
        if tier == HOST:
            self._stream.free_memory()  # there is less room for it now
            segment = files.in_memory(arenas, pinned=device.type == "cuda")
        else:
            segment = (
                files.in_file(arenas, self.directory, self.limited)
                if self.kept is None
                else self.kept.segment(arenas, self.limited)
            )
        self.segments.append(segment)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's values lie in memory of this store."""
        return any(segment.holds(tensor) for segment in self.segments)

    def keep_only(self, entries: Iterable[dict[str, Any]]) -> None:
        """Let go of the segments in which none of these states lies."""
        tensors = [tensor for entry in entries for tensor in files.tensors_of(entry)]
        launches.settle()
        self.segments = [segment for segment in self.segments if any(map(segment.holds, tensors))]
        if self.kept is not None:
            self.kept.stale = True

    def run_step(
        self, table: Any, who: str, grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
    ) -> None:
        """What _native.run_step does, with the same bits, streaming what is paged.

        Raises:
            RuntimeError: this process is a fork of the one that owns the state, or an earlier step was ended by an
                error of the disk.
            OSError: the disk failed in the middle of the step.
        """
        self._check_process(who)
        launch = _native.steps_elsewhere(table, who, grad_scale, found_inf)
        _native.mark_stepped(table)
        try:
            launch()
        finally:
            if any(segment.pinned for segment in self.segments):
                launches.note({rows.device for rows in table.elsewhere()})
        rows = table.on_cpu()
        if rows is not None:
            on_disk = [segment for segment in self.segments if segment.tier == DISK and segment.memory.numel()]
            if self.kept is not None:
                self.kept.begin(STEPPING)
            self._stream.step(rows, on_disk, self._bytes_in(HOST))
            rows.count()
            if self.kept is not None:
                self.kept.end_step(self.groups, self.local)

    def _check_process(self, who: str) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{who}: paged state belongs to process {self._process}, which this one ({os.getpid()}) was forked "
                "from. Make an optimizer here and load the other's state dict."
            )

    def check_others(self, where: str, others: dict[Any, Any]) -> None:
        """Raise ValueError for what others keep with a parameter's state where a kept directory would lose it."""
        if self.kept is not None and others:
            raise ValueError(
                f"{where}[{next(iter(others))!r}] is not the optimizer's, and {self.directory} holds nothing else: a "
                "later run would lack it. Keep it elsewhere, or page without keep=True and save state dicts."
            )

    def check_params(self, groups: Groups) -> None:
        """Before the first step: raise ValueError where parameters are not those of a kept directory's state."""
        if self.kept is not None and self.kept.expected:
            self.kept.check_params([self.local(param) for group in groups for param in group["params"]])

    def prepare(self, groups: Groups, state: dict[Any, Any]) -> None:
        """Have a kept directory describe the state that is about to be stepped.

        Raises:
            RuntimeError: it does not hold all state, or holds state of parameters that are not there.
        """
        self.groups = groups
        if self.kept is None:
            return
        if self.kept.journal.closed:
            raise RuntimeError(f"{self.owner}: the optimizer was closed, its state is in {self.directory}.")
        self.kept.write(groups, state, self.segments)

    def begin_rewriting(self) -> None:
        """From here on state is neither the old nor the new."""
        if self.kept is not None:
            self.kept.begin(RESETTING)

    def end_rewriting(self, groups: Groups, state: dict[Any, Any]) -> None:
        """State is whole again."""
        self.prepare(groups, state)
        if self.kept is not None:
            self.kept.journal.end()

    def begin_loading(self) -> None:
        """From here on state is neither the old nor the new."""
        if self.kept is not None:
            self.kept.begin(LOADING)
            self.kept.expected = {}  # the parameters of the old

    def end_loading(self, groups: Groups, state: dict[Any, Any]) -> None:
        """State is what was loaded."""
        self.keep_only(state.values())
        if self.kept is not None:
            self.kept.pending = {}
            self.prepare(groups, state)
            self.kept.journal.end()

    def flush(self) -> None:
        """Options, state and journal of a kept directory to the disk."""
        if self.kept is not None and not self.kept.journal.closed and not self.kept.returns:
            if not self.kept.pending:
                self.kept.write_options(self.groups)
            if os.getpid() == self._process:  # the parameters of a fork are its own
                self.kept.note_params(self._local_params())
            self.kept.records.sync()
            self.kept.journal.note_sync()

    def _local_params(self) -> list[tuple[torch.Tensor, bool]]:
        params = [param for group in self.groups for param in group["params"]]
        return [(self.local(param), bool(self.state.get(param))) for param in params]

    def note_checkpoint(self, what: str) -> None:
        """All to the disk, and a copy of the state beside it, to which a later run can return.

        Raises:
            RuntimeError: the state cannot be used, is another process's, or the optimizer was closed.
            OSError: there is no room for the copy.
        """
        if self.kept is None:
            return
        self._check_process(f"{self.owner}.note_checkpoint")
        self.prepare(self.groups, self.state)
        self.kept.journal.check_whole()
        self.flush()
        self.kept.note_checkpoint(what, self._local_params(), self.segments, self._stream.way == DIRECT)

    def note_state_dict(self) -> None:
        """Remember that a state dict was taken."""
        if self.kept is not None and not self.kept.journal.closed and os.getpid() == self._process:
            self.kept.note_state_dict()

    def close(self) -> None:
        """Give a kept directory back, all on the disk. A fork of the process that owns it leaves it alone."""
        if self.kept is not None and os.getpid() == self._process and not self.kept.journal.closed:
            self.flush()
            self.kept.close()


def placed(store: Store | None, tensor: torch.Tensor) -> tuple[str, str]:
    """The tier of a state tensor, and in words where that is; `store` of its optimizer."""
    for segment in () if store is None else store.segments:
        if store is not None and segment.tier == DISK and segment.holds(tensor):
            return DISK, str(store.directory)
    if tensor.is_cuda:
        return DEVICE, str(tensor.device)
    return HOST, "pinned memory" if torch.cuda.is_available() and tensor.is_pinned() else "memory"
