"""Copies of pictures with fewer pixels: `tools/resize_images_to_resolution.py`."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from library import files
from library.data import picture_files
from library.data.folders import IMAGE_SUFFIXES
from library.data.picture_files import Pixels
from library.data.resizing import resize
from library.log import DataError, UserError, get_logger
from library.option_groups import ResizeImagesOptions
from library.progress import Progress
from library.types import Size

logger = get_logger(__name__)


def shrunk(pixels: Pixels, limit: tuple[int, int], divisible_by: int, interpolation: str) -> Pixels:
    """With no more pixels than `limit` has, and the centre of it that both sides are multiples of a number.

    Errors: DataError when nothing would be left.
    """
    height, width = pixels.shape[:2]
    budget = limit[0] * limit[1]
    if width * height > budget:
        factor = math.sqrt(budget / (width * height))
        size = Size(max(1, math.floor(width * factor)), max(1, math.floor(height * factor)))
        pixels = _resized(pixels, size, interpolation)
    height, width = pixels.shape[:2]
    new_width, new_height = width - width % divisible_by, height - height % divisible_by
    if not new_width or not new_height:
        what = f"{width}x{height} has no side that is a multiple of {divisible_by}"
        raise DataError(what, hint="give a smaller --divisible_by", code="E-IMAGE")
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return pixels[top : top + new_height, left : left + new_width]


def _resized(pixels: Pixels, size: Size, interpolation: str) -> Pixels:
    colours = resize(pixels[..., :3], size, interpolation)
    if pixels.shape[2] == 3:
        return colours
    return np.dstack([colours, resize(np.ascontiguousarray(pixels[..., 3]), size, interpolation)])


def run(options: ResizeImagesOptions) -> None:
    """Makes the copies. Errors: UserError for options, DataError for a picture that can't be read."""
    source, target = Path(options.src_img_folder or ""), Path(options.dst_img_folder or "")
    if not options.src_img_folder or not options.dst_img_folder:
        raise UserError("two folders are needed", hint="give src_img_folder dst_img_folder")
    limits = list(dict.fromkeys(picture_files.sizes(options.max_resolution, "--max_resolution")))
    images, others = picture_files.pictures(source, "src_img_folder", IMAGE_SUFFIXES)
    if target.exists() and target.samefile(source):
        what = f"{target} is the folder of the pictures"
        raise UserError(what, "dst_img_folder", "name another one", code="E-OUTPUT-INPUT")
    stems = Counter(path.stem for path in images)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        what = f"{len(twice)} names occur twice, with other suffixes: {', '.join(twice[:3])}"
        raise DataError(what, str(source), "rename one of each", code="E-DATA-FOLDER")
    made = 0
    with Progress("resizing", len(images), "images") as progress:
        for path in images:
            made += _copies(path, target, limits, options)
            progress.advance()
    copied = sum(_associated(path, target, limits, stems, options.copy_associated_files) for path in others)
    logger.info("%s: %d pictures from %d, and %d other files", target, made, len(images), copied)


def _copies(path: Path, target: Path, limits: list[tuple[int, int]], options: ResizeImagesOptions) -> int:
    picture = picture_files.upright(path)
    pixels = picture.on(None)
    if options.save_as_png and picture.opacity is not None:
        pixels = np.dstack([pixels, picture.opacity])
    suffix = ".png" if options.save_as_png else ".jpg"
    for width, height in limits:
        try:
            small = shrunk(pixels, (width, height), options.divisible_by, options.interpolation)
        except DataError as error:
            raise DataError(error.what, str(path), error.hint, code=error.code) from None
        picture_files.save(np.ascontiguousarray(small), target / f"{path.stem}+{width}x{height}{suffix}")
    return len(limits)


def _associated(path: Path, target: Path, limits: list[tuple[int, int]], stems: Counter[str], beside: bool) -> int:
    """Copies a file that is no picture; if it belongs to one and that is wanted, once for each of its copies."""
    names = [path.name]
    if beside and path.stem in stems:
        names = [f"{path.stem}+{width}x{height}{path.suffix}" for width, height in limits]
    for name in names:
        with files.atomic_write(target / name) as temporary:
            shutil.copyfile(path, temporary)
    return len(names)
