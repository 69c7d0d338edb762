"""In which line of a TOML or JSON text a value stands."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

Path = tuple[str | int, ...]
"""Keys and indices from the root of the document."""

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]#]+?)\s*\]")
_KEY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_NAME = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")
_SPACE = re.compile(r"\s*")


def line_of(path: Path, lines: Mapping[Path, int]) -> int | None:
    """The line of a value, or else of the nearest value around it."""
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None


def spelled(path: Path) -> str:
    """A path as users read it: `datasets[0].subsets[2].num_repeats`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{shown(part)}" for part in path).lstrip(".")


def shown(name: str) -> str:
    """A key of any kind on one short line."""
    text = name if name.isprintable() and name else json.dumps(name)
    return text if len(text) <= 60 else f"{text[:57]}..."


def toml_lines(text: str) -> dict[Path, int]:
    """Line (from 1) of each table and each key that begins a line."""
    lines: dict[Path, int] = {}
    last_index: dict[Path, int] = {}
    prefix: Path = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            prefix = _table(_names(header[2]), last_index, appends=header[1] == "[[")
            lines.setdefault(prefix, number)
        elif key := _KEY.match(line):
            lines.setdefault(prefix + _names(key[1]), number)
    return lines


def _names(dotted: str) -> tuple[str, ...]:
    return tuple(name.strip("\"'") for name in _NAME.findall(dotted))


def _table(names: tuple[str, ...], last_index: dict[Path, int], *, appends: bool) -> Path:
    """The path of a table header, with the indices of the lists of tables on the way."""
    path: Path = ()
    for name in names[:-1]:
        path += (name,)
        if path in last_index:
            path += (last_index[path],)
    path += names[-1:]
    if appends:
        last_index[path] = last_index.get(path, -1) + 1
    if path in last_index:
        path += (last_index[path],)
    return path


def json_lines(text: str) -> dict[Path, int]:
    """Line (from 1) of each member and element of a JSON text that has been parsed before."""
    lines: dict[Path, int] = {}
    _walk(text, _skip(text, 0), (), lines)
    return lines


def _walk(text: str, at: int, path: Path, lines: dict[Path, int]) -> int:
    """Notes the lines below the value at `at`; gives the position after it."""
    opening = text[at]
    if opening not in "{[":
        return json.JSONDecoder().raw_decode(text, at)[1]
    at, index = _skip(text, at + 1), 0
    while text[at] not in "}]":
        if opening == "{":
            name, after = json.JSONDecoder().raw_decode(text, at)
            inner: Path = (*path, name)
            lines[inner] = text.count("\n", 0, at) + 1
            at = _skip(text, _skip(text, after) + 1)  # past the colon
        else:
            inner = (*path, index)
            lines[inner] = text.count("\n", 0, at) + 1
            index += 1
        at = _skip(text, _walk(text, at, inner, lines))
        if text[at] == ",":
            at = _skip(text, at + 1)
    return at + 1


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()
