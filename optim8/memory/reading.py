"""What reading a config of any family needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]


class Unwritten(ValueError):
    """The shapes of this kind of model are not written down in this package."""


def size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of at least 1 from the config.

    Raises:
        ValueError: it is something else, or missing without a default.
    """
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        got = "nothing" if value is None else repr(value)
        raise ValueError(f"optim8.memory.plan: the config needs {name!r}, a whole number of at least 1, got {got}.")
    return value


def head(config: Mapping[str, Any], name: str, architecture: str, tied: bool, shape: tuple[int, ...]) -> Shapes:
    """The output layer of a language model; nothing where it is the embedding."""
    if architecture.endswith(("LMHeadModel", "ForCausalLM")):
        return {} if config.get("tie_word_embeddings", tied) else {name: shape}
    if architecture.endswith("Model") and not architecture.endswith("HeadsModel"):
        return {}
    raise Unwritten(f"optim8.memory.plan: the shapes of a {architecture!r} are not written down here")
