"""Regularization images: how often each is used."""

from __future__ import annotations

import pytest

from library.data.regularization import balanced

SIZE = (64, 64)


@pytest.mark.parametrize(
    ("repeats", "samples", "wanted"),
    [
        ([1, 1, 1], 43, [15, 14, 14]),
        ([2, 1], 9, [5, 4]),
        ([5, 1], 7, [6, 1]),
        ([5, 5, 5], 7, [3, 2, 2]),
        ([1, 9, 9], 7, [1, 3, 3]),
        ([1, 1], 2, [1, 1]),
        ([1, 1, 1], 2, None),
    ],
)
def test_balance(repeats, samples, wanted):
    assert balanced(repeats, samples) == wanted


@pytest.fixture
def scan_both(scan_toml, make_images, tmp_path):
    def run(training: int, regularization: int, repeats: int = 1):
        train = make_images(tmp_path / "train", {f"{number}.png": SIZE for number in range(training)})
        reg = make_images(tmp_path / "reg", {f"{number}.png": SIZE for number in range(regularization)})
        text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{train.as_posix()}'\n"
        text += f"num_repeats = {repeats}\n"
        return scan_toml(text + f"[[datasets.subsets]]\nimage_dir = '{reg.as_posix()}'\nis_reg = true\n")

    return run


def test_few_images_are_repeated(scan_both):
    found = scan_both(4, 3, repeats=2)
    assert [item.repeats for item in found.items if item.subset.is_reg] == [3, 3, 2]
    assert not found.reg_slots


def test_many_images_take_turns(scan_both):
    found = scan_both(3, 10, repeats=2)
    assert [item.repeats for item in found.items if item.subset.is_reg] == [1] * 10
    assert found.reg_slots == {0: 6}


def test_nothing_to_balance_against(scan_both):
    found = scan_both(0, 3)
    assert any("no training images" in finding.what for finding in found.findings if finding.error)
