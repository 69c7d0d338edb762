"""Values of a dataset that contradict one another or do nothing, masks, and colours."""

from __future__ import annotations

import pytest

from library.data.colours import colour
from library.log import UserError

HEAD = '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\n'  # four lines


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("color_aug = true", "color_aug"),
        ("random_crop = true", "random_crop"),
        ("face_crop_aug_range = [1.0, 2.0]", "face_crop_aug_range"),
    ],
)
@pytest.mark.parametrize("cache", ["cache_latents", "cache_latents_to_disk"])
def test_what_changes_pixels_cannot_be_cached(load_config, line, name, cache):
    with pytest.raises(UserError) as caught:
        load_config(HEAD + line, **{cache: True})
    assert f"`datasets[0].subsets[0].{name}`" in str(caught.value)
    assert "dataset.toml:5" in str(caught.value)
    assert f"leave out {name}" in str(caught.value)
    assert load_config(HEAD + line).datasets


def test_what_changes_pixels_may_come_from_the_command_line(load_config):
    with pytest.raises(UserError, match="--color_aug"):
        load_config(HEAD, color_aug=True, cache_latents=True)
    assert load_config(HEAD + "color_aug = false", color_aug=True, cache_latents=True).datasets


IDLE = [
    ("keep_tokens = 1", "nothing shuffles or drops tags", "shuffle_caption = true"),
    ("token_warmup_min = 3", "no token_warmup_step", "token_warmup_step = 10"),
    ("face_crop_aug_range = [1, 2]", "enable_bucket is on", "enable_bucket = false"),
]


@pytest.mark.parametrize(("line", "reason", "cure"), IDLE)
def test_keys_without_effect_are_warned_of(load_config, line, reason, cure):
    general = "[general]\nenable_bucket = true\n"
    (finding,) = load_config(general + HEAD + line + "\n").findings
    assert not finding.error
    assert f"{line.split()[0]} has no effect: " in finding.what
    assert reason in finding.what
    assert finding.where.endswith("dataset.toml:7")
    if cure.startswith("enable"):
        general = f"[general]\n{cure}\n"
        cure = ""
    assert not load_config(general + HEAD + f"{line}\n{cure}\n").findings


def test_a_default_for_all_does_something_when_one_subset_uses_it(load_config):
    text = "[general]\nkeep_tokens = 1\n" + HEAD
    assert len(load_config(text + '[[datasets.subsets]]\nimage_dir = "b"\n').findings) == 1
    assert not load_config(text + '[[datasets.subsets]]\nimage_dir = "b"\nshuffle_caption = true\n').findings


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("max_bucket_reso = 2048", "max_bucket_reso"),
        ("bucket_no_upscale = true", "bucket_no_upscale"),
        ("enable_bucket = true\nbucket_no_upscale = true\nmin_bucket_reso = 128", "min_bucket_reso"),
        ("validation_seed = 3", "validation_seed"),
    ],
)
def test_keys_of_buckets_without_effect(load_config, lines, name):
    (finding,) = load_config(f"[[datasets]]\nresolution = 512\n{lines}\n" + HEAD.partition("512\n")[2]).findings
    assert finding.what.startswith(f"{name} has no effect")


def test_the_resolution_may_lie_anywhere_without_a_list_of_buckets(load_config):
    text = "[[datasets]]\nresolution = 2048\nenable_bucket = true\nbucket_no_upscale = true\n"
    assert not load_config(text + HEAD.partition("512\n")[2]).findings


# masks


def masks(loaded) -> list[str]:
    return [subset.mask for dataset in loaded.datasets for subset in dataset.subsets]


def test_masks(load_config):
    assert masks(load_config(HEAD)) == [""]
    assert masks(load_config(HEAD + "alpha_mask = true")) == ["alpha"]
    assert masks(load_config(HEAD + 'conditioning_data_dir = "c"', masked_loss=True)) == ["conditioning"]
    # a switch on the command line isn't for pairs
    both = HEAD + 'conditioning_data_dir = "c"\n' + HEAD
    assert masks(load_config(both, masked_loss=True, alpha_mask=True)) == ["conditioning", "alpha"]


def test_masked_loss_without_masks(load_config):
    (finding,) = load_config(HEAD, masked_loss=True).findings
    assert (finding.error, finding.code, finding.where) == (True, "E-MASK", "--masked_loss")
    assert "conditioning_data_dir" in finding.hint
    assert "alpha_mask" in finding.hint
    (finding,) = load_config(HEAD + HEAD + "alpha_mask = true", masked_loss=True).findings
    assert not finding.error
    assert finding.where.endswith(":3")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("white", (255, 255, 255)), (" Grey", (128, 128, 128)), ("#0080ff", (0, 128, 255)), ("#F80", (255, 136, 0))],
)
def test_colours(load_config, text, wanted):
    assert colour(text, "here") == wanted
    assert load_config(HEAD, alpha_background=text).datasets[0].subsets[0].background == wanted


@pytest.mark.parametrize(("text", "hint"), [("whitte", "did you mean white?"), ("#12345", "#rrggbb"), ("", "#rrggbb")])
def test_unknown_colours(load_config, text, hint):
    with pytest.raises(UserError, match="unknown colour") as caught:
        load_config(HEAD, alpha_background=text)
    assert caught.value.where == "--alpha_background"
    assert hint in caught.value.hint
