"""NeMo's table of optimizers: `name: adamw8bit`, and every other class by its name in small letters.

NeMo 3 takes a `_target_` only from packages that it lists, and optim8 is none of them.
"""

from __future__ import annotations

from typing import Any

from optim8.integrations.hooks import after_import
from optim8.integrations.names import in_small_letters


def install() -> None:
    """Add the optimizers to NeMo's table, now or when the program imports it."""
    after_import("nemo.core.optim.optimizers", _add)


def _add(optimizers: Any) -> None:
    ours = {name: cls for name, cls in in_small_letters().items() if name.endswith("8bit")}
    optimizers.AVAILABLE_OPTIMIZERS.update(ours)
