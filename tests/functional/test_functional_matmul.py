"""matmul_4bit: any number of rows times a packed weight, in tiles, with gradients. test_functional_sizes.py has its
small sizes."""

from __future__ import annotations

import pytest
import torch

from optim8 import functional as F
from optim8.functional import matmul

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = torch.ops.optim8


def near(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, terms: int) -> bool:
    """Within the rounding of a float32 sum of so many terms, of tiles to the dtype, and of the result."""
    eps = torch.finfo(actual.dtype).eps
    bound = magnitude * (terms * torch.finfo(torch.float32).eps + 2 * eps) + torch.finfo(actual.dtype).tiny
    return actual.shape == expected.shape and bool(((actual.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(300, 96), (70, 333), (5, 4096), (3, 5001)], ids=str)
def test_values_and_gradients_over_many_tiles(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, shape: tuple[int, int], dtype: torch.dtype, nested: bool
) -> None:
    """Tiles of some rows, whose first value may lie within a byte, a block or a block of scales."""
    monkeypatch.setattr(matmul, "_TILE_VALUES", {"cpu": 1500, "cuda": 1500})
    for blocksize, kind, storage in ((32, "nf4", torch.uint8), (256, "fp4", torch.bfloat16)):
        weight = torch.randn(shape, device=device) / 8
        packed, state = F.quantize_4bit(
            weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind, quant_storage=storage
        )
        weight = F.dequantize_4bit(packed, state)
        for leading in ((), (1,), (2, 3)):
            A = torch.randn(*leading, shape[1], device=device).to(dtype).requires_grad_()
            bias = torch.randn(shape[0], device=device).to(dtype).requires_grad_()
            actual = F.matmul_4bit(A, packed.t(), state, bias=bias)
            rounded = weight.to(dtype).double() if len(leading) > 1 else weight.double()
            expected = torch.nn.functional.linear(A.double(), rounded, bias.double())
            magnitude = torch.nn.functional.linear(A.double().abs(), weight.double().abs(), bias.double().abs())
            assert near(actual, expected, magnitude, shape[1])
            with torch.no_grad():
                out = torch.empty_like(actual)
                assert F.matmul_4bit(A, packed, state, out, bias) is out
                assert torch.equal(out, actual)
            gradient = torch.randn_like(actual)
            of_A, of_bias = torch.autograd.grad(actual, (A, bias), gradient)
            wide = gradient.double().abs()
            assert near(of_A, gradient.double() @ weight.to(dtype).double(), wide @ weight.double().abs(), shape[0])
            sums = gradient.double().reshape(-1, shape[0]).sum(0)
            assert near(of_bias, sums, wide.reshape(-1, shape[0]).sum(0), 8)


def test_only_a_tile_of_the_weight_is_unpacked(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(matmul, "_TILE_VALUES", {"cpu": 4096, "cuda": 4096})
    tiles, memory = matmul._Weight.tiles, set()

    def watched(weight: matmul._Weight, dtype: torch.dtype) -> object:
        for rows, tile in tiles(weight, dtype):
            memory.add((tile.untyped_storage().data_ptr(), tile.untyped_storage().nbytes()))
            yield rows, tile

    monkeypatch.setattr(matmul._Weight, "tiles", watched)
    packed, state = F.quantize_nf4(torch.randn(1000, 128, device=device), compress_statistics=True)
    A = torch.randn(4, 128, device=device, requires_grad=True)
    product = F.matmul_4bit(A, packed, state)
    assert len(memory) == 1
    assert memory.pop()[1] <= 4 * (4096 + 64)
    product.sum().backward()
    assert memory.pop()[1] <= 4 * (4096 + 64)


def test_one_row_is_that_of_gemv_and_its_bias_is_rounded_once(device: torch.device) -> None:
    packed, state = F.quantize_nf4(torch.randn(33, 256, device=device))
    row = torch.randn(1, 256, device=device).bfloat16()
    assert torch.equal(F.matmul_4bit(row, packed, state), F.gemv_4bit(row, packed, state=state))
    bias = 1000 * torch.randn(33, device=device)
    wide = F.gemv_4bit(row.float(), packed, state=state)
    assert torch.equal(F.matmul_4bit(row, packed, state, bias=bias), (wide + bias).bfloat16())


def test_scales_nested_in_other_blocks_and_offsets_of_other_dtypes(device: torch.device) -> None:
    weight, A = torch.randn(64, 64, device=device), torch.randn(4, 64, device=device)
    packed, state = F.quantize_nf4(weight, compress_statistics=True)
    for dtype in (torch.float16, torch.bfloat16):
        state.offset = state.offset.to(dtype)
        expected = A @ F.dequantize_4bit(packed, state).t()
        assert torch.allclose(F.matmul_4bit(A, packed, state), expected, atol=1e-5)
    codes, state2 = F.quantize_blockwise(F.quantize_nf4(weight)[1].absmax, blocksize=64)
    state.absmax, state.state2, state.offset = codes, state2, torch.zeros((), device=device)
    expected = A @ F.dequantize_4bit(packed, state).t()
    assert torch.allclose(F.matmul_4bit(A, packed, state), expected, atol=1e-5)


def test_second_derivatives() -> None:
    packed, state = F.quantize_nf4(torch.randn(4, 6))
    A = torch.randn(3, 6, requires_grad=True)
    gradient = torch.randn(3, 4, requires_grad=True)
    (of_A,) = torch.autograd.grad(F.matmul_4bit(A, packed, state), A, gradient, create_graph=True)
    (of_gradient,) = torch.autograd.grad(of_A.sum(), gradient)
    weight = F.dequantize_4bit(packed, state)
    assert torch.allclose(of_gradient, torch.ones(3, 6) @ weight.t(), atol=1e-5)


def test_a_weight_with_columns_first_warns(device: torch.device) -> None:
    weight, A = torch.randn(6, 8, device=device), torch.randn(2, 6, device=device, requires_grad=True)
    packed, state = F.quantize_nf4(weight)
    bias = torch.randn(8, device=device)
    with pytest.warns(DeprecationWarning, match=r"\(6, 8\) is taken as \[K, N\]"):
        product = F.matmul_4bit(A, packed, state, bias=bias)
    assert torch.allclose(product, A @ F.dequantize_4bit(packed, state) + bias, atol=1e-6)
    product.sum().backward()
    assert torch.allclose(A.grad, F.dequantize_4bit(packed, state).sum(1).expand(2, 6), atol=1e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"shapeB": [5, 8, 1]}, r"shapeB must be \(N, K\)"),
        ({"shapeB": [8, 5]}, r"A must be \[..., 5\]"),
        ({"blocksize": 48}, "blocksize must be one of"),
        ({"quant_type": "af4"}, "quant_type must be"),
        ({"absmax": torch.ones(3)}, "absmax must have 1 entries"),
        ({"absmax_8bit": torch.zeros(1, dtype=torch.uint8)}, "absmax_code must be a torch.Tensor, got NoneType"),
        ({"bias": torch.ones(4)}, "bias must have 5 entries"),
        ({"B": torch.zeros(21, dtype=torch.uint8)}, "B must have 20 entries"),
    ],
    ids=str,
)
def test_the_operator_checks_its_arguments(change: dict[str, object], words: str) -> None:
    packed, state = F.quantize_nf4(torch.randn(5, 8))
    given = {"A": torch.randn(2, 8), "B": packed, "shapeB": [5, 8], "absmax": state.absmax}
    with pytest.raises((TypeError, ValueError), match=words):
        OPS.gemm_4bit(**{**given, "blocksize": 64, "quant_type": "nf4", **change})


def test_gemv_is_nearer_to_the_exact_product_than_torch() -> None:
    """The figure in the docstring of gemv_4bit: torch rounds the weight to the dtype of the row first."""
    packed, state = F.quantize_nf4(torch.randn(1024, 1024))
    row = torch.randn(1, 1024).bfloat16()
    expected = row.double() @ F.dequantize_4bit(packed, state).double().t()
    weight = F.dequantize_4bit(packed, state).bfloat16()
    ours = (F.gemv_4bit(row, packed, state=state).double() - expected).square().mean().sqrt()
    theirs = (torch.matmul(row, weight.t()).double() - expected).square().mean().sqrt()
    assert 1.2 < theirs / ours < 1.8, (ours, theirs)
