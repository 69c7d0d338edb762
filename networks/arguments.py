"""Values of `--network_args`, checked and converted."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

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
                raise _error(f"{name} comes with a later release", name, "leave it out", "E-LATER")

    def number(self, name: str, *, low: float = 0.0, high: float = math.inf) -> float | None:
        """A number in [low, high]; None: not given. Errors: UserError."""
        text = self._text(name)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            raise _error(f"{text!r} is no number", name, f"such as {name}=0.1") from None
        if not low <= value <= high:
            limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise _error(f"{text} is out of range", name, f"it must be {limit}")
        return value

    def flag(self, name: str) -> bool:
        """Whether a switch is on; not given: off. Errors: UserError."""
        text = (self._text(name) or "").lower()
        if text not in (*TRUE, *FALSE):
            raise _error(f"{text!r} is neither True nor False", name, f"such as {name}=True")
        return text in TRUE

    def given(self, name: str) -> bool:
        """Whether an argument is there; counts as asking for it."""
        return self._text(name) is not None

    def finish(self) -> None:
        """Complains about arguments that nobody asked for. Errors: UserError."""
        for name in self._values:
            if name not in self._known:
                close = difflib.get_close_matches(name, [*self._known, *self._later], n=1)
                known = ", ".join(sorted(self._known))
                raise _error("unknown argument", name, f"did you mean {close[0]}?" if close else f"there are: {known}")

    def _text(self, name: str) -> str | None:
        self._known.add(name)
        return self._values.get(name)


def _error(what: str, name: str, hint: str, code: str = "E-NETWORK-ARGS") -> UserError:
    return UserError(what, f"--network_args {name}", hint, code=code)
