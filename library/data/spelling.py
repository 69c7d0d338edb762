"""Which known name a misspelt one stands for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name one or two slips of the pen away, or else one that looks alike; None: nothing does."""
    names = sorted(known)
    slips = {candidate: distance(name, candidate) for candidate in names if abs(len(candidate) - len(name)) <= 2}
    if slips:
        best = min(slips, key=lambda candidate: slips[candidate])
        if slips[best] == 1 or (slips[best] == 2 and len(name) > 4):
            return best
    near = difflib.get_close_matches(name, names, 1, 0.7)
    return near[0] if near else None


def distance(one: str, other: str) -> int:
    """Slips between two names: letters left out, added, replaced, or swapped with their neighbour."""
    before: list[int] = []
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        current = [row]
        for column, wanted in enumerate(other, 1):
            cost = min(above[column] + 1, current[-1] + 1, above[column - 1] + (letter != wanted))
            if row > 1 and column > 1 and letter == other[column - 2] and one[row - 2] == wanted:
                cost = min(cost, before[column - 2] + 1)
            current.append(cost)
        before, above = above, current
    return above[-1]
