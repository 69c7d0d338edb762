"""Cached text outputs: every caption that may be wanted is there, once; nothing stale is ever used."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from library.data.buckets import Assignment
from library.data.cache_names import CacheNames
from library.data.caption_cache import TEXT_SEED, cache_problem, draw_cached, texts_to_cache
from library.data.captions import Moment, caption
from library.data.items import Item
from library.data.settings import SubsetSettings
from library.data.texts import TextFiles, TextMemory, TextStore
from library.log import DataError
from library.types import Cond, Size

SUFFIX = "_flux_te.npz"
DROPPED = {"caption_dropout_rate": 0.3}
SHUFFLED = {"shuffle_caption": True}


def subset(folder: Path, **values: object) -> SubsetSettings:
    return SubsetSettings(image_dir=str(folder), **values)  # type: ignore[arg-type]


def items_of(folder: Path, captions: list[str], **values: object) -> list[Item]:
    settings, assignment = subset(folder, **values), Assignment(Size(64, 64), Size(64, 64), 0, 0, 0.0)
    return [
        Item(str(folder / f"{number:04}.png"), Size(64, 64), text, 1, assignment, 0, settings)
        for number, text in enumerate(captions)
    ]


def encoded(text: str) -> Cond:
    """Outputs that depend on the text; no two texts share them."""
    generator = torch.Generator().manual_seed(int.from_bytes(text.encode()[-7:], "big") + len(text))
    return {
        "t5_out": torch.randn(6, 4, generator=generator).bfloat16(),
        "t5_attn_mask": torch.tensor([1, 1, 1, 0, 0, 0]),
        "apply_t5_attn_mask": torch.tensor(False),
    }


def fill(store: TextStore) -> Counter[str]:
    """Encodes what is missing; why."""
    reasons: Counter[str] = Counter()
    for entry in store.entries:
        problem = store.problem(entry)
        if problem is not None:
            reasons[problem] += 1
            store.save(entry, encoded(entry.text))
    return reasons


def same(cond: Cond, text: str) -> bool:
    wanted = encoded(text)
    return cond.keys() == wanted.keys() and all(
        torch.equal(cond[name].float(), wanted[name].float()) for name in wanted
    )


def on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(items: list[Item], *, identity: str = "te", **values) -> TextFiles:
    return TextFiles(items, SUFFIX, identity, **values)


def memory(items: list[Item], *, variants: int = 0) -> TextMemory:
    return TextMemory(items, variants=variants)


both = pytest.mark.parametrize("store_of", [files, memory])


# what a read gives


@both
def test_dropout_at_its_rate_with_the_outputs_of_the_empty_caption(tmp_path, store_of: Callable[..., TextStore]):
    items = items_of(tmp_path, ["a, b", "c"], **DROPPED)
    store = store_of(items)
    fill(store)
    generator, read = random.Random(3), Counter()
    for number in range(10000):
        item = items[number % 2]
        read[number % 2, draw_cached(item.caption, item.subset, 0, TEXT_SEED, generator, Moment())] += 1
    assert set(read) == {(0, "a, b"), (0, ""), (1, "c"), (1, "")}
    assert abs((read[0, ""] + read[1, ""]) / 10000 - 0.3) < 0.02
    assert all(same(store.load(index, text), text) for index, text in read)


def test_dropout_draws_the_same_whether_cached_or_not(tmp_path):
    settings = subset(tmp_path, caption_prefix="the", caption_dropout_every_n_epochs=2, **DROPPED)
    for seed in range(100):
        for epoch in (1, 2):
            cached = draw_cached("a", settings, 0, TEXT_SEED, random.Random(seed), Moment(epoch))
            assert cached == caption("a", settings, random.Random(seed), Moment(epoch))


@both
def test_four_variants_each_a_quarter_of_the_time(tmp_path, store_of: Callable[..., TextStore]):
    (item,) = items = items_of(tmp_path, ["a, b, c, d, e, f, g, h"], **SHUFFLED)
    store = store_of(items, variants=4)
    fill(store)
    generator = random.Random(1)
    read = Counter(draw_cached(item.caption, item.subset, 4, TEXT_SEED, generator, Moment()) for _ in range(10000))
    assert len(read) == 4
    assert all(abs(count / 10000 - 0.25) < 0.02 for count in read.values())
    assert all(same(store.load(0, text), text) for text in read)


def test_whatever_is_drawn_is_cached(tmp_path):
    for values in (
        {"enable_wildcard": True, "caption_prefix": "{x|y}"},
        {"caption_tag_dropout_rate": 0.5, **DROPPED},
        {"caption_tag_dropout_rate": 1.0},
        {"keep_tokens_separator": "|||", **SHUFFLED},
        {"secondary_separator": ";", "caption_dropout_every_n_epochs": 3},
        {"caption_dropout_rate": 1.0},
    ):
        settings, generator = subset(tmp_path, **values), random.Random(2)
        for raw in ("", "a", "a;b, c, d ||| e", "{a|b}, c\nd"):
            for variants in (0, 1, 3):
                texts = texts_to_cache(raw, settings, variants)
                assert len(set(texts)) == len(texts) > 0
                for number in range(60):
                    moment = Moment(epoch=number % 4 + 1)
                    assert draw_cached(raw, settings, variants, TEXT_SEED, generator, moment) in texts


def test_the_empty_caption_is_last_and_only_there_when_it_is_needed(tmp_path):
    assert texts_to_cache("a", subset(tmp_path), 4) == ("a",)
    assert texts_to_cache("a", subset(tmp_path, **DROPPED), 4) == ("a", "")
    assert texts_to_cache("", subset(tmp_path, **DROPPED), 4) == ("",)
    assert texts_to_cache("a", subset(tmp_path, caption_dropout_every_n_epochs=1), 0) == ("a", "")


def test_variants_are_the_same_in_every_run_and_differ_between_captions(tmp_path):
    settings = subset(tmp_path, **SHUFFLED)
    tags = [f"tag {number}" for number in range(9)]
    first = texts_to_cache(", ".join(tags), settings, 3)
    assert first == texts_to_cache(", ".join(tags), settings, 3) == texts_to_cache(", ".join(tags), settings, 5)[:3]
    orders = set()
    for name in "abcdef":
        (text,) = texts_to_cache(", ".join([*tags[:8], f"{name} 8"]), settings, 1)
        orders.add(tuple(tag[-1] for tag in text.split(", ")))
    assert len(orders) > 1


@pytest.mark.parametrize(
    ("values", "variants", "captions", "name"),
    [
        ({"token_warmup_step": 10}, 4, ["a"], "token_warmup_step"),
        ({"token_warmup_step": 0.1}, 0, ["a"], "token_warmup_step"),
        (SHUFFLED, 0, ["a, b"], "shuffle_caption"),
        (SHUFFLED, 4, ["a, b"], None),
        ({"caption_tag_dropout_rate": 0.1}, 0, ["a, b"], "caption_tag_dropout_rate"),
        ({"enable_wildcard": True}, 0, ["a", "{b|c}"], "enable_wildcard"),
        ({"enable_wildcard": True}, 0, ["a", "b"], None),
        ({"caption_prefix": "{b|c}", "enable_wildcard": True}, 0, ["a"], "enable_wildcard"),
        ({"caption_dropout_every_n_epochs": 2, "secondary_separator": ";", **DROPPED}, 0, ["a;b"], None),
    ],
)
def test_what_forbids_the_cache(tmp_path, values, variants, captions, name):
    problem = cache_problem(subset(tmp_path, **values), variants, captions)
    assert (problem and problem[0]) == name
    if problem:
        assert "leave" in problem[1]


# what lies on the disk


def test_a_thousand_equal_captions_are_one_file(tmp_path):
    items = items_of(tmp_path, ["one caption"] * 1000)
    store = files(items)
    assert (len(store.entries), fill(store), len(on_disk(tmp_path))) == (1, {"not cached yet": 1}, 1)
    assert same(store.load(0, "one caption"), "one caption")
    assert same(store.load(999, "one caption"), "one caption")
    assert not fill(files(items))
    assert len(memory(items).entries) == 1


def test_the_first_text_of_an_image_lies_where_all_programs_look(tmp_path):
    items = items_of(tmp_path, ["a", "b", "b"], **DROPPED)
    fill(files(items))
    names = on_disk(tmp_path)
    assert [name for name in names if not name.startswith("shared_")] == [f"0000{SUFFIX}"]
    assert len(names) == 3  # besides, one for b and one for the empty caption
    with np.load(tmp_path / f"0000{SUFFIX}") as archive:
        assert set(archive.files) > set(encoded("a"))


def test_turning_dropout_on_or_off_encodes_nothing_twice(tmp_path):
    assert fill(files(items_of(tmp_path, ["a", "b"]))) == {"not cached yet": 2}
    assert fill(files(items_of(tmp_path, ["a", "b"], **DROPPED))) == {"not cached yet": 1}
    assert not fill(files(items_of(tmp_path, ["a", "b"])))


def test_more_variants_encode_only_the_further_ones(tmp_path):
    items = items_of(tmp_path, ["a, b, c, d, e, f, g"], **SHUFFLED)
    assert fill(files(items, variants=2)) == {"not cached yet": 2}
    assert fill(files(items, variants=4)) == {"not cached yet": 2}
    assert not fill(files(items, variants=2))


def test_a_caption_that_becomes_shared_is_found_where_it_was(tmp_path):
    fill(files(items_of(tmp_path, ["a", "b"])))
    items = items_of(tmp_path, ["a", "b", "a"])
    store = files(items)
    assert not fill(store)
    assert same(store.load(2, "a"), "a")


def test_two_subsets_of_one_image_with_different_captions(tmp_path):
    items = [*items_of(tmp_path, ["a"]), *items_of(tmp_path, ["a"], caption_prefix="the")]
    store = files(items)
    fill(store)
    assert not fill(files(items))
    assert same(store.load(0, "a"), "a")
    assert same(store.load(1, "the a"), "the a")


def test_images_of_one_stem_do_not_share_a_file(tmp_path):
    items = [
        replace(item, path=str(tmp_path / name), shares_stem=True)
        for item, name in zip(items_of(tmp_path, ["a", "b"]), ("x.png", "x.jpg"), strict=True)
    ]
    store = files(items)
    fill(store)
    assert not fill(files(items))
    assert same(store.load(0, "a"), "a")
    assert same(store.load(1, "b"), "b")


def test_equal_captions_of_two_folders_lie_in_both(tmp_path):
    items = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        items += items_of(tmp_path / name, ["a", "a"])
    store = files(items)
    fill(store)
    assert len(store.entries) == 2
    assert len(on_disk(tmp_path / "one")) == len(on_disk(tmp_path / "two")) == 1


def test_another_folder_for_all_files(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    items, names = items_of(images, ["a", "a", "b"], **DROPPED), CacheNames(tmp_path / "cache")
    fill(files(items, names=names))
    assert on_disk(images) == []
    assert not fill(files(items, names=names))


# nothing stale


def test_an_edited_caption_is_encoded_anew(tmp_path):
    fill(files(items_of(tmp_path, ["a", "b"])))
    store = files(items_of(tmp_path, ["a", "c"]))
    with pytest.raises(DataError, match="0001"):
        store.load(1, "c")
    assert fill(store) == {"caption changed": 1}
    assert same(store.load(1, "c"), "c")


def test_what_is_done_to_a_caption_counts(tmp_path):
    fill(files(items_of(tmp_path, ["a;b"])))
    assert fill(files(items_of(tmp_path, ["a;b"], caption_prefix="the"))) == {"caption changed": 1}
    assert fill(files(items_of(tmp_path, ["a;b"], secondary_separator=";"))) == {"caption changed": 1}


def test_other_encoder_or_precision(tmp_path):
    items = items_of(tmp_path, ["a"])
    fill(files(items, dtype="bf16"))
    assert fill(files(items, identity="other", dtype="bf16")) == {"other encoder": 1}
    assert fill(files(items, identity="other", dtype="fp16")) == {"other encoder": 1}
    assert not fill(files(items, identity="other", dtype="fp16"))


def test_files_of_other_programs_need_trust(tmp_path):
    items = items_of(tmp_path, ["a"])
    outputs = {name: tensor.float().numpy() for name, tensor in encoded("a").items()}
    np.savez(tmp_path / f"0000{SUFFIX}", **outputs)
    trusting = files(items, skip_check=True)
    assert not fill(trusting)
    assert torch.equal(trusting.load(0, "a")["t5_out"], encoded("a")["t5_out"].float())
    assert fill(files(items)) == {"made by another program": 1}


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_damaged_files_are_encoded_anew(tmp_path, damage):
    items = items_of(tmp_path, ["a"])
    fill(files(items))
    path = tmp_path / f"0000{SUFFIX}"
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    assert fill(files(items)) == {"damaged file": 1}
    assert same(files(items).load(0, "a"), "a")


# compact


def t5(tokens: int, applied: bool) -> Cond:
    generator = torch.Generator().manual_seed(0)
    return {
        "l_pooled": torch.randn(768, generator=generator).bfloat16(),
        "t5_out": torch.randn(512, 4096, generator=generator).bfloat16(),
        "txt_ids": torch.zeros(512, 3),
        "t5_attn_mask": (torch.arange(512) < tokens).long(),
        "apply_t5_attn_mask": torch.tensor(applied),
    }


def test_twenty_tokens_take_less_than_200_kb(tmp_path):
    items, outputs = items_of(tmp_path, ["a"]), t5(20, applied=True)
    store = files(items, compact=True)
    store.save(store.entries[0], outputs)
    assert (tmp_path / f"0000{SUFFIX}").stat().st_size < 200_000
    read = store.load(0, "a")
    assert torch.equal(read["t5_out"][:20], outputs["t5_out"][:20].float())
    assert not read["t5_out"][20:].any()
    assert torch.equal(read["l_pooled"], outputs["l_pooled"].float())
    assert read["t5_attn_mask"].dtype == torch.int64
    assert read["apply_t5_attn_mask"].item() is True


def test_rows_that_are_looked_at_are_never_cleared(tmp_path):
    items, outputs = items_of(tmp_path, ["a"]), encoded("a")
    store = files(items, compact=True)
    store.save(store.entries[0], outputs)
    assert torch.equal(store.load(0, "a")["t5_out"], outputs["t5_out"].float())


def test_a_compact_run_takes_whole_files_but_not_the_other_way_round(tmp_path):
    items = items_of(tmp_path, ["a"])
    fill(files(items))
    assert not fill(files(items, compact=True))
    (tmp_path / f"0000{SUFFIX}").unlink()
    fill(files(items, compact=True))
    assert fill(files(items)) == {"stored compactly": 1}


def test_the_key_is_readable(tmp_path):
    fill(files(items_of(tmp_path, ["a"]), dtype="bf16"))
    with np.load(tmp_path / f"0000{SUFFIX}") as archive:
        (name,) = set(archive.files) - set(encoded("a"))
        key = json.loads(str(archive[name]))
    assert (key["caption"], key["encoder"], key["dtype"]) == ("a", "te", "bf16")


def test_entries_of_many_images_are_cheap(tmp_path):
    items = items_of(tmp_path, [f"caption {number}" for number in range(20000)], **DROPPED)
    assert len(files(items).entries) == 20001
