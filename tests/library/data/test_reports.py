"""What is said of captions before training."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from library.data.buckets import Assignment
from library.data.items import Item
from library.data.reports import caption_table, token_report
from library.data.settings import SubsetSettings
from library.types import Size


def items_of(settings: SubsetSettings, captions: list[str], dataset: int = 0) -> list[Item]:
    size = Size(64, 64)
    assignment = Assignment(size, size, 0, 0, 0.0)
    return [
        Item(f"{settings.image_dir}/{number}.png", size, text, 1, assignment, dataset, settings)
        for number, text in enumerate(captions)
    ]


def report(settings: SubsetSettings, images: int, **counts: int):
    zero = dict.fromkeys(("captioned", "held_out", "from_class_tokens", "empty", "missing", "multi_line"), 0)
    return SimpleNamespace(settings=settings, dataset=0, images=images, **{**zero, **counts})


def count(texts: list[str]) -> dict[str, list[int]]:
    return {"t5": [len(text.split()) for text in texts]}


CATS = SubsetSettings(image_dir="cats", num_repeats=5, class_tokens="cat", caption_prefix="photo,", where="line 1")


def test_table():
    captions = ["a, b", "a, b", "a, c", "cat", "cat", "", "a, one two three four five"]
    found = report(CATS, 7, captioned=4, from_class_tokens=2, empty=1, multi_line=1)
    table = caption_table(items_of(CATS, captions), [found], count, {"t5": 4})
    assert table == [
        "cats x 5: 4/7 captioned, 2 from class tokens, 1 empty, 1 of several lines, of which only the first is used, "
        "2 with the caption of another image, 1 too long for t5, t5 cuts up to 3 tokens",
        "  caption: photo, a, b",
        "  caption: photo, a, c",
        "  caption: photo, cat",
        "most frequent of 6 tags: photo 7, a 4, b 2, cat 2",
    ]


def test_table_without_anything_to_say():
    plain = SubsetSettings(image_dir="dogs")
    assert caption_table(items_of(plain, ["one dog", "two dogs"]), [report(plain, 2, captioned=2)]) == [
        "dogs x 1: 2/2 captioned",
        "  caption: one dog",
        "  caption: two dogs",
    ]


def test_subsets_are_told_apart_even_when_settings_are_equal_copies():
    dogs = replace(CATS, image_dir="dogs")
    items = [*items_of(replace(CATS), ["a"]), *items_of(dogs, ["b"])]
    table = caption_table(items, [report(CATS, 1, captioned=1), report(dogs, 1, captioned=1)])
    assert table[1::2][:2] == ["  caption: photo, a", "  caption: photo, b"]


def test_many_subsets_are_summed_up():
    subsets = [replace(CATS, image_dir=str(number)) for number in range(1000)]
    items = [item for settings in subsets for item in items_of(settings, ["a", "b"])]
    table = caption_table(items, [report(settings, 2, captioned=1, empty=1) for settings in subsets])
    assert len(table) == 20 * 3 + 2
    assert table[-2] == "980 more subsets: 980/1960 captioned, 980 empty"


def test_long_captions_are_shortened_in_the_table_only():
    settings = SubsetSettings(image_dir="long")
    table = caption_table(items_of(settings, ["x" * 5000]), [report(settings, 1, captioned=1)])
    assert len(table[1]) < 400


def test_three_of_ten_captions_are_too_long():
    captions = ["short"] * 7 + ["a b c d e f", "a b c d e", "a b c d e"]
    (line,) = token_report(items_of(SubsetSettings(image_dir="d"), captions), count, {"t5": 4})
    assert line.startswith("t5: 3 of 10 captions are longer than 4 tokens and are cut (d/7.png, d/8.png, d/9.png)")
    assert "the longest has 6 and ends in '...a b c d e f'" in line


def test_the_prefix_counts_too():
    assert token_report(items_of(CATS, ["a b c"]), count, {"t5": 3})
    assert not token_report(items_of(CATS, ["a b"]), count, {"t5": 3})
