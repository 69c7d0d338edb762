"""The tools for FLUX.1: merging, extracting, converting."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library import files
from library.models import loading
from library.models.flux import image_ids, patchify, text_ids
from library.models.keymaps import Mapped, flux_to_diffusers
from networks import convert_flux_lora, flux_extract_lora, flux_merge_lora, lora_flux, oft_flux
from networks.base import Network
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = ("lora", "split", "dora", "loha", "lokr", "oft")
LOAD: Mapping[str, Callable[[Path], nn.Module]] = {
    "flux": loading.load_flux,
    "clip_l": loading.load_clip,
    "t5xxl": loading.load_t5,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flux tools")
    return {
        "flux": tiny.write_flux(folder / "flux.safetensors", single=1),
        "clip_l": tiny.write_clip_l(folder / "clip_l.safetensors"),
        "t5xxl": tiny.write_t5(folder / "t5xxl.safetensors"),
    }


def network(models: Mapping[str, Path], kind: str = "lora", seed: int = 1, dim: int = 4) -> Network:
    """A network that does something, for all parts."""
    flux, clip, t5 = (load(models[name]) for name, load in LOAD.items())
    torch.manual_seed(seed)
    if kind == "oft":
        made = oft_flux.create_network(1.0, 4, 0.05, None, [], flux, enable_all_linear="True")
    else:
        more = {"split_qkv": "True"} if kind == "split" else {"algo": kind}
        made = lora_flux.create_network(1.0, dim, 2.0, None, [clip, t5], flux, train_t5xxl="True", **more)
    made.apply_to()
    made.restore()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "dora_scale" in name:
                parameter.mul_(1.2)
            else:
                parameter.normal_(std=0.5 if kind == "loha" else 0.15)
    return made


def write(made: Network, path: Path, **metadata: str) -> Path:
    made.save_weights(path, metadata_={"ss_network_module": "networks.lora_flux", **metadata})
    return path


def answers(models: Mapping[str, Path], file: Path | None = None, strength: float = 1.0) -> dict[str, Tensor]:
    """What the models answer, with a network beside them or without."""
    flux, clip, t5 = (load(models[name]).eval() for name, load in LOAD.items())
    if file is not None:
        module: Any = oft_flux if any("oft_blocks" in name for name in files.header(file).tensors) else lora_flux
        made, tensors = module.create_network_from_weights(strength, file, None, [clip, t5], flux, for_inference=True)
        made.apply_to()
        made.load_tensors(tensors)
    generator = torch.Generator().manual_seed(3)
    latents, txt = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    ids = torch.arange(1, 11)[None]
    with torch.no_grad():
        image = flux(
            img=patchify(latents),
            img_ids=image_ids(latents),
            txt=txt,
            txt_ids=text_ids(txt),
            timesteps=torch.tensor([0.4]),
            pooled=torch.randn(1, 32, generator=generator),
            guidance=torch.tensor([3.5]),
        )
        return {
            "flux": image,
            "clip_l": clip(input_ids=ids).last_hidden_state,
            "t5xxl": t5(input_ids=ids).last_hidden_state,
        }


def merge_into(models: Mapping[str, Path], out: Path, *more: str) -> dict[str, Path]:
    """Merges into all three parts."""
    results = {name: out / f"{name}.safetensors" for name in models}
    flux_merge_lora.main(
        [
            *("--flux_model", str(models["flux"]), "--save_to", str(results["flux"])),
            *("--clip_l", str(models["clip_l"]), "--clip_l_save_to", str(results["clip_l"])),
            *("--t5xxl", str(models["t5xxl"]), "--t5xxl_save_to", str(results["t5xxl"])),
            *more,
        ]
    )
    return results


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def read(path: Path) -> dict[str, Tensor]:
    return dict(files.LazyTensors(path, mmap=False))


def diffusers_folder(flux: Path, folder: Path, shards: int = 2) -> Path:
    """The transformer in a Diffusers folder, as shards with an index."""
    state = read(flux)
    tensors = dict(Mapped(state, flux_to_diffusers({name: tuple(tensor.shape) for name, tensor in state.items()})))
    where = folder / "transformer"
    where.mkdir(parents=True)
    names = sorted(tensors)
    places = {}
    for number in range(shards):
        name = f"diffusion_pytorch_model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key].contiguous() for key in names[number::shards]}
        files.save_safetensors(part, where / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"weight_map": places, "metadata": {}}
    (where / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


# into models


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_answers_like_model_and_network(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    file = write(network(models, kind), tmp_path / "net.safetensors")
    parts = models if kind != "oft" else {"flux": models["flux"]}
    if kind == "oft":
        merged = {"flux": tmp_path / "merged.safetensors"}
        flux_merge_lora.main(
            [
                *("--flux_model", str(models["flux"]), "--models", str(file)),
                *("--ratios", "0.7", "--save_to", str(merged["flux"])),
            ]
        )
    else:
        merged = merge_into(models, tmp_path / "out", "--models", str(file), "--ratios", "0.7")
    plain, wanted, found = answers(models), answers(models, file, 0.7), answers({**models, **merged})
    for name in parts:
        assert error(wanted[name], plain[name]) > 0.01, "the network does nothing"
        assert error(found[name], wanted[name]) < 1e-4, name
    for name, path in merged.items():
        assert files.header(path).shapes == files.header(models[name]).shapes


def test_two_networks_add_up_and_take_themselves_back(models: dict[str, Path], tmp_path: Path) -> None:
    first = write(network(models, seed=1), tmp_path / "a.safetensors")
    second = write(network(models, "loha", seed=2), tmp_path / "b.safetensors")
    both = merge_into(models, tmp_path / "both", "--models", str(first), str(second), "--ratios", "0.5", "-0.3")
    one = merge_into(models, tmp_path / "one", "--models", str(first), "--ratios", "0.5")
    two = merge_into(one, tmp_path / "two", "--models", str(second), "--ratios", "-0.3")
    back = merge_into(one, tmp_path / "back", "--models", str(first), "--ratios", "-0.5")
    for name in models:
        base = read(models[name])
        after, whole = read(two[name]), read(both[name])
        for key, tensor in read(back[name]).items():
            torch.testing.assert_close(tensor, base[key], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(after[key], whole[key], atol=1e-5, rtol=1e-5)


def test_names_of_diffusers_do_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    file, other = write(network(models), tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    convert_flux_lora.main(
        ["--src", "sd-scripts", "--dst", "ai-toolkit", "--src_path", str(file), "--dst_path", str(other)]
    )
    ours = merge_into(models, tmp_path / "ours", "--models", str(file))
    theirs = merge_into(models, tmp_path / "theirs", "--models", str(other), "--diffusers")
    for name in models:
        wanted = read(ours[name])
        for key, tensor in read(theirs[name]).items():
            torch.testing.assert_close(tensor, wanted[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp8", "bf16", "fp16", "float"])
def test_types_of_the_result(models: dict[str, Path], tmp_path: Path, precision: str) -> None:
    file, out = write(network(models), tmp_path / "a.safetensors"), tmp_path / "m.safetensors"
    base = ["--flux_model", str(models["flux"]), "--models", str(file), "--save_to", str(out)]
    flux_merge_lora.main([*base, "--mem_eff_load_save", "--save_precision", precision])
    wanted = {"fp8": "F8_E4M3", "bf16": "BF16", "fp16": "F16", "float": "F32"}[precision]
    assert {info.dtype for info in files.header(out).tensors.values()} == {wanted}
    loading.load_flux(out)


def test_the_type_of_the_model_stays(tmp_path: Path, models: dict[str, Path]) -> None:
    half = tiny.write_flux(
        tmp_path / "half.safetensors", single=1, dtype=torch.bfloat16, prefix="model.diffusion_model."
    )
    file, out = write(network(models), tmp_path / "a.safetensors"), tmp_path / "m.safetensors"
    flux_merge_lora.main(["--flux_model", str(half), "--models", str(file), "--save_to", str(out)])
    assert files.header(out).tensors.keys() == files.header(half).tensors.keys()
    assert {info.dtype for info in files.header(out).tensors.values()} == {"BF16"}


def test_a_diffusers_folder_becomes_one_file(models: dict[str, Path], tmp_path: Path) -> None:
    file, out = write(network(models), tmp_path / "a.safetensors"), tmp_path / "m.safetensors"
    plain = merge_into(models, tmp_path / "plain", "--models", str(file))["flux"]
    folder = diffusers_folder(models["flux"], tmp_path / "FLUX.1-dev")
    flux_merge_lora.main(["--flux_model", str(folder), "--models", str(file), "--save_to", str(out)])
    wanted, found = read(plain), read(out)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_file_with_scales_is_merged_into_what_it_means(models: dict[str, Path], tmp_path: Path) -> None:
    base = read(models["flux"])
    name = "double_blocks.0.img_attn.proj.weight"
    scaled = {**base, name: (base[name] / 0.01).to(torch.float8_e4m3fn), name[:-6] + "scale_weight": torch.tensor(0.01)}
    files.save_safetensors(scaled, tmp_path / "scaled.safetensors")
    file, out = write(network(models), tmp_path / "a.safetensors"), tmp_path / "m.safetensors"
    flux_merge_lora.main(
        ["--flux_model", str(tmp_path / "scaled.safetensors"), "--models", str(file), "--save_to", str(out)]
    )
    plain = merge_into(models, tmp_path / "plain", "--models", str(file))["flux"]
    assert files.header(out).tensors[name].dtype == "BF16"
    assert error(read(out)[name].float(), read(plain)[name]) < 0.05


def test_metadata_and_report(models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(network(models), tmp_path / "a.safetensors", **{"modelspec.title": "style"})
    caplog.set_level("INFO")
    merged = merge_into(models, tmp_path / "out", "--models", str(file))
    facts = files.header(merged["flux"]).metadata
    assert facts["modelspec.architecture"] == "flux-1-dev"
    assert facts["modelspec.title"] == "flux"
    assert facts["modelspec.merged_from"] == "flux, style"
    assert [line for line in caplog.messages if line.startswith("merged a.safetensors: ") and "norm" in line]
    merged = merge_into(models, tmp_path / "bare", "--models", str(file), "--no_metadata")
    assert not files.header(merged["flux"]).metadata


def test_modules_of_parts_that_are_not_given_are_named(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(network(models), tmp_path / "a.safetensors")
    base = ["--flux_model", str(models["flux"]), "--models", str(file), "--save_to", str(tmp_path / "m.safetensors")]
    flux_merge_lora.main(base)
    assert [line for line in caplog.messages if "12 modules are left out: --clip_l isn't given" in line]
    assert [line for line in caplog.messages if "14 modules are left out: --t5xxl isn't given" in line]


# with each other


def module_delta(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    down, up = (tensors[f"{name}.lora_{key}.weight"].float() for key in ("down", "up"))
    return float(tensors[f"{name}.alpha"]) / len(down) * up @ down


@pytest.mark.parametrize("more", [(), ("--shuffle",)])
def test_concatenated_networks_are_the_exact_sum(
    models: dict[str, Path], tmp_path: Path, more: tuple[str, ...]
) -> None:
    first = write(network(models, seed=1), tmp_path / "a.safetensors")
    second = write(network(models, seed=2, dim=3), tmp_path / "b.safetensors")
    out = tmp_path / "sum.safetensors"
    flux_merge_lora.main(
        ["--models", str(first), str(second), "--ratios", "0.7", "-0.3", "--concat", "--save_to", str(out), *more]
    )
    a, b, found = read(first), read(second), read(out)
    for name in {key.partition(".")[0] for key in a}:
        torch.testing.assert_close(
            module_delta(found, name), 0.7 * module_delta(a, name) - 0.3 * module_delta(b, name), atol=1e-6, rtol=1e-5
        )
    facts = files.header(out).metadata
    assert facts["ss_network_module"] == "networks.lora_flux"
    assert (facts["ss_network_dim"], facts["ss_network_alpha"]) == ("7", "7")
    assert facts["ss_base_model_version"] == "flux1"
    assert facts["modelspec.merged_from"] == "a, b"
    assert len(facts["sshs_model_hash"]) == 64


def test_the_golden_sum(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / "lora_ops.json").read_text("utf-8"))
    name, ours = "lora_unet_a", "lora_unet_double_blocks_0_img_attn_proj"
    paths = []
    for letter in "AB":
        tensors = {key.replace(name, ours): torch.tensor(value) for key, value in golden["inputs"][letter].items()}
        files.save_safetensors(tensors, tmp_path / f"{letter}.safetensors")
        paths.append(str(tmp_path / f"{letter}.safetensors"))
    for ratios in ("1.0/1.0", "0.5/0.5", "0.7/-0.3"):
        out = str(tmp_path / "out.safetensors")
        flux_merge_lora.main(["--models", *paths, "--ratios", *ratios.split("/"), "--concat", "--save_to", out])
        wanted = torch.tensor(golden[f"merge,ratios={ratios}"]["exact_sum"])
        torch.testing.assert_close(module_delta(read(Path(out)), ours), wanted, atol=1e-6, rtol=1e-5)
    plain = str(tmp_path / "plain.safetensors")
    flux_merge_lora.main(["--models", *paths, "--save_to", plain])
    wanted = {key.replace(name, ours): value for key, value in golden["merge,ratios=1.0/1.0"].items()}
    for key, tensor in read(Path(plain)).items():
        torch.testing.assert_close(tensor, torch.tensor(wanted[key]), atol=1e-6, rtol=1e-5)


# extraction


def test_what_was_merged_is_extracted(models: dict[str, Path], tmp_path: Path) -> None:
    made = network(models)
    file, tuned = write(made, tmp_path / "a.safetensors"), tmp_path / "tuned.safetensors"
    base = ["--flux_model", str(models["flux"]), "--models", str(file), "--save_to", str(tuned)]
    flux_merge_lora.main(base)
    out, again = tmp_path / "extracted.safetensors", tmp_path / "again.safetensors"
    flux_extract_lora.main(
        [
            *("--model_org", str(models["flux"]), "--model_tuned", str(tuned), "--save_to", str(out)),
            *("--dim", "4", "--clamp_quantile", "1", "--mem_eff_safe_open"),
        ]
    )
    source, found = read(file), read(out)
    names = {key.partition(".")[0] for key in found}
    assert names == {key.partition(".")[0] for key in source if key.startswith("lora_unet_")}
    for name in names:
        torch.testing.assert_close(module_delta(found, name), module_delta(source, name), atol=1e-5, rtol=1e-4)
    facts = files.header(out).metadata
    assert (facts["ss_network_dim"], facts["ss_network_alpha"]) == ("4", "4")
    assert facts["modelspec.architecture"] == "flux-1-dev/lora"
    flux_merge_lora.main(["--flux_model", str(models["flux"]), "--models", str(out), "--save_to", str(again)])
    wanted = read(tuned)
    assert all(error(tensor, wanted[key]) < 1e-5 for key, tensor in read(again).items())


def test_a_lower_rank_leaves_out_the_smallest_values(models: dict[str, Path], tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.safetensors"
    base, key = read(models["flux"]), "single_blocks.0.linear2.weight"
    torch.manual_seed(4)
    change = 0.1 * torch.randn_like(base[key])
    files.save_safetensors({**base, key: base[key] + change, "img_in.bias": base["img_in.bias"] + 1}, tuned)
    out = tmp_path / "l.safetensors"
    flux_extract_lora.main(
        [
            *("--model_org", str(models["flux"]), "--model_tuned", str(tuned), "--save_to", str(out), "--dim", "8"),
            *("--clamp_quantile", "1", "--exact", "--save_precision", "bf16"),
        ]
    )
    found = read(out)
    assert {name.partition(".")[0] for name in found} == {"lora_unet_single_blocks_0_linear2"}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    values = torch.linalg.svdvals(change)
    left = float((module_delta(found, "lora_unet_single_blocks_0_linear2") - change).norm())
    assert left == pytest.approx(float(values[8:].square().sum().sqrt()), rel=0.01)
