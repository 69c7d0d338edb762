"""Metadata: agreement with the reference, and nothing private in it."""

from __future__ import annotations

import json
from datetime import timezone
from pathlib import Path

import pytest
import torch

from library import files, metadata
from library.metadata import (
    BucketFacts,
    DatasetFacts,
    SubsetFacts,
    TrainingFacts,
    build_modelspec,
    config_metadata,
    count_tags,
    network_hashes,
    private,
    single_metadata,
    training_metadata,
)

GOLDEN = Path(__file__).parents[1] / "golden"
MODELSPEC = json.loads((GOLDEN / "modelspec.json").read_text("utf-8"))["cases"]
HASHES = json.loads((GOLDEN / "hashes.json").read_text("utf-8"))


def architecture_of(case: dict) -> str:
    if "flux" in case:
        return "flux-1-dev" if case["flux"] == "dev" else "flux-1"
    if "sd3" in case:
        return "stable-diffusion-3-medium" if case["sd3"] == "m" else "stable-diffusion-3"
    if case.get("sdxl"):
        return "stable-diffusion-xl-v1-base"
    if case.get("v2"):
        return "stable-diffusion-v2-768-v" if case.get("v_parameterization") else "stable-diffusion-v2-512"
    return "stable-diffusion-v1"


def resolution_of(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    width, height = value.split(",") if isinstance(value, str) else value
    return int(width), int(height)


@pytest.mark.parametrize("case", MODELSPEC, ids=lambda case: json.dumps(case["arguments"]))
def test_modelspec_is_that_of_the_reference(case: dict) -> None:
    given = case["arguments"]
    same = ("title", "v_parameterization", "author", "description", "license", "tags", "merged_from", "clip_skip")
    kind = "lora" if given.get("lora") else "textual-inversion" if given.get("textual_inversion") else ""
    values = build_modelspec(
        architecture=architecture_of(given),
        kind=kind,
        timestamp=1700000000.75,
        resolution=resolution_of(given.get("reso")),
        timesteps=tuple(given.get("timesteps", (None, None))),
        single_file=given.get("is_stable_diffusion_ckpt", True),
        zone=timezone.utc,
        **{name: given[name] for name in same if name in given},
    )
    expected = dict(case["metadata"])
    if "sd3" in given:
        del expected["modelspec.prediction_type"]  # the reference calls a flow model "epsilon"
    assert list(values.items()) == list(expected.items())


@pytest.mark.parametrize("name", ["large", "small"])
def test_hashes_are_those_of_the_reference(name: str) -> None:
    tensors = {"m.alpha": torch.tensor(4.0)}
    if name == "large":
        tensors["m.lora_down.weight"] = torch.arange(400000, dtype=torch.float32).reshape(4, 100000)
        tensors["m.lora_up.weight"] = torch.arange(256).to(torch.float16).reshape(64, 4)
    hashes = network_hashes(tensors, HASHES[name]["metadata"])
    assert hashes == {key: HASHES[name][key] for key in ("sshs_model_hash", "sshs_legacy_hash")}


def test_model_hash_is_that_of_the_file_on_disk(tmp_path: Path) -> None:
    import hashlib

    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{index}.{dtype}": torch.randn(3, 5, generator=generator).to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        for index in range(3)
    }
    path = tmp_path / "n.safetensors"
    files.save_safetensors(tensors, path, {"ss_x": 'ä\n"', "modelspec.title": "t"})
    data = path.read_bytes()[files.header(path).data_start :]
    assert network_hashes(tensors, {})["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata.read_metadata(path)["ss_x"] == 'ä\n"'


def facts(**changes: object) -> TrainingFacts:
    values: dict[str, object] = {
        "session_id": 1,
        "training_started_at": 1.5,
        "training_finished_at": 2.5,
        "steps": 10,
        "epoch": 1,
        "base_model_version": "flux1",
        "num_train_images": 4,
        "num_reg_images": 0,
        "num_batches_per_epoch": 4,
        "num_epochs": 3,
        "seed": 42,
        "optimizer": "torch.optim.adamw.AdamW",
        "text_encoder_lr": [0.0001, 5e-05],
    }
    return TrainingFacts.from_options({"debiased_estimation_loss": True, "unknown": 1}, **{**values, **changes})


def test_facts_become_text_as_python_writes_it() -> None:
    values = facts(learning_rate=1e-05).strings()
    assert values["ss_text_encoder_lr"] == "[0.0001, 5e-05]"
    assert values["ss_learning_rate"] == "1e-05"
    assert values["ss_unet_lr"] == "None"
    assert values["ss_debiased_estimation"] == "True"
    assert values["ss_v2"] == "False"


def test_minimal_metadata_keeps_what_web_uis_need() -> None:
    values = training_metadata(facts(), network_args={"a": "b=c"}, minimal=True)
    assert set(values) == {f"ss_{name}" for name in metadata.MINIMUM}
    assert values["ss_network_args"] == '{"a": "b=c"}'
    assert "ss_network_args" not in training_metadata(facts(), minimal=True)


SECRET_FOLDERS = [
    "/home/somebody/pictures/10_cat",
    r"C:\Users\somebody\Pictures\10_cat",
    r"\\server\somebody\10_cat",
    "D:/somebody/10_cat/",
    "/somebody/with blanks, and commas/10_cat",
]


@pytest.mark.parametrize("folder", SECRET_FOLDERS)
def test_no_value_tells_where_the_files_lie(folder: str) -> None:
    subset = SubsetFacts(img_count=4, num_repeats=1, image_dir=folder, tags={"cat": 4})
    tuned = SubsetFacts(img_count=4, num_repeats=1, image_dir=folder, metadata_file=f"{folder}/meta.json")
    datasets = [dataset(subsets=[subset]), dataset(subsets=[tuned], is_dreambooth=False)]
    values = training_metadata(
        facts(optimizer=f"a.B(config={SECRET_FOLDERS[0]})"),
        network_args={"preset": folder},
        models=metadata.base_model(folder + "/flux.safetensors"),
        family={"odd": folder},
    )
    values |= config_metadata(datasets) | single_metadata(datasets[0], 2, 3)
    everything = "\n".join(values.values())
    assert "somebody" not in everything
    assert "Users" not in everything
    assert values["ss_sd_model_name"] == "flux.safetensors"
    assert json.loads(values["ss_dataset_dirs"]) == {"10_cat": {"n_repeats": 1, "img_count": 4}}


def dataset(**changes: object) -> DatasetFacts:
    values: dict[str, object] = {
        "is_dreambooth": True,
        "batch_size": 2,
        "num_train_images": 4,
        "num_reg_images": 0,
        "resolution": (512, 768),
        "enable_bucket": True,
        "min_bucket_reso": 256,
        "max_bucket_reso": 1024,
        "buckets": [BucketFacts(resolution=(512, 768), count=4)],
        "mean_ar_error": 0.5,
        "subsets": [SubsetFacts(img_count=4, num_repeats=1, image_dir="10_cat")],
    }
    return DatasetFacts(**{**values, **changes})  # type: ignore[arg-type]


def test_private_leaves_ordinary_text_alone() -> None:
    for text in (
        "and/or, w/ hat",
        "https://a.example/b/c",
        "1 / 2",
        "networks.lora_flux",
        "a:b",
        "(k=0.9,v=[1, 2])",
        "/",
    ):
        assert private(text) == text
    home = str(Path.home() / "x" / "y.txt")
    assert private(f"see {home}!") == "see y.txt!"


def test_dataset_values() -> None:
    repeated = [SubsetFacts(img_count=n, num_repeats=1, image_dir=f"{n}/cat", tags={"a": n}) for n in (1, 2)]
    regular = SubsetFacts(img_count=9, num_repeats=1, image_dir="r/reg", is_reg=True)
    values = config_metadata([dataset(subsets=[*repeated, regular])])
    assert list(json.loads(values["ss_dataset_dirs"])) == ["cat", "cat (2)"]
    found = json.loads(values["ss_datasets"])[0]
    assert found["tag_frequency"] == {"cat": {"a": 3}}
    assert found["bucket_info"] == {
        "buckets": {"0": {"resolution": [512, 768], "count": 4}},
        "mean_img_ar_error": 0.5,
    }
    assert found["subsets"][0]["class_tokens"] is None
    assert "metadata_file" not in found["subsets"][0]
    single = single_metadata(dataset(enable_bucket=False), processes=2, accumulation=3)
    assert single["ss_total_batch_size"] == "12"
    assert single["ss_resolution"] == "(512, 768)"
    assert single["ss_bucket_info"] == "null"


def test_tags_are_counted_in_lower_case() -> None:
    assert count_tags(["A cat, red,, ", "a cat"]) == {"a cat": 2, "red": 1}


def test_base_model_hashes(tmp_path: Path) -> None:
    small, large = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    small.write_bytes(b"x")
    large.write_bytes(bytes(0x100000) + b"y" * 10)
    assert metadata.window_hash(small) == "e3b0c442"
    assert metadata.window_hash(large) != "e3b0c442"
    assert metadata.full_hash(tmp_path) == "IsADirectory"
    assert metadata.full_hash(tmp_path / "none") == metadata.window_hash(tmp_path / "none") == "NOFILE"
    assert metadata.base_model(str(small), "vae")["ss_vae_name"] == "a.safetensors"
    assert metadata.base_model("owner/model") == {"ss_sd_model_name": "owner/model"}
    assert metadata.base_model(None) == {}
