"""Wrong inputs of the tools for FLUX.1: one line that says what it is, and no result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library import files
from networks import convert_flux_lora, flux_extract_lora, flux_merge_lora
from tests import tiny
from tests.networks.test_flux_tools import diffusers_folder, read
from tools import convert_diffusers_to_flux

PROJ = "lora_unet_double_blocks_0_img_attn_proj"
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
TE = "lora_te1_text_model_encoder_layers_0_mlp_fc1"

Tensors = dict[str, Tensor]


def lora(name: str, out: int = 64, inputs: int = 64, rank: int = 2) -> Tensors:
    torch.manual_seed(1)
    return {
        f"{name}.lora_down.weight": torch.randn(rank, inputs),
        f"{name}.lora_up.weight": torch.randn(out, rank),
        f"{name}.alpha": torch.tensor(1.0),
    }


def peft(path: str) -> Tensors:
    return {f"{path}.lora_A.weight": torch.randn(2, 64), f"{path}.lora_B.weight": torch.randn(64, 2)}


class Folder:
    """Files by name, made when a command asks for them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.out = path / "out"
        (path / "in").mkdir()

    def file(self, name: str) -> Path:
        """A file of `MAKERS`."""
        path = self.path / "in" / name
        if not path.exists():
            made = MAKERS[name](path)
            if isinstance(made, dict):
                files.save_safetensors(made, path)
        return path

    def words(self, command: Sequence[str]) -> list[str]:
        """The words of a command with paths: `in:NAME` and `out:NAME`."""
        found = []
        for word in command:
            kind, colon, name = word.partition(":")
            if colon and kind == "in":
                word = str(self.file(name))
            elif colon and kind == "out":
                word = str(self.out / name)
            found.append(word)
        return found


def changed(path: Path, name: str, **changes: Tensor | None) -> Tensors:
    """A file of `MAKERS` with some of its tensors others, or gone."""
    made = MAKERS[name](path)
    tensors = made if isinstance(made, dict) else read(path)
    for key, value in changes.items():
        found = next(full for full in tensors if full.endswith(key.replace("__", ".")))
        if value is None:
            del tensors[found]
        else:
            tensors[found] = value
    return tensors


def truncated(path: Path) -> None:
    files.save_safetensors(lora(PROJ), path)
    path.write_bytes(path.read_bytes()[:-40])


def folder_without(path: Path, name: str) -> None:
    """A Diffusers folder without one tensor."""
    flux = tiny.write_flux(path.with_suffix(".safetensors"), single=1)
    where = diffusers_folder(flux, path, shards=1) / "transformer"
    (file,) = where.glob("*.safetensors")
    tensors = read(file)
    files.save_safetensors({key: value for key, value in tensors.items() if not key.endswith(name)}, file)


def folder_without_a_shard(path: Path) -> None:
    where = diffusers_folder(tiny.write_flux(path.with_suffix(".safetensors"), single=1), path) / "transformer"
    min(where.glob("*.safetensors")).unlink()


MAKERS: Mapping[str, Callable[[Path], Tensors | Path | None]] = {
    "flux.safetensors": lambda path: tiny.write_flux(path, single=1),
    "two.safetensors": lambda path: tiny.write_flux(path, single=2),
    "nan.safetensors": lambda path: changed(
        path, "flux.safetensors", single_blocks__0__linear2__weight=torch.full((64, 320), float("nan"))
    ),
    "huge.safetensors": lambda path: changed(
        path, "flux.safetensors", single_blocks__0__linear2__weight=torch.full((64, 320), 1e6)
    ),
    "clip.safetensors": lambda path: tiny.write_clip_l(path),
    "ae.safetensors": lambda path: tiny.write_autoencoder(path),
    "lora.safetensors": lambda _: lora(PROJ) | lora(TE, 64, 32),
    "unet.safetensors": lambda _: lora(PROJ),
    "rank3.safetensors": lambda _: lora(PROJ, rank=3),
    "other.safetensors": lambda _: lora(PROJ, out=32),
    "sdxl.safetensors": lambda _: lora("lora_unet_input_blocks_4_1_proj_in"),
    "deep.safetensors": lambda _: lora(PROJ) | lora("lora_unet_double_blocks_7_img_attn_proj"),
    "zero.safetensors": lambda path: changed(path, "unet.safetensors", lora_up__weight=torch.zeros(64, 2)),
    "inf.safetensors": lambda path: changed(
        path, "lora.safetensors", mlp_fc1__lora_up__weight=torch.full((64, 2), float("inf"))
    ),
    "half.safetensors": lambda path: changed(path, "unet.safetensors", lora_up__weight=None),
    "dora.safetensors": lambda _: lora(PROJ) | {f"{PROJ}.dora_scale": torch.ones(64, 1)},
    "odd.safetensors": lambda _: lora(PROJ) | {f"{TE}.diff": torch.ones(64, 32)},
    "nodot.safetensors": lambda _: lora(PROJ) | {"something": torch.ones(1)},
    "empty.safetensors": lambda _: {},
    "truncated.safetensors": truncated,
    "text.safetensors": lambda path: path.write_text("<html>", encoding="utf-8") and None,
    "lora.gguf": lambda path: path.write_bytes(b"GGUF") and None,
    "peft.safetensors": lambda _: peft("transformer.transformer_blocks.0.attn.to_out.0"),
    "peft_odd.safetensors": lambda _: peft("transformer.transformer_blocks.0.attn.to_x"),
    "peft_half.safetensors": lambda path: changed(path, "peft.safetensors", lora_B__weight=None),
    "FLUX": lambda path: folder_without(path, "nothing"),
    "FLUX_incomplete": lambda path: folder_without(path, "0.attn.to_k.weight"),
    "FLUX_bias": lambda path: folder_without(path, "proj_out.bias"),
    "FLUX_shards": folder_without_a_shard,
    "nothing_here": lambda path: path.mkdir(),
}

MERGE = ("--flux_model", "in:flux.safetensors", "--save_to", "out:m.safetensors", "--models")
CLIP = ("--clip_l", "in:clip.safetensors", "--clip_l_save_to", "out:c.safetensors")
SUM = ("--save_to", "out:s.safetensors", "--models", "in:unet.safetensors")
EXTRACT = ("--save_to", "out:e.safetensors", "--model_org", "in:flux.safetensors", "--model_tuned")
BACK = ("--src", "sd-scripts", "--dst", "ai-toolkit", "--dst_path", "out:l.safetensors", "--src_path")
THERE = ("--dst_path", "out:l.safetensors", "--src_path")
MODEL = ("--save_to", "out:f.safetensors", "--diffusers_path")

MISTAKES = [
    # merging into models
    (flux_merge_lora, (*MERGE[:-1],), "--models"),
    (flux_merge_lora, (*MERGE, "in:unet.safetensors", "--ratios", "1", "2"), "2 ratios for 1 network"),
    (flux_merge_lora, (*MERGE, "nowhere.safetensors"), "isn't there"),
    (flux_merge_lora, (*MERGE, "in:truncated.safetensors"), "truncated"),
    (flux_merge_lora, (*MERGE, "in:text.safetensors"), "web page"),
    (flux_merge_lora, (*MERGE, "in:lora.gguf"), "GGUF"),
    (flux_merge_lora, (*MERGE, "in:empty.safetensors"), "empty"),
    (flux_merge_lora, (*MERGE, "in:sdxl.safetensors"), "SDXL"),
    (flux_merge_lora, (*MERGE, "in:clip.safetensors"), "text encoder"),
    (flux_merge_lora, (*MERGE, "in:deep.safetensors"), "double_blocks_7_img_attn_proj"),
    (flux_merge_lora, (*MERGE, "in:other.safetensors"), "sizes"),
    (flux_merge_lora, (*MERGE, "in:zero.safetensors"), "change nothing"),
    (flux_merge_lora, (*MERGE, "in:unet.safetensors", "--ratios", "0"), "change nothing"),
    (flux_merge_lora, (*MERGE, "in:unet.safetensors", "--ratios", "nan"), "nan"),
    (flux_merge_lora, (*MERGE, "in:inf.safetensors"), "finite"),
    (flux_merge_lora, (*CLIP, *MERGE, "in:inf.safetensors"), "finite"),
    (flux_merge_lora, (*MERGE, "in:half.safetensors"), "half"),
    (flux_merge_lora, (*CLIP, *MERGE, "in:odd.safetensors"), "unknown kind"),
    (flux_merge_lora, (*MERGE, "in:nodot.safetensors"), "something"),
    (flux_merge_lora, (*MERGE, "in:peft_odd.safetensors"), "to_x"),
    (flux_merge_lora, (*MERGE, "in:peft_half.safetensors"), "only one of its two"),
    (flux_merge_lora, (*CLIP, *MERGE, "in:unet.safetensors"), "anything for this model"),
    (flux_merge_lora, (*MERGE, "in:lora.safetensors", "--flux_model", "in:ae.safetensors"), "autoencoder"),
    (flux_merge_lora, (*CLIP, *MERGE, "in:lora.safetensors", "--flux_model", "in:nan.safetensors"), "finite"),
    (flux_merge_lora, (*MERGE, "in:lora.safetensors", "--flux_model", "in:nothing_here"), "no .safetensors file"),
    (
        flux_merge_lora,
        (*CLIP, *MERGE, "in:lora.safetensors", "--flux_model", "in:huge.safetensors", "--save_precision", "fp16"),
        "too large",
    ),
    (flux_merge_lora, (*MERGE, "in:lora.safetensors", "--save_precision", "fp4"), "unknown type"),
    (flux_merge_lora, (*MERGE, "in:lora.safetensors", "--working_device", "warp"), "no device 'warp'"),
    (flux_merge_lora, (*MERGE, "in:lora.safetensors", "--save_to", "in:flux.safetensors"), "--overwrite"),
    (flux_merge_lora, (*MERGE, "in:lora.safetensors", "--save_to", "in:lora.safetensors"), "--overwrite"),
    (flux_merge_lora, (*MERGE, "in:lora.safetensors", "--save_to", "out:m.ckpt"), ".safetensors"),
    (flux_merge_lora, (*CLIP[2:], *MERGE, "in:lora.safetensors"), "--clip_l"),
    (flux_merge_lora, (*CLIP[:2], *MERGE, "in:lora.safetensors"), "--clip_l_save_to"),
    (flux_merge_lora, (*CLIP, *MERGE[2:], "in:lora.safetensors"), "--flux_model"),
    # with each other
    (flux_merge_lora, (*SUM, "in:rank3.safetensors"), "--concat"),
    (flux_merge_lora, (*SUM, "in:other.safetensors", "--concat"), "is for a weight"),
    (flux_merge_lora, (*SUM, "in:sdxl.safetensors", "--concat"), "different models"),
    (flux_merge_lora, ("--concat", *SUM[:-1], "in:sdxl.safetensors"), "SDXL"),
    (flux_merge_lora, (*SUM, "in:dora.safetensors", "--concat"), "lora"),
    (flux_merge_lora, (*SUM, "in:inf.safetensors", "--concat"), "finite"),
    (flux_merge_lora, SUM[2:], "--save_to"),
    # extraction
    (flux_extract_lora, (*EXTRACT, "in:flux.safetensors"), "don't differ"),
    (flux_extract_lora, (*EXTRACT, "in:two.safetensors"), "only in one of the models"),
    (flux_extract_lora, (*EXTRACT, "in:nan.safetensors"), "finite"),
    (flux_extract_lora, (*EXTRACT, "in:clip.safetensors"), "text encoder"),
    (flux_extract_lora, (*EXTRACT, "in:lora.safetensors"), "LoRA"),
    (flux_extract_lora, (*EXTRACT, "in:huge.safetensors", "--dim", "0"), "--dim"),
    (flux_extract_lora, (*EXTRACT, "in:huge.safetensors", "--clamp_quantile", "2"), "--clamp_quantile"),
    (flux_extract_lora, (*EXTRACT, "in:huge.safetensors", "--device", "warp"), "no device"),
    (flux_extract_lora, (*EXTRACT, "in:huge.safetensors", "--save_to", "in:flux.safetensors"), "--overwrite"),
    # LoRAs in another layout
    (convert_flux_lora, (*BACK, "in:peft.safetensors"), "isn't in the layout of sd-scripts"),
    (convert_flux_lora, (*THERE, "in:lora.safetensors"), "isn't in the layout of ai-toolkit"),
    (convert_flux_lora, (*BACK, "in:sdxl.safetensors"), "SDXL"),
    (convert_flux_lora, (*BACK, "in:dora.safetensors"), "isn't a plain LoRA"),
    (convert_flux_lora, (*BACK, "in:inf.safetensors"), "NaN or inf"),
    (convert_flux_lora, (*BACK, "in:clip.safetensors"), "text encoder"),
    (convert_flux_lora, (*BACK, "in:nodot.safetensors"), "something"),
    (convert_flux_lora, (*BACK, "in:truncated.safetensors"), "truncated"),
    (convert_flux_lora, (*THERE, "in:peft_odd.safetensors"), "to_x"),
    (convert_flux_lora, (*THERE, "in:peft_half.safetensors"), "only one of its two"),
    (convert_flux_lora, (*THERE, "in:peft.safetensors", "--dst", "ai-toolkit"), "both ai-toolkit"),
    (convert_flux_lora, (*THERE, "in:peft.safetensors", "--src", "comfy"), "unknown layout"),
    (convert_flux_lora, THERE[:2], "--src_path"),
    (convert_flux_lora, (*THERE, "in:peft.safetensors", "--dst_path", "in:peft.safetensors"), "--overwrite"),
    # models from Diffusers
    (convert_diffusers_to_flux, (*MODEL, "in:FLUX_incomplete"), "double_blocks.0.img_attn.qkv.weight"),
    (convert_diffusers_to_flux, (*MODEL, "in:FLUX_bias"), "missing"),
    (convert_diffusers_to_flux, (*MODEL, "in:FLUX_shards"), "1 of 2 shards missing"),
    (convert_diffusers_to_flux, (*MODEL, "in:flux.safetensors"), "already"),
    (convert_diffusers_to_flux, (*MODEL, "in:clip.safetensors"), "text encoder"),
    (convert_diffusers_to_flux, (*MODEL, "in:nothing_here"), "no .safetensors file"),
    (convert_diffusers_to_flux, (*MODEL, "nowhere"), "no such file"),
    (convert_diffusers_to_flux, (*MODEL, "in:FLUX", "--save_precision", "fp4"), "unknown type"),
    (convert_diffusers_to_flux, (*MODEL, "in:FLUX", "--save_to", "out:f.ckpt"), ".safetensors"),
]


@pytest.mark.parametrize(
    ("tool", "command", "message"),
    MISTAKES,
    ids=[f"{number}-{tool.__name__.rpartition('.')[2]}" for number, (tool, *_) in enumerate(MISTAKES)],
)
def test_mistakes(
    tool: object, command: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path)
    words = folder.words(command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "in").rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        tool.main(words)  # type: ignore[attr-defined]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1, lines
    assert message in lines[0], lines[0]
    assert ended.value.code in (2, 3, 4)
    assert not [path for path in folder.out.rglob("*") if path.is_file()]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "in").rglob("*")} == before


def test_an_input_can_be_replaced_on_request(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    before = read(folder.file("flux.safetensors"))
    command = (*MERGE, "in:unet.safetensors", "--save_to", "in:flux.safetensors", "--overwrite")
    flux_merge_lora.main(folder.words(command))
    after = read(folder.file("flux.safetensors"))
    differing = [name for name in before if not torch.equal(before[name], after[name])]
    assert differing == ["double_blocks.0.img_attn.proj.weight"]
