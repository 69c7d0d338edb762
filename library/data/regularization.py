"""How often regularization images are used, so that an epoch has as many of them as of training images."""

from __future__ import annotations

from collections.abc import Sequence


def balanced(repeats: Sequence[int], samples: int) -> list[int] | None:
    """Repeats of each regularization image that add up to `samples`; None: there are more images than that.

    What the configuration gives is what each has at least, or, where that is too much, at most.
    """
    if len(repeats) > samples:
        return None
    wanted = sum(repeats)
    if wanted <= samples:
        more, rest = divmod(samples - wanted, len(repeats)) if repeats else (0, 0)
        return [count + more + (number < rest) for number, count in enumerate(repeats)]
    result = [1] * len(repeats)
    left = samples - len(repeats)
    while left:
        for number, most in enumerate(repeats):
            if left and result[number] < most:
                result[number] += 1
                left -= 1
    return result
