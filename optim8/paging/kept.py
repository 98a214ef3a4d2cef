"""State in a kept directory: written so that a later optimizer finds it, and found again."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from optim8.paging import fingerprint, journal, segments
from optim8.paging.segments import PAGE, Arena, Segment

_DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
Groups = Sequence[dict[str, Any]]


class Kept:
    """The kept directory of one optimizer: its journal, and the map between its tensors and its files."""

    def __init__(self, owner: str, rule: str, directory: Path, resume: bool, changed_params: bool) -> None:
        self.owner, self.rule, self.directory = owner, rule, directory
        self.journal = journal.Journal(owner, directory, resume)
        self.pending: dict[int, dict[str, Any]] = {}  # tensors by position of the parameter, not yet taken
        self.expected: dict[int, str] = {}  # fingerprints of the parameters, not yet compared
        self._options: list[dict[str, Any]] = []
        self._known: list[tuple[torch.Tensor, str, Any]] = []  # what layout.json describes
        self.run = uuid.uuid4().hex
        self._count = 0
        self.stale = True  # layout.json does not describe the state
        try:
            if self.journal.layout is not None:
                self._check(self.journal.layout)
                self.expected = {} if changed_params else self.journal.read_params()
            self.journal.tidy()
        except BaseException:
            self.journal.close()
            raise

    def _check(self, layout: dict[str, Any]) -> None:
        if layout["rule"] != self.rule:
            raise ValueError(
                f"{self.owner}: {self.directory} holds state of {layout['optimizer']}. Resume with that class, or pass "
                "another directory."
            )
        self.run, self._count = layout["run"], layout["count"]
        for segment in layout["segments"]:
            path = self.directory / segment["file"]
            found = path.stat().st_size if path.exists() else 0
            if found != segment["size"]:
                raise ValueError(
                    f"{self.owner}: {path} must have {segment['size']} bytes, got {found}. It is not the file of this "
                    "state. Restore it, or start with another directory and load a checkpoint."
                )
            with path.open("rb") as file:
                if file.read(PAGE) != self._header(segment["file"]):
                    raise ValueError(
                        f"{self.owner}: {path} is a file of another run. Restore the right one, or start with another "
                        "directory and load a checkpoint."
                    )
        self.pending = {int(place): tensors for place, tensors in layout["params"].items()}

    def _header(self, name: str) -> bytes:
        return f"optim8 state {self.run} {name}\n".encode().ljust(PAGE, b"\0")

    def segment(self, arenas: Sequence[Arena], limited: bool) -> Segment:
        """A new file of state."""
        name = f"state-{self._count}.bin"
        made = segments.in_file(arenas, self.directory, limited, name, self._header(name))
        self._count += 1
        self.stale = True
        return made

    def reopened(self, limited: bool) -> list[Segment]:
        """The files of an earlier run, mapped."""
        layout = self.journal.layout or {"segments": []}
        return [
            segments.mapped(self.directory / segment["file"], segment["size"], limited)
            for segment in layout["segments"]
        ]

    def take(self, place: int, shape: Sequence[int], files: Sequence[Segment]) -> dict[str, torch.Tensor]:
        """The state that an earlier run left of the parameter at `place`; empty where it left none.

        Raises:
            ValueError: it is of another shape.
        """
        entry: dict[str, torch.Tensor] = {}
        by_name = {file.path.name: file for file in files if file.path is not None}
        for name, at in self.pending.get(place, {}).items():
            if name != "step" and not name.endswith("_absmax") and list(shape) != at["shape"]:
                raise ValueError(
                    f"{self.owner}: {self.directory} holds state of shape {tuple(at['shape'])} for parameter {place}, "
                    f"which is {tuple(shape)}. Resume with the same parameters in the same order."
                )
            dtype = _DTYPES[at["dtype"]]
            flat = segments.part(by_name[at["file"]].memory, at["begin"], at["values"], dtype)
            entry[name] = flat.as_strided(at["shape"], at["stride"])
        self.pending.pop(place, None)
        return entry

    def check_params(self, params: Sequence[torch.Tensor]) -> None:
        """Compare the parameters with those that the last step of the earlier run left.

        Raises:
            ValueError: they are others.
        """
        if self.pending:
            return  # write refuses that
        found = {place: fingerprint.of(params[place]) for place in self.expected}
        others = [place for place, text in found.items() if text not in (None, self.expected[place])]
        if others:
            was, now = (fingerprint.dtype_in(str(texts[others[0]])) for texts in (self.expected, found))
            more = f", nor are {len(others) - 1} others" if others[1:] else ""
            raise ValueError(
                f"{self.owner}: parameter {others[0]} is not what it was when the state in {self.directory} was "
                f"flushed or closed after step {self.journal.steps}{more}. "
                + (f"It was {was} and is {now}. " if was != now else "")
                + "Parameters and state are of different steps, or one is of another run. Load the parameters of that "
                "step. If they were changed on purpose, resume with Pager(..., changed_params=True)."
            )
        self.expected = {place: self.expected[place] for place, text in found.items() if text is None}

    def note_params(self, params: Sequence[tuple[torch.Tensor, bool]]) -> None:
        """Have the directory tell of the parameters (local values, whether they have state) that a step made here has
        left, once for each such step: later ones may be others that were loaded."""
        if self.journal.stepped:
            found = {place: fingerprint.of(param) for place, (param, has_state) in enumerate(params) if has_state}
            self.journal.write_params({place: text for place, text in found.items() if text is not None})

    def write(self, groups: Groups, state: dict[Any, Any], files: Sequence[Segment]) -> None:
        """Bring layout and options up to date.

        Raises:
            RuntimeError: state was moved out of the directory, or parameters are missing.
        """
        if self.pending:
            raise RuntimeError(
                f"{self.owner}: {self.directory} holds state for parameter {min(self.pending)}, which the optimizer "
                "lacks. Add the parameter groups of the earlier run before the first step."
            )
        if any(state.get(param, {}).get(name) is not tensor for param, name, tensor in self._known):
            self.stale = True  # someone has replaced state
        if self.stale:
            self.journal.write_layout(self._layout(groups, state, files))
            self.stale = False
            params = [param for group in groups for param in group["params"]]
            self._known = [(param, *item) for param in params for item in state.get(param, {}).items()]
        self.write_options(groups)

    def read_options(self) -> list[dict[str, Any]]:
        """The options of the earlier run's parameter groups."""
        return self.journal.read_options()

    def write_options(self, groups: Groups) -> None:
        """The groups' options, where they have changed."""
        options = [{key: value for key, value in g.items() if key not in ("params", "param_names")} for g in groups]
        if options != self._options:
            self.journal.write_options(options)
            self._options = [dict(group) for group in options]

    def _layout(self, groups: Groups, state: dict[Any, Any], files: Sequence[Segment]) -> dict[str, Any]:
        params: dict[int, dict[str, Any]] = {}
        flat = [param for group in groups for param in group["params"]]
        for place, param in enumerate(flat):
            entry = state.get(param)
            if entry:
                params[place] = {name: self._at(place, name, tensor, files) for name, tensor in entry.items()}
        used = [f for f in files if f.path is not None]
        return {
            "optimizer": self.owner,
            "rule": self.rule,
            "run": self.run,
            "count": self._count,
            "groups": [len(group["params"]) for group in groups],
            "segments": [{"file": f.path.name, "size": f.memory.numel()} for f in used if f.path is not None],
            "params": params,
        }

    def _at(self, place: int, name: str, tensor: Any, files: Sequence[Segment]) -> dict[str, Any]:
        about = {"shape": list(tensor.shape), "stride": list(tensor.stride()), "values": tensor.numel()}
        about["dtype"] = str(tensor.dtype).removeprefix("torch.")
        if tensor.numel() == 0:
            return {**about, "file": files[0].path.name if files[0].path else "", "begin": 0}
        for file in files:
            if file.path is not None and file.holds(tensor):
                return {**about, "file": file.path.name, "begin": tensor.data_ptr() - file.span[0]}
        raise RuntimeError(
            f"{self.owner}: state[{name!r}] of parameter {place} was replaced by a tensor outside of {self.directory}, "
            "which must hold all state. Copy into the tensor that was there."
        )
