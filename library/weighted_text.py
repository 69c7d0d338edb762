"""Weights of words in captions and prompts: `(more)`, `[less]`, `(this much:1.3)`."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import NamedTuple

MORE = 1.1
"""What a pair of round brackets multiplies by, and a pair of square ones divides by."""

_PARTS = re.compile(r"\\(?P<escaped>.?)|:(?P<weight>[+-]?[.\d]+)\)|(?P<bracket>[()\[\]])|[^\\()\[\]:]+|:", re.DOTALL)


class Piece(NamedTuple):
    """Words of one weight."""

    text: str
    weight: float


def pieces(text: str) -> list[Piece]:
    """The parts of a text with their weights, at least one; neighbours of equal weight are one.

    Brackets nest, and multiply. A backslash before a bracket or a backslash makes it a letter. An opening bracket
    without a closing one reaches to the end; a closing one without an opening one is a letter, and so is a weight that
    is no number.
    """
    found: list[list[str | float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        for piece in found[start:]:
            piece[1] = float(piece[1]) * factor

    for match in _PARTS.finditer(text):
        letters = match[0] if match["escaped"] is None else match["escaped"]
        bracket, weight = match["bracket"], _number(match["weight"])
        if bracket in opened:
            opened[bracket].append(len(found))
        elif weight is not None and opened["("]:
            weigh(opened["("].pop(), weight)
        elif bracket == ")" and opened["("]:
            weigh(opened["("].pop(), MORE)
        elif bracket == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / MORE)
        elif match["weight"] is not None and weight is None and opened["("]:
            found.append([letters[:-1], 1.0])
            weigh(opened["("].pop(), MORE)
        else:
            found.append([letters, 1.0])
    for start in opened["("]:
        weigh(start, MORE)
    for start in opened["["]:
        weigh(start, 1 / MORE)
    return _merged([Piece(str(letters), float(weight)) for letters, weight in found])


def plain(text: str) -> str:
    """A text without its weights."""
    return "".join(piece.text for piece in pieces(text))


def _number(text: str | None) -> float | None:
    if text is not None:
        with suppress(ValueError):
            return float(text)
    return None


def _merged(found: list[Piece]) -> list[Piece]:
    merged: list[Piece] = []
    for piece in found:
        if merged and merged[-1].weight == piece.weight:
            merged[-1] = Piece(merged[-1].text + piece.text, piece.weight)
        elif piece.text:
            merged.append(piece)
    return merged or [Piece("", 1.0)]
