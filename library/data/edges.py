"""Edges of a picture, as guides for ControlNets: `tools/canny.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from library.data import picture_files
from library.data.picture_files import Pixels
from library.log import UserError, get_logger
from library.option_groups import CannyOptions

logger = get_logger(__name__)


def edges(pixels: Pixels, low: int, high: int) -> Pixels:
    """White lines on black, where the grey values change (Canny).

    Args:
        pixels: (H, W, 3), RGB.
        low: gradients from here on continue an edge; the smaller one of both is this one.
        high: gradients from here on begin an edge.
    """
    import cv2

    grey = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.Canny(grey, low, high), dtype=np.uint8)


def run(options: CannyOptions) -> None:
    """Draws the edges of a file into another. Errors: UserError for missing names, DataError for the input."""
    if not options.input or not options.output:
        raise UserError("--input and --output are needed", hint="name two pictures")
    output = picture_files.check_name(options.output, "--output")
    if output.exists() and Path(options.input).exists() and output.samefile(options.input) and not options.overwrite:
        hint = "choose another name, or add --overwrite"
        raise UserError(f"{output} is the file that is read", "--output", hint, code="E-OUTPUT-INPUT")
    found = edges(picture_files.upright(options.input).on(None), options.thres1, options.thres2)
    picture_files.save(found, output)
    logger.info("%s: %dx%d, %.1f%% edges", output, found.shape[1], found.shape[0], 100 * float((found > 0).mean()))
