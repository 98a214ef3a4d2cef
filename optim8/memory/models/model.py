"""A model as names, shapes and dtypes of its parameters, from a module, a config or the header of a file."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from optim8.memory.models import builder, configs
from optim8.memory.models.entries import UnknownShapes
from optim8.state import shards
from optim8.text import size_cell

# Names of dtypes in safetensors. A tensor that is no float of at least 16 bits takes memory, but is not trained.
_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LONGEST_HEADER = 100_000_000  # bytes; what the format allows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter: its name, the whole of it, and the shape of the part that one device holds."""

    name: str
    whole: torch.Tensor  # of a module: the parameter itself; else a tensor on the meta device
    local: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool = True
    embedding: bool = False  # the weight of an embedding

    @property
    def size(self) -> int:
        """Values of the local part."""
        return prod(self.local)

    @property
    def nbytes(self) -> int:
        """Bytes of the local part."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Model:
    """All parameters of a model, each once however often the model uses it, and the bytes of its other tensors."""

    title: str
    parameters: tuple[Parameter, ...]
    buffer_bytes: int = 0
    device: str | None = None  # "cpu" or "cuda"; None where the source does not say
    sharded: bool = False  # its parameters are DTensors
    notes: tuple[str, ...] = ()  # remarks, a sentence each


def read(source: Any, dtype: torch.dtype | None) -> Model:
    """The model behind `source`.

    Args:
        source: a module; a config, as a dict or an object with `to_dict`; the path of a JSON config or of a safetensors
            file (or a list of such files, or the index of one in parts), or of a folder with them; a name on the
            Hugging Face hub whose config is in the local cache; or a mapping of names to shapes.
        dtype: of every parameter; None for the dtype that the source states, else float32.

    Raises:
        TypeError, ValueError: the source is nothing of that, or its content makes no sense; the message says what is
            wrong.
    """
    if isinstance(source, torch.nn.Module):
        return _of_module(source, dtype)
    if isinstance(source, (str, Path)):
        return _of_path(source, dtype)
    if isinstance(source, (list, tuple)) and source and all(isinstance(part, (str, Path)) for part in source):
        return _of_files(source, dtype)
    if hasattr(source, "to_dict"):
        source = source.to_dict()
    if isinstance(source, Mapping):
        return _of_config(source, dtype)
    raise TypeError(
        "optim8.memory.plan: the model must be a torch.nn.Module, a config (dict, or an object with to_dict), a path "
        f"of a JSON config or a safetensors file, or a dict of shapes, got {type(source).__name__}."
    )


def dtype_of(value: Any) -> torch.dtype:
    """The dtype of a name such as "bfloat16" or "torch.bfloat16", or `value` itself."""
    if isinstance(value, torch.dtype):
        return value
    found = DTYPES.get(str(value).removeprefix("torch."))
    if found is None:
        raise ValueError(f"optim8.memory.plan: dtype must be one of {', '.join(DTYPES)}, got {value!r}.")
    return found


def _meta(shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


# Names that embeddings have where there is no module to ask, such as model.embed_tokens.weight.
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)\.weight$")


def _parameter(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Parameter:
    return Parameter(name, _meta(shape, dtype), shape, dtype, embedding=_EMBEDDING.search(name) is not None)


def _of_module(module: torch.nn.Module, dtype: torch.dtype | None) -> Model:
    parameters = []
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    for name, param in module.named_parameters():
        shape = tuple(shards.local(param).shape)
        embedding = id(param) in embeddings
        parameters.append(Parameter(name, param, shape, dtype or param.dtype, param.requires_grad, embedding))
    buffers = sum(shards.local(buffer).nbytes for buffer in module.buffers())
    devices = {param.device.type for param in module.parameters()} - {"meta"}
    if len(devices) > 1:
        raise ValueError(
            f"optim8.memory.plan: parameters must be on one device, got {', '.join(sorted(devices))}. Plan the parts "
            "on their own, or move the model to the meta device."
        )
    cut = any(shards.is_dtensor(param) for param in module.parameters())
    return Model(type(module).__name__, tuple(parameters), buffers, next(iter(devices), None), cut)


def _of_files(paths: Sequence[str | Path], dtype: torch.dtype | None) -> Model:
    if len(paths) == 1:
        return _of_path(paths[0], dtype)
    parts = [_of_path(path, dtype) for path in paths]
    parameters = sum((part.parameters for part in parts), ())
    others = sum(part.buffer_bytes for part in parts)
    return Model(f"{parts[0].title} and {len(parts) - 1} more", parameters, others, notes=_notes(others))


def _of_path(given: str | Path, dtype: torch.dtype | None) -> Model:
    path = Path(given)
    if path.is_dir():
        return _of_folder(path, dtype)
    if path.is_file():
        return _of_file(path, dtype)
    if _HUB_NAME.fullmatch(str(given)) and path.suffix not in _SUFFIXES:
        return _of_file(_in_hub_cache(str(given)), dtype)
    raise FileNotFoundError(
        f"optim8.memory.plan: {path} must be a JSON config, a safetensors file or a folder of a model; no such file."
    )


# Files that transformers writes to the folder of a model; the one that says most about a training comes first.
_IN_FOLDER = ("config.json", "model.safetensors.index.json", "*.safetensors")
_SUFFIXES = (".json", ".safetensors")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def _of_folder(folder: Path, dtype: torch.dtype | None) -> Model:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"optim8.memory.plan: {folder} holds an adapter alone, which trains beside the model that it is for. Pass "
            "the whole PEFT model, built under torch.device('meta')."
        )
    for pattern in _IN_FOLDER:
        files = sorted(folder.glob(pattern))
        if files:
            return _of_files(files, dtype)
    raise FileNotFoundError(f"optim8.memory.plan: {folder} must hold one of {', '.join(_IN_FOLDER)}, and holds none.")


def _in_hub_cache(name: str) -> Path:
    """The config of a model of the Hugging Face hub that an earlier download has left in the cache."""
    try:
        found = importlib.import_module("huggingface_hub").try_to_load_from_cache(name, "config.json")
    except (ImportError, ValueError):  # not installed; no name of a model
        found = None
    if isinstance(found, str):
        return Path(found)
    raise FileNotFoundError(
        f"optim8.memory.plan: {name} is no file or folder here. If it is a model of the Hugging Face hub, get its "
        f"config first, which plan does not do itself: hf download {name} config.json"
    )


def _of_file(path: Path, dtype: torch.dtype | None) -> Model:
    if path.suffix == ".safetensors":
        return _of_safetensors(path, dtype)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"optim8.memory.plan: {path.name} must be JSON or end in .safetensors: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"optim8.memory.plan: {path.name} must hold a JSON object, got {type(config).__name__}.")
    named = config.get("weight_map")  # of the index of a safetensors file in parts
    if isinstance(named, dict) and named:
        return _of_files([path.parent / str(part) for part in sorted(set(map(str, named.values())))], dtype)
    return _of_config(config, dtype)


def _of_safetensors(path: Path, dtype: torch.dtype | None) -> Model:
    """Read the header alone: 8 bytes with its length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= _LONGEST_HEADER else b""
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        parameters, others = [], 0
        for name, entry in entries.items():
            kind, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
            begin, end = map(int, entry["data_offsets"])
            if kind not in _SAFETENSORS:
                others += end - begin
                continue
            if end - begin != prod(shape) * _SAFETENSORS[kind].itemsize:
                raise ValueError(f"{name} is {kind} of shape {list(shape)}, and data_offsets give {end - begin} bytes")
            parameters.append(_parameter(name, shape, dtype or _SAFETENSORS[kind]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"optim8.memory.plan: {path.name} has no header of a safetensors file: {error}.") from None
    return Model(path.name, tuple(parameters), others, notes=_notes(others))


def _notes(others: int) -> tuple[str, ...]:
    if not others:
        return ()
    return (
        f"{size_cell(others)} of tensors that are no floats of 16 bits or more are counted as the model's buffers: "
        "they take memory and are not trained.",
    )


def _of_config(config: Mapping[str, Any], dtype: torch.dtype | None) -> Model:
    if config.get("quantization_config"):
        raise ValueError(
            "optim8.memory.plan: the config is of a quantized model (quantization_config), whose parameters it does "
            "not tell. Take that entry out to plan the model as it is without, or pass the model or its safetensors "
            "file."
        )
    stated = config.get("dtype", config.get("torch_dtype"))
    dtype = dtype or (dtype_of(stated) if isinstance(stated, (str, torch.dtype)) else torch.float32)
    try:
        title, shapes = configs.shapes(config)
    except UnknownShapes as error:
        return _of_module(builder.build(config, str(error)), dtype)
    return Model(title, tuple(_parameter(name, shape, dtype) for name, shape in shapes.items()))
