"""The optimizers: float32 state, optim8's two roundings, the second moment itself in codes, and the peers."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterable

import torch
from shared.subjects import PEERS, Make, peer
from torch import Tensor
from torch.nn import Parameter

REFERENCE = "torch AdamW"
OURS = "optim8 dithered"
DIRECT = "v itself, dithered"


class CodedAdamW(torch.optim.Optimizer):
    """AdamW with both moments in dithered codes, as in optim8, but of the second moment itself.

    `root`: of its root, which is what optim8 does; for comparison.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        root: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay})
        self.root = root

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, **{key: group[key] for key in self.defaults})

    def _update(
        self,
        parameter: Parameter,
        gradient: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        from optim8 import codec

        state = self.state[parameter]
        step = state["step"] = state.get("step", 0) + 1
        moments = []
        for signed in (True, False):
            held = state.get(signed)
            values = torch.zeros(parameter.numel()) if held is None else codec.dequantize(*held, signed=signed)
            moments.append(values.square_() if self.root and not signed else values)
        flat = gradient.flatten()
        first = moments[0].lerp_(flat, 1 - betas[0])
        second = moments[1].mul_(betas[1]).addcmul_(flat, flat, value=1 - betas[1])
        blocks = torch.arange(codec.blocks(parameter.numel()))
        for place, (signed, values) in enumerate(((True, first), (False, second.sqrt() if self.root else second))):
            state[signed] = codec.quantize_dithered(values, blocks, signed=signed, step=step, place=place)
        parameter.mul_(1 - lr * weight_decay)
        scale = (second / (1 - betas[1] ** step)).sqrt_().add_(eps)
        parameter.add_((first / scale).view_as(parameter), alpha=-lr / (1 - betas[0] ** step))


def subjects(peers: bool) -> dict[str, Make]:
    """The optimizers that are here, by name; the smallest tensors have 8-bit state too, where one can ask for it."""
    import optim8

    ours = functools.partial(optim8.AdamW8bit, min_8bit_size=0)
    found: dict[str, Make] = {
        REFERENCE: torch.optim.AdamW,
        OURS: ours,
        "optim8 nearest": functools.partial(ours, rounding="nearest"),
        DIRECT: CodedAdamW,
    }
    for library in PEERS if peers else ():
        if importlib.util.find_spec(library):
            make = peer(library)
            # torchao keeps less than 4096 values in float32, whatever one asks for.
            found[library] = functools.partial(make, min_8bit_size=0) if library == "bitsandbytes" else make
    return found


def step_without_compiler(name: str) -> contextlib.AbstractContextManager[object]:
    """torchao's step would be compiled for each shape, for a minute in all; its formulas are the same without."""
    return torch.compiler.set_stance("force_eager") if name == "torchao" else contextlib.nullcontext()


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
