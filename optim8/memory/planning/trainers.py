"""The lines by which training libraries are told to use an optimizer of optim8, and the most precise one that fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optim8.memory.planning.budget import Option, option
from optim8.memory.planning.planner import OURS
from optim8.memory.planning.plans import Plan, budget_bytes
from optim8.paging.pager import Pager
from optim8.step.hypers import BITS, MIN_8BIT_SIZE
from optim8.step.weight_options import MASTER_BITS

# What each option is where a line does not say it.
_DEFAULTS = {"optim_bits": 8, "master_bits": 16, "min_8bit_size": MIN_8BIT_SIZE}


@dataclass(frozen=True)
class Trainer:
    """How a library is told its optimizer.

    Attributes:
        line: the text, with `{name}` for the optimizer, and `{options}` for its options.
        option: one option as text, with `{key}` and `{value}`.
        between: what joins options.
        names: the library's name for a class, where it takes names that it knows; None where it takes the class path.
        paged: what a line with paged state begins with.
    """

    line: str
    option: str
    between: str = ""
    names: Mapping[str, str] | None = None
    paged: str = ""


# transformers' `optim=` names for our classes. Those with other names of ours have no name there. With
# `adamw_torch_8bit`, unlike `adamw_8bit`, the Trainer has no rule of its own for embeddings, so bytes are as planned.
_TRAINER_NAMES = {
    "AdamW8bit": "adamw_torch_8bit",
    "AdEMAMix8bit": "ademamix_8bit",
    "Lion8bit": "lion_8bit",
    "RMSprop8bit": "rmsprop_bnb",
}
# With these names the Trainer keeps the state of embeddings in 32 bits, whatever the options say.
_WIDE_EMBEDDINGS = {"ademamix_8bit", "lion_8bit"}

TRAINERS = {
    "transformers": Trainer(
        'python -m optim8 run train.py --optim {name} --optim_args "{options}"\n',
        *("{key}={value}", ", ", _TRAINER_NAMES),
    ),
    "axolotl": Trainer(
        "plugins:\n  - optim8.integrations.axolotl.Optim8Plugin\noptimizer: {name}\noptim_args: {options}\n",
        *("{key}={value}", ", ", _TRAINER_NAMES),
    ),
    "torchtune": Trainer("optimizer:\n  _component_: optim8.{name}\n{options}", "  {key}: {value}\n"),
    "lightning": Trainer(
        "optimizer:\n  class_path: optim8.{name}\n{options}",
        "    {key}: {value}\n",
        paged="trainer:\n  callbacks:\n    - class_path: optim8.integrations.lightning.PagedStateCallback\n",
    ),
}


def configuration(planned: Plan, trainer: str) -> str:
    """The text that makes the library train with the optimizer of a plan, in its configuration or on its command line.

    Args:
        planned: a plan of an optimizer of optim8 that was asked for by its name.
        trainer: one of TRAINERS.

    Raises:
        ValueError: the library cannot be told of this optimizer; the message says of what it can.
    """
    form, request = TRAINERS[trainer], planned.request
    cls = OURS.get(str(request["optimizer"]).lower())
    if cls is None:
        raise ValueError(
            f"optim8.memory.plan: a line for {trainer} is for optimizers of optim8, got {request['optimizer']!r}. "
            f"Pass one of {', '.join(OURS)}."
        )
    if isinstance(request["paged"], Pager):
        raise ValueError(
            f"optim8.memory.plan: a line for {trainer} cannot hold the budgets of a Pager. Leave --host-budget out, or "
            "make the optimizer in Python, with paged=Pager(host_budget=...)."
        )
    paged = cls.always_paged or bool(request["paged"])
    resident = cls.__name__.removeprefix("Paged")
    stated = {key: default if request[key] is None else request[key] for key, default in _DEFAULTS.items()}
    options = {key: value for key, value in stated.items() if value != _DEFAULTS[key]}
    if form.names is None:
        name = f"Paged{resident}" if paged else resident
    elif resident in form.names:
        name = form.names[resident]
        options = {"optim_bits": stated["optim_bits"], **options, **({"paged": True} if paged else {})}
    else:
        raise ValueError(
            f"optim8.memory.plan: {trainer} has no name for {resident}; it has for {', '.join(form.names)}. Pass one "
            "of these, or give the Trainer the class in Python (docs/trainers.md)."
        )
    text = form.between.join(form.option.format(key=key, value=value) for key, value in options.items())
    if trainer == "lightning" and text:
        text = f"  init_args:\n{text}"
    return (form.paged if paged else "") + form.line.format(name=name, options=text)


def keeps_embeddings(trainer: str, optimizer: str) -> bool:
    """Whether the library gives embeddings 32-bit state whatever the options say, under the name of this optimizer."""
    cls = OURS.get(optimizer.lower())
    names = TRAINERS[trainer].names or {}
    return cls is not None and names.get(cls.__name__.removeprefix("Paged")) in _WIDE_EMBEDDINGS


def choices(planned: Plan, budget: int | str) -> Iterator[Option]:
    """Ways to train with the optimizer of a plan, the most precise first: weights before state, as docs/bfloat16.md
    has measured, and state of the device before paged state. What the request states stays as it is.

    Args:
        planned: a plan of an optimizer of optim8.
        budget: of one device: bytes, or a text with a unit such as "24GiB".
    """
    request, limit = planned.request, budget_bytes(budget)
    narrow = set(planned.dtypes) <= {"bfloat16", "float16"} and not request["master_copies"]
    weights: list[dict[str, Any]] = [{}]
    if narrow and request["master_bits"] is None:
        weights = [{"master_bits": bits} for bits in sorted(MASTER_BITS, reverse=True)]
    states: list[dict[str, Any]] = [{}]
    if request["optim_bits"] is None:
        states = [{"optim_bits": bits} for bits in sorted(BITS, reverse=True)]
    for of_weights in weights:
        for of_state in states:
            yield option(planned, {**of_weights, **of_state}, limit)
    if not request["paged"] and not OURS[request["optimizer"].lower()].always_paged:
        # Each step moves paged state, so it is not wider than by default.
        yield option(planned, {"paged": True, "budget": limit}, limit)
