"""Tables that put results of several experiments side by side, for somebody who chooses an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import small_gradients
from shared.common import origin, plural, table
from shared.subjects import REFERENCE, with_version

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
