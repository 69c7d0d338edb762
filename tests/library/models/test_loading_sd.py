"""Loading SD 1.x, 2.x and SDXL: every layout gives Diffusers' and Transformers' own models and answers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.files import LazyTensors, save_safetensors
from library.log import DataError
from library.models import autoencoder, clip, keymaps_sd, loading_sd, unet
from library.models.checkpoints_sd import Prediction, Role, find_checkpoint, part_fingerprint, stated_prediction
from library.models.detect import check
from library.models.keymaps import Mapped
from library.models.keymaps_sd import Version
from tests import tiny, tiny_sd

VERSIONS: tuple[Version, ...] = ("1", "2", "xl")
ROLES: dict[Version, Role] = {"1": "sd", "2": "sd", "xl": "sdxl"}
LAYOUTS = ("safetensors", "ckpt", "folder")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by version and layout."""
    folder = tmp_path_factory.mktemp("sd")
    found: dict[str, Path] = {}
    for version in VERSIONS:
        for ending in LAYOUTS[:2]:
            found[f"{version} {ending}"] = tiny_sd.write_single(folder / f"{version}.{ending}", version)
        found[f"{version} folder"] = tiny_sd.write_folder(folder / version, version)
    return found


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, nn.Module]]:
    """The models that are in the checkpoints."""
    return {
        version: {"unet": tiny_sd.unet(version), "vae": tiny_sd.vae(), **tiny_sd.encoders(version)}
        for version in VERSIONS
    }


def load_all(path: Path, role: Role) -> dict[str, nn.Module]:
    encoders = loading_sd.load_encoders(path, role=role)
    return {"unet": loading_sd.load_unet(path, role=role), "vae": loading_sd.load_vae(path, role=role), **encoders}


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    theirs, ours = expected.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert type(found) is type(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_layout_gives_the_same_models(
    files: dict[str, Path], made: dict[str, dict[str, nn.Module]], version: Version, layout: str
) -> None:
    found = load_all(files[f"{version} {layout}"], ROLES[version])
    assert found.keys() == made[version].keys()
    for name, model in found.items():
        assert_equal(model, made[version][name])
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("version", VERSIONS)
def test_answers_are_those_of_diffusers_from_the_folder(files: dict[str, Path], version: Version) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder, ours = files[f"{version} folder"], load_all(files[f"{version} safetensors"], ROLES[version])
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    ids, contexts, pooled = token_ids(), [], None
    with torch.no_grad():
        for name in list(ours)[2:]:
            theirs = classes[name].from_pretrained(folder / name).eval()(ids, output_hidden_states=True)
            found = ours[name].eval()(ids, output_hidden_states=True)
            close(found.last_hidden_state, theirs.last_hidden_state)
            close(found.hidden_states[-2], theirs.hidden_states[-2])
            contexts.append(theirs.hidden_states[-2])
            pooled = theirs[0] if name == "text_encoder_2" else None
        reference = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        sample, timesteps = torch.randn(2, 4, 8, 12), torch.tensor([3.0, 812.0])
        context, sizes = torch.cat(contexts, dim=-1), torch.tensor([[768.0, 512.0, 0.0, 13.0, 64.0, 96.0]] * 2)
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        expected = reference(sample, timesteps, context, added_cond_kwargs=added).sample
        answer = unet.predict(
            ours["unet"].eval(), sample, timesteps, context, pooled, None if pooled is None else sizes
        )
        close(answer, expected)
        vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        pixels = torch.rand(1, 3, 32, 48) * 2 - 1
        close(autoencoder.encode(ours["vae"].eval(), pixels).mean, vae.encode(pixels).latent_dist.mean)
        close(autoencoder.decode(ours["vae"], sample[:1]), vae.decode(sample[:1]).sample)


def token_ids() -> Tensor:
    end = len(tiny.clip_vocabulary()) - 1
    ids = torch.full((2, 77), end)
    ids[:, 0] = end - 1
    ids[0, 1:4] = torch.tensor([3, 1, 4])
    ids[1, 1:7] = torch.tensor([2, 7, 1, 8, 2, 8])
    return ids


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_diffusers_reads_the_same_from_the_single_file(
    files: dict[str, Path], made: dict[str, dict[str, nn.Module]], version: Version
) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    pipeline_class = StableDiffusionXLPipeline if version == "xl" else StableDiffusionPipeline
    pipeline = pipeline_class.from_single_file(
        str(files[f"{version} safetensors"]), config=str(files[f"{version} folder"]), local_files_only=True
    )
    for name, model in made[version].items():
        assert_equal(getattr(pipeline, name), model)


def test_projection_of_sdxl_is_that_of_open_clip(files: dict[str, Path]) -> None:
    """OpenCLIP by hand from the file's own tensors: x @ text_projection."""
    prefix = "conditioner.embedders.1.model."
    with LazyTensors(files["xl safetensors"]) as tensors:
        tower = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    ids = token_ids()
    x = tower["token_embedding.weight"][ids] + tower["positional_embedding"]
    mask = torch.full((77, 77), -torch.inf).triu(1)
    for index in range(2):
        block = {
            name.removeprefix(start): tensor
            for start in [f"transformer.resblocks.{index}."]
            for name, tensor in tower.items()
            if name.startswith(start)
        }
        normed = norm(x, block, "ln_1").transpose(0, 1)
        attended, _ = F.multi_head_attention_forward(
            *(normed, normed, normed, 64, 1, block["attn.in_proj_weight"], block["attn.in_proj_bias"]),
            *(None, None, False, 0.0, block["attn.out_proj.weight"], block["attn.out_proj.bias"]),
            attn_mask=mask,
            need_weights=False,
        )
        x = x + attended.transpose(0, 1)
        hidden = F.gelu(F.linear(norm(x, block, "ln_2"), block["mlp.c_fc.weight"], block["mlp.c_fc.bias"]))
        x = x + F.linear(hidden, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    ends = (ids == ids[0, -1]).int().argmax(dim=-1)
    expected = norm(x, tower, "ln_final")[[0, 1], ends] @ tower["text_projection"]
    encoder: Any = loading_sd.load_encoders(files["xl ckpt"], role="sdxl")["text_encoder_2"].eval()
    with torch.no_grad():
        close(encoder(ids).text_embeds, expected)
        close(encoder.text_projection(clip.clip_pooled(encoder, ids)), expected)
    wrong = norm(x, tower, "ln_final")[[0, 1], ends] @ tower["text_projection"].T
    assert (wrong - expected).abs().max() > 0.1


def norm(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def test_types_and_choice_of_encoders(files: dict[str, Path]) -> None:
    model = loading_sd.load_unet(files["1 safetensors"], torch.bfloat16, role="sd")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    names = loading_sd.load_encoders(files["xl safetensors"], role="sdxl", names=["text_encoder_2"])
    assert list(names) == ["text_encoder_2"]


def test_part_shapes_come_from_headers(files: dict[str, Path], made: dict[str, dict[str, nn.Module]]) -> None:
    for layout in LAYOUTS:
        shapes = loading_sd.part_shapes(files[f"xl {layout}"], role="sdxl")
        assert list(shapes) == ["unet", "text_encoder", "text_encoder_2"]
        for name, found in shapes.items():
            expected = made["xl"][name].state_dict()
            assert sum(torch.Size(shape).numel() for shape in found.values()) == sum(
                map(Tensor.numel, expected.values())
            )


def test_vae_from_elsewhere(files: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_sd.vae(seed=99)
    other.save_pretrained(tmp_path / "folder" / "vae")
    other.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    ldm = dict(Mapped(other.state_dict(), keymaps_sd.keymaps.vae_from_diffusers(other.state_dict())))
    save_safetensors(ldm, tmp_path / "vae.safetensors")
    torch.save({"state_dict": ldm | {"loss.logvar": torch.zeros(())}}, tmp_path / "vae.pt")
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in ldm.items()}
    whole = {name: torch.zeros(1) for name in ("model.diffusion_model.input_blocks.1.0.in_layers.0.weight",)}
    save_safetensors(prefixed | whole, tmp_path / "whole.safetensors")
    for place in ("folder", "folder/vae", "pickled", "vae.safetensors", "vae.pt", "whole.safetensors"):
        for layout in ("1 safetensors", "1 folder"):
            assert_equal(loading_sd.load_vae(files[layout], role="sd", vae=tmp_path / place), other)
    part = loading_sd.vae_part(files["1 folder"], role="sd", vae=tmp_path / "vae.safetensors")
    assert part_fingerprint(part) != part_fingerprint(loading_sd.vae_part(files["1 folder"], role="sd"))


def test_wrong_files_in_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is an SDXL checkpoint, but --pretrained_model_name_or_path wants an SD 1"):
        loading_sd.load_unet(files["xl safetensors"], role="sd")
    with pytest.raises(DataError, match=r"is an SD 2\.x checkpoint, but .* wants an SDXL checkpoint"):
        loading_sd.load_unet(files["2 ckpt"], role="sdxl")
    with pytest.raises(DataError, match=r"is a FLUX\.1-dev transformer"):
        loading_sd.load_unet(tiny.write_flux(tmp_path / "flux.safetensors"), role="sdxl")
    save_safetensors({"cond_stage_model.x": torch.zeros(1)}, tmp_path / "te.safetensors")
    with pytest.raises(DataError, match=r"is an SD 1\.x checkpoint, but --vae wants an SD or SDXL autoencoder"):
        loading_sd.load_vae(files["1 safetensors"], role="sd", vae=tmp_path / "te.safetensors")


def test_inpainting_and_other_inputs_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_sd.unet("1", in_channels=9)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ldm = Mapped(model.state_dict(), keymaps_sd.unet_to_ldm(shapes))
    path = tmp_path / "inpainting.safetensors"
    save_safetensors({f"model.diffusion_model.{name}": tensor for name, tensor in ldm.items()}, path)
    model.save_pretrained(tmp_path / "folder" / "unet")
    for place in (path, tmp_path / "folder"):
        finding = check(place, "--pretrained_model_name_or_path", "sd")
        assert finding is not None
        assert "an inpainting variant (9 input channels) of an SD 1." in finding.what
        assert finding.hint is not None
        assert "use the model that it was made from" in finding.hint


def test_missing_parts_in_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    with LazyTensors(files["1 safetensors"]) as tensors:
        lone = {name: tensors[name] for name in tensors if name.startswith("model.diffusion_model.")}
    path = tmp_path / "unet.safetensors"
    save_safetensors(lone, path)
    assert loading_sd.load_unet(path, role="sd") is not None
    with pytest.raises(DataError, match="the file has no text encoder"):
        loading_sd.load_encoders(path, role="sd")
    with pytest.raises(DataError, match="no autoencoder") as caught:
        loading_sd.load_vae(path, role="sd")
    assert "--vae" in str(caught.value)
    del lone["model.diffusion_model.out.2.bias"]
    lone["model.diffusion_model.surprise"] = torch.zeros(1)
    save_safetensors(lone, path)
    with pytest.raises(DataError, match=r"1 missing \(conv_out.bias\); 1 unexpected \(surprise\)"):
        loading_sd.load_unet(path, role="sd")


def test_folder_with_variants_takes_the_plain_file(files: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_sd.unet("1")
    model.save_pretrained(tmp_path / "unet")
    model.half().save_pretrained(tmp_path / "unet", variant="fp16")
    loaded = loading_sd.load_unet(tmp_path, role="sd")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_prediction_that_the_checkpoint_states(files: dict[str, Path], tmp_path: Path) -> None:
    assert stated_prediction(find_checkpoint(files["2 folder"], "sd")) == Prediction(
        "epsilon", False, "its scheduler_config.json"
    )
    assert stated_prediction(find_checkpoint(files["2 ckpt"], "sd")) == Prediction(None, None)
    with LazyTensors(files["xl safetensors"]) as tensors:
        marked = tmp_path / "v.safetensors"
        save_safetensors(dict(tensors) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, marked)
        stated = tmp_path / "stated.safetensors"
        save_safetensors(tensors, stated, {"modelspec.prediction_type": "v"})
    assert stated_prediction(find_checkpoint(marked, "sdxl")) == Prediction("v", True, "its tensor v_pred")
    assert stated_prediction(find_checkpoint(stated, "sdxl")).kind == "v"
    scheduler = tmp_path / "f" / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir(parents=True)
    tiny_sd.unet("1").save_pretrained(tmp_path / "f" / "unet")
    scheduler.write_text(json.dumps({"prediction_type": "v_prediction"}), encoding="utf-8")
    assert stated_prediction(find_checkpoint(tmp_path / "f", "sd")).kind == "v"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
