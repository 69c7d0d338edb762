"""How options are declared: fields of frozen dataclasses, each with its type, default, choices and explanation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from library.log import UserError


def option(
    default: Any = None,
    *,
    help: str,  # noqa: A002
    choices: Sequence[object] | None = None,
    required: bool = False,
    path: bool = False,
    secret: str | None = None,
    example: str | None = None,
    least: float | None = None,
    most: float | None = None,
    position: int | None = None,
    short: str | None = None,
    some: bool = False,
) -> Any:
    """A field of an option group: the field's name is the flag, its annotation the type.

    `bool` makes a flag without value, `tuple[X, ...]` one that takes any number of values, `int | float` a number of
    steps or a share of the run. `path` marks files and folders that are read: in a config file they may be relative to
    its folder. `secret` names the environment variable that may hold the value; it is never shown or stored.
    `least` and `most` limit numbers. `position` makes it an argument without a flag, the first one at 0; `short` is
    another flag, such as `-s`. `some`: of the values that it takes there must be at least one.
    """
    metadata = {
        "help": help,
        "choices": None if choices is None else tuple(choices),
        "required": required,
        "path": path,
        "secret": secret,
        "example": example,
        "least": least,
        "most": most,
        "position": position,
        "short": short,
        "some": some,
    }
    return field(default=default, metadata=metadata, repr=secret is None)


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a script accepts. In the tables a key is an option's name, or `name=value` for a single value."""

    name: str
    summary: str
    groups: tuple[type, ...]
    pending: Mapping[str, str] = field(default_factory=dict)
    """Refused because it comes later; why or what to do instead."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Refused because it makes no sense here; what to do instead."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Warned of because it does nothing here; why."""

    def options(self) -> Iterator[Option]:
        """All options, in the order of the groups."""
        for group in self.groups:
            yield from options_of(group)

    def option(self, name: str) -> Option | None:
        """The option of that name."""
        return _by_name(self.groups).get(name)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option as it was declared."""

    name: str
    kind: str
    """Name of the type: bool, str, int, float, int_or_float or Path."""
    many: bool
    default: Any
    help: str
    choices: tuple[object, ...] | None
    required: bool
    path: bool
    secret: str | None
    example: str | None
    least: float | None
    most: float | None
    position: int | None
    short: str | None
    some: bool

    @property
    def flag(self) -> str:
        """How it is written on the command line, or the name of an argument that has no flag."""
        return self.name if self.position is not None else f"--{self.name}"

    @property
    def flags(self) -> list[str]:
        """All ways to write it on the command line; none for an argument without a flag."""
        return [] if self.position is not None else [*filter(None, [self.short]), self.flag]

    @property
    def nargs(self) -> str | None:
        """How many values it takes, in the words of argparse."""
        return None if not self.many else "+" if self.some else "*"

    def describe(self) -> dict[str, object]:
        """The declaration as plain data, in the words of argparse."""
        is_flag = self.kind == "bool"
        return {
            "dest": self.name,
            "flags": self.flags,
            "action": "store_true" if is_flag else "store",
            "type": None if is_flag else self.kind,
            "nargs": self.nargs,
            "default": self.default,
            "choices": self.choices,
            "required": self.required,
            **({} if self.position is None else {"position": self.position}),
        }

    def convert(self, value: object, where: str) -> Any:
        """A value of the command line (text) or of a TOML file as the option wants it. Errors: UserError."""
        if self.many:
            items = value if isinstance(value, list | tuple) else [value]
            return tuple(self.convert_one(item, where) for item in items)
        return self.convert_one(value, where)

    def convert_one(self, value: object, where: str) -> Any:
        """The same for one of the values of an option that takes several."""
        converter, expected = _KINDS[self.kind]
        try:
            converted = converter(value)
        except (TypeError, ValueError):
            what = f"{_show(value)} is not {expected}"
            raise UserError(self._named(what, where), where, self._example(), code="E-OPTION") from None
        if self.choices is not None and converted not in self.choices:
            names = [str(choice) for choice in self.choices if choice is not None]
            hint = f"one of {', '.join(names)}" + did_you_mean(str(converted), names, joined=True)
            what = f"{_show(value)} is not a possible value"
            raise UserError(self._named(what, where), where, hint, code="E-OPTION")
        return converted

    def beyond_limits(self, value: object) -> str | None:
        """What a number, or one of several, should be instead; None when it lies within the limits."""
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            if self.least is not None and number < self.least:
                return f"give {self.least} or more"
            if self.most is not None and number > self.most:
                return f"give {self.most} or less"
        return None

    def _named(self, what: str, where: str) -> str:
        return what if self.flag in where else f"{self.name}: {what}"

    def _example(self) -> str:
        if self.example:
            return f"for example {self.example}"
        return f"the default is {self.default}" if self.default is not None else ""


@cache
def options_of(group: type) -> tuple[Option, ...]:
    """The options of a group."""
    return tuple(_option_of(item) for item in dataclasses.fields(group))


@cache
def _by_name(groups: tuple[type, ...]) -> dict[str, Option]:
    return {spec.name: spec for group in groups for spec in options_of(group)}


def _option_of(item: dataclasses.Field[Any]) -> Option:
    annotation = str(item.type).removesuffix(" | None")
    many = annotation.startswith("tuple[")
    kind = annotation.removeprefix("tuple[").removesuffix(", ...]")
    kind = {"int | float": "int_or_float"}.get(kind, kind)
    assert kind in _KINDS, f"{item.name}: no option can have the type {item.type}"
    return Option(name=item.name, kind=kind, many=many, default=item.default, **item.metadata)


# converting


def int_or_float(value: object) -> int | float:
    """A number of steps (int) or a share of the whole run (float): 100, "1e3", 0.1 or "10%"."""
    if isinstance(value, str) and value.strip().endswith("%"):
        share = _number(value.strip()[:-1]) / 100
        if share < 0:
            raise ValueError(value)
        return share
    number = _number(value)
    if number < 0 or (number >= 1 and not number.is_integer()):
        raise ValueError(value)
    return int(number) if number.is_integer() else number


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    number = float(value)
    if number != number:
        raise ValueError(value)
    return number


def _whole(value: object) -> int:
    if isinstance(value, str):
        return int(value)
    number = _number(value)
    if not number.is_integer():
        raise ValueError(value)
    return int(number)


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    return str(value)


def _flag(value: object) -> bool:
    """Front ends write 0 and 1 for some flags."""
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise TypeError


_KINDS: dict[str, tuple[Callable[[object], object], str]] = {
    "bool": (_flag, "true or false"),
    "str": (_text, "text"),
    "Path": (lambda value: Path(text) if (text := _text(value)) else None, "a path"),
    "int": (_whole, "a whole number"),
    "float": (_number, "a number"),
    "int_or_float": (int_or_float, "a whole number of steps or a share of the run such as 0.1 or 10%"),
}


def _show(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


def did_you_mean(name: str, names: Sequence[str], *, joined: bool = False) -> str:
    """A question naming what may have been meant; empty when nothing is near."""
    from difflib import get_close_matches

    name = name.replace("-", "_")
    near = [name] if name in names else get_close_matches(name, names, n=2, cutoff=0.7)
    question = f"did you mean {' or '.join(near)}?" if near else ""
    return f"; {question}" if question and joined else question
