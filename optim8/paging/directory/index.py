"""The index of a directory of state (layout.json): in which file each tensor lies, and where in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from optim8.paging.directory.records import Records
from optim8.paging.files import Segment, part
from optim8.state.mapped import PAGE

_DTYPES = {"uint8": torch.uint8, "int16": torch.int16, "float32": torch.float32}


def header(run: str, name: str) -> bytes:
    """The first page of a file of state."""
    return f"optim8 state {run} {name}\n".encode().ljust(PAGE, b"\0")


def files(records: Records, layout: Mapping[str, Any], name: str, advice: str) -> list[tuple[str, int]]:
    """Names and sizes of the files of state; `name`: the file that the layout comes from."""
    with records.parsing(name, f"Restore it. {advice}"):
        return [(str(segment["file"]), int(segment["size"])) for segment in layout["segments"]]


def check_files(
    records: Records,
    run: str,
    layout: Mapping[str, Any],
    name: str,
    advice: str,
    path_of_copy: Callable[[Records, int], Path] | None = None,
) -> None:
    """Raise ValueError where files of state are not those of a layout.

    Args:
        records: of the directory.
        run: whose state it is.
        layout: tells of the files.
        name: of the file that has the layout.
        advice: what to do where one is not.
        path_of_copy: where the copy of each file is; None: the files themselves are checked.
    """
    for number, (file, size) in enumerate(files(records, layout, name, advice)):
        path = records.directory / file if path_of_copy is None else path_of_copy(records, number)
        _check_file(records.owner, path, size, header(run, file), advice, path_of_copy is not None)


def _check_file(owner: str, path: Path, size: int, head: bytes, advice: str, may_be_longer: bool) -> None:
    """Raise ValueError where a file of state has another size or another head. A copy may be longer: there is room for
    the next one in it."""
    got = path.stat().st_size if path.exists() else 0
    if got < size or (got > size and not may_be_longer):
        raise ValueError(
            f"{owner}: {path} must have {size} bytes, got {got}. It is not the file of this state. Restore it. {advice}"
        )
    with path.open("rb") as file:
        if file.read(PAGE) != head:
            raise ValueError(f"{owner}: {path} is a file of another run. Restore the right one. {advice}")


def with_file_names(layout: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The layout with other names of files."""
    segments_now = [{**segment, "file": names[segment["file"]]} for segment in layout["segments"]]
    params = {
        place: {name: {**at, "file": names[at["file"]]} for name, at in tensors.items()}
        for place, tensors in layout["params"].items()
    }
    return {**layout, "segments": segments_now, "params": params}


def tensor(at: Mapping[str, Any], mapped: Sequence[Segment]) -> tuple[tuple[int, ...], torch.Tensor]:
    """The shape and the tensor of an entry that `describe` wrote, in mapped files."""
    shape = tuple(map(int, at["shape"]))
    by_name = {file.path.name: file.memory for file in mapped if file.path is not None}
    flat = part(by_name[at["file"]], at["begin"], at["values"], _DTYPES[at["dtype"]])
    return shape, flat.as_strided(shape, at["stride"])


def describe(
    owner: str, directory: Path, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any], mapped: Sequence[Segment]
) -> dict[str, Any]:
    """The part of a layout that lists files, and tensors of state by position of the parameter.

    Raises:
        RuntimeError: some state is not in these files.
    """
    params: dict[str, dict[str, Any]] = {}
    flat = [param for group in groups for param in group["params"]]
    for place, param in enumerate(flat):
        entry = state.get(param)
        if entry:
            params[str(place)] = {
                name: _at(owner, directory, place, name, tensor, mapped) for name, tensor in entry.items()
            }
    return {
        "groups": [len(group["params"]) for group in groups],
        "segments": [{"file": f.path.name, "size": f.memory.numel()} for f in mapped if f.path is not None],
        "params": params,
    }


def _at(owner: str, directory: Path, place: int, name: str, tensor: Any, mapped: Sequence[Segment]) -> dict[str, Any]:
    about = {"shape": list(tensor.shape), "stride": list(tensor.stride()), "values": tensor.numel()}
    about["dtype"] = str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() == 0:
        return {**about, "file": mapped[0].path.name if mapped[0].path else "", "begin": 0}
    for file in mapped:
        if file.path is not None and file.holds(tensor):
            return {**about, "file": file.path.name, "begin": tensor.data_ptr() - file.span[0]}
    raise RuntimeError(
        f"{owner}: state[{name!r}] of parameter {place} was replaced by a tensor outside of {directory}, "
        "which must hold all state. Copy into the tensor that was there."
    )
