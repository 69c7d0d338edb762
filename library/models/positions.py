"""Positions of image tokens as tables of sines and cosines, and which part of a table an image gets.

H x W tokens of an image, D width, a table for `side` x `side` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from library.log import DataError

BASE = 16
"""What the positions of a scaled table span in its middle, whatever the resolution."""
REACH = 1.5
"""Side of a scaled table, in sides of its middle."""
_PERIOD = 10_000


def crop(table: Tensor, rows: int, columns: int, origin: tuple[int, int] | None = None) -> Tensor:
    """The positions (1, H * W, D) of an image, from a table (1, side * side, D).

    Args:
        origin: of the part, row and column; None: the middle.

    Raises:
        DataError: the image is larger than the table.
    """
    side = side_of(table)
    if max(rows, columns) > side:
        what = f"an image of {columns} x {rows} tokens is too large for this model, which has positions for {side}"
        raise DataError(what, hint="use a lower resolution, or --enable_scaled_pos_embed", code="E-MODEL-SIZE")
    top, left = ((side - rows) // 2, (side - columns) // 2) if origin is None else origin
    square = table.view(1, side, side, -1)
    return square[:, top : top + rows, left : left + columns].flatten(1, 2)


def side_of(table: Tensor) -> int:
    """Tokens per side of a table (1, side * side, D)."""
    return math.isqrt(table.shape[1])


def crops(table: Tensor, rows: int, columns: int, origins: Tensor) -> Tensor:
    """(B, H * W, D): parts of a table, for origins (B, 2) on its device: row and column."""
    across, down = torch.arange(columns, device=table.device), torch.arange(rows, device=table.device)
    places = (origins[:, 0, None] + down)[:, :, None] * side_of(table) + (origins[:, 1, None] + across)[:, None]
    return table[0][places.flatten(1)]


def sincos_table(
    width: int, side: int, *, step: float = 1.0, start: float = 0.0, device: torch.device | str = "cpu"
) -> Tensor:
    """The table (1, side * side, D) float32 of coordinates `start + step * index`.

    The first half of the features encodes the column, the second the row; of each, sines come before cosines.
    """
    quarter = width // 4
    kind = torch.float64 if torch.device(device).type != "mps" else torch.float32
    frequencies = _PERIOD ** -(torch.arange(quarter, dtype=kind, device=device) / quarter)
    places = start + step * torch.arange(side, dtype=kind, device=device)
    angles = places[:, None] * frequencies  # (side, D / 4)
    line = torch.cat((angles.sin(), angles.cos()), dim=1).float()  # (side, D / 2)
    column, row = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat((column, row), dim=-1).view(1, side * side, -1)


def scaled_table(width: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """The table for images of about `size` x `size` tokens: its middle of that size always spans 0 to 16."""
    side, step = int(REACH * size), BASE / size
    return sincos_table(width, side, step=step, start=-step * (side - size) / 2, device=device)


def scaled_size(width: int, height: int) -> int:
    """The size of `scaled_table` for a resolution in pixels."""
    return round(math.sqrt(width * height)) // 8 // 2


def choose_size(sizes: Sequence[int], rows: int, columns: int) -> int:
    """Which of the sizes for `scaled_table` an image gets, by the number of its tokens.

    Images that are longer than any table for their area get one of their own.
    """
    ordered = sorted(set(sizes))
    chosen = next(
        (small for small, large in pairwise(ordered) if rows * columns <= (small**2 + large**2) // 2), ordered[-1]
    )
    longest = max(rows, columns)
    return chosen if longest <= int(REACH * chosen) else longest
