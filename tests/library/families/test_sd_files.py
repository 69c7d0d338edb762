"""The files of SD's families: what is asked often is read once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from library.families.sd_files import SdFiles
from library.files import save_safetensors
from library.models import checkpoints_sd
from tests import tiny_sd


@pytest.mark.parametrize("own_vae", [False, True])
def test_headers_are_read_once_per_run(own_vae: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_sd.write_single(tmp_path / "model.safetensors", "1")
    vae = tmp_path / "vae.safetensors"
    save_safetensors(tiny_sd.vae(seed=9).state_dict(), vae)
    expected = [model, vae] if own_vae else [model]
    files = SdFiles(str(model), "sd", vae=str(vae) if own_vae else None)
    elements = SdFiles(str(model), "sd").model_elements()
    read: Counter[Path] = Counter()
    joint_header = checkpoints_sd.joint_header

    def counting(paths: list[Path], option: str) -> object:
        read.update(paths)
        return joint_header(paths, option)

    monkeypatch.setattr(checkpoints_sd, "joint_header", counting)
    for _ in range(2):
        assert files.vae_identity() == checkpoints_sd.part_fingerprint(files.vae_part)
        assert files.vae_part.files == tuple(expected[-1:])
        assert files.model_elements() == elements
    assert read == Counter(expected)
