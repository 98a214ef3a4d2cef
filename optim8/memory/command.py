"""`python -m optim8 plan`: the memory that a training needs, from a config, a safetensors file or a model's folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from optim8.memory.models import model
from optim8.memory.planning import budget, trainers
from optim8.memory.planning.peers import PEERS
from optim8.memory.planning.planner import OURS, SHARDINGS, plan
from optim8.memory.planning.plans import Plan, budget_bytes
from optim8.paging.pager import Pager
from optim8.step.hypers import BITS, MIN_8BIT_SIZE
from optim8.step.weight_options import MASTER_BITS

EXIT = "Ends with 0; with 1 where the plan does not fit --budget; with 2 where an argument or a file is wrong."
_SOURCE = "a config as JSON, safetensors files of one model, its folder, or its name if the hub's cache has the config"
_SMALL = f"tensors of fewer values keep float32 state (default: {MIN_8BIT_SIZE})"
_EMBEDDINGS = "Embeddings have 32-bit state, whatever --optim-bits says: with this name the Trainer keeps them so."
_NONE_FITS = "None of these fits. The same command without --for names what else makes the training smaller."
_FOR = (
    "print the line that tells this trainer of the optimizer; with --budget, of the most precise one that fits, with "
    "what was tried on stderr (default: none, the plan is printed)"
)
_MASTER = "of 16-bit weights: 16, or 24 or 32 with what the parameter lacks as state (default: 16)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("source", nargs="+", metavar="FILE", help=_SOURCE)
    names = ", ".join([*OURS, *PEERS])
    parser.add_argument("--optimizer", default="adamw8bit", help=f"one of {names} (default: %(default)s)")
    parser.add_argument("--dtype", choices=sorted(model.DTYPES), help="of the parameters (default: what FILE says)")
    parser.add_argument("--grad-dtype", choices=sorted(model.DTYPES), help="of the gradients (default: as parameters)")
    parser.add_argument(
        "--master-copies", action="store_true", help="float32 copies of narrower parameters (default: none)"
    )
    parser.add_argument("--world-size", type=int, default=1, help="number of devices (default: %(default)s)")
    parser.add_argument(
        "--sharding", choices=SHARDINGS, default="ddp", help="how they share the work (default: %(default)s)"
    )
    parser.add_argument("--min-8bit-size", type=int, help=_SMALL)
    parser.add_argument("--optim-bits", type=int, choices=BITS, help="8, 16, or 32 for state in float32 (default: 8)")
    parser.add_argument("--master-bits", type=int, choices=MASTER_BITS, help=_MASTER)
    parser.add_argument("--paged", action="store_true", help="state may live in host memory or on the disk")
    parser.add_argument("--host-budget", help="with --paged: host memory for state, such as 64GiB (default: no limit)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where the parameters are (default: cuda)")
    parser.add_argument("--budget", help="memory of a device, such as 24GiB: says what fits, and what it leaves")
    parser.add_argument("--for", choices=sorted(trainers.TRAINERS), dest="trainer", help=_FOR)
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, or with --for a line of configuration. Returns 0, 1 where it does not fit the budget, or 2 where
    an argument or a file is wrong."""
    own = ("command", "source", "json", "host_budget", "trainer")
    options = {name: value for name, value in vars(arguments).items() if name not in own}
    if arguments.trainer is not None:
        options["embeddings_in_32_bits"] = trainers.keeps_embeddings(arguments.trainer, arguments.optimizer)
    try:
        with _quiet():
            planned = plan(
                arguments.source, **{**options, "paged": _paged(arguments)}, beside=arguments.trainer is None
            )
            if arguments.trainer is not None:
                return _configure(arguments, planned)
            found = [] if arguments.budget is None else budget.options(planned, arguments.budget)
    except (OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({**planned.as_dict(), **_as_dict(found)}, indent=1))
    else:
        print(planned)
        if found:
            print(f"\n{budget.describe(found, arguments.budget)}")
    return 1 if found and not found[0].fits else 0


def _configure(arguments: argparse.Namespace, planned: Plan) -> int:
    """Print the line for a trainer: of the plan, or of the most precise optimizer that fits the budget."""
    trainer, chosen, tried = arguments.trainer, planned, []
    line: str | None = trainers.configuration(planned, trainer)
    if arguments.budget is not None:
        for option in trainers.choices(planned, arguments.budget):
            tried.append(option)
            if option.fits:
                break
        chosen = tried[-1].plan
        line = trainers.configuration(chosen, trainer) if tried[-1].fits else None
        print(f"{budget.options_table(tried, budget_bytes(arguments.budget))}\n", file=sys.stderr)
    if line is None:
        print(f"{_NONE_FITS}\n", file=sys.stderr)
    elif trainers.keeps_embeddings(trainer, arguments.optimizer):
        print(f"{_EMBEDDINGS}\n", file=sys.stderr)
    if arguments.json:
        print(json.dumps({**chosen.as_dict(), **_as_dict(tried), "for": trainer, "configuration": line}, indent=1))
    elif line:
        print(line, end="")
    return 0 if line else 1


def _as_dict(found: Sequence[budget.Option]) -> dict[str, Any]:
    fitting = {option.name: {"needed": option.plan.needed, "fits": option.fits} for option in found}
    return {"options": fitting} if found else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings and logs of torch and transformers: they concern running a model, and none runs."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _paged(arguments: argparse.Namespace) -> bool | Pager | None:
    if arguments.host_budget is None:
        return arguments.paged or None
    if not arguments.paged and not arguments.optimizer.lower().startswith("paged"):
        raise ValueError("optim8.memory.plan: --host-budget is for paged state. Pass --paged too, or leave it out.")
    return Pager(host_budget=arguments.host_budget)
