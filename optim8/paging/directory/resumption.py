"""Which state a resumed run goes on with: that of the last step, or that of the checkpoint that was noted last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from optim8.paging.directory import fingerprint

if TYPE_CHECKING:
    from optim8.paging.directory.state import Kept


def returns(kept: Kept, problem: str, live: Mapping[int, str], params: Sequence[torch.Tensor]) -> bool:
    """Whether to return to the checkpoint. The parameters tell where they can; where the state of the last step cannot
    be used, or a kill has left no word of its parameters, it is the checkpoint.

    Args:
        kept: the directory, with `checkpoint`.
        problem: why the state of the last step cannot be used, or "".
        live: fingerprints of the parameters that the last step left.
        params: the parameters that the optimizer has now.

    Raises:
        RuntimeError: neither can be used.
    """
    last, steps = kept.checkpoint, kept.journal.steps
    copy = last if last is not None and last.layout else None
    if kept.pager.resume == "checkpoint":
        if copy is None:
            raise RuntimeError(
                f"{kept.owner}: resume='checkpoint' needs a copy of the state at a checkpoint, and {kept.directory} "
                f"has none: {'no checkpoint was noted' if last is None else f'{last} was noted without'}. "
                + (f"{problem} {kept.advice}" if problem else f"Pass resume=True to go on with that of step {steps}.")
            )
        return True
    if problem:
        if copy is None or kept.pager.changed_params:
            raise RuntimeError(f"{kept.owner}: {problem} {kept.advice}")
        return True
    if kept.pager.changed_params:
        return False
    if live:
        return copy is not None and not fingerprint.match(live, params) and fingerprint.match(copy.params, params)
    if kept.journal.synced or last is None:
        return False
    if copy is None and last.step != steps:
        raise RuntimeError(
            f"{kept.owner}: the state in {kept.directory} is of step {steps}, the last checkpoint of step {last.step} "
            f"({last.what}), and a kill has left no word of the parameters of step {steps}. {kept.advice} If you have "
            f"the parameters of step {steps}, resume with Pager(..., changed_params=True)."
        )
    return copy is not None


def check_params(kept: Kept, params: Sequence[torch.Tensor]) -> None:
    """Raise ValueError where parameters are not those of `kept.expected`."""
    now = {place: fingerprint.of(params[place]) for place in kept.expected}
    others = [place for place, text in now.items() if text not in (None, kept.expected[place])]
    if not others:
        return
    first, last, steps = others[0], kept.checkpoint, kept.journal.steps
    was, is_now = (fingerprint.dtype_in(str(texts[first])) for texts in (kept.expected, now))
    dtypes = f"It was {was} and is {is_now}. " if was != is_now else ""
    more = f", nor are {len(others) - 1} others" if others[1:] else ""
    if kept.returns:
        when = f"{last} was noted, to which the state in {kept.directory} has returned"
    elif kept.journal.has_params:
        when = f"the state in {kept.directory} was flushed or closed after step {steps}"
    else:
        when = f"the state in {kept.directory} was stepped last (step {steps})"
    advice = (
        "Load the parameters of that step. If they were changed on purpose, resume with Pager(..., "
        f"{'resume=' + repr('checkpoint') + ', ' if kept.returns else ''}changed_params=True)."
    )
    if last is not None and last.layout and not kept.returns and fingerprint.match(last.params, params):
        advice = (
            f"They are those of {last}: to go on from there, load them before the optimizer is made, or resume with "
            "Pager(..., resume='checkpoint')."
        )
    elif last is not None and not kept.returns:
        advice = f"The last checkpoint is {last}. {advice}"
    raise ValueError(
        f"{kept.owner}: parameter {first} is not what it was when {when}{more}. {dtypes}Parameters and state are of "
        f"different steps, or one is of another run. {advice}"
    )
