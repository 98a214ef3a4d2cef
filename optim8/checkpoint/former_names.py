"""The names under which earlier versions pickled classes and functions, so that their pickles load."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType

from optim8.checkpoint import pickling
from optim8.paging import Pager
from optim8.rules import Moment

_FORMER: dict[str, Mapping[str, object]] = {
    # 0.1.0
    "optim8.optim.states": {"Moment": Moment},
    "optim8.optim.carried": {name: getattr(pickling, name) for name in ("_Part", "_allocated", "_filled")},
    "optim8.paging.options": {"Pager": Pager},
}

_OF_OPTIMIZERS = ("optim8.optim.names", "optim8.optim.aliases")  # 0.1.0, and until 2026-11


def register(optimizers: Mapping[str, object]) -> None:
    """Let pickle find what stood in modules that are gone; `optimizers`: all, by name."""
    for name, contents in {**_FORMER, **dict.fromkeys(_OF_OPTIMIZERS, optimizers)}.items():
        module = ModuleType(name, "Gone; its names are here for pickles of earlier versions.")
        vars(module).update(contents)
        sys.modules.setdefault(name, module)
