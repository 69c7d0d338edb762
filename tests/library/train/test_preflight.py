"""What is checked before a weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from library.log import CombinedError, DataError, ResourceError, UserError
from library.option_groups import (
    FLUX_TRAIN,
    FLUX_TRAIN_NETWORK,
    CacheOptions,
    LengthOptions,
    MemoryOptions,
    NetworkOptions,
    SampleOptions,
    SaveOptions,
    StateOptions,
    TextCacheOptions,
)
from library.options import Options, Origin
from library.prompts import load_prompts
from library.train import combinations, preflight
from library.train.preflight import (
    check_combinations,
    check_device,
    check_output_name,
    check_paths,
    check_rates,
    check_writable,
    report,
    settle,
)
from library.types import Finding


def options(script=FLUX_TRAIN_NETWORK, **values: object) -> Options:
    return Options(script, values, {name: Origin("command line", f"--{name}") for name in values})


def errors_of(findings) -> str:
    return "\n".join(f"{finding.where}: {finding.what} {finding.hint}" for finding in findings if finding.error)


def warnings_of(findings) -> str:
    return "\n".join(f"{finding.where}: {finding.what}" for finding in findings if not finding.error)


@pytest.fixture
def good(tmp_path) -> dict[str, object]:
    for name in ("flux.safetensors", "clip.safetensors", "t5.safetensors", "ae.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "prompts.txt").write_text("a cat --w 512", encoding="utf-8")
    (tmp_path / "images").mkdir()
    return {
        "pretrained_model_name_or_path": str(tmp_path / "flux.safetensors"),
        "clip_l": str(tmp_path / "clip.safetensors"),
        "t5xxl": str(tmp_path / "t5.safetensors"),
        "ae": str(tmp_path / "ae.safetensors"),
        "train_data_dir": str(tmp_path / "images"),
        "output_dir": str(tmp_path / "new" / "出力 folder"),
        "logging_dir": str(tmp_path / "logs"),
        "output_name": "my lora",
        "sample_prompts": str(tmp_path / "prompts.txt"),
        "sample_every_n_epochs": 1,
    }


def test_a_good_command_passes_and_leaves_no_probe(good, tmp_path, caplog):
    found = options(**good)
    report([*check_paths(found, load_prompts), *check_combinations(found)])
    assert list(Path(str(good["output_dir"])).iterdir()) == []
    assert caplog.text == ""


@pytest.mark.parametrize(
    "name",
    ["network_weights", "base_weights", "sample_prompts", "log_tracker_config", "metadata_thumbnail"],
)
def test_a_missing_path_is_named_by_its_option(good, name):
    path = "/no/such place/file.safetensors"
    findings = check_paths(options(**good | {name: (path,) if name == "base_weights" else path}))
    assert f"--{name}: not found: /no/such place" in errors_of(findings)
    assert "quotation marks" in errors_of(findings)


def test_quotation_marks_inside_a_path(good):
    findings = check_paths(options(**good | {"network_weights": '"C:\\models\\a.safetensors"'}))
    assert "has quotation marks in it" in errors_of(findings)


@pytest.mark.parametrize("name", ["pretrained_model_name_or_path", "clip_l", "t5xxl", "ae"])
def test_a_model_that_is_not_named(good, name):
    assert f"--{name}: a model file is missing" in errors_of(check_paths(options(**good | {name: None})))


def test_network_files_must_be_networks(good, tmp_path):
    wrong = options(**good, network_weights=str(tmp_path / "ae.safetensors"), network_module="networks.lora_flux")
    assert "--network_weights" in errors_of(check_paths(wrong))
    foreign = options(**good, network_weights=str(tmp_path / "ae.safetensors"), network_module="elsewhere.net")
    assert errors_of(check_paths(foreign)) == ""


def test_lists_of_paths(good, tmp_path):
    findings = check_paths(options(**good, base_weights=(str(tmp_path / "a.safetensors"), str(good["ae"]))))
    assert errors_of(findings).count("--base_weights") == 1


def test_a_place_in_a_config_file_is_told(good):
    given = good | {"network_weights": "/no/where"}
    found = Options(FLUX_TRAIN_NETWORK, given, {"network_weights": Origin("config file", "my.toml, line 7")})
    assert "my.toml, line 7: not found" in errors_of(check_paths(found))


@pytest.mark.parametrize("name", ["output_dir", "logging_dir"])
def test_a_folder_that_cannot_be_made(good, tmp_path, name):
    (tmp_path / "file").write_text("x")
    findings = check_paths(options(**good | {name: str(tmp_path / "file" / "out")}))
    assert f"--{name}: can't write to" in errors_of(findings)
    with pytest.raises(ResourceError):
        report(findings)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(self, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert "Permission denied" in errors_of(check_writable(tmp_path, "--output_dir"))


def test_an_output_folder_must_be_given(good):
    assert "no output folder" in errors_of(check_paths(options(**good | {"output_dir": None})))


@pytest.mark.parametrize(
    "name", ["", "  ", "a/b", "a\\b", "a:b", 'a"b', "a*b", "a?b", "a|b", "a\nb", "con", "NUL.x", "a.", "a "]
)
def test_names_that_are_no_file_names(name):
    assert errors_of(check_output_name(name))


@pytest.mark.parametrize("name", [None, "my lora v1.0", "名前", "Привет", "console", "a-b_c(1)"])
def test_names_that_are(name):
    assert check_output_name(name) == []


def test_a_name_with_an_extension_is_warned_of():
    assert "another one is added" in warnings_of(check_output_name("my.safetensors"))


def test_prompts_are_parsed_at_the_start(good, tmp_path):
    (tmp_path / "prompts.json").write_text("{not json", encoding="utf-8")
    findings = check_paths(options(**good | {"sample_prompts": str(tmp_path / "prompts.json")}), load_prompts)
    assert "--sample_prompts" in errors_of(findings)
    empty = check_paths(options(**good), lambda path: [])
    assert "holds no prompts" in warnings_of(empty)


def test_a_state_is_checked_at_the_start(good, tmp_path):
    folder = tmp_path / "my-state"
    assert "--resume" in errors_of(check_paths(options(**good, resume=str(folder))))
    folder.mkdir()
    (folder / "optimizer.bin").write_bytes(b"\x80")
    findings = check_paths(options(**good, resume=str(folder)))
    assert "pickle" in errors_of(findings)
    assert "--initial_step" in errors_of(findings)
    assert check_paths(options(**good, resume="auto")) == []
    assert check_paths(options(**good, resume="me/repo/x", resume_from_huggingface=True)) == []
    assert "give --resume" in errors_of(check_paths(options(**good, resume_from_huggingface=True)))


BAD = [
    ({"full_bf16": True}, "--full_bf16"),
    ({"full_fp16": True, "mixed_precision": "bf16"}, "--full_fp16"),
    ({"fp8_base": True}, "--fp8_base"),
    ({"fp8_base": True, "int8_base": True, "mixed_precision": "bf16"}, "stored in one way"),
    ({"fp8_compute": True, "int8_base": True, "mixed_precision": "bf16"}, "can't be multiplied"),
    ({"fused_backward_pass": True, "mixed_precision": "fp16"}, "scaled until all are there"),
    ({"blocks_to_swap": 3, "torch_compile": True, "dynamo_backend": "cudagraphs"}, "--dynamo_backend cudagraphs"),
    ({"ema_decay": 0.9, "optimizer_type": "AdamWScheduleFree"}, "--ema_decay"),
    (
        {"fused_backward_pass": True, "optimizer_type": "AdaFactor", "gradient_accumulation_steps": 2},
        "--gradient_accumulation_steps must be 1",
    ),
    ({"log_with": "tensorboard"}, "--logging_dir"),
    ({"log_with": "all"}, "--logging_dir"),
    ({"adaptive_noise_scale": 0.1}, "needs --noise_offset"),
    ({"optimizer_type": "Adamm"}, "did you mean AdamW?"),
    ({"optimizer_args": ("wd=1",)}, "unexpected keyword argument"),
    ({"lr_scheduler": "cosinus"}, "did you mean cosine?"),
    (
        {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 9, "lr_decay_steps": 9, "max_train_steps": 10},
        "longer",
    ),
    ({"initial_step": 10, "max_train_steps": 10}, "would begin at step 10"),
    ({"huggingface_repo_id": "a repository"}, "--huggingface_repo_id"),
    ({"huggingface_repo_id": "a/b", "huggingface_repo_type": "modell"}, "--huggingface_repo_type"),
    ({"network_train_unet_only": True, "network_train_text_encoder_only": True}, "nothing to train"),
    ({"dim_from_weights": True}, "--network_weights"),
]


@pytest.mark.parametrize(("values", "text"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_options_that_contradict_one_another(values, text):
    found = options(**values)
    assert text in errors_of([*check_combinations(found), *check_rates(found)])


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"full_bf16": True, "mixed_precision": "bf16"},
        {"fp8_base": True, "mixed_precision": "fp16"},
        {"fused_backward_pass": True, "optimizer_type": "adafactor"},
        {"cuda_graphs": True, "gradient_checkpointing": True, "torch_compile": True},
        {"log_with": "tensorboard", "logging_dir": "logs"},
        {"adaptive_noise_scale": 0.1, "noise_offset": 0.1},
        {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 9, "lr_decay_steps": 9, "max_train_epochs": 10},
        {"huggingface_repo_id": "me/my-lora_1.0", "huggingface_repo_type": "model"},
    ],
)
def test_options_that_go_together(values):
    found = options(**values)
    assert errors_of([*check_combinations(found), *check_rates(found)]) == ""


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"save_last_n_epochs": 2}, "--save_last_n_epochs: it does nothing"),
        ({"save_last_n_steps": 2}, "--save_last_n_steps: it does nothing"),
        ({"sample_prompts": "p.txt"}, "no samples are made"),
        ({"sample_every_n_steps": 5}, "without --sample_prompts"),
        ({"save_state_to_huggingface": True}, "--save_state_to_huggingface"),
        ({"save_state_to_huggingface": True, "huggingface_repo_id": "a/b"}, "without --save_state"),
        ({"initial_epoch": 2, "initial_step": 3}, "--initial_step is given too"),
        ({"skip_until_initial_step": True}, "--skip_until_initial_step"),
        ({"cuda_graphs": True, "blocks_to_swap": 3}, "--cuda_graphs: nothing is recorded: weights of swapped blocks"),
        ({"cuda_graphs": True, "fused_backward_pass": True}, "stepped during the backward pass"),
        (
            {"cuda_graphs": True, "cpu_offload_checkpointing": True, "gradient_checkpointing": True},
            "activations travel to main memory",
        ),
        ({"cuda_graphs": True, "torch_compile": True, "dynamo_backend": "cudagraphs"}, "records by itself"),
        ({"mode_scale": 1.0}, "--mode_scale: it does nothing"),
        ({"weighting_scheme": "logit_normal", "timestep_sampling": "shift"}, "--weighting_scheme: it does nothing"),
        ({"weighting_scheme": "cosmap", "model_prediction_type": "raw"}, "--weighting_scheme: it does nothing"),
        ({"huber_c": 0.5}, "--huber_c: it does nothing"),
        ({"discrete_flow_shift": 2.0, "timestep_sampling": "sigmoid"}, "--discrete_flow_shift: it does nothing"),
        ({"lr_scheduler_num_cycles": 3, "lr_scheduler": "cosine"}, "--lr_scheduler_num_cycles: it does nothing"),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ("T_max=9",)},
            "--lr_scheduler: it does nothing",
        ),
        ({"huggingface_path_in_repo": "a"}, "--huggingface_path_in_repo: it does nothing"),
        ({"wandb_run_name": "a"}, "--wandb_run_name: it does nothing"),
        ({"log_prefix": "a"}, "--log_prefix: it does nothing"),
        ({"base_weights_multiplier": (0.5,)}, "--base_weights_multiplier: it does nothing"),
        ({"training_comment": "a", "no_metadata": True}, "--training_comment: it does nothing"),
        ({"text_encoder_lr": (1e-4,), "network_train_unet_only": True}, "--text_encoder_lr: it does nothing"),
        ({"max_bucket_reso": 512}, "--max_bucket_reso: it does nothing"),
        ({"max_bucket_reso": 512, "enable_bucket": True, "bucket_no_upscale": True}, "--max_bucket_reso: it does"),
        ({"vae_batch_size": 4}, "--vae_batch_size: it does nothing"),
        (
            {"sample_every_n_steps": 4, "sample_every_n_epochs": 1, "sample_prompts": "p.txt"},
            "--sample_every_n_steps: it does nothing",
        ),
        ({"skip_cache_check": True, "cache_latents": True}, "--skip_cache_check: it does nothing"),
        ({"huggingface_repo_id": "a/b", "huggingface_repo_visibility": "open"}, "taken for private"),
    ],
)
def test_options_that_do_nothing(values, text):
    findings = check_combinations(options(**values))
    assert text in warnings_of(findings)
    assert errors_of(findings) == ""


def test_options_that_work_are_not_warned_of():
    found = options(
        weighting_scheme="logit_normal",
        logit_mean=0.5,
        discrete_flow_shift=2.0,
        loss_type="huber",
        huber_schedule="constant",
        huber_c=0.5,
        lr_scheduler="polynomial",
        lr_scheduler_power=2,
        lr_warmup_steps=5,
        enable_bucket=True,
        max_bucket_reso=512,
        cache_latents=True,
        vae_batch_size=4,
        text_encoder_lr=(1e-4,),
    )
    assert warnings_of(check_combinations(found)) == ""


def test_a_secret_of_the_environment_is_not_warned_of():
    secret = Options(FLUX_TRAIN_NETWORK, {"wandb_api_key": "k"}, {"wandb_api_key": Origin("environment", "$KEY")})
    assert warnings_of(check_combinations(secret)) == ""
    assert "--wandb_api_key" in warnings_of(check_combinations(options(wandb_api_key="k")))


def test_full_training_has_its_own_rules():
    found = options(
        FLUX_TRAIN, blockwise_fused_optimizers=True, gradient_accumulation_steps=2, optimizer_type="AdamWScheduleFree"
    )
    text = errors_of(check_combinations(found))
    assert "must be 1" in text
    assert "schedule-free" in text


def test_a_missing_tracker_package_is_an_error(monkeypatch):
    monkeypatch.setattr(combinations, "find_spec", lambda name: None if name == "wandb" else name)
    text = errors_of(check_combinations(options(log_with="wandb")))
    assert "pip install wandb" in text


def test_what_options_imply_is_filled_in_and_said():
    before = options(
        cache_latents_to_disk=True,
        cache_text_encoder_outputs_to_disk=True,
        sample_every_n_steps=0,
        sample_every_n_epochs=-1,
        save_last_n_epochs=0,
        save_last_n_steps_state=0,
        initial_epoch=0,
        max_data_loader_n_workers=0,
        persistent_data_loader_workers=True,
        cpu_offload_checkpointing=True,
    )
    after, findings = settle(before)
    assert after[CacheOptions].cache_latents
    assert after[TextCacheOptions].cache_text_encoder_outputs
    assert after[SampleOptions].sample_every_n_steps is None
    assert after[SampleOptions].sample_every_n_epochs is None
    assert not after[LengthOptions].persistent_data_loader_workers
    assert after[MemoryOptions].gradient_checkpointing
    assert after[SaveOptions].save_last_n_epochs is None
    assert after[StateOptions].save_last_n_steps_state is None
    assert after[NetworkOptions].initial_epoch is None
    assert len(findings) == 9
    assert not any(finding.error for finding in findings)
    plain = options(cache_latents=True)
    assert settle(plain) == (plain, [])


def test_a_cpu_is_warned_of():
    assert "very slow" in warnings_of(check_device("cpu"))
    assert check_device("cuda") == []


def test_a_report_without_errors_only_warns(caplog):
    warning = Finding(error=False, what="odd", where="--x")
    report([warning, warning])
    assert caplog.messages == ["--x - odd"]


def test_one_error_is_raised_as_it_is():
    with pytest.raises(DataError) as caught:
        report([Finding(error=True, what="gone", where="--ae", hint="look", code="E-FILE-MISSING")])
    assert (caught.value.what, caught.value.hint, caught.value.code) == ("gone", "look", "E-FILE-MISSING")


def test_all_errors_are_raised_at_once_with_the_worst_exit_code():
    codes = ["E-CHECK", "E-DISK-FULL", "E-FILE-MISSING", "E-CHECK"]
    with pytest.raises(CombinedError) as caught:
        report([Finding(error=True, what=f"wrong {index}", code=code) for index, code in enumerate(codes)])
    assert caught.value.exit_code == 4
    assert len(caught.value.lines()) == 4
    assert {str(error) for error in caught.value.errors} == {f"wrong {index}" for index in range(4)}
    assert isinstance(caught.value, UserError)


def test_every_option_that_is_read_exists():
    for group, names in preflight._READ.items():
        assert set(names) <= {field.name for field in fields(group)}


@dataclass(frozen=True)
class _Unused:
    pass


def test_scripts_without_a_group_are_fine():
    from library.option_groups import CACHE_LATENTS

    found = options(CACHE_LATENTS)
    assert not found.has(_Unused)
    check_combinations(found)
    settle(found)
