"""What the tests of compiled steps share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from support.harness import hostile, parameter

SHAPES = ((40, 30), (300,), (1,), (2, 3, 5, 7))


def make_params(device: torch.device, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [
        parameter(hostile(torch.Size(shape).numel(), dtype, seed=i, small=-2, large=0).to(device).view(shape))
        for i, shape in enumerate(SHAPES)
    ]


def give_grads(params: list[torch.nn.Parameter], t: int) -> None:
    for i, p in enumerate(params):
        p.grad = hostile(p.numel(), p.dtype, seed=100 * t + i, small=-3, large=0).to(p.device).view(p.shape)


def compiled(optimizer: Any, backend: str = "aot_eager", fullgraph: bool = True) -> Callable[[], Any]:
    torch._dynamo.reset()  # what broke a graph of this code before may make torch leave it alone
    step: Callable[[], Any] = torch.compile(lambda: optimizer.step(), fullgraph=fullgraph, backend=backend)
    return step
