"""What the optimizers here save: codes and their scales, or float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optim8.optim import states
from optim8.optim.formats import common
from optim8.optim.sources import Codes, Entry, Tiled
from optim8.optim.states import Moment


def _claims(groups: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> bool:
    quantized = any(key.endswith("_absmax") for entry in entries for key in entry)
    return quantized or any("optim_bits" in group for group in groups)


def _read_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    return group


def _read_entry(where: str, moments: Sequence[Moment], param: torch.Tensor, entry: dict[str, Any]) -> Entry:
    entry = states.under_present_names(moments, entry)
    in_8_bits = moments[0].absmax in entry
    if not isinstance(entry.get("step"), (int, float)):
        common.tensor(where, entry, "step", (torch.float32,), ())
    read: Entry = {"step": common.step(where, entry)}
    known = ["step"]
    for moment in moments:
        key, kind = moment.key(in_8_bits), torch.uint8 if in_8_bits else torch.float32
        known.append(key)
        read[moment.name] = values = common.tensor(where, entry, key, (kind,), param.shape)
        if in_8_bits:
            known.append(moment.absmax)
            scales = entry.get(moment.absmax)
            if isinstance(scales, torch.Tensor) and scales.dim() > 1:
                read[moment.name] = Tiled(values, scales)
                continue
            scales = common.tensor(where, entry, moment.absmax, (torch.float32,), (states.blocks(param.numel()),))
            read[moment.name] = Codes(values, common.absmax(where, moment.absmax, scales))
    common.no_other_keys(where, entry, known)
    return read


def as_sources(moments: Sequence[Moment], entry: dict[str, Any]) -> Entry:
    """The state of an optimizer here as sources, unchecked."""
    read: Entry = {"step": entry["step"]}
    for moment in moments:
        values = moment.values(entry)
        read[moment.name] = Codes(values, entry[moment.absmax]) if moment.absmax in entry else values
    return read


FORMAT = common.Format("optim8", True, _claims, _read_group, _read_entry)
