"""A plugin of axolotl: `plugins: [optim8.integrations.axolotl.Optim8Plugin]` in its configuration."""

from __future__ import annotations

import importlib.util
from typing import Any

from optim8.integrations import transformers

_HERE = importlib.util.find_spec("axolotl") is not None
_Base: Any = importlib.import_module("axolotl.integrations.base").BasePlugin if _HERE else object


class Optim8Plugin(_Base):  # type: ignore[misc]
    """Runs the names of optimizers that axolotl hands to transformers' Trainer on optim8: adamw_bnb_8bit, paged_*, ...

    axolotl's own names (`ao_adamw_8bit`, `muon`, ...) stay what they are there.
    """

    def register(self, cfg: Any) -> None:
        """Install the shim; `cfg` is not looked at."""
        transformers.install()
