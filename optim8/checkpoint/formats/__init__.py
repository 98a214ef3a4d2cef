"""The layouts of optimizer state that are known: ours and those of other libraries. One module for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optim8.checkpoint.formats import (
    bitsandbytes,
    common,
    flashoptim,
    groups,
    heavyball,
    optimi,
    own,
    torch_optim,
    torchao,
)
from optim8.checkpoint.formats.common import Format, check_rule, fail

# The first that claims a dict reads it. torch.optim claims dicts without state, since every library has its options.
FORMATS: tuple[Format, ...] = (
    *(own.FORMAT, bitsandbytes.FORMAT, torchao.FORMAT, optimi.FORMAT, heavyball.FORMAT, flashoptim.FORMAT),
    torch_optim.FORMAT,
)

_KNOWN = "optim8, torch.optim, bitsandbytes, torchao, optimi, heavyball, FlashOptim or lion-pytorch"


def recognise(owner: str, rule: str, state_dict: dict[str, Any]) -> Format:
    """The format of a state dict.

    Raises:
        ValueError: it is no state dict; or it is of a library that is not known (names the first key that no one
            knows); or of another library that has no such rule.
    """
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            fail(owner, repr(key), f"must be a {kind.__name__}, got {type(state_dict.get(key)).__name__}")
    saved, state = state_dict["param_groups"], state_dict["state"]
    for index, group in enumerate(saved):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            fail(owner, f"param_groups[{index}]", "must be a dict with a list of 'params'")
    ids = {key for group in saved for key in group["params"]}
    entries = {key: entry for key, entry in state.items() if key in ids and entry}
    for key, entry in entries.items():
        if not isinstance(entry, dict):
            fail(owner, f"state[{key!r}]", f"must be a dict, got {type(entry).__name__}")
    claimed = next((known for known in FORMATS if known.claims(saved, list(entries.values()))), None)
    if claimed is None:
        key, entry = next(iter(entries.items()))
        strange = next((name for name in entry if name != "step"), "step")  # every optimizer has a step
        which = f"state[{key!r}][{strange!r}]"
        fail(owner, which, f"is no state of {_KNOWN}")
    check_rule(owner, claimed, rule)
    for index, group in enumerate(saved):
        if not entries.keys().isdisjoint(group["params"]):
            where = f"{owner}: param_groups[{index}]"
            groups.check_complete(where, claimed.library, group, claimed.options(rule))
    return claimed


def of_states(entries: Sequence[dict[str, Any]]) -> Format | None:
    """The format of states without their groups, which are ours where they are in 8 bits; None: nobody knows them."""
    return next((known for known in FORMATS if entries and known.claims((), entries)), None)


__all__ = ["FORMATS", "Format", "common", "groups", "of_states", "recognise"]
