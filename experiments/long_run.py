"""How long 8-bit state follows 32-bit state: real optimizers over thousands of steps, on the same random gradients.

One step changes a slow moment by less than half a cell of its 8-bit code. Rounded to nearest, it stays where it is, and
what a step loses adds up. And cells get wide, and end, far below the largest value of a block. So each optimizer steps
beside the same rule with float32 state, while gradients keep their scale, or change it for half of each block, or are
small or rare in half of it. At checkpoints the moments are decoded and compared, and so is how far the parameters have
moved since the checkpoint before. Goals for AdamW8bit stand in slow_state/goals.py, a comparison of forms of its state
in slow_state/forms.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from shared.common import add_outputs, json_path, provenance, write_json
from shared.plotting import publish, save
from shared.subjects import PEERS, missing_peers, peer_versions
from slow_state import forms, spread
from slow_state.cases import CASES, Case, gradients
from slow_state.goals import CLOSELY, judged
from slow_state.report import draw, render, render16
from slow_state.subjects import Walk, compare, is_followed, label, options, reference, subjects
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from optim8.rules import Rule

SIZES = {"steps": 6000, "blocks": 64}
QUICK = {"steps": 60, "blocks": 16}  # 4096 values: the least that all keep in 8 bits
CHECKPOINTS = (1, 2, 4, 6, 8, 10, 12)  # twelfths of the steps
CHANGE = 2


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "long_run")
    parser.add_argument("--steps", type=int, help=f"a multiple of 12; by default {SIZES['steps']}")
    parser.add_argument("--blocks", type=int, help=f"of 256 values, at least 16; by default {SIZES['blocks']}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peers", action="store_true", help="leave bitsandbytes and torchao out")
    parser.add_argument("--bits", type=int, choices=(8, 16), default=8, help="of our state; 16: AdamW alone, no peers")
    arguments = parser.parse_args(argv)
    for name, value in (QUICK if arguments.quick else SIZES).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.steps < 12 or arguments.steps % 12:
        parser.error(f"--steps: must be a multiple of 12, got {arguments.steps}")
    if arguments.blocks < QUICK["blocks"]:
        parser.error(f"--blocks: must be at least {QUICK['blocks']}, got {arguments.blocks}")
    return arguments


def plan(bits: int) -> list[tuple[Rule, Case]]:
    """All cases for one rule, and in 8 bits the main ones for every other that optim8 has."""
    from optim8 import rules

    return [
        (rule, case)
        for rule in sorted(filter(is_followed, rules.every().values()), key=lambda rule: rule.name != CLOSELY)
        for case in CASES
        if rule.name == CLOSELY or (case.every_rule and bits == 8)
    ]


def figure(value: float) -> float | None:
    """As JSON has it: six digits, None for what is no number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def append(lists: dict[str, Any], point: Mapping[str, Any]) -> None:
    """Adds the figures of a checkpoint to the lists of the same names."""
    for key, value in point.items():
        if isinstance(value, Mapping):
            append(lists.setdefault(key, {}), value)
        else:
            lists.setdefault(key, []).append(figure(value))


def follow(
    rule: Rule, case: Case, arguments: argparse.Namespace, failed: dict[str, str], bar: Any
) -> list[dict[str, Any]]:
    """A row for each subject; a peer that fails is noted instead."""
    blocks, twelfth = arguments.blocks, arguments.steps // 12
    exact = Walk(reference(rule), blocks, **options(rule, case))
    makes = subjects(rule, peers=not arguments.no_peers and arguments.bits == 8, bits=arguments.bits)
    walks: dict[str, Walk] = {}
    parts: dict[str, dict[str, Any]] = {}

    def each(names: Iterable[str], do: Callable[..., None], *more: Tensor) -> None:
        for name in list(names):
            try:
                do(name, *more)
            except Exception as error:
                if name not in PEERS:
                    raise
                walks.pop(name, None)
                failed[f"{name} {label(rule)}"] = (
                    f"{type(error).__name__}: {str(error).splitlines()[0]}"  # a finding, not an end
                )

    def make(name: str) -> None:
        walks[name], parts[name] = Walk(makes[name], blocks, **options(rule, case)), {}

    def advance(name: str, gradient: Tensor) -> None:
        walks[name].step(gradient)

    def check(name: str) -> None:
        append(parts[name], compare(walks[name], exact, rule, case))
        walks[name].start_anew()

    each(makes, make)
    steps, between = case.times * arguments.steps, case.times * twelfth
    every = gradients(case, blocks, steps, CHANGE * twelfth, arguments.seed)
    for step, gradient in enumerate(every, 1):
        exact.step(gradient)
        each(walks, advance, gradient)
        if step % between == 0 and step // between in CHECKPOINTS:
            each(walks, check)
            exact.start_anew()
        bar.update()
    head = {"rule": rule.name, "optimizer": label(rule), "case": case.name, "times": case.times}
    return [{**head, "subject": name, "parts": parts[name]} for name in walks]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    twelfth = arguments.steps // 12
    checkpoints, changed_after = [at * twelfth for at in CHECKPOINTS], CHANGE * twelfth
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    planned = plan(arguments.bits)
    total = sum(case.times for _, case in planned) * arguments.steps
    if arguments.bits == 8:
        total += forms.steps_of(arguments.steps)
    with tqdm(total=total, unit="step") as bar:
        for rule, case in planned:
            bar.set_description(f"{rule.name}, {case.name}")
            rows += follow(rule, case, arguments, failed, bar)
        if arguments.bits == 16:
            return {"checkpoints": checkpoints, "changed_after": changed_after, "rows": rows}
        bar.set_description("forms of state")
        sizes = (arguments.blocks, arguments.steps, checkpoints, changed_after, arguments.seed)
        by_form = forms.measure(*sizes, tick=bar.update, figure=figure)
    return {
        "peers": {} if arguments.no_peers else peer_versions(),
        "not_measured": {**missing_peers(asked=not arguments.no_peers), **failed},
        "checkpoints": checkpoints,
        "changed_after": changed_after,
        "goals": [*judged(rows, checkpoints, changed_after), forms.judged(by_form["one_step"])],
        "forms": by_form,
        "rows": rows,
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)  # small tensors
    result = {**provenance(vars(arguments)), **measure(arguments)}
    if arguments.bits == 16:
        path = json_path(arguments, "long_run-16bit")
        write_json(path, result)
        print(f"{render16(result)}\n\nWritten: {path}")
        return 0
    publish("long_run", result, arguments, draw, render)
    picture = arguments.png.with_name(f"{arguments.png.stem}-spread{arguments.png.suffix}")
    save(spread.draw(result), picture)
    print(f"Written: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
