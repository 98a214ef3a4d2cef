"""Sizes are read alike wherever a user may write one, and printed so that they can be read again."""

from __future__ import annotations

from typing import Any

import pytest

import optim8
from optim8.text import parse_bytes, size_cell, size_text, table

SIZES = {
    "2gib": 2**31,
    "2PiB": 2**51,
    "3pb": 3 * 10**15,
    "24Gib": 24 * 2**30,
    "512 MiB": 2**29,
    " 1.5tIB ": 3 * 2**39,
    "80gb": 80 * 10**9,
    "1e3kB": 10**6,
    "3KB": 3000,
    "70000000b": 7 * 10**7,
    2**31: 2**31,
}


@pytest.mark.parametrize("given", SIZES, ids=str)
def test_pager_and_plan_read_the_same_sizes(given: Any) -> None:
    size = SIZES[given]
    assert optim8.paging.Pager(device_budget=given).device_bytes == size
    planned = optim8.memory.plan({"parameters": 10}, beside=False)
    assert planned.fits(given) == (planned.needed <= size)


@pytest.mark.parametrize(
    "given", ["", "24", "GiB", "24iB", "-1B", "nanB", "infGB", "24 GiB extra", -1, True, None, 2e9]
)
def test_what_is_no_size_is_refused_by_pager_and_plan(given: Any) -> None:
    assert parse_bytes(given) is None
    with pytest.raises(ValueError, match=r"^optim8\.memory: a size (must be|needs a unit)"):
        optim8.memory.plan({"parameters": 10}, beside=False).fits(given)
    if given is not None:
        with pytest.raises((ValueError, TypeError), match=r"^Pager: device_budget must be "):
            optim8.paging.Pager(device_budget=given)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 3 * 2**29, 5 * 2**40])
def test_a_size_that_is_printed_is_read_again(size: int) -> None:
    assert parse_bytes(size_text(size)) == size
    assert parse_bytes(size_cell(size)) == pytest.approx(size, rel=0.02)


def test_a_table_is_aligned() -> None:
    rows = [["a", "bb", "1"], ["ccc", "d", "22"]]
    assert table(["x", "y", "z"], rows).splitlines() == ["x     y   z", "---  --  --", "a    bb   1", "ccc   d  22"]
    assert table(["x", "y", "z"], rows, left=2).splitlines() == [
        "x    y    z",
        "---  --  --",
        "a    bb   1",
        "ccc  d   22",
    ]
