"""The module optim8._cuda itself, built over the shim of cuda_on_cpu: arguments in, results and errors out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import optim8.functional as F
from optim8 import _native

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_on_cpu"))
import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", build.module())
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def results(x: torch.Tensor) -> list[torch.Tensor]:
    codes, state = F.quantize_blockwise(x, blocksize=256)
    packed, state4 = F.quantize_4bit(x, quant_type="nf4")
    rows, columns, of_rows, of_columns, outliers = F.int8_double_quant(x, threshold=2.0)
    assert outliers is not None
    sums = F.int8_linear_matmul(rows, rows)
    return [
        *(codes, state.absmax, F.dequantize_blockwise(codes, state)),
        *(packed, state4.absmax, F.dequantize_4bit(packed, state4), F.gemv_4bit(x[:1], packed.t(), state=state4)),
        *(rows, columns, of_rows, of_columns, outliers),
        *(F.int8_vectorwise_dequant(rows, of_rows), sums, F.int8_mm_dequant(sums, of_rows, of_rows, bias=of_rows)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_functional_api_gives_what_it_gives_on_the_cpu(
    module: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(24, 100).to(dtype)
    expected = results(x)
    monkeypatch.setattr(_native, "module_for", lambda device, who: module)
    for i, (mine, theirs) in enumerate(zip(results(x), expected, strict=True)):
        assert torch.equal(mine.flatten(), theirs.flatten()), i


def test_the_maps_are_those_of_the_cpu(module: ModuleType) -> None:
    for signed in (True, False):
        assert module.dynamic_map(signed) == _native.cpu().dynamic_map(signed)
        assert module.zero_code(signed) == _native.cpu().zero_code(signed)
    assert module.step_block == _native.cpu().step_block


@pytest.mark.parametrize(
    "change, message",
    [
        ({"absmax": torch.empty(3)}, "absmax must have 4 entries"),
        ({"out": torch.empty(1000)}, "out must be uint8"),
        ({"code": torch.empty(16)}, "code must have 256 entries"),
        ({"A": torch.empty(1000, dtype=torch.float64)}, "A must be float32, bfloat16 or float16"),
        ({"A": torch.empty(2000)[::2]}, "A must be contiguous"),
        ({"blocksize": 0}, "blocksize must be from 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(module: ModuleType, change: dict[str, object], message: str) -> None:
    arguments = {
        "A": torch.zeros(1000),
        "code": torch.tensor(module.dynamic_map(True)),
        "blocksize": 256,
        "out": torch.empty(1000, dtype=torch.uint8),
        "absmax": torch.empty(4),
        "threads": 1,
    }
    module.quantize_blockwise(**arguments)
    with pytest.raises(ValueError, match=message):
        module.quantize_blockwise(**{**arguments, **change})
