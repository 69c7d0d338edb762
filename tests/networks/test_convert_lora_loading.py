"""Diffusers and PEFT load what `networks/convert_lora.py` writes, and do with it what happens here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from library import files
from networks.lora import create_network as create_sd
from networks.lora_flux import create_network
from tests.networks import test_diffusers, tiny_models, tiny_unets
from tests.networks.test_convert_lora_command import run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("algo", "split"), [("lora", "False"), ("lora", "True"), ("dora", "False")])
def test_diffusers_loads_flux(tmp_path: Path, algo: str, split: str) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    model, clip, their_clip = tiny_models.flux(test_diffusers.CONFIG), tiny_models.clip_l(), tiny_models.clip_l()
    theirs = test_diffusers.diffusers_transformer(model)
    inputs, ids = tiny_models.flux_inputs(), torch.arange(10)[None]
    torch.manual_seed(5)
    extra = {"split_qkv": split} if algo == "lora" else {"algo": algo}
    network = create_network(1.0, 3, 2.0, None, [clip, None], model, **extra)
    for adapter in network.created:
        test_diffusers.fill(adapter, 0.2)
    network.apply_to()
    applied, applied_text = model(**inputs), clip(input_ids=ids).last_hidden_state
    source, made = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    network.save_weights(source, metadata_={})
    run("--model", source, "--save_to", made, "--to", "diffusers", "--verify")
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(block_out_channels=(32,), latent_channels=16),
        text_encoder=their_clip,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=theirs,
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name=made.name)
    assert test_diffusers.relative_error(test_diffusers.their_answer(theirs, inputs), applied) < 1e-4
    assert test_diffusers.relative_error(their_clip(input_ids=ids).last_hidden_state, applied_text) < 1e-4


def unet(sdxl: bool) -> nn.Module:
    """As many blocks as the real ones have."""
    from diffusers import UNet2DConditionModel

    down, up, plain_down, plain_up = tiny_unets.CROSS
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16) if sdxl else (8, 8, 8, 8),
        layers_per_block=2,
        down_block_types=(plain_down, down, down) if sdxl else (down, down, down, plain_down),
        up_block_types=(up, up, plain_up) if sdxl else (plain_up, up, up, up),
        transformer_layers_per_block=(1, 2, 3) if sdxl else 1,
        attention_head_dim=2,
        cross_attention_dim=tiny_unets.TEXT_WIDTH,
        norm_num_groups=4,
        use_linear_projection=sdxl,
        **tiny_unets._sizes(tiny_unets.TEXT_WIDTH) if sdxl else {},
    )
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("sdxl", "algo"), [(True, "dora"), (False, "lora")])
def test_diffusers_loads_unets(tmp_path: Path, sdxl: bool, algo: str) -> None:
    model, theirs = unet(sdxl), unet(sdxl)
    extra = {} if algo == "lora" else {"algo": "dora"}
    network = create_sd(1.0, 3, 2.0, None, None, model, conv_dim="2", conv_alpha="1", **extra)
    for adapter in network.created:
        test_diffusers.fill(adapter, 0.2)
    plain = tiny_unets.answer(model)
    network.apply_to()
    applied = tiny_unets.answer(model)
    source, made = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    network.save_weights(source, metadata_={})
    run("--model", source, "--save_to", made, "--to", "diffusers", "--verify")
    theirs.load_lora_adapter(dict(files.LazyTensors(made)), prefix="unet")
    assert test_diffusers.relative_error(applied, plain) > 0.01
    assert test_diffusers.relative_error(tiny_unets.answer(theirs), applied) < 1e-4
