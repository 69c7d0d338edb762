"""Every script on tiny models, as users start it: files load back, resuming is exact, processes agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.cells import CELLS, ROOT, MakeCell, assert_same, read_json


@pytest.mark.parametrize(
    ("cell", "accumulation"),
    [*((cell, 1) for cell in CELLS), ("lora with clip, t5 cached", 3), ("full, all cached", 3)],
)
def test_resuming_twice_is_the_same_as_running_straight(make_cell: MakeCell, cell: str, accumulation: int) -> None:
    common = ("--gradient_accumulation_steps", str(accumulation), "--lr_scheduler", "cosine", "--lr_warmup_steps", "3")
    straight, broken = make_cell(cell, "straight"), make_cell(cell, "broken")
    straight(*common, "--max_train_steps", "20", "--save_state_on_train_end")
    for steps in (7, 13, 20):
        stopped_at = ("--save_every_n_steps", str(steps), "--save_state")
        StopAt.step = steps
        broken(*common, "--max_train_steps", "20", *stopped_at, *(("--resume", "auto") if steps > 7 else ()))
    assert_same(straight.weights(), broken.weights())
    one, other = (cell.output / "run-state" for cell in (straight, broken))
    assert_same(load_file(one / "optimizer.safetensors"), load_file(other / "optimizer.safetensors"))
    assert read_json(one / "scheduler.json") == read_json(other / "scheduler.json")
    for steps in (7, 13, 20):
        name = "run-state" if steps == 20 else f"run-step{steps:08d}-state"
        assert read_json(broken.output / name / "train_state.json")["current_step"] == steps
    assert (
        json.loads((one / "run.json").read_text("utf-8"))["loss"]
        == json.loads((other / "run.json").read_text("utf-8"))["loss"]
    )


class StopAt:
    """Asks a run to stop after a step, as Ctrl-C does."""

    step = 0


@pytest.fixture(autouse=True)
def _stop_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from library.train.control import Control

    listen = Control.after_step

    def after_step(self: Control, state: object) -> None:
        if state.step == StopAt.step:  # type: ignore[attr-defined]
            self.ask("stop")
        listen(self, state)  # type: ignore[arg-type]

    StopAt.step = -1
    monkeypatch.setattr(Control, "after_step", after_step)


# what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_weights(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from library.objectives import Flow

    cell, loss, calls = make_cell("lora, all cached", "out"), Flow.loss, []

    def poisoned(self: Flow, *arguments: object) -> Tensor:
        calls.append(1)
        value = loss(self, *arguments)  # type: ignore[arg-type]
        return value * float("nan") if len(calls) >= 5 else value

    monkeypatch.setattr(Flow, "loss", poisoned)
    with pytest.raises(SystemExit) as ended:
        cell("--max_train_steps", "20", "--save_every_n_steps", "1")
    assert ended.value.code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 7" in message
    assert ".png" in message
    assert sorted(path.name for path in cell.output.glob("*.safetensors")) == [
        f"run-step{step:08d}.safetensors" for step in (1, 2, 3, 4)
    ]
    assert all(tensor.isfinite().all() for tensor in cell.weights("run-step00000004").values())


def test_one_bad_step_is_survived(make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.objectives import Flow

    cell, loss, calls = make_cell("lora, all cached"), Flow.loss, []

    def poisoned(self: Flow, *arguments: object) -> Tensor:
        calls.append(1)
        value = loss(self, *arguments)  # type: ignore[arg-type]
        return value * float("nan") if len(calls) == 3 else value

    monkeypatch.setattr(Flow, "loss", poisoned)
    cell("--max_train_steps", "6")
    assert all(tensor.isfinite().all() for tensor in cell.weights().values())


@pytest.mark.parametrize("broken", ["sampler", "tracker", "prompt file"])
def test_side_work_never_stops_a_run(
    make_cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    plain, disturbed = (
        make_cell("lora with clip, t5 cached", "plain"),
        make_cell("lora with clip, t5 cached", "disturbed"),
    )
    plain("--max_train_steps", "6")
    if broken == "sampler":
        import library.observing

        monkeypatch.setattr(library.observing, "generate", lambda *a, **k: 1 / 0)
    if broken == "tracker":
        from library.train.trackers import JsonLines

        monkeypatch.setattr(JsonLines, "log", lambda *a: 1 / 0)
    if broken == "prompt file":
        from library.train.control import Control

        listen = Control.after_step

        def spoil(self: Control, state: object) -> None:
            prompts.write_bytes(b"\xff\xfe\x00 broken")
            listen(self, state)  # type: ignore[arg-type]

        monkeypatch.setattr(Control, "after_step", spoil)
    logs = ("--logging_dir", str(tmp_path / "ログ журнал"))
    disturbed("--max_train_steps", "6", "--sample_prompts", str(prompts), "--sample_every_n_steps", "2", *logs)
    assert_same(plain.weights(), disturbed.weights())


def test_samples_are_the_same_twice_and_change_nothing(make_cell: MakeCell, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 2 --d 1\na thing --w 96 --h 64 --s 2 --d 2 --l 2 --n bad\n", "utf-8")
    plain = make_cell("lora with clip, t5 cached", "plain")
    plain("--max_train_steps", "4")
    pictures = []
    for folder in ("one", "two"):
        cell = make_cell("lora with clip, t5 cached", folder)
        cell(
            "--max_train_steps",
            "4",
            "--sample_prompts",
            str(prompts),
            "--sample_every_n_steps",
            "2",
            "--sample_at_first",
        )
        assert_same(plain.weights(), cell.weights())
        files = sorted((cell.output / "sample").glob("run_0*.png"))
        assert len(files) == 6
        assert (cell.output / "sample" / "run_overview.png").is_file()
        pictures.append([np.asarray(Image.open(file)) for file in files])
    assert all(np.array_equal(one, two) for one, two in zip(*pictures, strict=True))
    assert not np.array_equal(pictures[0][0], pictures[0][4])


def test_dataset_and_config_file_run_from_another_folder(
    models: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "data.toml").write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = '3_thing'\n"
        "num_repeats = 2\ncaption_extension = '.txt'\nflip_aug = true\n",
        encoding="utf-8",
    )
    lines = [f'{name} = """{models[part]}"""' for name, part in (
        ("pretrained_model_name_or_path", "flux"), ("clip_l", "clip_l"), ("t5xxl", "t5xxl"), ("ae", "ae"),
        ("tokenizer_cache_dir", "tokenizers"),
    )]  # fmt: skip
    lines += [
        'dataset_config = "data.toml"',
        'network_module = "networks.lora_flux"',
        "[training]",
        "max_train_epochs = 2",
    ]
    lines += [
        "t5xxl_max_token_length = 16",
        "network_dim = 2",
        "cache_latents = true",
        f'output_dir = """{tmp_path}"""',
    ]
    (images / "run.toml").write_text("\n".join(lines), encoding="utf-8-sig")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "library").mkdir(parents=True)
    (elsewhere / "networks").mkdir()
    monkeypatch.chdir(elsewhere)
    command = [sys.executable, str(ROOT / "flux_train_network.py"), "--config_file", str(images / "run.toml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-2000:]
    with_metadata = (tmp_path / "last.safetensors").read_bytes()
    assert b'"ss_steps":"10"' in with_metadata
    assert str(tmp_path).encode() not in with_metadata


# several processes


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(make_cell: MakeCell, images: Path) -> None:
    for name in ("i2", "i3"):
        (images / "3_thing" / f"{name}.png").unlink()
    common = ("--max_train_steps", "6", "--network_dropout", "0", "--max_grad_norm", "0.5")
    common += ("--optimizer_args", "eps=1e-4")  # else AdamW makes a step of the rounding of gradients that are nearly 0
    one, two = make_cell("lora, all cached", "one"), make_cell("lora, all cached", "two")
    (images / "3_thing").rename(images / "4_thing")
    one(*common, "--train_batch_size", "2")
    two.launch(2, *common, "--train_batch_size", "1", "--save_state")
    weights = two.weights()
    distances = {name: float((tensor - weights[name]).abs().max()) for name, tensor in one.weights().items()}
    assert max(distances.values()) < 1e-6, distances
    assert read_json(two.output / "run-state" / "train_state.json")["current_step"] == 6


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(make_cell: MakeCell) -> None:
    straight, killed = make_cell("lora, all cached", "straight"), make_cell("lora, all cached", "killed")
    options = ("--max_train_steps", "12", "--save_every_n_steps", "2", "--save_state", "--cache_latents_to_disk")
    straight(*options)
    generator = np.random.default_rng(0)
    command = [sys.executable, str(ROOT / f"{killed.script}.py"), *killed.argv, *options, "--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        try:
            process.wait(float(generator.uniform(3, 9)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for file in killed.output.glob("*.safetensors"):
            load_file(file)
    killed(*options, "--resume", "auto")
    assert_same(straight.weights(), killed.weights())
