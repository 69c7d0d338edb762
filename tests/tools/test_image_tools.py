"""`tools/canny.py`, `resize_images_to_resolution.py`, `detect_face_rotate.py` and `latent_upscaler.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from library import files
from library.data import edges, faces
from library.data.faces import Cut, Face
from library.models import refiner
from tests import tiny_sd
from tools import canny, detect_face_rotate, latent_upscaler, resize_images_to_resolution


def picture(path: Path, width: int, height: int, **settings: object) -> Path:
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([columns * 255 // width, rows * 255 // height, columns % 256], axis=-1).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **settings)  # type: ignore[arg-type]
    return path


def refused(main: object, *arguments: object) -> str:
    """The message of a command that fails."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])  # type: ignore[operator]
    assert exit_.value.code in (2, 3)
    return ""


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error[")]) == 1
    return lines[-1]


# edges


def test_edges_of_a_square(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[10:30, 10:30] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    canny.main(["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out" / "b.png")])
    found = np.asarray(Image.open(tmp_path / "out" / "b.png"))
    assert set(np.unique(found)) == {0, 255}
    assert not found[15:25, 15:25].any()
    rows, columns = np.nonzero(found)
    near = [min(abs(value - 10), abs(value - 29)) <= 1 for value in [*rows, *columns]]
    assert sum(near) >= len(near) / 2
    assert len(rows) > 60


def test_weaker_thresholds_find_more() -> None:
    generator = np.random.default_rng(0)
    pixels = np.repeat(generator.integers(0, 90, (32, 32, 1)), 3, axis=2).astype(np.uint8)
    counts = [int((edges.edges(pixels, low, high) > 0).sum()) for low, high in ((10, 50), (32, 224), (400, 900))]
    assert counts[0] > counts[1] > counts[2]


def test_refusals_of_canny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = picture(tmp_path / "a.png", 20, 10)
    for arguments, code in (
        ((), "E-USAGE"),
        (("--input", source, "--output", source), "E-OUTPUT-INPUT"),
        (("--input", source, "--output", tmp_path / "b.txt"), "E-OUTPUT"),
        (("--input", tmp_path / "no.png", "--output", tmp_path / "b.png"), "E-FILE-MISSING"),
    ):
        refused(canny.main, *arguments)
        assert code in last_line(capsys)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    refused(canny.main, "--input", tmp_path / "bad.png", "--output", tmp_path / "b.png")
    assert "bad.png" in last_line(capsys)
    assert not (tmp_path / "b.png").exists()
    canny.main(["--input", str(source), "--output", str(source), "--overwrite"])
    assert Image.open(source).mode == "L"


# resizing


@pytest.mark.parametrize("interpolation", ["area", "cubic", "lanczos4"])
def test_copies_by_number_of_pixels(tmp_path: Path, interpolation: str) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    picture(source / "a.PNG", 200, 100)
    picture(source / "small.webp", 31, 17)
    (source / "a.txt").write_text("a cat", encoding="utf-8")
    (source / "notes.md").write_text("x", encoding="utf-8")
    arguments = ["--max_resolution", "64x64,100x100,30x20", "--interpolation", interpolation]
    arguments += ["--divisible_by", "2", "--copy_associated_files", "--save_as_png"]
    resize_images_to_resolution.main([str(source), str(target), *arguments])
    assert {path.name: Image.open(path).size for path in target.glob("*.png")} == {
        "a+64x64.png": (90, 44),
        "a+100x100.png": (140, 70),
        "a+30x20.png": (34, 16),
        "small+64x64.png": (30, 16),
        "small+100x100.png": (30, 16),
        "small+30x20.png": (30, 16),
    }
    names = sorted(path.name for path in target.iterdir() if path.suffix != ".png")
    assert names == ["a+100x100.txt", "a+30x20.txt", "a+64x64.txt", "notes.md"]


def test_small_pictures_keep_their_pixels_and_transparency(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 4)).astype(np.uint8)
    Image.fromarray(pixels).save(source / "a.png")
    (source / "a.txt").write_text("x", encoding="utf-8")
    resize_images_to_resolution.main([str(source), str(tmp_path / "out"), "--max_resolution", "99x99", "--save_as_png"])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a+99x99.png")), pixels)
    assert (tmp_path / "out" / "a.txt").read_text(encoding="utf-8") == "x"
    resize_images_to_resolution.main([str(source), str(tmp_path / "jpg"), "--max_resolution", "99x99"])
    assert Image.open(tmp_path / "jpg" / "a+99x99.jpg").mode == "RGB"


def test_turned_pictures_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    picture(tmp_path / "in" / "a.jpg", 60, 20, exif=exif)
    resize_images_to_resolution.main([str(tmp_path / "in"), str(tmp_path / "out"), "--max_resolution", "99x99"])
    assert Image.open(tmp_path / "out" / "a+99x99.jpg").size == (20, 60)


def test_refusals_of_resizing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = picture(tmp_path / "in" / "a.png", 30, 20).parent
    (tmp_path / "empty").mkdir()
    for arguments, code in (
        ((tmp_path / "no", tmp_path / "out"), "E-DATA-FOLDER"),
        ((tmp_path / "empty", tmp_path / "out"), "E-DATA-FOLDER"),
        ((source, source), "E-OUTPUT-INPUT"),
        ((source, tmp_path / "out", "--max_resolution", "512"), "E-OPTION"),
        ((source, tmp_path / "out", "--max_resolution", "0x5"), "E-OPTION"),
        ((source, tmp_path / "out", "--divisible_by", "64"), "E-IMAGE"),
    ):
        refused(resize_images_to_resolution.main, *arguments)
        assert code in last_line(capsys)
    picture(source / "a.jpg", 30, 20)
    refused(resize_images_to_resolution.main, source, tmp_path / "out")
    assert "E-DATA-FOLDER" in last_line(capsys)
    assert not (tmp_path / "out").exists()


# faces


def face(x: float = 50, y: float = 40, size: float = 20, tilt: float = 0, score: float = 1) -> Face:
    dx, dy = 4 * np.cos(np.radians(tilt)), 4 * np.sin(np.radians(tilt))
    return Face((x, y), size, size * 0.8, score, ((x - dx, y - dy), (x + dx, y + dy)))


def test_which_faces_are_wanted() -> None:
    found = [face(size=10), face(size=30), face(size=20), face(size=40, score=0.89)]
    assert [each.size for each in faces.wanted(found, None, None)] == [30, 20, 10]
    assert [each.size for each in faces.wanted(found, 10, 30)] == [20, 10]


def test_turning_levels_the_eyes() -> None:
    pixels = np.zeros((80, 100, 3), np.uint8)
    tilted = face(tilt=30)
    for x, y in tilted.eyes:
        pixels[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2] = 255
    turned, _ = faces.cut_out(pixels, tilted, Cut(rotate=True))
    rows, columns = np.nonzero(turned[..., 0] > 100)
    assert np.ptp(rows) <= 4
    assert abs(rows.mean() - 40) < 1
    assert np.ptp(columns) >= 7


@pytest.mark.parametrize(
    ("cut", "size", "placed"),
    [
        (Cut(), (100, 80), (50, 40, 20)),
        (Cut(crop=(30, 20)), (30, 20), (15, 10, 20)),
        (Cut(crop=(2, 3), relative=True), (40, 60), (20, 30, 20)),
        (Cut(crop=(30, 20), face_size=10), (30, 20), (15, 10, 10)),
        (Cut(crop=(100, 80), face_size=10), (100, 80), (50, 40, 20)),
        (Cut(crop=(50, 50), fit=True), (50, 50), (25, 25, 12.5)),
        (Cut(face_size=40), (200, 160), (100, 80, 40)),
        (Cut(crop=(300, 20)), (100, 20), (50, 10, 20)),
    ],
)
def test_windows(cut: Cut, size: tuple[int, int], placed: tuple[float, ...]) -> None:
    part, found = faces.cut_out(np.zeros((80, 100, 3), np.uint8), face(), cut)
    assert part.shape[1::-1] == size
    assert (*found.centre, found.width) == pytest.approx(placed, abs=1)


def test_windows_stay_inside() -> None:
    part, found = faces.cut_out(np.zeros((80, 100, 3), np.uint8), face(5, 78), Cut(crop=(40, 30)))
    assert part.shape[:2] == (30, 40)
    assert found.centre == (5, 28)


class FakeDetector:
    """Two faces in every picture, as the package gives them."""

    def __call__(self, pixels: np.ndarray) -> list[dict[str, np.ndarray]]:
        assert pixels.dtype == np.uint8
        return [self.face(30, 30, 10), self.face(60, 40, 20), self.face(20, 20, 30, 0.5)]

    def face(self, x: float, y: float, size: float, score: float = 0.95) -> dict[str, np.ndarray]:
        points = np.zeros((28, 3))
        points[11:17, :2], points[17:23, :2] = (x - 3, y), (x + 3, y)
        half = size / 2
        return {"bbox": np.array([x - half, y - half, x + half, y + half, score]), "keypoints": points}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("anime_face_detector")
    module.create_detector = lambda name: FakeDetector()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "anime_face_detector", module)


@pytest.mark.usefixtures("package")
def test_faces_of_a_folder(tmp_path: Path) -> None:
    source = picture(tmp_path / "in" / "a.webp", 100, 80, lossless=True).parent
    detect_face_rotate.main(["--src_dir", str(source), "--dst_dir", str(tmp_path / "one"), "--crop_size", "32,24"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["a_0016_0012_0020_0020.png"]
    arguments = ["--multiple_faces", "--rotate", "--debug", "--crop_size", "32,24"]
    detect_face_rotate.main(["--src_dir", str(source), "--dst_dir", str(tmp_path / "all"), *arguments])
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == ["a_01_0016_0012_0020_0020.png", "a_02_0016_0012_0010_0010.png"]
    assert tuple(np.asarray(Image.open(tmp_path / "all" / names[0]))[2, 10]) == (255, 0, 0)


@pytest.mark.usefixtures("package")
def test_refusals_of_faces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = picture(tmp_path / "in" / "a.png", 30, 20).parent
    both = ("--src_dir", source, "--dst_dir", tmp_path / "out")
    for arguments, code in (
        ((), "E-USAGE"),
        ((*both, "--crop_size", "5"), "E-OPTION"),
        ((*both, "--crop_size", "0,5"), "E-OPTION"),
        ((*both, "--crop_size", "5,5", "--crop_ratio", "1,1"), "E-CHECK"),
        ((*both, "--resize_face_size", "5", "--crop_ratio", "1,1"), "E-CHECK"),
        ((*both, "--resize_face_size", "5", "--resize_fit"), "E-CHECK"),
        ((*both, "--resize_fit"), "E-CHECK"),
        ((*both, "--face_model", tmp_path / "no.onnx"), "E-FILE-MISSING"),
    ):
        refused(detect_face_rotate.main, *arguments)
        assert code in last_line(capsys)
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    refused(detect_face_rotate.main, *both, "--face_model", tmp_path / "bad.onnx")
    assert "E-MODEL-KIND" in last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_missing_package(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anime_face_detector", None)
    source = picture(tmp_path / "in" / "a.png", 30, 20).parent
    refused(detect_face_rotate.main, "--src_dir", source, "--dst_dir", tmp_path / "out")
    assert "pip install anime-face-detector" in last_line(capsys)


def test_rows_of_yunet() -> None:
    row = np.array([10, 20, 30, 40, 35, 30, 15, 32, 0, 0, 0, 0, 0, 0, 0.97], np.float32)
    found = faces._photographed(row)
    assert found.centre == (25, 40)
    assert found.eyes == ((15, 32), (35, 30))
    assert found.size == 40


# upscaling


def weights(path: Path) -> Path:
    torch.manual_seed(0)
    model = refiner.LatentRefiner()
    torch.nn.init.normal_(model.conv_final.weight, std=0.01)
    files.save_safetensors(model.state_dict(), path)
    return path


def test_refiner_starts_as_identity() -> None:
    latents = torch.randn(2, 4, 6, 5)
    assert torch.equal(refiner.LatentRefiner().eval()(latents), latents)


def test_upscales_pictures_of_different_sizes(tmp_path: Path) -> None:
    vae = tiny_sd.write_single(tmp_path / "sd.safetensors", "1")
    picture(tmp_path / "in" / "a.png", 32, 24)
    picture(tmp_path / "in" / "b.png", 43, 17)
    picture(tmp_path / "in" / "c.png", 32, 24)
    arguments = ["--vae_path", vae, "--weights", weights(tmp_path / "w.safetensors"), "--output_dir", tmp_path / "out"]
    arguments += ["--image_pattern", tmp_path / "in" / "*.png", "--debug"]
    latent_upscaler.main([str(argument) for argument in arguments])
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    wanted = {"a": (64, 48), "b": (80, 32), "c": (64, 48)}
    assert sizes == {f"{name}_{end}.png": wanted[name] for name in wanted for end in ("upscaled", "lanczos4")}


def test_as_a_module(tmp_path: Path) -> None:
    upscaler = latent_upscaler.create_upscaler(weights=str(weights(tmp_path / "w.safetensors")))
    assert not upscaler.support_latents()
    vae = tiny_sd.vae()
    images = [Image.new("RGB", (16, 16), "red")] * 3
    latents = upscaler.upscale(vae, images, None, torch.float32, 32, 32, batch_size=2, vae_batch_size=2)
    assert latents.shape[:2] == (3, 4)
    assert torch.isfinite(latents).all()


def test_refusals_of_upscaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = picture(tmp_path / "a.png", 16, 16)
    files.save_safetensors({"conv1.weight": torch.ones(2)}, tmp_path / "bad.safetensors")
    good = weights(tmp_path / "w.safetensors")
    every = ("--vae_path", tmp_path / "bad.safetensors", "--weights", good, "--image_pattern", source)
    for arguments, code in (
        ((), "E-USAGE"),
        ((*every[:4], "--image_pattern", tmp_path / "*.jpg"), "E-FILE-MISSING"),
        ((*every, "--weights", tmp_path / "bad.safetensors"), "E-MODEL-KIND"),
        ((*every, "--weights", tmp_path / "no.safetensors"), "E-FILE-MISSING"),
        (every, "E-MODEL-KIND"),
    ):
        refused(latent_upscaler.main, *arguments, "--output_dir", tmp_path / "out")
        assert code in last_line(capsys)
    assert not (tmp_path / "out").exists()
