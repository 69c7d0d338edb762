"""What should be known of the captions before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.data.captions import plain
from library.data.items import Item

if TYPE_CHECKING:
    from library.data.scan_report import SubsetReport

CAPTIONS_AT_ONCE = 1000
SUBSETS_SHOWN, SAMPLES_SHOWN, TAGS_SHOWN = 20, 3, 15
LONGEST_SAMPLE = 300

CountTokens = Callable[[list[str]], Mapping[str, Sequence[int]]]
"""Tokens of captions, by encoder."""


@dataclass
class _Row:
    """What is said of one subset, or of several."""

    images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Images by what is worth saying of them."""
    most_cut: Counter[str] = field(default_factory=Counter)
    """By encoder: images whose captions it cuts are counted elsewhere, this is what the longest loses, in tokens."""

    def __str__(self) -> str:
        parts = [f"{self.counts['captioned']}/{self.images} captioned"]
        parts += [f"{count} {what}" for what, count in self.counts.items() if count and what != "captioned"]
        parts += [f"{name} cuts up to {tokens} tokens" for name, tokens in self.most_cut.items()]
        return ", ".join(parts)


def caption_table(
    items: Sequence[Item],
    reports: Sequence[SubsetReport],
    count_tokens: CountTokens | None = None,
    limits: Mapping[str, int] | None = None,
) -> list[str]:
    """Lines about the captions of each subset, three of them as the model sees them, and the most frequent tags.

    With `count_tokens` and the `limits` of the encoders also how many captions are cut.
    """
    texts = [plain(item.caption, item.subset) for item in items]
    too_long = _too_long(texts, count_tokens, limits or {}) if count_tokens else {}
    of_subset: dict[tuple[int, str, str], list[str]] = {}
    for item, text in zip(items, texts, strict=True):
        of_subset.setdefault((item.dataset, item.subset.where, item.subset.name), []).append(text)
    lines: list[str] = []
    rest = _Row()
    for number, report in enumerate(reports):
        mine = of_subset.get((report.dataset, report.settings.where, report.settings.name), [])
        row = _row(report, mine, too_long, limits or {})
        if number < SUBSETS_SHOWN:
            lines.append(f"{report.settings.name} x {report.settings.num_repeats}: {row}")
            lines += [f"  caption: {_shortened(text)}" for text in list(dict.fromkeys(mine))[:SAMPLES_SHOWN]]
        else:
            rest.images += row.images
            rest.counts.update(row.counts)
            rest.most_cut |= row.most_cut
    if rest.images:
        lines.append(f"{len(reports) - SUBSETS_SHOWN} more subsets: {rest}")
    return lines + _tag_lines(items, texts)


def _row(
    report: SubsetReport, texts: Sequence[str], too_long: Mapping[str, Mapping[str, int]], limits: Mapping[str, int]
) -> _Row:
    row = _Row(report.images)
    settings = report.settings
    used = "one is drawn each time" if settings.enable_wildcard else "only the first is used"
    row.counts["captioned"] = report.captioned
    row.counts["held out for validation"] = report.held_out
    row.counts["from class tokens"] = report.from_class_tokens
    row.counts["empty"] = report.empty
    row.counts["without a caption"] = report.missing
    row.counts[f"of several lines, of which {used}"] = report.multi_line
    expected = {plain("", settings)}
    if report.from_class_tokens:
        expected.add(plain(settings.class_tokens or "", settings))
    equal = Counter(texts)
    row.counts["with the caption of another image"] = sum(
        count for text, count in equal.items() if count > 1 and text not in expected
    )
    for name, found in too_long.items():
        cut = {text: found[text] - limits[name] for text in equal if text in found}
        if cut:
            row.counts[f"too long for {name}"] = sum(equal[text] for text in cut)
            row.most_cut[name] = max(cut.values())
    return row


def _tag_lines(items: Sequence[Item], texts: Sequence[str]) -> list[str]:
    """The tags that several captions hold, most frequent first; all tags of a subset are split at once, for speed."""
    by_separator: dict[str, list[str]] = {}
    for item, text in zip(items, texts, strict=True):
        by_separator.setdefault(item.subset.caption_separator, []).append(text)
    counts: Counter[str] = Counter()
    for separator, captions in by_separator.items():
        if separator.strip():
            counts.update(map(str.strip, separator.join(captions).lower().split(separator)))
    counts.pop("", None)
    named = [f"{tag} {count}" for tag, count in counts.most_common(TAGS_SHOWN) if count > 1]
    return [f"most frequent of {len(counts)} tags: {', '.join(named)}"] if named else []


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]}…"


def token_report(items: Sequence[Item], count_tokens: CountTokens, limits: Mapping[str, int]) -> list[str]:
    """A line for each encoder that cuts captions: how many, of which images, and what the longest loses."""
    texts = [plain(item.caption, item.subset) for item in items]
    too_long = _too_long(texts, count_tokens, limits)
    return [_line(name, limits[name], found, items, texts) for name, found in too_long.items() if found]


def _too_long(texts: Iterable[str], count_tokens: CountTokens, limits: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The number of tokens of the captions that are too long, by encoder and caption."""
    different = list(dict.fromkeys(texts))
    found: dict[str, dict[str, int]] = {name: {} for name in limits}
    for start in range(0, len(different), CAPTIONS_AT_ONCE):
        chunk = different[start : start + CAPTIONS_AT_ONCE]
        for name, counts in count_tokens(chunk).items():
            found[name] |= {text: count for text, count in zip(chunk, counts, strict=True) if count > limits[name]}
    return found


def _line(name: str, limit: int, too_long: Mapping[str, int], items: Sequence[Item], texts: Sequence[str]) -> str:
    images = [item.path for item, text in zip(items, texts, strict=True) if text in too_long]
    worst = max(too_long, key=lambda text: too_long[text])
    named = ", ".join(images[:5]) + (f" and {len(images) - 5} more" if len(images) > 5 else "")
    tail = f"the longest has {too_long[worst]} and ends in '...{worst[-40:]}'"
    return (
        f"{name}: {len(images)} of {len(items)} captions are longer than {limit} tokens and are cut ({named}); {tail}"
    )
