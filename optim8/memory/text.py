"""Numbers of bytes as text and back, and plain tables."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = {"B": 1, "KB": 1000}
_UNITS |= {f"{prefix}iB": 1024 ** (i + 1) for i, prefix in enumerate("KMGTP")}
_UNITS |= {f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("kMGTP")}


def parse_bytes(size: int | str) -> int:
    """A number of bytes from a number, or from a text such as "24GiB", "512 MiB" or "80GB".

    Raises:
        ValueError: it is neither, or a text without a unit: "24" would be 24 bytes, which nobody has in mind.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    number = str(size).strip().rstrip("BikKMGTP").strip()
    unit = str(size).strip()[len(number) :].strip()
    if number and not unit and number.replace(".", "", 1).isdigit():
        raise ValueError(
            f"optim8.memory: a size needs a unit, got {size!r}. Write {number}GiB, or {number}B for bytes."
        )
    try:
        found = float(number) * _UNITS[unit]
        if 0 <= found < 2**63:
            return int(found)
    except (ValueError, KeyError):
        pass
    raise ValueError(f"optim8.memory: a size must be a number of bytes or a text such as '24GiB', got {size!r}.")


def binary(count: int) -> str:
    """Bytes as text of four digits or so, such as "13.48 GiB"."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1000 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table, the first column to the left and the others to the right."""
    lines = [list(headers), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]

    def text(line: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([text(lines[0]), "  ".join("-" * width for width in widths), *(text(line) for line in rows)])
