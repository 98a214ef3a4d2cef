"""The arguments of an optimizer: those of bitsandbytes beside our own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from typing_extensions import TypedDict

from optim8.step.hypers import EXTRA_DEFAULTS


class BitsandbytesArguments(TypedDict, total=False):
    """What bitsandbytes' optimizers take besides: `args` is read for what it has of `optim_bits`, `min_8bit_size` and
    the last four, which are accepted with the value that changes nothing."""

    args: object
    is_paged: bool
    percentile_clipping: int
    block_wise: bool
    max_unorm: float
    skip_zeros: bool


# Arguments of bitsandbytes' optimizers: the one value that is honoured, and what to do instead of the others.
_NEUTRAL: dict[str, tuple[Any, str]] = {
    "percentile_clipping": (100, "Clip with torch.nn.utils.clip_grad_norm_."),
    "block_wise": (True, "State is always scaled by blocks of 256 values."),
    "max_unorm": (0.0, "Clip with torch.nn.utils.clip_grad_norm_."),
    "skip_zeros": (False, "Leave parameters without a gradient at grad=None."),
}


def without_neutral(owner: str, given: dict[str, Any]) -> dict[str, Any]:
    """Leave out bitsandbytes' arguments that have the value that changes nothing; refuse any other value of them."""
    for name, (neutral, advice) in _NEUTRAL.items():
        if name in given and given[name] != neutral:
            raise ValueError(f"{owner}: {name} must be {neutral}, got {given[name]!r}. {advice}")
    return {name: value for name, value in given.items() if name not in _NEUTRAL}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: " Did you mean 'weight_decay'?", or nothing."""
    close = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def complete(owner: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Make the defaults of an optimizer from its arguments; what bitsandbytes also takes (`kwargs`) gets our names.

    Raises:
        TypeError: an argument is not known.
        ValueError: an argument cannot be honoured.
    """
    defaults = dict(defaults)
    extra: dict[str, Any] = defaults.pop("kwargs", {})
    args, is_paged = extra.pop("args", None), extra.pop("is_paged", False)
    if args is not None:
        there = [name for name in ("optim_bits", "min_8bit_size", *_NEUTRAL) if hasattr(args, name)]
        extra = {**extra, **{name: getattr(args, name) for name in there}}
    for name, value in without_neutral(owner, extra).items():
        if name not in EXTRA_DEFAULTS:
            close = did_you_mean(name, [*defaults, *BitsandbytesArguments.__annotations__])
            raise TypeError(f"{owner}: {name!r} is no argument of this optimizer.{close}")
        defaults[name] = value
    if is_paged and defaults.get("paged") is None:
        defaults["paged"] = True
    elif is_paged and not defaults["paged"]:
        raise ValueError(f"{owner}: is_paged=True contradicts paged=False. Leave one out.")
    return defaults
