"""timm's registry of optimizers: `opt="adamw8bit"`, and every other class by its name in small letters."""

from __future__ import annotations

import inspect
from typing import Any

from optim8.integrations.hooks import after_import
from optim8.integrations.names import in_small_letters


def install() -> None:
    """Register the optimizers with timm, now or when the program imports it."""
    after_import("timm.optim._optim_factory", _register)


def _register(factory: Any) -> None:
    for name, cls in in_small_letters().items():
        if not name.endswith("8bit"):
            continue  # 32-bit names are timm's own, or those of bitsandbytes
        known = inspect.signature(cls).parameters
        betas = known["betas"].default if "betas" in known else ()
        factory.default_registry.register(
            factory.OptimInfo(
                name=name,
                opt_class=cls,
                description=f"optim8.{cls.__name__}",
                has_eps="eps" in known,
                has_momentum="momentum" in known,
                has_betas=bool(betas),
                num_betas=len(betas) or 2,
            )
        )
