"""Pictures that the image tools read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from library import files
from library.data.decoding import Decoded, decoded
from library.data.headers import DamagedImageError, read_header
from library.log import DataError, UserError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
"""What can be written, by suffix."""
QUALITY = 100


def upright(path: Path | str) -> Decoded:
    """The picture in a file, made upright. Errors: DataError when it is none."""
    if not Path(path).is_file():
        raise DataError("no such file", str(path), "check the path", code="E-FILE-MISSING")
    try:
        header = read_header(str(path))
    except (DamagedImageError, OSError) as error:
        raise DataError(f"can't read the image: {error}", str(path), "mend or remove it", code="E-IMAGE") from error
    return decoded(str(path), header.orientation)


def check_name(path: Path | str, option: str) -> Path:
    """A path that a picture can be written to. Errors: UserError for another suffix."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"{path.name} is no name for a picture", option, f"end it in one of {known}", code="E-OUTPUT")
    return path


def save(pixels: Pixels, path: Path) -> None:
    """Writes a picture, grey, RGB or RGBA, whole or not at all. Errors: ResourceError when the disk won't."""
    kind = FORMATS[path.suffix.lower()]
    settings: dict[str, Any] = {"PNG": {}, "BMP": {}}.get(kind, {"quality": QUALITY})
    image = Image.fromarray(pixels if pixels.ndim == 2 or kind in ("PNG", "WEBP") else pixels[..., :3])
    with files.atomic_write(path) as temporary:
        image.save(temporary, kind, **settings)


def pictures(folder: Path, option: str, suffixes: frozenset[str]) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder, and its other files, sorted. Errors: DataError when there is no picture."""
    if not folder.is_dir():
        raise DataError("no such folder", f"{option} {folder}", "check the path", code="E-DATA-FOLDER")
    found = sorted(path for path in folder.iterdir() if path.is_file())
    images = [path for path in found if path.suffix.lower() in suffixes]
    if not images:
        what = f"no picture ({', '.join(sorted(suffixes))}) in this folder"
        raise DataError(what, f"{option} {folder}", "name another one", code="E-DATA-FOLDER")
    return images, [path for path in found if path not in set(images)]


def sizes(text: str, option: str) -> list[tuple[int, int]]:
    """Sizes such as `512x512,384x384`. Errors: UserError."""
    found = []
    for part in text.replace(" ", "").lower().split(","):
        width, _, height = part.partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise UserError(f"{part!r} is no size", option, "write 512x512,384x384", code="E-OPTION")
        found.append((int(width), int(height)))
    return found


def pair(text: str | None, option: str, kind: type[int] | type[float]) -> tuple[float, float] | None:
    """Two numbers such as `512,768`; None: none were given. Errors: UserError."""
    if not text:
        return None
    try:
        first, second = (kind(part) for part in text.split(","))
        if min(first, second) <= 0 or max(first, second) == float("inf"):
            raise ValueError
    except ValueError:
        raise UserError(f"{text!r} isn't width,height", option, "write two numbers above 0", code="E-OPTION") from None
    return first, second
