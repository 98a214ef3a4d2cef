"""Tables that put results of several experiments side by side, for somebody who chooses an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import bf16_movement
import small_gradients
from shared.common import origin, plural, table
from shared.plotting import STYLES, new_figure
from shared.subjects import COPY, REFERENCE, namesakes, with_version
from slow_state.cases import CONSTANT_BLOCKS, SMALL, STEADY, Case
from slow_state.goals import CLOSELY
from slow_state.subjects import OURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = Mapping[str, Any]

ADAMW = ("torch AdamW", "optim8 AdamW8bit", "bitsandbytes AdamW8bit", "torchao AdamW8bit")
TINY, WITH_EPS = 1e-8, "gradients alike, eps 1e-8"  # a scale and a case of small_gradients.py: eps as by default
THOUSANDTH = next(case for case in SMALL if case.small == 1e-3)
AT = 3000  # the step up to which a table has movements
MIB = 2**20


def _speed(result: Result, case: str, threads: int, subject: str) -> str:
    """How many times as fast as torch's fused step of the same run, of float32 parameters."""
    for row in result["timings"]:
        key = (row["case"], row["threads"], row["subject"], row["dtype"])
        if key == (case, threads, subject, "float32"):
            return f"{row['speed_ratio']:.2f}"
    return "not measured"


def steps(best: Result, avx2: Result, peers: Result) -> str:
    """The step with each instruction set, and those of the peers."""
    columns = [
        *[(f"optim8 {rule}, {isa}", f"optim8 {rule}", result)
          for rule in ("AdamW8bit", "Lion8bit")
          for isa, result in (("AVX-512", best), ("AVX2", avx2))],
        *[(with_version(name, peers["peers"]), name, peers) for name in ADAMW[2:]],
    ]  # fmt: skip
    cases = dict.fromkeys((row["case"], row["threads"]) for row in best["timings"])
    rows = [
        [case, str(threads), *(_speed(result, case, threads, subject) for _, subject, result in columns)]
        for case, threads in cases
    ]
    return "\n\n".join(
        [
            table(["float32 parameters", "threads", *(header for header, _, _ in columns)], rows),
            f"How many times as fast as {REFERENCE} in the same process; under 1 is slower.",
            *(origin(result) for result in (best, avx2, peers)),
        ]
    )


def lengths(long: Result, case: Case) -> dict[str, dict[str, list[float]]]:
    """By the names of ADAMW: how far the changed half of the values, and the others, moved since the checkpoint before,
    over what float32 state gives. torch's is that state."""
    found = {}
    for row in long["rows"]:
        if (row["rule"], row["case"]) == (CLOSELY, case.name):
            parts = {part: its["length"] for part, its in row["parts"].items()}
            name = ADAMW[1] if row["subject"] == OURS else f"{row['subject']} AdamW8bit"
            found[name] = parts
    return found


def _movements(long: Result, bf16: Result) -> list[list[str]]:
    """The rows of the table that say how far parameters move."""
    at = long["checkpoints"].index(AT)
    steady, small, constant = (lengths(long, case) for case in (STEADY, THOUSANDTH, CONSTANT_BLOCKS))
    weights = {name: bf16_movement.kept(bf16, name) for name in ADAMW}

    def cells(of: Mapping[str, Any], cell: Callable[[Any], str], first: str) -> list[str]:
        return [first, *(cell(of[name]) if of.get(name) else "not measured" for name in ADAMW[1:])]

    def changed(parts: Mapping[str, list[float]]) -> str:
        return small_gradients.ratio(parts["changed"][at])

    def both(parts: Mapping[str, list[float]]) -> str:
        return f"{changed(parts)} / {small_gradients.ratio(parts['others'][at])}"

    before = long["checkpoints"][at - 1]
    return [
        [f"movement from step {before} to {AT} over float32 state's", *cells(steady, changed, "1")],
        ["the same for gradients of a thousandth of their block's", *cells(small, changed, "1")],
        ["the same for constant gradients of -1 / of 1", *cells(constant, both, "1 / 1")],
        [
            f"movement of bfloat16 weights at a learning rate of {bf16['arguments']['rate']:g}",
            *cells(weights, bf16_movement.cell, bf16_movement.cell(weights[ADAMW[0]] or {})),
        ],
    ]


def _of_weights(bf16: Result) -> str:
    """What the row of bfloat16 weights says, and what they do without the options that it has."""
    there = {name: option for name, option in bf16_movement.KEEPS.items() if bf16_movement.kept(bf16, name)}
    plain = [f"{bf16['rules']['AdamW'][name]['slope'][-1]:.2f}" for name in there]
    options = [bf16_movement.label(name) for name in there]
    return (
        f"bfloat16 weights: {bf16['arguments']['steps']} steps, over those of float32 weights, in brackets the "
        f"norm of the error over that of the movement; {', '.join(options)} (without: {', '.join(plain)})."
    )


def peers(memory: Result, step: Result, avx2: Result, gradients: Result, long: Result, bf16: Result) -> str:
    """torch's AdamW and the 8-bit ones, as far as they were measured on the same machine."""
    largest = max(row["parameters"] for row in memory["rows"])
    trained = {row["subject"]: row for row in memory["rows"] if row["parameters"] == largest}
    case, threads = next(
        (row["case"], row["threads"])
        for row in reversed(step["timings"])
        if row["case"].startswith("transformer") and row["dtype"] == "float32"
    )
    small = {
        row["subject"]: row["norm_ratio"]
        for row in gradients["rows"]
        if row["case"] == WITH_EPS and abs(row["scale"] / TINY - 1) < 1e-6
    }

    def each(what: Callable[[str], str], there: Sequence[str] = ADAMW) -> list[str]:
        return [what(name) if name in there else "not measured" for name in ADAMW]

    def speed(result: Result) -> list[str]:
        return each(lambda name: _speed(result, case, threads, REFERENCE if name == ADAMW[0] else name))

    rows = [
        [
            "optimizer state, bytes a parameter",
            *each(lambda n: f"{trained[n]['state_bytes'] / largest:.2f}", [*trained]),
        ],
        [
            f"memory that training {largest / 1e6:.0f} M parameters took, MiB",
            *each(lambda name: f"{trained[name]['peak_growth_bytes'] / MIB:.0f}", [*trained]),
        ],
        ["speed of a step, CPU with AVX-512", *speed(step)],
        ["speed of a step, CPU with AVX2", *speed(avx2)],
        [
            "size of the update for gradients of 1e-8, exact is 1",
            *each(lambda name: small_gradients.ratio(small[name]), [*small]),
        ],
        *_movements(long, bf16),
    ]
    headers = ["on a CPU, float32 parameters", *(with_version(name, memory["peers"]) for name in ADAMW)]
    return "\n\n".join(
        [
            table(headers, rows),
            f"Speed: as a ratio to {REFERENCE} in the same process, for a transformer's 67 M parameters on "
            f"{plural(threads, 'thread')}. {_of_weights(bf16)} On a GPU nothing is measured yet.",
        ]
    )


def draw(long: Result, bf16: Result) -> Figure:
    """A panel for each row of movements, over the steps."""
    figure, panels = new_figure(columns=4, width=4.8)
    of_weights = {name: its["slope"] for name in ADAMW if (its := bf16_movement.kept(bf16, name))}
    whose = [
        (title, long["checkpoints"], {name: its["changed"] for name, its in lengths(long, case).items()})
        for case, title in (
            (STEADY, "random gradients"),
            (THOUSANDTH, "gradients of 1/1000 of their block's"),
            (CONSTANT_BLOCKS, "blocks of gradients of -1"),
        )
    ]
    whose.append((f"bfloat16 weights, learning rate {bf16['arguments']['rate']:g}", bf16["checkpoints"], of_weights))
    for panel, (title, checkpoints, found) in zip(panels, whose):
        for number, (style, name) in enumerate(zip(STYLES, ADAMW)):
            if name in found:
                shift = 0.012 * checkpoints[-1] * (number - 1.5)  # beside each other, not over each other
                label = with_version(name, long["peers"]) if found is not of_weights else bf16_movement.label(name)
                panel.plot([step + shift for step in checkpoints], found[name], label=label, **style.line())
        panel.set_title(title)
    panels[0].set_ylim(0.9, 1.02)
    panels[1].set_yscale("log")
    panels[2].set_ylim(0.9, 1.02)
    panels[3].set_ylim(-0.05, 1.15)
    for panel in panels:
        panel.axhline(1, color="black", linewidth=1)
        panel.set_xlabel("optimizer step")
    panels[0].set_ylabel("movement / that with float32 state")
    panels[0].legend(loc="lower left")
    panels[3].legend(loc="center right", fontsize="small")
    return figure


def suite(result: Result) -> str:
    """Every optimizer beside the fastest form of its namesake in torch.optim, and beside torch's fused AdamW."""
    cases = dict.fromkeys((row["case"], row["dtype"]) for row in result["timings"])
    milliseconds = {
        (row["case"], row["dtype"], row["subject"]): row["median_ms"] for row in result["timings"] if row["threads"] > 1
    }
    forms = [subject for _, _, subject in milliseconds if subject.startswith("torch ")]

    def measured(case: tuple[str, str], subject: str) -> float | None:
        return milliseconds.get((*case, subject))

    def times(case: tuple[str, str], ours: str, theirs: Sequence[str]) -> str:
        own, others = measured(case, ours), [measured(case, form) for form in theirs]
        known = [ms for ms in others if ms is not None]
        return f"{min(known) / own:.2f}" if own is not None and known else ""

    rows = []
    for subject in dict.fromkeys(subject for _, _, subject in milliseconds if subject.startswith("optim8 ")):
        name = subject.removeprefix("optim8 ")
        there = [case for case in cases if measured(case, subject) is not None]
        theirs = namesakes().get(name, "AdamW" if name == "AdamW8bit" else "")
        of_same = [form for form in forms if theirs and form.startswith(f"torch {theirs} ") and form != COPY]
        cells = [
            f"{times(c, subject, of_same)} / {times(c, subject, [REFERENCE])}" if c in there else "" for c in cases
        ]
        rows.append([name, *cells])
    headers = ["optimizer", *(f"{case}, {dtype}" for case, dtype in cases)]
    return "\n\n".join(
        [
            table(headers, rows),
            "How many times as fast as the fastest form of the same class in torch.optim (fused, foreach, one tensor "
            "after the other) / as torch's fused AdamW, in the same rounds, on all threads. Empty: torch has no such "
            "class.",
            _weights(milliseconds),
            origin(result),
        ]
    )


def _weights(milliseconds: Mapping[tuple[str, str, str], float]) -> str:
    """The steps of weights that are wider or dithered, against that of plain ones."""
    case = next(case for case, dtype, _ in milliseconds if case.startswith("transformer") and dtype == "bfloat16")
    plain = milliseconds[case, "bfloat16", "optim8 AdamW8bit"]
    copy = milliseconds[case, "bfloat16", COPY]
    parts = [
        f"{name.removeprefix('optim8 AdamW8bit ')} {ms / plain:.2f} times the time of plain AdamW8bit and "
        f"{copy / ms:.2f} times as fast as the copy"
        for (of, dtype, name), ms in milliseconds.items()
        if (of, dtype) == (case, "bfloat16") and name.startswith(("optim8 AdamW8bit master", "optim8 AdamW8bit param"))
    ]
    return f"Weights of bfloat16 parameters, {case}; the copy is {COPY}: {'; '.join(parts)}."
