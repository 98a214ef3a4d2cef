"""The kernels of optim8, and torch's fused AdamW beside them, each as a call on one large tensor."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from shared.subjects import REFERENCE, Case, least_traffic, make_parameters, optim8_subjects, torch_subjects

BLOCKSIZE = 256


@dataclass(frozen=True)
class Kernel:
    """`call` does the work once over `values` values and moves at least `traffic` bytes from or to memory."""

    name: str
    dtype: str
    call: Callable[[], object]
    values: int
    traffic: int


def kernels(count: int, dtype: torch.dtype) -> list[Kernel]:
    """The step of each optimizer for one parameter of `count` values, and quantization of as many, in place."""
    return [*_steps(count, dtype), *_blockwise(count, dtype)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _steps(count: int, dtype: torch.dtype) -> list[Kernel]:
    parameters = make_parameters(Case("one", [(count,)]), dtype)
    subjects = {REFERENCE: torch_subjects()[REFERENCE], **optim8_subjects(small=False)}
    steps = []
    for name, make in subjects.items():
        optimizer = make(parameters)
        optimizer.step()  # makes the state, whose size counts
        steps.append(Kernel(name, _name(dtype), optimizer.step, count, least_traffic(parameters, optimizer)))
    return steps


def _blockwise(count: int, dtype: torch.dtype) -> list[Kernel]:
    from optim8 import functional

    values = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, state = functional.quantize_blockwise(values, blocksize=BLOCKSIZE)
    traffic = values.nbytes + codes.nbytes + state.absmax.nbytes

    def quantize() -> object:
        return functional.quantize_blockwise(values, absmax=state.absmax, out=codes, blocksize=BLOCKSIZE)

    def dequantize() -> object:
        return functional.dequantize_blockwise(codes, state, out=values)

    return [
        Kernel("optim8 quantize_blockwise", _name(dtype), quantize, count, traffic),
        Kernel("optim8 dequantize_blockwise", _name(dtype), dequantize, count, traffic),
    ]
