"""QuantState: its items, equality, moves and both forms of its dict."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from support.harness import bits

from optim8 import functional as F

CASES = [
    (quant_type, nested, dtype)
    for quant_type in ("nf4", "fp4", None)
    for nested in (False, True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


def make(
    quant_type: str | None, nested: bool, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, F.QuantState]:
    x = torch.randn(30, 50, device=device).to(dtype)
    if quant_type is None:
        return F.quantize_blockwise(x, blocksize=64, nested=nested)
    return F.quantize_4bit(x, quant_type=quant_type, compress_statistics=nested)


@pytest.mark.parametrize("quant_type, nested, dtype", CASES, ids=str)
def test_a_dict_gives_the_state_back(
    device: torch.device, quant_type: str | None, nested: bool, dtype: torch.dtype
) -> None:
    packed, state = make(quant_type, nested, dtype, device)
    plain = state.as_dict()
    keys = ["quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"]
    more = ["nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset"]
    assert list(plain) == keys + (more if nested else [])
    forms = [plain] if quant_type is None else [plain, state.as_dict(packed=True)]
    for form in forms:
        for prefix in ("", "model.layers.0.weight."):
            given = {prefix + key: value for key, value in form.items()}
            given[prefix + "bias"] = torch.ones(3)
            before = dict(given)
            found = F.QuantState.from_dict(given, device)
            assert found == state
            assert found.shape == state.shape
            assert found.nested == nested
            assert list(given) == list(before)
            assert all(given[key] is before[key] for key in given)
            if quant_type is not None:
                assert bits(F.dequantize_4bit(packed, found)) == bits(F.dequantize_4bit(packed, state))
            else:
                assert bits(F.dequantize_blockwise(packed, found)) == bits(F.dequantize_blockwise(packed, state))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_packed_form_is_tensors_with_the_key_of_the_field(
    device: torch.device, quant_type: str, nested: bool
) -> None:
    _, state = make(quant_type, nested, torch.float16, device)
    packed = state.as_dict(packed=True)
    key = f"quant_state.bitsandbytes__{quant_type}"
    tensors = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    assert list(packed) == [*tensors, key]
    assert all(isinstance(value, torch.Tensor) for value in packed.values())
    text = json.loads(bytes(packed[key].tolist()))
    expected = {"quant_type": quant_type, "blocksize": 64, "dtype": "float16", "shape": [30, 50]}
    if nested:
        offset = state.offset.item()
        expected |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    assert text == expected


def test_through_safetensors_and_torch_save(device: torch.device, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    packed, state = make("nf4", True, torch.bfloat16, device)
    tensors = {"w." + key: value.clone() for key, value in state.as_dict(packed=True).items()} | {"w": packed}
    safetensors.save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    for loaded in (
        safetensors.load_file(tmp_path / "x.safetensors"),
        torch.load(tmp_path / "x.pt", weights_only=True),
    ):
        found = F.QuantState.from_dict(loaded, device)
        assert found == state
        assert bits(F.dequantize_4bit(loaded["w"].to(device), found)) == bits(F.dequantize_4bit(packed, state))


def test_items() -> None:
    _, flat = make("nf4", False, torch.float16, torch.device("cpu"))
    _, nested = make("nf4", True, torch.float16, torch.device("cpu"))
    assert [flat[i] for i in range(1, 6)] == [torch.Size([30, 50]), torch.float16, 64, None, "nf4"]
    assert flat[0] is flat.absmax
    assert nested[4] == [nested.offset, nested.state2]
    assert flat[-1] == "nf4"
    assert len(list(flat)) == 6
    with pytest.raises(IndexError):
        flat[6]


def test_equality_sees_every_difference() -> None:
    _, state = make("nf4", True, torch.float16, torch.device("cpu"))
    assert state == copy.deepcopy(state)
    assert state == pickle.loads(pickle.dumps(state))
    assert state != 3
    changes = {
        "absmax": state.absmax + 1,
        "shape": torch.Size([50, 30]),
        "code": state.code * 2,
        "blocksize": 128,
        "quant_type": "fp4",
        "dtype": torch.float32,
        "offset": state.offset + 1,
        "state2": None,
    }
    for name, value in changes.items():
        other = copy.deepcopy(state)
        setattr(other, name, value)
        assert other != state, name
    with pytest.raises(TypeError):
        hash(state)


def test_to_moves_every_tensor() -> None:
    _, state = make("nf4", True, torch.float16, torch.device("cpu"))
    assert state.to("meta") is state
    moved = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert {tensor.device.type for tensor in moved} == {"meta"}


def test_repr_is_short() -> None:
    _, state = make("nf4", True, torch.float16, torch.device("cpu"))
    fields = "quant_type='nf4', shape=torch.Size([30, 50]), dtype=torch.float16, blocksize=64, nested=True"
    assert repr(state) == f"QuantState({fields})"
