"""Values of `--network_args`, checked and converted."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping

from library.log import UserError

TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no", "")


class Arguments:
    """Named values as text; each is read once, and `finish` complains about those that nobody asked for."""

    def __init__(self, values: Mapping[str, object], later: Iterable[str] = ()) -> None:
        """Takes the arguments. `later` names those whose feature isn't there yet.

        Errors: UserError when one of those is given.
        """
        self._values = {key: str(value).strip() for key, value in values.items() if value is not None}
        self._later = tuple(later)
        self._known: set[str] = set()
        for name in self._later:
            if name in self._values:
                raise error(f"{name} comes with a later release", name, "leave it out", "E-LATER")

    def number(self, name: str, *, low: float = 0.0, high: float = math.inf) -> float | None:
        """A number in [low, high]; None: not given. Errors: UserError."""
        text = self.text(name)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            raise error(f"{text!r} is no number", name, f"such as {name}=0.1") from None
        if not low <= value <= high:
            limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise error(f"{text} is out of range", name, f"it must be {limit}")
        return value

    def integer(self, name: str, *, low: int = 0, special: Collection[int] = ()) -> int | None:
        """A whole number of at least `low`, or one of the `special` ones; None: not given. Errors: UserError."""
        text = self.text(name)
        return None if text is None else _integer(text, name, low, special)

    def integers(self, name: str, count: int) -> list[int] | None:
        """`count` whole numbers, with commas between them, in brackets or not; None: not given. Errors: UserError."""
        text = self.text(name)
        if text is None:
            return None
        items = re.sub(r"^\[(.*)\]$", r"\1", text).split(",")
        if len(items) != count:
            raise error(
                f"{text!r} has {len(items)} numbers", name, f"{count} are needed, such as {name}={_some(count)}"
            )
        return [_integer(item.strip(), name, 0, ()) for item in items]

    def indices(self, name: str) -> Indices:
        """Which of some things: `all`, `none`, or numbers and ranges such as 0,3-5. Errors: UserError."""
        return Indices(name, self.text(name))

    def choice(self, name: str, values: Collection[str]) -> str | None:
        """One of some words, in any case; None: not given. Errors: UserError."""
        text = self.text(name)
        if text is not None and text.lower() not in values:
            close = difflib.get_close_matches(text.lower(), values, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(values)}"
            raise error(f"{text!r} is unknown", name, hint)
        return None if text is None else text.lower()

    def flag(self, name: str) -> bool:
        """Whether a switch is on; not given: off. Errors: UserError."""
        text = (self.text(name) or "").lower()
        if text not in (*TRUE, *FALSE):
            raise error(f"{text!r} is neither True nor False", name, f"such as {name}=True")
        return text in TRUE

    def text(self, name: str) -> str | None:
        """A value as it was given; None: not given."""
        self._known.add(name)
        return self._values.get(name)

    def given(self, name: str) -> bool:
        """Whether an argument is there; counts as asking for it."""
        return self.text(name) is not None

    def finish(self) -> None:
        """Complains about arguments that nobody asked for. Errors: UserError."""
        for name in self._values:
            if name not in self._known:
                close = difflib.get_close_matches(name, [*self._known, *self._later], n=1)
                known = ", ".join(sorted(self._known))
                raise error("unknown argument", name, f"did you mean {close[0]}?" if close else f"there are: {known}")


class Indices:
    """A choice among things that are numbered from 0."""

    def __init__(self, name: str, text: str | None) -> None:
        """`text`: see `Arguments.indices`; None means all. Errors: UserError when it is something else."""
        self._name, self._text = name, text
        self._ranges: list[range] | None = None
        word = "all" if text is None else text.lower()
        if word != "all":
            self._ranges = [] if word in ("none", "") else [self._range(item.strip()) for item in word.split(",")]

    def check(self, count: int) -> None:
        """Errors: UserError when an index isn't below `count`."""
        for indices in self._ranges or ():
            if indices[-1] >= count:
                what = f"there is no block {indices[-1]}: the model has {count}"
                raise error(what, f"{self._name}={self._text}", f"numbers from 0 to {count - 1}")

    def __contains__(self, index: object) -> bool:
        return self._ranges is None or any(index in indices for indices in self._ranges)

    def _range(self, item: str) -> range:
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if first > last:
            raise error(
                f"{item!r} is no index and no range", f"{self._name}={self._text}", "such as all, none, or 0,3-5"
            )
        return range(first, last + 1)


def error(what: str, name: str, hint: str, code: str = "E-NETWORK-ARGS") -> UserError:
    """A mistake in the argument of this name."""
    return UserError(what, f"--network_args {name}".strip(), hint, code=code)


def _integer(text: str, name: str, low: int, special: Collection[int]) -> int:
    if not re.fullmatch(r"[+-]?\d+", text):
        raise error(f"{text!r} is no whole number", name, f"such as {name}=8")
    value = int(text)
    if value < low and value not in special:
        raise error(f"{text} is out of range", name, f"it must be at least {low}")
    return value


def _some(count: int) -> str:
    return ",".join(["4"] * count)
