"""What users must be able to rely on, tried with the scripts on tiny models; names begin with those of the needs."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library import caching, files, hub
from library.data.headers import EXIF_ORIENTATION, TURNS
from library.families.flux import Flux, FluxFiles
from library.train import control, loop, room
from library.train.conditions import decode_latents, encode_images
from library.train.resume import Parts, save_state
from library.train.state import LossWindow, RunState
from library.train.steppers import Stepper
from library.types import Finding
from tests import tiny
from tests.cells import ROOT, Cell, MakeCell, assert_same, read_json

End = Callable[..., tuple[int, str]]


@pytest.fixture
def end_of(capsys: pytest.CaptureFixture[str]) -> End:
    """Runs a script that may end early; gives the exit code and the last line on stderr."""

    def run(cell: Cell, *more: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            cell(*more)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        else:
            code = 0
        return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return run


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


# needs A1: resuming


@pytest.mark.parametrize(("cell", "limit"), [("lora with clip, t5 cached", "steps"), ("full, all cached", "epochs")])
def test_a1_a_longer_limit_goes_on_exactly(make_cell: MakeCell, end_of: End, cell: str, limit: str) -> None:
    straight, parts = make_cell(cell, "straight"), make_cell(cell, "parts")
    option, stops = (f"--max_train_{limit}", (7, 13, 20) if limit == "steps" else (1, 2, 3))
    for each in (straight, parts):
        each.argv += ["--gradient_accumulation_steps", "1" if limit == "steps" else "4"]
    straight(option, str(stops[-1]), "--save_state")
    state: tuple[str, ...] = ()
    for stop in stops:
        parts(option, str(stop), "--save_state_on_train_end", *state)
        state = ("--resume", str(parts.output / "run-state"))
    assert_same(straight.weights(), parts.weights())
    for name in ("optimizer.safetensors", "model.safetensors"):
        assert_same(load_file(straight.output / "run-state" / name), load_file(parts.output / "run-state" / name))
    done = read_json(parts.output / "run-state" / "train_state.json")["current_step"]
    assert done == (20 if limit == "steps" else 3 * 4)
    assert end_of(parts, option, str(stops[-1]), *state)[0] == 0
    assert_same(straight.weights(), parts.weights())


def test_a1_a_state_of_pickles_is_refused(make_cell: MakeCell, end_of: End, tmp_path: Path) -> None:
    state = tmp_path / "at-step00000009-state"
    state.mkdir()
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (state / name).write_bytes(b"\x80\x04N.")
    (state / "model.safetensors").write_bytes(b"")
    (state / "train_state.json").write_text('{"current_epoch": 2, "current_step": 9}', encoding="utf-8")
    code, line = end_of(make_cell("lora, all cached"), "--resume", str(state))
    assert code
    assert "pickles" in line
    assert "--network_weights" in line
    assert "--initial_step 9" in line


# needs A2: caches


def written_by(cell: Cell) -> set[str]:
    """Names of the models and states in the output folder."""
    return {path.name for path in cell.output.iterdir()} - {"sample"}


class Fed:
    """Notes what goes into the model: latents and text outputs by name of the image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {}
        prepare = loop.task_of

        def noting(run: Any, batch: Any) -> loop.Task:
            inputs = {"latents": run.latents(batch), **run.cond(batch)}
            for row, name in enumerate(batch.names):
                self.tensors[Path(name).name] = {key: tensor[row].clone() for key, tensor in inputs.items()}
            return prepare(run, batch)

        monkeypatch.setattr(loop, "task_of", noting)

    def take(self) -> dict[str, dict[str, Tensor]]:
        """What was noted since the last time."""
        found, self.tensors = self.tensors, {}
        return found


@pytest.fixture
def single(images: Path) -> Path:
    """The folder of images with one repeat, one of them in a format whose size in bytes depends on that in pixels."""
    folder = images / "1_thing"
    (images / "3_thing").rename(folder)
    Image.open(folder / "i1.png").save(folder / "i1.bmp")
    (folder / "i1.png").unlink()
    return folder


def change_the_autoencoder(folder: Path, ae: Path) -> tuple[str, ...]:
    tiny.write_autoencoder(ae, seed=9)
    return ()


def replace_pixels(folder: Path, ae: Path) -> tuple[str, ...]:
    with Image.open(folder / "i1.bmp") as picture:
        upside_down = picture.rotate(180)
    size = (folder / "i1.bmp").stat().st_size
    upside_down.save(folder / "i1.bmp")
    assert (folder / "i1.bmp").stat().st_size == size
    return ()


def edit_a_caption(folder: Path, ae: Path) -> tuple[str, ...]:
    (folder / "i2.txt").write_text("thing, another", encoding="utf-8")
    return ()


def change_the_resolution(folder: Path, ae: Path) -> tuple[str, ...]:
    return ("--resolution", "96,96")


def add_a_twin(folder: Path, ae: Path) -> tuple[str, ...]:
    with Image.open(folder / "i0.png") as picture:
        picture.rotate(90).save(folder / "i0.jpg")
    return ()


def touch(folder: Path, ae: Path) -> tuple[str, ...]:
    for file in folder.iterdir():
        file.touch()
    return ()


def damage(folder: Path, ae: Path) -> tuple[str, ...]:
    caches = sorted(folder.glob("*_flux.npz"))
    content = bytearray(caches[0].read_bytes())
    caches[0].write_bytes(content[: len(content) // 2])
    content = bytearray(caches[1].read_bytes())
    content[len(content) // 2] ^= 1
    caches[1].write_bytes(content)
    texts = sorted(folder.glob("*_flux_te.npz"))
    texts[0].write_bytes(bytes(texts[0].stat().st_size))
    return ()


Change = Callable[[Path, Path], tuple[str, ...]]


@pytest.mark.parametrize(
    ("changes", "latents", "text"),
    [
        ([change_the_autoencoder], 5, 0),
        ([change_the_resolution], 5, 0),
        ([replace_pixels, edit_a_caption, add_a_twin], 2, 1),
        ([touch, damage], 2, 1),
    ],
    ids=["autoencoder", "resolution", "content", "damage"],
)
def test_a2_b7_what_changed_is_encoded_anew_and_nothing_else(
    make_cell: MakeCell,
    models: dict[str, Path],
    single: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: list[Change],
    latents: int,
    text: int,
) -> None:
    ae = Path(shutil.copy(models["ae"], tmp_path / "ae.safetensors"))
    common = ("--max_train_epochs", "1", "--ae", str(ae), "--network_train_unet_only")
    cached, plain = make_cell("lora, all cached"), make_cell("lora, nothing cached")
    to_disk = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    cached(*common, *to_disk)
    for change in changes:
        common += change(single, ae)
    fed = Fed(monkeypatch)
    caplog.clear()
    cached(*common, *to_disk)
    from_cache = fed.take()
    encoded = [
        int(n) for n in re.findall(r"(?:text outputs|latents): \d+ in all, \d+ reused, (\d+) encoded", caplog.text)
    ]
    assert encoded == [text, latents]
    plain(*common)
    straight = fed.take()
    assert from_cache.keys() == straight.keys()
    for name, tensors in straight.items():
        assert tensors.keys() == from_cache[name].keys()
        for key, tensor in tensors.items():
            assert from_cache[name][key].to(tensor.dtype).equal(tensor), (name, key)


TO_DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--max_train_steps", "1")


def test_a2_merged_weights_are_part_of_what_the_text_cache_depends_on(
    make_cell: MakeCell, caplog: pytest.LogCaptureFixture
) -> None:
    cell = make_cell("lora with clip, t5 cached")
    cell(*TO_DISK)
    merged = shutil.copy(cell.output / "run.safetensors", cell.output.parent / "merged.safetensors")
    for options, reason in (((), ""), (("--base_weights", str(merged)), "5 other encoder")):
        caplog.clear()
        cell(*TO_DISK, *options)
        summary = next(line for line in caplog.messages if line.startswith("text outputs:"))
        assert reason in summary
        assert ("0 encoded" in summary) == (not reason)


@pytest.mark.parametrize("storage", [(), ("--fp8_base",)])
def test_a2_the_cache_tool_and_the_training_agree_how_encoders_are_stored(
    make_cell: MakeCell, caplog: pytest.LogCaptureFixture, storage: tuple[str, ...]
) -> None:
    cell = make_cell("lora, all cached")
    tool = importlib.import_module("tools.cache_text_encoder_outputs")
    storage = ("--mixed_precision", "bf16", *storage)
    shared = [*cell.argv[: cell.argv.index("--output_dir")], *storage]
    tool.main(shared)
    cell(*TO_DISK, *storage)
    summaries = [line for line in caplog.messages if line.startswith("text outputs:")]
    assert "0 reused" in summaries[0]
    assert "0 encoded" in summaries[1]
    other = shared[:-1] if shared[-1] == "--fp8_base" else [*shared, "--fp8_base"]
    tool.main(other)
    assert "5 other encoder" in [line for line in caplog.messages if line.startswith("text outputs:")][2]


def test_a2_full_caches_need_no_encoders_and_no_autoencoder(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, asked = make_cell("lora with clip, t5 cached"), []
    cell(*TO_DISK)
    load = Flux.load_encoders
    monkeypatch.setattr(Flux, "load_vae", None)
    monkeypatch.setattr(
        Flux, "load_encoders", lambda family, names, *more: asked.extend(names) or load(family, names, *more)
    )
    cell(*TO_DISK)
    assert asked == ["clip_l"]  # it is trained


def test_b7_a_dataset_folder_that_cannot_be_written_is_said_before_anything_is_loaded(
    make_cell: MakeCell, end_of: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path, option: str) -> list[Finding]:
        return [Finding(error=True, what=f"can't write to {folder}", where=option, code="E-DISK-WRITE")]

    monkeypatch.setattr(caching, "check_writable", refused)
    monkeypatch.setattr(Flux, "load_encoders", None)
    code, line = end_of(make_cell("lora, all cached"), *TO_DISK)
    assert code
    assert "3_thing" in line
    assert "_to_disk" in line


# needs A5: what is trained

RATES = {"given": ("1e-3",), "zero": ("0",), "absent": ()}


@pytest.mark.parametrize(("unet", "text"), itertools.product(RATES, RATES))
@pytest.mark.parametrize(
    "only", ["", *(pytest.param(only, marks=pytest.mark.slow) for only in ("unet", "text_encoder"))]
)
def test_a5_exactly_what_the_table_calls_trained_is_trained(
    make_cell: MakeCell, end_of: End, caplog: pytest.LogCaptureFixture, unet: str, text: str, only: str
) -> None:
    cell = make_cell("lora with clip, t5 cached")
    options = [f"--unet_lr={value}" for value in RATES[unet]] + [f"--text_encoder_lr={v}" for v in RATES[text]]
    options += [f"--network_train_{only}_only"] if only else []
    trains = {
        "unet": unet != "zero" and only != "text_encoder",
        "clip_l": text != "zero" and only != "unet",
    }
    code, line = end_of(cell, "--max_train_steps", "2", *options)
    if not any(trains.values()):
        assert code
        assert "nothing would be trained" in line
        assert not (cell.output / "run.safetensors").exists()
        return
    assert code == 0
    table = next(record.message for record in caplog.records if record.message.startswith("trained\n"))
    rows = {row.split()[0]: row for row in table.splitlines()[2:]}
    assert {name for name, row in rows.items() if "frozen" not in row} == {name for name in trains if trains[name]}
    weights = cell.weights()
    for name, prefix in (("unet", "lora_unet_"), ("clip_l", "lora_te1_")):
        ups = [tensor for key, tensor in weights.items() if key.startswith(prefix) and "lora_up" in key]
        assert bool(ups) == trains[name]
        assert all(bool(up.any()) for up in ups)
    assert not any(key.startswith("lora_te3") for key in weights)


# needs A6: the plan


@pytest.mark.parametrize(
    ("limits", "batch", "accumulation", "steps"),
    [
        (("--max_train_steps", "5"), 1, 1, 5),
        (("--max_train_steps", "5"), 2, 3, 5),
        (("--max_train_epochs", "2"), 1, 1, 30),
        (("--max_train_epochs", "2"), 2, 3, 6),
        (("--max_train_epochs", "40", "--max_train_steps", "7"), 1, 1, 7),
        (("--max_train_epochs", "1", "--max_train_steps", "50"), 2, 1, 8),
    ],
)
def test_a6_the_plan_is_what_happens(
    make_cell: MakeCell,
    caplog: pytest.LogCaptureFixture,
    limits: tuple[str, ...],
    batch: int,
    accumulation: int,
    steps: int,
) -> None:
    cell = make_cell("lora, all cached")
    cell(*limits, "--train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation), "--save_state")
    plan = next(record.message for record in caplog.records if record.message.startswith("plan\n"))
    assert re.search(rf"length +{steps} steps", plan)
    assert "15 samples per epoch" in plan
    assert ("smaller one counts" in plan) == (len(limits) == 4)
    assert read_json(cell.output / "run-state" / "train_state.json")["current_step"] == steps
    found = metadata_of(cell.output / "run.safetensors")
    assert found["ss_steps"] == found["ss_max_train_steps"] == str(steps)
    assert found["ss_gradient_accumulation_steps"] == str(accumulation)


@pytest.mark.parametrize("limit", ["--max_train_steps", "--max_train_epochs"])
def test_a6_no_steps_is_an_error(make_cell: MakeCell, end_of: End, limit: str) -> None:
    cell = make_cell("lora, all cached")
    code, line = end_of(cell, limit, "0")
    assert code
    assert "0" in line
    assert not (cell.output / "run.safetensors").exists()


# numbers that aren't (A4)


def test_a4_an_autoencoder_that_overflows_goes_on_in_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(tiny.write_autoencoder(tmp_path / "ae.safetensors"))
    weights["encoder.conv_in.weight"] *= 1e5
    weights["decoder.conv_in.weight"] *= 3e4
    path = tiny.save(weights, tmp_path / "hot.safetensors", torch.float16)
    family, pixels = Flux(FluxFiles(None, None, None, str(path))), torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    vae = family.load_vae(torch.device("cpu"), torch.float16)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        first, second = (encode_images(family, vae, pixels).mean for _ in range(2))
        straight = family.load_vae(torch.device("cpu"), torch.float16)
        pictures = [decode_latents(family, straight, 1e3 * first) for _ in range(2)]
    assert first.isfinite().all()
    assert first.equal(second)
    assert all(picture.isfinite().all() for picture in pictures)
    assert len([record for record in caplog.records if "overflows in float16" in record.message]) == 2


def test_a4_weights_that_are_not_finite_are_not_saved(
    make_cell: MakeCell, end_of: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, after_step = make_cell("full, all cached"), Stepper.step

    def spoil(stepper: Stepper, number: int) -> object:
        values = after_step(stepper, number)
        if number == 4:
            stepper.params[5].data.view(-1)[0] = float("nan")
        return values

    monkeypatch.setattr(Stepper, "step", spoil)
    code, line = end_of(cell, "--max_train_steps", "4", "--save_every_n_steps", "1", "--save_state")
    assert code
    assert "not finite" in line
    assert "step00000003" in line
    assert written_by(cell) == {f"run-step{step:08d}{end}" for step in (1, 2, 3) for end in (".safetensors", "-state")}
    assert all(tensor.isfinite().all() for tensor in cell.weights("run-step00000003").values())


# needs A16: EXIF


def test_a16_all_orientations_of_a_picture_are_one_picture(
    make_cell: MakeCell, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = images / "3_thing"
    with Image.open(folder / "i2.png") as picture:
        upright = picture.copy()
    shutil.rmtree(folder)
    (images / "1_thing").mkdir()
    undone = dict(TURNS)
    undone[6], undone[8] = undone[8], undone[6]
    for number in range(1, 9):
        turned = upright.transpose(undone[number]) if number in undone else upright
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = number
        turned.save(images / "1_thing" / f"{number}.png", exif=exif)
    seen: dict[str, Tensor] = {}
    prepare = loop.task_of

    def noting(run: Any, batch: Any) -> loop.Task:
        seen[Path(batch.names[0]).name] = batch.pixels[0]
        return prepare(run, batch)

    monkeypatch.setattr(loop, "task_of", noting)
    make_cell("lora, nothing cached")("--max_train_epochs", "1", "--allow_missing_captions")
    assert len(seen) == 8
    assert all(pixels.equal(seen["1.png"]) for pixels in seen.values())


# needs A21: long captions


def test_a21_captions_that_are_cut_are_counted_and_named(
    make_cell: MakeCell, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, words in ((1, 30), (3, 90)):
        (images / "3_thing" / f"i{number}.txt").write_text("cat " * words + "tail", encoding="utf-8")
    make_cell("lora, all cached")("--max_train_steps", "1")
    found = {line.split(":")[0]: line for line in caplog.messages if "tokens and are cut" in line}
    assert "2 of 5 captions are longer than 16 tokens" in found["t5xxl"]
    assert "1 of 5 captions are longer than 77 tokens" in found["clip_l"]
    assert all(name in found["t5xxl"] for name in ("i1.png", "i3.png", "tail"))
    assert "i1.png" not in found["clip_l"]


# needs B2: the disk


def test_b2_a_disk_that_is_too_small_is_said_before_anything_is_loaded(
    make_cell: MakeCell, end_of: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing must be loaded")

    for name in ("load_encoders", "load_vae", "load_denoiser"):
        monkeypatch.setattr(Flux, name, refuse)
    cell = make_cell("lora, all cached")
    for free, words in ((50_000, "one model takes"), (160_000, "the caches take")):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        code, line = end_of(
            cell, "--max_train_steps", "2", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"
        )
        assert code
        assert words in line
        assert "free" in line


def test_b2_estimates_are_near_the_truth(make_cell: MakeCell, caplog: pytest.LogCaptureFixture) -> None:
    for name, options in (
        ("full, all cached", ("--save_precision", "bf16")),
        ("lora with clip, t5 cached", ("--network_dim", "16")),
    ):
        cell = make_cell(name, name[:4])
        caplog.clear()
        cell("--max_train_steps", "1", "--save_state_on_train_end", *options)
        line = next(line for line in "\n".join(caplog.messages).splitlines() if line.strip().startswith("disk"))
        found = re.findall(r"(?:models|states) ([\d.]+) (kB|MB)", line)
        models, states = (float(number) * {"kB": 1e3, "MB": 1e6}[unit] for number, unit in found)
        assert models == pytest.approx((cell.output / "run.safetensors").stat().st_size, rel=0.35)
        state = sum(file.stat().st_size for file in (cell.output / "run-state").iterdir())
        assert states == pytest.approx(state, rel=0.35)


FULL_DISK = """
import resource, sys
from library.train.checkpoints import Checkpoints

announce = Checkpoints._announce

def limited(checkpoints, path, **rest):
    announce(checkpoints, path, **rest)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

def saved(checkpoints, state, stem, **rest):
    if sys.argv[1] == "mended" and state.step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Checkpoints._announce = announce
    return save(checkpoints, state, stem, **rest)

save, Checkpoints._save, Checkpoints._announce = Checkpoints._save, saved, limited
from flux_train_network import main
main(sys.argv[2:])
"""
"""Lets no file grow above 60 kB once the first one has been saved; `mended`: until step 3."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
@pytest.mark.parametrize("disk", ["full", "mended"])
def test_b2_a_disk_that_fills_up_costs_no_training(make_cell: MakeCell, disk: str) -> None:
    straight, full = make_cell("lora, all cached", "straight"), make_cell("lora, all cached", "full")
    options = ("--max_train_steps", "4", "--save_every_n_steps", "1")
    straight(*options)
    command = [sys.executable, "-c", FULL_DISK, disk, *full.argv, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert "training finished" not in done.stderr if disk == "full" else done.returncode == 0
    good = (1,) if disk == "full" else (1, 3, 4)
    names = {f"run-step{step:08d}.safetensors" for step in good} | ({"run.safetensors"} if disk == "mended" else set())
    assert written_by(full) == names
    assert_same(straight.weights("run-step00000001"), full.weights("run-step00000001"))
    if disk == "full":
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 4
        assert last.startswith("error[E-SAVE]: the last save failed")
        assert "run-step00000001.safetensors" in last
    else:
        assert_same(straight.weights(), full.weights())


# needs B4: side work


def test_b4_uploads_that_fail_change_nothing(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, sending = make_cell("lora, all cached", "plain"), make_cell("lora, all cached", "sending")
    monkeypatch.setattr(hub, "connect", lambda token: SimpleNamespace())
    plain("--max_train_steps", "4")
    sending("--max_train_steps", "4", "--save_every_n_steps", "2", "--huggingface_repo_id", "some/where")
    assert_same(plain.weights(), sending.weights())
    assert "uploads that failed" in caplog.text


@pytest.mark.parametrize("optimizer", ["AdamWScheduleFree", pytest.param("RAdamScheduleFree", marks=pytest.mark.slow)])
def test_b4_saves_and_samples_do_not_change_a_schedule_free_run(
    make_cell: MakeCell, tmp_path: Path, optimizer: str
) -> None:
    pytest.importorskip("schedulefree")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    plain, busy = make_cell("lora, all cached", "plain"), make_cell("lora, all cached", "busy")
    for cell in (plain, busy):
        cell.argv += ["--optimizer_type", optimizer, "--max_train_steps", "6"]
    plain()
    busy(
        *("--save_every_n_steps", "1", "--save_state"),
        *("--sample_prompts", str(prompts), "--sample_every_n_steps", "2"),
    )
    assert_same(plain.weights(), busy.weights())


# needs B5: bad images


def spoil_images(folder: Path) -> list[str]:
    """Seven sorts of damage; gives the names of the files, without those that nobody would take for an image."""
    good = (folder / "i0.png").read_bytes()
    with Image.open(folder / "i0.png") as picture:
        picture.save(folder / "whole.jpg")
    jpeg = (folder / "whole.jpg").read_bytes()
    contents = {
        "cut.png": good[: len(good) // 2],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "empty.webp": b"",
        "page.jpg": b"<html>not found</html>",
        "zeros.png": bytes(5000),
        "sum.png": good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :],
        "archive.jpeg": b"PK\x03\x04" + bytes(100),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "really_a_jpeg.png").write_bytes(jpeg)
    (folder / "._i0.png").write_bytes(b"\x00\x05\x16\x07")
    (folder / "__MACOSX").mkdir()
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    return list(contents)


def test_b5_damaged_images_are_all_named_or_skipped(
    make_cell: MakeCell, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, cell = spoil_images(images / "3_thing"), make_cell("lora, all cached")
    with monkeypatch.context() as patch:
        patch.setattr(Flux, "load_vae", None)
        patch.setattr(Flux, "load_encoders", None)
        with pytest.raises(SystemExit):
            cell("--max_train_steps", "1", "--allow_missing_captions")
    lines = capsys.readouterr().err.splitlines()
    found_by_header = [name for name in damaged if name != "sum.png"]
    assert all(any(name in line and line.startswith("error[") for line in lines) for name in found_by_header)
    cell("--max_train_epochs", "1", "--allow_missing_captions", "--skip_bad_images")
    error = capsys.readouterr().err
    assert "7 damaged images are skipped" in error
    assert metadata_of(cell.output / "run.safetensors")["ss_num_train_images"] == str(3 * (5 + 2))


def test_b5_what_was_encoded_before_a_bad_image_stays(make_cell: MakeCell, images: Path, end_of: End) -> None:
    folder = images / "3_thing"
    good = (folder / "i4.png").read_bytes()
    (folder / "i4.png").write_bytes(good[:500] + bytes([good[500] ^ 1]) + good[501:])
    code, line = end_of(make_cell("lora, all cached"), "--max_train_steps", "1", "--cache_latents_to_disk")
    assert code
    assert "i4.png" in line
    assert len(list(folder.glob("*_flux.npz"))) == 4


# needs B6: stopping


@pytest.mark.parametrize(
    ("cell", "stops"),
    [
        ("full, all cached", {5: "SIGTERM"}),
        ("lora with clip, t5 cached", {4: "SIGINT", 7: "stop file"}),
    ],
)
def test_b6_a_run_that_was_stopped_goes_on_to_the_same_end(
    make_cell: MakeCell, end_of: End, monkeypatch: pytest.MonkeyPatch, cell: str, stops: dict[int, str]
) -> None:
    straight, stopped = make_cell(cell, "straight"), make_cell(cell, "stopped")
    straight("--max_train_steps", "9")
    monkeypatch.setattr(control, "POLL_SECONDS", 0.0)
    step = Stepper.step

    def disturbed(stepper: Stepper, number: int) -> object:
        how = stops.get(number)
        if how == "stop file":
            (stopped.output / "run.control").write_text("stop\n", encoding="utf-8")
        elif how:
            signal.raise_signal(getattr(signal, how))
        return step(stepper, number)

    monkeypatch.setattr(Stepper, "step", disturbed)
    names: set[str] = set()
    for number in stops:
        assert end_of(stopped, "--max_train_steps", "9", "--resume", "auto")[0] == 0
        names |= {f"run-step{number:08d}.safetensors", f"run-step{number:08d}-state"}
        assert written_by(stopped) == names
    assert end_of(stopped, "--max_train_steps", "9", "--resume", "auto")[0] == 0
    assert_same(straight.weights(), stopped.weights())


@pytest.mark.slow
def test_b6_two_processes_stop_and_go_on_together(make_cell: MakeCell, tmp_path: Path) -> None:
    straight, stopped = make_cell("lora, all cached", "straight"), make_cell("lora, all cached", "stopped")
    options = ("--max_train_steps", "120", "--network_dropout", "0")
    straight.launch(2, *options)
    process = stopped.start(2, *options, "--logging_dir", str(tmp_path / "logs"))
    log = None
    while log is None or log.read_text(encoding="utf-8").count("\n") < 20:
        assert process.poll() is None
        time.sleep(0.05)
        log = next((tmp_path / "logs").rglob("log.jsonl"), None)
    (stopped.output / "run.control").write_text("stop", encoding="utf-8")
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert not (stopped.output / "run.safetensors").exists()
    stopped.launch(2, *options, "--resume", "auto")
    assert_same(straight.weights(), stopped.weights())


# needs C4: memory


def test_c4_a_state_is_written_without_a_second_copy_of_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(40)).sum().backward()
    optimizer.step()
    live = {tensor.data_ptr() for tensor in (*layer.parameters(), *optimizer.state[layer.weight].values())}
    written: set[int] = set()
    write = files.save_safetensors

    def noting(tensors: dict[str, Tensor], *more: object) -> None:
        written.update(tensor.data_ptr() for tensor in tensors.values())
        write(tensors, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "save_safetensors", noting)
    state = RunState(seed=1, total_steps=1, batches_per_epoch=1, loss=LossWindow(1))
    save_state(tmp_path / "s-state", Parts(
        state=state, model=layer.state_dict, load_model=layer.load_state_dict, optimizers=[optimizer]
    ))  # fmt: skip
    assert live <= written


# needs A8: several processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        ("--lr_scheduler", "cosine", "--lr_warmup_steps", "3"),
        ("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "0.5"),
        ("--lr_scheduler_type", "torch.optim.lr_scheduler.StepLR", "--lr_scheduler_args", "step_size=3"),
    ],
)
def test_a8_rates_do_not_depend_on_the_number_of_processes(
    make_cell: MakeCell, tmp_path: Path, schedule: tuple[str, ...]
) -> None:
    one, two = make_cell("lora, all cached", "one"), make_cell("lora, all cached", "two")
    options = ("--max_train_steps", "10", *schedule)
    one(*options, "--logging_dir", str(tmp_path / "1"))
    two.launch(2, *options, "--logging_dir", str(tmp_path / "2"))
    rates = []
    for folder in ("1", "2"):
        log = next((tmp_path / folder).rglob("log.jsonl"))
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        rates.append([line["lr/unet"] for line in lines if "lr/unet" in line])
    assert len(rates[0]) == 10
    assert rates[0] == rates[1]
    assert metadata_of(two.output / "run.safetensors")["ss_steps"] == "10"


# needs D15: paths


@pytest.mark.parametrize("script", ["lora, all cached", "full, all cached"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--output_dir", "a file/below"),
        ("--logging_dir", "a file/below"),
        ("--output_name", ""),
        ("--output_name", "a/b"),
        ("--console_log_file", "a file/below/log.txt"),
        ("--pretrained_model_name_or_path", "nowhere.safetensors"),
        ("--ae", "nowhere.safetensors"),
        ("--t5xxl", "a file"),
        ("--train_data_dir", "nowhere"),
        ("--sample_prompts", "nowhere.txt"),
        ("--resume", "nowhere"),
    ],
)
def test_d15_a_bad_path_is_refused_at_once_by_its_option(
    make_cell: MakeCell,
    end_of: End,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    option: str,
    value: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("text", encoding="utf-8")
    begin = time.process_time()
    code, line = end_of(make_cell(script), option, value)
    assert code
    assert option in line
    assert time.process_time() - begin < 3


def test_d15_the_rest_of_a_path_with_spaces_is_recognised(make_cell: MakeCell, end_of: End) -> None:
    code, line = end_of(make_cell("lora, all cached"), "--network_weights", "my", "training/6/model/last.safetensors")
    assert code
    assert "quot" in line
