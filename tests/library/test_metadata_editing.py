"""Metadata of finished files: shown, chosen, set, stripped; tensors stay bit by bit, hashes fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from library import files, metadata
from library.metadata_editing import Edit, rewrite, verify
from tools.show_metadata import main

TENSORS = {
    "lora_unet_a.alpha": torch.tensor(4.0),
    "lora_unet_a.lora_down.weight": torch.arange(300_000, dtype=torch.float32).view(3, -1),
    "lora_unet_a.lora_up.weight": torch.arange(30, dtype=torch.bfloat16).view(-1, 3),
    "lora_unet_a.x": torch.ones(3, dtype=torch.float8_e5m2),
}
DATASETS = [
    {
        "num_train_images": 3,
        "tag_frequency": {"1_jane": {"cat": 2}},
        "subsets": [{"img_count": 3, "image_dir": "/home/jane/1_jane", "class_tokens": "jane", "caption_prefix": "by"}],
    }
]
VALUES = {
    "ss_output_name": "jane",
    "ss_network_dim": "4",
    "ss_network_alpha": "2",
    "ss_training_comment": r"of C:\Users\jane\trial and /home/jane/x.png",
    "ss_sd_model_name": "jane.safetensors",
    "ss_sd_model_hash": "0123abcd",
    "ss_new_vae_hash": "0123",
    "ss_learning_rate": "0.0001",
    "ss_dataset_dirs": json.dumps({"1_jane": {"n_repeats": 1, "img_count": 3}}),
    "ss_tag_frequency": json.dumps({"/home/jane/1_jane": {"cat": 2, "dog": 1}, r"D:\x\1_jane": {"cow": 1}}),
    "ss_datasets": json.dumps(DATASETS),
    "modelspec.title": "Jane's 猫",
    "modelspec.thumbnail": "data:image/jpeg;base64,/9j/4AAQ/home/jane",
    "ssmd_rating": "5",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    files.save_safetensors(TENSORS, path, VALUES | metadata.network_hashes(TENSORS, VALUES))
    return path


def stored(path: Path) -> dict[str, str]:
    """What the format's own reader finds; the tensors must be the same bit by bit."""
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert bytes(files.raw_bytes(found[name])) == bytes(files.raw_bytes(tensor))
    with safe_open(path, "pt") as opened:
        return dict(opened.metadata() or {})


def test_hashes_of_a_file_are_those_of_its_tensors(path: Path, tmp_path: Path) -> None:
    assert metadata.file_hashes(path, VALUES) == metadata.network_hashes(TENSORS, VALUES)
    other = tmp_path / "y.safetensors"
    mixed = dict(reversed(files.planned_infos(TENSORS).items()))
    position, infos, data = 0, {}, b""
    for name, info in mixed.items():
        raw = bytes(files.raw_bytes(TENSORS[name]))
        infos[name] = files.TensorInfo(info.dtype, info.shape, position, position + len(raw))
        position, data = position + len(raw), data + raw
    other.write_bytes(files.header_bytes(infos, {}) + data)
    assert metadata.file_hashes(other, VALUES) == metadata.network_hashes(TENSORS, VALUES)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.text(max_size=40), max_size=5))
def test_any_metadata_can_be_written(values: dict[str, str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        files.save_safetensors({"a": torch.ones(2, 2)}, path, {"old": "1"})
        files.save_with_metadata(path, path, values)
        found = files.header(path)
        assert found.metadata == {key.encode(errors="replace").decode(): value for key, value in values.items()}
        assert torch.equal(load_file(path)["a"], torch.ones(2, 2))


def test_editing_in_place(path: Path) -> None:
    path.chmod(0o640)
    rewrite(path, path, Edit(removed=["ss_training_c*"], values=["modelspec.title=a=b", "modelspec.author=我"]))
    found = stored(path)
    assert "ss_training_comment" not in found
    assert found["modelspec.title"] == "a=b"
    assert found["modelspec.author"] == "我"
    assert found["ssmd_rating"] == "5"
    ours = {key: value for key, value in found.items() if not key.startswith("sshs_")}
    expected = metadata.network_hashes(TENSORS, ours)
    assert {key: found[key] for key in expected} == expected
    assert expected["sshs_legacy_hash"] != metadata.network_hashes(TENSORS, VALUES)["sshs_legacy_hash"]
    assert "fit" in verify(path)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def strip(path: Path, *names: str) -> dict[str, str]:
    rewrite(path, path, Edit(strips=names))
    return stored(path)


def test_paths_become_names(path: Path) -> None:
    found = strip(path, "paths")
    assert found["ss_training_comment"] == "of trial and x.png"
    assert json.loads(found["ss_tag_frequency"]) == {"1_jane": {"cat": 2, "dog": 1}, "1_jane (2)": {"cow": 1}}
    assert json.loads(found["ss_datasets"])[0]["subsets"][0]["image_dir"] == "1_jane"
    assert {key: value for key, value in found.items() if "/" in value or "\\" in value}.keys() == {
        "modelspec.thumbnail"
    }
    assert found["modelspec.thumbnail"] == VALUES["modelspec.thumbnail"]
    assert found["ss_dataset_dirs"] == VALUES["ss_dataset_dirs"]


def test_folders_become_numbers_and_tags_stay(path: Path) -> None:
    found = strip(path, "folders")
    assert json.loads(found["ss_tag_frequency"]) == {"folder 1": {"cat": 2, "dog": 1}, "folder 2": {"cow": 1}}
    assert json.loads(found["ss_dataset_dirs"]) == {"folder 1": {"n_repeats": 1, "img_count": 3}}
    [dataset] = json.loads(found["ss_datasets"])
    assert dataset["tag_frequency"] == {"folder 1": {"cat": 2}}
    assert dataset["subsets"] == [{"img_count": 3, "class_tokens": "jane", "caption_prefix": "by"}]


def test_captions_and_models_go(path: Path) -> None:
    found = strip(path, "captions", "models")
    assert "cat" not in json.dumps({**found, "modelspec.title": ""})
    [dataset] = json.loads(found["ss_datasets"])
    assert dataset["subsets"] == [{"img_count": 3, "image_dir": "/home/jane/1_jane"}]
    assert not {"ss_sd_model_name", "ss_sd_model_hash", "ss_new_vae_hash"} & found.keys()
    assert found["ss_learning_rate"] == "0.0001"


def test_the_minimum_and_nothing(path: Path) -> None:
    found = strip(path, "minimal")
    assert {key for key in found if key.startswith("ss_")} == {"ss_network_dim", "ss_network_alpha"}
    assert {"modelspec.title", "ssmd_rating", "sshs_model_hash"} <= found.keys()
    assert strip(path, "all") == {}


def test_odd_values_survive_stripping(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    odd = {"ss_datasets": '[1, {"subsets": 3}]', "ss_tag_frequency": "{broken", "ss_dataset_dirs": "[]", "ss_x": ""}
    files.save_safetensors(TENSORS, path, odd)
    found = strip(path, "paths", "folders", "captions", "models")
    assert json.loads(found["ss_datasets"]) == [1, {"subsets": 3}]
    assert "sshs_model_hash" in found


def test_hashes_can_go(path: Path) -> None:
    rewrite(path, path, Edit(removed=["sshs_*"]))
    assert not [key for key in stored(path) if key.startswith("sshs_")]


def run(*argv: object) -> int:
    try:
        main([str(word) for word in argv])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_showing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = path.read_bytes()
    assert run("--model", path, "--filter", "ss_network_*", "--strip", "minimal", "--set", "x=1") == 0
    assert json.loads(capsys.readouterr().out) == {"ss_network_dim": "4", "ss_network_alpha": "2", "x": "1"}
    assert run("--model", path) == 0
    assert json.loads(capsys.readouterr().out).items() >= VALUES.items()
    assert path.read_bytes() == content


def test_writing_and_verifying(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, new = path.read_bytes(), path.with_name("new.safetensors")
    assert run("--model", path, "--save_to", new, "--strip", "paths", "models") == 0
    assert path.read_bytes() == content
    assert "models" not in stored(new)
    assert run("--model", new, "--overwrite", "--set", "ss_output_name=cat") == 0
    assert stored(new)["ss_output_name"] == "cat"
    assert run("--model", new, "--verify") == 0
    assert "sshs_model_hash and sshs_legacy_hash fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("--model", "none.safetensors"), "E-FILE-MISSING"),
        (("--model", "torch.ckpt", "--overwrite", "--strip", "all"), "E-FILE-KIND"),
        (("--model", "cut.safetensors", "--overwrite", "--set", "a=b"), "E-FILE-TRUNCATED"),
        (("--model", "bare.safetensors"), "E-METADATA-NONE"),
        (("--model", "bare.safetensors", "--verify"), "E-METADATA-HASH"),
        (("--model", "wrong.safetensors", "--verify"), "E-METADATA-HASH"),
        (("--model", "x.safetensors", "--filter", "ss_tpyo"), "E-METADATA-KEY"),
        (("--model", "x.safetensors", "--remove", "ss_tpyo", "--overwrite"), "E-METADATA-KEY"),
        (("--model", "x.safetensors", "--set", "title", "--overwrite"), "E-METADATA-KEY"),
        (("--model", "x.safetensors", "--set", "sshs_model_hash=0", "--overwrite"), "E-METADATA-KEY"),
        (("--model", "x.safetensors", "--strip", "secrets", "--overwrite"), "E-OPTION"),
        (("--model", "x.safetensors", "--strip", "all", "--save_to", "bare.safetensors"), "E-USAGE"),
        (("--model", ".", "--strip", "all", "--save_to", "new.safetensors"), "E-FILE-READ"),
    ],
)
def test_mistakes_cost_a_line_and_no_file(
    path: Path, argv: tuple[str, ...], code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = path.parent
    monkeypatch.chdir(folder)
    files.save_safetensors(TENSORS, folder / "bare.safetensors")
    files.save_safetensors(TENSORS, folder / "wrong.safetensors", {"sshs_model_hash": "0" * 64})
    (folder / "cut.safetensors").write_bytes(path.read_bytes()[:-1])
    torch.save(TENSORS, folder / "torch.ckpt")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert run(*argv) in (2, 3)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert f"error[{code}]" in lines[0]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
