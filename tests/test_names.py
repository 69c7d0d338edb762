"""Names in all scripts of the world, with spaces and signs: of folders, configs, captions, prompts, outputs, logs."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.cells import ROOT, write_images

ODD = "日本語 Привет 😀 [x] 50% 'q' {b} ä"
NARROW = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252", "LC_ALL": "C", "LANG": "C", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def odd(models: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of many characters with images, models and settings whose names are odd, too."""
    folder = tmp_path / ODD
    for part in ("1" * 100, "長い" * 30, "path") if sys.platform != "win32" else ():
        folder = folder / part
    folder.mkdir(parents=True)
    write_images(folder / "絵 картины" / f"2_{ODD}", [(64, 64), (64, 64), (64, 64)])
    images = folder / "絵 картины" / f"2_{ODD}"
    (images / "i0.txt").write_bytes("\ufeffa cat, 猫, кошка, 😀".encode())
    (images / "i1.txt").write_bytes("猫が好きです、とてもかわいい".encode("cp932"))
    for index in range(3):
        (images / f"i{index}.png").rename(images / f"{ODD} {index}.png")
        (images / f"i{index}.txt").rename(images / f"{ODD} {index}.txt")
    for name in ("flux", "clip_l", "t5xxl", "ae"):
        shutil.copy(models[name], folder / f"{name} モデル.safetensors")
    shutil.copytree(models["tokenizers"], folder / "トークン")
    lines = [
        *(f"{option} = '''{name} モデル.safetensors'''" for option, name in (
            ("pretrained_model_name_or_path", "flux"), ("clip_l", "clip_l"), ("t5xxl", "t5xxl"), ("ae", "ae"),
        )),
        "tokenizer_cache_dir = 'トークン'",
        "train_data_dir = '絵 картины'",
        "caption_extension = '.txt'",
        "resolution = '64'",
        "sample_prompts = 'подсказки.txt'",
        "metadata_author = '作者 Ж 😀'",
        f"output_name = '''{ODD.replace('{b} ', '')}'''",
        "max_train_steps = 2",
        "t5xxl_max_token_length = 16",
        "max_data_loader_n_workers = 0",
        "sample_at_first = true",
        "save_state = true",
        "cache_latents_to_disk = true",
        "cache_text_encoder_outputs_to_disk = true",
        "network_train_unet_only = true",
    ]  # fmt: skip
    (folder / "設定.toml").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    (folder / "подсказки.txt").write_bytes("\ufeffa 猫 😀 --w 64 --h 64 --s 1 --d 1 --n кошка\r\n".encode())
    return folder


def arguments(folder: Path) -> list[str]:
    output = ("--output_dir", str(folder / "出力 вывод"), "--logging_dir", str(folder / "журнал 50%"))
    return ["--config_file", str(folder / "設定.toml"), "--network_module", "networks.lora_flux", *output]


def check(folder: Path) -> None:
    name = ODD.replace("{b} ", "")
    output = folder / "出力 вывод"
    assert load_file(output / f"{name}.safetensors")
    assert (output / f"{name}-state" / "run.json").is_file()
    assert list((output / "sample").glob("*.png"))
    assert list((folder / "журнал 50%").glob("*/log.jsonl"))
    caches = sorted(path.name for path in (folder / "絵 картины" / f"2_{ODD}").glob("*.npz"))
    assert len(caches) == 6
    assert f"{ODD} 0_flux_te.npz" in caches


@pytest.mark.slow
def test_training_on_a_narrow_system(odd: Path) -> None:
    command = [sys.executable, str(ROOT / "flux_train_network.py"), *arguments(odd)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **NARROW}, timeout=120, check=False)
    error = done.stderr.decode("utf-8")
    assert done.returncode == 0, error[-3000:]
    assert "猫" in error
    assert "1.txt" in error
    assert "cp932" in error
    check(odd)


def test_training_from_within_the_folder(
    odd: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(odd)
    importlib.import_module("flux_train_network").main(
        [
            *("--config_file", "設定", "--network_module", "networks.lora_flux", "--output_dir", "出力 вывод"),
            *("--logging_dir", "журнал 50%"),
        ]
    )
    check(odd)
    [warning] = [message for message in caplog.messages if "cp932" in message]
    assert f"{ODD} 1.txt" in warning


def test_a_mark_at_the_begin_of_a_caption_changes_nothing(odd: Path) -> None:
    images = odd / "絵 картины" / f"2_{ODD}"
    tool = importlib.import_module("tools.cache_text_encoder_outputs")
    with_mark = ["--config_file", str(odd / "設定.toml")]
    tool.main(with_mark)
    before = dict(np.load(images / f"{ODD} 0_flux_te.npz"))
    caption = images / f"{ODD} 0.txt"
    assert caption.read_bytes().startswith(b"\xef\xbb\xbf")
    caption.write_bytes(caption.read_bytes()[3:])
    (images / f"{ODD} 0_flux_te.npz").unlink()
    tool.main(with_mark)
    after = dict(np.load(images / f"{ODD} 0_flux_te.npz"))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_inference_and_metadata(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("flux_train_network").main([*arguments(odd), "--no_sample_at_first"])
    lora = odd / "出力 вывод" / f"{ODD.replace('{b} ', '')}.safetensors"
    models = [
        word for name in ("clip_l", "t5xxl", "ae") for word in (f"--{name}", str(odd / f"{name} モデル.safetensors"))
    ]
    importlib.import_module("flux_minimal_inference").main(
        [
            *(
                *models,
                "--ckpt_path",
                str(odd / "flux モデル.safetensors"),
                "--tokenizer_cache_dir",
                str(odd / "トークン"),
            ),
            *("--lora_weights", f"{lora};0.5", "--prompt", "猫 кошка 😀", "--output_dir", str(odd / "絵")),
            *("--steps", "1", "--width", "64", "--height", "64"),
        ]
    )
    assert list((odd / "絵").glob("*.png"))
    capsys.readouterr()
    importlib.import_module("tools.show_metadata").main(["--model", str(lora)])
    assert "modelspec.author" in capsys.readouterr().out
