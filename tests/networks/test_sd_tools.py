"""Sums of checkpoints, conversion between files and folders, statistics and interrogation of networks."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library import files
from library.models.checkpoints_sd import find_checkpoint, stated_prediction
from library.models.loading_sd import load_encoders, load_unet, load_vae
from networks import lora
from tests import tiny, tiny_sd
from tests.networks import tiny_unets

ROLES = {"1": "sd", "2": "sd", "xl": "sdxl"}


def run(script: str, *argv: object) -> int:
    """The exit code of a script."""
    try:
        importlib.import_module(script).main([str(word) for word in argv])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the mistake."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


@pytest.fixture(scope="session")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("single")
    made = {version: tiny_sd.write_single(folder / f"{version}.safetensors", version) for version in ROLES}
    return made | {"other": tiny_sd.write_single(folder / "other.safetensors", "1", seed=50)}


# sums of checkpoints

MERGE = "tools.merge_models"


def test_sums_of_checkpoints(singles: Mapping[str, Path], tmp_path: Path) -> None:
    paths = (singles["1"], singles["other"])
    result = tmp_path / "sum"
    assert run(MERGE, "--models", *paths, "--ratios", "0.7", "0.3", "--output", result) == 0
    one, two, found = (load_file(path) for path in (*paths, tmp_path / "sum.safetensors"))
    assert found.keys() == one.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, 0.7 * one[key] + 0.3 * two[key])
    values = files.header(tmp_path / "sum.safetensors").metadata
    assert values["modelspec.merged_from"] == "1, other"
    assert values["modelspec.architecture"] == "stable-diffusion-v1"
    assert run(MERGE, "--models", *paths, "--output", result, "--saving_precision", "bf16", "--unet_only") == 0
    found = load_file(tmp_path / "sum.safetensors")
    for key, tensor in found.items():
        mixed = key.startswith("model.diffusion_model.")
        expected = 0.5 * one[key] + 0.5 * two[key] if mixed else one[key]
        assert torch.equal(tensor, expected.to(torch.bfloat16))


def test_old_names_missing_tensors_and_whole_numbers(
    singles: Mapping[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The text encoder of early files, a tensor that only one model has, and one that can't be averaged."""
    one, two = load_file(singles["1"]), load_file(singles["other"])
    ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    del two["model.diffusion_model.out.2.bias"]
    two = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in two.items()}
    save_file(one | ids, tmp_path / "a.safetensors")
    save_file(two | {"model_ema.decay": torch.ones(())}, tmp_path / "b.safetensors")
    words = ("--models", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert run(MERGE, *words, "--output", tmp_path / "c.safetensors", "--show_skipped") == 0
    found = load_file(tmp_path / "c.safetensors")
    assert found.keys() == (one | ids).keys()
    key = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    torch.testing.assert_close(found[key], (one[key] + two[key.replace("text_model.", "")]) / 2)
    assert torch.equal(found["model.diffusion_model.out.2.bias"], one["model.diffusion_model.out.2.bias"])
    assert found[next(iter(ids))].dtype == torch.int64
    text = caplog.text
    assert "1 tensors are skipped" in text
    assert "model_ema.decay" in text
    assert "2 tensors are missing" in text


@pytest.fixture(scope="session")
def faulty(singles: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, some of which can't be used."""
    folder = tmp_path_factory.mktemp("faulty")
    for name, path in singles.items():
        shutil.copy(path, folder / f"{name}.safetensors")
    tensors = load_file(singles["1"])
    key = "model.diffusion_model.out.2.weight"
    save_file(tensors | {key: torch.full_like(tensors[key], float("nan"))}, folder / "nan.safetensors")
    save_file(tensors | {key: torch.full_like(tensors[key], 1e20)}, folder / "huge.safetensors")
    save_file({k: t for k, t in tensors.items() if "first_stage" not in k}, folder / "no_vae.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 2)}, folder / "lora.safetensors")
    save_file({"x": torch.ones(1)}, folder / "x.safetensors")
    (folder / "cut.safetensors").write_bytes(singles["1"].read_bytes()[:-1])
    (folder / "stuff").mkdir()
    (folder / "stuff" / "diary.txt").write_text("mine", encoding="utf-8")
    return folder


CONVERT = "tools.convert_diffusers20_original_sd"


@pytest.mark.parametrize(
    ("script", "words", "code"),
    [
        (MERGE, "--output out.safetensors", "E-USAGE"),
        (MERGE, "--models 1.safetensors other.safetensors", "E-OUTPUT"),
        (MERGE, "--models 1.safetensors other.safetensors --output 1.safetensors", "E-OUTPUT-INPUT"),
        (MERGE, "--models 1.safetensors other.safetensors --output out.ckpt", "E-OUTPUT"),
        (MERGE, "--models 1.safetensors other.safetensors --ratios 1 --output out", "E-USAGE"),
        (MERGE, "--models 1.safetensors 1.safetensors --output out", "E-MERGE-NOTHING"),
        (MERGE, "--models 1.safetensors other.safetensors --ratios 1 0 --output out", "E-MERGE-NOTHING"),
        (MERGE, "--models 1.safetensors xl.safetensors --output out", "E-MERGE-MISFIT"),
        (MERGE, "--models 1.safetensors x.safetensors --output out", "E-MERGE-MISFIT"),
        (MERGE, "--models 1.safetensors nan.safetensors --output out", "E-TENSOR-FINITE"),
        (MERGE, "--models 1.safetensors huge.safetensors --saving_precision fp16 --output out", "E-TENSOR-FINITE"),
        (MERGE, "--models 1.safetensors lora.safetensors --output out", "E-MODEL-KIND"),
        (MERGE, "--models 1.safetensors cut.safetensors --output out", "E-FILE-TRUNCATED"),
        (MERGE, "--models 1.safetensors none.safetensors --output out", "E-FILE-MISSING"),
        (MERGE, "--models 1.safetensors stuff --output out", "E-FILE-KIND"),
        (MERGE, "--models x.safetensors x.safetensors --unet_only --output out", "E-MODEL-PART"),
        (CONVERT, "1.safetensors", "E-OPTION"),
        (CONVERT, "none.safetensors out", "E-FILE-MISSING"),
        (CONVERT, "1.safetensors other.safetensors", "E-OUTPUT-INPUT"),
        (CONVERT, "1.safetensors stuff", "E-OUTPUT"),
        (CONVERT, "1.safetensors stuff --overwrite", "E-OUTPUT"),
        (CONVERT, "1.safetensors .", "E-OUTPUT-INPUT"),
        (CONVERT, "1.safetensors out --v2", "E-MODEL-KIND"),
        (CONVERT, "1.safetensors out --v1 --v2", "E-USAGE"),
        (CONVERT, "1.safetensors out --fp16 --bf16", "E-USAGE"),
        (CONVERT, "1.safetensors out --variant fp16", "E-FILE-KIND"),
        (CONVERT, "1.safetensors out --reference_model nowhere", "E-FILE-MISSING"),
        (CONVERT, "1.safetensors out.safetensors --metadata {1", "E-USAGE"),
        (CONVERT, "1.safetensors out.safetensors --metadata __import__('os')", "E-USAGE"),
        (CONVERT, "nan.safetensors out", "E-TENSOR-FINITE"),
        (CONVERT, "huge.safetensors out.ckpt --fp16", "E-TENSOR-FINITE"),
        (CONVERT, "no_vae.safetensors out.safetensors", "E-MODEL-PART"),
        (CONVERT, "lora.safetensors out.safetensors", "E-MODEL-KIND"),
        (CONVERT, "cut.safetensors out.safetensors", "E-FILE-TRUNCATED"),
    ],
)
def test_mistakes_cost_a_line_and_no_file(
    faulty: Path,
    script: str,
    words: str,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(faulty)
    before = {path: path.stat().st_mtime_ns for path in faulty.rglob("*")}
    assert run(script, *words.split()) in (2, 3)
    assert f"error[{code}]" in error_of(capsys)
    assert {path: path.stat().st_mtime_ns for path in faulty.rglob("*")} == before


# conversion


def models_of(path: Path, version: str) -> dict[str, Tensor]:
    """All tensors of the models, as they are loaded."""
    role = ROLES[version]
    parts = {"unet": load_unet(path, role=role), "vae": load_vae(path, role=role), **load_encoders(path, role=role)}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor.float(), other[key].float()) for key, tensor in one.items())


@pytest.mark.parametrize("version", ROLES)
def test_there_and_back(singles: Mapping[str, Path], tmp_path: Path, version: str) -> None:
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert run(CONVERT, singles[version], folder) == 0
    expected = models_of(singles[version], version)
    same(models_of(folder, version), expected)
    assert run(CONVERT, folder, back, "--metadata", "{'modelspec.title': 'Mine', 'n': 3}") == 0
    same(models_of(back, version), expected)
    one, other = load_file(singles[version]), load_file(back)
    left = {key for key in one if key not in other}
    assert left <= {"cond_stage_model.model.attn_mask", "conditioner.embedders.1.model.logit_scale"}
    if version != "2":
        assert all(torch.equal(tensor, one[key]) for key, tensor in other.items())
    values = files.header(back).metadata
    assert values["modelspec.title"] == "Mine"
    assert values["n"] == "3"
    architectures = {"1": "v1", "2": "v2-512", "xl": "xl-v1-base"}
    assert values["modelspec.architecture"] == f"stable-diffusion-{architectures[version]}"


def test_types_and_pickled_files(singles: Mapping[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "x.ckpt"
    assert run(CONVERT, singles["1"], target, "--fp16", "--epoch", "3", "--global_step", "40") == 0
    found = find_checkpoint(target, "sd")
    assert {"epoch": "3", "global_step": "40"}.items() <= found.header.metadata.items()
    assert {info.dtype for info in found.header.tensors.values()} == {"F16"}
    assert run(CONVERT, target, tmp_path / "y.safetensors", "--save_precision_as", "float") == 0
    header = files.header(tmp_path / "y.safetensors")
    assert {info.dtype for info in header.tensors.values()} == {"F32"}
    assert "epoch" not in header.metadata
    assert run(CONVERT, singles["1"], target) == 2
    assert run(CONVERT, singles["1"], target, "--overwrite") == 0
    assert {info.dtype for info in find_checkpoint(target, "sd").header.tensors.values()} == {"F32"}


def test_variants_and_reference_folders(tmp_path: Path) -> None:
    source = tiny_sd.write_folder(tmp_path / "source", "1", prediction="v_prediction")
    for name in ("unet", "vae", "text_encoder"):
        [path] = (source / name).glob("*.safetensors")
        tensors = {key: 2 * tensor for key, tensor in load_file(path).items()}
        save_file(tensors, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    plain, doubled = tmp_path / "plain.safetensors", tmp_path / "doubled.safetensors"
    assert run(CONVERT, source, plain) == 0
    assert run(CONVERT, source, doubled, "--variant", "fp16") == 0
    assert files.header(plain).metadata["modelspec.prediction_type"] == "v"
    one, two = load_file(plain), load_file(doubled)
    assert all(torch.equal(2 * tensor, two[key]) for key, tensor in one.items())
    bare = tmp_path / "bare.safetensors"
    save_file(one, bare)
    folder = tmp_path / "folder"
    assert run(CONVERT, bare, folder, "--reference_model", source) == 0
    assert (folder / "tokenizer" / "vocab.json").is_file()
    assert stated_prediction(find_checkpoint(folder, "sd")).kind == "v"
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    assert settings["_class_name"] == "DDIMScheduler"
    assert run(CONVERT, bare, folder) == 2
    assert run(CONVERT, bare, folder, "--overwrite") == 0
    assert stated_prediction(find_checkpoint(folder, "sd")).kind == "epsilon"


# statistics, interrogation


@pytest.fixture
def trained(singles: Mapping[str, Path], tmp_path: Path) -> Path:
    """A LoRA for SD 1.x."""
    unet, texts = load_unet(singles["1"], role="sd"), list(load_encoders(singles["1"], role="sd").values())
    torch.manual_seed(0)
    network = tiny_unets.fill(lora.create_network(1.0, 4, 2.0, None, texts, unet), std=0.1)
    network.apply_to(texts, unet)
    network.save_weights(tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_statistics(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(trained)
    for more, shown in ((), {key for key in tensors if "lora_" in key.split(".")[1]}), (("-s",), set(tensors)):
        assert run("networks.check_lora_weights", trained, *more) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        assert {line.partition(",")[0] for line in lines} == shown
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    mean, least = tensors[key].abs().mean(), tensors[key].abs().min()
    [line] = [line for line in lines if line.startswith(f"{key},")]
    assert [float(word) for word in line.rsplit(",", 2)[1:]] == pytest.approx([float(mean), float(least)], rel=1e-4)
    save_file(tensors | {key: torch.full_like(tensors[key], float("inf"))}, trained)
    assert run("networks.check_lora_weights", trained) == 3
    assert key in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("none.safetensors", "E-NETWORK-FILE"),
        ("1.safetensors", "E-NETWORK-FILE"),
        ("cut.safetensors", "E-FILE-TRUNCATED"),
    ],
)
def test_statistics_of_other_files(
    faulty: Path, words: str, code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(faulty)
    assert run("networks.check_lora_weights", words) == 3
    assert f"error[{code}]" in error_of(capsys)


def test_tokens_that_a_network_changes(
    singles: Mapping[str, Path], trained: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--sd_model", singles["1"], "--tokenizer_cache_dir", models["tokenizers"])
    assert run("networks.lora_interrogator", *words, "--model", trained, "--top", "7") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    changes = [float(line.rpartition(" ")[2]) for line in lines]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] > 0
    assert run("networks.lora_interrogator", *words, "--model", trained, "--clip_skip", "1", "--batch_size", "5") == 0
    assert len(capsys.readouterr().out.splitlines()) == min(100, len(tiny.clip_vocabulary()) - 2)
    only = trained.with_name("unet.safetensors")
    save_file({key: tensor for key, tensor in load_file(trained).items() if "lora_unet" in key}, only)
    for arguments, code in (
        ((*words, "--model", only), "E-NETWORK-FILE"),
        ((*words, "--model", trained, "--v2"), "E-MODEL-KIND"),
        ((*words, "--model", trained, "--clip_skip", "9"), "E-MODEL-PART"),
        (words, "E-USAGE"),
        ((*words[2:], "--sd_model", singles["xl"], "--model", trained), "E-MODEL-KIND"),
    ):
        assert run("networks.lora_interrogator", *arguments) in (2, 3)
        assert f"error[{code}]" in error_of(capsys)
