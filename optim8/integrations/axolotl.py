"""A plugin of axolotl: `plugins: [optim8.integrations.axolotl.Optim8Plugin]` in its configuration."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found, unused-ignore]

from optim8.integrations import transformers


class Optim8Plugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """Runs the names of optimizers that axolotl hands to transformers' Trainer on optim8: adamw_bnb_8bit, paged_*, ...

    axolotl's own names (`ao_adamw_8bit`, `muon`, ...) stay what they are there.
    """

    def register(self, cfg: Any) -> None:
        """Install the shim; `cfg` is not looked at."""
        transformers.install()
