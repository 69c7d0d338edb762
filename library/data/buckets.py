"""Which training size an image gets, and how it is resized and cropped to it. Pure arithmetic."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, Protocol

from library.types import Size


class BucketSettings(Protocol):
    """The part of a dataset's settings that decides sizes."""

    @property
    def resolution(self) -> Size:
        """Its area limits that of a bucket; without bucketing the one size of all samples."""

    @property
    def enable_bucket(self) -> bool:
        """Whether images keep about their aspect ratio."""

    @property
    def min_bucket_reso(self) -> int:
        """Shortest side."""

    @property
    def max_bucket_reso(self) -> int:
        """Longest side."""

    @property
    def bucket_reso_steps(self) -> int:
        """Sides are multiples of this."""

    @property
    def bucket_no_upscale(self) -> bool:
        """Buckets follow the images, which are never enlarged."""


class Assignment(NamedTuple):
    """What becomes of an image: it is resized, and `bucket` is cut out of it at (`left`, `top`)."""

    bucket: Size
    resized: Size
    left: int
    top: int
    ar_error: float
    """Aspect ratio of the bucket minus that of the image."""
    too_small: bool = False
    """Whether a side is shorter than the step of the sides, so that the rules had to be broken."""

    @property
    def crop_loss(self) -> float:
        """Part of the resized image that is cut off."""
        return 1 - self.bucket.area / self.resized.area


def limits(minimum: int, maximum: int, step: int) -> tuple[int, int]:
    """Shortest side rounded down and longest side rounded up to a multiple of `step`."""
    return minimum // step * step, -(-maximum // step) * step


@lru_cache(maxsize=64)
def predefined(resolution: Size, minimum: int, maximum: int, step: int) -> tuple[Size, ...]:
    """The buckets for images that may be enlarged, sorted; none has more area than `resolution`."""
    minimum, maximum = limits(minimum, maximum, step)
    area = resolution.width * resolution.height
    side = max(int(math.sqrt(area) // step), 1) * step
    sizes = {Size(side, side)}
    for width in range(max(minimum, step), maximum + 1, step):
        height = min(maximum, area // width // step * step)
        if height >= max(minimum, step):
            sizes |= {Size(width, height), Size(height, width)}
    return tuple(sorted(sizes))


def assign(image: Size, settings: BucketSettings) -> Assignment:
    """Bucket, size after resizing, and centred crop; sides are never 0, the resized image covers the bucket."""
    if settings.enable_bucket and settings.bucket_no_upscale:
        return _without_enlarging(image, settings.resolution, settings.bucket_reso_steps)
    if settings.enable_bucket:
        sizes = predefined(
            settings.resolution, settings.min_bucket_reso, settings.max_bucket_reso, settings.bucket_reso_steps
        )
        return covering(image, _nearest(image, sizes))
    return covering(image, settings.resolution)


def _nearest(image: Size, sizes: tuple[Size, ...]) -> Size:
    """The image's own size, or else that of the nearest aspect ratio; the smallest of several."""
    if image in sizes:
        return image
    aspect = image.width / image.height
    errors = [abs(ratio - aspect) for ratio in _aspects(sizes)]
    return sizes[errors.index(min(errors))]


@lru_cache(maxsize=64)
def _aspects(sizes: tuple[Size, ...]) -> tuple[float, ...]:
    return tuple(size.width / size.height for size in sizes)


def covering(image: Size, bucket: Size) -> Assignment:
    """What becomes of an image in a bucket: resized to cover it, and cropped to it."""
    wide = image.width / image.height > bucket.width / bucket.height
    scale = bucket.height / image.height if wide else bucket.width / image.width
    return _assignment(image, bucket, _scaled(image, scale, bucket))


def _without_enlarging(image: Size, resolution: Size, step: int) -> Assignment:
    """Reduced to the area of `resolution` where necessary, then cropped to multiples of `step`."""
    resized = image if image.area <= resolution.area else _reduced(image, resolution.area, step)
    width, height = resized.width // step * step, resized.height // step * step
    short, long = max(min(width, height), step), max(width, height, step)
    if short * long > resolution.area:  # enlarging to the step, or rounding, has won too many pixels
        long = max(resolution.area // short // step, 1) * step
    bucket = Size(long, short) if width > height else Size(short, long)
    if resized.width >= bucket.width and resized.height >= bucket.height:
        return _assignment(image, bucket, resized)
    scale = max(bucket.width / image.width, bucket.height / image.height)
    return _assignment(image, bucket, _scaled(image, scale, bucket), too_small=True)


def _scaled(image: Size, scale: float, least: Size) -> Size:
    width, height = int(image.width * scale + 0.5), int(image.height * scale + 0.5)
    return Size(max(width, least.width), max(height, least.height))


def _reduced(image: Size, area: int, step: int) -> Size:
    """A size of about `area` with one side a multiple of `step`: that which keeps the aspect ratio better."""
    aspect = image.width / image.height
    ideal_width = math.sqrt(area * aspect)
    ideal_height = area / ideal_width

    def rounded(length: float) -> int:
        return int(length + 0.5) // step * step

    width, height = rounded(ideal_width), rounded(ideal_height)
    error_by_width = _aspect_error(width, rounded(width / aspect), aspect)
    error_by_height = _aspect_error(rounded(height * aspect), height, aspect)
    if math.isinf(error_by_width) and math.isinf(error_by_height):
        return Size(int(ideal_width), int(ideal_height))
    if error_by_width < error_by_height:
        return Size(width, int(width / aspect + 0.5))
    return Size(int(height * aspect + 0.5), height)


def _aspect_error(width: int, height: int, aspect: float) -> float:
    return abs(width / height - aspect) if width and height else math.inf


def _assignment(image: Size, bucket: Size, resized: Size, *, too_small: bool = False) -> Assignment:
    return Assignment(
        bucket=bucket,
        resized=resized,
        left=(resized.width - bucket.width) // 2,
        top=(resized.height - bucket.height) // 2,
        ar_error=bucket.width / bucket.height - image.width / image.height,
        too_small=too_small,
    )
