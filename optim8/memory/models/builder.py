"""Models of any architecture that transformers knows, which builds them from their config on the meta device."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

# Where the config names no class, the first of these that has one for its model type.
_MAPPINGS = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_MAPPING")
_ELSE = "pass the model itself, built under torch.device('meta'), a safetensors file, or the shapes."


def build(config: Mapping[str, Any], reason: str) -> torch.nn.Module:
    """The module that a config describes. Nothing is allocated or downloaded, and no code of a repository runs.

    Args:
        reason: why this package cannot read the config by itself, for the error.

    Raises:
        ValueError: transformers is not installed, does not know the model, or cannot build it from this config.
    """
    kind = config["model_type"]
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError:
        raise ValueError(
            f"{reason}, and transformers, which could build it, is not installed. Install it (pip install "
            f"transformers), or {_ELSE}"
        ) from None
    rest = {name: value for name, value in config.items() if name != "model_type"}
    try:
        if kind not in library.CONFIG_MAPPING:
            raise ValueError("it knows no such model type.")
        made = library.AutoConfig.for_model(kind, **rest)
        with torch.device("meta"):
            return _class(library, made)(made)  # type: ignore[no-any-return]
    except Exception as error:  # transformers may raise anything over a config
        raise ValueError(
            f"{reason}, and transformers {library.__version__} cannot build it: {type(error).__name__}: {error} Mend "
            f"the config, or {_ELSE}"
        ) from error


def _class(library: Any, config: Any) -> Any:
    """The class that the config names, or the one that transformers has for its model type."""
    if config.architectures:
        name = config.architectures[0]
        found = getattr(library, name, None)
        if found is None:
            raise ValueError(f"architectures names {name}, which it does not have.")
        return found
    for name in _MAPPINGS:
        mapping = getattr(library, name)
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError("it has no model for it.")
