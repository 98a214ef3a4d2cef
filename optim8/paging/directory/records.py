"""The small files of a directory of state. After a kill or a power cut each is the old one or the new one, and the
error for one that cannot be read names it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = 1  # of these files


class Records:
    """The files of one directory."""

    def __init__(self, owner: str, directory: Path) -> None:
        self.owner, self.directory = owner, directory

    def write(self, name: str, content: bytes) -> None:
        """Replace a file; it is on the disk when this returns."""
        beside = self.directory / f".{name}.new"
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.directory / name)
        self.sync_names()

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Replace a file; it is on the disk when this returns."""
        self.write(name, json.dumps({"format": FORMAT, **content}).encode())

    def read_json(self, name: str, needs: Mapping[str, type], advice: str) -> dict[str, Any] | None:
        """The content that write_json wrote; None where there is no such file.

        Args:
            name: of the file.
            needs: the entries that it must have, with their types.
            advice: what to do where it is damaged.

        Raises:
            ValueError: it is damaged, or of a newer version.
        """
        try:
            text = (self.directory / name).read_bytes()
        except FileNotFoundError:
            return None
        if not text:
            raise self.damage_error(name, "it is empty", advice)
        try:
            content = json.loads(text)
        except ValueError as error:
            raise self.damage_error(name, f"it is no JSON: {error}", advice) from error
        if not isinstance(content, dict):
            raise self.damage_error(name, f"it is a {type(content).__name__} and no object", advice)
        if content.get("format", FORMAT) != FORMAT:
            raise ValueError(
                f"{self.owner}: {self.directory / name} is of format {content['format']!r}, and this version of optim8 "
                f"reads format {FORMAT}. Update optim8 to the version that wrote it. {advice}"
            )
        for key, kind in needs.items():
            if not isinstance(content.get(key), kind):
                raise self.damage_error(name, f"its {key!r} must be of type {kind.__name__}", advice)
        return content

    def write_options(self, name: str, groups: list[dict[str, Any]]) -> None:
        """Replace a file of options of parameter groups. It need not be on the disk when this returns."""
        beside = self.directory / f".{name}.new"
        torch.save(groups, beside)
        beside.replace(self.directory / name)

    def read_options(self, name: str, advice: str) -> list[dict[str, Any]]:
        """The options that write_options wrote.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        try:
            groups = torch.load(self.directory / name, weights_only=True)
        except FileNotFoundError as error:
            raise self.damage_error(name, "it is not there", advice) from error
        except Exception as error:  # of zipfile, pickle or torch, whatever is in the file
            kind = type(error).__name__
            raise self.damage_error(name, f"torch.load ends with {kind}: {str(error)[:100]!r}", advice) from error
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise self.damage_error(name, "it is no list of the options of parameter groups", advice)
        return groups

    @contextlib.contextmanager
    def parsing(self, name: str, advice: str) -> Iterator[None]:
        """Turn errors of the block, which reads a file's content, into one that names the file."""
        try:
            yield
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise self.damage_error(name, f"{type(error).__name__} {error}", advice) from error

    def damage_error(self, name: str, why: str, advice: str) -> ValueError:
        """The error for a file that cannot be read."""
        return ValueError(
            f"{self.owner}: {self.directory / name} must be as optim8 wrote it, and is damaged: {why}. {advice}"
        )

    def sync_names(self) -> None:
        """Write the list of files to the disk."""
        _sync(self.directory)

    def sync(self) -> None:
        """Write all files to the disk."""
        for path in self.directory.iterdir():
            _sync(path)
        self.sync_names()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
