"""`python -m optim8 plan`: memory that a training needs, from a config or a safetensors file."""

from __future__ import annotations

import argparse
import json
import sys

from optim8.memory import budget, sizes
from optim8.memory.peers import PEERS
from optim8.memory.planner import OURS, SHARDINGS, plan
from optim8.paging.options import Pager


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("source", nargs="+", metavar="FILE", help="a config as JSON, or safetensors files of one model")
    parser.add_argument("--optimizer", default="adamw8bit", help=f"one of {', '.join([*OURS, *PEERS])}")
    parser.add_argument("--dtype", choices=sorted(sizes.DTYPES), help="of the parameters (default: what FILE says)")
    parser.add_argument("--grad-dtype", choices=sorted(sizes.DTYPES), help="of the gradients (default: as parameters)")
    parser.add_argument("--master-copies", action="store_true", help="float32 copies of narrower parameters")
    parser.add_argument("--world-size", type=int, default=1, help="number of devices")
    parser.add_argument("--sharding", choices=SHARDINGS, default="ddp", help="how they share the work")
    parser.add_argument("--min-8bit-size", type=int, help="tensors of fewer values keep 32-bit state (default: 4096)")
    parser.add_argument("--optim-bits", type=int, choices=(8, 32), help="8, or 32 for state in float32")
    parser.add_argument("--paged", action="store_true", help="state may live in host memory or on the disk")
    parser.add_argument("--host-budget", help="with --paged: host memory for state, such as 64GiB (default: no limit)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where the parameters are (default: cuda)")
    parser.add_argument("--budget", help="memory of a device, such as 24GiB: says what fits, and what makes it fit")
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Returns 0, or 2 where an argument or a file is wrong."""
    own = ("command", "source", "json", "host_budget")
    options = {name: value for name, value in vars(arguments).items() if name not in own}
    try:
        planned = plan(arguments.source, **{**options, "paged": _paged(arguments)})
        found = [] if arguments.budget is None else budget.options(planned, arguments.budget)
    except (OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        fitting = {option.name: {"needed": option.plan.needed, "fits": option.fits} for option in found}
        print(json.dumps({**planned.as_dict(), **({"options": fitting} if found else {})}, indent=1))
        return 0
    print(planned)
    if found:
        print(f"\n{budget.describe(found, arguments.budget)}")
    return 0


def _paged(arguments: argparse.Namespace) -> bool | Pager | None:
    if arguments.host_budget is None:
        return arguments.paged or None
    if not arguments.paged and not arguments.optimizer.lower().startswith("paged"):
        raise ValueError("optim8.memory.plan: --host-budget is for paged state. Pass --paged too, or leave it out.")
    return Pager(host_budget=arguments.host_budget)
