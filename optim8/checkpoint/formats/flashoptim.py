"""What FlashOptim's Adam, AdamW, Lion and SGD save (0.1.4): moments in 8 bits with a float16 scale for every 32, or
floats; and for 16-bit weights what their parameter lacks, as shares of half its last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from optim8.checkpoint.formats import common, groups, rest, torch_optim
from optim8.rules import Moment, Moments
from optim8.state import report
from optim8.state.moments import Codes, Entry, Source

_CODES, _SCALES, _REST = "::quantized", "::scales", "error_bits"
_GROUP = 32  # values of one scale
_WIDTH = "master_bytewidth"  # of a group; `_unpack` puts it beside the error bits
_DROPPED = (_WIDTH, "quantize")
_HALVES = (torch.bfloat16, torch.float16)
_ADAM = ("lr", "betas", "eps", "weight_decay")
_OPTIONS = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "lion": ("lr", "betas", "weight_decay"),
    "sgd": ("lr", "momentum", "dampening", "weight_decay"),
}
# Where no step is counted: as of lion-pytorch, and torch's SGD.
_UNCOUNTED = {"exp_avg": 0.0, "momentum_buffer": 1.0}


def _claims(saved: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> bool:
    return any(_WIDTH in group for group in saved)


def _unpack(state_dict: dict[str, Any]) -> dict[str, Any]:
    state = dict(state_dict["state"])
    for group in state_dict["param_groups"]:
        for key in group["params"]:
            if state.get(key):
                state[key] = {**state[key], _WIDTH: group.get(_WIDTH)}
    return {**state_dict, "state": state}


def _read_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    groups.check_owner(where, rule, group, _OPTIONS)
    groups.check(where, rule, group)
    if rule == "sgd" and group.get("weight_decay") and _DECOUPLED not in group:
        what = f"is {group['weight_decay']:g}, and nothing says whether FlashSGD or FlashSGDW wrote it"
        common.fail(where, "['weight_decay']", what, _WHOSE)
    read = {name: value for name, value in groups.known_only(rule, group).items() if name not in _DROPPED}
    return {**read, "amsgrad": False} if rule in ("adam", "adamw") else read


_DECOUPLED = "decoupled_weight_decay"
_WHOSE = (
    f"After FlashSGD put {_DECOUPLED!r}: False into the group. FlashSGDW's decay is decoupled, and SGD8bit has none of "
    "that kind: after it set weight_decay to 0 in the dict."
)


def _read_entry(where: str, moments: Moments, param: torch.Tensor, entry: dict[str, Any]) -> Entry:
    names = [moment.name for moment in moments] or ["momentum_buffer"]  # zeros, where another group has a momentum
    known = [name + end for name in names for end in ("", _CODES, _SCALES)]
    common.no_other_keys(where, entry, ["step", _WIDTH, _REST, *known])
    uncounted = _UNCOUNTED[names[0]] if len(names) == 1 and "step" not in entry else None
    read: Entry = {"step": common.step(where, entry) if uncounted is None else uncounted}
    for moment in moments:
        read[moment.name] = _read_moment(where, moment, param, entry)
    if entry.get(_REST) is not None:
        _read_rest(where, moments, param, entry, read)
    if len(moments) == 2:
        first, second = (read[moment.name] for moment in moments)
        if isinstance(first, Codes) and isinstance(second, Codes):
            key = names[1] + _CODES
            report.note(f"{where}[{key!r}]", lambda: (second.codes == 0) & (first.codes != 0), _COARSE)
        else:
            torch_optim.note_zeros(where, moments, read)
    return read


_COARSE = (
    "are 0 where the first moment is not: FlashOptim keeps roots in 255 even steps up to the largest of 32. Their next "
    "steps are up to lr / eps times the first moment, there as here."
)


def _read_moment(where: str, moment: Moment, param: torch.Tensor, entry: Mapping[str, Any]) -> Source:
    key, key_of_scales = moment.name + _CODES, moment.name + _SCALES
    if key not in entry:
        return common.tensor(where, entry, moment.name, common.FLOATS, param.shape)
    codes = common.tensor(where, entry, key, (torch.int8 if moment.signed else torch.uint8,), param.shape)
    if type(codes) is not torch.Tensor or not codes.is_contiguous():
        # Its scales are for values that lie one after the other, in each shard.
        what = f"must be a plain contiguous tensor, got {type(codes).__name__} with strides {codes.stride()}"
        common.fail(where, f"[{key!r}]", what, "Save it with compress_state_dict=False.")
    count = -(-codes.numel() // _GROUP)
    # With a bfloat16 parameter they go by that dtype, so that torch does not cast them; their bits are float16's.
    scales = common.tensor(where, entry, key_of_scales, _HALVES, (count,)).view(torch.float16)
    if bool((scales == torch.inf).any()):
        what = "is infinite: FlashOptim's scales end at 65504, and the values of those groups are lost"
        common.fail(where, f"[{key_of_scales!r}]", what, "Leave the state of this parameter out.")
    common.absmax(where, key_of_scales, scales)
    return Codes(codes.view(torch.uint8), scales.to(torch.float32), _table(moment.signed), _GROUP, not moment.signed)


@cache
def _table(signed: bool) -> torch.Tensor:
    """What each byte stands for, over the scale: the root of a second moment in even steps, and of others x where
    127 * 2x / (1 + |x|) is the code."""
    if not signed:
        return torch.arange(256, dtype=torch.float32) / 255
    y = torch.arange(256, dtype=torch.uint8).view(torch.int8).to(torch.float32).clamp(min=-127) / 127
    return y / (2 - y.abs())


def _read_rest(where: str, moments: Moments, param: torch.Tensor, entry: Mapping[str, Any], read: Entry) -> None:
    width = entry[_WIDTH]
    if width not in _WHOLE:
        what = f"is there, and {_WIDTH!r} of its group is {width!r}: it must be {' or '.join(map(str, _WHOLE))}"
        common.fail(where, f"[{_REST!r}]", what, "The checkpoint is damaged.")
    whole = _WHOLE[width]
    saved = common.tensor(where, entry, _REST, (whole, *_HALVES), param.shape)
    share = saved
    if saved.dtype != whole:
        # In the parameter's dtype, so that torch does not cast it: the bits of two bytes, or the number of one.
        share = saved.view(whole) if whole == torch.int16 else saved.to(whole)
        if whole == torch.int8 and not torch.equal(share.to(saved.dtype), saved):
            common.fail(where, f"[{_REST!r}]", "must be whole numbers from -127 to 127", "The checkpoint is damaged.")
    if param.dtype not in ((saved.dtype,) if saved.dtype in _HALVES else _HALVES):
        rest.leave(where, _REST, share)  # shares of another parameter's last bit
    else:
        rest.put(where, _REST, moments, param, rest.of_shares(param, share), read)


_WHOLE = {3: torch.int8, 4: torch.int16}  # the dtype of shares by the bytes of a whole weight


def _options(rule: str) -> Sequence[str]:
    return (*_OPTIONS[rule], _WIDTH)


def _has(rule: str) -> bool:
    return rule in _OPTIONS


FORMAT = common.Format("FlashOptim", False, _claims, _read_group, _read_entry, _options, _has, unpack=_unpack)
