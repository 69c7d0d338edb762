"""Merging into SD and SDXL checkpoints and with each other: merged models answer as models with networks do."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library import files, metadata
from library.models.loading_sd import load_encoders, load_unet
from networks import changes, lora, lora_fa, oft, reading, sums
from networks.adapter_file import AdapterFile
from networks.base import Network
from networks.blocks import LISTS, POSITIONS, position
from networks.merging import Source
from networks.places import sd_places, sdxl_aliases
from tests import tiny_sd
from tests.networks import tiny_unets

GOLDEN = Path(__file__).parents[1] / "golden"
ROLES = {"1": "sd", "2": "sd", "xl": "sdxl"}
SCRIPTS = {"1": "merge_lora", "2": "merge_lora", "xl": "sdxl_merge_lora"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("sd")
    return {version: tiny_sd.write_single(folder / f"{version}.safetensors", version) for version in ROLES}


def run(script: str, *argv: object) -> int:
    """The exit code of a script."""
    try:
        importlib.import_module(f"networks.{script}").main([str(word) for word in argv])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def parts(path: Path, version: str) -> tuple[nn.Module, list[nn.Module]]:
    role = ROLES[version]
    return load_unet(path, role=role), list(load_encoders(path, role=role).values())


@torch.no_grad()
def said(unet: nn.Module, encoders: list[nn.Module]) -> list[Tensor]:
    """What the parts of a model answer."""
    generator = torch.Generator().manual_seed(3)
    width = sum(encoder.config.hidden_size for encoder in encoders)
    added = {"text_embeds": torch.randn(1, 64, generator=generator), "time_ids": torch.ones(1, 6)}
    sample, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, width, generator=generator)
    ids = torch.arange(10)[None]
    outputs = [encoder(input_ids=ids)[0] for encoder in encoders]
    return [unet(sample, torch.tensor(500), context, added_cond_kwargs=added).sample, *outputs]


def made(unet: nn.Module, encoders: list[nn.Module], plugin: ModuleType, seed: int = 0, **arguments: str) -> Network:
    """A network with random weights."""
    std = {"loha": 0.3, "lokr": 0.1}.get(arguments.get("algo", ""), 0.02 + 0.01 * seed)
    torch.manual_seed(seed)
    found: Network = plugin.create_network(1.0, 4, 2.0, None, encoders, unet, **arguments)
    return tiny_unets.fill(found, std=std)


def network(path: Path, model: Path, version: str, seed: int = 0, **arguments: str) -> Path:
    """Writes a network with random weights for a checkpoint."""
    unet, encoders = parts(model, version)
    found = made(unet, encoders, lora, seed, **arguments)
    found.apply_to(encoders, unet)
    found.save_weights(path, None, {"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0"})
    return path


@pytest.fixture(scope="session")
def full(checkpoints: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A LoRA on all modules of each version."""
    folder = tmp_path_factory.mktemp("full")
    return {
        version: network(folder / f"{version}.safetensors", path, version, conv_dim="2")
        for version, path in checkpoints.items()
    }


KINDS: dict[str, tuple[ModuleType, dict[str, str]]] = {
    "lora": (lora, {"conv_dim": "2", "conv_alpha": "1"}),
    "dora": (lora, {"algo": "dora", "conv_dim": "2"}),
    "loha": (lora, {"algo": "loha", "conv_dim": "2"}),
    "lokr": (lora, {"algo": "lokr", "conv_dim": "2", "factor": "4"}),
    "lora_fa": (lora_fa, {}),
    "oft": (oft, {"enable_conv": "True", "enable_all_linear": "True"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("version", ROLES)
def test_a_merged_model_answers_as_with_the_networks(
    checkpoints: Mapping[str, Path], tmp_path: Path, version: str
) -> None:
    """Of every kind one, each of which changes the answer by itself."""
    model, result = checkpoints[version], tmp_path / "merged.safetensors"
    unet, encoders = parts(model, version)
    plain, applied, paths = said(unet, encoders), [], []
    ratios = [0.7, -0.4, 1.0, 0.5, 0.3, 0.6]
    for (kind, (plugin, arguments)), ratio in zip(KINDS.items(), ratios, strict=True):
        found = made(unet, encoders, plugin, **arguments)
        found.set_multiplier(ratio)
        found.apply_to(encoders, unet, plugin is not oft, True)
        paths.append(tmp_path / f"{kind}.safetensors")
        found.save_weights(paths[-1], None, {"ss_network_module": plugin.__name__})
        alone = said(unet, encoders)
        changes_ = [float((new - old).abs().max() / old.abs().max()) for new, old in zip(alone, plain, strict=True)]
        assert min(changes_[: 1 if plugin is oft else None]) > 1e-3, kind
        found.restore()
        applied.append((found, plugin))
    for found, _ in applied:
        for adapter in found.adapters:
            adapter.hook()
    expected = said(unet, encoders)
    words = ("--sd_model", model, "--models", *paths, "--ratios", *ratios, "--save_to", result)
    assert run(SCRIPTS[version], *words) == 0
    for answer, wanted in zip(said(*parts(result, version)), expected, strict=True):
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    one, other = files.header(model), files.header(result)
    assert one.shapes == other.shapes
    assert {info.dtype for info in other.tensors.values()} == {info.dtype for info in one.tensors.values()}


@pytest.mark.parametrize(("version", "length"), [("1", 26), ("1", 17), ("xl", 20), ("xl", 12)])
def test_ratios_by_block_hit_their_blocks(
    checkpoints: Mapping[str, Path], full: Mapping[str, Path], tmp_path: Path, version: str, length: int
) -> None:
    """The weights that change are those of modules at the positions that count."""
    model, path, result = checkpoints[version], full[version], tmp_path / "merged.safetensors"
    numbers = [float(index % 2) for index in range(length)]
    listed = dict(zip(LISTS[length], numbers, strict=True))
    words = ("--sd_model", model, "--models", path, "--lbws", json.dumps(numbers), "--save_to", result)
    assert run(SCRIPTS[version], *words) == 0
    base, merged, places = load_file(model), load_file(result), sd_places(files.header(model).shapes)
    wanted = {
        places[name].key
        for name in AdapterFile.open(path)
        if (where := position(name)) is None or listed.get(POSITIONS[where], 1.0)
    }
    assert {key for key in base if not torch.equal(base[key], merged[key])} == wanted
    assert 20 < len(wanted) < len(AdapterFile.open(path)) - 20


def test_sdxl_networks_with_the_names_of_diffusers(
    checkpoints: Mapping[str, Path], full: Mapping[str, Path], tmp_path: Path
) -> None:
    model, path = checkpoints["xl"], tmp_path / "n.safetensors"
    shutil.copy(full["xl"], path)
    theirs = {ours: name for name, ours in sdxl_aliases(files.header(model).shapes).items()}
    tensors = reading.renamed(load_file(path), theirs)
    assert any("_down_blocks_" in key for key in tensors)
    files.save_safetensors(tensors, tmp_path / "theirs.safetensors")
    for name in ("n", "theirs"):
        words = ("--sd_model", model, "--models", tmp_path / f"{name}.safetensors")
        assert run("sdxl_merge_lora", *words, "--save_to", tmp_path / f"merged_{name}.safetensors") == 0
        words = ("--concat", "--models", tmp_path / f"{name}.safetensors", path)
        assert run("sdxl_merge_lora", *words, "--save_to", tmp_path / f"sum_{name}.safetensors") == 0
    for kind in ("merged", "sum"):
        one, other = (load_file(tmp_path / f"{kind}_{name}.safetensors") for name in ("n", "theirs"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


# with each other


def deltas(path: Path) -> dict[str, Tensor]:
    file = AdapterFile.open(path)
    return {name: changes.change(file[name], name=name) for name in file}


@pytest.fixture(scope="session")
def pair(checkpoints: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRAs for SDXL, with the same modules and more in the second one."""
    folder = tmp_path_factory.mktemp("pair")
    one = network(folder / "one.safetensors", checkpoints["xl"], "xl", seed=1)
    return one, network(folder / "two.safetensors", checkpoints["xl"], "xl", seed=2, conv_dim="2")


@pytest.mark.parametrize("more", [(), ("--shuffle",)])
def test_concatenating_is_the_exact_sum(pair: tuple[Path, Path], tmp_path: Path, more: tuple[str, ...]) -> None:
    result = tmp_path / "sum.safetensors"
    words = ("--models", *pair, "--ratios", "0.7", "-0.3", "--concat", *more, "--save_to", result)
    assert run("sdxl_merge_lora", *words) == 0
    one, two, found = (deltas(path) for path in (*pair, result))
    assert found.keys() == two.keys()
    for name, delta in found.items():
        expected = -0.3 * two[name] + (0.7 * one[name] if name in one else 0)
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_blocks_count_in_sums_of_networks(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = tmp_path / "sum.safetensors"
    only_base, no_base = [1.0] + [0.0] * 11, [0.0] + [1.0] * 11
    words = ("--models", *pair, "--lbws", json.dumps(only_base), json.dumps(no_base), "--save_to", result)
    for script, more in (("sdxl_merge_lora", ("--concat",)), ("svd_merge_lora", SVD)):
        assert run(script, *words, *more) == 0
        one, two, found = (deltas(path) for path in (*pair, result))
        for name, delta in found.items():
            wanted = position(name)
            listed = wanted is None or POSITIONS[wanted] in ("MID", "OUT00", "IN04", "IN05", "IN07", "IN08", "BASE")
            if not listed or not name.startswith(("lora_te", "lora_unet_middle_block_1")):
                continue
            expected = one[name] if name.startswith("lora_te") else two[name]
            torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


SVD = ("--new_rank", "8", "--clamp_quantile", "1")


def test_svd_leaves_out_the_small_singular_values(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = tmp_path / "sum.safetensors"
    words = ("--models", *pair, "--ratios", "0.7", "-0.3", "--clamp_quantile", "1", "--save_to", result)
    assert run("svd_merge_lora", *words, "--new_rank", "3", "--new_conv_rank", "2") == 0
    one, two, found = (deltas(path) for path in (*pair, result))
    ranks = AdapterFile.open(result).sizes()
    for name, delta in found.items():
        total = (-0.3 * two[name] + (0.7 * one[name] if name in one else 0)).flatten(1)
        rank = 2 if delta.ndim == 4 and delta.shape[-1] > 1 else 3
        assert ranks[name] == (rank, rank)
        left_out = torch.linalg.svdvals(total)[rank:]
        error = torch.linalg.vector_norm(total - delta.flatten(1))
        torch.testing.assert_close(error, torch.linalg.vector_norm(left_out), rtol=1e-3, atol=1e-5)
    values = files.header(result).metadata
    assert (values["ss_network_dim"], values["ss_network_alpha"]) == ("3", "3")
    assert json.loads(values["ss_network_args"]) == {"conv_dim": 2, "conv_alpha": 2}


def test_svd_of_other_kinds(checkpoints: Mapping[str, Path], pair: tuple[Path, Path], tmp_path: Path) -> None:
    loha = network(tmp_path / "loha.safetensors", checkpoints["xl"], "xl", algo="loha", conv_dim="2")
    lokr = network(tmp_path / "lokr.safetensors", checkpoints["xl"], "xl", algo="lokr", conv_dim="2", factor="4")
    result = tmp_path / "sum.safetensors"
    for path in (loha, lokr):
        some = {key: tensor for key, tensor in load_file(path).items() if "middle_block" in key}
        files.save_safetensors(some, path)
    words = ("--models", loha, lokr, pair[0], "--clamp_quantile", "1", "--new_rank", "600", "--save_to", result)
    assert run("svd_merge_lora", *words) == 0
    first, second, third, found = (deltas(path) for path in (loha, lokr, pair[0], result))
    assert any(delta.ndim == 4 and delta.shape[-1] == 3 for delta in found.values())
    for name, delta in found.items():
        total = sum(part[name].reshape(delta.shape) for part in (first, second, third) if name in part)
        torch.testing.assert_close(delta, total, rtol=1e-3, atol=1e-4 * float(total.abs().max()))


def test_sums_are_those_of_the_golden_file(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / "lora_ops.json").read_text("utf-8"))
    sources = []
    for letter in "AB":
        path = tmp_path / f"{letter}.safetensors"
        files.save_safetensors({key: torch.tensor(value) for key, value in golden["inputs"][letter].items()}, path)
        sources.append(AdapterFile.open(path))
    for ratios in ((1.0, 1.0), (0.5, 0.5), (0.7, -0.3)):
        case = golden[f"merge,ratios={ratios[0]}/{ratios[1]}"]
        weighted = [Source(file, ratio) for file, ratio in zip(sources, ratios, strict=True)]
        for joining in (sums.concatenated, sums.Nearest(4, 4, 1.0, "cpu")):
            [module] = sums.merged(weighted, joining).values()
            torch.testing.assert_close(module.delta(), torch.tensor(case["exact_sum"]), atol=1e-5, rtol=1e-5)
    [module] = sums.merged([Source(file) for file in sources], sums.added).values()
    expected = golden["merge,ratios=1.0/1.0"]["effective"]
    torch.testing.assert_close(module.delta(), torch.tensor(expected), atol=1e-5, rtol=1e-5)


# metadata


def test_metadata_of_sums(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = tmp_path / "my sum.safetensors"
    assert run("sdxl_merge_lora", "--models", *pair, "--concat", "--save_precision", "fp16", "--save_to", result) == 0
    values = files.header(result).metadata
    expected = {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "my sum",
        "modelspec.merged_from": "one, two",
        "modelspec.prediction_type": "epsilon",
    }
    assert values.items() >= expected.items()
    tensors = load_file(result)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    ours = {key: value for key, value in values.items() if not key.startswith("sshs_")}
    assert metadata.network_hashes(tensors, ours).items() <= values.items()
    assert run("sdxl_merge_lora", "--models", *pair, "--concat", "--no_metadata", "--save_to", result) == 0
    assert {key.partition("_")[0] for key in files.header(result).metadata} == {"ss", "sshs"}


def test_the_version_of_sd_is_found_out(tmp_path: Path) -> None:
    for width, version in ((768, "v1"), (1024, "v2")):
        path, result = tmp_path / "n.safetensors", tmp_path / "sum.safetensors"
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
        tensors = {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(8, 2)}
        files.save_safetensors(tensors, path)
        assert run("merge_lora", "--models", path, "--concat", "--save_to", result) == 0
        values = files.header(result).metadata
        assert values["ss_base_model_version"] == f"sd_{version}"
        assert values["ss_v2"] == str(version == "v2")
        assert values["modelspec.architecture"].startswith(f"stable-diffusion-{version}")


def test_metadata_of_a_model(checkpoints: Mapping[str, Path], pair: tuple[Path, Path], tmp_path: Path) -> None:
    result, model = tmp_path / "mine.safetensors", tmp_path / "base.safetensors"
    files.save_with_metadata(checkpoints["xl"], model, {"modelspec.title": "Base", "ss_x": "1", "other": "kept"})
    assert run("sdxl_merge_lora", "--sd_model", model, "--models", pair[0], "--save_to", result) == 0
    values = files.header(result).metadata
    assert values["modelspec.merged_from"] == "Base, one"
    assert values["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert values["other"] == "kept"
    assert "ss_x" not in values


def test_what_was_applied_is_said(
    checkpoints: Mapping[str, Path], pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        words = ("--models", *pair, "--save_to", tmp_path / "x.safetensors")
        assert run("sdxl_merge_lora", "--sd_model", checkpoints["xl"], *words) == 0
        assert run("merge_lora_old", "--concat", "--models", *pair, "--save_to", tmp_path / "y.safetensors") == 3
    lines = [message for message in caplog.messages if message.startswith("merged ")]
    assert len(lines) == 2
    assert "textencoder 2 12" in lines[0]
    assert "% of" in lines[0]
    assert any("merge_lora.py now" in message for message in caplog.messages)


# mistakes


@pytest.fixture(scope="session")
def broken(checkpoints: Mapping[str, Path], pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that can't be merged, with some that can."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copy(pair[0], folder / "one.safetensors")
    shutil.copy(checkpoints["xl"], folder / "xl.safetensors")
    tensors = load_file(pair[0])
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    nan = tensors[key].clone()
    nan.view(-1)[0] = float("nan")
    module = key.partition(".")[0]
    cases: dict[str, Callable[[], dict[str, Tensor]]] = {
        "nan": lambda: tensors | {key: nan},
        "zero": lambda: {k: torch.zeros_like(t) if "lora_up" in k else t for k, t in tensors.items()},
        "unknown": lambda: tensors | {"lora_unet_other.lora_down.weight": torch.ones(1, 2),
                                      "lora_unet_other.lora_up.weight": torch.ones(2, 1)},
        "wide": lambda: tensors | {key: torch.ones(tensors[key].shape[0] + 1, *tensors[key].shape[1:])},
        "rank": lambda: tensors | {key: tensors[key].repeat(1, 2), f"{module}.lora_down.weight":
                                   tensors[f"{module}.lora_down.weight"].repeat(2, 1)},
        "huge": lambda: tensors | {key: torch.full_like(tensors[key], 1e30)},
        "flux": lambda: {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(1, 8),
                         "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(8, 1)},
        "peft": lambda: {"unet.down_blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 2),
                         "unet.down_blocks.0.attn1.to_q.lora_B.weight": torch.ones(2, 1)},
        "dora": lambda: tensors | {f"{module}.dora_scale": torch.ones(1)},
        "empty": dict,
        "hada": lambda: {"lora_unet_x.hada_w1_a": torch.ones(2, 1)},
    }  # fmt: skip
    for name, make in cases.items():
        files.save_safetensors(make(), folder / f"{name}.safetensors")
    (folder / "cut.safetensors").write_bytes(pair[0].read_bytes()[:-9])
    (folder / "text.safetensors").write_text("hello", encoding="utf-8")
    return folder


ONES = json.dumps([1.0] * 17)
MISTAKES = [
    ("sdxl_merge_lora", "--models none.safetensors", "E-NETWORK-FILE"),
    ("sdxl_merge_lora", "", "E-USAGE"),
    ("sdxl_merge_lora", "--models one.safetensors --ratios 1 2", "E-USAGE"),
    ("sdxl_merge_lora", "--models one.safetensors --lbws [1,2]", "E-LBW"),
    ("sdxl_merge_lora", "--models one.safetensors --lbws [1,x]", "E-LBW"),
    ("sdxl_merge_lora", f"--models one.safetensors --lbws {ONES.replace(' ', '')}", "E-LBW"),
    ("sdxl_merge_lora", "--models one.safetensors --lbws [1] [2]", "E-USAGE"),
    ("sdxl_merge_lora", "--models nan.safetensors one.safetensors --concat", "E-TENSOR-FINITE"),
    ("sdxl_merge_lora", "--models zero.safetensors --concat", "E-MERGE-NOTHING"),
    ("sdxl_merge_lora", "--models one.safetensors --ratios 0 --concat", "E-MERGE-NOTHING"),
    ("sdxl_merge_lora", "--models one.safetensors flux.safetensors --concat", "E-ADAPTER-FAMILY"),
    ("sdxl_merge_lora", "--models flux.safetensors --concat", "E-ADAPTER-FAMILY"),
    ("merge_lora", "--models one.safetensors --concat", "E-ADAPTER-FAMILY"),
    ("sdxl_merge_lora", "--models peft.safetensors --concat", "E-NETWORK-FILE"),
    ("sdxl_merge_lora", "--models dora.safetensors --concat", "E-ADAPTER-KIND"),
    ("sdxl_merge_lora", "--models hada.safetensors --concat", "E-ADAPTER-KIND"),
    ("sdxl_merge_lora", "--models empty.safetensors --concat", "E-NETWORK-FILE"),
    ("sdxl_merge_lora", "--models cut.safetensors --concat", "E-FILE-TRUNCATED"),
    ("sdxl_merge_lora", "--models text.safetensors --concat", "E-FILE-KIND"),
    ("sdxl_merge_lora", "--models one.safetensors rank.safetensors", "E-MERGE-RANK"),
    ("sdxl_merge_lora", "--models one.safetensors wide.safetensors --concat", "E-ADAPTER-SHAPE"),
    ("sdxl_merge_lora", "--models huge.safetensors --concat --save_precision fp16", "E-TENSOR-FINITE"),
    ("sdxl_merge_lora", "--models xl.safetensors --concat", "E-NETWORK-FILE"),
    ("svd_merge_lora", "--models dora.safetensors", "E-ADAPTER-KIND"),
    ("svd_merge_lora", "--models zero.safetensors", "E-MERGE-NOTHING"),
    ("svd_merge_lora", "--models one.safetensors --new_rank 0", "E-OPTION"),
    ("svd_merge_lora", "--models one.safetensors --device gpu", "E-DEVICE"),
    ("sdxl_merge_lora", "--sd_model xl.safetensors --models unknown.safetensors", "E-MERGE-MISFIT"),
    ("sdxl_merge_lora", "--sd_model xl.safetensors --models wide.safetensors", "E-MERGE-MISFIT"),
    ("sdxl_merge_lora", "--sd_model xl.safetensors --models nan.safetensors", "E-TENSOR-FINITE"),
    ("sdxl_merge_lora", "--sd_model xl.safetensors --models zero.safetensors", "E-MERGE-NOTHING"),
    ("sdxl_merge_lora", "--sd_model xl.safetensors --models flux.safetensors", "E-ADAPTER-FAMILY"),
    ("sdxl_merge_lora", "--sd_model xl.safetensors --models huge.safetensors --save_precision fp16", "E-TENSOR-FINITE"),
    ("sdxl_merge_lora", "--sd_model one.safetensors --models one.safetensors", "E-MODEL-KIND"),
    ("sdxl_merge_lora", "--sd_model . --models one.safetensors", "E-FILE-KIND"),
    ("merge_lora", "--sd_model xl.safetensors --models one.safetensors", "E-MODEL-KIND"),
]


@pytest.mark.parametrize(("script", "words", "code"), MISTAKES, ids=lambda value: str(value)[:60])
def test_mistakes_cost_a_line_and_no_file(
    broken: Path,
    script: str,
    words: str,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(broken)
    before = set(broken.iterdir())
    assert run(script, *words.split(), "--save_to", "out.safetensors") in (2, 3)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert f"error[{code}]" in lines[0], lines
    assert set(broken.iterdir()) == before


@pytest.mark.parametrize("output", ["one.safetensors", "./two.safetensors", "x.ckpt", ".", ""])
def test_outputs_that_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in pair:
        shutil.copy(path, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words = ("--models", "one.safetensors", "two.safetensors", "--concat", "--save_to", output)
    assert run("sdxl_merge_lora", *words) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if output == "one.safetensors":
        assert run("sdxl_merge_lora", *words, "--overwrite") == 0
        assert (tmp_path / output).read_bytes() != before[output]
