"""Saving SD 1.x, 2.x and SDXL: what is loaded and saved is the same, and other programs read it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.files import LazyTensors, header
from library.log import ResourceError
from library.models import loading_sd, saving_sd
from library.models.checkpoints_sd import Checkpoint, Role, find_checkpoint
from library.models.joined import Joined
from library.models.keymaps_sd import Version
from library.models.locations import open_tensors
from library.models.saving_sd import Kind, Product, save_checkpoint
from tests import tiny_sd

VERSIONS: tuple[Version, ...] = ("1", "2", "xl")
ROLES: dict[Version, Role] = {"1": "sd", "2": "sd", "xl": "sdxl"}
UNKNOWN = {"model_ema.decay": torch.tensor(0.5), "betas": torch.ones(3), "step": torch.tensor(7)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Checkpoints by version and layout."""
    folder = tmp_path_factory.mktemp("sd")
    found: dict[str, Checkpoint] = {}
    for version in VERSIONS:
        more = UNKNOWN if version != "xl" else {"v_pred": torch.zeros(0)}
        single = tiny_sd.write_single(folder / f"{version}.safetensors", version, more=more)
        found[version] = find_checkpoint(single, ROLES[version])
        whole = tiny_sd.write_folder(folder / version, version)
        found[f"{version} folder"] = find_checkpoint(whole, ROLES[version])
    found["1 ckpt"] = find_checkpoint(tiny_sd.write_single(folder / "1.ckpt", "1", more=UNKNOWN), "sd")
    return found


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def models(source: Checkpoint) -> dict[str, nn.Module]:
    encoders = loading_sd.load_encoders(source.path, role=source.role)
    return {"unet": loading_sd.load_unet(source.path, role=source.role), **encoders}


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_tensors([path]) as tensors:
        return dict(tensors)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
@pytest.mark.parametrize("version", VERSIONS)
def test_loaded_and_saved_is_the_same_file(
    sources: dict[str, Checkpoint], tmp_path: Path, version: Version, kind: Kind
) -> None:
    source, path = sources[version], tmp_path / "x"
    save_checkpoint(path, kind, Product(source, models(source)), {"a": "b"} if kind == "safetensors" else None)
    assert_same(tensors_of(path), tensors_of(source.path))
    if kind == "safetensors":
        assert header(path).metadata == {"a": "b"}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_not_in_memory_comes_from_the_source(
    sources: dict[str, Checkpoint], tmp_path: Path, version: Version
) -> None:
    source = sources[version]
    save_checkpoint(tmp_path / "x", "safetensors", Product(source, {}))
    assert_same(tensors_of(tmp_path / "x"), tensors_of(source.path))


def test_trained_models_replace_those_of_the_source(sources: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = sources["2"]
    trained = {"unet": tiny_sd.unet("2", seed=50), **tiny_sd.encoders("2", seed=51)}
    save_checkpoint(tmp_path / "x", "safetensors", Product(source, trained))
    before, after = tensors_of(source.path), tensors_of(tmp_path / "x")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    tower = "cond_stage_model.model."
    unused = ("transformer.resblocks.2.", "text_projection", "logit_scale", "attn_mask")
    assert changed == {
        name
        for name in before
        if name.startswith("model.diffusion_model.")
        or (name.startswith(tower) and not name.removeprefix(tower).startswith(unused))
    }
    loaded = loading_sd.load_encoders(tmp_path / "x", role="sd")["text_encoder"]
    assert_same(loaded.state_dict(), trained["text_encoder"].state_dict())


def test_conversion_leaves_what_is_carried_over(sources: dict[str, Checkpoint], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x", "safetensors", Product(sources["1"], {}, dtype=torch.float16))
    found, before = tensors_of(tmp_path / "x"), tensors_of(sources["1"].path)
    assert_same({name: found[name] for name in UNKNOWN}, {name: before[name] for name in UNKNOWN})
    rest = {name: tensor.half() for name, tensor in before.items() if name not in UNKNOWN}
    assert_same({name: found[name] for name in rest}, rest)


def test_another_autoencoder_is_written(sources: dict[str, Checkpoint], tmp_path: Path) -> None:
    other = tiny_sd.vae(seed=77)
    other.save_pretrained(tmp_path / "vae")
    for kind, name in (("safetensors", "x"), ("diffusers_safetensors", "folder")):
        part = loading_sd.vae_part("", role="sd", vae=tmp_path / "vae")
        save_checkpoint(tmp_path / name, kind, Product(sources["1"], {}, part))  # type: ignore[arg-type]
        loaded = loading_sd.load_vae(tmp_path / name, role="sd")
        assert_same(loaded.state_dict(), other.state_dict())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_as_a_single_file(sources: dict[str, Checkpoint], tmp_path: Path, version: Version) -> None:
    save_checkpoint(tmp_path / "x", "safetensors", Product(sources[f"{version} folder"], {}))
    found, expected = tensors_of(tmp_path / "x"), tensors_of(sources[version].path)
    made_up = {"cond_stage_model.model.text_projection": torch.ones(32, 32)} if version == "2" else {}
    left = {*UNKNOWN, "v_pred", "cond_stage_model.model.attn_mask", "conditioner.embedders.1.model.logit_scale"}
    assert_same(found, {name: tensor for name, tensor in expected.items() if name not in left} | made_up)


@pytest.mark.parametrize(("layout", "safe"), [("", True), (" folder", False)])
@pytest.mark.parametrize("version", VERSIONS)
def test_pipelines_load_the_folders(
    sources: dict[str, Checkpoint], tmp_path: Path, version: Version, layout: str, safe: bool
) -> None:
    from diffusers import DiffusionPipeline
    from transformers import CLIPTokenizer

    source, folder = sources[version + layout], tmp_path / "out"
    kind: Kind = "diffusers_safetensors" if safe else "diffusers"
    tokenizer = CLIPTokenizer.from_pretrained(sources[f"{version} folder"].path / "tokenizer")
    tokenizers: dict[str, Any] = {} if layout else {"tokenizer": tokenizer, "tokenizer_2": tokenizer}
    folder.mkdir()
    (folder / "old").write_text("", encoding="utf-8")
    save_checkpoint(folder, kind, Product(source, {"unet": tiny_sd.unet(version)}, tokenizers=tokenizers))
    assert not (folder / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert any(folder.rglob("*.bin")) != safe
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == ("StableDiffusionXLPipeline" if version == "xl" else "StableDiffusionPipeline")
    expected = {"unet": tiny_sd.unet(version), "vae": tiny_sd.vae(), **tiny_sd.encoders(version)}
    for name, model in expected.items():
        assert_same(getattr(pipeline, name).state_dict(), model.state_dict())
    assert pipeline.vae.config.scaling_factor == tiny_sd.VAE_SCALES[version]
    assert pipeline.unet.config.cross_attention_dim == expected["unet"].config.cross_attention_dim
    assert all(str(tmp_path) not in path.read_text(encoding="utf-8") for path in folder.rglob("*.json"))
    again = loading_sd.load_unet(folder, role=source.role)
    assert_same(again.state_dict(), expected["unet"].state_dict())


def test_types_and_prediction_of_folders(sources: dict[str, Checkpoint], tmp_path: Path) -> None:
    for layout in ("2", "2 folder"):
        folder = tmp_path / layout
        product = Product(sources[layout], {}, dtype=torch.float16, v_prediction=True, zero_terminal=True)
        save_checkpoint(folder, "diffusers_safetensors", product)
        with LazyTensors(folder / "text_encoder" / "model.safetensors") as tensors:
            assert {info.dtype for info in tensors.infos.values()} == {"F16"}
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        assert scheduler["prediction_type"] == "v_prediction"
        assert scheduler["rescale_betas_zero_snr"] is True
        assert (folder / "tokenizer").exists() == (layout == "2 folder")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        assert ("tokenizer" in index) == (layout == "2 folder")


def test_numbers_of_a_ckpt_add_up(sources: dict[str, Checkpoint], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.ckpt", "ckpt", Product(sources["1 ckpt"], {}, epoch=2, steps=30))
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (5, 470030)
    assert content["state_dict"].keys() == tensors_of(sources["1 ckpt"].path).keys()


def test_files_of_the_golden_size_have_the_golden_names(sources: dict[str, Checkpoint]) -> None:
    """That all tensors of the published models get their names is in test_keymaps_sd; here: the prefixes."""
    product = Product(sources["xl"], {})
    prefixes = {name: saving_sd.single_prefix(name, product) for name in product.parts}
    assert prefixes == {
        "unet": "model.diffusion_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
        "vae": "first_stage_model.",
    }


def test_each_tensor_is_made_once(
    sources: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    made = Joined.__getitem__
    monkeypatch.setattr(Joined, "__getitem__", lambda self, name: asked.append(name) or made(self, name))
    save_checkpoint(tmp_path / "x", "safetensors", Product(sources["2"], {}, dtype=torch.bfloat16))
    assert sorted(asked) == sorted(header(tmp_path / "x").tensors)
    assert {info.dtype for info in header(tmp_path / "x").tensors.values()} == {"BF16", "F32", "I64"}


def test_early_names_are_written_as_todays(tmp_path: Path) -> None:
    tensors = tiny_sd.single_tensors("1")
    level = "cond_stage_model.transformer.text_model."
    early = {name.replace(level, "cond_stage_model.transformer."): tensor for name, tensor in tensors.items()}
    ids = {"cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(early | ids, tmp_path / "early.ckpt")
    save_checkpoint(tmp_path / "x", "safetensors", Product(find_checkpoint(tmp_path / "early.ckpt", "sd"), {}))
    assert_same(tensors_of(tmp_path / "x"), tensors | ids)


def test_training_is_saved_when_the_source_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_sd.write_single(tmp_path / "source.safetensors", "2")
    source = find_checkpoint(path, "sd")
    trained = models(source)
    path.unlink()
    save_checkpoint(tmp_path / "x", "safetensors", Product(source, trained))
    assert "is gone or was changed" in caplog.text
    for name, model in trained.items():
        loaded = {"unet": loading_sd.load_unet(tmp_path / "x", role="sd")}
        loaded |= loading_sd.load_encoders(tmp_path / "x", role="sd")
        assert_same(loaded[name].state_dict(), model.state_dict())


def test_a_folder_that_fails_leaves_the_old_one(
    sources: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.models import folders_sd

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("", encoding="utf-8")
    monkeypatch.setattr(folders_sd, "_save_part", fail)
    with pytest.raises(ResourceError, match="No space left"):
        save_checkpoint(folder, "diffusers", Product(sources["1"], {}))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / "old").exists()


def test_kind_follows_the_source(sources: dict[str, Checkpoint]) -> None:
    assert saving_sd.default_kind(sources["1 ckpt"]) == "safetensors"
    assert saving_sd.default_kind(sources["1 folder"]) == "diffusers_safetensors"
