"""The loss scale that a GradScaler hands over to a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from optim8.state.shards import local


@dataclass(frozen=True)
class Scaling:
    """What a GradScaler handed over.

    scale: float32 of one element; gradients are divided by it.
    found_inf: float32 of one element; where it is not 0, nothing is stepped.
    """

    scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    @property
    def skips(self) -> bool:
        """Whether the step is left out, as far as one knows without reading from a device."""
        found = self.found_inf
        return found is not None and found.device.type == "cpu" and bool(found.item())

    def unscale(self, groups: Iterable[dict[str, Any]]) -> None:
        """Take the scale out of the gradients after a step that was handed one, as torch's fused optimizers do."""
        if self.scale is None:
            return
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for group in groups:
            for grad in (local(param.grad) for param in group["params"] if param.grad is not None):
                by_device.setdefault(grad.device, []).append(grad)
        for device, grads in by_device.items():
            torch._foreach_div_(grads, self.scale.to(device, non_blocking=True))


UNSCALED = Scaling()


def of(optimizer: Any) -> Scaling:
    """What the GradScaler of this step has set on an optimizer."""
    return Scaling(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))
