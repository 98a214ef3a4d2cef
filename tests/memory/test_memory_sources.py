"""What a plan is read from: safetensors files by their headers, the folder of a model, a name on a hub."""

from __future__ import annotations

import json
import struct
import sys
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_memory_configs import GPT2, QWEN3_MOE

import optim8
from optim8.__main__ import main

BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "C64": 8, "F8_E4M3": 1, "F4": 0.5}


def header(entries: dict[str, Any]) -> bytes:
    """The header of a safetensors file; entries without data_offsets get those of their dtype and shape."""
    begin, complete = 0, {}
    for name, entry in entries.items():
        complete[name] = entry
        if name != "__metadata__" and "dtype" in entry and "data_offsets" not in entry:
            end = begin + int(prod(entry["shape"]) * BYTES[entry["dtype"]])
            complete[name] = {**entry, "data_offsets": [begin, end]}
            begin = end
    text = json.dumps(complete).encode()
    return struct.pack("<Q", len(text)) + text


def test_a_safetensors_file_is_planned_by_its_header(tmp_path: Path) -> None:
    parts = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    parts[0].write_bytes(header({"__metadata__": {"format": "pt"}, "a": {"dtype": "BF16", "shape": [64, 100]}}))
    parts[1].write_bytes(header({"b": {"dtype": "F32", "shape": []}, "ids": {"dtype": "I64", "shape": [7]}}))
    planned = optim8.memory.plan(parts)
    assert planned.bytes["parameters"] == 64 * 100 * 2 + 4
    assert planned.bytes["codes"] == 2 * 6400
    assert planned.bytes["buffers"] == 56 + (64 - 4) * 2  # the integers, and two single values in 64 bytes each
    assert planned.dtypes == ("bfloat16", "float32")
    assert optim8.memory.plan(parts, dtype="float16").bytes["parameters"] == 64 * 100 * 2 + 2
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": parts[0].name, "b": parts[1].name}}))
    assert optim8.memory.plan(index).bytes == planned.bytes
    index.write_text(json.dumps({"weight_map": {"a": parts[0].name, "b": "3.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"3\.safetensors must be .* no such file"):
        optim8.memory.plan(index)


def test_bytes_of_a_file_are_those_of_its_offsets(tmp_path: Path) -> None:
    """Dtypes of any width, also such as this package has not heard of."""
    path = tmp_path / "model.safetensors"
    entries = {
        "w": {"dtype": "BF16", "shape": [8, 8]},
        "half": {"dtype": "F4", "shape": [32, 16]},
        "pair": {"dtype": "C64", "shape": [5]},
        "new": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [1000, 1006]},
    }
    path.write_bytes(header(entries))
    planned = optim8.memory.plan(path, "torch-adamw", beside=False)
    assert planned.bytes["parameters"] == 128
    assert planned.bytes["buffers"] == 256 + 40 + 6
    assert "302 B of tensors that are no floats" in str(planned)


@pytest.mark.peers
def test_files_of_safetensors_itself(tmp_path: Path) -> None:
    torch, save = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").save_file
    tensors = {
        "w": torch.ones(6, 4, dtype=torch.float16),
        "pair": torch.ones(3, 2, dtype=torch.complex64),
        "codes": torch.ones(7, dtype=torch.uint8),
    }
    save(tensors, tmp_path / "model.safetensors")
    planned = optim8.memory.plan(tmp_path / "model.safetensors", "torch-adamw", beside=False)
    assert (planned.bytes["parameters"], planned.bytes["buffers"]) == (48, 48 + 7)


def test_a_folder_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"must hold one of config\.json, .*, and holds none"):
        optim8.memory.plan(tmp_path)
    for name, shape in (("b", [64, 100]), ("a", [7])):
        (tmp_path / f"{name}.safetensors").write_bytes(header({name: {"dtype": "F32", "shape": shape}}))
    assert optim8.memory.plan(str(tmp_path), beside=False).size == 6407
    (tmp_path / "config.json").write_text(json.dumps({**GPT2, "dtype": "float16"}))
    planned = optim8.memory.plan(tmp_path, beside=False)
    assert (planned.size, planned.dtypes) == (124_439_808, ("float16",))
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(ValueError, match=r"holds an adapter alone.*Pass the whole PEFT model"):
        optim8.memory.plan(tmp_path)


def test_a_name_on_the_hub_is_read_from_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_MOE))

    def cached(name: str, file: str) -> Any:
        return str(path) if (name, file) == ("Qwen/Qwen3-30B-A3B", "config.json") else None

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(try_to_load_from_cache=cached))
    assert optim8.memory.plan("Qwen/Qwen3-30B-A3B", beside=False).size == 30_532_122_624
    assert main(["plan", "Qwen/Qwen3-30B-A3B"]) == 0
    capsys.readouterr()
    for library in (SimpleNamespace(try_to_load_from_cache=cached), None):
        monkeypatch.setitem(sys.modules, "huggingface_hub", library)
        assert main(["plan", "some/other"]) == 2
        assert "hf download some/other config.json" in capsys.readouterr().err
    assert main(["plan", "some/other.json"]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.json", None, "no such file"),
        ("list.json", b"[1]", "must hold a JSON object"),
        ("text.json", b"{", "must be JSON"),
        ("empty.safetensors", b"", "has no header"),
        ("cut.safetensors", struct.pack("<Q", 100) + b"{", "has no header"),
        ("huge.safetensors", struct.pack("<Q", 2**63), "has no header"),
        ("odd.safetensors", header({"a": {"shape": [1]}}), "has no header"),
        (
            "short.safetensors",
            header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
            "a is F32 of shape [3], and data_offsets give 8 bytes",
        ),
        ("folder", None, "no such file"),
    ],
)
def test_what_is_no_model_is_refused(
    name: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(["plan", str(path)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out
