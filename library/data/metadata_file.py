"""Metadata files: captions, tags and sizes of images in a JSON object, or one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data.positions import shown
from library.data.settings import SubsetSettings
from library.files import read_text
from library.log import DataError
from library.types import Finding, Size

CODE = "E-DATA-META"
_WRONG_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Entry:
    """What a metadata file says of one image."""

    key: str
    """A path, or a name below the image folder with or without extension."""
    caption: str | None
    tags: str | None
    train_resolution: Size | None = None
    image_size: Size | None = None


@dataclass
class MetadataFile:
    """The entries of a file, and what is wrong with it."""

    entries: list[Entry] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def read(path: str, where: str) -> MetadataFile:
    """Reads a file; whatever is wrong becomes a finding."""
    result = MetadataFile()
    try:
        text = read_text(Path(path))
        pairs = list(_lines(text)) if path.lower().endswith(".jsonl") else list(_members(text))
    except DataError as error:
        hint = error.hint or "check metadata_file or --in_json"
        result.findings.append(Finding(error=True, what=f"{error.what}: {path}", where=where, hint=hint, code=CODE))
        return result
    except (ValueError, RecursionError) as error:
        what = f"not a metadata file: {path} ({error})"
        hint = "a .json file holds one object of entries, a .jsonl file one object a line"
        result.findings.append(Finding(error=True, what=what, where=where, hint=hint, code=CODE))
        return result
    wrong: list[str] = []
    for key, content in pairs:
        found = _entry(key, content)
        if isinstance(found, str):
            wrong.append(f"{shown(key)}: {found}")
        else:
            result.entries.append(found)
    if wrong:
        more = f" and {len(wrong) - _WRONG_SHOWN} more" if len(wrong) > _WRONG_SHOWN else ""
        what = f"{len(wrong)} entries of {path} can't be used: {'; '.join(wrong[:_WRONG_SHOWN])}{more}"
        result.findings.append(Finding(error=True, what=what, where=where, code=CODE))
    elif not result.entries:
        result.findings.append(Finding(error=False, what=f"{path} has no entries", where=where, code=CODE))
    return result


def composed(entry: Entry, settings: SubsetSettings) -> str:
    """The text of an entry: caption and tags joined; with wildcards the tags go to every line of the caption."""
    caption, tags, separator = entry.caption or "", entry.tags or "", settings.caption_separator
    if not caption or not tags:
        return caption or tags
    if not settings.enable_wildcard:
        return caption + separator + tags
    in_line = separator.join(tags.splitlines())
    return "\n".join(line + separator + in_line for line in caption.splitlines() if line.strip())


class _Wrong(str):
    """What is wrong with a line."""


def _members(text: str) -> Iterator[tuple[str, Any]]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it isn't an object")
    yield from content.items()


def _lines(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            yield f"line {number}", _Wrong(f"it isn't JSON ({error})")
            continue
        key = content.get("image_path") if isinstance(content, dict) else None
        if not isinstance(key, str) or not key:
            yield f"line {number}", _Wrong("it has no image_path")
        else:  # sizes of training are no part of this format
            yield key, {name: value for name, value in content.items() if name != "train_resolution"}


def _entry(key: str, content: Any) -> Entry | str:
    """An entry, or what is wrong with it."""
    if isinstance(content, _Wrong):
        return str(content)
    if not isinstance(content, dict):
        return "it isn't an object"
    if not key.strip() or "\0" in key or any("\ud800" <= character <= "\udfff" for character in key):
        return "no file can have this name"
    for name in ("caption", "tags"):
        if not isinstance(content.get(name), str | None):
            return f"{name} isn't a text"
    sizes = {}
    for name in ("train_resolution", "image_size"):
        try:
            sizes[name] = _size(content.get(name))
        except ValueError:
            return f"{name} isn't [width, height]"
    return Entry(key, content.get("caption"), content.get("tags"), sizes["train_resolution"], sizes["image_size"])


def _size(value: Any) -> Size | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(value)
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in value):
        raise ValueError(value)
    return Size(value[0], value[1])
