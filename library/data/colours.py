"""Colours as users write them."""

from __future__ import annotations

import re

from library.data.spelling import nearest
from library.log import UserError

COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "grey": (128, 128, 128),
    "silver": (192, 192, 192),
    "red": (255, 0, 0),
    "lime": (0, 255, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
"""Red, green and blue by name, as on the web."""

_HEX = re.compile(r"#([0-9a-f]{3}|[0-9a-f]{6})", re.ASCII)


def colour(text: str, where: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a name, `#rrggbb` or `#rgb`. Errors: UserError."""
    plain = text.strip().lower()
    if plain in COLOURS:
        return COLOURS[plain]
    if match := _HEX.fullmatch(plain):
        digits = match[1] if len(match[1]) == 6 else "".join(2 * digit for digit in match[1])
        return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)
    near = nearest(plain, COLOURS)
    hint = f"did you mean {near}?" if near else f"give #rrggbb or one of {', '.join(COLOURS)}"
    raise UserError(f"unknown colour {text!r}", where, hint, code="E-OPTION")
