"""What leaves the machine or is shared tells nothing about its owner, and what comes from others can't run code."""

from __future__ import annotations

import json
import random
import re
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from library import metadata
from library.metadata import DatasetFacts, SubsetFacts, TrainingFacts
from tests.cells import Cell, MakeCell, write_images

SECRETS = ("hf_dummyTokenOfNobody", "0123456789wandbdummykey")
KEYS = ("--huggingface_token", SECRETS[0], "--wandb_api_key", SECRETS[1])
USER = "jane.doe-4711"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a telling name."""
    folder = tmp_path / "home" / USER
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.setenv("USER", USER)
    assert Path.home() == folder
    return folder


def leaks(folder: Path, *words: str) -> Iterator[str]:
    """Files below a folder that hold one of the words, in any usual encoding."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            for word in words:
                if any(word.encode(encoding) in content for encoding in ("utf-8", "utf-16-le")):
                    yield f"{path.relative_to(folder)}: {word}"


def test_keys_are_used_and_then_forgotten(
    make_cell: MakeCell, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = make_cell("lora, all cached")
    logs = ("--logging_dir", str(tmp_path / "logs"), "--log_config", "--log_with", "tensorboard")
    more = ("--max_train_steps", "2", "--save_state", "--cache_latents_to_disk", "--training_comment", "ours")
    monkeypatch.setattr(sys, "argv", ["flux_train_network.py", *cell.argv, *KEYS, *logs, *more])
    import flux_train_network

    flux_train_network.main()
    assert not set(SECRETS) & set(sys.argv)
    assert sys.argv.count("***") == 2
    captured = capsys.readouterr()
    assert "training finished" in captured.err
    assert not any(secret in captured.out + captured.err for secret in SECRETS)
    assert list((tmp_path / "logs").rglob("log.jsonl"))
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
    assert list(leaks(tmp_path, *SECRETS)) == []


def test_keys_of_a_config_file_and_of_the_environment_are_not_told(
    make_cell: MakeCell, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = make_cell("full, all cached")
    (tmp_path / "keys.toml").write_text(f"wandb_api_key = '{SECRETS[1]}'\n", encoding="utf-8")
    monkeypatch.setenv("HF_TOKEN", SECRETS[0])
    logs = ("--logging_dir", str(tmp_path / "logs"), "--log_config", "--console_log_level", "DEBUG")
    cell("--config_file", str(tmp_path / "keys.toml"), "--max_train_steps", "1", "--save_state", *logs)
    captured = capsys.readouterr()
    assert not any(secret in captured.out + captured.err for secret in SECRETS)
    (tmp_path / "keys.toml").unlink()
    assert list(leaks(tmp_path, *SECRETS)) == []


def test_an_upload_that_fails_does_not_tell_the_token(
    make_cell: MakeCell, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def __getattr__(self, name: str) -> object:
            raise OSError(f"403 for token {SECRETS[0]}")

    monkeypatch.setattr("library.hub.connect", lambda token: Refusing())
    make_cell("lora, all cached")("--max_train_steps", "1", "--huggingface_repo_id", "me/lora", *KEYS[:2])
    err = capsys.readouterr().err
    assert "403 for token ***" in err
    assert SECRETS[0] not in err


def test_the_home_folder_is_in_no_file_and_no_line(
    models: dict[str, Path], home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started in a folder of the user's, with relative paths."""
    work = home / "work"
    write_images(work / "data" / "1_cat")
    monkeypatch.chdir(work)
    cell = Cell("flux_train_network", models, Path("data"), Path("out"), ("--network_module", "networks.lora_flux"))
    logs = ("--logging_dir", "logs", "--log_config", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    cell("--max_train_steps", "1", "--network_train_unet_only", "--save_state", *logs)
    captured = capsys.readouterr()
    assert USER not in captured.out + captured.err
    assert list(leaks(work, USER, str(home))) == []


def test_paths_given_in_full_are_in_no_file_that_is_shared(models: dict[str, Path], home: Path) -> None:
    write_images(home / "data" / "1_cat")
    (home / "settings.toml").write_text("training_comment = 'no paths'\n", encoding="utf-8")
    cell = Cell("flux_train_network", models, home / "data", home / "out", ("--network_module", "networks.lora_flux"))
    logs = ("--logging_dir", str(home / "logs"), "--log_config", "--config_file", str(home / "settings.toml"))
    cell("--max_train_steps", "1", *logs, "--network_train_unet_only", "--cache_latents_to_disk")
    assert (home / "out" / "run.safetensors").is_file()
    assert list(leaks(home, USER, str(home))) == []
    with safe_open(cell.output / "run.safetensors", framework="pt") as file:
        assert file.metadata()["ss_training_comment"] == "no paths"


# metadata, whatever is trained

PIECES = ("Pictures", "my data", "ユーザー", "Данные", "a[b]", "50%", "x,y", 'quo"te', "set's", "train.v2", "~old")


def odd_folder(draw: random.Random) -> str:
    """An absolute path of some system in which the user's name stands."""
    parts = [draw.choice(PIECES) for _ in range(draw.randint(1, 3))]
    name = "10_" + "".join(draw.choices(string.ascii_lowercase, k=5))
    start, separator = draw.choice(
        [
            (f"/home/{USER}", "/"),
            (f"/Users/{USER}", "/"),
            (f"C:\\Users\\{USER}", "\\"),
            (f"D:/Users/{USER}", "/"),
            (f"\\\\server\\share\\{USER}", "\\"),
            (f"/mnt/c/Users/{USER}", "/"),
            (f"~/{USER}", "/"),
        ]
    )
    return separator.join([start, *parts, name])


@pytest.mark.parametrize("seed", range(60))
def test_no_metadata_tell_of_folders_and_users(seed: int) -> None:
    draw = random.Random(seed)
    folders = [odd_folder(draw) for _ in range(3)]
    file = odd_folder(draw)
    subsets = [
        SubsetFacts(
            img_count=2,
            num_repeats=1,
            image_dir=folders[0],
            class_tokens=folders[0].replace("\\", "/").split("/")[-1],
            tags=metadata.count_tags(["a cat, and/or a dog"]),
        ),
        SubsetFacts(img_count=2, num_repeats=1, image_dir=folders[1], metadata_file=f"{file}/meta.json"),
    ]
    dataset = DatasetFacts(
        is_dreambooth=bool(seed % 2),
        batch_size=1,
        num_train_images=4,
        num_reg_images=0,
        resolution=(64, 64),
        enable_bucket=True,
        subsets=subsets,
    )
    facts = TrainingFacts(
        session_id=1,
        training_started_at=0.0,
        training_finished_at=1.0,
        steps=1,
        epoch=1,
        base_model_version="flux1",
        num_train_images=4,
        num_reg_images=0,
        num_batches_per_epoch=4,
        num_epochs=1,
        seed=1,
        optimizer=f"torch.optim.AdamW(state={file})",
        text_encoder_lr=None,
        training_comment=f"from {folders[2]}",
        output_name=draw.choice(["run", file]),
    )
    make = metadata.config_metadata([dataset]) if seed % 3 else metadata.single_metadata(dataset, 1, 1)
    found = metadata.training_metadata(
        facts,
        network_args={"weights": file, "rank_dropout": "0.1"},
        dataset=make,
        models=metadata.base_model(f"{folders[2]}/flux.safetensors"),
        family={"vae": file},
    )
    for name, value in found.items():
        assert USER not in value, (name, value)
        for text in texts(value):
            # what stays may be a name, a text with a slash in it, or a class; no path that begins somewhere
            assert not re.search(r"(?<![\w.:/\\])(?:[A-Za-z]:)?[\\/][^\\/\s]+[\\/]", text), (name, value)


def texts(value: str) -> Iterator[str]:
    """The texts in a value, which may be JSON."""
    try:
        content = json.loads(value)
    except ValueError:
        yield value
        return
    stack = [content]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, str):
            yield item


# code of other people

MODULE = "from pathlib import Path\nPath(__file__).with_name('marker').touch()\n"
NAMES = {
    "network_module": "stranger_net",
    "optimizer_type": "stranger_net.Adam",
    "lr_scheduler_type": "stranger_net.Schedule",
}


@pytest.mark.parametrize("option", NAMES)
def test_a_config_file_cannot_run_code(
    make_cell: MakeCell,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
) -> None:
    code = MODULE + "import torch\nAdam = torch.optim.AdamW\nSchedule = torch.optim.lr_scheduler.ConstantLR\n"
    (tmp_path / "stranger_net.py").write_text(code + "from networks.lora_flux import *\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger_net", raising=False)
    config, marker = tmp_path / "preset.toml", tmp_path / "marker"
    config.write_text(f"\n{option} = '{NAMES[option]}'\n", encoding="utf-8")
    cell = make_cell("lora, all cached")
    if option == "network_module":
        at = cell.argv.index("--network_module")
        del cell.argv[at : at + 2]
    with pytest.raises(SystemExit) as ended:
        cell("--config_file", str(config), "--max_train_steps", "1")
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error[E-CUSTOM]")
    assert f"{config}:2" in line
    assert "--allow_custom_modules" in line
    assert not marker.exists()
    assert "stranger_net" not in sys.modules

    cell(f"--{option}", NAMES[option], "--max_train_steps", "1")
    assert marker.exists()
    assert (cell.output / "run.safetensors").is_file()


def test_the_user_may_trust_a_config_file(make_cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trusted_net.py").write_text(MODULE + "from torch.optim import AdamW\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.toml").write_text("optimizer_type = 'trusted_net.AdamW'\n", encoding="utf-8")
    cell = make_cell("lora, all cached")
    cell("--config_file", str(tmp_path / "mine.toml"), "--allow_custom_modules", "--max_train_steps", "1")
    assert (tmp_path / "marker").exists()
