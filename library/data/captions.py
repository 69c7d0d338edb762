"""From the text of a caption file to the caption that the model sees. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from library.data.settings import SubsetSettings

TEXT_SUFFIXES = frozenset({".txt", ".caption", ".cap", ".text", ".tags"})
"""Extensions that caption files are known to have."""


def first_line(text: str) -> str:
    """The first line, stripped: it may be empty although others aren't."""
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n").partition("\n")[0].strip()


def is_multi_line(text: str) -> bool:
    """Whether lines after the first hold text, which nobody reads."""
    return any(line.strip() for line in text.replace("\r", "\n").split("\n")[1:])


def composed(raw: str, settings: SubsetSettings) -> str:
    """A caption with prefix, suffix and its secondary separators replaced."""
    caption = raw
    if settings.caption_prefix:
        caption = f"{settings.caption_prefix} {caption}"
    if settings.caption_suffix:
        caption = f"{caption} {settings.caption_suffix}"
    if settings.secondary_separator:
        caption = caption.replace(settings.secondary_separator, settings.caption_separator)
    return caption


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """How many captions hold each comma-separated tag, in lower case, in order of appearance."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(tag for part in caption.split(",") if (tag := part.strip().lower()))
    return dict(counts)
