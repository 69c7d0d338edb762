"""Layouts of checkpoints are turned into each other without loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from library.models import autoencoder, keymaps
from tests import tiny

GOLDEN = Path(__file__).parents[2] / "golden"
CHECKPOINT = json.loads((GOLDEN / "flux_checkpoint_keys.json").read_text(encoding="utf-8"))


def test_flux_names_golden() -> None:
    golden = json.loads((GOLDEN / "flux_diffusers_map.json").read_text(encoding="utf-8"))
    table = keymaps.flux_names(19, 38)
    found = {diffusers: [index, bfl] for bfl, names in table.items() for index, diffusers in enumerate(names)}
    assert found == golden["map"]
    bfl_shapes = {name: tuple(shape) for name, shape in CHECKPOINT["dev"].items()}
    recipes = keymaps.flux_to_diffusers(bfl_shapes)
    shapes = keymaps.mapped_shapes(bfl_shapes, recipes)
    assert shapes == {name: tuple(shape) for name, shape in golden["shapes"].items()}
    assert keymaps.mapped_shapes(shapes, keymaps.flux_from_diffusers(shapes)) == bfl_shapes


@pytest.mark.parametrize("guidance", [False, True])
def test_flux_to_diffusers_and_back_is_exact(guidance: bool) -> None:
    state = tiny.flux_model(double=2, single=3, guidance=guidance).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    there = dict(keymaps.Mapped(state, keymaps.flux_to_diffusers(shapes)))
    back = dict(keymaps.Mapped(there, keymaps.flux_from_diffusers(there)))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_final_modulation_halves_are_exchanged() -> None:
    state = {"norm_out.linear.bias": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    made = keymaps.Mapped(state, keymaps.flux_from_diffusers(state))
    assert made["final_layer.adaLN_modulation.1.bias"].tolist() == [3, 4, 1, 2]


def test_unknown_names_stay_and_are_seen() -> None:
    assert "extra.weight" in keymaps.flux_from_diffusers({"extra.weight": 0})
    assert "extra.weight" in keymaps.vae_from_diffusers({"extra.weight": 0})


def test_autoencoder_of_the_golden_checkpoint_has_the_tensors_of_diffusers() -> None:
    ldm = {name: tuple(shape) for name, shape in CHECKPOINT["autoencoder"].items()}
    with torch.device("meta"):
        model = autoencoder.build_autoencoder(ldm)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert keymaps.mapped_shapes(ldm, keymaps.vae_to_diffusers(ldm)) == shapes
    assert keymaps.mapped_shapes(shapes, keymaps.vae_from_diffusers(shapes)) == ldm
    assert len(ldm) == 244


def test_early_diffusers_names_of_the_autoencoder() -> None:
    names = {f"encoder.mid_block.attentions.0.{name}.weight": 0 for name in ("query", "key", "value", "proj_attn")}
    names["encoder.down_blocks.0.resnets.0.conv1.weight"] = 0
    found = set(keymaps.vae_from_diffusers(names))
    assert {f"encoder.mid.attn_1.{name}.weight" for name in ("q", "k", "v", "proj_out")} < found


def test_encoders_inside_a_full_checkpoint() -> None:
    clip = {
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight": 0,
        "text_encoders.clip_l.transformer.text_projection.weight": 0,
        "text_encoders.clip_l.logit_scale": 0,
        "model.diffusion_model.img_in.weight": 0,
    }
    assert list(keymaps.clip_text(clip)) == ["text_model.embeddings.token_embedding.weight"]
    t5 = {
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": 0,
        "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight": 0,
    }
    assert set(keymaps.t5_encoder(t5)) == {"shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"}
