"""A LoRA of ours does in Diffusers what it does here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library import files
from library.models.flux import Flux, FluxConfig
from library.models.keymaps import Mapped, flux_names, flux_to_diffusers
from networks import convert_flux_lora
from networks.base import ModuleAdapter, Network
from networks.lora_flux import create_network, create_network_from_weights
from tests.networks import tiny_models

FIXED_WIDTH = re.compile(r"lora_unet_single_blocks_\d+_linear1")
"""Modules that Diffusers converts at the width of FLUX.1 only, so that a tiny model can't have them."""

CONFIG = FluxConfig(
    width=64, head_width=32, mlp_width=256, double_blocks=2, single_blocks=2, context_width=24, pooled_width=16
)


def diffusers_transformer(model: Flux) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    config = model.config
    theirs = FluxTransformer2DModel(
        in_channels=config.in_channels,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=config.head_width,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_width,
        pooled_projection_dim=config.pooled_width,
        guidance_embeds=config.guidance,
        axes_dims_rope=config.axes,
    )
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    theirs.load_state_dict(dict(Mapped(state, flux_to_diffusers(shapes))))
    return theirs.eval().requires_grad_(False)


def their_answer(theirs: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return theirs(  # type: ignore[no-any-return]
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["pooled"],
        timestep=inputs["timesteps"],
        img_ids=inputs["img_ids"][0],
        txt_ids=inputs["txt_ids"][0],
        guidance=inputs["guidance"],
        return_dict=False,
    )[0]


SPLIT = pytest.mark.parametrize("split", ["False", "True"])


def fill(adapter: ModuleAdapter, std: float = 1.0) -> None:
    for name, parameter in adapter.named_parameters():
        if "lora_up" in name:
            nn.init.normal_(parameter, std=std)


def trained(model: Flux, clip: nn.Module, split: str) -> Network:
    torch.manual_seed(5)
    network = create_network(1.0, 4, 2.0, None, [clip, None], model, split_qkv=split)
    for adapter in network.created:
        if not FIXED_WIDTH.fullmatch(adapter.name):
            fill(adapter, 0.2)
    network.apply_to()
    return network


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@SPLIT
@pytest.mark.filterwarnings("ignore")
def test_diffusers_gives_the_same_answers(tmp_path: Path, split: str) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    model, clip = tiny_models.flux(CONFIG), tiny_models.clip_l()
    theirs = diffusers_transformer(model)
    their_clip = tiny_models.clip_l()
    inputs, ids = tiny_models.flux_inputs(), torch.arange(10)[None]
    plain = model(**inputs)
    assert relative_error(their_answer(theirs, inputs), plain) < 1e-4

    network = trained(model, clip, split)
    applied, applied_text = model(**inputs), clip(input_ids=ids).last_hidden_state
    assert relative_error(applied, plain) > 0.05
    path = tmp_path / "ours.safetensors"
    tensors = {name: tensor for name, tensor in network.file_tensors().items() if not FIXED_WIDTH.match(name)}
    files.save_safetensors(tensors, path, {"ss_network_module": "networks.lora_flux"})
    network.restore()

    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(block_out_channels=(32,), latent_channels=16),
        text_encoder=their_clip,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=theirs,
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert relative_error(their_answer(theirs, inputs), applied) < 1e-4
    assert relative_error(their_clip(input_ids=ids).last_hidden_state, applied_text) < 1e-4

    merged, weights = create_network_from_weights(1.0, path, None, [clip, None], model, for_inference=True)
    merged.merge_to([clip, None], model, weights)
    assert relative_error(model(**inputs), their_answer(theirs, inputs)) < 1e-4


@SPLIT
@pytest.mark.filterwarnings("ignore")
def test_diffusers_does_the_same_with_a_converted_file(tmp_path: Path, split: str) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    model, clip, their_clip = tiny_models.flux(CONFIG), tiny_models.clip_l(), tiny_models.clip_l()
    theirs = diffusers_transformer(model)
    inputs, ids = tiny_models.flux_inputs(), torch.arange(10)[None]
    torch.manual_seed(5)
    network = create_network(1.0, 4, 2.0, None, [clip, None], model, split_qkv=split)
    for adapter in network.created:
        fill(adapter, 0.2)
    network.apply_to()
    applied, applied_text = model(**inputs), clip(input_ids=ids).last_hidden_state
    network.save_weights(tmp_path / "ours.safetensors", metadata_={})
    convert_flux_lora.main(
        [
            *("--src", "sd-scripts", "--dst", "ai-toolkit", "--src_path", str(tmp_path / "ours.safetensors")),
            *("--dst_path", str(tmp_path / "theirs.safetensors")),
        ]
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(block_out_channels=(32,), latent_channels=16),
        text_encoder=their_clip,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=theirs,
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="theirs.safetensors")
    assert relative_error(their_answer(theirs, inputs), applied) < 1e-4
    assert relative_error(their_clip(input_ids=ids).last_hidden_state, applied_text) < 1e-4


@SPLIT
def test_diffusers_converts_every_module_of_the_full_size(split: str) -> None:
    from diffusers import FluxPipeline

    config = FluxConfig(double_blocks=2, single_blocks=2)
    with torch.device("meta"):
        model = Flux(config)
    torch.manual_seed(6)
    network = create_network(1.0, 2, 1.0, None, [None, None], model, split_qkv=split)
    network.apply_to()
    for adapter in network.adapters:
        fill(adapter)
    converted = FluxPipeline.lora_state_dict(network.file_tensors())
    for path, theirs in flux_names(config.double_blocks, config.single_blocks).items():
        if not path.endswith(".weight") or not path.startswith(("double_blocks", "single_blocks")):
            continue
        ours = network.get_submodule("lora_unet_" + path.removesuffix(".weight").replace(".", "_"))
        x = torch.randn(ours.module.in_features)  # type: ignore[union-attr]
        down, up = ours.pair()  # type: ignore[union-attr, operator]
        wanted = ours.scale * up @ (down @ x)  # type: ignore[union-attr, operator]
        stems = ["transformer." + name.removesuffix(".weight") for name in theirs]
        parts = [
            converted.pop(f"{stem}.lora_B.weight") @ (converted.pop(f"{stem}.lora_A.weight") @ x) for stem in stems
        ]
        torch.testing.assert_close(torch.cat(parts), wanted.detach(), rtol=1e-4, atol=1e-4)
    assert not converted
