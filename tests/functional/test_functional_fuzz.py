"""Random arguments to every entry point for a bounded time: a result or a documented error, never a crash."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from optim8 import functional as F

SECONDS = 6.0
DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int8, torch.int32, torch.int64),
    *(torch.bool, torch.complex64),
)
FUNCTIONS = [getattr(F, name) for name in F.__all__ if name != "QuantState"]


class Source:
    """Random arguments, most of them nearly right."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def shape(self) -> tuple[int, ...]:
        return tuple(self.pick(0, 1, 2, 3, 7, 8, 16, 64, 65, 128) for _ in range(self.pick(0, 1, 2, 2, 2, 3)))

    def tensor(self, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        dtype = self.pick(*dtypes) if dtypes and self.random.random() < 0.9 else self.pick(*DTYPES)
        shape = self.shape() if shape is None or self.random.random() < 0.1 else shape
        width = torch.empty((), dtype=dtype).element_size()
        count = int(torch.tensor(shape, dtype=torch.int64).prod()) if shape else 1
        stored = torch.randint(0, 256, (count * width,), dtype=torch.uint8, generator=self.generator)
        made = (stored != 0).view(shape) if dtype == torch.bool else stored.view(dtype).view(shape)
        if dtype.is_floating_point and self.random.random() < 0.5:
            made = torch.randn(shape, generator=self.generator).to(dtype)
        change = self.random.random()
        if made.dim() == 2 and change < 0.1:
            return made.t()
        if made.dim() and made.shape[-1] > 1 and change < 0.15:
            return made[..., ::2]
        return made

    def state(self) -> Any:
        """A state that was made, and then perhaps damaged."""
        x = torch.randn(self.shape(), generator=self.generator).to(self.pick(torch.float32, torch.bfloat16))
        quantize = self.pick(F.quantize_blockwise, F.quantize_nf4, F.quantize_fp4)
        nested = {"nested" if quantize is F.quantize_blockwise else "compress_statistics": self.pick(True, False)}
        _, state = quantize(x, blocksize=self.pick(64, 128, 4096), **nested)
        for _ in range(self.pick(0, 0, 0, 1, 2)):
            name = self.pick("absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset", "state2")
            value = self.pick(
                None, 64, -1, "nf4", "fp4", torch.float16, torch.int8, self.shape(), torch.Size(self.shape()),
                self.tensor(torch.float32), self.tensor(torch.uint8), state, (2**62, 4), (-1,),
            )  # fmt: skip
            setattr(state, name, value)
        return self.pick(state, state, state, state, None, 3, {})

    def dict_(self) -> Any:
        state = F.quantize_4bit(
            torch.randn(self.shape()), quant_type=self.pick("nf4", "fp4"), compress_statistics=True
        )[1]
        entries = state.as_dict(packed=self.pick(True, False))
        for key in list(entries):
            change = self.random.random()
            if change < 0.06:
                del entries[key]
            elif change < 0.15:
                entries[key] = self.pick(None, -1, 1e30, "x", [1, 2**70], [], self.tensor(), self.tensor(torch.uint8))
            elif change < 0.2 and isinstance(entries[key], torch.Tensor) and entries[key].dtype == torch.uint8:
                entries[key] = entries[key][: self.pick(0, 1, 10)]
            elif change < 0.25:
                entries["p." + key] = entries.pop(key)
        return self.pick(entries, entries, entries, entries, {}, [entries], {3: 4})

    def value(self, name: str) -> Any:
        """An argument of this name."""
        floats = (torch.float32, torch.bfloat16, torch.float16)
        makers: dict[str, Callable[[], Any]] = {
            "A": lambda: self.tensor(*self.pick(floats, (torch.uint8,), (torch.int8,), (torch.int32,))),
            "B": lambda: self.tensor(torch.int8, torch.uint8),
            "g": lambda: self.tensor(torch.float32, shape=(64,)),
            "p": lambda: self.tensor(torch.float32, shape=(64,)),
            "code": lambda: self.pick(None, F.create_linear_map(), self.tensor(torch.float32, shape=(256,))),
            "quant_state": self.state,
            "state": self.state,
            "blocksize": lambda: self.pick(32, 64, 64, 128, 4096, 0, -1, 2**40, 65, 1.5, None),
            "quant_type": lambda: self.pick("nf4", "fp4", "int4", None, 4),
            "typename": lambda: self.pick("nf4", "fp4", "int4", "af4", "x", None),
            "quant_storage": lambda: self.pick(*DTYPES, "uint8"),
            "dtype": lambda: self.pick(*DTYPES),
            "threshold": lambda: self.pick(0.0, 1.0, 1e-300, 1e300, -1.0, float("nan"), "x"),
            "optimizer_name": lambda: self.pick("adam", "lion", "sgd"),
            "tensors": lambda: self.pick([self.tensor()], [None], [], [3]),
            "qmap1": lambda: F.create_dynamic_map(True),
            "qmap2": lambda: self.pick(None, F.create_dynamic_map(False)),
            "device": lambda: self.pick("cpu", torch.device("cpu"), "x"),
            "offset": lambda: self.pick(0.9, 0.5, 2.0, float("nan")),
        }
        if name in makers:
            return makers[name]() if name == "device" or self.random.random() < 0.97 else self.pick(None, 3, "x", [])
        if name in ("state1", "state2"):
            return self.pick(None, self.tensor(torch.float32, torch.uint8, shape=(64,)))
        if name in (
            "absmax",
            "absmax1",
            "absmax2",
            "stats",
            "row_stats",
            "col_stats",
            "bias",
            "out_row",
            "out_col",
            "out",
        ):
            return self.pick(
                None, self.tensor(torch.float32, torch.uint8, torch.int8), torch.zeros(1), torch.zeros(2), 3
            )
        if name in ("unorm_vec",):
            return None
        if name.endswith("bits"):
            return self.pick(0, 1, 2, 3, 5, 7, 8, 9, -1)
        if name in ("step", "lr", "beta1", "beta2", "eps", "weight_decay", "gnorm_scale"):
            return self.pick(1, 2, 10)
        return self.pick(False, False, False, True, 0.0)


def names_of(function: Callable[..., Any]) -> list[str]:
    code = function.__code__
    return list(code.co_varnames[: code.co_argcount])


@pytest.mark.parametrize("seed", range(2))
def test_functions_give_a_result_or_an_error(seed: int) -> None:
    source, results, errors = Source(seed), 0, 0
    end = time.monotonic() + SECONDS / 2
    while time.monotonic() < end:
        function = source.pick(*FUNCTIONS)
        arguments = {name: source.value(name) for name in names_of(function) if source.random.random() < 0.95}
        try:
            function(**arguments)
            results += 1
        except (TypeError, ValueError):
            errors += 1
        except RuntimeError:
            if function is not F.is_on_gpu:
                pytest.fail(f"{function.__name__}({arguments})"[:2000])
            errors += 1
    assert results > 20
    assert errors > 20


def test_dicts_give_a_state_or_an_error() -> None:
    source, results, errors = Source(7), 0, 0
    end = time.monotonic() + SECONDS / 3
    while time.monotonic() < end:
        entries = source.dict_()
        try:
            state = F.QuantState.from_dict(entries, "cpu")
            results += 1
            F.dequantize_4bit(source.tensor(torch.uint8), state)
        except (TypeError, ValueError):
            errors += 1
    assert results > 20
    assert errors > 20


def test_random_bytes_make_values() -> None:
    """Any codes are codes: whatever bytes come with a state of the right sizes, there is a result."""
    source = Source(8)
    end = time.monotonic() + SECONDS / 6
    while time.monotonic() < end:
        shape = source.shape()
        x = torch.randn(shape, generator=source.generator)
        codes, state = F.quantize_blockwise(x, blocksize=64, nested=True)
        packed, state4 = F.quantize_4bit(x, quant_type=source.pick("nf4", "fp4"), compress_statistics=True)
        for stored in (codes, packed, state.absmax, state4.absmax):
            stored.view(-1).copy_(
                torch.randint(0, 256, (stored.numel(),), dtype=torch.uint8, generator=source.generator)
            )
        assert F.dequantize_blockwise(codes, state).shape == shape
        assert F.dequantize_4bit(packed, state4).shape == shape
