"""Tables that put results of several experiments side by side, for somebody who chooses an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import small_gradients
from shared.common import origin, plural, table
from shared.subjects import COPY, REFERENCE, namesakes, with_version

Result = Mapping[str, Any]

ADAMW = ("torch AdamW", "optim8 AdamW8bit", "bitsandbytes AdamW8bit", "torchao AdamW8bit")
SMALL, WITH_EPS = 1e-8, "gradients alike, eps 1e-8"  # a scale and a case of small_gradients.py: eps as by default
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


def peers(memory: Result, step: Result, avx2: Result, gradients: Result) -> str:
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
        if row["case"] == WITH_EPS and abs(row["scale"] / SMALL - 1) < 1e-6
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
    ]
    headers = ["float32 parameters, on a CPU", *(with_version(name, memory["peers"]) for name in ADAMW)]
    return "\n\n".join(
        [
            table(headers, rows),
            f"Speed: as a ratio to {REFERENCE} in the same process, for a transformer's 67 M parameters on "
            f"{plural(threads, 'thread')}. On a GPU nothing is measured yet.",
        ]
    )


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
