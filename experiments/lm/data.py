"""Byte-level text, split into a training and a validation part, with batches that depend on the seed alone."""

import hashlib
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCES = ("_pydecimal", "argparse", "inspect", "typing")
VALIDATION_SHARE = 0.1  # the end of the text, never trained on


@dataclass(frozen=True)
class Text:
    """`training` and `validation` are uint8 [bytes]; `name` and `sha256` identify the whole text in results."""

    name: str
    sha256: str
    training: Tensor
    validation: Tensor


def load_text(path: Path | None, context: int) -> Text:
    """Reads `path`, or without one the language reference that ships with every CPython (about 465 kB).

    ValueError where a part would be too short for one sequence of `context` bytes and its target.
    """
    if path is None:
        from pydoc_data.topics import topics

        name = "pydoc_data.topics"
        content = "\n".join(topics[topic] for topic in sorted(topics)).encode()
    else:
        name, content = path.name, path.read_bytes()
    return _parts(name, content, context)


def load_source(context: int) -> Text:
    """Source code that ships with every CPython, other text than the language reference (about as long)."""
    content = b"\n".join(Path(inspect.getfile(importlib.import_module(name))).read_bytes() for name in SOURCES)
    return _parts("source of " + ", ".join(SOURCES), content, context)


def _parts(name: str, content: bytes, context: int) -> Text:
    split = int(len(content) * (1 - VALIDATION_SHARE))
    if len(content) - split <= context:
        raise ValueError(
            f"load_text: the last {VALIDATION_SHARE:.0%} of the text must be longer than the context of {context} "
            f"bytes, got {len(content) - split} of {len(content)} bytes. Pass a longer text or a smaller --context."
        )
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return Text(name, hashlib.sha256(content).hexdigest(), values[:split], values[split:])


def random_batch(values: Tensor, batch: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [batch, context] each, at places drawn from `generator` (a CPU generator)."""
    starts = torch.randint(len(values) - context, (batch,), generator=generator)
    return _windows(values, starts, context)


def all_batches(values: Tensor, batch: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole of `values` in sequences that do not overlap, at most `batch` at a time; a short rest is left out."""
    starts = torch.arange(0, len(values) - context, context)
    for first in range(0, len(starts), batch):
        yield _windows(values, starts[first : first + batch], context)


def _windows(values: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = values[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]
