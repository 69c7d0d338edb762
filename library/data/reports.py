"""What should be known of the captions before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from library.data.items import Item

CAPTIONS_AT_ONCE = 1000


def token_report(
    items: Sequence[Item],
    count_tokens: Callable[[list[str]], Mapping[str, Sequence[int]]],
    limits: Mapping[str, int],
) -> list[str]:
    """A line for each encoder that cuts captions: how many, of which images, and what the longest loses."""
    first_item: dict[str, Item] = {}
    for item in items:
        first_item.setdefault(item.caption, item)
    captions = list(first_item)
    too_long: dict[str, dict[str, int]] = {name: {} for name in limits}
    for start in range(0, len(captions), CAPTIONS_AT_ONCE):
        chunk = captions[start : start + CAPTIONS_AT_ONCE]
        for name, counts in count_tokens(chunk).items():
            too_long[name] |= {
                caption: count for caption, count in zip(chunk, counts, strict=True) if count > limits[name]
            }
    return [_line(name, limits[name], found, items) for name, found in too_long.items() if found]


def _line(name: str, limit: int, too_long: Mapping[str, int], items: Sequence[Item]) -> str:
    images = [item.path for item in items if item.caption in too_long]
    worst = max(too_long, key=lambda caption: too_long[caption])
    named = ", ".join(images[:5]) + (f" and {len(images) - 5} more" if len(images) > 5 else "")
    tail = f"the longest has {too_long[worst]} and ends in '...{worst[-40:]}'"
    return (
        f"{name}: {len(images)} of {len(items)} captions are longer than {limit} tokens and are cut ({named}); {tail}"
    )
