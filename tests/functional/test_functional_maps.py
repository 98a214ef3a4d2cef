"""Code tables against their definitions."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import reference
import torch
from support import functional_reference as ref

from optim8 import functional as F


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_has_the_published_bits(signed: bool) -> None:
    table = F.create_dynamic_map(signed).numpy()
    assert hashlib.sha256(table.tobytes()).hexdigest() == reference.MAP_SHA256[signed]


def test_the_default_maps_are_the_signed_ones() -> None:
    assert torch.equal(F.create_dynamic_map(), F.create_dynamic_map(True, 7, 8))
    assert torch.equal(F.create_linear_map(), F.create_linear_map(True, 8, True))
    assert torch.equal(F.create_fp8_map(), F.create_fp8_map(True, 5, 2, 8))
    assert torch.equal(F.create_normal_map(), F.create_normal_map(0.9677083, True))


@pytest.mark.parametrize("total_bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_every_dynamic_map_is_whole(signed: bool, total_bits: int) -> None:
    for exponent_bits in range(1, total_bits):
        table = F.create_dynamic_map(signed, exponent_bits, total_bits)
        assert table.shape == (256,)
        assert table.dtype == torch.float32
        assert (table.diff() >= 0).all()
        assert len(table.unique()) == 2**total_bits
        assert table[-1] == 1
        assert (table == 0).sum() == 257 - 2**total_bits
        lowest = table[0].item()
        assert -1 < lowest < 0 if signed else lowest == 0
        # The lowest of `exponent_bits` decades holds 2^(bits the exponent leaves) values of each sign, evenly.
        n = 2 ** (total_bits - exponent_bits - int(signed))
        smallest = table[table > 0][0].item()
        assert smallest == pytest.approx(10.0 ** (1 - exponent_bits) * (0.1 + 0.45 / n), rel=1e-6)


@pytest.mark.parametrize("total_bits", range(2, 9))
def test_linear_maps(total_bits: int) -> None:
    n = 2**total_bits
    for signed, add_zero, expected in (
        (False, True, np.arange(n) / (n - 1)),
        (True, True, np.arange(-(n // 2 - 1), n // 2) / (n // 2 - 1)),
        (True, False, np.arange(-(n - 1), n, 2) / (n - 1) if n == 256 else None),
    ):
        table = F.create_linear_map(signed, total_bits, add_zero)
        if expected is None:  # fewer than 8 bits always have their zero
            assert torch.equal(table, F.create_linear_map(True, total_bits, True))
            continue
        padded = np.sort(np.concatenate([expected, np.zeros(256 - len(expected))]))
        assert np.array_equal(table.numpy(), padded.astype(np.float32))


@pytest.mark.parametrize("offset, extra", [(0.9677083, True), (0.9677083, False), (0.95, True), (0.6, False)])
def test_normal_maps_are_quantiles(offset: float, extra: bool) -> None:
    table = F.create_normal_map(offset, extra).double().numpy()
    assert len(table) == 256
    positive, negative = table[table > 0], -table[table < 0][::-1]
    top = math.sqrt(2) * _inverse_erf(2 * offset - 1)
    for values, count in ((positive, 8 if extra else 7), (negative, 7)):
        assert len(values) == count
        quantiles = [0.5 * (1 + math.erf(value * top / math.sqrt(2))) for value in values]
        assert quantiles == pytest.approx(np.linspace(0.5, offset, count + 1)[1:], abs=1e-7)


def _inverse_erf(y: float) -> float:
    low, high = 0.0, 6.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle) < y else (low, middle)
    return low


def test_normal_map_holds_nf4() -> None:
    table = F.create_normal_map()
    assert np.array_equal(np.unique(table.numpy()), ref.NF4)


@pytest.mark.parametrize(
    "signed, exponent_bits, precision_bits", [(True, 5, 2), (True, 4, 3), (False, 5, 3), (True, 2, 1), (True, 7, 0)]
)
def test_fp8_maps(signed: bool, exponent_bits: int, precision_bits: int) -> None:
    total = exponent_bits + precision_bits + int(signed)
    table = F.create_fp8_map(signed, exponent_bits, precision_bits, total).double().numpy()
    values = []
    for pattern in range(2 ** (exponent_bits + precision_bits)):
        exponent, fraction = pattern >> precision_bits, (pattern % 2**precision_bits) / 2**precision_bits
        values.append(2.0 ** (exponent - 1) * (1 + fraction) if exponent else fraction / 4)
    magnitudes = np.array(values) / max(values)
    expected = np.concatenate([magnitudes, -magnitudes]) if signed else magnitudes
    expected = np.sort(np.concatenate([expected, np.zeros(256 - len(expected))]))
    assert np.array_equal(table, expected.astype(np.float32))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nf4", ref.NF4),
        ("fp4", ref.FP4),
        ("int4", np.array([*range(7, -1, -1), *range(0, -8, -1)], np.float32) / np.float32(7)),
    ],
)
def test_get_4bit_type(device: torch.device, name: str, expected: np.ndarray) -> None:
    table = F.get_4bit_type(name, device)
    assert table.device.type == device.type
    assert table.dtype == torch.float32
    assert table.cpu().numpy().tobytes() == (expected + np.float32(0)).tobytes()


def test_af4() -> None:
    table = F.get_4bit_type("af4", "cpu")
    assert table.shape == (16,)
    assert (table.diff() < 0).all()
    assert (table[0], table[8], table[-1]) == (1, 0, -1)


def test_tables_are_not_shared_with_the_caller(device: torch.device) -> None:
    F.get_4bit_type("nf4", device).zero_()
    F.create_dynamic_map().zero_()
    assert F.get_4bit_type("nf4", device).any()
    assert F.quantize_blockwise(torch.ones(3, device=device))[0].tolist() == [255] * 3
