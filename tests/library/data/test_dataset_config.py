"""Dataset configuration: what is accepted, what each value resolves to, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.data import config
from library.data.settings import DatasetSettings, SubsetSettings
from library.log import UserError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "dataset_config.json").read_text("utf-8"))
DREAMBOOTH = [
    case
    for case in GOLDEN["cases"]
    if case["name"] not in ("batch_size bool", "prior_loss_weight by CLI")  # rejected here; not a value of the dataset
    and case["script"] == "network"
    and all(d["kind"] == "dreambooth" for d in case["result"].get("datasets", [{"kind": ""}]))
]
LATER = {
    "alpha_mask",
    "cache_info",
    "caption_dropout_rate",
    "color_aug",
    "face_crop_aug_range",
    "random_crop",
    "token_warmup_step",
}
CLI_TYPES = {"train_batch_size": int, "dataset_repeats": int, "min_bucket_reso": int, "max_bucket_reso": int}


def command_line(words: list[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    while words:
        name = words.pop(0).removeprefix("--")
        if words and not words[0].startswith("--"):
            word = words.pop(0)
            values[name] = int(word) if word.isdigit() and name != "resolution" else word
        else:
            values[name] = True
    return values


def expected_subset(subset: dict) -> dict:
    return {**subset, **{key: tuple(v) for key, v in subset.items() if isinstance(v, list)}}


@pytest.mark.parametrize("case", DREAMBOOTH, ids=lambda case: case["name"])
def test_values_are_those_of_the_reference(case, tmp_path, options_of):
    document = json.loads(json.dumps(case["config"]))
    for dataset in document.get("datasets", []):
        for subset in dataset.get("subsets", []):
            subset.setdefault("image_dir", "d")
    given = command_line(list(case["cli"]))
    has_resolution = "resolution" in given or any(
        "resolution" in table for table in [*document.get("datasets", []), document.get("general", {})]
    )
    if not has_resolution:
        given["resolution"] = "512"
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(document), "utf-8")
    options = options_of(dataset_config=path, **given)
    used = {key for d in case["result"].get("datasets", []) for s in d["subsets"] for key in s}
    if case["name"] in ("general only", "empty file") or used & LATER:
        with pytest.raises(UserError):
            config.load(options)
        return
    loaded = config.load(options)
    assert len(loaded.datasets) == len(case["result"]["datasets"])
    for settings, wanted in zip(loaded.datasets, case["result"]["datasets"], strict=True):
        defaults = {**GOLDEN["defaults"]["dreambooth"]["dataset"], "resolution": [512, 512], **wanted["dataset"]}
        for name, value in defaults.items():
            if name != "prior_loss_weight":
                got = getattr(settings, name)
                assert (list(got) if name == "resolution" else got) == value, name
        for subset, wanted_subset in zip(settings.subsets, wanted["subsets"], strict=True):
            defaults = {**GOLDEN["defaults"]["dreambooth"]["subset"], **expected_subset(wanted_subset)}
            for name, value in defaults.items():
                assert getattr(subset, name) == (value if value is not None or name != "custom_attributes" else {}), (
                    name
                )


@pytest.mark.parametrize(
    "case",
    [case for case in GOLDEN["cases"] if case["script"] == "network" and case["result"].get("error") == "invalid"],
    ids=lambda case: case["name"],
)
def test_what_the_reference_rejects_is_rejected(case, tmp_path, options_of):
    if case["name"] in ("network_multiplier int", "face_crop_aug_range ints"):
        pytest.skip("whole numbers are fine where others are wanted")
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(case["config"], indent=1), "utf-8")
    with pytest.raises(UserError) as caught:
        config.load(options_of(dataset_config=path, resolution="512"))
    for wrong in case["result"]["paths"]:
        if "metadata_file" in str(caught.value):
            continue  # such datasets come later
        assert wrong.rpartition(".")[2].strip("0123456789") in str(caught.value)


def test_defaults_and_types(load_config):
    loaded = load_config('[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a b"\n')
    (dataset,) = loaded.datasets
    assert dataset.resolution == (512, 512)
    assert isinstance(dataset, DatasetSettings)
    (subset,) = dataset.subsets
    assert subset.image_dir == "a b"
    assert subset == SubsetSettings(image_dir="a b", where=subset.where)
    assert subset.where.endswith("dataset.toml:3")


def test_caption_extension_gets_its_dot_and_other_spelling_wins(load_config):
    text = '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\n'
    assert load_config(text, caption_extension="txt").datasets[0].subsets[0].caption_extension == ".txt"
    loaded = load_config(text, caption_extension=".txt", caption_extention=".cap")
    assert loaded.datasets[0].subsets[0].caption_extension == ".cap"


HEAD = '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\n'  # four lines
BUCKETS = '[[datasets]]\nenable_bucket = true\nresolution = {}\n[[datasets.subsets]]\nimage_dir = "a"'

MISTAKES = [
    (HEAD + "num_repeat = 3", 5, "datasets[0].subsets[0].num_repeat", "did you mean `num_repeats`?"),
    (HEAD + "flip_aug = 1", 5, "flip_aug", "true or false"),
    (HEAD + 'num_repeats = "3"', 5, "num_repeats", "a whole number"),
    (HEAD + "num_repeats = true", 5, "num_repeats", "a whole number, not true"),
    (HEAD + "num_repeats = 1.5", 5, "num_repeats", "a whole number"),
    (HEAD + "resolution = 512", 5, "resolution", "[[datasets]]"),
    (HEAD + "batch_size = 2", 5, "batch_size", "[[datasets]]"),
    (HEAD + "class_tokens = 3", 5, "class_tokens", "text in quotes"),
    (HEAD + "prior_loss_weight = 1.0", 5, "prior_loss_weight", "on the command line"),
    (HEAD + "train_batch_size = 1", 5, "train_batch_size", ""),
    (HEAD + 'resize_interpolation = "best"', 5, "resize_interpolation", "one of lanczos"),
    (HEAD + "custom_attributes = 1", 5, "custom_attributes", "a table"),
    (HEAD + "shuffle_caption = true", 5, "shuffle_caption", "not available yet"),
    (HEAD + "caption_dropout_rate = 0.1", 5, "caption_dropout_rate", "not available yet"),
    (HEAD + "is_reg = true", 5, "is_reg", "not available yet"),
    (HEAD + "enable_wildcard = true", 5, "enable_wildcard", "not available yet"),
    (HEAD + 'conditioning_data_dir = "c"', 5, "conditioning_data_dir", "not available yet"),
    (HEAD + "face_crop_aug_range = [1, 2]", 5, "face_crop_aug_range", "not available yet"),
    (HEAD + 'keep_tokens_separator = "|||"', 5, "keep_tokens_separator", "not available yet"),
    ("[general]\nfoo = 1\n" + HEAD, 2, "general.foo", ""),
    ("[general]\nis_reg = true\n" + HEAD, 2, "is_reg", "[[datasets.subsets]]"),
    ("[dataset]\n" + HEAD, 1, "dataset", "did you mean `datasets`?"),
    ("general = 1\n" + HEAD, 1, "general", "must be a table"),
    ('[[datasets]]\nresolution = "512"\n[[datasets.subsets]]\nimage_dir = "a"', 2, "resolution", "whole number"),
    ('[[datasets]]\nresolution = [512]\n[[datasets.subsets]]\nimage_dir = "a"', 2, "resolution", "[width, height]"),
    ('[[datasets]]\nresolution = 0\n[[datasets.subsets]]\nimage_dir = "a"', 2, "resolution", "at least 1"),
    ("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nnum_repeats = 2", 3, "datasets[0].subsets[0]", "image_dir"),
    ("[[datasets]]\nresolution = 512\n", 1, "datasets[0]", "no subsets"),
    ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"', 1, "datasets[0]", "--resolution"),
    (HEAD + BUCKETS.format(2048), 5, "2048", "max_bucket_reso"),
    (HEAD + BUCKETS.format(128), 5, "128", "min_bucket_reso"),
    (HEAD + "image_dir = 'again'", 5, "", "TOML"),
    ('[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "C:\\pictures"', 4, "", "single quotes"),
    ("", None, "no datasets", "[[datasets]]"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "name", "hint"), MISTAKES, ids=range(len(MISTAKES)))
def test_each_mistake_is_named_with_line_and_hint(load_config, text, line, name, hint):
    with pytest.raises(UserError) as caught:
        load_config(text)
    message = str(caught.value)
    assert "dataset.toml" + ("" if line is None else f":{line}") in message
    assert name in message
    assert hint in message


def test_all_mistakes_at_once(load_config):
    text = "[[datasets]]\nresolution = 512\nbar = 2\n[[datasets.subsets]]\nimage_dir = 'a'\nfoo = 1\n"
    text += "[[datasets.subsets]]\nimage_dir = 'b'\nnum_repeats = 'x'\n"
    with pytest.raises(UserError) as caught:
        load_config(text)
    lines = caught.value.lines()
    assert len(lines) == 3
    for line, (number, name) in zip(
        lines, [(3, "datasets[0].bar"), (6, "subsets[0].foo"), (9, "subsets[1].num_repeats")], strict=True
    ):
        assert f"dataset.toml:{number}" in line
        assert name in line


def test_json_mistakes_have_lines_too(load_config):
    text = json.dumps({"datasets": [{"resolution": 512, "subsets": [{"image_dir": "a", "flip_aug": None}]}]}, indent=1)
    with pytest.raises(UserError) as caught:
        load_config(text, "dataset.json")
    assert "dataset.json:8" in str(caught.value)
    assert "null" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"), [("a.yaml", "x: 1", "neither"), ("a.json", "[1]", "object"), ("a.json", "{", "JSON")]
)
def test_other_files(load_config, name, content, words):
    with pytest.raises(UserError, match=words):
        load_config(content, name)


def test_missing_file(options_of, tmp_path):
    with pytest.raises(UserError, match="doesn't exist"):
        config.load(options_of(dataset_config=tmp_path / "none.toml"))


def test_image_dir_beside_the_file(load_config, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "pictures").mkdir()
    text = '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "pictures"\n'
    assert load_config(text).datasets[0].subsets[0].image_dir == str(tmp_path / "pictures")
    (elsewhere / "pictures").mkdir()
    assert load_config(text).datasets[0].subsets[0].image_dir == "pictures"


def test_unicode_and_byte_order_mark(options_of, tmp_path):
    path = tmp_path / "данные [x] %.toml"
    path.write_bytes('\ufeff[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "画像 😀"\n'.encode())
    loaded = config.load(options_of(dataset_config=path))
    assert loaded.datasets[0].subsets[0].image_dir == "画像 😀"


def test_options_that_the_file_replaces_are_warned_of(load_config):
    loaded = load_config(HEAD, train_data_dir="x")
    assert [finding.what for finding in loaded.findings] == ["--train_data_dir is ignored"]
    assert not loaded.findings[0].error


def test_keys_without_effect_are_warned_of(load_config):
    loaded = load_config(HEAD + "keep_tokens = 1\n")
    assert "keep_tokens has no effect" in loaded.findings[0].what
    assert loaded.findings[0].where.endswith(":5")


def test_switches_on_the_command_line_that_come_later(load_config):
    with pytest.raises(UserError, match="--shuffle_caption"):
        load_config(HEAD, shuffle_caption=True)
    assert load_config(HEAD + "shuffle_caption = false\n", shuffle_caption=True).datasets


@pytest.mark.parametrize("name", ["in_json", "reg_data_dir", "dataset_class"])
def test_other_sources_come_later(options_of, name):
    with pytest.raises(UserError, match=f"not available yet.*--{name}"):
        config.load(options_of(train_data_dir="x", resolution="512", **{name: "y"}))


def test_command_line_alone(options_of, make_images, tmp_path):
    make_images(tmp_path / "10_sks girl", {"a.png": (64, 64)})
    make_images(tmp_path / "3", {"a.png": (64, 64)})
    loaded = config.load(
        options_of(train_data_dir=str(tmp_path), resolution="64,128", train_batch_size=3, flip_aug=True)
    )
    (dataset,) = loaded.datasets
    assert (dataset.resolution, dataset.batch_size) == ((64, 128), 3)
    assert [(s.num_repeats, s.class_tokens, s.flip_aug) for s in dataset.subsets] == [
        (10, "sks girl", True),
        (3, "", True),
    ]


@pytest.mark.parametrize("text", ["1,2,3", "x", "", "512.5", "0"])
def test_bad_resolution(options_of, make_images, tmp_path, text):
    make_images(tmp_path / "10_x", {"a.png": (64, 64)})
    with pytest.raises(UserError, match="resolution"):
        config.load(options_of(train_data_dir=str(tmp_path), resolution=text))
