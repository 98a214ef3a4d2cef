"""Where a program is recorded, transformed or run for shapes alone, the functions give their values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from optim8 import functional as F

Results = tuple[torch.Tensor, ...]
Program = Callable[[torch.Tensor], Results]


def blockwise(x: torch.Tensor) -> Results:
    codes, state = F.quantize_blockwise(x, blocksize=64)
    return codes, state.absmax, F.dequantize_blockwise(codes, state)


def nested(x: torch.Tensor) -> Results:
    packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    return packed, state.offset, F.dequantize_4bit(packed, state)


def row(x: torch.Tensor) -> Results:
    packed, state = F.quantize_nf4(x)
    return (F.gemv_4bit(x[:1], packed, state=state),)


def rows(x: torch.Tensor) -> Results:
    packed, state = F.quantize_4bit(x, compress_statistics=True)
    return (F.matmul_4bit(x, packed, state, bias=x[:, 0]),)


def integers(x: torch.Tensor) -> Results:
    codes, stats, _ = F.int8_vectorwise_quant(x)
    sums = F.int8_linear_matmul(codes, codes)
    scaled = F.int8_scaled_mm(codes, codes, stats, stats)
    return codes, F.int8_vectorwise_dequant(codes, stats), F.int8_mm_dequant(sums, stats, stats), scaled


def both_ways(x: torch.Tensor) -> Results:
    return F.int8_double_quant(x)[:4]


class Watch(TorchDispatchMode):
    """Any mode that looks at operations: what it does not see, it cannot record, count or replace."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


PROGRAMS: tuple[Program, ...] = (blockwise, nested, row, rows, integers, both_ways)
WAYS: dict[str, Callable[[Program, torch.Tensor], Program]] = {
    "make_fx": lambda program, x: make_fx(program)(x),
    "make_fx fake": lambda program, x: make_fx(program, tracing_mode="fake")(x),
    "functionalize": lambda program, _: torch.func.functionalize(program),
    "torch.jit.trace": lambda program, x: torch.jit.trace(program, (x,), check_trace=False),
    "vmap": lambda program, _: lambda x: tuple(y[0] for y in torch.vmap(program)(x[None])),
}
# torch has no type for an operator's optional tensor there.
REFUSED = {(program, way) for program in (integers, both_ways) for way in ("torch.jit.trace", "vmap")}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes are fixed in a trace, and that vmap runs one after the other
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_recorded_program_gives_the_values_of_the_functions(program: Program, way: str) -> None:
    first, second = torch.randn(16, 64), torch.randn(16, 64)
    if (program, way) in REFUSED:
        with pytest.raises(RuntimeError, match="optim8::int8"):
            WAYS[way](program, first)(second)
        return
    recorded = WAYS[way](program, first)
    for x in (first, second):
        for actual, expected in zip(recorded(x), program(x), strict=True):
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_dispatch_mode_sees_the_operators(program: Program) -> None:
    x = torch.randn(16, 64)
    with Watch() as watch:
        results = program(x)
    assert all(torch.equal(*pair) for pair in zip(results, program(x), strict=True))
    assert any(name.startswith("optim8.") for name in watch.seen)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_meta_tensors_have_the_shapes_of_results(program: Program) -> None:
    for actual, expected in zip(program(torch.empty(16, 64, device="meta")), program(torch.randn(16, 64)), strict=True):
        assert (actual.shape, actual.dtype, actual.device.type) == (expected.shape, expected.dtype, "meta")


def test_a_trace_is_not_used_for_sizes_that_it_does_not_fit() -> None:
    recorded = torch.jit.trace(nested, (torch.randn(16, 64),), check_trace=False)
    x = torch.randn(32, 64)
    try:
        results = recorded(x)
    except (ValueError, RuntimeError):
        return
    assert all(torch.equal(*pair) for pair in zip(results, nested(x), strict=True))


@pytest.mark.parametrize("program", [integers, nested, rows], ids=lambda program: program.__name__)
def test_one_graph_serves_many_sizes(program: Program) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (16, 24):
        x = torch.randn(size, 64)
        assert all(torch.equal(*pair) for pair in zip(compiled(x), program(x), strict=True))


def test_the_gradient_of_a_compiled_product() -> None:
    packed, state = F.quantize_nf4(torch.randn(5, 64))
    x = torch.randn(3, 64)
    leaf = x.clone().requires_grad_()
    F.matmul_4bit(leaf, packed, state).square().sum().backward()
    torch._dynamo.reset()
    other = x.clone().requires_grad_()
    torch.compile(F.matmul_4bit, fullgraph=True, backend="aot_eager")(other, packed, state).square().sum().backward()
    assert torch.equal(other.grad, leaf.grad)
