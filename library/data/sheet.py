"""A page that shows what the model will see: thumbnails of samples with captions and masks, buckets, and facts."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from library.data.sheet_style import STYLE
from library.files import atomic_write
from library.types import Size

THUMBNAIL = 256
"""Longest side of a thumbnail, in pixels."""
ROWS = 1000
"""Samples that one page shows: some 20 MB."""
FILTERS = 40
"""Choices that each of the two filters offers at most."""
_LOSSLESS = 96  # longest side of pictures that are kept as they are: small ones suffer most from JPEG
_QUALITY = 85
_DIMMED = 0.2  # what is left of the brightness where a mask is 0
_CONSOLE_BAR = 40
_ICON, _LINE, _BAR_LEFT, _BAR, _WIDTH = 22, 28, 116, 200, 400  # of the histogram's drawing
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Pixels = NDArray[np.uint8]


@dataclass(kw_only=True)
class SheetRow:
    """One sample as the model sees it."""

    name: str
    """Path of the image."""
    size: Size
    """Of its bucket."""
    caption: str
    """The final one."""
    pixels: Pixels
    """(H, W, 3)"""
    mask: NDArray[np.float32] | None = None
    """(H, W) in [0, 1]"""
    conditioning: Pixels | None = None
    """(H, W, 3)"""
    note: str = ""
    """What else is worth knowing, separated by commas, such as `mirrored, regularisation`."""

    @property
    def notes(self) -> list[str]:
        """The parts of the note."""
        return [part.strip() for part in self.note.split(",") if part.strip()]


def contact_sheet(
    rows: Iterable[SheetRow],
    histogram: Mapping[str, Mapping[Size, int]],
    facts: Sequence[str],
    path: Path,
    *,
    limit: int = ROWS,
) -> None:
    """Writes one HTML file that needs nothing beside it: facts, buckets of each dataset, and the samples.

    Args:
        rows: read one after the other, so that only one picture is in memory at a time.
        histogram: samples in each bucket, by what a dataset is called.
        facts: lines for the top of the page; leading spaces are kept.
        path: of the page; folders are made.
        limit: samples shown; of further ones only the number is told.

    Raises:
        ResourceError: the page can't be written.
    """
    cards: list[str] = []
    notes: Counter[str] = Counter()
    buckets: Counter[Size] = Counter()
    left_out = len(rows) - limit if isinstance(rows, Sized) else 0
    for number, row in enumerate(rows):
        if number < limit:
            notes.update(dict.fromkeys(_traits(row), 1))
            buckets[row.size] += 1
            cards.append(_card(row))
        elif isinstance(rows, Sized):
            break
        else:
            left_out += 1
    filters = _filters(notes, buckets)
    page = [
        *_head(path.stem, [rule for each in filters for rule in each.rules()]),
        *_facts(facts),
        *(line for title, counts in histogram.items() for line in _histogram(title, counts)),
        *_samples(cards, filters, max(left_out, 0)),
        "</body>",
        "</html>",
        "",
    ]
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in page)


def histogram_lines(counts: Mapping[Size, int]) -> list[str]:
    """A bar chart of buckets for the console, from upright to wide; ASCII only."""
    if not counts:
        return ["no images"]
    most, total = max(counts.values()), sum(counts.values())
    names = max(len(str(size)) for size in counts)
    numbers = len(str(most))
    return [
        f"{size!s:>{names}}  {count:>{numbers}}  {_share(count, total):>5}  {'#' * _length(count, most, _CONSOLE_BAR)}"
        for size, count in _by_aspect(counts)
    ]


def _by_aspect(counts: Mapping[Size, int]) -> list[tuple[Size, int]]:
    return sorted(counts.items(), key=lambda entry: (entry[0].width / entry[0].height, entry[0].area))


def _share(count: int, total: int) -> str:
    percent = 100 * count / max(total, 1)
    return "<1 %" if 0 < percent < 1 else f"{percent:.0f} %"


def _length(count: int, most: int, longest: int) -> int:
    """Of a bar: at least 1 unless there is nothing to show."""
    return max(round(longest * count / max(most, 1)), 1) if count else 0


def _head(title: str, rules: Sequence[str]) -> list[str]:
    """The start of the page; its policy forbids to fetch anything, whatever the page holds."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{_text(title)}</title>",
        f"<style>\n{STYLE}",
        *rules,
        "</style>",
        "</head>",
        "<body>",
        "<h1>What the model will see</h1>",
    ]


def _facts(facts: Sequence[str]) -> list[str]:
    return ['<ul class="facts">', *(f'<li dir="auto">{_text(fact)}</li>' for fact in facts), "</ul>"] if facts else []


def _histogram(title: str, counts: Mapping[Size, int]) -> list[str]:
    """The buckets of one dataset: each one's shape, its size, and a bar as long as it is full."""
    total, most = sum(counts.values()), max(counts.values(), default=0)
    longest = max((max(size) for size in counts), default=1)
    said = f"{_number(total, 'sample')} in {_number(len(counts), 'bucket')}"
    drawing = [
        f'<svg class="buckets" viewBox="0 0 {_WIDTH} {_LINE * len(counts)}" role="img" aria-label="{_text(said)}">',
    ]
    for number, (size, count) in enumerate(_by_aspect(counts)):
        middle = _LINE * number + _LINE / 2
        width, height = (max(round(_ICON * side / longest, 1), 1) for side in size)
        bar = _length(count, most, _BAR)
        drawing += [
            f"<g><title>{size}: {count} ({_text(_share(count, total))})</title>",
            f'<rect class="shape" x="{_LINE / 2 - width / 2:g}" y="{middle - height / 2:g}"'
            f' width="{width:g}" height="{height:g}"/>',
            f'<text class="size" x="{_BAR_LEFT - 6}" y="{middle:g}">{size}</text>',
            f'<rect class="bar" x="{_BAR_LEFT}" y="{middle - 8:g}" width="{bar}" height="16" rx="2"/>',
            f'<text x="{_BAR_LEFT + bar + 6}" y="{middle:g}">{count}</text></g>',
        ]
    heading = [f'<h2 dir="auto">Buckets of {_text(title)}</h2>', f"<p>{said}</p>"]
    return [*heading, *drawing, "</svg>"] if counts else heading


def _samples(cards: list[str], filters: Sequence[_Filter], left_out: int) -> list[str]:
    """The second half of the page; the filters stand before the samples, since style sheets look forward only."""
    lines = ["<h2>Samples</h2>", f"<p>{_number(len(cards), 'sample')}, in the order of training.</p>"]
    if left_out:
        lines.append(f'<p class="left-out">{_number(left_out, "further sample")} left out.</p>')
    buttons = [line for each in filters for line in each.buttons()]
    return [*lines, '<section class="samples">', *buttons, '<div class="cards">', *cards, "</div>", "</section>"]


@dataclass(frozen=True)
class _Filter:
    """Buttons of which one is chosen; what doesn't fit is hidden by the style sheet alone."""

    group: str
    title: str
    choices: list[tuple[str, str, int]]
    """Class of the samples that fit, what it is called, how many fit."""

    def rules(self) -> list[str]:
        """For the style sheet."""
        return [
            f"#{self.group}-{name}:checked ~ .cards > :not(.{name}) {{ display: none; }}" for name, _, _ in self.choices
        ]

    def buttons(self) -> list[str]:
        """For the page."""
        start = f'<input type="radio" name="{self.group}" id="{self.group}-'
        lines = [
            f'<span class="filter">{self.title}:</span>',
            f'{start}all" checked><label for="{self.group}-all">all</label>',
        ]
        for name, label, count in self.choices:
            text = f"{_text(label)} <small>{count}</small>"
            lines.append(f'{start}{name}"><label for="{self.group}-{name}">{text}</label>')
        return [*lines, "<br>"]


def _filters(notes: Counter[str], buckets: Counter[Size]) -> list[_Filter]:
    """By note and by bucket, where there is a choice."""
    often = [(_note_class(note), note, count) for note, count in notes.most_common(FILTERS)]
    full = [(_bucket_class(size), str(size), count) for size, count in _by_aspect(dict(buckets.most_common(FILTERS)))]
    by_note = [_Filter("note", "Show", often)] if often else []
    return by_note + ([_Filter("bucket", "Bucket", full)] if len(full) > 1 else [])


def _traits(row: SheetRow) -> list[str]:
    """What the sample can be found by."""
    return [
        *row.notes,
        *(["with mask"] if row.mask is not None else []),
        *(["with conditioning image"] if row.conditioning is not None else []),
        *([] if row.caption.strip() else ["empty caption"]),
    ]


def _note_class(note: str) -> str:
    return "n" + note.encode("utf-8", "backslashreplace").hex()


def _bucket_class(size: Size) -> str:
    return f"b{size}"


def _card(row: SheetRow) -> str:
    """One sample: its pictures side by side, and what belongs to it."""
    classes = " ".join(["card", _bucket_class(row.size), *map(_note_class, dict.fromkeys(_traits(row)))])
    small = _small(row.pixels)
    pictures = [_figure(small, "picture")]
    if row.mask is not None:
        mask = _small_mask(row.mask, small.size)
        pictures += [_figure(mask, f"mask, {_covered(row.mask)}"), _figure(_dimmed(small, mask), "masked")]
    if row.conditioning is not None:
        pictures.append(_figure(_small(row.conditioning), "conditioning"))
    caption = f'<p class="caption" dir="auto">{_text(row.caption)}</p>'
    if not row.caption.strip():
        caption = '<p class="caption empty">empty caption</p>'
    marks = "".join(f'<span class="note" dir="auto">{_text(note)}</span>' for note in row.notes)
    return "\n".join(
        [
            f'<article class="{classes}">',
            f'<div class="pictures">{"".join(pictures)}</div>',
            caption,
            f'<p class="name"><bdi title="{_text(row.name)}">{_text(_short(row.name))}</bdi>'
            f' <span class="size">{row.size}</span>{marks}</p>',
            "</article>",
        ]
    )


def _figure(image: Image.Image, label: str) -> str:
    return (
        f'<figure><img src="{_data_url(image)}" width="{image.width}" height="{image.height}" alt="{_text(label)}"'
        f' loading="lazy" decoding="async"><figcaption>{_text(label)}</figcaption></figure>'
    )


def _covered(mask: NDArray[np.float32]) -> str:
    """How much of a picture counts."""
    mean = float(np.nan_to_num(mask).clip(0, 1).mean()) if mask.size else 0.0
    return f"{100 * mean:.0f} %" if mean == 0 or mean >= 0.01 else "<1 %"


def _fitting(width: int, height: int) -> tuple[int, int]:
    """Size of the thumbnail; pictures are never enlarged."""
    scale = min(1.0, THUMBNAIL / max(width, height))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _small(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels, np.uint8))
    return image.resize(_fitting(*image.size), Image.Resampling.LANCZOS, reducing_gap=2.0)


def _small_mask(mask: NDArray[np.float32], size: tuple[int, int]) -> Image.Image:
    levels = np.rint(np.nan_to_num(mask).clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BOX)


def _dimmed(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture, darkened where the mask is dark."""
    kept = _DIMMED + (1 - _DIMMED) * np.asarray(mask, np.float32)[..., None] / 255
    return Image.fromarray(np.rint(np.asarray(picture, np.float32) * kept).astype(np.uint8))


def _data_url(image: Image.Image) -> str:
    """The image itself as an address: without loss when it is small or a mask."""
    buffer = io.BytesIO()
    lossless = image.mode == "L" or max(image.size) <= _LOSSLESS
    if lossless:
        image.save(buffer, "PNG", compress_level=6)
    else:
        image.save(buffer, "JPEG", quality=_QUALITY)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _short(name: str) -> str:
    """The last folder and the file."""
    path = Path(name)
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _text(text: str) -> str:
    """Text of others for the page: nothing in it is markup, and what can't be shown or written is spelled out."""
    return escape(_UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text))
