"""What the rows of measure.py say together: shares of the copy's bandwidth, ratios to the peers, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.common import table

Row = dict[str, Any]
OURS = "optim8 AdamW8bit"


def with_ratios(rows: Sequence[Row]) -> dict[str, Any]:
    """By kind. Each row that moved bytes gets `of_copy`; each step gets `times`, how many times longer it takes than
    optim8's AdamW8bit on the same tensors."""
    bandwidth = next((row["bytes_per_second"] for row in rows if row["subject"] == "copy"), None)
    own = {(row["workload"], row["dtype"]): row["ms"] for row in rows if row["subject"] == OURS and "ms" in row}
    kinds: dict[str, list[Row]] = {"ceiling": [], "steps": [], "launches": [], "functions": [], "paged": []}
    for row in rows:
        if row["subject"] == "copy":
            continue
        more: Row = {}
        if bandwidth is not None and "bytes_per_second" in row:
            more["of_copy"] = row["bytes_per_second"] / bandwidth
        tensors = (row.get("workload"), row.get("dtype"))
        if "ms" in row and tensors in own:
            more["times"] = row["ms"] / own[tensors]
        kind = row["measurement"] if row["measurement"] in kinds else "steps"
        kinds[kind].append({**row, **more})
    return {"copy_bytes_per_second": bandwidth, **kinds}


def render(result: dict[str, Any]) -> str:
    """The tables of the ceiling, steps, launches, functions and paged steps."""
    steps = [
        [row.get("workload", "-"), row.get("dtype", "-"), row["subject"], *_cells(row, ["ms", "of_copy", "times"])]
        for row in result["steps"]
    ]
    ceiling, functions = (
        [[row["subject"], *_cells(row, ["ms", "of_copy"])] for row in result[kind]] for kind in ("ceiling", "functions")
    )
    launches = [[row["subject"], *_cells(row, ["ms", "host_ms"])] for row in result["launches"]]
    paged = [[row["subject"], *_cells(row, ["ms", "of_link"])] for row in result["paged"]]
    return "\n\n".join(
        [
            table(["accesses of a step", "ms", "of copy"], ceiling),
            table(["workload", "dtype", "subject", "ms", "of copy", f"times {OURS}"], steps),
            table(["launches", "ms", "ms of the host"], launches),
            table(["function", "ms", "of copy"], functions),
            table(["paged", "ms", "of the link"], paged),
        ]
    )


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    shown = {"ms": "{:.3f}", "host_ms": "{:.3f}", "of_copy": "{:.0%}", "of_link": "{:.0%}", "times": "{:.2f}"}
    if "error" in row:
        return ["error", *["-"] * (len(names) - 1)]
    return [shown[name].format(row[name]) if name in row else "-" for name in names]
