"""`networks/convert_lora.py` as a command: metadata, files that don't fit, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library import files, metadata
from networks import convert_lora
from networks.layouts import ROWS
from tests.networks import layout_samples


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> Path:
    files.save_safetensors(dict(tensors), path, facts)
    return path


def run(*arguments: object) -> None:
    convert_lora.main([str(argument) for argument in arguments])


def test_command_keeps_metadata_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = layout_samples.sample(ROWS["kohya", "flux"], "lora", dtype=torch.bfloat16, diagonal=True)
    facts = {"ss_tag_frequency": "{}", "ss_network_module": "networks.lora_flux"}
    hashed = {**facts, **metadata.network_hashes(tensors, facts)}
    for name, known in (("a", hashed), ("b", facts), ("c", {})):
        source = save(tmp_path / f"{name}.safetensors", tensors, known)
        there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
        with caplog.at_level("INFO"):
            run("--model", source, "--save_to", there, "--to", "diffusers", "--verify")
            run("--model", there, "--save_to", back, "--to", "kohya", "--verify")
        assert "largest error" in caplog.text
        assert back.read_bytes() == source.read_bytes()
        written_facts = files.header(there).metadata
        assert written_facts.items() >= facts.items() if known else True
        assert (
            written_facts["sshs_model_hash"]
            == metadata.network_hashes(
                dict(files.LazyTensors(there)), {k: v for k, v in written_facts.items() if not k.startswith("sshs")}
            )["sshs_model_hash"]
        )


def header_of(entries: object) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw


MODULE = "lora_unet_double_blocks_0_img_attn_qkv"
GOOD = {f"{MODULE}.lora_down.weight": torch.ones(2, 4), f"{MODULE}.lora_up.weight": torch.ones(12, 2)}
MALFORMED: dict[str, tuple[object, str]] = {
    "empty file": (b"", "E-FILE-DAMAGED"),
    "no safetensors": (b"\x80\x02pickle" + bytes(20), "E-FILE-KIND"),
    "cut off": (header_of({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}), "E-FILE-TRUNCATED"),
    "no tensors": (header_of({}) + b"", "E-NETWORK-FILE"),
    "a whole model": ({"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(2)}, "E-NETWORK-FILE"),
    "unknown key": ({**GOOD, "lora_unet_nothing.lora_up.weight": torch.ones(2)}, "E-NETWORK-FILE"),
    "unknown tensor": ({**GOOD, f"{MODULE}.on_input": torch.ones(2)}, "E-NETWORK-FILE"),
    "half a pair": ({f"{MODULE}.lora_down.weight": torch.ones(2, 4)}, "E-NETWORK-FILE"),
    "alpha alone": ({f"{MODULE}.alpha": torch.ones(())}, "E-NETWORK-FILE"),
    "alpha of 0": ({**GOOD, f"{MODULE}.alpha": torch.zeros(())}, "E-NETWORK-FILE"),
    "not finite": ({**GOOD, f"{MODULE}.lora_up.weight": torch.full((12, 2), torch.nan)}, "E-TENSOR-FINITE"),
    "ranks differ": ({**GOOD, f"{MODULE}.lora_up.weight": torch.ones(12, 3)}, "E-NETWORK-SHAPE"),
    "odd outputs": ({**GOOD, f"{MODULE}.lora_up.weight": torch.ones(11, 2)}, "E-NETWORK-SHAPE"),
    "three axes": ({**GOOD, f"{MODULE}.lora_down.weight": torch.ones(2, 2, 2)}, "E-NETWORK-SHAPE"),
    "no axes": ({**GOOD, f"{MODULE}.lora_down.weight": torch.ones(())}, "E-NETWORK-SHAPE"),
    "SD3": ({"lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_down.weight": torch.ones(2, 4)}, "E-NETWORK-FILE"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_give_one_line_and_nothing_else(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, code = MALFORMED[case]
    path = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, content)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as exit_:
        run("--model", path, "--save_to", tmp_path / "out" / "b.safetensors", "--to", "diffusers")
    assert exit_.value.code == 3
    error = capsys.readouterr().err.strip()
    assert f"error[{code}]" in error
    assert error.count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_refusals_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "a.safetensors", GOOD)
    for arguments, code in (
        (("--model", source, "--save_to", source, "--to", "diffusers"), "E-OUTPUT-INPUT"),
        (("--model", source, "--save_to", tmp_path / "b.ckpt", "--to", "diffusers"), "E-OUTPUT"),
        (("--model", source, "--save_to", tmp_path / "b.safetensors", "--to", "kohya"), "E-NETWORK-LAYOUT"),
        (
            ("--model", tmp_path / "no.safetensors", "--save_to", tmp_path / "b.safetensors", "--to", "kohya"),
            "E-NETWORK",
        ),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert f"error[{code}" in capsys.readouterr().err
    run("--model", source, "--save_to", source, "--to", "diffusers", "--overwrite")
    assert any(key.startswith("transformer.") for key in files.header(source).tensors)
