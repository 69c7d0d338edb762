"""Rules for modules: what they may look like, and which one decides."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from library.log import UserError
from networks.arguments import Arguments
from networks.reading import Rank
from networks.rules import Choice, Rules, parse
from networks.targets import Target

SIZE, OTHER = Rank(4, 1.0), Rank(2, 3.0)


def target(path: str) -> Target:
    return Target("lora_unet_" + path.replace(".", "_"), path, nn.Identity())


PATHS = [
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_mlp.2",
    "single_blocks.0.linear1",
    "single_blocks.10.linear1",
]


def outcome(rules: Rules, sizes: dict[str, Rank | None] | None = None) -> dict[str, Choice]:
    sizes = sizes or dict.fromkeys(PATHS, SIZE)
    return {path: rules.choose(target(path), size, SIZE) for path, size in sizes.items()}


def rules(text: str) -> Rules:
    return Rules.from_arguments(Arguments({"rules": text}))


def test_the_first_match_decides_and_leaves_the_rest_as_it_is() -> None:
    made = rules(
        r"""
        img_attn: dim=32 alpha=16, lr=1e-4 ; double: lr = 2e-3
        linear1$: train=no
        """
    )
    assert outcome(made) == {
        PATHS[0]: Choice(Rank(32, 16.0), 1e-4),
        PATHS[1]: Choice(SIZE, 2e-3),
        PATHS[2]: Choice(None, None),
        PATHS[3]: Choice(None, None),
    }
    made.check()
    assert made.table() == [
        "    1 modules  img_attn: dim=32 alpha=16 lr=0.0001",
        "    1 modules  double: lr=0.002",
        "    2 modules  linear1$: train=no",
    ]


def test_patterns_are_searched_in_paths_and_in_names_of_files() -> None:
    for pattern in (
        r"blocks\.0\.linear1",
        "lora_unet_single_blocks_0_",
        "^single_blocks.0.",
        "(?:single_blocks)[._]0[._]",
    ):
        found = outcome(rules(f"{pattern}: dim=9"))
        assert [path for path, choice in found.items() if choice.size == Rank(9, 1.0)] == [PATHS[2]], pattern


def test_train_decides_what_is_taken_in() -> None:
    sizes: dict[str, Rank | None] = {PATHS[0]: None, PATHS[1]: None, PATHS[2]: OTHER, PATHS[3]: OTHER}
    found = outcome(rules("img_attn: train=yes; txt: dim=8; blocks.0: dim=0; blocks: alpha=7"), sizes)
    assert [choice.size for choice in found.values()] == [SIZE, None, None, Rank(2, 7.0)]


def test_two_lists_decide_apart() -> None:
    given = {"network_reg_dims": r"blocks\.\d{1,2}\.img=8, single=2", "network_reg_lrs": "linear1=1e-3,txt=1e-5"}
    found = outcome(Rules.from_arguments(Arguments(given)))
    assert list(found.values()) == [
        Choice(Rank(8, 1.0), None),
        Choice(SIZE, 1e-5),
        Choice(Rank(2, 1.0), 1e-3),
        Choice(Rank(2, 1.0), 1e-3),
    ]
    both = Rules.from_arguments(Arguments({**given, "rules": "single: dim=16; img: lr=1e-2"}))
    assert list(outcome(both).values())[2] == Choice(Rank(16, 1.0), 1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing_like_it: dim=8", "matches no module.*nothing_like_it"),
        ("double_blocks: dim=8; img_attn: dim=4", "earlier rule.*img_attn"),
        ("single: lr=1e-4", "no adapter.*single.*train=yes"),
    ],
)
def test_a_rule_without_effect_is_an_error(text: str, message: str) -> None:
    made = rules(text)
    outcome(made, {PATHS[0]: SIZE, PATHS[1]: SIZE, PATHS[2]: None, PATHS[3]: None})
    with pytest.raises(UserError, match=message) as caught:
        made.check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("img_attn", "'img_attn' isn't pattern: settings"),
        ("img_attn: dim=8; mlp:", "'mlp:' isn't"),
        (": dim=8", "isn't pattern"),
        ("a: b", "'b' in 'a: b' is none of"),
        ("a: rank=8", "'rank=8' in"),
        ("a: dim=8 dim=9", "dim is given twice"),
        ("a: dim=8.5", "dim=8.5 in 'a: dim=8.5' is no whole number"),
        ("a: dim=-1", "out of range"),
        ("a: lr=fast", "lr=fast in .* is no number"),
        ("a: lr=nan", "out of range"),
        ("a: alpha=inf", "out of range"),
        ("a: train=maybe", "neither yes nor no"),
        ("a: train=", "neither yes nor no"),
        ("a: dim", "'dim' in"),
        ("a(: dim=8", "no regular expression"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rules(text)


@pytest.mark.parametrize("name", ["network_reg_dims", "network_reg_lrs"])
@pytest.mark.parametrize("text", ["single", "single=", "=8", "single=x", "single=8,double", "a(=8"])
def test_pairs_that_cannot_be_read_are_named(name: str, text: str) -> None:
    with pytest.raises(UserError, match=name):
        Rules.from_arguments(Arguments({name: text}))


PATTERNS = st.sampled_from(["img", "double", "single", r"\.0\.", "linear1", "lora_unet", "2$", "(?:txt|qkv)"])
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "dim": st.integers(0, 64).map(str),
        "alpha": st.sampled_from(["0", "1", "2.5"]),
        "lr": st.sampled_from(["1e-4", "0.01"]),
        "train": st.sampled_from(["yes", "no"]),
    },
).filter(bool)
LISTS = st.lists(st.tuples(PATTERNS, SETTINGS), max_size=5)


@given(LISTS, st.sampled_from([" ", ", "]), st.sampled_from(["; ", "\n"]))
def test_any_list_of_rules_decides_as_a_plain_search_does(
    items: list[tuple[str, dict[str, str]]], between: str, after: str
) -> None:
    text = after.join(
        f"{pattern}: {between.join(f'{key}={value}' for key, value in settings.items())}" for pattern, settings in items
    )
    for path, choice in outcome(rules(text)).items():
        texts = (path, target(path).name)
        said = next((words for pattern, words in items if any(re.search(pattern, text) for text in texts)), {})
        if said.get("train") == "no" or said.get("dim") == "0":
            assert choice == Choice(None, None)
        else:
            size = Rank(int(said.get("dim", 4)), float(said.get("alpha", 1)))
            assert choice == Choice(size, float(said["lr"]) if "lr" in said else None)
    assert [str(rule) for rule in parse("; ".join(map(str, parse(text))))] == [str(rule) for rule in parse(text)]
