"""From the text of a caption file to the caption that the model sees. Pure functions of an explicit generator.

The order, which is that of the reference: the whole caption is dropped or not; a line is chosen; prefix and suffix are
put around it; wildcards are replaced; tags are split, cut to the warm-up, shuffled, dropped and joined again; secondary
separators are replaced. Unlike in the reference, prefix and suffix go to the chosen line, wildcards may be nested, tags
are joined with their own separator, and a `keep_tokens_separator` goes even where nothing else is done to tags (what
follows a second one is text, a third one included).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from library.data.settings import SubsetSettings

TEXT_SUFFIXES = frozenset({".txt", ".caption", ".cap", ".text", ".tags"})
"""Extensions that caption files are known to have."""

_MARKS, _LITERALS = "{}|", ("\\{", "\\}")


@dataclass(frozen=True, slots=True)
class Moment:
    """When in a run a caption is used."""

    epoch: int = 1
    """Counted from 1."""
    step: int = 0
    """Optimizer steps done."""
    total_steps: int = 0
    """Of the run; 0: not known."""


class First(random.Random):
    """Always takes the first choice, drops nothing and leaves order as it is."""

    def random(self) -> float:
        """The largest number: nothing is dropped."""
        return 1.0

    def choice(self, seq):  # type: ignore[no-untyped-def]
        """The first."""
        return seq[0]

    def shuffle(self, x):  # type: ignore[no-untyped-def, override]
        """Nothing."""


_FIRST, _END = First(), Moment(step=1 << 62)


# reading


def first_line(text: str) -> str:
    """The first line, stripped: it may be empty although others aren't."""
    return _unified(text).partition("\n")[0].strip()


def is_multi_line(text: str) -> bool:
    """Whether lines after the first hold text."""
    return any(line.strip() for line in _unified(text).split("\n")[1:])


def raw_caption(text: str, settings: SubsetSettings) -> str:
    """What is kept of a caption file: its first line, or all lines with text where wildcards choose one of them."""
    if not settings.enable_wildcard:
        return first_line(text)
    return "\n".join(line.strip() for line in _unified(text).split("\n") if line.strip())


def _unified(text: str) -> str:
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


# what the model sees


def caption(raw: str, settings: SubsetSettings, generator: random.Random, moment: Moment = Moment()) -> str:
    """A raw caption as it is used once; draws as many numbers as its settings need."""
    return "" if is_dropped(settings, generator, moment) else worded(raw, settings, generator, moment)


def is_dropped(settings: SubsetSettings, generator: random.Random, moment: Moment) -> bool:
    """Whether the whole caption is left out this time."""
    rate, epochs = settings.caption_dropout_rate, settings.caption_dropout_every_n_epochs
    if rate > 0 and generator.random() < rate:
        return True
    return epochs > 0 and moment.epoch % epochs == 0


def worded(raw: str, settings: SubsetSettings, generator: random.Random, moment: Moment = Moment()) -> str:
    """A raw caption that isn't dropped."""
    lines = raw.split("\n")
    text = generator.choice(lines) if settings.enable_wildcard and len(lines) > 1 else lines[0]
    if settings.caption_prefix:
        text = f"{settings.caption_prefix} {text}"
    if settings.caption_suffix:
        text = f"{text} {settings.caption_suffix}"
    if settings.enable_wildcard:
        text = with_choices(text, generator)
    text = _with_tags_changed(text, settings, generator, moment)
    if settings.secondary_separator:
        text = text.replace(settings.secondary_separator, settings.caption_separator)
    return text


def plain(raw: str, settings: SubsetSettings) -> str:
    """A raw caption with nothing left to chance: whole, in order, the first line and the first of each choice."""
    return worded(raw, settings, _FIRST, _END)


def changes_tags(settings: SubsetSettings) -> bool:
    """Whether tags are split at all."""
    return settings.shuffle_caption or settings.token_warmup_step > 0 or settings.caption_tag_dropout_rate > 0


def varies(raw: str, settings: SubsetSettings) -> bool:
    """Whether a caption that isn't dropped may be worded in several ways."""
    whole = f"{raw}{settings.caption_prefix}{settings.caption_suffix}"
    return changes_tags(settings) or (settings.enable_wildcard and any(mark in whole for mark in "\n{"))


# wildcards


def with_choices(text: str, generator: random.Random) -> str:
    """Text with each `{a|b}` replaced by one of its options, left to right, outer before inner.

    `{{` and `}}` stand for single braces; `{}` and braces without a partner stay.
    """
    pieces, partners = _braces(text)
    return _chosen(pieces, partners, 0, len(pieces), generator)


def _braces(text: str) -> tuple[list[str], dict[int, int]]:
    """Text in pieces, one for each brace and bar that may mean something, and the end of each choice by its begin."""
    pieces: list[str] = []
    partners: dict[int, int] = {}
    opened: list[int] = []
    literals, at = 0, 0
    while at < len(text):
        pair = text[at : at + 2]
        if pair == "{{" or (pair == "}}" and (literals or not opened)):
            literals = literals + 1 if pair == "{{" else max(literals - 1, 0)
            pieces.append(f"\\{pair[0]}")
            at += 2
            continue
        mark = text[at]
        if mark == "{":
            opened.append(len(pieces))
        elif mark == "}" and opened:
            begin = opened.pop()
            if begin + 1 < len(pieces):
                partners[begin] = len(pieces)
        end = at + 1
        if mark not in _MARKS:
            while end < len(text) and text[end] not in _MARKS:
                end += 1
        pieces.append(text[at:end])
        at = end
    return pieces, partners


def _chosen(pieces: list[str], partners: dict[int, int], begin: int, end: int, generator: random.Random) -> str:
    """The text of some pieces, with their choices made."""
    result = []
    at = begin
    while at < end:
        close = partners.get(at)
        if close is None:
            result.append(pieces[at].removeprefix("\\") if pieces[at] in _LITERALS else pieces[at])
            at += 1
            continue
        bars = [at, *_bars(pieces, partners, at + 1, close), close]
        options = [(left + 1, right) for left, right in pairwise(bars)]
        result.append(_chosen(pieces, partners, *generator.choice(options), generator))
        at = close + 1
    return "".join(result)


def _bars(pieces: list[str], partners: dict[int, int], begin: int, end: int) -> list[int]:
    """The bars between options, those of inner choices excluded."""
    bars, at = [], begin
    while at < end:
        if pieces[at] == "|":
            bars.append(at)
        at = partners.get(at, at) + 1
    return bars


# tags


def _with_tags_changed(text: str, settings: SubsetSettings, generator: random.Random, moment: Moment) -> str:
    marked = settings.keep_tokens_separator and settings.keep_tokens_separator in text
    if not marked and not changes_tags(settings):
        return text
    if marked:
        head, flexible, tail = ([tag for tag in _tags(part, settings) if tag] for part in _marked_parts(text, settings))
    else:
        tags = _tags(text.strip(), settings)
        head, flexible, tail = tags[: settings.keep_tokens], tags[settings.keep_tokens :], []
    flexible = flexible[: _warm(len(flexible), settings, moment)]
    if settings.shuffle_caption:
        generator.shuffle(flexible)
    rate = settings.caption_tag_dropout_rate
    if rate > 0:
        flexible = [tag for tag in flexible if generator.random() >= rate]
    return _joined([*head, *flexible, *tail], settings, keep_empty=not marked)


def _marked_parts(text: str, settings: SubsetSettings) -> tuple[str, str, str]:
    """Text before the first mark, between it and a second one, and after that."""
    head, _, rest = text.partition(settings.keep_tokens_separator)
    flexible, _, tail = rest.partition(settings.keep_tokens_separator)
    return head, flexible, tail


def _tags(text: str, settings: SubsetSettings) -> list[str]:
    return [tag.strip() for tag in text.split(settings.caption_separator)] if settings.caption_separator else [text]


def _joined(tags: list[str], settings: SubsetSettings, *, keep_empty: bool = False) -> str:
    separator = settings.caption_separator
    separator += "" if separator.endswith(" ") else " "
    return separator.join(tag for tag in tags if tag or keep_empty)


def _warm(count: int, settings: SubsetSettings, moment: Moment) -> int:
    """How many of the flexible tags are in use."""
    steps: float = settings.token_warmup_step
    if 0 < steps < 1:
        steps = int(steps * moment.total_steps)
    if moment.step >= steps:
        return count
    least = settings.token_warmup_min
    return max(int(moment.step * (count - least) / steps) + least, 0)
