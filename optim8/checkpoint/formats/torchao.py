"""What torchao's low-bit Adam and AdamW save: torch.optim's names, with tensors of their own classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optim8.checkpoint.formats import common, torch_optim
from optim8.rules import Moments
from optim8.state.moments import Codes, Entry, same_table

# Its classes are told by their names, so that nothing of it is imported.
_IN_8_BITS = "OptimState8bit"
_OTHERS = ("OptimState4bit", "OptimStateFp8")


def _is_theirs(value: Any) -> bool:
    return type(value).__name__ in (_IN_8_BITS, *_OTHERS)


def _claims(groups: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> bool:
    return any(_is_theirs(value) for entry in entries for value in entry.values())


def _read_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    read = torch_optim.read_group(where, rule, group)
    if isinstance(read.get("lr"), torch.Tensor):
        read["lr"] = float(read["lr"])  # a tensor there whatever the user gave
    return read


def _read_entry(where: str, moments: Moments, param: torch.Tensor, entry: dict[str, Any]) -> Entry:
    # The classes do not take part in the checks of plain tensors: what they say of themselves is their dtype.
    floats = {key: value.dequantize() if type(value).__name__ in _OTHERS else value for key, value in entry.items()}
    plain = {key: torch.empty((), dtype=v.dtype).expand(v.shape) if _is_theirs(v) else v for key, v in floats.items()}
    read = torch_optim.FORMAT.read_entry(where, moments, param, plain)
    for moment in moments:
        read[moment.name] = value = floats[moment.name]
        if _is_theirs(value):
            scales = common.absmax(where, moment.name, value.scale)
            codes = common.tensor(where, {moment.name: value.codes}, moment.name, (torch.uint8,), param.shape)
            table = None if same_table(moment, value.qmap) else value.qmap
            read[moment.name] = Codes(codes, scales, table, value.block_size)
    return read


def _has(rule: str) -> bool:
    return rule in ("adam", "adamw")


FORMAT = common.Format("torchao", False, _claims, _read_group, _read_entry, torch_optim.options, _has)
