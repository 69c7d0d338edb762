"""Config files: options as TOML, flat or with one level of tables whose names mean nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.encodings import decode
from library.log import UserError, get_logger, raise_all

logger = get_logger(__name__)

_KEY = re.compile(r"""^\s*(?:"([^"]+)"|'([^']+)'|([\w-]+))\s*=""")


@dataclass(frozen=True)
class ConfigFile:
    """What a config file says, not checked yet."""

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]
    """Line (from 1) of each key."""

    def where(self, key: str) -> str:
        """File and line of a key, for messages."""
        line = self.lines.get(key)
        return str(self.path) if line is None else f"{self.path}:{line}"

    def beside(self, path: str) -> str:
        """The path, relative to the file's folder if it exists only there."""
        if not path or _exists(Path(path)):
            return path
        beside = self.path.parent / path
        return str(beside) if _exists(beside) else path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name the file system can't have
        return False


def with_suffix(name: str) -> Path:
    """The path of a config file, whose `.toml` may be left out."""
    return Path(name if name.endswith(".toml") else name + ".toml")


def read_config(path: Path) -> ConfigFile:
    """The content of a config file. Errors: UserError when it can't be read or isn't TOML."""
    try:
        text, encoding = decode(path.read_bytes())
    except OSError as error:
        hint = "check --config_file" if path.suffix else ""
        raise UserError(f"can't read the config file: {error.strerror}", str(path), hint, code="E-CONFIG") from None
    if encoding != "utf-8":
        logger.warning("%s is not UTF-8; read as %s", path, encoding)
    text = text.replace("\r\n", "\n")
    config = ConfigFile(path, {}, _lines(text))
    errors = []
    for name, value in _parse(text, path).items():
        for key, inner in value.items() if isinstance(value, dict) else [(name, value)]:
            if isinstance(inner, dict):
                what = f"the table {name}.{key} is nested too deeply"
                errors.append(UserError(what, config.where(key), "one level of tables at most", code="E-CONFIG"))
            else:
                config.values[key] = inner
    raise_all(errors)
    return config


def _lines(text: str) -> dict[str, int]:
    matches = ((_KEY.match(line), number) for number, line in enumerate(text.split("\n"), 1))
    return {next(filter(None, match.groups())): number for match, number in matches if match}


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        if sys.version_info >= (3, 11):
            import tomllib

            return tomllib.loads(text)
        import toml

        return dict(toml.loads(text))
    except (
        ValueError,
        IndexError,
    ) as error:  # both libraries' errors are ValueErrors; the old one has stray IndexErrors
        raise _not_toml(text, path, error) from None


def _not_toml(text: str, path: Path, error: Exception) -> UserError:
    found = re.search(r"line (\d+)", str(error))
    at_end = "end of document" in str(error)
    line = int(found[1]) if found else text.count("\n") + 1 if at_end else None
    content = text.split("\n")[line - 1] if line is not None and line <= text.count("\n") + 1 else ""
    hint = "see https://toml.io for the format"
    if "\\" in content:
        hint = "write Windows paths with / or in 'single quotes'"
    elif re.search(r"=\s*(True|False)\s*$", content):
        hint = "write true and false in small letters"
    elif re.search(r"=\s*[A-Za-z/.][^\"']*$", content):
        hint = "put text into quotes"
    where = str(path) if line is None else f"{path}:{line}"
    what = re.sub(r"\s*\((at|line) .*\)$", "", str(error))
    return UserError(f"not valid TOML: {what}", where, hint, code="E-CONFIG")


def write_config(path: Path, values: Mapping[str, Any]) -> None:
    """Writes the values as a flat config file. Errors: UserError when that isn't possible."""
    from library.files import atomic_write

    text = "".join(f"{name} = {_toml(value)}\n" for name, value in sorted(values.items()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write the config file: {error.strerror}", str(path), code="E-CONFIG") from error


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
