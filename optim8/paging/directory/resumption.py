"""Which state a resumed run continues with: that of the last step, or that of the last noted checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from optim8.paging.directory import fingerprint

if TYPE_CHECKING:
    from optim8.paging.directory.state import StateDirectory


def returns_to_checkpoint(
    state: StateDirectory, problem: str, live: Mapping[int, str], params: Sequence[torch.Tensor]
) -> bool:
    """Whether to return to the checkpoint. The parameters decide where they can. Where the state of the last step
    cannot be used, or a kill has left no fingerprints of its parameters, the run returns to the checkpoint.

    Args:
        state: the directory of state, with `checkpoint`.
        problem: why the state of the last step cannot be used, or "".
        live: fingerprints of the parameters that the last step left.
        params: the present parameters of the optimizer.

    Raises:
        RuntimeError: neither can be used.
    """
    last, steps = state.checkpoint, state.journal.steps
    copy = last if last is not None and last.layout else None
    if state.pager.resume == "checkpoint":
        if copy is None:
            raise RuntimeError(
                f"{state.owner}: resume='checkpoint' needs a copy of the state at a checkpoint, and {state.directory} "
                f"has none: {'no checkpoint was noted' if last is None else f'{last} was noted without'}. "
                + (f"{problem} {state.advice}" if problem else f"Pass resume=True to go on with that of step {steps}.")
            )
        return True
    if problem:
        if copy is None or state.pager.changed_params:
            raise RuntimeError(f"{state.owner}: {problem} {state.advice}")
        return True
    if state.pager.changed_params:
        return False
    if live:
        return copy is not None and not fingerprint.match(live, params) and fingerprint.match(copy.params, params)
    if state.journal.synced or last is None:
        return False
    if copy is None and last.step != steps:
        raise RuntimeError(
            f"{state.owner}: the state in {state.directory} is of step {steps}, the last checkpoint of step "
            f"{last.step} ({last.what}), and a kill has left no word of the parameters of step {steps}. {state.advice} "
            f"If you have the parameters of step {steps}, resume with Pager(..., changed_params=True)."
        )
    return copy is not None


def check_params(state: StateDirectory, params: Sequence[torch.Tensor]) -> None:
    """Raise ValueError where parameters do not have the fingerprints `state.expected`."""
    now = {place: fingerprint.of(params[place]) for place in state.expected}
    others = [place for place, text in now.items() if text not in (None, state.expected[place])]
    if not others:
        return
    first, last, steps = others[0], state.checkpoint, state.journal.steps
    was, is_now = (fingerprint.dtype_in(str(texts[first])) for texts in (state.expected, now))
    dtypes = f"It was {was} and is {is_now}. " if was != is_now else ""
    more = f", nor are {len(others) - 1} others" if others[1:] else ""
    if state.returns:
        when = f"{last} was noted, to which the state in {state.directory} has returned"
    elif state.journal.has_params:
        when = f"the state in {state.directory} was flushed or closed after step {steps}"
    else:
        when = f"the state in {state.directory} was stepped last (step {steps})"
    advice = (
        "Load the parameters of that step. If they were changed on purpose, resume with Pager(..., "
        f"{'resume=' + repr('checkpoint') + ', ' if state.returns else ''}changed_params=True)."
    )
    if last is not None and last.layout and not state.returns and fingerprint.match(last.params, params):
        advice = (
            f"They are those of {last}: to go on from there, load them before the optimizer is made, or resume with "
            "Pager(..., resume='checkpoint')."
        )
    elif last is not None and not state.returns:
        advice = f"The last checkpoint is {last}. {advice}"
    raise ValueError(
        f"{state.owner}: parameter {first} is not what it was when {when}{more}. {dtypes}Parameters and state are of "
        f"different steps, or one is of another run. {advice}"
    )
