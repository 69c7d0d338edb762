"""Ratios by block (LBW) of U-Nets: lists of 12, 17, 20 or 26 numbers, and which module they hit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.log import DataError, UserError

POSITIONS = ("BASE", *(f"IN{n:02}" for n in range(12)), "MID", *(f"OUT{n:02}" for n in range(12)))
"""The 26 of a full list."""


def _numbered(side: str, numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{side}{number:02}" for number in numbers)


LISTS: Mapping[int, tuple[str, ...]] = {
    12: ("BASE", *_numbered("IN", (4, 5, 7, 8)), "MID", *_numbered("OUT", range(6))),
    17: ("BASE", *_numbered("IN", (1, 2, 4, 5, 7, 8)), "MID", *_numbered("OUT", range(3, 12))),
    20: ("BASE", *_numbered("IN", range(9)), "MID", *_numbered("OUT", range(9))),
    26: POSITIONS,
}
"""The positions of a list, by its length."""
SDXL_LISTS, SD_LISTS = (12, 20), (17, 26)
OPTION = "--lbws"


@dataclass(frozen=True)
class BlockRatios:
    """What a file's ratio is multiplied by, for each of the 26 positions."""

    ratios: tuple[float, ...]
    length: int = 26
    """Of the list it comes from."""

    @classmethod
    def of(cls, numbers: Sequence[float]) -> BlockRatios:
        """A list of 12 (SDXL), 17 (SD), 20 (SDXL) or 26 (SD) numbers; positions that a list doesn't have count 1.

        Errors: UserError for another length.
        """
        names = LISTS.get(len(numbers))
        if names is None:
            hint = "give 17 or 26 for SD, 12 or 20 for SDXL"
            raise UserError(f"{len(numbers)} numbers", OPTION, hint, code="E-LBW")
        given = dict(zip(names, map(float, numbers), strict=True))
        return cls(tuple(given.get(name, 1.0) for name in POSITIONS), len(numbers))

    @classmethod
    def parse(cls, text: str) -> BlockRatios:
        """As on the command line: a JSON list, or numbers with commas between. Errors: UserError."""
        try:
            inner = text.strip().removeprefix("[").removesuffix("]")
            numbers = json.loads(f"[{inner}]")
            valid = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"{text!r} is no list of numbers", OPTION, "such as [1,0,0.5,...]", code="E-LBW")
        return cls.of(numbers)

    def check_family(self, family: str) -> None:
        """Errors: UserError when the length of the list is that for another family; see `reading.LORA_FAMILIES`."""
        wanted = {"SDXL": SDXL_LISTS, "SD 1.x or 2.x": SD_LISTS}.get(family)
        if wanted is None and family != "text encoders only":
            raise UserError(f"a LoRA for {family} has no such blocks", OPTION, "leave it out", code="E-LBW")
        if wanted is not None and self.length not in wanted:
            hint = f"for {family} give {wanted[0]} or {wanted[1]}"
            raise UserError(f"{self.length} numbers, for a LoRA for {family}", OPTION, hint, code="E-LBW")

    def ratio(self, name: str) -> float:
        """That of a module, by its name in files; outside of all blocks it is 1.

        Errors: DataError when it belongs to something else than a U-Net.
        """
        if "_double_blocks_" in name or "_single_blocks_" in name or "_joint_blocks_" in name:
            raise DataError(f"{name} has no such blocks", OPTION, "ratios by block are for U-Nets", code="E-LBW")
        where = position(name)
        return 1.0 if where is None else self.ratios[where]


_SIDES = {
    "input_blocks": 1,
    "middle_block": 13,
    "output_blocks": 14,
    "down_blocks": 2,
    "mid_block": 13,
    "up_blocks": 14,
}
"""The position of the first block of each side."""
_NAME = re.compile(
    r"(?:lora|oft)_unet_(?:(input_blocks|output_blocks|middle_block)_(\d+)"
    r"|(down_blocks|up_blocks)_(\d+)_(attentions|resnets|downsamplers|upsamplers)_(\d+)"
    r"|(mid_block))_"
)
_LAST = {"downsamplers": 2, "upsamplers": 2}
"""Their place among the three of a level, from 0; on the way down counted from the second block on."""


def position(name: str) -> int | None:
    """The position (0 to 25) of a module by its name in files, SD's and SDXL's both; text encoders: 0.

    None: it is in no block, such as those of FLUX.
    """
    if name.startswith("lora_te"):
        return 0
    match = _NAME.match(name)
    if match is None:
        return None
    side, number, half, level, kind, index, middle = match.groups()
    if middle or side == "middle_block":
        return _SIDES["mid_block"]
    within = int(number) if side else 3 * int(level) + _LAST.get(kind, int(index))
    found = _SIDES[side or half] + within
    last = 12 if side == "input_blocks" or half == "down_blocks" else len(POSITIONS) - 1
    return found if found <= last else None
