"""With the files on the disk nothing is asked of the network, by any script."""

from __future__ import annotations

import importlib
import shutil
import socket
from pathlib import Path

import pytest

from tests.cells import MakeCell


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was tried to be reached; every try fails. The client of the hub believes that there is a network."""
    tried: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        tried.append(arguments)
        raise OSError("no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tried


def models_of(argv: list[str], *names: str) -> list[str]:
    return [word for name in names for word in argv[argv.index(f"--{name}") : argv.index(f"--{name}") + 2]]


def test_the_guard_notices(attempts: list[object]) -> None:
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("localhost", 1))
    with socket.socket() as one, pytest.raises(OSError, match="no network"):
        one.connect(("127.0.0.1", 1))
    assert len(attempts) == 2


@pytest.mark.parametrize("cell", ["lora with clip, t5 cached", "full, nothing cached"])
def test_training_asks_nobody(make_cell: MakeCell, attempts: list[object], tmp_path: Path, cell: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    made = make_cell(cell)
    extra = ("--sample_prompts", str(prompts), "--sample_at_first", "--logging_dir", str(tmp_path / "logs"))
    made("--max_train_steps", "1", "--save_state", *extra)
    assert (made.output / "run.safetensors").is_file()
    assert attempts == []


@pytest.mark.parametrize("tool", ["tools.cache_latents", "tools.cache_text_encoder_outputs"])
def test_caching_asks_nobody(make_cell: MakeCell, attempts: list[object], tool: str) -> None:
    argv = make_cell("lora, all cached").argv
    importlib.import_module(tool).main(argv[: argv.index("--output_dir")])
    assert attempts == []


def test_inference_asks_nobody(
    make_cell: MakeCell, models: dict[str, Path], attempts: list[object], tmp_path: Path
) -> None:
    files = models_of(make_cell("lora, all cached").argv, "clip_l", "t5xxl", "ae", "tokenizer_cache_dir")
    size = ("--width", "64", "--height", "64", "--steps", "1", "--output_dir", str(tmp_path))
    importlib.import_module("flux_minimal_inference").main(["--ckpt_path", str(models["flux"]), *files, *size])
    assert list(tmp_path.glob("*.png"))
    assert attempts == []


def test_tokenizers_beside_the_encoders_are_found(
    make_cell: MakeCell, models: dict[str, Path], attempts: list[object], tmp_path: Path
) -> None:
    for name in ("clip_l", "t5xxl"):
        shutil.copy(models[name], tmp_path / models[name].name)
    shutil.copytree(models["tokenizers"], tmp_path / "tokenizers")
    moved = [word for name in ("clip_l", "t5xxl") for word in (f"--{name}", str(tmp_path / models[name].name))]
    make_cell("lora, all cached")(*moved, "--tokenizer_cache_dir", "", "--max_train_steps", "1")
    assert attempts == []


@pytest.mark.parametrize("there", [(), ("vocab.json",)])
def test_missing_tokenizers_are_one_line_with_the_files(
    make_cell: MakeCell,
    attempts: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    models: dict[str, Path],
    there: tuple[str, ...],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "tokenizers" / "openai_clip-vit-large-patch14"
    folder.mkdir(parents=True)
    for name in there:
        shutil.copy(models["tokenizers"] / folder.name / name, folder / name)
    for name in ("clip_l", "t5xxl"):
        shutil.copy(models[name], tmp_path / models[name].name)
    moved = [word for name in ("clip_l", "t5xxl") for word in (f"--{name}", str(tmp_path / models[name].name))]
    with pytest.raises(SystemExit) as ended:
        make_cell("lora, all cached")(*moved, "--tokenizer_cache_dir", str(folder.parent), "--max_train_steps", "1")
    assert ended.value.code == 4
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error[E-TOKENIZER]")
    assert "tokenizer.json, or vocab.json and merges.txt, with tokenizer_config.json" in lines[-1]
    assert str(folder) in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert attempts, "the hub is the last resort"


def test_an_empty_tokenizer_is_refused(tmp_path: Path) -> None:
    """The library that reads tokenizers makes one of nothing without a word."""
    from library.families.tokenizers import CLIP_L, load_tokenizer
    from library.log import DataError

    folder = tmp_path / CLIP_L.folder
    folder.mkdir()
    (folder / "vocab.json").write_text('{"<|endoftext|>": 0, "<|startoftext|>": 1}', encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(DataError, match="tokens only"):
        load_tokenizer(CLIP_L, str(tmp_path), ())
