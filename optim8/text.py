"""Numbers of bytes as text and back, and plain tables."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_SIZE = re.compile(r"\s*(\S+?)\s*([kmgtp]i?)?b\s*", re.IGNORECASE)
_PREFIXES = {prefix: (1000**power, 1024**power) for power, prefix in enumerate("kmgtp", 1)}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
UNITS = "B, kB, MB, GB, TB, PB, KiB, MiB, GiB, TiB, PiB"  # that parse_bytes reads, in any case


def parse_bytes(size: object) -> int | None:
    """A number of bytes from a number, or from a text with a unit such as "24GiB", "512 MiB" or "80gb".

    None where `size` is neither; whoever asks raises the error, and says in it what the size is for.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size if size >= 0 else None
    parts = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if parts is None:
        return None
    try:
        number = float(parts[1])
    except ValueError:
        return None
    if not 0 <= number < math.inf:
        return None
    unit = (parts[2] or "").lower()
    decimal, binary = _PREFIXES[unit[0]] if unit else (1, 1)
    return int(number * (binary if unit.endswith("i") else decimal))


def size_text(count: int) -> str:
    """Bytes as a text that `parse_bytes` reads, of four digits or so, such as "1.5GiB"."""
    power = next((power for power in range(len(_UNITS) - 1, 0, -1) if count >= 1024**power), 0)
    return f"{count / 1024**power:.4g}{_UNITS[power]}"


def size_cell(count: int) -> str:
    """Bytes as a text for tables, of three to five digits with two decimals, such as "13.48 GiB"."""
    power = next((power for power in range(len(_UNITS) - 1) if abs(count) / 1024**power < 1000), len(_UNITS) - 1)
    return f"{count / 1024**power:.2f} {_UNITS[power]}" if power else f"{count} B"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """An aligned table: the first `left` columns to the left, the others to the right."""
    lines = [headers, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]

    def text(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([text(headers), "  ".join("-" * width for width in widths), *map(text, rows)])
