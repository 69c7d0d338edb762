"""What a tool did, in a line for each file: how many modules, where, and with which norm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from library.log import DataError


class _Applied(NamedTuple):
    component: str
    norm: float
    base_norm: float


class Report:
    """Collects what was applied; the tool prints `lines` at the end."""

    def __init__(self, verb: str = "merged") -> None:
        self.verb = verb
        self._sources: dict[str, dict[str, _Applied]] = {}

    def expect(self, source: str) -> None:
        """Makes `check` complain when nothing is added for this file."""
        self._sources.setdefault(source, {})

    def add(self, source: str, module: str, component: str, norm: float, base_norm: float | None = None) -> None:
        """One module of a file: Frobenius norms of its change (with its ratio), and of the weight it was added to.

        Said again, it counts once. Errors: DataError when a norm isn't finite.
        """
        if not math.isfinite(norm):
            raise DataError(f"{module} has values that aren't finite", source, code="E-TENSOR-FINITE")
        self._sources.setdefault(source, {})[module] = _Applied(component, norm, base_norm or 0.0)

    def lines(self) -> Sequence[str]:
        """Such as `merged style.safetensors: 264 modules (denoiser 192, textencoder 1 72), norm 12.3, 2.1% of ...`."""
        return [self._line(source, list(applied.values())) for source, applied in self._sources.items()]

    def _line(self, source: str, applied: Sequence[_Applied]) -> str:
        counts = Counter(one.component for one in applied)
        where = ", ".join(f"{component} {count}" for component, count in counts.items())
        norm = math.hypot(*(one.norm for one in applied))
        line = f"{self.verb} {source}: {len(applied)} modules ({where}), norm {norm:.4g}"
        base = math.hypot(*(one.base_norm for one in applied))
        return f"{line}, {norm / base:.2%} of that of the weights" if base else line

    def check(self) -> None:
        """Errors: DataError when nothing was applied, or every change of a file is 0."""
        if not self._sources:
            raise DataError("nothing was to be done", "", "check the files", code="E-MERGE-NOTHING")
        for source, applied in self._sources.items():
            if not any(one.norm for one in applied.values()):
                what = "all its changes are 0" if applied else "no module of it was used"
                hint = "check that the file is trained, and its ratio not 0"
                raise DataError(f"this would change nothing: {what}", source, hint, code="E-MERGE-NOTHING")
