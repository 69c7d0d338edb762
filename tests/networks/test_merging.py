"""Adapters merged into checkpoints, layer by layer: as if they ran beside the model. And where modules lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.files import LazyTensors, save_safetensors
from library.log import DataError
from library.models import keymaps_sd
from library.models.checkpoints_sd import find_checkpoint
from library.models.keymaps import Mapped
from networks import dylora, loha, lokr, lora, lora_fa, lora_flux, oft, oft_flux
from networks.algebra import AdapterFile, BlockRatios, Merged, Source, differences
from networks.base import Network
from networks.places import clip_places, flux_places, sd_places, sdxl_aliases, t5_places
from networks.unet import parts_of
from tests import tiny_sd
from tests.networks import tiny_models, tiny_unets
from tests.networks.tiny_unets import answer, fill

GOLDEN = Path(__file__).parent.parent / "golden"
VERSIONS = ("1", "2", "xl")


def golden(name: str) -> dict[str, dict[str, tuple[int, ...]]]:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# places


@pytest.mark.parametrize("model", ["sd15", "sd2", "sdxl"])
def test_places_are_the_modules_of_networks(model: str) -> None:
    shapes = {key: tuple(shape) for key, shape in golden(f"{model}_checkpoint_keys.json")["keys"].items()}
    places = sd_places(shapes)
    keys = golden(f"{model}_lora_keys.json")
    groups = [value for name, value in keys.items() if name.startswith(("default", "extra_keys"))]
    modules: dict[str, list[int]] = {}
    for group in groups:
        for key, shape in group.items():
            if key.endswith("lora_down.weight"):
                modules[key.partition(".")[0]] = list(shape)
    assert modules.keys() == {name for name, place in places.items() if place.usual}
    for name, shape in modules.items():
        assert places[name].shape[1] == shape[1], name
        wanted = shapes[places[name].key]
        rows = places[name].rows
        assert places[name].shape[0] == (wanted[0] if rows is None else rows[1] - rows[0])


def test_layers_outside_of_blocks_have_places_for_files_from_elsewhere() -> None:
    shapes = {key: tuple(shape) for key, shape in golden("sdxl_checkpoint_keys.json")["keys"].items()}
    others = {name for name, place in sd_places(shapes).items() if not place.usual}
    names = "input_blocks_0_0 out_2 time_embed_0 time_embed_2 label_emb_0_0 label_emb_0_2"
    assert others == {f"lora_unet_{name}" for name in names.split()}


def test_names_after_diffusers_lead_to_the_same_places() -> None:
    shapes = {key: tuple(shape) for key, shape in golden("sdxl_checkpoint_keys.json")["keys"].items()}
    aliases = sdxl_aliases(shapes)
    assert aliases["lora_unet_down_blocks_1_attentions_0_proj_in"] == "lora_unet_input_blocks_4_1_proj_in"
    assert aliases["lora_unet_mid_block_resnets_1_conv1"] == "lora_unet_middle_block_2_in_layers_2"
    usual = {name for name, place in sd_places(shapes).items() if place.usual and name.startswith("lora_unet_")}
    assert set(aliases.values()) == usual


def test_places_of_flux_and_its_encoders_are_the_modules_of_networks() -> None:
    keys, files = golden("flux_lora_keys.json"), golden("flux_checkpoint_keys.json")
    shapes = {part: {key: tuple(shape) for key, shape in files[part].items()} for part in ("dev", "clip_l", "t5xxl")}
    places = flux_places({f"model.diffusion_model.{key}": shape for key, shape in shapes["dev"].items()})
    places |= clip_places(shapes["clip_l"], "lora_te1", "textencoder 1") | t5_places(shapes["t5xxl"])
    modules = {
        key.partition(".")[0]
        for group in keys.values()
        if isinstance(group, dict)
        for key in group
        if key.startswith("lora_") and "." in key
    }
    usual = {name for name, place in places.items() if place.usual}
    assert modules <= usual
    assert len(usual) == 304 + 8 + 72 + 168
    assert places["lora_unet_single_blocks_0_linear1"].parts == (3072, 3072, 3072, 12288)
    assert places["lora_unet_double_blocks_0_txt_attn_qkv"].key.startswith("model.diffusion_model.double_blocks.0")
    assert not places["lora_unet_final_layer_linear"].usual
    with pytest.raises(DataError, match=r"no FLUX\.1"):
        flux_places({"a.weight": (1, 1)})


# merging: every network on every family


SD_NETWORKS: dict[str, tuple[Callable[..., Network], dict[str, str]]] = {
    "lora": (lora.create_network, {}),
    "lora with convolutions": (lora.create_network, {"conv_dim": "2"}),
    "lora_fa": (lora_fa.create_network, {}),
    "dylora": (dylora.create_network, {"unit": "2"}),
    "dora": (lora.create_network, {"algo": "dora", "conv_dim": "2"}),
    "loha": (lora.create_network, {"algo": "loha", "conv_dim": "2", "use_tucker": "True"}),
    "lokr": (lora.create_network, {"algo": "lokr", "factor": "4", "conv_dim": "2"}),
    "oft": (oft.create_network, {"enable_conv": "True"}),
}
FLUX_NETWORKS: dict[str, tuple[Callable[..., Network], dict[str, str]]] = {
    "lora": (lora_flux.create_network, {"in_dims": "2,2,2,2,2", "train_t5xxl": "True"}),
    "split": (lora_flux.create_network, {"split_qkv": "True"}),
    "dora": (lora_flux.create_network, {"algo": "dora"}),
    "loha": (loha.create_network, {}),
    "lokr": (lokr.create_network, {"factor": "4"}),
    "oft": (oft_flux.create_network, {"enable_all_linear": "True"}),
}


@cache
def single(version: str) -> dict[str, Tensor]:
    return tiny_sd.single_tensors(version)  # type: ignore[arg-type]


def unet_of(version: str) -> nn.Module:
    return tiny_unets.unet(sdxl=version == "xl", linear=version == "2")


def checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """A U-Net as single files have it, and nothing else."""
    state = model.state_dict()
    names = Mapped(state, keymaps_sd.unet_to_ldm(shapes_of(state)))
    return {f"model.diffusion_model.{name}": tensor.clone() for name, tensor in names.items()}


def refill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    model.load_state_dict(dict(Mapped(tensors, keymaps_sd.unet_from_file(shapes_of(tensors)))))


def tensors_of(network: Network) -> dict[str, Tensor]:
    """The file that a network makes."""
    parts = ((adapter.name, adapter.file_tensors()) for adapter in network.created)
    return {f"{name}.{key}": tensor.detach() for name, tensors in parts for key, tensor in tensors.items()}


def beside(network: Network, multiplier: float, speak: Callable[[], Tensor]) -> Tensor:
    """What models say while the network runs beside them."""
    network.eval()
    network.set_multiplier(multiplier)
    network.apply_to()
    try:
        with torch.no_grad():
            return speak()
    finally:
        network.restore()


@pytest.mark.parametrize("version", ["1", "xl"])
@pytest.mark.parametrize("name", SD_NETWORKS)
def test_a_merged_unet_is_one_with_the_network_beside_it(name: str, version: str) -> None:
    create, arguments = SD_NETWORKS[name]
    model = unet_of(version)
    network = fill(create(1.0, 2, 0.02 if name == "oft" else 1.0, None, None, model, **arguments), std=0.2)
    before, expected = answer(model), beside(network, 0.7, lambda: answer(model))
    file, base = AdapterFile(tensors_of(network), "a.safetensors"), checkpoint(model)
    merged = Merged(base, sd_places(shapes_of(base)), [Source(file, 0.7)])
    refill(model, merged)
    assert float((expected - before).abs().max()) > 1e-3
    assert torch.allclose(answer(model), expected, rtol=1e-4, atol=1e-4)
    assert f"{len(file)} modules (unet {len(file)})" in merged.report.lines()[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_text_encoders_are_merged_where_checkpoints_keep_them(version: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(single(version), path)
    encoders = tiny_sd.encoders(version)  # type: ignore[arg-type]
    network = fill(lora.create_network(1.0, 2, 1.0, None, list(encoders.values()), None), std=0.1)
    file = AdapterFile(tensors_of(network), "a.safetensors")
    assert len(file) == 12 * len(encoders)
    out = tmp_path / "merged.safetensors"
    with LazyTensors(path, mmap=False) as base:
        Merged(base, sd_places(base.shapes), [Source(file, 0.5)]).save(out, {"a": "b"})
    role = "sdxl" if version == "xl" else "sd"
    changes = {adapter.name: adapter.delta() for adapter in network.created}
    for index, name in enumerate(encoders):
        before, after = find_checkpoint(path, role).part(name), find_checkpoint(out, role).part(name)
        with before.opened() as old, after.opened() as new:
            prefix = f"lora_te{index + 1}_" if version == "xl" else "lora_te_"
            for key in old:
                module = prefix + key.removesuffix(".weight").replace(".", "_")
                change = changes.get(module, torch.zeros(())) if key.endswith(".weight") else torch.zeros(())
                assert torch.allclose(new[key], old[key] + 0.5 * change, atol=1e-5), key


@pytest.mark.parametrize("name", FLUX_NETWORKS)
def test_a_merged_flux_is_one_with_the_network_beside_it(name: str) -> None:
    create, arguments = FLUX_NETWORKS[name]
    model, inputs = tiny_models.flux(), tiny_models.flux_inputs()
    network = fill(create(1.0, 2, 0.02 if name == "oft" else 1.0, None, None, model, **arguments), std=0.1)
    expected = beside(network, 0.7, lambda: model(**inputs))
    before = model(**inputs)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = AdapterFile(tensors_of(network), "a.safetensors")
    model.load_state_dict(dict(Merged(state, flux_places(shapes_of(state)), [Source(file, 0.7)])))
    assert float((expected - before).abs().max()) > 1e-3
    assert torch.allclose(model(**inputs), expected, rtol=1e-4, atol=1e-4)


def flux_file(path: str = "a.safetensors", seed: int = 8, **arguments: str) -> tuple[AdapterFile, Network]:
    network = fill(lora_flux.create_network(1.0, 2, 1.0, None, None, tiny_models.flux(), **arguments), std=0.1)
    torch.manual_seed(seed)
    for adapter in network.created:
        nn.init.normal_(adapter.lora_up.weight, std=0.1)
    return AdapterFile(tensors_of(network), path), network


def test_several_files_are_the_sum_of_their_changes_and_can_be_taken_off_again() -> None:
    state = dict(tiny_models.flux().state_dict())
    places = flux_places(shapes_of(state))
    files = [flux_file("a", 1)[0], flux_file("b", 2)[0]]
    both = dict(Merged(state, places, [Source(files[0], 1.0), Source(files[1], -0.3)]))
    back = dict(Merged(both, places, [Source(files[0], -1.0), Source(files[1], 0.3)]))
    assert all(torch.allclose(back[key], state[key], atol=1e-6) for key in state)
    assert sum(not torch.equal(both[key], state[key]) for key in state) == len(files[0])


def test_ratios_by_block_hit_their_blocks_only() -> None:
    model = unet_of("1")
    network = fill(lora.create_network(1.0, 2, 1.0, None, None, model), std=0.1)
    file = AdapterFile(tensors_of(network), "a")
    ratios = BlockRatios.of([0.0] * 7 + [1.0] + [0.0] * 9)
    base = checkpoint(model)
    merged = Merged(base, sd_places(shapes_of(base)), [Source(file, 1.0, ratios)])
    changed = {key for key in base if not torch.equal(merged[key], base[key])}
    assert changed
    assert all(".middle_block." in key for key in changed)


# types, refusals, files


def test_what_is_written_has_the_wanted_types_and_keys(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in tiny_models.flux().state_dict().items()}
    state["step"] = torch.tensor(3)
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_safetensors(state, path)
    file, _ = flux_file()
    with LazyTensors(path, mmap=False) as base:
        Merged(base, flux_places(base.shapes), [Source(file)]).save(out)
        same = LazyTensors(out)
        assert {key: tensor.dtype for key, tensor in same.items()} == {key: t.dtype for key, t in state.items()}
        Merged(base, flux_places(base.shapes), [Source(file)], dtype=torch.float16, progress="x").save(out)
        assert {tensor.dtype for tensor in LazyTensors(out).values()} == {torch.float16, torch.int64}


def refused(tensors: Mapping[str, Tensor], said: str, state: Mapping[str, Tensor] | None = None) -> None:
    base = dict(state or tiny_models.flux().state_dict())
    with pytest.raises(DataError, match=said):
        dict(Merged(base, flux_places(shapes_of(base)), [Source(AdapterFile(tensors, "bad.safetensors"))]))


def test_what_does_not_fit_is_named_with_its_first_keys_and_family() -> None:
    _, network = flux_file()
    good = tensors_of(network)
    sdxl = {f"lora_unet_input_blocks_4_1_proj_in.{key.partition('.')[2]}": tensor for key, tensor in good.items()}
    refused(sdxl, r"1 of 1 modules are for no layer of it: lora_unet_input_blocks_4_1_proj_in\..*for SDXL")
    wide = {key: torch.cat([t, t], 1) if key.endswith("lora_down.weight") else t for key, t in good.items()}
    refused(wide, "modules are for layers of other sizes: lora_unet_double_blocks_0")
    refused({**good, "lora_unet_txt_in.diff": torch.ones(2)}, "1 of 30 modules are of an unknown kind")
    key = next(name for name in good if name.endswith("lora_up.weight"))
    refused({**good, key: torch.full_like(good[key], torch.nan)}, f"{key} has values that aren't finite")


def zeroed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor * (not key.endswith("lora_up.weight")) for key, tensor in tensors.items()}


@pytest.mark.parametrize("ratio", [1.0, 0.0])
def test_a_merge_that_changes_nothing_leaves_no_file(ratio: float, tmp_path: Path) -> None:
    state, (_, network) = dict(tiny_models.flux().state_dict()), flux_file()
    tensors = tensors_of(network)
    file = AdapterFile(zeroed(tensors) if ratio else tensors, "a")
    with pytest.raises(DataError, match="would change nothing"):
        Merged(state, flux_places(shapes_of(state)), [Source(file, ratio)]).save(tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_values_too_large_for_the_type_are_refused(tmp_path: Path) -> None:
    state, (file, _) = dict(tiny_models.flux().state_dict()), flux_file()
    merged = Merged(state, flux_places(shapes_of(state)), [Source(file, 1e7)], dtype=torch.float16)
    with pytest.raises(DataError, match="too large for float16"):
        merged.save(tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_modules_of_parts_that_are_not_there_can_be_left_out() -> None:
    state = dict(tiny_models.flux().state_dict())
    network = lora_flux.create_network(1.0, 2, 1.0, None, [tiny_models.clip_l(), None], tiny_models.flux())
    file = AdapterFile(tensors_of(fill(network)), "a")
    places = flux_places(shapes_of(state))
    with pytest.raises(DataError, match="lora_te1_"):
        Merged(state, places, [Source(file)])
    merged = Merged(state, places, [Source(file)], left_out=("lora_te",))
    dict(merged)
    merged.report.check()
    assert "textencoder" not in merged.report.lines()[0]


# differences


def test_differences_are_found_layer_by_layer() -> None:
    old, new = single("xl"), tiny_sd.single_tensors("xl", seed=40)
    places = sd_places(shapes_of(old))
    found: Iterator[tuple[str, Tensor]] = differences(old, new, places, places)
    count = 0
    for module, delta in found:
        place = places[module]
        rows = slice(None) if place.rows is None else slice(*place.rows)
        wanted = (new[place.key][rows] - old[place.key][rows]).reshape(place.shape)
        assert torch.allclose(delta, wanted)
        count += 1
    assert count == sum(place.usual for place in places.values())
    smaller = {name: place for name, place in places.items() if "lora_te1" not in name}
    with pytest.raises(DataError, match="12 layers are only in one of the models"):
        next(differences(old, new, places, smaller))


def test_networks_of_tiny_models_are_found_by_their_places() -> None:
    for version in VERSIONS:
        model = unet_of(version)
        names = {target.name for target, _ in parts_of(None, model).targets()}
        places = sd_places(shapes_of(checkpoint(model)))
        assert names == {name for name, place in places.items() if place.usual}
