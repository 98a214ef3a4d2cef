"""The paged memory of one optimizer: which tier state goes to, and a step that streams it."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from optim8.paging import files
from optim8.paging.directory.journal import LOADING, RESETTING, STEPPING
from optim8.paging.directory.state import StateDirectory
from optim8.paging.files import Segment
from optim8.paging.pager import Pager
from optim8.paging.sharing import bytes_in, bytes_on, sharers
from optim8.paging.streaming import DIRECT, Stream
from optim8.paging.tiers import plan
from optim8.state.allocation import DEVICE, DISK, HOST, TIERS, Arena
from optim8.state.mapped import tensors_of
from optim8.state.shards import local
from optim8.step import norms, pending, run
from optim8.step.memory import Groups, Memory
from optim8.step.scaling import UNSCALED, Scaling


class Store(Memory):
    """Made by an optimizer from its Pager; `params`: those that it has, for a kept directory.

    Raises:
        OSError: the directory is not there or cannot be written to.
    """

    is_paged = True
    allocation_order = TIERS[::-1]  # the disk first, which may be full

    def __init__(self, owner: str, rule: str, pager: Pager, params: Sequence[torch.Tensor] = ()) -> None:
        self.owner, self.rule, self.pager = owner, rule, pager
        self.directory = Path(pager.directory or tempfile.gettempdir()).absolute()
        self.segments: list[Segment] = []
        self.kept: StateDirectory | None = None
        self.groups: Groups = []  # of the optimizer
        self.state: dict[Any, Any] = {}  # of the optimizer
        if pager.keep:
            self.kept = StateDirectory(owner, rule, pager, [local(param) for param in params])
            self.segments += self.kept.reopened(self.limited)
        else:
            files.check_directory(self.directory)
        self._process = os.getpid()
        self._stream, self._sharers = Stream(owner, pager), sharers(pager)
        self._sharers.add(self)
        weakref.finalize(self, pending.wait)  # before its memory goes

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
            device_taken=bytes_on(self._sharers, device),
            host_taken=bytes_in(self._sharers, HOST),
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

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of state."""
        return [tensor for entry in self.state.values() for tensor in tensors_of(entry)]

    @property
    def pinned_spans(self) -> Sequence[tuple[int, int]]:  # type: ignore[override]
        return [segment.span for segment in self.segments if segment.pinned]

    def watch(self, groups: Groups, state: dict[Any, Any]) -> None:
        self.groups, self.state = groups, state

    def resume(self, groups: Groups, first: int) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        self.groups = groups
        if self.kept is None or not self.kept.pending:
            return
        place = sum(len(group["params"]) for group in groups[:first])
        for group, options in zip(groups[first:], self.kept.read_options()[first:]):
            group.update(options)
            for param in group["params"]:
                entry = self.kept.take(place, local(param).shape, self.segments)
                if entry:
                    yield param, entry
                place += 1

    def reaches(self, tensor: torch.Tensor, param: torch.Tensor) -> bool:
        return tensor.device == param.device or self.holds(tensor)

    def place_of(self, tensor: torch.Tensor) -> tuple[str, str]:
        if any(segment.tier == DISK and segment.holds(tensor) for segment in self.segments):
            return DISK, str(self.directory)
        return super().place_of(tensor)

    def allocate(self, tier: str, device: torch.device, arenas: Sequence[Arena]) -> None:
        """Memory of a tier for all arenas, filled.

        Raises:
            OSError: the disk is full, or the file cannot be made.
        """
        if tier == DEVICE:
            super().allocate(tier, device, arenas)
            return
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
        tensors = [tensor for entry in entries for tensor in tensors_of(entry)]
        pending.wait()
        self.segments = [segment for segment in self.segments if any(map(segment.holds, tensors))]
        if self.kept is not None:
            self.kept.stale = True

    def run_step(self, table: Any, who: str, scaling: Scaling = UNSCALED, reduce: norms.Reduce | None = None) -> None:
        """What step.run.run_step does, with the same bits, streaming what is paged.

        Raises:
            RuntimeError: this process is a fork of the one that owns the state, or an earlier step was ended by an
                error of the disk.
            OSError: the disk failed in the middle of the step.
        """
        self._check_process(who)
        launch = run.steps_elsewhere(table, who, scaling.scale, scaling.found_inf, reduce)
        run.mark_stepped(table)
        try:
            launch()
        finally:
            if any(segment.pinned for segment in self.segments):
                pending.note({rows.device for rows in table.elsewhere()})
        rows = table.on_cpu()
        if rows is not None:
            on_disk = [segment for segment in self.segments if segment.tier == DISK and segment.memory.numel()]
            self._stream.step(rows, on_disk, bytes_in(self._sharers, HOST) if self.limited else 0, reduce)
            if len(self._sharers) > 1:  # each would keep as much
                self._stream.free_memory()
            rows.count()

    @contextmanager
    def stepping(self, who: str) -> Iterator[None]:
        if self.kept is not None:
            self._check_process(who)
            self.kept.begin(STEPPING)
        yield
        if self.kept is not None:
            self.kept.end_step(self.groups, local)

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

    def check_before_step(self, groups: Groups) -> None:
        if self.kept is not None and self.kept.expected:
            self.kept.check_params([local(param) for group in groups for param in group["params"]])

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

    @contextmanager
    def rewriting(self, groups: Groups, state: dict[Any, Any]) -> Iterator[None]:
        """Around changes of state that are no step: a kept directory is told when state is whole again."""
        self.prepare(groups, state)
        if self.kept is not None:
            self.kept.begin(RESETTING)
        yield
        self.keep_only(state.values())
        self._end_change()

    @contextmanager
    def loading(self) -> Iterator[None]:
        if self.kept is not None:
            self.kept.begin(LOADING)
            self.kept.expected = {}  # the parameters of the old
        yield

    def end_loading(self) -> None:
        self.keep_only(self.state.values())
        if self.kept is not None:
            self.kept.pending = {}
            self._end_change()

    def _end_change(self) -> None:
        self.prepare(self.groups, self.state)
        if self.kept is not None:
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
        return [(local(param), bool(self.state.get(param))) for param in params]

    def note_checkpoint(self, who: str, path: str | os.PathLike[str]) -> None:
        """All to the disk, and a copy of the state beside it, to which a later run can return.

        Raises:
            ValueError: no directory is kept.
            RuntimeError: the state cannot be used, is another process's, or the optimizer was closed.
            OSError: there is no room for the copy.
        """
        if self.kept is None:
            super().note_checkpoint(who, path)
            return
        self._check_process(who)
        text = os.fsdecode(path)
        # It is read by another process, which may be elsewhere. What is no file (an address, say) stays as it is.
        what = f"'{Path(text).absolute() if Path(text).exists() else text}'"
        self.prepare(self.groups, self.state)
        self.kept.journal.check_whole()
        self.flush()
        self.kept.note_checkpoint(what, self._local_params(), self.segments, self._stream.way == DIRECT)

    @property
    def checkpoint_copy(self) -> tuple[str, int]:
        """The checkpoint that was noted last, and the bytes of the copy of the state at it; ("", 0) without one."""
        noted = None if self.kept is None else self.kept.checkpoint
        return ("", 0) if noted is None or not noted.nbytes else (str(noted), noted.nbytes)

    def note_state_dict(self) -> None:
        """Remember that a state dict was taken."""
        if self.kept is not None and not self.kept.journal.closed and os.getpid() == self._process:
            self.kept.note_state_dict()

    def close(self) -> None:
        """Give a kept directory back, all on the disk. A fork of the process that owns it leaves it alone."""
        if self.kept is not None and os.getpid() == self._process and not self.kept.journal.closed:
            self.flush()
            self.kept.close()

    def abandon(self) -> None:
        if self.kept is not None:
            self.kept.close()
