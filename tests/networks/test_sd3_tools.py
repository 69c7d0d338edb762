"""The tools for SD3: merging and extracting, and what tools that aren't for one family do with its files."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library import files
from library.models.keymaps_sd3 import ENCODERS
from library.models.loading_sd3 import Sd3Files, load_encoder, load_mmdit
from networks import lora_sd3
from networks.base import Network
from tests import tiny_sd3
from tests.networks import test_lora_sd3
from tests.tiny_sd3 import Variant

IDS = torch.arange(1, 11)[None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sd3 tools")
    parts = {name: tiny_sd3.write_encoder(folder / f"{name}.safetensors", name) for name in ENCODERS}
    single = {name: tiny_sd3.write_single(folder / f"{name}.safetensors", name) for name in tiny_sd3.VARIANTS}
    return {**parts, **single}


def run(script: str, *argv: object) -> int:
    """The exit code of a script."""
    try:
        importlib.import_module(script).main([str(word) for word in argv])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def merge(*argv: object) -> None:
    assert run("networks.sd3_merge_lora", *argv) == 0


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the mistake."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


def loaded(path: Path, separate: Mapping[str, Path] | None = None) -> list[nn.Module]:
    """The transformer and the encoders."""
    sources = Sd3Files(path, {name: str(file) for name, file in (separate or {}).items()})
    models = [load_mmdit(sources), *(load_encoder(sources, name) for name in ENCODERS)]
    return [model.eval().requires_grad_(False) for model in models]


def network(path: Path, seed: int = 1, dim: int = 4, **arguments: str) -> Network:
    """A network that does something, for all parts."""
    transformer, *encoders = loaded(path)
    torch.manual_seed(seed)
    made = lora_sd3.create_network(1.0, dim, 2.0, None, encoders, transformer, train_t5xxl="True", **arguments)
    made.apply_to()
    made.restore()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "dora_scale" in name:
                parameter.mul_(1.2)
            else:
                parameter.normal_(std=0.5 if arguments.get("algo") == "loha" else 0.12)
    return made


def write(made: Network, path: Path, **metadata: str) -> Path:
    made.save_weights(path, metadata_={"ss_network_module": "networks.lora_sd3", **metadata})
    return path


def said(models: list[nn.Module]) -> list[Tensor]:
    transformer, *encoders = models
    with torch.no_grad():
        return [transformer(**test_lora_sd3.inputs()), *(each(input_ids=IDS).last_hidden_state for each in encoders)]


def said_with(path: Path, file: Path, strength: float = 1.0) -> list[Tensor]:
    """What the models of a checkpoint say with a network beside them."""
    transformer, *encoders = parts = loaded(path)
    made, tensors = lora_sd3.create_network_from_weights(strength, file, None, encoders, transformer)
    made.apply_to()
    made.load_tensors(tensors)
    return said(parts)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def read(path: Path) -> dict[str, Tensor]:
    return dict(files.LazyTensors(path, mmap=False))


def delta(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    down, up = (tensors[f"{name}.lora_{key}.weight"].float() for key in ("down", "up"))
    return float(tensors[f"{name}.alpha"]) / len(down) * (up.flatten(1) @ down.flatten(1))


# into models

KINDS: tuple[tuple[Variant, dict[str, str]], ...] = (
    ("medium", {}),
    ("5-medium", {"emb_dims": "2,2,2,2,2,2"}),
    ("5-large", {"split_qkv": "True"}),
    ("5-medium", {"algo": "dora"}),
    ("medium", {"algo": "loha"}),
    ("5-medium", {"algo": "lokr"}),
)


@pytest.mark.parametrize(("variant", "arguments"), KINDS, ids=str)
def test_a_merged_checkpoint_says_what_model_and_network_say(
    models: dict[str, Path], tmp_path: Path, variant: Variant, arguments: dict[str, str]
) -> None:
    base, out = models[variant], tmp_path / "merged.safetensors"
    file = write(network(base, **arguments), tmp_path / "net.safetensors")
    merge("--sd3_model", base, "--models", file, "--ratios", 0.7, "--save_to", out)
    plain, wanted, found = said(loaded(base)), said_with(base, file, 0.7), said(loaded(out))
    for index in range(4):
        assert error(wanted[index], plain[index]) > 0.01, "the network does nothing"
        assert error(found[index], wanted[index]) < 1e-4, index
    assert files.header(out).shapes == files.header(base).shapes
    facts = files.header(out).metadata
    assert facts["modelspec.architecture"] == f"stable-diffusion-3-{variant}"
    assert facts["modelspec.merged_from"] == f"{variant}, net"


def test_rotations_are_merged(models: dict[str, Path], tmp_path: Path) -> None:
    """Of other programs; layers that are fused are turned apart."""
    torch.manual_seed(0)
    name, blocks = "joint_blocks_0_x_block_attn_qkv", torch.randn(3, 4, 32, 32) / 20
    tensors = {f"oft_unet_{name}.oft_blocks.{index}": blocks[index] for index in range(3)}
    files.save_safetensors({**tensors, f"oft_unet_{name}.alpha": torch.tensor(1.0)}, tmp_path / "oft.safetensors")
    merge(
        "--sd3_model",
        models["medium"],
        "--models",
        tmp_path / "oft.safetensors",
        "--save_to",
        tmp_path / "m.safetensors",
    )
    key = "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    before, after = read(models["medium"])[key], read(tmp_path / "m.safetensors")[key]
    for old, new, own in zip(before.chunk(3), after.chunk(3), blocks, strict=True):
        skew, one = own - own.transpose(1, 2), torch.eye(32)
        turn = (one + skew) @ torch.linalg.inv(one - skew)
        wanted = torch.einsum("bij,bik->bjk", turn, old.view(4, 32, -1)).reshape(old.shape)
        torch.testing.assert_close(new, wanted, atol=1e-5, rtol=1e-4)


def test_encoders_of_their_own_and_layouts_of_others(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = models["5-medium"]
    file = write(network(base), tmp_path / "net.safetensors")
    wanted = said_with(base, file)
    bare = tiny_sd3.write_single(tmp_path / "bare.safetensors", "5-medium", ())
    for layout in ("kohya", "diffusers", "comfyui", "lycoris"):
        source = file if layout == "kohya" else tmp_path / f"net_{layout}.safetensors"
        if layout != "kohya":
            assert run("networks.convert_lora", "--model", file, "--save_to", source, "--to", layout, "--verify") == 0
        results = {name: tmp_path / layout / f"{name}.safetensors" for name in ("sd3", *ENCODERS)}
        words = [word for name in ENCODERS for word in (f"--{name}", models[name], f"--{name}_save_to", results[name])]
        merge("--sd3_model", bare, "--save_to", results["sd3"], "--models", source, *words)
        found = said(loaded(results["sd3"], {name: results[name] for name in ENCODERS}))
        assert all(error(one, other) < 1e-4 for one, other in zip(found, wanted, strict=True)), layout
    caplog.clear()
    merge("--sd3_model", bare, "--models", file, "--save_to", tmp_path / "part.safetensors")
    for name in ENCODERS:
        assert [line for line in caplog.messages if f"modules are left out: --{name} isn't given" in line]


def test_a_diffusers_folder_becomes_a_transformer_in_one_file(models: dict[str, Path], tmp_path: Path) -> None:
    base, out = models["5-medium"], tmp_path / "m.safetensors"
    file = write(network(base), tmp_path / "net.safetensors")
    folder = tiny_sd3.write_folder(tmp_path / "folder", "5-medium", t5xxl=False)
    merge("--sd3_model", folder, "--models", file, "--save_to", out, "--save_precision", "bf16")
    assert set(files.header(out).tensors) == set(tiny_sd3.mmdit("5-medium").state_dict())
    assert {info.dtype for info in files.header(out).tensors.values()} == {"BF16"}
    found = load_mmdit(Sd3Files(out), torch.float32)(**test_lora_sd3.inputs()).detach()
    assert error(found, said_with(base, file)[0]) < 0.03


MISTAKES = {
    "for another family": ("lora_unet_double_blocks_0_img_attn_proj", 128, "E-MERGE-MISFIT", "the file is for FLUX"),
    "no such block": ("lora_unet_joint_blocks_7_x_block_attn_proj", 128, "E-MERGE-MISFIT", "for no layer of it"),
    "another width": ("lora_unet_joint_blocks_0_x_block_attn_proj", 64, "E-MERGE-MISFIT", "layers of other sizes"),
    "nothing for it": ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 64, "E-MERGE-NOTHING", "no network has"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_no_file(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, width, code, words = MISTAKES[case]
    base = tiny_sd3.write_single(tmp_path / "base.safetensors", "medium", ("vae",))
    files.save_safetensors(
        {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(width, 2)},
        tmp_path / "net.safetensors",
    )
    out = tmp_path / "out.safetensors"
    assert run(
        "networks.sd3_merge_lora", "--sd3_model", base, "--models", tmp_path / "net.safetensors", "--save_to", out
    )
    line = error_of(capsys)
    assert f"error[{code}]" in line
    assert words in line
    assert not out.exists()


# with each other, and tools for every family


def test_sums_and_other_ranks(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = models["5-medium"]
    one = write(network(base, emb_dims="2,2,2,2,2,2"), tmp_path / "a.safetensors", ss_base_model_version="5-medium")
    two = write(network(base, seed=2, dim=3), tmp_path / "b.safetensors")
    both, svd, small = (tmp_path / f"{name}.safetensors" for name in ("both", "svd", "small"))
    shared = ("--models", one, two, "--ratios", 0.5, -0.3)
    merge(*shared, "--concat", "--save_to", both)
    assert run("networks.svd_merge_lora", *shared, "--new_rank", 7, "--clamp_quantile", 1, "--save_to", svd) == 0
    assert run("networks.resize_lora", "--model", both, "--new_rank", 2, "--new_conv_rank", 2, "--save_to", small) == 0
    a, b = read(one), read(two)
    for name in {key.partition(".")[0] for key in a}:
        wanted = 0.5 * delta(a, name) - (0.3 * delta(b, name) if f"{name}.alpha" in b else 0)
        for path in (both, svd):
            torch.testing.assert_close(delta(read(path), name), wanted, atol=1e-5, rtol=1e-4)
    for path in (both, svd):
        facts = files.header(path).metadata
        assert facts["ss_network_module"] == "networks.lora_sd3"
        assert facts["ss_base_model_version"] == "5-medium"
        assert facts["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"
    assert {tensor.shape[0] for key, tensor in read(small).items() if "lora_down" in key} == {2}
    for file in (small, both, svd):
        merge("--sd3_model", base, "--models", file, "--save_to", tmp_path / "m.safetensors")
    assert run("networks.check_lora_weights", both) == 0
    assert "lora_unet_x_embedder_proj.lora_down.weight,(2, 16, 2, 2)" in capsys.readouterr().out
    assert run("tools.show_metadata", "--model", both) == 0
    for tool, what in (("merge_lora", "SD 1.x or 2.x"), ("sdxl_merge_lora", "SDXL"), ("flux_merge_lora", "")):
        capsys.readouterr()
        out = tmp_path / "no.safetensors"
        assert run(f"networks.{tool}", "--models", one, "--concat", "--save_to", out)
        line = error_of(capsys)
        assert "for SD3" in line or "match nothing in FLUX.1" in line
        assert "networks/sd3_merge_lora.py" in line
        assert what in line
        assert not out.exists()


def test_kernels_of_loha_are_kernels_in_a_sum(models: dict[str, Path], tmp_path: Path) -> None:
    file = write(network(models["medium"], emb_dims="2,2,2,2,2,2", algo="loha"), tmp_path / "a.safetensors")
    out = tmp_path / "sum.safetensors"
    assert (
        run("networks.svd_merge_lora", "--models", file, "--new_rank", 8, "--new_conv_rank", 2, "--save_to", out) == 0
    )
    assert read(out)["lora_unet_x_embedder_proj.lora_down.weight"].shape == (2, 16, 2, 2)


# extraction


@pytest.mark.parametrize("layout", ["single", "folder"])
def test_what_was_merged_is_extracted(models: dict[str, Path], tmp_path: Path, layout: str) -> None:
    base = models["5-medium"]
    file = write(network(base), tmp_path / "a.safetensors")
    tuned, out, again = (tmp_path / f"{name}.safetensors" for name in ("tuned", "extracted", "again"))
    merge("--sd3_model", base, "--models", file, "--save_to", tuned)
    original = base if layout == "single" else tiny_sd3.write_folder(tmp_path / "folder", "5-medium", t5xxl=False)
    extract = ("--model_org", original, "--model_tuned", tuned, "--save_to", out, "--dim", 4, "--clamp_quantile", 1)
    assert run("networks.sd3_extract_lora", *extract) == 0
    source, found = read(file), read(out)
    names = {key.partition(".")[0] for key in found}
    assert names == {key.partition(".")[0] for key in source if key.startswith("lora_unet_")}
    for name in names:
        torch.testing.assert_close(delta(found, name), delta(source, name), atol=1e-5, rtol=1e-4)
    facts = files.header(out).metadata
    assert facts["ss_network_module"] == "networks.lora_sd3"
    assert facts["ss_base_model_version"] == "5-medium"
    assert facts["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"
    merge("--sd3_model", base, "--models", out, "--save_to", again)
    assert error(said(loaded(again))[0], said(loaded(tuned))[0]) < 1e-4


def test_models_of_two_kinds_are_refused(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    pair = ("--model_org", models["medium"], "--model_tuned", models["5-medium"], "--save_to", out)
    assert run("networks.sd3_extract_lora", *pair)
    assert "error[E-MERGE-MISFIT]" in error_of(capsys)
    assert not out.exists()
