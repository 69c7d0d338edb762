"""`tools/merge_sd3_safetensors.py`: one file of the parts of SD3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library import files
from library.models.keymaps_sd3 import ENCODERS
from tests import tiny, tiny_sd3
from tools import merge_sd3_safetensors


def run(*argv: object) -> int:
    """The exit code."""
    try:
        merge_sd3_safetensors.main([str(word) for word in argv])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def options(paths: dict[str, Path]) -> list[object]:
    return [word for name, path in paths.items() for word in (f"--{name}", path)]


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    encoders = {name: tiny_sd3.write_encoder(tmp_path / f"{name}.safetensors", name) for name in ENCODERS}
    dit = tiny.save(tiny_sd3.mmdit("5-medium").state_dict(), tmp_path / "dit.safetensors", torch.float32)
    return {"dit": dit, "vae": tiny_sd3.write_vae(tmp_path / "vae.safetensors"), **encoders}


def test_all_parts_are_those_of_a_checkpoint(
    parts: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out" / "merged.safetensors"
    assert run(*options(parts), "--output", out) == 0
    wanted = {name: t for name, t in tiny_sd3.single_tensors("5-medium").items() if "logit_scale" not in name}
    wanted |= {f"first_stage_model.{name}": tensor for name, tensor in files.LazyTensors(parts["vae"]).items()}
    found = dict(files.LazyTensors(out))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert files.header(out).metadata["modelspec.architecture"] == "stable-diffusion-3-5-medium"
    assert run(*options(parts), "--output", out, "--device", "cuda") == 0
    assert "without effect" in caplog.text


def test_types_and_what_is_left_out(parts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    some = {name: parts[name] for name in ("dit", "vae", "clip_l")}
    assert run(*options(some), "--output", out, "--save_precision", "bf16") == 0
    found = files.header(out).tensors
    assert {info.dtype for info in found.values()} == {"BF16"}
    assert {name.partition(".")[0] for name in found} == {"model", "first_stage_model", "text_encoders"}
    assert not any(name.startswith("text_encoders.clip_g") for name in found)
    assert run(*options(some), "--output", out, "--save_precision", "fp8") == 0
    types = {name.partition(".")[0]: info.dtype for name, info in files.header(out).tensors.items()}
    assert types == {"model": "F8_E4M3", "first_stage_model": "F32", "text_encoders": "F8_E4M3"}


def test_a_checkpoint_keeps_its_parts_unless_others_are_given(tmp_path: Path) -> None:
    dit, out = tiny_sd3.write_single(tmp_path / "all.safetensors"), tmp_path / "o.safetensors"
    other = tiny_sd3.write_encoder(tmp_path / "other.safetensors", "clip_g", seed=99)
    assert run("--dit", dit, "--clip_g", other, "--output", out) == 0
    before, after = files.LazyTensors(dit), files.LazyTensors(out)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("text_encoders.clip_g.") for name in changed)


def test_a_folder_becomes_a_file(tmp_path: Path) -> None:
    folder, out = tiny_sd3.write_folder(tmp_path / "folder", "5-medium"), tmp_path / "o.safetensors"
    assert run("--dit", folder, "--output", out) == 0
    wanted = {name: t for name, t in tiny_sd3.single_tensors("5-medium").items() if "logit_scale" not in name}
    found = dict(files.LazyTensors(out))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_weights_with_scales_come_out_as_what_they_mean(parts: dict[str, Path], tmp_path: Path) -> None:
    base, out = dict(files.LazyTensors(parts["dit"])), tmp_path / "o.safetensors"
    name = "joint_blocks.0.x_block.attn.proj.weight"
    scaled = {**base, name: (base[name] / 0.01).to(torch.float8_e4m3fn), name[:-6] + "scale_weight": torch.tensor(0.01)}
    files.save_safetensors(scaled, tmp_path / "scaled.safetensors")
    assert run("--dit", tmp_path / "scaled.safetensors", "--clip_l", parts["clip_l"], "--output", out) == 0
    found = files.LazyTensors(out)
    assert found[f"model.diffusion_model.{name}"].dtype == torch.bfloat16
    torch.testing.assert_close(found[f"model.diffusion_model.{name}"].float(), base[name], rtol=0.1, atol=0.01)
    assert {info.dtype for key, info in found.infos.items() if key.startswith("text_")} == {"F32"}


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("swapped", "E-MODEL-KIND"),
        ("flux", "E-MODEL-KIND"),
        ("cut", "E-MODEL-KEYS"),
        ("cut encoder", "E-MODEL-KEYS"),
        ("not finite", "E-TENSOR-FINITE"),
        ("too large", "E-TENSOR-FINITE"),
        ("missing", "E-FILE-MISSING"),
        ("itself", "E-OUTPUT-INPUT"),
        ("pickle", "E-OUTPUT"),
    ],
)
def test_mistakes_are_one_line_and_no_file(
    parts: dict[str, Path], tmp_path: Path, case: str, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, more = tmp_path / "o.safetensors", list[object]()
    tensors = dict(files.LazyTensors(parts["dit"], mmap=False))
    encoder = dict(files.LazyTensors(parts["clip_l"], mmap=False))
    key = "joint_blocks.1.x_block.attn.proj.weight"
    if case == "swapped":
        parts["clip_l"], parts["t5xxl"] = parts["t5xxl"], parts["clip_l"]
    elif case == "flux":
        parts["dit"] = tiny.write_flux(tmp_path / "flux.safetensors", single=1)
    elif case == "cut":
        del tensors[key]
    elif case == "cut encoder":
        del encoder["text_model.encoder.layers.1.mlp.fc2.weight"]
    elif case == "not finite":
        tensors[key][0, 0] = torch.inf
    elif case == "too large":
        tensors[key][0, 0], more = 1e6, ["--save_precision", "fp16"]
    elif case == "missing":
        parts["t5xxl"].unlink()
    elif case == "itself":
        out = parts["vae"]
    else:
        out = tmp_path / "o.ckpt"
    before = out.read_bytes() if out.exists() else None
    for name, changed in (("dit", tensors), ("clip_l", encoder)):
        if case in ("cut", "cut encoder", "not finite", "too large"):
            files.save_safetensors(changed, parts[name])
    assert run(*options(parts), "--output", out, *more)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert f"error[{code}]" in line
    assert (out.read_bytes() if out.exists() else None) == before
