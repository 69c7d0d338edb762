"""The FLUX network: names and shapes in files, reading, merging, learning-rate groups, arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from library import files
from library.log import DataError, UserError
from library.models.flux import Flux, FluxConfig
from networks import reading
from networks.base import Network
from networks.lora_flux import create_network, create_network_from_weights
from tests.networks import tiny_models

GOLDEN = Path(__file__).parents[1] / "golden"


def network(
    multiplier: float = 1.0, *, t5: nn.Module | None = None, **arguments: object
) -> tuple[Network, Flux, nn.Module]:
    model, clip = tiny_models.flux(), tiny_models.clip_l()
    torch.manual_seed(7)
    made = create_network(multiplier, 4, 2.0, None, [clip, t5], model, **arguments)  # type: ignore[arg-type]
    return made, model, clip


def fill(made: Network) -> None:
    torch.manual_seed(8)
    for adapter in made.created:
        nn.init.normal_(adapter.lora_up.weight, std=0.1)  # type: ignore[union-attr, arg-type]


@pytest.fixture(scope="module")
def full_size() -> tuple[Flux, nn.Module, nn.Module]:
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        t5 = T5EncoderModel(
            T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
        )
        return Flux(FluxConfig()), clip, t5


@pytest.mark.parametrize(
    "arguments",
    [{}, {"train_t5xxl": "true"}, {"split_qkv": "True"}, {"in_dims": "[4,4,4,4,4]"}],
    ids=lambda arguments: "".join(arguments) or "default",
)
def test_names_and_shapes_at_full_size_are_those_of_the_reference(
    full_size: tuple[Flux, nn.Module, nn.Module], arguments: dict[str, str]
) -> None:
    golden = json.loads((GOLDEN / "flux_lora_keys.json").read_text("utf-8"))
    model, clip, t5 = full_size
    with torch.device("meta"):
        made = create_network(1.0, 4, 1, None, [clip, t5], model, **arguments)
        made.apply_to()
        found = {
            f"{adapter.name}.{key}": list(tensor.shape)
            for adapter in made.adapters
            for key, tensor in adapter.file_tensors().items()
        }
    made.restore()
    wanted = golden["default_with_clip_l_and_t5xxl"]
    if "train_t5xxl" not in arguments:
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith("lora_te3")}
    wanted |= golden["split_qkv_shapes_that_differ"] if "split_qkv" in arguments else {}
    wanted |= golden["extra_keys_with_in_dims_4"] if "in_dims" in arguments else {}
    assert found == wanted
    lists = json.loads((GOLDEN / "lora_modules_flux.json").read_text("utf-8"))
    modules = {**lists["flux"], **lists.get(f"flux,{next(iter(arguments), '')} adds", {})}
    assert sorted(adapter.name for adapter in made.adapters) == sorted(modules)


def test_alpha_is_stored_in_the_type_it_came_in() -> None:
    model = tiny_models.flux()
    for alpha, dtype in ((1, torch.int64), (1.0, torch.float32), (0, torch.int64), (None, torch.float32)):
        made = create_network(1.0, 4, alpha, None, [None, None], model)
        stored = made.created[0].alpha
        assert stored.dtype == dtype  # type: ignore[union-attr]
        assert float(stored) == (4 if alpha == 0 else 1)  # type: ignore[arg-type]


def test_files_have_text_model_whatever_transformers_calls_its_modules() -> None:
    class Older(nn.Module):  # with the level that transformers 5 has dropped
        def __init__(self) -> None:
            super().__init__()
            self.text_model = tiny_models.clip_l()

    names = []
    for clip in (tiny_models.clip_l(), Older()):
        made = create_network(1.0, 4, 1, None, [clip, None], None)
        names.append([adapter.name for adapter in made.created])
    assert names[0] == names[1]
    assert len(names[0]) == 12
    assert all(name.startswith("lora_te1_text_model_encoder_layers_") for name in names[0])


def test_a_new_network_changes_nothing_and_can_be_taken_off() -> None:
    made, model, _ = network()
    inputs = tiny_models.flux_inputs()
    before = model(**inputs)
    made.apply_to()
    torch.testing.assert_close(model(**inputs), before)  # not equal bit for bit: tokens are multiplied in one batch
    fill(made)
    assert not torch.allclose(model(**inputs), before, atol=1e-3)
    made.set_multiplier(0)
    assert torch.equal(model(**inputs), before)
    made.set_multiplier(1)
    made.restore()
    assert torch.equal(model(**inputs), before)


def clip_says(clip: nn.Module) -> Tensor:
    return clip(input_ids=torch.arange(10)[None]).last_hidden_state  # type: ignore[no-any-return]


def test_merged_equals_applied(tmp_path: Path) -> None:
    made, model, clip = network(0.7)
    fill(made)
    made.apply_to()
    inputs = tiny_models.flux_inputs()
    applied, applied_text = model(**inputs), clip_says(clip)
    path = tmp_path / "n.safetensors"
    made.save_weights(path, None, {"ss_a": "b"})
    made.restore()
    again, tensors = create_network_from_weights(0.7, path, None, [clip, None], model, for_inference=True)
    again.merge_to([clip, None], model, tensors)
    torch.testing.assert_close(model(**inputs), applied, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clip_says(clip), applied_text, rtol=1e-5, atol=1e-5)
    again.set_multiplier(-0.7)
    again.merge_to()
    torch.testing.assert_close(
        model.double_blocks[0].img_mlp[0].weight, tiny_models.flux().double_blocks[0].img_mlp[0].weight
    )


def test_a_file_reads_back_bit_for_bit(tmp_path: Path) -> None:
    made, model, clip = network()
    fill(made)
    made.apply_to()
    path = tmp_path / "n.safetensors"
    made.save_weights(path, None, None)
    metadata = files.header(path).metadata
    assert set(metadata) == {"sshs_model_hash", "sshs_legacy_hash"}
    again, _ = create_network_from_weights(1.0, path, None, [clip, None], model)
    again.apply_to()
    report = again.load_weights(path)
    assert "0 not in the file" in report
    assert again.state_dict().keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    made.save_weights(path, torch.bfloat16, None)
    assert {info.dtype for info in files.header(path).tensors.values()} == {"BF16"}
    assert next(made.parameters()).dtype == torch.float32


def test_reading_keeps_ranks_and_leaves_out_what_a_file_has_not() -> None:
    model, clip, t5 = tiny_models.flux(), tiny_models.clip_l(), tiny_models.t5()
    tensors = {
        "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight": torch.randn(3, 64),
        "lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight": torch.randn(192, 3),
        "lora_unet_img_in.lora_down.weight": torch.randn(2, 64),
        "lora_unet_img_in.lora_up.weight": torch.randn(64, 2),
        "lora_unet_img_in.alpha": torch.tensor(1.0, dtype=torch.float16),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.randn(5, 24),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": torch.randn(24, 5),
        "lora_unet_unheard_of.lora_down.weight": torch.randn(5, 24),
        "no_dot": torch.zeros(()),
    }
    made, _ = create_network_from_weights(1.0, None, None, [clip, t5], model, weights_sd=tensors)
    assert {adapter.name: (adapter.rank, adapter.scale) for adapter in made.created} == {  # type: ignore[union-attr]
        "lora_unet_double_blocks_1_img_attn_qkv": (3, 1.0),
        "lora_unet_img_in": (2, 0.5),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (5, 1.0),
    }


@pytest.mark.parametrize(
    ("names", "meaning"),
    [
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "FLUX.1-schnell transformer"),
        (["transformer.single_transformer_blocks.0.norm.linear.lora_A.weight"], "Diffusers or PEFT"),
        (["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"], "LoRA for SDXL"),
        (["lora_unet_down_blocks_0_x.lora_down.weight"], "LoRA for SD 1.x or 2.x"),
        (["lora_unet_joint_blocks_0_x.lora_down.weight"], "LoRA for SD3"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lokr_w1"], "LyCORIS"),
        (["what.ever"], "what.ever"),
        ([], "empty"),
    ],
)
def test_a_file_that_does_not_fit_is_named(names: list[str], meaning: str) -> None:
    made, model, clip = network()
    made.apply_to()
    tensors = dict.fromkeys(names, torch.zeros(2, 2))
    with pytest.raises(DataError, match=meaning):
        create_network_from_weights(1.0, None, None, [clip, None], model, weights_sd=tensors)
    with pytest.raises(DataError, match=meaning):
        made.load_tensors(tensors)


def test_pickled_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "n.pt"
    path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"only \.safetensors"):
        reading.read_weights(path)
    with pytest.raises(DataError, match="isn't there"):
        reading.read_weights(tmp_path / "none.safetensors")


def test_a_torch_file_is_written_on_request(tmp_path: Path) -> None:
    made, _, _ = network()
    made.apply_to()
    made.save_weights(tmp_path / "n.pt", torch.float16, {"ss_a": "b"})
    tensors = torch.load(tmp_path / "n.pt", weights_only=True)
    assert set(tensors) == set(made.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["n.pt"]


def test_only_the_wanted_components_are_hooked_and_saved() -> None:
    made, _, _ = network()
    made.apply_to(None, None, False, True)
    assert {name.split("_")[1] for name in made.state_dict()} == {"unet"}
    made, _, _ = network()
    made.apply_to(None, None, True, False)
    assert {name.split("_")[1] for name in made.state_dict()} == {"te1"}
    assert len(made.state_dict()) == 3 * 12


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [
        (([0.1, 0.2], 0.3, 0.4), {"textencoder 1": 0.1, "unet": 0.3}),
        ((None, None, 0.4), {"textencoder 1": 0.4, "unet": 0.4}),
        ((0.1, None, 0.4), {"textencoder 1": 0.1, "unet": 0.4}),
        (([], 0.0, 0.4), {"textencoder 1": 0.4}),
        (([0.0], 0.3, 0.4), {"unet": 0.3}),
    ],
)
def test_learning_rate_groups(rates: tuple[object, ...], wanted: dict[str, float]) -> None:
    made, _, _ = network()
    made.apply_to()
    groups, names = made.prepare_optimizer_params_with_multiple_te_lrs(*rates)  # type: ignore[arg-type]
    assert dict(zip(names, (group["lr"] for group in groups), strict=True)) == wanted
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in made.get_trainable_params()}


def test_loraplus_gives_up_matrices_a_rate_of_their_own() -> None:
    made, _, _ = network(loraplus_lr_ratio="4", loraplus_text_encoder_lr_ratio="2")
    made.apply_to()
    groups, names = made.prepare_optimizer_params_with_multiple_te_lrs([0.1], 0.5, None)
    found = {name: (group["lr"], len(group["params"])) for name, group in zip(names, groups, strict=True)}
    assert found == {
        "textencoder 1": (0.1, 12),
        "textencoder 1 plus": (0.2, 12),
        "unet": (0.5, 29),
        "unet plus": (2.0, 29),
    }


def test_norms_are_kept_below_the_maximum() -> None:
    made, _, _ = network()
    fill(made)
    made.apply_to()
    before = torch.stack([adapter.delta_norm() for adapter in made.adapters])
    limit = float(before.median())
    scaled, mean, largest = made.apply_max_norm_regularization(limit)
    after = torch.stack([adapter.delta().norm() for adapter in made.adapters])
    torch.testing.assert_close(after, before.clamp(max=limit))
    assert int(scaled) == int((before > limit).sum()) > 0
    assert float(largest) == pytest.approx(limit)
    assert float(mean) == pytest.approx(float(before.clamp(min=limit / 2, max=limit).mean()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank_dropuot": "0.1"}, "did you mean rank_dropout"),
        ({"zzz": "1"}, "there are: "),
        ({"rank_dropout": "a lot"}, "no number"),
        ({"module_dropout": "1.5"}, "between 0 and 1"),
        ({"rank_dropout": "nan"}, "out of range"),
        ({"verbose": "maybe"}, "neither True nor False"),
        ({"ggpo_sigma": "0.03", "ggpo_beta": "0.01"}, "later release"),
        ({"train_bloks": "single"}, "did you mean train_blocks"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        network(**arguments)


def test_arguments_reach_the_adapters(caplog: pytest.LogCaptureFixture) -> None:
    made, _, _ = network(rank_dropout="0.1", module_dropout="0.2", neuron_dropout=0.3, conv_dim="4", dropout="0.9")
    dropouts = made.created[0].dropouts  # type: ignore[union-attr]
    assert (dropouts.rank, dropouts.module, dropouts.neuron) == (0.1, 0.2, 0.3)  # type: ignore[union-attr]
    assert "conv_dim has no effect" in caplog.text
    with pytest.raises(UserError, match="rank of 0"):
        create_network(1.0, 0, 1, None, [None, None], tiny_models.flux())


def test_two_networks_lie_over_each_other() -> None:
    first, model, clip = network()
    second = create_network(1.0, 2, 2.0, None, [clip, None], model)
    inputs = tiny_models.flux_inputs()
    for made in (first, second):
        fill(made)
        made.apply_to()
    both = model(**inputs)
    second.restore()
    first.restore()
    for made in (first, second):
        made.merge_to()
    torch.testing.assert_close(both, model(**inputs), rtol=1e-4, atol=1e-5)
