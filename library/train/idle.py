"""Options that do nothing beside the values of others: whoever gives one hears of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.findings import warning
from library.option_groups import DreamBoothOptions, TrainEncoderOptions
from library.train.setups import BLOCKS
from library.types import Finding

if TYPE_CHECKING:
    from library.options import Options

Test = Callable[["Options"], bool]


@dataclass(frozen=True)
class Rule:
    """Options that need something else to have an effect."""

    names: tuple[str, ...]
    used: Test
    needs: str
    """What makes them work, in words."""


def idle_options(options: Options) -> Iterator[Finding]:
    """A warning for each option that was given and does nothing."""
    for rule in RULES:
        given = [name for name in rule.names if options.is_meant(name) and options.source(name) != "environment"]
        if given and not rule.used(options):
            for name in given:
                yield warning("it does nothing here", f"--{name}", f"it is for {rule.needs}")


def _is(name: str, *values: object) -> Test:
    return lambda options: options.value(name) in values


def _set(*names: str) -> Test:
    return lambda options: any(bool(options.value(name)) for name in names)


def _not(test: Test) -> Test:
    return lambda options: not test(options)


def _either(*tests: Test) -> Test:
    return lambda options: any(test(options) for test in tests)


def _scheme_counts(options: Options) -> bool:
    if options.script.option("timestep_sampling") is None:  # of SD3: always
        return True
    scheme = options.value("weighting_scheme")
    if scheme in ("logit_normal", "mode"):
        return bool(options.value("timestep_sampling") == "sigma")
    return bool(scheme in ("none", "uniform") or options.value("model_prediction_type") == "sigma_scaled")


def _trains_encoder(options: Options) -> bool:
    if options.has(TrainEncoderOptions):
        return options[TrainEncoderOptions].train_text_encoder
    steps = options[DreamBoothOptions].stop_text_encoder_training
    return steps is None or steps > 0


_SHIFTED = ("sigma", "shift")
_SIGMOID = ("sigmoid", "shift", "flux_shift")
_WANDB = _is("log_with", "wandb", "all")
_BUCKETS = _set("enable_bucket", "dataset_config")

RULES = (
    Rule(
        ("weighting_scheme",),
        _scheme_counts,
        "--timestep_sampling sigma (logit_normal, mode) or --model_prediction_type sigma_scaled (sigma_sqrt, cosmap)",
    ),
    Rule(("logit_mean", "logit_std"), _is("weighting_scheme", "logit_normal"), "--weighting_scheme logit_normal"),
    Rule(("mode_scale",), _is("weighting_scheme", "mode"), "--weighting_scheme mode"),
    Rule(("sigmoid_scale",), _is("timestep_sampling", *_SIGMOID), f"--timestep_sampling {', '.join(_SIGMOID)}"),
    Rule(("discrete_flow_shift",), _is("timestep_sampling", *_SHIFTED), f"--timestep_sampling {', '.join(_SHIFTED)}"),
    Rule(
        ("huber_schedule", "huber_c", "huber_scale"),
        _is("loss_type", "huber", "smooth_l1"),
        "--loss_type huber and smooth_l1",
    ),
    Rule(("ip_noise_gamma_random_strength",), _set("ip_noise_gamma"), "--ip_noise_gamma"),
    Rule(
        ("lr_scheduler", "lr_decay_steps", "lr_scheduler_timescale"),
        _not(_set("lr_scheduler_type")),
        "schedules without --lr_scheduler_type",
    ),
    Rule(
        ("lr_scheduler_num_cycles",),
        _is("lr_scheduler", "cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
        "--lr_scheduler cosine_with_restarts, cosine_with_min_lr and warmup_stable_decay",
    ),
    Rule(("lr_scheduler_power",), _is("lr_scheduler", "polynomial"), "--lr_scheduler polynomial"),
    Rule(("lr_scheduler_timescale",), _is("lr_scheduler", "inverse_sqrt"), "--lr_scheduler inverse_sqrt"),
    Rule(
        ("lr_scheduler_min_lr_ratio",),
        _is("lr_scheduler", "cosine_with_min_lr", "warmup_stable_decay"),
        "--lr_scheduler cosine_with_min_lr and warmup_stable_decay",
    ),
    Rule(("lr_decay_steps",), _is("lr_scheduler", "warmup_stable_decay"), "--lr_scheduler warmup_stable_decay"),
    Rule(("lr_warmup_steps",), _not(_is("lr_scheduler", "piecewise_constant")), "other schedules"),
    Rule(("save_last_n_epochs_state", "save_last_n_steps_state"), _set("save_state"), "--save_state"),
    Rule(("sample_every_n_steps",), _not(_set("sample_every_n_epochs")), "runs without --sample_every_n_epochs"),
    Rule(("console_log_simple",), _not(_set("console_log_file")), "messages on the terminal"),
    Rule(("save_every_n_epochs",), _not(_set("save_n_epoch_ratio")), "runs without --save_n_epoch_ratio"),
    Rule(
        ("huggingface_path_in_repo", "huggingface_repo_type", "huggingface_repo_visibility", "async_upload"),
        _set("huggingface_repo_id"),
        "--huggingface_repo_id",
    ),
    Rule(
        ("huggingface_token",),
        _set("huggingface_repo_id", "resume_from_huggingface"),
        "--huggingface_repo_id and --resume_from_huggingface",
    ),
    Rule(("wandb_run_name", "wandb_api_key"), _WANDB, "--log_with wandb"),
    Rule(("log_prefix",), _set("logging_dir"), "--logging_dir"),
    Rule(
        ("log_tracker_name", "log_tracker_config", "log_config"),
        _either(_set("logging_dir"), _WANDB),
        "--logging_dir and --log_with wandb",
    ),
    Rule(("base_weights_multiplier",), _set("base_weights"), "--base_weights"),
    Rule(("network_dim", "network_alpha"), _not(_set("dim_from_weights")), "networks without --dim_from_weights"),
    Rule(("training_comment",), _not(_set("no_metadata")), "files with metadata; --no_metadata leaves it out"),
    Rule(("unet_lr",), _not(_set("network_train_text_encoder_only")), "networks on the transformer"),
    Rule(("text_encoder_lr",), _not(_set("network_train_unet_only")), "networks on text encoders"),
    Rule(("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"), _BUCKETS, "--enable_bucket"),
    Rule(
        ("min_bucket_reso", "max_bucket_reso"),
        _either(_not(_set("bucket_no_upscale")), _not(_BUCKETS)),
        "buckets without --bucket_no_upscale",
    ),
    Rule(
        ("dataset_repeats",),
        _set("dataset_config", "in_json"),
        "--dataset_config and --in_json; folders have the number in their name",
    ),
    Rule(("caption_extension",), _not(_set("caption_extention")), "commands without --caption_extention"),
    Rule(("vae_batch_size",), _set("cache_latents", "cache_latents_to_disk"), "--cache_latents"),
    Rule(
        ("text_encoder_batch_size", "text_cache_variants"),
        _set("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
        "--cache_text_encoder_outputs",
    ),
    Rule(
        ("skip_cache_check", "cache_dir", "cache_compact"),
        _set("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"),
        "caches on disk",
    ),
    Rule(("cache_posterior",), _set("cache_latents", "cache_latents_to_disk"), "--cache_latents"),
    Rule(("validation_seed",), _set("validation_split", "dataset_config"), "--validation_split"),
    Rule(("ema_on_cpu",), _set("ema_decay"), "--ema_decay"),
    Rule(
        ("checkpoint_every_n_blocks", "cpu_offload_checkpointing"),
        _set("gradient_checkpointing"),
        "--gradient_checkpointing",
    ),
    Rule(("dynamo_backend",), _set("torch_compile"), "--torch_compile"),
    Rule(("xformers", "diffusers_xformers"), _is("attn_mode", None), "commands without --attn_mode"),
    Rule(("learning_rate_te1", "learning_rate_te2", "train_t5xxl"), _set("train_text_encoder"), "--train_text_encoder"),
    Rule(("learning_rate_te3",), _set("train_t5xxl"), "--train_text_encoder with --train_t5xxl"),
    Rule(("num_last_block_to_freeze",), _not(_is("learning_rate", 0)), "a --learning_rate that isn't 0"),
    Rule(
        ("fused_optimizer_groups",),
        lambda options: not (options.script.option(BLOCKS) and options.value(BLOCKS)),
        f"commands without --{BLOCKS}",
    ),
    Rule(("learning_rate_te",), _trains_encoder, "a text encoder that is trained"),
    Rule(("use_safetensors",), _is("save_model_as", None), "commands without --save_model_as"),
    Rule(("sdpa",), _is("attn_mode", None), "commands without --attn_mode"),
    Rule(("split_mode",), _is("blocks_to_swap", None), "commands without --blocks_to_swap"),
    Rule(
        ("double_blocks_to_swap", "single_blocks_to_swap"),
        _is("blocks_to_swap", None),
        "commands without --blocks_to_swap",
    ),
    Rule(("masked_loss_normalize",), _set("masked_loss", "alpha_mask", "dataset_config"), "--masked_loss"),
)
