"""Files and folders that options name: whether they can be read and written, tried before anything long begins."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from library.findings import error, warning
from library.types import Finding

_RESERVED_CHARACTERS = frozenset('<>:"/\\|?*')
_RESERVED_NAMES = frozenset(
    ["con", "prn", "aux", "nul", *(f"com{digit}" for digit in range(1, 10)), *(f"lpt{digit}" for digit in range(1, 10))]
)


def check_readable(path: str, option: str) -> list[Finding]:
    """Whether a file or folder exists and can be read."""
    if path.strip("\"'") != path:
        return [error(f"the path has quotation marks in it: {path}", option, "write it without them", "E-FILE-MISSING")]
    place = Path(path)
    try:
        if place.is_dir():
            next(place.iterdir(), None)
        else:
            with place.open("rb") as file:
                file.read(1)
    except FileNotFoundError:
        hint = "check the spelling; a path with spaces must be in quotation marks"
        return [error(f"not found: {path}", option, hint, "E-FILE-MISSING")]
    except (OSError, ValueError) as mistake:  # a path may hold characters that no path can have
        reason = getattr(mistake, "strerror", None) or mistake
        return [error(f"can't be read: {path} ({reason})", option, "check the path and its permissions", "E-FILE-READ")]
    return []


def check_writable(folder: Path, option: str) -> list[Finding]:
    """Whether a folder exists or can be made, and files can be written in it; leaves no file behind."""
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
        probe.unlink()
    except (OSError, ValueError) as mistake:
        what = f"can't write to {folder} ({getattr(mistake, 'strerror', None) or mistake})"
        return [error(what, option, "check the path, its permissions and the disk", "E-DISK-WRITE")]
    return []


def check_output_name(name: str | None) -> list[Finding]:
    """Whether the name of the output can be a file name on every system; None takes the default names."""
    option = "--output_name"
    if name is None:
        return []
    if not name.strip():
        return [error("the name is empty", option, "give a name, or leave the option out")]
    bad = sorted({character for character in name if character in _RESERVED_CHARACTERS or ord(character) < 32})
    if bad:
        shown = " ".join(repr(character)[1:-1] for character in bad)
        what = f"{name!r} holds characters that a file name can't have: {shown}"
        return [error(what, option, "folders go into --output_dir")]
    if name[-1] in ". " or name.split(".")[0].lower() in _RESERVED_NAMES:
        return [error(f"{name!r} can't be a file name on Windows", option, "use another name")]
    if name.endswith((".safetensors", ".ckpt", ".pt")):
        return [warning(f"{name!r} already has an extension; another one is added", option)]
    return []


def cache_home() -> Path:
    """The user's folder for what programs can make again; see the XDG base directory specification."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "image-model-trainer"
