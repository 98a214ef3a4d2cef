"""Entries of a config, read alike for all families."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]


class UnknownShapes(ValueError):
    """This package does not know the shapes of such a model."""


def size(config: Mapping[str, Any], name: str, default: int | None = None, other: str | None = None) -> int:
    """A whole number of at least 1 from the config.

    Args:
        other: a second name of the same option.

    Raises:
        ValueError: the entry is something else, or missing without a default; or the two names have different values.
    """
    value, same = config.get(name), config.get(other) if other else None
    if value is not None and same is not None and value != same:
        raise ValueError(f"optim8.memory.plan: {name!r} and {other!r} must agree, got {value!r} and {same!r}.")
    value = same if value is None else value
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        got = "nothing" if value is None else repr(value)
        names = f"{name!r} or {other!r}" if other else repr(name)
        raise ValueError(f"optim8.memory.plan: the config needs {names}, a whole number of at least 1, got {got}.")
    return value


class Reader(dict[str, Any]):
    """A config that remembers which of its options a reader used."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return super().get(name, default)

    def check(self, kind: str) -> None:
        """Check that the reader used every option whose name suggests an effect on sizes.

        Raises:
            UnknownShapes: it ignored one.
        """
        for name, value in self.items():
            if value and name not in self._read | _NO_SIZE and _SIZE.search(name):
                raise UnknownShapes(
                    f"optim8.memory.plan: what {name}={value!r} does to a {kind!r} is not written down here"
                )


_SIZE = re.compile(r"^(n|num|tie|add)_|(^|_)(size|sizes|dim|dims|layers|heads|experts|rank|bias)$")
# Options without effect on sizes: attention patterns, experts in use, heads that share a width, labels of another head,
# generation.
_NO_SIZE = {
    *("max_window_layers", "num_experts_per_tok", "num_attention_heads", "n_head", "n_ctx", "num_labels"),
    *("tie_word_embeddings", "intermediate_size", "num_beams", "num_beam_groups", "num_return_sequences"),
}


def head(config: Mapping[str, Any], name: str, architecture: str, tied: bool, shape: tuple[int, ...]) -> Shapes:
    """The output layer of a language model; nothing where it shares the embedding's weight."""
    if architecture.endswith(("LMHeadModel", "ForCausalLM")):
        return {} if config.get("tie_word_embeddings", tied) else {name: shape}
    if architecture.endswith("Model") and not architecture.endswith("HeadsModel"):
        return {}
    raise UnknownShapes(f"optim8.memory.plan: the shapes of a {architecture!r} are not written down here")
