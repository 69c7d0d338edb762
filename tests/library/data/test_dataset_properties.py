"""Any configuration at all: no surprise but a clear mistake; every slip of the pen gets the right suggestion."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from library.data import config
from library.data.schema import DATASET_KEYS, INTEGER, LEVELS, NUMBER, RANGE, SIZE, SWITCH, TABLE, Key
from library.log import UserError
from library.option_groups import FLUX_TRAIN_NETWORK
from library.options import Options, Origin

FOLDER = TemporaryDirectory()
ACCEPTS = config.Accepts(pairs=True)
NAMES = sorted({key.name for keys in LEVELS.values() for key in keys})
NAMES = sorted({key.name for keys in LEVELS.values() for key in keys})


def anything(draw: random.Random, depth: int = 0) -> object:
    """A value of any type."""
    kind = draw.randrange(9 if depth < 2 else 7)
    if kind == 7:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 8:
        return {word(draw): anything(draw, depth + 1) for _ in range(draw.randrange(4))}
    numbers = (draw.randrange(-3, 4), draw.choice((64, 512, 10**30, -(10**30))))
    return (None, draw.random() < 0.5, *numbers, draw.uniform(-2, 2), word(draw), float("nan"))[kind]


def word(draw: random.Random) -> str:
    return "".join(draw.choice('ab_.0 \n\0"[]#%\\é画😀\ud800') for _ in range(draw.randrange(9)))


def likely(draw: random.Random, key: Key) -> object:
    """A value of the right type, and of about the right size."""
    size = draw.choice((64, 256, 512, 1024))
    if key.kind is SIZE:
        return draw.choice((size, [size, 512]))
    if key.kind is INTEGER:
        return size if "bucket" in key.name else draw.randrange(4)
    if key.choices:
        return draw.choice(key.choices)
    if key.kind is RANGE:
        return [draw.uniform(0.5, 2), draw.uniform(1, 4)]
    if key.kind is TABLE:
        return {word(draw): draw.random()}
    if key.kind is NUMBER:
        return draw.random()
    return draw.random() < 0.5 if key.kind is SWITCH else draw.choice(("a", "b.json", ","))


def table(draw: random.Random, level: str, wildness: float) -> dict[str, object]:
    """A table of a configuration; the wilder the less right."""
    result: dict[str, object] = {}
    for key in draw.sample(LEVELS[level], draw.randrange(8)):
        if key.name not in ("metadata_file", "conditioning_data_dir"):
            result[key.name] = anything(draw) if draw.random() < wildness else likely(draw, key)
    while draw.random() < wildness:
        result[draw.choice((word(draw), draw.choice(NAMES)))] = anything(draw)
    return result


def document(draw: random.Random) -> object:
    """A whole configuration."""
    wildness = draw.choice((0.0, 0.0, 0.05, 0.3))
    datasets: list[object] = []
    for _ in range(draw.randrange(1, 4)):
        needed = draw.choice(({}, {}, {"metadata_file": "m"}, {"conditioning_data_dir": "c"}))
        subsets = [
            table(draw, "[[datasets.subsets]]", wildness)
            | ({} if draw.random() < wildness else {"image_dir": "a"})
            | needed
            for _ in range(draw.randrange(1, 4))
        ]
        datasets.append({**table(draw, "[[datasets]]", wildness), "subsets": subsets})
    result = {"general": table(draw, "[general]", wildness), "datasets": datasets}
    while draw.random() < wildness:
        result[draw.choice(("general", "datasets", word(draw)))] = anything(draw)
    return result


def load(document: object, **values: object):
    path = Path(FOLDER.name) / "dataset.json"
    path.write_text(json.dumps(document, indent=1), "utf-8")
    values = {"dataset_config": path, "resolution": "512", **values}
    origins = {name: Origin("command line", f"--{name}") for name in values}
    return config.load(Options(FLUX_TRAIN_NETWORK, values, origins), ACCEPTS)


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32))
def test_any_configuration_is_taken_or_refused_in_words(seed):
    draw = random.Random(seed)
    try:
        assert load(document(draw), cache_latents=seed % 3 == 0, masked_loss=seed % 5 == 0).datasets
    except UserError as mistake:
        for line in mistake.lines():
            assert line.startswith("error[E-")
            assert "dataset.json" in line or "--" in line
            assert "\n" not in line


def test_some_of_these_configurations_are_taken():
    taken = 0
    for seed in range(60):
        with suppress(UserError):
            load(document(random.Random(seed)))
            taken += 1
    assert 5 < taken < 55


LETTERS = "abcdefghijklmnopqrstuvwxyz_"


@st.composite
def slips(draw):
    """A level, a key of it, and the key with one slip of the pen."""
    level = draw(st.sampled_from(sorted(LEVELS)))
    name = draw(st.sampled_from([key.name for key in LEVELS[level]]))
    at, letter = draw(st.integers(0, len(name) - 1)), draw(st.sampled_from(LETTERS))
    slip = draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
            ]
        )
    )
    return level, name, slip


def one_letter_apart(left: str, right: str) -> bool:
    return len(left) == len(right) and sum(a != b for a, b in zip(left, right, strict=True)) == 1


@settings(max_examples=250, deadline=None)
@given(slips())
def test_every_slip_of_the_pen_is_reported_with_the_right_key(drawn):
    level, name, slip = drawn
    if slip in NAMES:
        return
    general: dict[str, object] = {}
    subset: dict[str, object] = {"image_dir": "a"}
    if name == "metadata_file":
        subset = {"image_dir": "a", "metadata_file": "m"}
    if name == "conditioning_data_dir":
        subset = {"image_dir": "a", "conditioning_data_dir": "c"}
    dataset: dict[str, object] = {"subsets": [subset]}
    {"[general]": general, "[[datasets]]": dataset, "[[datasets.subsets]]": subset}[level][slip] = 1
    with pytest.raises(UserError) as caught:
        load({"general": general, "datasets": [dataset]})
    (line,) = [line for line in caught.value.lines() if "unknown key" in line]
    wanted = {name, *(other for other in NAMES if one_letter_apart(other, slip))}  # mix_ is as near to min_ as to max_
    assert any(f"did you mean `{other}`?" in line for other in wanted)
    assert "dataset.json:" in line


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "num_repeats": st.integers(1, 50),
            "class_tokens": st.text(max_size=9),
            "caption_prefix": st.text(max_size=9),
            "keep_tokens": st.integers(0, 9),
            "shuffle_caption": st.booleans(),
            "flip_aug": st.booleans(),
            "caption_dropout_rate": st.floats(0, 1),
            "token_warmup_step": st.floats(0, 1e6) | st.integers(0, 10**6),
            "custom_attributes": st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
        },
    ),
    st.fixed_dictionaries({}, optional={key.name: st.integers(64, 64) for key in DATASET_KEYS if key.kind is INTEGER}),
)
def test_what_is_written_is_what_is_read(subset, dataset):
    dataset.pop("validation_seed", None)
    (found,) = load({"datasets": [{**dataset, "subsets": [{"image_dir": "a", **subset}]}]}).datasets
    assert {name: getattr(found, name) for name in dataset} == dataset
    assert {name: getattr(found.subsets[0], name) for name in subset} == subset
