"""tests/support/pairs.py: what it leaves out."""

from __future__ import annotations

from itertools import combinations, product

from support.pairs import rows


def test_every_two_values_come_together() -> None:
    axes = [list(range(n)) for n in (14, 7, 3, 3)]
    found = rows(axes)
    for a, b in combinations(range(len(axes)), 2):
        assert {(row[a], row[b]) for row in found} == set(product(axes[a], axes[b]))
    assert 14 * 7 <= len(found) <= 1.1 * 14 * 7  # all combinations are 882


def test_two_axes_and_one_are_all_combinations() -> None:
    assert sorted(rows([[1, 2], ["a", "b", "c"]])) == sorted(product([1, 2], "abc"))
