"""Wrong folder layouts: each message says what was found and the right path."""

from __future__ import annotations

import warnings

import pytest

from library.data import config, sources

SMALL = {"a.png": (64, 64)}


@pytest.fixture
def errors_of(options_of, traits):
    """The error findings for a --train_data_dir, and whether it can be used at all."""

    def run(path, resolution="64"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = sources.scan(
                config.load(options_of(train_data_dir=str(path), resolution=resolution)), traits, visible=False
            )
        return [finding for finding in found.findings if finding.error], found

    return run


def test_good_layout(errors_of, make_images, tmp_path):
    make_images(tmp_path / "2_cat", SMALL)
    errors, found = errors_of(tmp_path)
    assert not errors
    assert [(item.caption, item.repeats) for item in found.items] == [("cat", 2)]


def test_folder_of_pictures_instead_of_its_parent(errors_of, make_images, tmp_path):
    make_images(tmp_path / "10_cat", SMALL)
    (error,), _ = errors_of(tmp_path / "10_cat")
    assert "1 image lie directly" in error.what
    assert error.hint == f"give its parent: --train_data_dir {tmp_path}"


def test_folder_of_pictures_without_number(errors_of, make_images, tmp_path):
    make_images(tmp_path / "cats", SMALL)
    (error,), _ = errors_of(tmp_path / "cats")
    assert str(tmp_path / "cats" / "1_cats") in error.hint


def test_folders_without_number(errors_of, make_images, tmp_path):
    make_images(tmp_path / "cats", SMALL)
    (error,), _ = errors_of(tmp_path)
    assert "doesn't begin with a number" in error.what
    assert error.hint.endswith(str(tmp_path / "1_cats"))


def test_no_repeats(errors_of, make_images, tmp_path):
    make_images(tmp_path / "0_cats", SMALL)
    (error,), _ = errors_of(tmp_path)
    assert "number of repeats is 0" in error.what
    assert error.hint.endswith(str(tmp_path / "1_cats"))


def test_empty_folder(errors_of, tmp_path):
    (error,), _ = errors_of(tmp_path)
    assert "the folder is empty" in error.what
    assert str(tmp_path / "1_name") in error.hint


def test_nested_and_leftovers_of_an_archive(errors_of, make_images, tmp_path):
    make_images(tmp_path / "dataset" / "10_cat", SMALL)
    make_images(tmp_path / "__MACOSX" / "10_cat", {"._a.png": (64, 64)})
    (error,), _ = errors_of(tmp_path)
    assert "one level deeper, in dataset" in error.what
    assert "__MACOSX" not in error.what
    assert error.hint == f"give --train_data_dir {tmp_path / 'dataset'}"


def test_only_leftovers(errors_of, make_images, tmp_path):
    make_images(tmp_path / "10_cat", {"._a.png": (64, 64)})
    (tmp_path / "10_cat" / "Thumbs.db").write_bytes(b"x")
    errors, found = errors_of(tmp_path)
    assert "there are no images" in errors[0].what
    assert any("is empty" in finding.what for finding in found.findings)


def test_wrong_extension(errors_of, tmp_path):
    (tmp_path / "10_cat").mkdir()
    (tmp_path / "10_cat" / "a.heic").write_bytes(b"x")
    _, found = errors_of(tmp_path)
    (finding,) = [finding for finding in found.findings if "heic" in finding.what]
    assert "1 x .heic" in finding.what
    assert ".png" in finding.hint


def test_missing_folder(errors_of, tmp_path):
    (tmp_path / "pictures").mkdir()
    (error,), _ = errors_of(tmp_path / "picturs" / "deeper")
    assert "doesn't exist" in error.what
    assert error.hint == f"did you mean {tmp_path / 'pictures'}?"


def test_a_file(errors_of, make_images, tmp_path):
    make_images(tmp_path / "10_cat", SMALL)
    (error,), _ = errors_of(tmp_path / "10_cat" / "a.png")
    assert "is a file" in error.what
    assert error.hint.endswith(f"--train_data_dir {tmp_path}")


def test_folders_that_are_ignored_are_named(errors_of, make_images, tmp_path):
    for name in ("2_cat", "nonum", "0_skip", "x_bad"):
        make_images(tmp_path / name, SMALL)
    make_images(tmp_path, SMALL)
    errors, found = errors_of(tmp_path)
    assert not errors
    assert len(found.items) == 1
    ignored = {finding.where.rpartition("/")[2] for finding in found.findings if "folder ignored" in finding.what}
    assert ignored == {"nonum", "0_skip", "x_bad"}
    assert any("beside the folders" in finding.what for finding in found.findings)


def test_subset_folder_that_is_missing_empty_or_a_file(scan_toml, make_images, tmp_path):
    make_images(tmp_path / "good", SMALL)
    (tmp_path / "empty").mkdir()
    make_images(tmp_path / "deep" / "inner", SMALL)
    text = "[[datasets]]\nresolution = 64\n"
    for name in ("good", "godo", "empty", "deep", "good/a.png"):
        text += f"[[datasets.subsets]]\nimage_dir = '{(tmp_path / name).as_posix()}'\n"
    found = scan_toml(text)
    messages = [(finding.error, finding.what, finding.hint) for finding in found.findings]
    assert (True, f"the folder {tmp_path / 'godo'} doesn't exist", f"did you mean {tmp_path / 'good'}?") in messages
    assert (False, f"the folder {tmp_path / 'empty'} is empty", "") in messages
    assert any(hint == f"give {tmp_path / 'deep' / 'inner'}, or recursive = true" for _, _, hint in messages)
    assert any(error and "is a file" in what for error, what, _ in messages)


def test_nothing_in_any_folder_inside(scan_toml, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'a').as_posix()}'\n"
    found = scan_toml(text + "recursive = true\n")
    assert "nor in the folders inside (b)" in found.findings[0].what


def test_regularization_folders_of_another_layout(options_of, traits, make_images, tmp_path):
    make_images(tmp_path / "train" / "2_cat", SMALL)
    make_images(tmp_path / "reg", SMALL)
    given = {"train_data_dir": str(tmp_path / "train"), "reg_data_dir": str(tmp_path / "reg"), "resolution": "64"}
    found = sources.scan(config.load(options_of(**given)), traits, visible=False)
    (error,) = [finding for finding in found.findings if finding.error]
    assert error.where == f"--reg_data_dir {tmp_path / 'reg'}"
    assert error.hint == f"move them to {tmp_path / 'reg' / '1_reg'}"


def test_subsets_that_are_ignored(scan_toml, make_images, tmp_path):
    make_images(tmp_path / "a", SMALL)
    line = f"[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'a').as_posix()}'\n"
    found = scan_toml(f"[[datasets]]\nresolution = 64\n{line}{line}num_repeats = 2\n{line}num_repeats = 0\n")
    assert len(found.items) == 1
    whats = [finding.what for finding in found.findings if finding.code == "E-DATA-SUBSET"]
    assert len(whats) == 2
    assert "has it already" in whats[0]
    assert "num_repeats is 0" in whats[1]
