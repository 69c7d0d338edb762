"""CLIP and T5 against Transformers models made by hand, and the tiny tokenizers that go with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from library.files import LazyTensors, save_safetensors
from library.models import clip, loading, t5
from tests import tiny

GOLDEN = Path(__file__).parents[2] / "golden"
CHECKPOINT = json.loads((GOLDEN / "flux_checkpoint_keys.json").read_text(encoding="utf-8"))


def test_clip_is_the_transformers_model(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        hidden_act="quick_gelu",
        bos_token_id=58,
        eos_token_id=59,
        pad_token_id=59,
    )
    reference = CLIPTextModel(config).eval()
    tiny.fill(reference, 5)
    path = tmp_path / "clip.safetensors"
    extra = {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(128, 128)}
    save_safetensors({clip.file_name(name): tensor for name, tensor in reference.state_dict().items()} | extra, path)
    model = loading.load_clip(path).eval()
    ids = torch.tensor([[58, 3, 4, 5, 59, 59, 59, 59], [58, 1, 2, 3, 4, 5, 6, 59]])
    with torch.no_grad():
        found = clip.clip_pooled(model, ids)
        hidden = reference(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found, torch.stack((hidden[0, 4], hidden[1, 7])), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(clip.clip_pooled(model, ids, eos=5), hidden[[0, 1], [3, 5]], rtol=1e-5, atol=1e-6)


def test_golden_clip_l_has_the_size_of_the_real_one() -> None:
    shapes = {name: tuple(shape) for name, shape in CHECKPOINT["clip_l"].items()}
    with torch.device("meta"):
        model = clip.build_clip(shapes)
    found = {clip.file_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == shapes
    config = model.config
    assert (config.num_attention_heads, config.hidden_act, config.eos_token_id) == (12, "quick_gelu", 49407)


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_t5_is_the_transformers_model(tmp_path: Path, embedding: str) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    reference = T5EncoderModel(config).eval()
    tiny.fill(reference, 6)
    reference.encoder.embed_tokens.weight = reference.shared.weight
    drop = {"shared.weight": ["encoder.embed_tokens.weight"], "both": []}.get(embedding, ["shared.weight"])
    path = tmp_path / "t5.safetensors"
    save_safetensors({name: tensor for name, tensor in reference.state_dict().items() if name not in drop}, path)
    model = loading.load_t5(path).eval()
    assert model.shared.weight is model.encoder.embed_tokens.weight
    ids = torch.tensor([[5, 6, 7, 1, 0, 0], [9, 8, 7, 6, 5, 1]])
    with torch.no_grad():
        for mask in (None, (ids != 0).long()):
            expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(t5.t5_hidden(model, ids, mask), expected, rtol=1e-5, atol=1e-6)


def test_golden_t5_has_the_size_of_the_real_one() -> None:
    shapes = {name: tuple(shape) for name, shape in CHECKPOINT["t5xxl"].items()}
    with torch.device("meta"):
        model = t5.build_t5(shapes)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert (model.config.num_heads, model.config.d_kv) == (64, 64)


def test_t5_activations_are_never_stored_in_float8(tmp_path: Path) -> None:
    model = loading.load_t5(tiny.write_t5(tmp_path / "t5.safetensors")).eval().requires_grad_(False)
    dense = model.encoder.block[0].layer[1].DenseReluDense
    seen: list[torch.dtype] = []
    dense.wo.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    dense.wo.weight.data = dense.wo.weight.data.to(torch.float8_e4m3fn)
    with torch.autocast("cpu", torch.bfloat16):
        t5.t5_hidden(model, torch.tensor([[5, 6, 1]]))
    assert seen == [torch.bfloat16]


def test_tiny_tokenizers_go_with_the_tiny_encoders(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer, T5Tokenizer

    paths = tiny.write_all(tmp_path)
    clip_tokenizer = CLIPTokenizer.from_pretrained(paths["tokenizers"] / tiny.CLIP_FOLDER)
    t5_tokenizer = T5Tokenizer.from_pretrained(paths["tokenizers"] / tiny.T5_FOLDER)
    text = "a photo of the blue zebra"
    clip_ids = clip_tokenizer(text)["input_ids"]
    vocabulary = tiny.clip_vocabulary()
    assert clip_ids[:4] == [vocabulary[token] for token in ("<|startoftext|>", "a</w>", "photo</w>", "of</w>")]
    assert clip_ids[-1] == len(vocabulary) - 1
    t5_ids = t5_tokenizer(text, padding="max_length", max_length=20)["input_ids"]
    assert t5_ids[:3] == [4, 5, 6]
    assert t5_ids[-1] == 0
    assert 1 in t5_ids
    with LazyTensors(paths["clip_l"]) as tensors:
        assert tensors["text_model.embeddings.token_embedding.weight"].shape[0] == len(vocabulary)
    with LazyTensors(paths["t5xxl"]) as tensors:
        assert tensors["shared.weight"].shape[0] == len(tiny.t5_vocabulary()) > max(t5_ids)
