"""Which positions SD3's transformer gets for an image: of its own table or a scaled one, of the middle or elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.devices import send
from library.findings import error
from library.models import positions
from library.randomness import Draws, Stream
from library.types import Finding, Size


@dataclass
class Sd3Positions:
    """Sizes in tokens are (rows, columns)."""

    table_side: int
    """Of the model's own table, in tokens."""
    pixels: int
    """Per side of a token."""
    random_crop_rate: float = 0.0
    """How often training takes positions from a random place of the table."""
    scaled: bool = False
    """Whether positions span the same range at every resolution."""
    resolutions: Sequence[Size] = ()
    """That are trained at; scaled tables are made for them."""
    _tables: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def findings(self, sizes: Collection[Size]) -> list[Finding]:
        """What is wrong with images of these sizes."""
        most, large = self.table_side * self.pixels, max(sizes, key=max, default=None)
        if self.scaled or large is None or max(large) <= most:
            return []
        what = f"images of {large.width} x {large.height} are too large for this model, which has positions for {most}"
        where, hint = "--resolution, --max_bucket_reso", "lower them, or give --enable_scaled_pos_embed"
        return [error(what, where, hint, "E-MODEL-SIZE")]

    def origins(self, size: Size, draws: Draws) -> Tensor:
        """(B, 2): row and column of the table at which the positions of images of that size begin, in training."""
        extent = torch.tensor([-(-size.height // self.pixels), -(-size.width // self.pixels)])
        room = self.side(*extent.tolist()) - extent
        numbers = [draws.uniform_scalars(Stream.POSITIONS + number) for number in range(3)]
        at_random = (torch.stack(numbers[1:], dim=1) * (room + 1)).long()
        moved = (numbers[0] < self.random_crop_rate)[:, None]
        return send(torch.where(moved, at_random, room // 2), draws.device)

    def of(self, table: Tensor, rows: int, columns: int, origins: Tensor | None) -> Tensor:
        """(1 or B, N, D): the positions of images; `table` (1, side * side, D) is the model's own.

        `origins` as of the method; None: the middle.
        """
        if self.scaled:
            table = self._scaled(self._size(rows, columns), table)
        if origins is None:
            return positions.crop(table, rows, columns)
        return positions.crops(table, rows, columns, origins)

    def side(self, rows: int, columns: int) -> int:
        """Tokens per side of the table that images of that size get."""
        return int(positions.REACH * self._size(rows, columns)) if self.scaled else self.table_side

    def _size(self, rows: int, columns: int) -> int:
        return positions.choose_size([positions.scaled_size(*size) for size in self.resolutions], rows, columns)

    def _scaled(self, size: int, like: Tensor) -> Tensor:
        key = (size, like.device)
        if key not in self._tables:
            self._tables[key] = positions.scaled_table(like.shape[-1], size, like.device)
        return self._tables[key]
