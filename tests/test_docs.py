"""The documentation is true: commands parse, tables are current, links lead somewhere, no error is left out."""

from __future__ import annotations

import ast
import importlib
import io
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from library.data import config
from library.files import save_safetensors
from library.log import UserError
from library.models.keymaps_sd3 import ENCODERS
from library.models.refiner import LatentRefiner
from library.option_docs import renew
from library.option_groups import (
    CANNY,
    EXTRACT_LORA_FROM_DYLORA,
    EXTRACT_LORA_FROM_MODELS,
    FINE_TUNE,
    FLUX_MINIMAL_INFERENCE,
    FLUX_TRAIN,
    FLUX_TRAIN_NETWORK,
    LATENT_UPSCALER,
    LORA_INTERROGATOR,
    MERGE_SD3_SAFETENSORS,
    SCRIPTS,
    SD3_EXTRACT_LORA,
    SD3_MERGE_LORA,
    SD3_MINIMAL_INFERENCE,
    SD3_TRAIN,
    SD3_TRAIN_NETWORK,
    SDXL_MINIMAL_INFERENCE,
    SDXL_TRAIN,
    SDXL_TRAIN_NETWORK,
    TRAIN_DB,
    TRAIN_NETWORK,
)
from library.option_types import Script
from library.options import parse
from tests import tiny_sd, tiny_sd3
from tests.cells import write_images
from tests.cells_sd import write_models
from tests.networks.test_flux_tools import diffusers_folder
from tests.tools.test_image_tools import FakeDetector

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "benchmarks" / "README.md"])
PROGRAMS = {"pip", "pytest", "git", "ruff", "mypy"}
"""What commands may begin with, besides python and accelerate."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of all shell blocks, in words."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


def program(words: list[str]) -> tuple[str, list[str]]:
    """The file or module that a command runs, and its arguments; options of the launcher are left out."""
    if words[0] == "accelerate":
        assert words[1] == "launch", words
        at = next(index for index, word in enumerate(words) if word.endswith(".py"))
        assert all(word.startswith("--") or word.isdigit() for word in words[2:at]), words[:at]
        return words[at], words[at + 1 :]
    assert words[0] == "python", words
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


def script_of(path: str) -> Script | None:
    """The script that a path names."""
    return next((script for script in SCRIPTS if script.name == path), None)


def with_config_file(arguments: list[str], folder: Path) -> list[str]:
    """The arguments with a config file that can be read: ours, or an empty one where the reader has their own."""
    found = list(arguments)
    for index, word in enumerate(arguments):
        if word == "--config_file":
            ours = ROOT / arguments[index + 1]
            if not arguments[index + 1].startswith("examples/"):
                ours = folder / "empty.toml"
                ours.write_text("", encoding="utf-8")
            assert ours.is_file(), f"{arguments[index + 1]} isn't there"
            found[index + 1] = str(ours)
    return found


@each_page
def test_commands_parse(page: Path, tmp_path: Path) -> None:
    for words in commands(page):
        if words[0] in PROGRAMS:
            continue
        name, arguments = program(words)
        script = script_of(name)
        if script is None:
            file = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
            assert file.is_file() or not name.endswith(".py"), f"{name} isn't there"
            assert name.startswith(("benchmarks/", "examples/", "library.", "venv")), name
            continue
        assert (ROOT / name).is_file(), name
        try:
            parse(script, with_config_file(arguments, tmp_path))
        except UserError as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}\n{error}")


class Tiny:
    """Small stand-ins for what the commands of the documentation name."""

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        images = write_images(folder / "train" / "1_cat", [(64, 64), (64, 64)])
        (folder / "cats.toml").write_text(
            "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n"
            f"image_dir = '{images.as_posix()}'\ncaption_extension = '.txt'\n",
            encoding="utf-8",
        )
        (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
        self.folder = folder
        self.values = {
            **{name: str(models[name]) for name in ("clip_l", "t5xxl", "ae")},
            "pretrained_model_name_or_path": str(models["flux"]),
            "ckpt_path": str(models["flux"]),
            "flux_model": str(models["flux"]),
            "model_org": str(models["flux"]),
            "diffusers_path": str(diffusers_folder(models["flux"], folder / "FLUX.1-dev")),
            "dataset_config": str(folder / "cats.toml"),
            "train_data_dir": str(folder / "train"),
            "reg_data_dir": str(write_images(folder / "reg" / "1_cat", [(64, 64)]).parent),
            "output_dir": str(folder / "output"),
            "logging_dir": str(folder / "logs"),
            "sample_prompts": str(folder / "prompts.txt"),
            "lora_weights": str(folder / "output" / "my_cat.safetensors"),
            "model": str(folder / "output" / "my_cat.safetensors"),
            "resolution": "256",
            "max_bucket_reso": "512",
            "width": "64",
            "height": "64",
            "steps": "1",
        }
        self.others = write_models(folder)
        base = {name: self.values[name] for name in (*models.keys() - {"flux", "tokenizers"}, "dataset_config")}
        base |= {"pretrained_model_name_or_path": str(models["flux"]), "network_module": "networks.lora_flux"}
        base |= {"output_dir": self.values["output_dir"], "output_name": "my_cat"}
        self.own = tools_for_networks(folder) | write_for_image_tools(folder, images) | write_for_sd3_tools(folder)
        write_for_sd_tools(folder, models["tokenizers"])
        self.config = self._write("my_cat.toml", base)
        shared = {name: base[name] for name in ("dataset_config", "output_dir")}
        self.others["sd3"] = tiny_sd3.write_single(folder / "sd3_whole.safetensors", "5-medium")
        modules = {"sd1": "networks.lora", "sd2": "networks.lora", "sdxl": "networks.lora", "sd3": "networks.lora_sd3"}
        self.configs = {
            name: self._write(
                f"my_cat_{name}.toml",
                {**shared, "output_name": f"my_{name}", "network_module": module, **self._model(name)},
            )
            for name, module in modules.items()
        }

    def _write(self, name: str, values: dict[str, str]) -> Path:
        lines = "".join(f"{key} = '{value}'\n" for key, value in values.items())
        (self.folder / name).write_text(lines, encoding="utf-8", newline="\n")
        return self.folder / name

    def _model(self, name: str) -> dict[str, str]:
        encoders = self.own[MERGE_SD3_SAFETENSORS.name] if name == "sd3" else {}
        return {"pretrained_model_name_or_path": str(self.others[name]), **encoders}

    def command(self, script: Script, arguments: list[str]) -> list[str]:
        """The command with files that are there, one step long."""
        made = list(arguments)
        is_xl = script in (SDXL_TRAIN_NETWORK, SDXL_TRAIN) or "--sdxl" in made
        other = "sdxl" if is_xl else "sd1" if script in (TRAIN_NETWORK, TRAIN_DB, FINE_TUNE) else ""
        other = "sd2" if "--v2" in made else other
        other = "sd3" if script in (SD3_TRAIN_NETWORK, SD3_TRAIN) or "--sd3" in made else other
        config = self.configs.get(other, self.config)
        if "--config_file" in made:
            made[made.index("--config_file") + 1] = str(config)
        elif script in TRAINERS and "--pretrained_model_name_or_path" not in made:
            made += ["--config_file", str(config), "--dataset_config", ""]
        values = {**self.values, **(self._model(other) if other else {}), **self.own.get(script.name, {})}
        for name, value in values.items():
            if f"--{name}" in arguments:
                made += [f"--{name}", value]
        if script in (FLUX_MINIMAL_INFERENCE, SDXL_MINIMAL_INFERENCE, SD3_MINIMAL_INFERENCE):
            made += ["--width", "64", "--height", "64", "--steps", "1"]
        if script is SDXL_MINIMAL_INFERENCE:
            network = self.folder / "output" / "my_xl_cat.safetensors"
            made += ["--ckpt_path", str(self.others["sdxl"]), "--lora_weights", str(network), "--dtype", "float32"]
        if script in TRAINERS:
            made += ["--max_train_steps", "1", "--max_data_loader_n_workers", "0"]
        return made


TRAINERS = (
    *(FLUX_TRAIN_NETWORK, FLUX_TRAIN, TRAIN_NETWORK, SDXL_TRAIN_NETWORK, TRAIN_DB, FINE_TUNE, SDXL_TRAIN),
    *(SD3_TRAIN_NETWORK, SD3_TRAIN),
)


def tools_for_networks(folder: Path) -> dict[str, dict[str, str]]:
    """Stand-ins for files whose option means something else in other scripts."""
    models = [tiny_sd.write_single(folder / f"sd_{seed}.safetensors", "1", seed=seed) for seed in range(2)]
    dylora = folder / "dylora.safetensors"
    module = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {"lora_down.weight": torch.ones(8, 5), "lora_up.weight": torch.ones(6, 8), "alpha": torch.tensor(4.0)}
    save_safetensors({f"{module}.{key}": tensor for key, tensor in tensors.items()}, dylora)
    return {
        EXTRACT_LORA_FROM_MODELS.name: {"model_org": str(models[0]), "model_tuned": str(models[1])},
        EXTRACT_LORA_FROM_DYLORA.name: {"model": str(dylora)},
        LORA_INTERROGATOR.name: {"model": str(folder / "style_sd15.safetensors")},
    }


def write_for_image_tools(folder: Path, images: Path) -> dict[str, dict[str, str]]:
    """The pictures and models that the page on tools for images names."""
    save_safetensors(LatentRefiner().state_dict(), folder / "upscaler.safetensors")
    return {
        CANNY.name: {"input": str(next(images.glob("*.png")))},
        LATENT_UPSCALER.name: {"vae_path": str(tiny_sd.write_single(folder / "with_vae.safetensors", "1"))},
    }


def write_for_sd3_tools(folder: Path) -> dict[str, dict[str, str]]:
    """The files that the page on tools for SD3 names."""
    own = {name: str(tiny_sd3.write_encoder(folder / f"sd3_{name}.safetensors", name)) for name in ENCODERS}
    own |= {"vae": str(tiny_sd3.write_vae(folder / "sd3_vae.safetensors"))}
    base = tiny_sd3.mmdit("5-medium").state_dict()
    save_safetensors(base, folder / "sd3.5_medium.safetensors")
    key = "joint_blocks.0.x_block.attn.proj.weight"
    save_safetensors({**base, key: base[key] + torch.ones(128, 128)}, folder / "sd3_tuned.safetensors")
    sizes = {"lora_unet_joint_blocks_0_x_block_attn_proj": 128}
    sizes |= {f"lora_te{n}_text_model_encoder_layers_0_self_attn_q_proj": size for n, size in ((1, 32), (2, 64))}
    for name in ("sd3_cat", "sd3_style"):
        tensors = {f"{module}.lora_down.weight": torch.ones(4, size) for module, size in sizes.items()}
        tensors |= {f"{module}.lora_up.weight": torch.ones(size, 4) for module, size in sizes.items()}
        save_safetensors(tensors, folder / f"{name}.safetensors")
    model = {"model_org": "sd3.5_medium.safetensors"}
    whole = tiny_sd3.write_single(folder / "sd3_with_vae.safetensors", "5-medium", ("vae",))
    inference = {**own, "ckpt_path": str(whole), "lora_weights": str(folder / "sd3_cat.safetensors")}
    return {
        MERGE_SD3_SAFETENSORS.name: own,
        SD3_MERGE_LORA.name: own,
        SD3_EXTRACT_LORA.name: model,
        SD3_MINIMAL_INFERENCE.name: inference,
    }


def write_for_sd_tools(folder: Path, tokenizers: Path) -> None:
    """The files that the page on tools for SD names."""
    tiny_sd.write_single(folder / "sd15.safetensors", "1")
    tiny_sd.write_single(folder / "sd15_other.safetensors", "1", seed=3)
    tiny_sd.write_single(folder / "sd_xl_base.safetensors", "xl")
    tiny_sd.write_folder(folder / "sd15_diffusers", "1")
    shutil.copytree(tokenizers, folder / "tokenizers", dirs_exist_ok=True)
    for name, prefix, size in (("style", "te1", 32), ("cat", "te1", 32), ("style_sd15", "te", 32)):
        module = f"lora_{prefix}_text_model_encoder_layers_0_self_attn_q_proj"
        tensors = {"lora_down.weight": torch.ones(4, size), "lora_up.weight": torch.ones(size, 4)}
        save_safetensors({f"{module}.{key}": tensor for key, tensor in tensors.items()}, folder / f"{name}.safetensors")


@pytest.mark.slow
def test_commands_run(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every command of a script, on tiny models; first those that make a LoRA for the others."""
    tiny = Tiny(tmp_path, models)
    monkeypatch.chdir(tmp_path)
    detector = SimpleNamespace(create_detector=lambda _: FakeDetector())
    monkeypatch.setitem(sys.modules, "anime_face_detector", detector)  # type: ignore[arg-type]
    found = [
        (script, page, arguments)
        for page in PAGES
        for words in commands(page)
        if words[0] not in PROGRAMS and (script := script_of(program(words)[0])) is not None
        for arguments in [program(words)[1]]
        if "examples/" not in " ".join(arguments)
    ]
    assert len(found) > 12
    for script, page, arguments in sorted(found, key=lambda item: SCRIPTS.index(item[0])):
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        AcceleratorState._reset_state(reset_partial_state=True)
        caplog.clear()
        module = script.name.removesuffix(".py").replace("/", ".")
        try:
            importlib.import_module(module).main(tiny.command(script, arguments))
        except SystemExit as ended:
            pytest.fail(f"{page.name}: {script.name} {shlex.join(arguments)}\nexit code {ended.code}, {caplog.text}")
        idle = [message for message in caplog.messages if "it does nothing" in message or "without effect" in message]
        assert not idle, f"{page.name}: {shlex.join(arguments)}"
    assert (tmp_path / "output" / "my_lora.safetensors").is_file()
    assert list(tmp_path.glob("train/1_cat/*_flux.npz"))


@each_page
def test_dataset_files_are_accepted(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "toml")):
        if "[[datasets]]" not in block:
            continue
        file = tmp_path / f"{number}.toml"
        file.write_text(block, encoding="utf-8")
        masked = ["--masked_loss"] if "conditioning_data_dir" in block else []
        found = config.load(parse(FLUX_TRAIN_NETWORK, ["--dataset_config", str(file), *masked]))
        assert found.datasets
        assert not found.findings


@pytest.mark.slow
def test_dataset_files_run(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every dataset of the page on datasets, with small pictures where it says."""
    monkeypatch.chdir(tmp_path)
    tiny = Tiny(tmp_path, models)
    (metadata,) = (block for block in blocks(DOCS / "datasets.md", "json"))
    found = [block for block in blocks(DOCS / "datasets.md", "toml") if "[[datasets]]" in block]
    assert len(found) >= 5
    for folder in ("train/cats", "train/dogs", "reg/cats", "train/cat_masks"):
        write_images(tmp_path / folder, [(64, 64), (64, 64)])
        for number, name in enumerate(("001.png", "002.png" if "mask" in folder else "002.jpg")):
            (tmp_path / folder / f"i{number}.png").rename(tmp_path / folder / name)
            (tmp_path / folder / f"i{number}.txt").rename(tmp_path / folder / f"{name[:3]}.txt")
    (tmp_path / "train" / "meta_cat.json").write_text(metadata, encoding="utf-8")
    (tmp_path / "train" / "shards").mkdir()
    with tarfile.open(tmp_path / "train" / "shards" / "000.tar", "w") as shard:
        shard.add(tmp_path / "train" / "cats", arcname="")
    for number, block in enumerate(found):
        (tmp_path / f"{number}.toml").write_text(block, encoding="utf-8")
        AcceleratorState._reset_state(reset_partial_state=True)
        more = [
            "--dataset_config",
            f"{number}.toml",
            "--max_bucket_reso",
            "1024",
            "--dry_run",
            "--skip_bad_images",
            "--allow_missing_captions",
        ]
        more += ["--masked_loss"] if "conditioning_data_dir" in block else []
        caplog.clear()
        importlib.import_module("flux_train_network").main(["--config_file", str(tiny.config), *more])
        page = (tmp_path / "output" / "my_cat_dataset.html").read_text(encoding="utf-8")
        assert "<img" in page
        assert ("mask, " in page) == ("conditioning_data_dir" in block)
        assert ("indoors, sofa, tabby" in page) == ("metadata_file" in block)


@each_page
def test_option_tables_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert renew(text) == text, "run python -m library.option_docs"


@pytest.mark.parametrize("script", SCRIPTS, ids=[Path(script.name).stem for script in SCRIPTS])
def test_each_script_has_a_page_with_its_options_and_a_command(script: Script) -> None:
    marker = f"<!-- options:{Path(script.name).stem}:begin -->"
    assert [page.name for page in PAGES if marker in page.read_text(encoding="utf-8")]
    assert any(
        words[0] not in PROGRAMS and program(words)[0] == script.name for page in PAGES for words in commands(page)
    )


def anchors(page: Path) -> set[str]:
    """The anchors that the headings of a page get."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


@cache
def codes_in_use() -> frozenset[str]:
    """The codes of all errors: arguments, defaults of parameters and constants in the source."""
    found: set[str] = set()
    for package in ("library", "networks", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found |= {value for value in constants(node) if re.fullmatch(r"E(-[A-Z0-9]+)+", value)}
    return frozenset(found)


def constants(node: ast.AST) -> Iterator[str]:
    """Text that a node hands over as it stands."""
    values: list[ast.expr | None] = []
    if isinstance(node, ast.Call):
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
    elif isinstance(node, ast.arguments):
        values = [*node.defaults, *node.kw_defaults]
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        values = [node.value]
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value


def test_each_error_code_is_explained() -> None:
    catalogue = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("## Error codes")[2]
    explained = set(re.findall(r"`(E-[A-Z0-9-]+)`", catalogue))
    assert codes_in_use() - explained == set(), "not explained in docs/troubleshooting.md"
    assert explained - codes_in_use() == set(), "explained, but nothing says it any more"


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(UserError, match="unknown option --network_dimm"):
        parse(FLUX_TRAIN_NETWORK, ["--network_dimm", "4"])
