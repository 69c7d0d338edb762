"""What is drawn for a sample: crops lie inside, faces are shown, nothing is drawn that isn't wanted."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data import buckets, views
from library.data.buckets import Assignment
from library.data.items import Item
from library.data.settings import SubsetSettings
from library.data.views import drawn, shows_face, still
from library.types import Size
from tests.library.data.making import dataset

NO_BUCKETS = {"enable_bucket": False}


def item(size=(100, 80), *, face=None, resolution=64, buckets_on=True, **values: object) -> Item:
    found = dataset(resolution, **({} if buckets_on else NO_BUCKETS))
    image = Size(*size)
    subset = SubsetSettings(image_dir="a", **values)
    return Item("a/b.png", image, "", 1, buckets.assign(image, found), 0, subset, face=face)


sides = st.integers(1, 700)
sizes = st.tuples(sides, sides)
everything = st.builds(
    item,
    sizes,
    face=st.none() | st.tuples(sides, st.integers(0, 700), st.integers(0, 900), st.integers(0, 900)),
    resolution=st.sampled_from([64, 96, 256]),
    buckets_on=st.booleans(),
    flip_aug=st.booleans(),
    random_crop=st.booleans(),
    color_aug=st.booleans(),
    face_crop_aug_range=st.none() | st.tuples(st.floats(0, 3), st.floats(0, 3)).map(lambda pair: tuple(sorted(pair))),
)


@settings(max_examples=400, deadline=None)
@given(everything, st.integers(0, 2**64))
def test_every_view_lies_inside_its_image(one, seed):
    view, bucket = drawn(one, random.Random(seed)), one.assignment.bucket
    assert 0 <= view.left <= view.resized.width - bucket.width
    assert 0 <= view.top <= view.resized.height - bucket.height
    assert view.shown_left(bucket) == (view.resized.width - bucket.width - view.left if view.mirrored else view.left)
    assert not view.mirrored or one.subset.flip_aug
    assert view.hue is None or view.gamma is None
    if not one.subset.color_aug:
        assert view.hue is view.gamma is None
    if not shows_face(one):
        assert view.resized == one.assignment.resized
        if not one.subset.random_crop:
            assert (view.left, view.top) == (one.assignment.left, one.assignment.top)
    assert drawn(one, random.Random(seed)) == view


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(0, 2**64))
def test_nothing_random_is_the_middle_and_draws_nothing(size, seed):
    generator = random.Random(seed)
    state = generator.getstate()
    assert drawn(item(size), generator) == still(item(size))
    assert generator.getstate() == state


class Scripted(random.Random):
    """Gives what it was told, and notes what it was asked for."""

    def __init__(self, *answers: float) -> None:
        super().__init__(0)
        self.answers, self.asked = list(answers), []

    def random(self) -> float:
        self.asked.append("random")
        return self.answers.pop(0)

    def randint(self, a: int, b: int) -> int:
        self.asked.append((a, b))
        found = self.answers.pop(0)
        assert a <= found <= b
        return found

    def uniform(self, a: float, b: float) -> float:
        self.asked.append((a, b))
        return self.answers.pop(0)


def test_order_of_draws():
    one = replace(
        item(flip_aug=True, random_crop=True, color_aug=True),
        assignment=Assignment(Size(64, 64), Size(80, 70), 8, 3, 0.0),
    )
    generator = Scripted(0.49, 5, 6, 0.3, 0.2, -4.0)
    view = drawn(one, generator)
    assert generator.asked == ["random", (0, 16), (0, 6), "random", "random", (-16.0, 16.0)]
    assert view == views.View(Size(80, 70), 5, 6, True, -4.0, None)
    assert view.shown_left(Size(64, 64)) == 11
    generator = Scripted(0.5, 16, 0, 0.32, 0.5, 1.01)
    assert drawn(one, generator) == views.View(Size(80, 70), 16, 0, False, None, 1.01)
    assert generator.asked[-1] == (0.95, 1.05)
    generator = Scripted(0.9, 0, 0, 0.33)
    assert drawn(one, generator) == views.View(Size(80, 70), 0, 0)
    exact = replace(one, assignment=Assignment(Size(64, 64), Size(64, 70), 0, 3, 0.0))
    generator = Scripted(0.9, 2, 0.9)
    assert drawn(exact, generator).top == 2


def test_shares_of_what_is_drawn():
    one, generator = item(flip_aug=True, color_aug=True), random.Random(4)
    seen = [drawn(one, generator) for _ in range(6000)]
    assert abs(sum(view.mirrored for view in seen) / 6000 - 0.5) < 0.03
    assert abs(sum(view.hue is not None for view in seen) / 6000 - 0.165) < 0.02
    assert abs(sum(view.gamma is not None for view in seen) / 6000 - 0.165) < 0.02
    assert all(view.hue is None or abs(view.hue) <= 16 for view in seen)
    assert all(view.gamma is None or 0.95 <= view.gamma <= 1.05 for view in seen)


def test_random_crop_reaches_every_place():
    one = replace(item(random_crop=True), assignment=Assignment(Size(8, 8), Size(10, 9), 1, 0, 0.0))
    generator = random.Random(1)
    seen = Counter((view.left, view.top) for view in (drawn(one, generator) for _ in range(900)))
    assert set(seen) == {(left, top) for left in range(3) for top in range(2)}
    assert min(seen.values()) > 100


def faced(size, face, limits=(1.0, 1.0), **values: object) -> Item:
    return item(size, face=face, buckets_on=False, face_crop_aug_range=limits, **values)


def test_face_in_the_middle():
    view = drawn(faced((400, 300), (200, 100, 50, 64)), Scripted())
    assert (view.resized, view.left, view.top) == (Size(400, 300), 200 - 32, 100 - 32)
    view = drawn(faced((400, 300), (200, 100, 128, 64)), Scripted())  # reduced, so that the face fits
    assert (view.resized, view.left, view.top) == (Size(200, 150), 100 - 32, 50 - 32)
    view = drawn(faced((400, 300), (3, 299, 128, 64)), Scripted())
    assert (view.left, view.top) == (0, 150 - 64)


def test_scale_is_drawn_between_the_limits():
    one = faced((400, 300), (200, 100, 80, 80), (1.0, 2.0))
    generator = Scripted(0.5, 4, -4)
    view = drawn(one, generator)
    assert generator.asked == [(0.4, 0.8), (-4, 4), (-4, 4)]
    assert (view.resized, view.left, view.top) == (Size(200, 150), 100 - 32 - 4, 50 - 32 + 4)
    small = faced((400, 300), (200, 100, 39, 20), (1.0, 2.0))
    generator = Scripted(0.9)
    assert drawn(small, generator).resized == Size(360, 270)
    assert len(generator.asked) == 1


def test_random_crop_around_a_face():
    one = faced((100, 80), (90, 20, 10, 10), random_crop=True)
    generator = Scripted(60, 0, 10, 80)
    view = drawn(one, generator)
    assert generator.asked == [(0, 60), (0, 60), (0, 90), (0, 90)]  # height first
    assert (view.left, view.top) == (36, 0)


@settings(max_examples=200, deadline=None)
@given(sizes, sides, sides, st.integers(1, 900), st.integers(0, 2**64))
def test_small_images_are_enlarged_around_faces_only_as_far_as_needed(size, x, y, face, seed):
    one = faced(size, (x, y, face, face), (0.5, 2.0))
    view = drawn(one, random.Random(seed))
    cover = max(64 / size[0], 64 / size[1])
    if cover > 1:
        assert view.resized == (max(int(size[0] * cover + 0.5), 64), max(int(size[1] * cover + 0.5), 64))
    else:
        assert view.resized.width <= size[0]
        assert view.resized.height <= size[1]
    assert abs(view.resized.width / size[0] - view.resized.height / size[1]) <= 1 / min(size) + 1e-9


@pytest.mark.parametrize("face", [None, (0, 5, 9, 9), (5, 5, 0, 0)])
def test_without_a_face_the_crop_is_the_usual_one(face):
    one = faced((100, 80), face)
    assert not shows_face(one)
    assert drawn(one, Scripted()) == still(one)


def test_image_of_the_wanted_size_is_left_alone():
    one = faced((64, 64), (5, 5, 9, 9), (0.5, 2.0))
    assert drawn(one, Scripted()) == still(one)
