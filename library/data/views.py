"""What one sample shows of its image: size, crop, mirroring and colours, drawn anew each time. Pure arithmetic."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from library.data.items import Item
from library.types import Size

MIRRORED_SHARE = 0.5
COLOURED_SHARE = 0.33
HUE_DEGREES = 16.0
"""Largest shift of the hue on the circle of 360: 8 on the scale of 180 that the option is defined with."""
GAMMA = (0.95, 1.05)
SMALLEST_SHAKEN_FACE = 40
"""Pixels; the crop around a smaller face isn't moved at random."""


@dataclass(frozen=True, slots=True)
class View:
    """What a sample shows: the image is resized, its bucket is cut out at (`left`, `top`) and mirrored at last."""

    resized: Size
    left: int
    top: int
    mirrored: bool = False
    hue: float | None = None
    """Degrees by which hues are turned."""
    gamma: float | None = None
    """Power to which values from 0 to 255 are raised."""

    def shown_left(self, bucket: Size) -> int:
        """Left of the crop in the resized image as shown, that is, mirrored where the sample is."""
        return self.resized.width - bucket.width - self.left if self.mirrored else self.left


class _Placed(NamedTuple):
    """Where the crop lies."""

    resized: Size
    left: int
    top: int


def still(item: Item) -> View:
    """The view with nothing random: crop in the middle, not mirrored."""
    given = item.assignment
    return View(given.resized, given.left, given.top)


def drawn(item: Item, generator: random.Random) -> View:
    """A view with all that the subset wants at random.

    Draws only what is wanted, in this order: mirroring, place, colours.
    """
    subset, given = item.subset, item.assignment
    mirrored = subset.flip_aug and generator.random() < MIRRORED_SHARE
    placed = _Placed(given.resized, given.left, given.top)
    if shows_face(item):
        placed = _around_face(item, generator)
    elif subset.random_crop:
        placed = _anywhere(item, generator)
    hue, gamma = _colours(generator) if subset.color_aug else (None, None)
    return View(*placed, mirrored, hue, gamma)


def shows_face(item: Item) -> bool:
    """Whether the crop is laid around a face; an image that has the wanted size already is left alone."""
    face, limits = item.face, item.subset.face_crop_aug_range
    if face is None or limits is None or item.original == item.assignment.bucket:
        return False
    return face[0] > 0 and max(face[2:]) > 0


def _anywhere(item: Item, generator: random.Random) -> _Placed:
    """A crop anywhere in the resized image."""
    resized, bucket = item.assignment.resized, item.assignment.bucket
    by_x, by_y = resized.width - bucket.width, resized.height - bucket.height
    left = generator.randint(0, by_x) if by_x > 0 else 0
    top = generator.randint(0, by_y) if by_y > 0 else 0
    return _Placed(resized, left, top)


def _around_face(item: Item, generator: random.Random) -> _Placed:
    """A crop around a face, which fills between a smallest and a largest part of it.

    Enlarges the image only where it would not cover the crop otherwise.
    """
    assert item.face is not None
    assert item.subset.face_crop_aug_range is not None
    x, y, *sides = item.face
    low, high = item.subset.face_crop_aug_range
    image, bucket, face = item.original, item.assignment.bucket, max(sides)
    short = min(bucket)
    cover = max(bucket.height / image.height, bucket.width / image.width)
    smallest = max(cover, min(1.0, _ratio(short, face * high)))
    largest = max(smallest, min(1.0, _ratio(short, face * low)))
    scale = generator.uniform(smallest, largest) if smallest < largest else smallest

    def scaled(length: int) -> int:
        return int(length * scale + 0.5)

    resized = Size(max(scaled(image.width), bucket.width), max(scaled(image.height), bucket.height))
    shaken = low != high and face > short // 10 and face >= SMALLEST_SHAKEN_FACE

    def place(target: int, length: int, centre: int) -> int:
        at = centre - target // 2
        if item.subset.random_crop:
            reach = max(length - centre, centre)
            at += generator.randint(0, reach) + generator.randint(0, reach) - reach
        elif shaken:
            at += generator.randint(-face // 20, face // 20)
        return max(0, min(at, length - target))

    top = place(bucket.height, resized.height, scaled(y))
    left = place(bucket.width, resized.width, scaled(x))
    return _Placed(resized, left, top)


def _ratio(length: int, divisor: float) -> float:
    return length / divisor if divisor > 0 else float("inf")


def _colours(generator: random.Random) -> tuple[float | None, float | None]:
    """A shift of the hue, or a gamma, or, most often, neither."""
    if generator.random() >= COLOURED_SHARE:
        return None, None
    if generator.random() < 0.5:
        return generator.uniform(-HUE_DEGREES, HUE_DEGREES), None
    return None, generator.uniform(*GAMMA)
