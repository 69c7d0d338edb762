"""Tables of options in the documentation: `python -m library.option_docs` renews them from the declarations.

A table stands between `<!-- options:SCRIPT:begin -->` and `<!-- options:SCRIPT:end -->`, SCRIPT being a script's name
without folder and suffix.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from library.log import UserError, command
from library.option_groups import SCRIPTS
from library.option_types import Option, Script, options_of

DOCS = Path(__file__).resolve().parent.parent / "docs"

_MARKED = re.compile(r"(<!-- options:(\S+):begin -->\n).*?(<!-- options:\2:end -->)", re.DOTALL)
_TYPES = {
    "bool": "flag",
    "str": "text",
    "Path": "path",
    "int": "integer",
    "float": "number",
    "int_or_float": "steps or share",
}


def render(script: Script) -> str:
    """The options of a script in Markdown, one table per group."""
    return "\n".join(_table(script, group) for group in script.groups)


def renew(text: str) -> str:
    """The document with new tables. Errors: UserError for a marker that names no script."""

    def replaced(match: re.Match[str]) -> str:
        return f"{match[1]}\n{render(_script(match[2]))}\n{match[3]}"

    return _MARKED.sub(replaced, text)


def documents(folder: Path = DOCS) -> list[Path]:
    """The documents that may hold tables."""
    return sorted(folder.glob("*.md"))


@command
def main() -> None:
    """Renews the tables of all documents."""
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if (new := renew(text)) != text:
            path.write_text(new, encoding="utf-8", newline="\n")
            sys.stdout.write(f"{path}\n")


def _script(name: str) -> Script:
    for script in SCRIPTS:
        if name in (script.name, Path(script.name).stem):
            return script
    names = ", ".join(Path(script.name).stem for script in SCRIPTS)
    raise UserError(f"no script is called {name}", f"<!-- options:{name}:begin -->", f"one of {names}")


def _table(script: Script, group: type) -> str:
    title = (group.__doc__ or "").split("\n")[0].rstrip(".")
    rows = "".join(_row(script, option) for option in options_of(group))
    return f"**{title}**\n\n| option | type | default | meaning |\n|---|---|---|---|\n{rows}"


def _row(script: Script, option: Option) -> str:
    default = "" if option.default in (None, False, "", ()) else f"`{option.default}`"
    cells = (f"`{option.flag}`", _type(option), "required" if option.required else default, _meaning(script, option))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _type(option: Option) -> str:
    if option.choices is not None:
        return ", ".join(f"`{choice}`" for choice in option.choices if choice is not None)
    name = "path" if option.path else _TYPES[option.kind]
    return name + (", several" if option.many else "")


def _meaning(script: Script, option: Option) -> str:
    sentences = [option.help[0].upper() + option.help[1:] + "."]
    if option.example:
        sentences.append(f"Example: `{option.example}`.")
    for table, remark in (
        (script.pending, "not available yet"),
        (script.refused, "refused"),
        (script.ignored, "no effect"),
    ):
        for key, text in table.items():
            name, _, value = key.partition("=")
            if name == option.name:
                sentences.append(f"*{(value + ' ' if value else '') + remark}: {text}.*")
    return " ".join(sentences).replace("<", "\\<")


if __name__ == "__main__":
    main()
