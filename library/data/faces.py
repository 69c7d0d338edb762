"""Faces in pictures, turned upright and cut out: `tools/detect_face_rotate.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from library.data import picture_files
from library.data.picture_files import Pixels
from library.data.resizing import resize
from library.log import UserError, get_logger
from library.option_groups import FaceOptions
from library.progress import Progress
from library.types import Size

logger = get_logger(__name__)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
LEAST_SCORE = 0.9
_LEFT_EYE, _RIGHT_EYE = slice(11, 17), slice(17, 23)
"""Of the 28 points of anime-face-detector, as they are seen in the picture."""


@dataclass(frozen=True)
class Face:
    """A face in a picture."""

    centre: tuple[float, float]
    width: float
    height: float
    score: float
    eyes: tuple[tuple[float, float], tuple[float, float]]
    """The one on the left of the picture first."""

    @property
    def size(self) -> float:
        """The longer side."""
        return max(self.width, self.height)

    @property
    def angle(self) -> float:
        """By how many degrees the line of the eyes falls towards the right."""
        (left_x, left_y), (right_x, right_y) = self.eyes
        return math.degrees(math.atan2(right_y - left_y, right_x - left_x))

    def moved(self, factor: float = 1.0, left: float = 0.0, top: float = 0.0) -> Face:
        """The same face in a picture of another size, without some of its columns and rows."""
        centre = self.centre[0] * factor - left, self.centre[1] * factor - top
        return replace(self, centre=centre, width=self.width * factor, height=self.height * factor)


Detector = Callable[[Pixels], list[Face]]
"""The faces in RGB pixels."""


def wanted(faces: list[Face], least: int | None, most: int | None) -> list[Face]:
    """Those that are certain and of a size from `least` to below `most`, the largest first."""
    fitting = [
        face
        for face in faces
        if face.score >= LEAST_SCORE and (least is None or face.size >= least) and (most is None or face.size < most)
    ]
    return sorted(fitting, key=lambda face: -face.size)


# detectors


def detector(model: str | None) -> Detector:
    """For drawn faces the package anime-face-detector; with a model, OpenCV's YuNet, for photos.

    Errors: UserError when the package or the file isn't there.
    """
    return _yunet(model) if model else _anime()


def _anime() -> Detector:
    try:
        from anime_face_detector import create_detector
    except ImportError:
        what = "drawn faces are found by the package anime-face-detector, which isn't installed"
        hint = "pip install anime-face-detector, or give --face_model for photos"
        raise UserError(what, hint=hint, code="E-PACKAGE") from None
    found: Any = create_detector("yolov3")

    def detect(pixels: Pixels) -> list[Face]:
        return [_drawn(result) for result in found(np.ascontiguousarray(pixels[..., ::-1]))]

    return detect


def _drawn(result: dict[str, Any]) -> Face:
    left, top, right, bottom, score = (float(value) for value in result["bbox"][:5])
    points = np.asarray(result["keypoints"], dtype=float)
    eyes = [points[part, :2].mean(axis=0) for part in (_LEFT_EYE, _RIGHT_EYE)]
    centre = (left + right) / 2, (top + bottom) / 2
    return Face(centre, right - left, bottom - top, score, _ordered(eyes))


def _yunet(path: str) -> Detector:
    import cv2

    if not Path(path).is_file():
        raise UserError(f"{path} isn't there", "--face_model", "give YuNet's .onnx file", code="E-FILE-MISSING")
    try:
        found = cv2.FaceDetectorYN.create(path, "", (320, 320), LEAST_SCORE)
    except cv2.error:
        hint = "give face_detection_yunet_….onnx of the OpenCV zoo"
        raise UserError(f"{path} is no model that finds faces", "--face_model", hint, code="E-MODEL-KIND") from None

    def detect(pixels: Pixels) -> list[Face]:
        found.setInputSize((pixels.shape[1], pixels.shape[0]))
        _, rows = found.detect(np.ascontiguousarray(pixels[..., ::-1]))
        return [] if rows is None else [_photographed(row) for row in rows]

    return detect


def _photographed(row: np.ndarray[Any, np.dtype[np.float32]]) -> Face:
    left, top, width, height = (float(value) for value in row[:4])
    return Face((left + width / 2, top + height / 2), width, height, float(row[14]), _ordered([row[4:6], row[6:8]]))


def _ordered(eyes: list[Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    left, right = sorted((float(x), float(y)) for x, y in eyes)
    return left, right


# cutting


@dataclass(frozen=True)
class Cut:
    """What becomes of a face."""

    rotate: bool = False
    crop: tuple[float, float] | None = None
    """Width and height; None: the whole picture."""
    relative: bool = False
    """`crop` are multiples of the face's size."""
    face_size: int | None = None
    """Size that the face is to have."""
    fit: bool = False
    """The picture is resized so that `crop` just fits."""


def cut_out(pixels: Pixels, face: Face, cut: Cut) -> tuple[Pixels, Face]:
    """The picture of a face, and the face in it."""
    if cut.rotate:
        pixels = _rotated(pixels, face)
    window = _window(face, cut)
    factor = _factor(pixels, face, cut, window)
    if factor != 1:
        size = Size(*(max(1, round(side * factor)) for side in pixels.shape[1::-1]))
        if window and (cut.fit or cut.face_size):
            size = Size(max(size.width, window[0]), max(size.height, window[1]))
        pixels = resize(pixels, size, "area" if factor < 1 else "lanczos")
        face = face.moved(factor)
    if window is None:
        return pixels, face
    left, top, width, height = _inside(pixels, face, window)
    return pixels[top : top + height, left : left + width], face.moved(1.0, left, top)


def _window(face: Face, cut: Cut) -> tuple[int, int] | None:
    if cut.crop is None:
        return None
    factor = face.size if cut.relative else 1.0
    return max(1, round(cut.crop[0] * factor)), max(1, round(cut.crop[1] * factor))


def _factor(pixels: Pixels, face: Face, cut: Cut, window: tuple[int, int] | None) -> float:
    height, width = pixels.shape[:2]
    fitting = max(window[0] / width, window[1] / height) if window else 0.0
    if cut.fit:
        return fitting
    if not cut.face_size:
        return 1.0
    factor = cut.face_size / face.size
    if factor < fitting:
        logger.warning("the picture would be smaller than the crop, so that the face is %d", face.size * fitting)
        return fitting
    return factor


def _inside(pixels: Pixels, face: Face, window: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of the window around a face, moved into the picture."""
    places = []
    for centre, wished, side in zip(face.centre, window, pixels.shape[1::-1], strict=True):
        length = min(wished, side)
        if length < wished:
            logger.warning("the picture has %d pixels where %d are wanted", side, wished)
        places.append((min(max(0, round(centre - length / 2)), side - length), length))
    (left, width), (top, height) = places
    return left, top, width, height


def _rotated(pixels: Pixels, face: Face) -> Pixels:
    import cv2

    matrix = cv2.getRotationMatrix2D(face.centre, face.angle, 1)
    size = pixels.shape[1], pixels.shape[0]
    turned = cv2.warpAffine(pixels, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(turned, dtype=np.uint8)


# the tool


def run(options: FaceOptions) -> None:
    """Cuts out the faces in a folder's pictures.

    Errors: UserError for options and a detector that isn't there; DataError for a picture that can't be read.
    """
    if not options.src_dir or not options.dst_dir:
        raise UserError("--src_dir and --dst_dir are needed", hint="name two folders")
    cut = cut_of(options)
    images, _ = picture_files.pictures(Path(options.src_dir), "--src_dir", SUFFIXES)
    detect = detector(options.face_model)
    made = without = 0
    with Progress("faces", len(images), "images") as progress:
        for path in images:
            pixels = np.ascontiguousarray(picture_files.upright(path).on(None))
            faces = wanted(detect(pixels), options.min_size, options.max_size)
            without += not faces
            for number, face in enumerate(faces if options.multiple_faces else faces[:1]):
                part, placed = cut_out(pixels, face, cut)
                name = _name(path.stem, placed, number if options.multiple_faces else None)
                shown = _boxed(part, placed) if options.debug else part
                picture_files.save(np.ascontiguousarray(shown), Path(options.dst_dir) / name)
                made += 1
            progress.advance()
    logger.info("%s: %d faces from %d pictures, %d without one", options.dst_dir, made, len(images), without)


def cut_of(options: FaceOptions) -> Cut:
    """What the options say. Errors: UserError for options that contradict each other."""
    size = picture_files.pair(options.crop_size, "--crop_size", int)
    ratio = picture_files.pair(options.crop_ratio, "--crop_ratio", float)
    for one, other, given in (
        ("--crop_size", "--crop_ratio", size and ratio),
        ("--resize_face_size", "--resize_fit", options.resize_face_size and options.resize_fit),
        ("--resize_face_size", "--crop_ratio", options.resize_face_size and ratio),
        ("--resize_fit", "--crop_ratio", options.resize_fit and ratio),
    ):
        if given:
            raise UserError(f"{one} and {other} exclude each other", one, "give one of them", code="E-CHECK")
    if options.resize_fit and not size:
        raise UserError("--resize_fit needs --crop_size", "--resize_fit", "give both", code="E-CHECK")
    return Cut(options.rotate, size or ratio, bool(ratio), options.resize_face_size, options.resize_fit)


def _name(stem: str, face: Face, number: int | None) -> str:
    rank = "" if number is None else f"_{number + 1:02d}"
    values = (*face.centre, face.width, face.height)
    return f"{stem}{rank}" + "".join(f"_{max(0, round(value)):04d}" for value in values) + ".png"


def _boxed(pixels: Pixels, face: Face) -> Pixels:
    """With a red frame around the face."""
    import cv2

    (x, y), half = face.centre, (face.width / 2, face.height / 2)
    corners = [(round(x + sign * half[0]), round(y + sign * half[1])) for sign in (-1, 1)]
    return np.asarray(cv2.rectangle(pixels.copy(), corners[0], corners[1], (255, 0, 0), 2), dtype=np.uint8)
