"""Buckets: agreement with the reference for ordinary sizes, sane results for all others."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from library.data import buckets
from library.types import Size

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "buckets.json").read_text("utf-8"))


@dataclass(frozen=True)
class Settings:
    resolution: Size = field(default=Size(1024, 1024))
    enable_bucket: bool = True
    min_bucket_reso: int = 256
    max_bucket_reso: int = 2048
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False


def settings_of(case: dict) -> Settings:
    return Settings(
        resolution=Size(*case["resolution"]),
        min_bucket_reso=case["min_bucket_reso"],
        max_bucket_reso=case["max_bucket_reso"],
        bucket_reso_steps=case["bucket_reso_steps"],
        bucket_no_upscale=case["bucket_no_upscale"],
    )


@pytest.mark.parametrize("case", GOLDEN["configs"], ids=lambda case: case["name"])
def test_assignment_equals_the_reference(case):
    settings = settings_of(case)
    for row in case["images"]:
        got = buckets.assign(Size(*row["image"]), settings)
        assert list(got.bucket) == row["bucket"], row
        assert list(got.resized) == row["resized"], row
        assert [got.left, got.top] == row["center_crop_xy"], row
        assert got.ar_error == pytest.approx(row["ar_error"])


@pytest.mark.parametrize(
    "case", [case for case in GOLDEN["configs"] if "predefined_buckets" in case], ids=lambda case: case["name"]
)
def test_predefined_buckets_equal_the_reference(case):
    got = buckets.predefined(
        Size(*case["resolution"]), case["min_bucket_reso"], case["max_bucket_reso"], case["bucket_reso_steps"]
    )
    assert [list(size) for size in got] == case["predefined_buckets"]


@pytest.mark.parametrize("no_upscale", [False, True])
@pytest.mark.parametrize("step", [16, 64])
def test_every_size_gets_a_sane_bucket(no_upscale, step):
    draw = random.Random(step + no_upscale)
    settings = Settings(bucket_no_upscale=no_upscale, bucket_reso_steps=step)
    sizes = [Size(1, 1), Size(1, 50_000), Size(50_000, 1), Size(step - 1, 200), Size(200, step - 1), Size(9, 4_000_000)]
    sizes += [Size(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(15_000)]
    sizes += [Size(int(10 ** draw.uniform(0, 5)), int(10 ** draw.uniform(0, 5))) for _ in range(10_000)]
    for image in sizes:
        got = buckets.assign(image, settings)
        assert got.bucket.width > 0
        assert got.bucket.height > 0
        assert got.bucket.width % step == got.bucket.height % step == 0
        assert got.bucket.area <= 1024 * 1024
        assert got.resized.width >= got.bucket.width
        assert got.resized.height >= got.bucket.height
        assert 0 <= got.left <= got.resized.width - got.bucket.width
        assert 0 <= got.top <= got.resized.height - got.bucket.height
        if no_upscale and not got.too_small:
            assert got.resized.width <= image.width
            assert got.resized.height <= image.height
        if min(image) >= 3 * step and max(image) <= 3000:
            assert not got.too_small


def test_small_image_without_enlarging_is_reported_and_gets_the_smallest_bucket():
    got = buckets.assign(Size(63, 200), Settings(bucket_no_upscale=True))
    assert got.bucket == (64, 192)
    assert got.resized.width >= 64
    assert got.too_small
    assert not buckets.assign(Size(64, 200), Settings(bucket_no_upscale=True)).too_small


def test_without_bucketing_everything_covers_one_size():
    settings = Settings(enable_bucket=False, resolution=Size(768, 512))
    for image in (Size(100, 100), Size(2000, 500), Size(768, 512), Size(500, 2000)):
        got = buckets.assign(image, settings)
        assert got.bucket == (768, 512)
        assert got.resized.width == 768 or got.resized.height == 512


def test_mirrored_crop_is_counted_from_the_other_side():
    got = buckets.assign(Size(640, 480), Settings())
    assert got.left == 21
