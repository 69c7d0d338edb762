"""The text of a dataset configuration: parsed, with the lines of its values and room for the mistakes found in it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data.positions import Path as Position
from library.data.positions import json_lines, line_of, toml_lines
from library.log import UserError, raise_all

CODE = "E-DATASET-CONFIG"


@dataclass
class Document:
    """A parsed configuration, with the lines of its values and the mistakes found so far."""

    content: dict[str, Any]
    file: str | None = None
    lines: Mapping[Position, int] = field(default_factory=dict)
    mistakes: list[UserError] = field(default_factory=list)

    def where(self, position: Position) -> str:
        """File and line of a value."""
        line = line_of(position, self.lines)
        return str(self.file) if line is None else f"{self.file}:{line}"

    def wrong(self, position: Position, what: str, hint: str = "") -> None:
        """Notes a mistake once."""
        self.wrong_at(self.where(position), what, hint)

    def wrong_at(self, where: str, what: str, hint: str = "") -> None:
        """Notes a mistake of a value that isn't in the file, once."""
        mistake = UserError(what, where, hint, code=CODE)
        if str(mistake) not in map(str, self.mistakes):
            self.mistakes.append(mistake)

    def stop_if_wrong(self) -> None:
        """Errors: UserError with all the mistakes."""
        raise_all(self.mistakes)


def read(path: Path) -> Document:
    """The content of a TOML or JSON file. Errors: UserError when it can't be read or parsed."""
    from library.files import read_text

    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        hint = "name it .toml or .json"
        raise UserError("the dataset configuration is neither TOML nor JSON", str(path), hint, code=CODE)
    if not path.is_file():
        raise UserError("the dataset configuration doesn't exist", str(path), "check --dataset_config", code=CODE)
    text = read_text(path)
    try:
        content = _parse_toml(text) if suffix == ".toml" else json.loads(text)
    except RecursionError as error:
        raise UserError("the dataset configuration is nested too deeply", str(path), code=CODE) from error
    except ValueError as error:
        place = re.search(r"line (\d+)", str(error))
        last = text.count("\n") + 1 if "end of document" in str(error) else None
        line = place[1] if place else last
        where = str(path) if line is None else f"{path}:{line}"
        hint = "write Windows paths with / or in 'single quotes'" if suffix == ".toml" and "\\" in text else ""
        raise UserError(f"not valid {suffix[1:].upper()}: {error}", where, hint, code=CODE) from error
    if not isinstance(content, dict):
        raise UserError("the dataset configuration must be one object", str(path), code=CODE)
    return Document(content, str(path), toml_lines(text) if suffix == ".toml" else json_lines(text))


def _parse_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads(text)
    import toml

    return toml.loads(text)  # type: ignore[no-any-return]
