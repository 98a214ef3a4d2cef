"""Whether a plan fits a budget, and which changes make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from optim8 import rules
from optim8.memory.planning.planner import OURS, plan
from optim8.memory.planning.plans import Plan, budget_bytes
from optim8.text import size_cell, table

_MOST_DEVICES = 4096


@dataclass(frozen=True)
class Option:
    """A way to plan the training: the arguments that change, the plan with them, and whether its device part fits."""

    change: dict[str, Any]
    plan: Plan
    fits: bool

    @property
    def name(self) -> str:
        """The changed arguments as text."""
        return ", ".join(f"{name}={value!r}" for name, value in self.change.items() if name != "budget") or "as planned"


def options(planned: Plan, budget: int | str) -> list[Option]:
    """The plan itself, then ways to need less memory of the device: each change alone; where no single change fits,
    each pair that does; then the smallest number of devices over which shards fit.

    Args:
        planned: a plan, as `plan` returns it.
        budget: of one device: bytes, or a text with a unit such as "24GiB".
    """
    limit = budget_bytes(budget)
    single = [option(planned, change, limit) for change in _changes(planned, limit)]
    choices = [option(planned, {}, limit), *single]
    if not any(choice.fits for choice in choices):
        choices += [pair for pair in _pairs(planned, single, limit) if pair.fits]
    choices += [cut for cut in [_with_shards(planned, limit)] if cut is not None]
    return choices


def describe(choices: Sequence[Option], budget: int | str) -> str:
    """A table of options, as `options` returns them, with the memory that each leaves, and a sentence that says what
    makes the plan fit."""
    limit = budget_bytes(budget)
    fitting = [choice.name for choice in choices if choice.fits]
    if choices[0].fits:
        left = size_cell(limit - choices[0].plan.needed)
        verdict = f"It fits as planned, if activations, which are not planned, take at most the {left} that are left."
    elif fitting:
        verdict = f"What makes it fit, with the memory in the table left for activations: {'; or '.join(fitting)}."
    else:
        verdict = "None of these fits, nor do two of them at once. Take a smaller model."
    return f"{options_table(choices, limit)}\n\n{verdict}"


def options_table(choices: Sequence[Option], limit: int) -> str:
    """A table of options with what each needs and leaves of a budget of `limit` bytes."""
    rows = []
    for choice in choices:
        need = choice.plan.needed
        spare = size_cell(limit - need) if choice.fits else f"does not fit: {size_cell(need - limit)} too much"
        elsewhere = [f"{size_cell(count)} {tier}" for tier, count in choice.plan.elsewhere.items()]
        rows.append([choice.name, size_cell(need), spare, " and ".join(elsewhere) or "-"])
    headers = [f"budget {size_cell(limit)} a device", "needed", "left for activations", "beside it"]
    return table(headers, rows)


def option(planned: Plan, change: dict[str, Any], limit: int) -> Option:
    """The plan with other arguments, against a budget of `limit` bytes."""
    changed = plan(**{**planned.request, **change}, beside=False) if change else planned
    return Option(change, changed, changed.needed <= limit)


def _pairs(planned: Plan, single: Sequence[Option], limit: int) -> Iterator[Option]:
    """Two changes at once, each pair in one order only."""
    seen: list[dict[str, Any]] = []
    for first in single:
        for second in _changes(first.plan, limit):
            both = {**first.change, **second}
            if not second.keys() & first.change.keys() and both not in seen:
                seen.append(both)
                yield option(planned, both, limit)


def _changes(planned: Plan, limit: int) -> Iterator[dict[str, Any]]:
    request = planned.request
    name = request["optimizer"]
    ours = isinstance(name, str) and name.lower() in OURS
    if not ours:
        yield {"optimizer": "adamw8bit"}
    elif request["optim_bits"] in (16, 32):
        yield {"optim_bits": 8}
    if not ours or len(rules.rule(OURS[name.lower()].rule).moments) > 1:
        yield {"optimizer": "lion8bit" if not ours or not OURS[name.lower()].always_paged else "pagedlion8bit"}
    if any(dtype not in ("bfloat16", "float16") for dtype in planned.dtypes):
        yield {"dtype": "bfloat16"}
    if ours and not OURS[name.lower()].always_paged and not request["paged"]:
        yield {"paged": True, "budget": limit}


def _with_shards(planned: Plan, limit: int) -> Option | None:
    """The smallest power of two of devices over which the plan fits; None where no number does."""
    count = 2 * planned.world_size if planned.sharding == "fsdp" else max(2, planned.world_size)
    while count <= _MOST_DEVICES:
        cut = option(planned, {"sharding": "fsdp", "world_size": count}, limit)
        if cut.fits:
            return cut
        count *= 2
    return None
