"""Dataset configuration: what is accepted, what each value resolves to, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.data import config
from library.data.settings import NO_RESOLUTION, DatasetSettings, SubsetSettings
from library.log import UserError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "dataset_config.json").read_text("utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
KINDS = {"dreambooth": "folders", "finetuning": "metadata", "controlnet": "pairs"}
REJECTED_HERE = {
    "general only": "there are no datasets",
    "empty file": "there are no datasets",
    "empty subsets list": "no subsets",
    "no subsets key": "no subsets",
    "batch_size bool": "not true",
}
"""What the reference accepts although nothing, or nothing good, can come of it."""
ACCEPTED_HERE = {
    "network_multiplier int": "a whole number where any number is wanted",
    "face_crop_aug_range ints": "whole numbers where any numbers are wanted",
    "dreambooth subset in train_db.py with masked loss": "its transparency may be the mask",
}
"""What the reference rejects without need."""


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


@pytest.fixture
def load_case(tmp_path, options_of):
    """Loads the configuration of a case; its resolution is 512 where it gives none."""

    def load(case):
        flags = GOLDEN["scripts"][case["script"]]
        accepts = config.Accepts(flags["dreambooth"], flags["finetuning"], flags["controlnet"], flags["dropout"])
        given = command_line(list(case["cli"]))
        given.setdefault("resolution", "512")
        given["masked_loss"] = case["script"].endswith("masked_loss")
        path = tmp_path / "dataset.json"
        path.write_text(json.dumps(case["config"], indent=1), "utf-8")
        return config.load(options_of(dataset_config=path, **given), accepts)

    return load


def same(got: object, wanted: object) -> bool:
    if isinstance(wanted, list):
        return list(got) == wanted
    return got == wanted or (not got and wanted is None)


GOOD = [case for case in GOLDEN["cases"] if "datasets" in case["result"] and case["name"] not in REJECTED_HERE]


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case["name"])
def test_values_are_those_of_the_reference(case, load_case):
    loaded = load_case(case)
    assert len(loaded.datasets) == len(case["result"]["datasets"])
    for settings, wanted in zip(loaded.datasets, case["result"]["datasets"], strict=True):
        defaults = GOLDEN["defaults"][wanted["kind"]]
        for name, value in {**defaults["dataset"], "resolution": [512, 512], **wanted["dataset"]}.items():
            assert name == "prior_loss_weight" or same(getattr(settings, name), value), name
        assert len(settings.subsets) == len(wanted["subsets"])
        for subset, values in zip(settings.subsets, wanted["subsets"], strict=True):
            for name, value in {**defaults["subset"], **values}.items():
                assert same(getattr(subset, name), value), name


@pytest.mark.parametrize(
    "case",
    [case for case in GOLDEN["cases"] if "error" in case["result"] and case["name"] not in ACCEPTED_HERE],
    ids=lambda case: case["name"],
)
def test_what_the_reference_rejects_is_rejected(case, load_case):
    with pytest.raises(UserError) as caught:
        load_case(case)
    for wrong in case["result"].get("paths", ()):
        assert wrong.rpartition(".")[2].strip("0123456789") in str(caught.value)


@pytest.mark.parametrize("name", REJECTED_HERE)
def test_rejected_although_the_reference_takes_it(name, load_case):
    with pytest.raises(UserError, match=REJECTED_HERE[name]):
        load_case(CASES[name])


@pytest.mark.parametrize("name", ACCEPTED_HERE)
def test_accepted_although_the_reference_rejects_it(name, load_case):
    assert load_case(CASES[name]).datasets


def test_every_case_is_dealt_with():
    assert len(CASES) == len(GOLDEN["cases"]) > 50
    assert {*REJECTED_HERE, *ACCEPTED_HERE} <= set(CASES)


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
    (HEAD + 'conditioning_data_dir = "c"', 5, "conditioning_data_dir", "--masked_loss"),
    (HEAD + "validation_split = 0.1", 5, "validation_split", "belongs into [general] or [[datasets]]"),
    ("[general]\nvalidation_split = 1.5\n" + HEAD, 2, "validation_split", "at most 1"),
    (HEAD + "caption_dropout_rate = 1.5", 5, "caption_dropout_rate", "at most 1"),
    (HEAD + "caption_tag_dropout_rate = -0.5", 5, "caption_tag_dropout_rate", "at least 0"),
    (HEAD + "face_crop_aug_range = [4.0, 2.0]", 5, "face_crop_aug_range", "[2.0, 4.0]"),
    (HEAD + "face_crop_aug_range = [1.0]", 5, "face_crop_aug_range", "two numbers"),
    (HEAD + "token_warmup_step = nan", 5, "token_warmup_step", "a number, not nan"),
    (HEAD + 'shuffle_caption = true\ncaption_separator = ""', 6, "caption_separator", '","'),
    (HEAD + 'metadata_file = "m.json"\nclass_tokens = "x"', 6, "class_tokens", "datasets of folders"),
    (HEAD + 'metadata_file = "m.json"\nrecursive = true', 6, "recursive", "datasets of folders"),
    (HEAD + '[[datasets.subsets]]\nmetadata_file = "m.json"', 1, "datasets[0]", "a [[datasets]] of its own"),
    (HEAD.replace('"a"', '""'), 4, "image_dir", ""),
    (HEAD + "is_reg = true", 1, "regularization images only", "add a subset"),
    (HEAD + "masked_loss = true", 5, "masked_loss", "on the command line"),
    ('[[datasets]]\nsubset = []\nresolution = 512', 2, "subset", "did you mean `subsets`?"),
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
    (HEAD + BUCKETS.format(2048), 7, "2048", "max_bucket_reso"),
    (HEAD + BUCKETS.format(128), 7, "128", "min_bucket_reso"),
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


def test_switches_in_the_file_beat_those_on_the_command_line(load_config):
    for given, wanted in (("", True), ("shuffle_caption = false\n", False)):
        loaded = load_config(HEAD + given, shuffle_caption=True)
        assert loaded.datasets[0].subsets[0].shuffle_caption is wanted


def test_a_class_of_ones_own_comes_later(options_of):
    with pytest.raises(UserError, match=r"not available yet.*--dataset_class"):
        config.load(options_of(train_data_dir="x", resolution="512", dataset_class="a.B"))


def test_metadata_file_on_the_command_line(options_of):
    loaded = config.load(options_of(in_json="m.json", train_data_dir="d", dataset_repeats=3))
    (subset,) = loaded.datasets[0].subsets
    assert (subset.metadata_file, subset.image_dir, subset.num_repeats) == ("m.json", "d", 3)
    assert loaded.datasets[0].resolution == NO_RESOLUTION
    assert config.load(options_of(in_json="m.json")).datasets[0].subsets[0].image_dir == ""


def test_pairs_on_the_command_line(options_of):
    given = {"train_data_dir": "d", "conditioning_data_dir": "c", "resolution": "64", "caption_extension": "txt"}
    loaded = config.load(options_of(masked_loss=True, **given))
    (subset,) = loaded.datasets[0].subsets
    assert (subset.image_dir, subset.conditioning_data_dir, subset.mask) == ("d", "c", "conditioning")
    assert subset.caption_extension == ".txt"
    with pytest.raises(UserError, match="--conditioning_data_dir - give --masked_loss"):
        config.load(options_of(**given))
    loaded = config.load(options_of(**given), config.Accepts(dreambooth=False, metadata=False, pairs=True))
    assert loaded.datasets[0].subsets[0].mask == ""


def test_regularization_folders_on_the_command_line(options_of, make_images, tmp_path):
    make_images(tmp_path / "train" / "10_sks cat", {"a.png": (64, 64)})
    make_images(tmp_path / "reg" / "2_cat", {"a.png": (64, 64)})
    given = {"train_data_dir": str(tmp_path / "train"), "reg_data_dir": str(tmp_path / "reg"), "resolution": "64"}
    subsets = config.load(options_of(**given)).datasets[0].subsets
    assert [(s.num_repeats, s.class_tokens, s.is_reg) for s in subsets] == [(10, "sks cat", False), (2, "cat", True)]


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
