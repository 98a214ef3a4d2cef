"""The part of an optimizer that knows where its state lives: tiers, copies, a kept directory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch

from optim8.optim import carried, sharded, states
from optim8.optim.given import States
from optim8.optim.states import Moment
from optim8.paging import Pager, Place, Placement, launches
from optim8.paging.files import tensors_of
from optim8.paging.store import Store, placed


class PagedState(torch.optim.Optimizer):
    """An optimizer that can keep its state in a Store."""

    rule: ClassVar[str]
    moments: ClassVar[tuple[Moment, ...]]
    always_paged: ClassVar[bool] = False

    state: States
    _store: Store | None = None  # where state lives that is paged

    @property
    def _turn(self) -> Any:
        """Held by the thread that steps, loads or notes a checkpoint."""
        raise NotImplementedError

    def precision(self, param: torch.Tensor) -> str:
        """How the state of `param` is kept."""
        raise NotImplementedError

    def _precision_now(self, group: dict[str, Any], param: torch.Tensor) -> str:
        raise NotImplementedError

    def _convert(self, wanted: Sequence[tuple[str, torch.Tensor, bool]]) -> None:
        raise NotImplementedError

    def _open_store(self, pager: Pager | None) -> None:
        """State from here on lives where `pager` says; that which an earlier run kept there is taken."""
        if pager is None:
            return
        params = (
            [sharded.local(param) for group in self.param_groups for param in group["params"]] if pager.keep else []
        )
        self._store = store = Store(type(self).__name__, self.rule, pager, params)
        store.state, store.local = self.state, sharded.local
        if store.kept is not None:
            try:
                store.check_reach(param for group in self.param_groups for param in group["params"])
                self._take_kept(0)
            except BaseException:
                store.kept.close()
                raise
            weakref.finalize(self, store.close)

    def _take_kept(self, first: int) -> None:
        """Bring what an earlier run kept to the parameter groups from `first` on: options and state."""
        if self._store is None or self._store.kept is None:
            return
        self._store.groups = self.param_groups
        kept = self._store.kept
        if not kept.pending:
            return
        place = sum(len(group["params"]) for group in self.param_groups[:first])
        for group, options in zip(self.param_groups[first:], kept.read_options()[first:]):
            group.update(options)
            for param in group["params"]:
                entry = kept.take(place, sharded.local(param).shape, self._store.segments)
                if entry:
                    self.state.put(param, states.under_present_names(self.moments, entry))
                place += 1

    def placement(self) -> Placement:
        """Where the state of each parameter is: in memory of its device, in memory of the host, or on the disk.

        Returns:
            One optim8.paging.Place for each parameter, in order; printed, a table, which also has the copy of the state
            at the checkpoint that was noted last, if there is one.
        """
        store, places = self._store, []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names", [""] * len(group["params"]))
            for index, (param, name) in enumerate(zip(group["params"], names, strict=True)):
                entry = self.state.get(param)
                tensors = tensors_of(entry or {})
                # An empty tensor has no address; the count of steps has.
                tier, where = placed(store, max(tensors, key=lambda t: t.nbytes)) if tensors else ("none", "")
                size = sum(tensor.nbytes for tensor in tensors)
                shape, precision = tuple(param.shape), self.precision(param)
                places.append(Place(number, index, name, shape, precision, tier, where, size))
        noted = store.kept.checkpoint if store is not None and store.kept is not None else None
        if noted is None or not noted.nbytes:
            return Placement(places)
        return Placement(places, str(noted), noted.nbytes)

    def flush(self) -> None:
        """Write state that is kept in a directory to the disk; waits for it.

        After it the directory is a checkpoint of this step, which may be copied, also when the power fails. Without
        it that holds once the optimizer is gone. Does nothing for other state.
        """
        if self._store is not None:
            self._store.flush()

    def close(self) -> None:
        """Write state that is kept in a directory to the disk, and give the directory back, so that another optimizer
        can go on with it; this one cannot be stepped any more. The end of the optimizer does the same."""
        if self._store is not None:
            self._store.close()

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
        if self._store is None or self._store.kept is None:
            raise ValueError(
                f"{type(self).__name__}.note_checkpoint: needs paged=Pager(directory=..., keep=True). Leave it out: "
                "without a kept directory there is nothing to be found after a crash."
            )
        text = os.fsdecode(path)
        # It is read by another process, which may be elsewhere. What is no file (an address, say) stays as it is.
        what = f"'{Path(text).absolute() if Path(text).exists() else text}'"
        with self._turn:
            self._store.note_checkpoint(what)

    def _check_others(self) -> None:
        """Raise ValueError where a kept directory would lose what others keep with a parameter's state."""
        if self._store is None or self._store.kept is None:
            return
        counts = [len(states.names(self.moments, in_8_bits)) for in_8_bits in (False, True)]
        for number, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                entry = self.state.get(param)
                if entry and len(entry) > counts[self.moments[0].absmax in entry]:
                    where = f"{type(self).__name__}: parameter {index} of group {number}: state"
                    self._store.check_others(where, states.others(self.moments, entry))

    @contextmanager
    def _rewriting(self) -> Iterator[None]:
        """Around changes of state that are no step: a kept directory is told when it is whole."""
        if self._store is None:
            yield
            return
        self._store.prepare(self.param_groups, self.state)
        self._store.begin_rewriting()
        yield
        self._store.keep_only(self.state.values())
        self._store.end_rewriting(self.param_groups, self.state)

    def _note_state_dict(self) -> None:
        if self._store is not None:
            self._store.note_state_dict()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self._store is not None:
            launches.settle()
            self._relay()
            state["state"] = carried.Carried(self._store, self.moments, self.state)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedState:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state: dict[str, Any] = super().__getstate__()
        if self._store is not None:
            del state["state"]
            launches.settle()
            store, fresh = carried.copied(self._store, self.moments, self.state, memo)
            twin.__setstate__({**deepcopy(state, memo), "state": fresh})
            twin._store = store
            store.state = twin.state
        else:
            twin.__setstate__(deepcopy(state, memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state.get("state"), carried.Carried):
            self._store = state["state"].store
            state = {**state, "state": state["state"].state}
        super().__setstate__(state)
        self.state = States(self.state)
        for param, entry in self.state.items():
            if isinstance(param, torch.Tensor) and isinstance(entry, dict):  # of a pickle, maybe an older version's
                self.state.put(param, states.under_present_names(self.moments, entry))
        if self._store is not None:
            self._store.groups = self.param_groups
            self._store.state = self.state

    def _relay(self) -> None:
        """Lay out the states of parameters whose strides have changed anew."""
        first = self.moments[0]
        self._convert(
            [
                ("", param, first.absmax in entry)
                for param, entry in self.state.items()
                if isinstance(param, torch.Tensor) and entry
                if first.values(entry).stride() != states.dense_stride(sharded.local(param))
            ]
        )
