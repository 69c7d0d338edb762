"""Captions: the golden cases, and what holds of any caption and any settings."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from library.data.captions import (
    Moment,
    caption,
    first_line,
    is_multi_line,
    plain,
    raw_caption,
    varies,
    with_choices,
)
from library.data.settings import SubsetSettings

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "captions.json").read_text("utf-8"))["cases"]

DIFFERENT = {
    "prefix/suffix with multi-line, wildcard off: suffix is lost": (
        "prefix and suffix belong to the line that is used",
        {0: ["PRE line one SUF"]},
    ),
    "prefix/suffix with multi-line, wildcard on: only outer lines carry them": (
        "prefix and suffix belong to the line that is used",
        {0: ["PRE line two SUF"], 1: ["PRE line one SUF"], 2: ["PRE line one SUF"], 3: ["PRE line one SUF"]},
    ),
    "everything on": ("prefix and suffix belong to the line that is used", {7: ["PRE bob, blue hair, best SUF"]}),
    "wildcard nested is not supported": ("wildcards may be nested", {2: ["a"]}),
    "keep_tokens_separator NOT removed if shuffle/warmup/tag dropout all off": (
        "a mark isn't for the model",
        {0: ["a, b, c"]},
    ),
    "other caption_separator is used for splitting but output is joined with comma+space": (
        "tags keep their separator",
        {0: ["a; c; b"]},
    ),
}
"""Golden cases that show a fault of the reference: why we differ, and what we give, by seed."""

REPLACEMENTS = {"textual inversion replacement string", "textual inversion replace-all list"}
"""Golden cases of something that textual inversion does to a finished caption."""


def subset(**values: object) -> SubsetSettings:
    return SubsetSettings(image_dir="images", **values)  # type: ignore[arg-type]


def result(case: dict) -> list[str]:
    settings, generator = subset(**case["settings"]), random.Random(case["python_random_seed"])
    moment = Moment(case["current_epoch"], case["current_step"], case["max_train_steps"])
    return [caption(case["caption"], settings, generator, moment) for _ in case["outputs"]]


@pytest.mark.parametrize(
    "case",
    [case for case in GOLDEN if case["name"] not in {*DIFFERENT, *REPLACEMENTS}],
    ids=lambda case: f"{case['name']}-{case['python_random_seed']}-{case['current_step']}-{case['current_epoch']}",
)
def test_golden(case):
    assert result(case) == case["outputs"]


@pytest.mark.parametrize("name", DIFFERENT)
def test_golden_faults_are_not_copied(name):
    reason, wanted = DIFFERENT[name]
    cases = [case for case in GOLDEN if case["name"] == name]
    assert {case["python_random_seed"] for case in cases} == set(wanted)
    for case in cases:
        assert result(case) == wanted[case["python_random_seed"]] != case["outputs"], reason


def test_golden_is_whole():
    assert len(GOLDEN) == 79
    assert {case["name"] for case in GOLDEN} >= {*DIFFERENT, *REPLACEMENTS}


# properties

WORDS = st.text("abcdé 0", min_size=1, max_size=6).map(str.strip).filter(bool)
TAGS = st.lists(WORDS, min_size=1, max_size=8)
SEPARATORS = st.sampled_from([",", ";", "/", "; ", "、", " - "])
SEEDS = st.integers(0, 2**32)
MOMENTS = st.builds(Moment, st.integers(1, 9), st.integers(0, 120), st.just(100))
RATES = st.sampled_from([0.0, 0.3, 1.0])

few = hypothesis_settings(max_examples=60, deadline=None)


@st.composite
def tag_settings(draw, **fixed):
    values = {
        "shuffle_caption": draw(st.booleans()),
        "caption_tag_dropout_rate": draw(RATES),
        "token_warmup_step": draw(st.sampled_from([0, 0.5, 100])),
        "token_warmup_min": draw(st.integers(0, 4)),
        "keep_tokens": draw(st.integers(0, 4)),
        "caption_separator": draw(SEPARATORS),
    }
    return subset(**{**values, **fixed})


def parts(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator.strip())] if text else []


@few
@given(TAGS, tag_settings(), SEEDS, MOMENTS)
def test_tags_are_never_invented_and_kept_ones_lead(tags, settings, seed, moment):
    separator = settings.caption_separator
    seen = parts(caption(separator.join(tags), settings, random.Random(seed), moment), separator)
    assert not Counter(seen) - Counter(tags)
    kept = tags[: settings.keep_tokens]
    assert seen[: len(kept)] == kept
    if not settings.shuffle_caption:
        rest = iter(tags[len(kept) :])
        assert all(tag in rest for tag in seen[len(kept) :])


@few
@given(TAGS, tag_settings(caption_tag_dropout_rate=0.0, token_warmup_step=0), SEEDS)
def test_no_tag_is_lost_without_dropout(tags, settings, seed):
    separator = settings.caption_separator
    seen = parts(caption(separator.join(tags), settings, random.Random(seed)), separator)
    assert Counter(seen) == Counter(tags)
    assert settings.shuffle_caption or seen == tags


@few
@given(TAGS, TAGS, TAGS, tag_settings(keep_tokens_separator="|||"), SEEDS, MOMENTS)
def test_marked_parts_are_fixed(head, flexible, tail, settings, seed, moment):
    separator = settings.caption_separator
    text = "|||".join(separator.join(tags) for tags in (head, flexible, tail))
    result = caption(text, settings, random.Random(seed), moment)
    seen = parts(result, separator)
    assert "|||" not in result
    assert seen[: len(head)] == head
    assert seen[-len(tail) :] == tail
    assert not Counter(seen[len(head) : -len(tail)]) - Counter(flexible)


@few
@given(TAGS, tag_settings(shuffle_caption=True, caption_tag_dropout_rate=0.0, token_warmup_step=0), SEEDS)
def test_the_separator_stays(tags, settings, seed):
    separator = settings.caption_separator
    result = caption(separator.join(tags), settings, random.Random(seed))
    assert result.count(separator.strip() + " ") >= len(tags) - 1
    if separator.strip() not in ",":
        assert "," not in result


@pytest.mark.parametrize(
    ("separator", "text", "wanted"),
    [
        (",", "a,b , c", "a, b, c"),
        (", ", "a, b, c", "a, b, c"),
        (";", "a;b; c", "a; b; c"),
        (" - ", "a - b - c", "a - b - c"),
        (" ", "a b c", "a b c"),
        ("", "a, b", "a, b"),
    ],
)
def test_tags_are_joined_with_their_separator_and_one_space(separator, text, wanted):
    settings = subset(caption_separator=separator, shuffle_caption=True, keep_tokens=3)
    assert caption(text, settings, random.Random(0)) == wanted


@few
@given(TAGS, tag_settings(), SEEDS, MOMENTS)
def test_the_same_generator_gives_the_same_caption(tags, settings, seed, moment):
    text = settings.caption_separator.join(tags)
    assert caption(text, settings, random.Random(seed), moment) == caption(text, settings, random.Random(seed), moment)


@few
@given(st.text("ab{}|, \n", max_size=30), tag_settings(enable_wildcard=True), SEEDS)
def test_no_text_is_too_strange(raw, settings, seed):
    caption(raw_caption(raw, settings), settings, random.Random(seed))
    plain(raw_caption(raw, settings), settings)


TREES = st.recursive(
    st.text("abc ", max_size=4),
    lambda inner: st.lists(st.lists(inner, min_size=1, max_size=3).map(tuple), min_size=2, max_size=3),
    max_leaves=10,
)
"""A text, or a list of options, each a sequence of such trees."""


def written(tree) -> str:
    if isinstance(tree, str):
        return tree
    return "{" + "|".join("".join(map(written, option)) for option in tree) + "}"


def meanings(tree) -> set[str]:
    if isinstance(tree, str):
        return {tree}
    found = set()
    for option in tree:
        texts = {""}
        for piece in option:
            texts = {left + right for left in texts for right in meanings(piece)}
        found |= texts
    return found


@few
@given(TREES, SEEDS)
def test_nested_wildcards_give_one_of_their_meanings(tree, seed):
    text = written(tree)
    if "{{" in text:  # stands for a brace
        while "{{" in text:
            text = text.replace("{{", "{ {")
        assert "{" not in with_choices(text, random.Random(seed))
        return
    assert with_choices(text, random.Random(seed)) in meanings(tree)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("x {a {b|c}|d} y", {"x a b y", "x a c y", "x d y"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{|a}", {"", "a"}),
        ("a } b", {"a } b"}),
        ("a { b", {"a { b"}),
        ("a | b", {"a | b"}),
        ("{}", {"{}"}),
        ("{a{}|b}", {"a{}", "b"}),
    ],
)
def test_wildcards(text, wanted):
    assert {with_choices(text, random.Random(seed)) for seed in range(60)} == wanted


def test_every_line_is_chosen_as_often():
    settings = subset(enable_wildcard=True, caption_prefix="the", caption_suffix="here")
    raw = raw_caption("\n one {red|blue}\r\n\r\ntwo\rthree \n", settings)
    assert raw == "one {red|blue}\ntwo\nthree"
    generator = random.Random(1)
    counts = Counter(caption(raw, settings, generator) for _ in range(3000))
    assert set(counts) == {"the one red here", "the one blue here", "the two here", "the three here"}
    assert 900 < counts["the two here"] < 1100


def test_only_the_first_line_is_read_without_wildcards():
    assert raw_caption("\ufeff first \r\nsecond", subset()) == "first"
    assert raw_caption("\nsecond", subset()) == first_line("\nsecond") == ""
    assert raw_caption("", subset(enable_wildcard=True)) == ""
    assert is_multi_line("a\rb")
    assert not is_multi_line("a\n \n")


@pytest.mark.parametrize(
    ("separator", "text", "wanted"),
    [
        (",", "a ||| b,c", "a, b, c"),
        (";", "a;||| b;  c ||| d", "a; b; c; d"),
        (", ", "||| b", "b"),
        (",", "a |||", "a"),
    ],
)
def test_a_mark_goes_where_nothing_else_is_done(separator, text, wanted):
    settings = subset(keep_tokens_separator="|||", caption_separator=separator)
    assert caption(text, settings, random.Random(0)) == plain(text, settings) == wanted


def test_dropout_by_rate_and_epoch():
    settings, generator = subset(caption_dropout_rate=0.3, caption_dropout_every_n_epochs=3), random.Random(5)
    empty = sum(caption("a", settings, generator, Moment(epoch=1)) == "" for _ in range(10000))
    assert abs(empty / 10000 - 0.3) < 0.02
    assert {caption("a", settings, generator, Moment(epoch=3)) for _ in range(20)} == {""}


def test_plain_leaves_nothing_to_chance():
    settings = subset(
        enable_wildcard=True,
        shuffle_caption=True,
        caption_tag_dropout_rate=1.0,
        caption_dropout_rate=1.0,
        token_warmup_step=100,
        secondary_separator=";;;",
        caption_prefix="new",
    )
    assert plain("{a|b}, c;;;d, e\nsecond", settings) == "new a, c,d, e"


def test_whether_captions_vary():
    assert not varies("a {b|c}", subset(caption_dropout_rate=0.5))
    assert not varies("a", subset(enable_wildcard=True))
    assert varies("a {b|c}", subset(enable_wildcard=True))
    assert varies("a\nb", subset(enable_wildcard=True))
    assert varies("a", subset(enable_wildcard=True, caption_prefix="{b|c}"))
    assert varies("a, b", subset(shuffle_caption=True))
