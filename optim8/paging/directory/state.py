"""A directory of state: one optimizer writes it, and a later one goes on with it.

Files: `journal`, the lock and the marks; `layout.json`, where each tensor lies; `options.pt`, the options of the
parameter groups; `state-<n>.bin`, the state; `params.json`, fingerprints of the parameters that the last step left;
`checkpoint.json`, the checkpoint that was noted last; `checkpoint-<n>.bin` and `checkpoint-options.pt`, a copy of the
state at that step.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from optim8 import rules
from optim8.paging.directory import checkpoint, fingerprint, index, resumption
from optim8.paging.directory.checkpoint import Checkpoint
from optim8.paging.directory.journal import RETURNING, Journal
from optim8.paging.directory.records import Records
from optim8.paging.files import Segment, in_file, map_file
from optim8.paging.pager import Pager
from optim8.state.allocation import Arena
from optim8.state.layout import count_keys

_LAYOUT = {"optimizer": str, "rule": str, "run": str, "count": int, "segments": list, "params": dict}
Groups = Sequence[dict[str, Any]]


class StateDirectory:
    """The directory of one optimizer's state: its journal, and the map between tensors and files.

    Args:
        owner: the optimizer's class.
        rule: its rule.
        pager: says where the directory is, and which state to resume.
        params: local values of the optimizer's present parameters, by position.

    Raises:
        OSError: the directory cannot be used: another optimizer has it, it cannot be written to, it holds state and
            `resume` is False, or it holds none and `resume` is not; or there is no room to return to a checkpoint.
        RuntimeError: the state is not whole, or ahead of the checkpoint; the message names the checkpoint.
        ValueError: a file is damaged, or of another run, rule or version.
    """

    def __init__(self, owner: str, rule: str, pager: Pager, params: Sequence[torch.Tensor]) -> None:
        self.owner, self.rule, self.pager, self.directory = owner, rule, pager, Path(str(pager.directory))
        self.records = Records(owner, self.directory)
        is_new = not (self.directory / "layout.json").exists()
        self.journal = Journal(self.records, is_new)
        self.pending: dict[int, dict[str, Any]] = {}  # tensors that no parameter has yet, by its position
        self.expected: dict[int, str] = {}  # fingerprints that no parameter was compared with yet
        self.checkpoint: Checkpoint | None = None
        self.returns = False  # the state is the checkpoint's, and the directory still holds that of the last step
        self._options: list[dict[str, Any]] = []
        self._known: list[tuple[torch.Tensor, str, Any]] = []  # what layout.json describes
        self._witnesses: list[int] = []  # positions of parameters whose fingerprints a step leaves
        self._layout: dict[str, Any] = {"segments": [], "params": {}}  # of the files that are mapped
        self._files: list[str] = []  # of state, in layout.json
        self.run = uuid.uuid4().hex
        self._count = 0
        self.stale = True  # layout.json does not describe the state
        try:
            self._open(is_new, params)
        except BaseException:
            self.journal.close()  # its mapping holds the lock too
            raise

    @property
    def advice(self) -> str:
        """What to do where the state cannot be used."""
        return checkpoint.advice(self.records)

    def _open(self, is_new: bool, params: Sequence[torch.Tensor]) -> None:
        if is_new:
            if self.pager.resume:
                raise FileNotFoundError(
                    f"{self.owner}: resume={self.pager.resume!r} needs state that was kept in {self.directory}, found "
                    "none. Pass the directory of the earlier run, or resume=False."
                )
            self.journal.claim()
            self._tidy([])
            return
        content = self._read_layout()
        if not self.pager.resume:
            raise FileExistsError(
                f"{self.owner}: {self.directory} holds the state of another run ({content['optimizer']}, step "
                f"{self.journal.steps}). Pass resume=True to go on with it, or another directory to start anew."
            )
        if content["rule"] != self.rule:
            raise ValueError(
                f"{self.owner}: {self.directory} holds state of {content['optimizer']}. Resume with that class, or "
                "pass another directory."
            )
        self.run, self._count = content["run"], content["count"]
        self.checkpoint = checkpoint.read(self.records)
        problem = self.journal.problem
        live = {} if self.pager.changed_params else fingerprint.of_last_step(self.records, self.journal)
        self.returns = resumption.returns_to_checkpoint(self, problem, live, params)
        last = self.checkpoint if self.returns else None
        if last is None:
            index.check_files(self.records, self.run, content, "layout.json", self.advice)
        else:
            index.check_files(
                self.records, self.run, last.layout, checkpoint.NAME, self.advice, checkpoint.path_of_copy
            )
        self.journal.claim()
        self._files = [] if problem else [file for file, _ in index.files(self.records, content, "layout.json", "")]
        self._tidy(self._files)
        if last is not None:
            content, live = self._layout_of_copy(last), last.params
        self._layout = content
        with self.records.parsing("layout.json", f"Restore it. {self.advice}"):
            self.pending = {int(place): dict(tensors) for place, tensors in content["params"].items()}
        self.expected = {} if self.pager.changed_params else dict(live)

    def _read_layout(self) -> dict[str, Any]:
        try:
            content = self.records.read_json("layout.json", _LAYOUT, f"Restore it. {self.advice}")
        except ValueError:
            last = checkpoint.read(self.records) if self.pager.resume == "checkpoint" else None
            if last is None or not last.layout:
                raise
            content = last.layout  # nothing else is needed then
        if content is None:
            raise FileNotFoundError(f"{self.owner}: {self.directory / 'layout.json'} was removed while it was opened.")
        return content

    def _layout_of_copy(self, last: Checkpoint) -> dict[str, Any]:
        """Copy the state of the checkpoint back, to new files; those of the last step stay until the first step."""
        files = index.files(self.records, last.layout, checkpoint.NAME, self.advice)
        with self.records.parsing(checkpoint.NAME, self.advice):
            self._count = max(self._count, int(last.layout["count"]))
        names = {file: self._new_name() for file, _ in files}
        for number, (file, size) in enumerate(files):
            head = index.header(self.run, names[file])
            checkpoint.copy_back(
                checkpoint.path_of_copy(self.records, number), self.directory / names[file], head, size
            )
        with self.records.parsing(checkpoint.NAME, self.advice):
            return index.with_file_names(last.layout, names)

    def _new_name(self) -> str:
        self._count += 1
        return f"state-{self._count - 1}.bin"

    def _tidy(self, names: Sequence[str]) -> None:
        """Remove all files of state but these."""
        for path in self.directory.glob("state-*.bin"):
            if path.name not in names:
                path.unlink()

    def segment(self, arenas: Sequence[Arena], limited: bool) -> Segment:
        """A new file of state."""
        name = self._new_name()
        made = in_file(arenas, self.directory, limited, name, index.header(self.run, name))
        self.stale = True
        return made

    def reopened(self, limited: bool) -> list[Segment]:
        """The files of an earlier run, mapped."""
        return [
            map_file(self.directory / segment["file"], segment["size"], limited) for segment in self._layout["segments"]
        ]

    def take(self, place: int, shape: Sequence[int], files: Sequence[Segment]) -> dict[str, torch.Tensor]:
        """The state that an earlier run left for the parameter at `place`; empty where it left none.

        Raises:
            ValueError: its shape is another, or layout.json is damaged.
        """
        entry: dict[str, torch.Tensor] = {}
        for name, at in self.pending.get(place, {}).items():
            with self.records.parsing("layout.json", f"Restore it. {self.advice}"):
                was, tensor = index.tensor(at, files)
            of_values = name not in count_keys(rules.rule(self.rule).moments) and not name.endswith("_absmax")
            if of_values and tuple(shape) != was:
                raise ValueError(
                    f"{self.owner}: {self.directory} holds state of shape {was} for parameter {place}, "
                    f"which is {tuple(shape)}. Resume with the same parameters in the same order."
                )
            entry[name] = tensor
        self.pending.pop(place, None)
        return entry

    def check_params(self, params: Sequence[torch.Tensor]) -> None:
        """Compare the parameters with those that the last step of the earlier run left.

        Raises:
            ValueError: they differ.
        """
        if self.pending:
            return  # write refuses that
        resumption.check_params(self, params)
        self.expected = {
            place: self.expected[place] for place in self.expected if fingerprint.of(params[place]) is None
        }

    def note_params(self, params: Sequence[tuple[torch.Tensor, bool]]) -> None:
        """Write fingerprints of the parameters (local values, whether they have state) that a step of this optimizer
        left: once after each step, because later values may have been loaded."""
        if self.journal.stepped:
            content = {"steps": self.journal.steps, "params": fingerprint.of_all(params)}
            self.records.write_json("params.json", content)
            self.journal.note_params()

    def end_step(self, groups: Groups, local: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """A step has ended. Leave fingerprints of a few parameters, in case of a kill; they cost next to nothing."""
        params = [param for group in groups for param in group["params"]]
        texts = {place: fingerprint.of(local(params[place])) for place in self._witnesses}
        self.journal.end({place: text for place, text in texts.items() if text is not None})

    def note_state_dict(self) -> None:
        """Note that the program took a state dict, unless it has noted a checkpoint."""
        if self.checkpoint is None or self.checkpoint.what == checkpoint.STATE_DICT:
            self.checkpoint = checkpoint.now(checkpoint.STATE_DICT, self.journal.steps)
            checkpoint.write(self.records, self.checkpoint)

    def note_checkpoint(
        self, what: str, params: Sequence[tuple[torch.Tensor, bool]], files: Sequence[Segment], past_cache: bool
    ) -> None:
        """Note the last checkpoint and copy the state, all of which is on the disk by now. A kill or a power cut at any
        time leaves the state or its copy.

        Raises:
            OSError: there is no room for the copy; the last checkpoint is still the one before.
        """
        copied = [file for file in files if file.path is not None] if self.pager.checkpoint_copy else []
        checkpoint.make_room(self.records, copied)
        last = checkpoint.now(what, self.journal.steps)
        checkpoint.write(self.records, last)  # from here on there is no copy
        self.checkpoint = last
        checkpoint.copy_state(self.records, copied, past_cache)
        if self.pager.checkpoint_copy:
            self.records.write(checkpoint.OPTIONS, (self.directory / "options.pt").read_bytes())
            # Before the first step no parameter has state, so all of them count.
            known = fingerprint.of_last_step(self.records, self.journal) or fingerprint.of_all(
                [(param, True) for param, _ in params]
            )
            self.checkpoint = Checkpoint(last.what, last.step, last.time, self._layout, known)
            checkpoint.write(self.records, self.checkpoint)

    def begin(self, what: int) -> None:
        """From here on the state is not whole, until the step or the loading has ended."""
        if self.returns and self.checkpoint is not None:
            self.journal.begin(RETURNING)
            self.journal.steps = self.checkpoint.step
            self.returns = False
        self.journal.begin(what)

    def write(self, groups: Groups, state: dict[Any, Any], files: Sequence[Segment]) -> None:
        """Bring layout.json and the options up to date.

        Raises:
            RuntimeError: some state is not in the directory any more, or parameters are missing.
        """
        if self.pending:
            raise RuntimeError(
                f"{self.owner}: {self.directory} holds state for parameter {min(self.pending)}, which the optimizer "
                "lacks. Add the parameter groups of the earlier run before the first step."
            )
        returns = self.returns
        if any(state.get(param, {}).get(name) is not tensor for param, name, tensor in self._known):
            self.stale = True  # someone has replaced state
        if self.stale:
            about = {"optimizer": self.owner, "rule": self.rule, "run": self.run, "count": self._count}
            content = {**about, **index.describe(self.owner, self.directory, groups, state, files)}
            if returns:
                self.begin(RETURNING)
            self.records.write_json("layout.json", content)
            self._layout = content
            self._tidy([str(segment["file"]) for segment in content["segments"]])
            self.stale = False
            params = [param for group in groups for param in group["params"]]
            self._known = [(param, *item) for param in params for item in state.get(param, {}).items()]
            sizes = sorted((param.numel(), place) for place, param in enumerate(params) if state.get(param))
            self._witnesses = [place for _, place in sizes[-4:]]
        self.write_options(groups)
        if returns:
            self.journal.end()

    def read_options(self) -> list[dict[str, Any]]:
        """The options of the earlier run's parameter groups."""
        name = checkpoint.OPTIONS if self.returns else "options.pt"
        return self.records.read_options(name, f"Restore it. {self.advice}")

    def write_options(self, groups: Groups) -> None:
        """Write the options of the groups, where they have changed."""
        options = [{key: value for key, value in g.items() if key not in ("params", "param_names")} for g in groups]
        if options != self._options:
            self.records.write_options("options.pt", options)
            self._options = [dict(group) for group in options]

    def close(self) -> None:
        """Give the directory back."""
        if self.returns:  # the directory still holds the state of the last step
            self._tidy(self._files)
        self.journal.close()
