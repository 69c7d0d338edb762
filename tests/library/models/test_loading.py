"""Loading: every layout of a checkpoint gives the same model, and what is wrong is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.files import LazyTensors, save_safetensors
from library.log import DataError
from library.models import keymaps, loading
from tests import tiny


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def diffusers_folder(folder: Path, shards: int) -> Path:
    """A Diffusers pipeline folder with a FLUX.1 transformer in so many shards."""
    state = state_of(tiny.flux_model())
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tensors = dict(keymaps.Mapped(state, keymaps.flux_to_diffusers(shapes)))
    transformer = folder / "transformer"
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["diffusion_pytorch_model.safetensors"]
    places = {name: names[index % shards] for index, name in enumerate(tensors)}
    for file in names:
        save_safetensors({name: tensors[name] for name, place in places.items() if place == file}, transformer / file)
    if shards > 1:
        index = json.dumps({"metadata": {}, "weight_map": places})
        (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


def assert_is_the_tiny_flux(model: torch.nn.Module) -> None:
    expected = state_of(tiny.flux_model())
    found = state_of(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("mmap", [False, True])
def test_single_file(tmp_path: Path, prefix: str, mmap: bool) -> None:
    path = tiny.write_flux(tmp_path / "flux.safetensors", prefix=prefix)
    model = loading.load_flux(path, mmap=mmap)
    assert_is_the_tiny_flux(model)
    assert all(not parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_diffusers_folder(tmp_path: Path, shards: int) -> None:
    folder = diffusers_folder(tmp_path, shards)
    assert_is_the_tiny_flux(loading.load_flux(folder))
    assert_is_the_tiny_flux(loading.load_flux(folder / "transformer"))
    first = sorted((folder / "transformer").glob("*.safetensors"))[0]
    assert_is_the_tiny_flux(loading.load_flux(first))
    assert any("guidance_embedder" in name for name in loading.header_of(folder, "flux", "--x").tensors)


def test_everything_in_one_file(tmp_path: Path) -> None:
    parts = {
        "model.diffusion_model.": LazyTensors(tiny.write_flux(tmp_path / "flux.safetensors")),
        "vae.": LazyTensors(tiny.write_autoencoder(tmp_path / "ae.safetensors")),
    }
    path = tmp_path / "all.safetensors"
    save_safetensors({prefix + name: part[name] for prefix, part in parts.items() for name in part}, path)
    assert_is_the_tiny_flux(loading.load_flux(path))
    vae = loading.load_autoencoder(path)
    alone = loading.load_autoencoder(tmp_path / "ae.safetensors")
    assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in vae.state_dict().items())


def test_types(tmp_path: Path) -> None:
    path = tiny.write_flux(tmp_path / "flux.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in loading.load_flux(path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loading.load_flux(path, torch.float32).parameters()} == {torch.float32}
    eight = tiny.write_flux(tmp_path / "eight.safetensors", dtype=torch.float8_e4m3fn)
    assert {p.dtype for p in loading.load_flux(eight).parameters()} == {torch.float8_e4m3fn}
    raised = loading.load_flux(eight, torch.bfloat16)
    expected = tiny.flux_model().img_in.weight.to(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(raised.img_in.weight, expected)


def test_model_does_not_hang_on_the_file(tmp_path: Path) -> None:
    path = tiny.write_flux(tmp_path / "flux.safetensors")
    model = loading.load_flux(path, mmap=True)
    path.write_bytes(b"")
    assert_is_the_tiny_flux(model)


def test_float8_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tiny.write_flux(tmp_path / "flux.safetensors", dtype=torch.float8_e5m2)
    with pytest.raises(DataError, match="float8_e5m2"):
        loading.load_flux(path)


def test_missing_unexpected_and_misshapen_tensors_in_one_line(tmp_path: Path) -> None:
    state = state_of(tiny.flux_model())
    for name in ("img_in.bias", "txt_in.bias", "single_blocks.0.linear1.bias", "single_blocks.0.linear2.bias"):
        del state[name]
    state["surprise.weight"] = torch.zeros(1)
    state["time_in.in_layer.bias"] = torch.zeros(3)
    save_safetensors(state, tmp_path / "flux.safetensors")
    with pytest.raises(DataError) as caught:
        loading.load_flux(tmp_path / "flux.safetensors", option="--ckpt_path")
    text = str(caught.value)
    assert "4 missing (img_in.bias, txt_in.bias, single_blocks.0.linear1.bias, ...)" in text
    assert "1 unexpected (surprise.weight)" in text
    assert "time_in.in_layer.bias [3] instead of [64]" in text
    assert "--ckpt_path" in text
    assert "\n" not in text


def test_wrong_file_says_what_it_is(tmp_path: Path) -> None:
    path = tiny.write_clip_l(tmp_path / "clip_l.safetensors")
    with pytest.raises(DataError, match="is a CLIP text encoder, but --t5xxl wants a T5-XXL text encoder"):
        loading.load_t5(path)


def test_places_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        loading.load_flux(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match=r"no \.safetensors file in this folder nor in its transformer/"):
        loading.load_flux(tmp_path)
    folder = diffusers_folder(tmp_path, 3)
    sorted((folder / "transformer").glob("*.safetensors"))[1].unlink()
    with pytest.raises(DataError, match="1 of 3 shards missing"):
        loading.load_flux(folder)
    for name in ("a", "b"):
        tiny.write_flux(tmp_path / "two" / f"{name}.safetensors")
    with pytest.raises(DataError, match="several models"):
        loading.load_flux(tmp_path / "two")
