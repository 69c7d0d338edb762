"""Shapes of learning-rate schedules: name -> the factor that multiplies the learning rate after so many steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

POLYNOMIAL_END = 1e-7
"""Learning rate at the end of `polynomial`."""
INVERSE_SQRT_TIMESCALE = 10_000


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a schedule depends on; all counts are optimizer steps, whatever the number of processes."""

    total: int
    warmup: int = 0
    decay: int = 0
    cycles: float = 1
    power: float = 1.0
    timescale: int | None = None
    min_ratio: float | None = None
    """Lowest learning rate as a share of the full one."""
    peak: float = 1.0
    """The full learning rate."""
    rules: tuple[tuple[int, float], ...] = ()
    """Of `piecewise_constant`: up to which step which factor holds."""
    rest: float = 1.0
    """Of `piecewise_constant`: the factor after all rules."""

    def progress(self, step: int) -> float:
        """Share of the way from the end of the warm-up to the end."""
        return min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))


# one function per schedule: the factor after the warm-up


def _constant(course: Course, step: int) -> float:
    return 1.0


def _linear(course: Course, step: int) -> float:
    return max(0.0, (course.total - step) / max(1, course.total - course.warmup))


def _cosine(course: Course, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * course.progress(step)))


def _cosine_with_restarts(course: Course, step: int) -> float:
    progress = course.progress(step)
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (course.cycles * progress % 1)))


def _polynomial(course: Course, step: int) -> float:
    end = min(1.0, POLYNOMIAL_END / course.peak)
    return float((1 - end) * (1 - course.progress(step)) ** course.power + end)


def _inverse_sqrt(course: Course, step: int) -> float:
    timescale = course.timescale or course.warmup or INVERSE_SQRT_TIMESCALE
    return 1 / math.sqrt((step + timescale - course.warmup) / timescale)


def _cosine_with_min_lr(course: Course, step: int) -> float:
    return _wave(course, course.progress(step))


def _warmup_stable_decay(course: Course, step: int) -> float:
    if step >= course.total:
        return course.min_ratio or 0.0
    start = course.total - course.decay
    return 1.0 if step < start else _wave(course, (step - start) / course.decay)


def _piecewise_constant(course: Course, step: int) -> float:
    return next((factor for end, factor in course.rules if step < end), course.rest)


def _wave(course: Course, progress: float) -> float:
    """Cosine from 1 to the lowest rate, `cycles` half waves long."""
    low = course.min_ratio or 0.0
    return (1 - low) * max(0.0, 0.5 * (1 + math.cos(math.pi * course.cycles * progress))) + low


Shape = Callable[[Course, int], float]

SHAPES: Mapping[str, Shape] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
    "piecewise_constant": _piecewise_constant,
}
WITHOUT_WARMUP = frozenset({"piecewise_constant"})
"""Schedules that don't look at the warm-up."""


def multiplier(name: str, course: Course, step: int) -> float:
    """The factor for the step after `step` optimizer steps."""
    if name not in WITHOUT_WARMUP and step < course.warmup:
        return step / course.warmup
    return SHAPES[name](course, step)
