"""All options, in groups of one concern each, and which script accepts which groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.option_types import Script, option, options_of

# every script


@dataclass(frozen=True, kw_only=True)
class ConsoleOptions:
    """Log output."""

    console_log_level: str | None = option(
        help="least severe messages shown; INFO when not given",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = option(
        help="write messages into this file, replacing it, instead of the terminal, which still shows errors that end "
        "the program"
    )
    console_log_simple: bool = option(False, help="plain lines on stdout instead of coloured ones on stderr")


@dataclass(frozen=True, kw_only=True)
class ConfigFileOptions:
    """Options from a file."""

    config_file: str | None = option(
        help="TOML file with options, without dashes, flat or in tables whose names mean nothing; .toml may be left "
        "out. The command line wins; --no_<flag> switches off a flag that the file switches on. Files and folders to "
        "read may be relative to the working directory or, failing that, to the file's folder; outputs are relative to "
        "the working directory"
    )
    output_config: bool = option(
        False,
        help="write the given options that differ from their defaults to --config_file, which must not exist yet, and "
        "end; tokens and keys are left out",
    )


# models


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model."""

    pretrained_model_name_or_path: str | None = option(
        path=True,
        help="base model; for FLUX the transformer as one safetensors file, or a folder in the Diffusers layout",
    )
    tokenizer_cache_dir: str | None = option(
        path=True,
        help="folder with tokenizers, each in a sub-folder named like its hub repository with / replaced by _; "
        "without it they are looked for beside the text encoder files",
    )
    disable_mmap_load_safetensors: bool = option(
        False,
        help="read model files the ordinary way instead of mapping them into memory; faster on some network drives",
    )
    lowram: bool = option(False, help="accepted: models are always loaded straight onto the device")
    highvram: bool = option(
        False, help="keep the GPU memory of one caching step for the next, for GPUs with much memory"
    )


@dataclass(frozen=True, kw_only=True)
class LegacySDOptions:
    """Stable Diffusion 1.x, 2.x and SDXL."""

    v2: bool = option(False, help="the model is Stable Diffusion 2.x")
    v_parameterization: bool = option(False, help="the model predicts velocity instead of noise")
    clip_skip: int | None = option(
        help="use the text encoder's hidden state this many layers from the end (1 is the last)"
    )
    max_token_length: int | None = option(
        choices=(None, 75, 150, 225), help="tokens per caption, encoded in chunks of 75; 75 when not given"
    )
    vae: str | None = option(path=True, help="autoencoder to use instead of the model's own; for FLUX use --ae")
    zero_terminal_snr: bool = option(False, help="rescale the noise schedule so that its last step is pure noise")
    weighted_captions: bool = option(False, help="(word), (word:1.2) and [word] in captions change the words' weight")


@dataclass(frozen=True, kw_only=True)
class VaePrecisionOptions:
    """Precision of the autoencoder."""

    no_half_vae: bool = option(
        False, help="run the autoencoder in float32; slower, but safe where it overflows in half precision"
    )


@dataclass(frozen=True, kw_only=True)
class T5TextOptions:
    """Text encoders."""

    clip_l: str | None = option(
        path=True, help="CLIP-L text encoder, a safetensors file; SD3 needs it where the model holds none"
    )
    t5xxl: str | None = option(
        path=True,
        help="T5-XXL text encoder, a safetensors file; fp8 files (e4m3) work, too; SD3 also does without it",
    )
    t5xxl_max_token_length: int | None = option(
        help="tokens for T5; 512 for FLUX.1-dev and 256 for FLUX.1-schnell and SD3 when not given", least=1, most=4096
    )
    apply_t5_attn_mask: bool = option(
        False,
        help="hide padding tokens from T5 and, of FLUX, from the transformer's attention; cached text outputs must "
        "match",
    )


@dataclass(frozen=True, kw_only=True)
class FluxOptions:
    """FLUX.1."""

    ae: str | None = option(path=True, help="autoencoder of FLUX, a safetensors file")
    guidance_scale: float = option(
        3.5,
        help="guidance that FLUX.1-dev embeds, during training; 1.0 is usual for training; schnell has none",
    )
    timestep_sampling: str = option(
        "sigma",
        choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
        help="how noise levels are drawn: sigma (by --weighting_scheme, then shifted), uniform, sigmoid of a normal "
        "variable, shift (sigmoid, then --discrete_flow_shift), flux_shift (sigmoid, then a shift that grows with the "
        "image)",
    )
    sigmoid_scale: float = option(1.0, help="factor on the normal variable of sigmoid, shift and flux_shift")
    model_prediction_type: str = option(
        "sigma_scaled",
        choices=("raw", "additive", "sigma_scaled"),
        help="what the output is compared as: raw (velocity, usual for FLUX), additive (output + noisy latents), "
        "sigma_scaled (noisy latents - sigma x output, with the loss weight of --weighting_scheme)",
    )
    discrete_flow_shift: float = option(
        3.0, help="shift of the noise levels with --timestep_sampling sigma and shift", least=0.001
    )
    model_type: str = option("flux", choices=("flux", "chroma"), help="kind of model")


@dataclass(frozen=True, kw_only=True)
class FlowDensityOptions:
    """Density and weight of noise levels."""

    weighting_scheme: str = option(
        "none",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
        help="density of the noise levels (logit_normal, mode; with --timestep_sampling sigma) or loss weight "
        "(sigma_sqrt, cosmap; with --model_prediction_type sigma_scaled)",
    )
    logit_mean: float = option(0.0, help="mean of logit_normal")
    logit_std: float = option(1.0, help="standard deviation of logit_normal", least=0)
    mode_scale: float = option(1.29, help="shape of mode")


@dataclass(frozen=True, kw_only=True)
class Sd3TextOptions:
    """Text encoders of SD3."""

    clip_g: str | None = option(
        path=True, help="CLIP-G text encoder, a safetensors file; needed where the model holds none"
    )
    apply_lg_attn_mask: bool = option(
        False, help="hide padding tokens from CLIP-L and CLIP-G; cached text outputs must match"
    )
    t5xxl_device: str | None = option(
        help="device for T5 as long as it isn't trained; the training's when not given", example="cpu"
    )


@dataclass(frozen=True, kw_only=True)
class Sd3Options:
    """SD3."""

    training_shift: float = option(
        1.0, help="noise levels are shifted up by this factor on the odds; SD3 was made with 3", least=0.001
    )
    clip_l_dropout_rate: float = option(
        0.0, help="probability that a sample is trained without what CLIP-L says", least=0, most=1
    )
    clip_g_dropout_rate: float = option(0.0, help="the same for CLIP-G", least=0, most=1)
    t5_dropout_rate: float = option(0.0, help="the same for T5", least=0, most=1)
    pos_emb_random_crop_rate: float = option(
        0.0,
        help="probability that a sample gets positions from a random place of the model's table, not from its middle; "
        "SD3.5-medium was made so",
        least=0,
        most=1,
    )
    enable_scaled_pos_embed: bool = option(
        False, help="positions span the same range at every resolution; for SD3.5-medium at several resolutions"
    )
    use_t5xxl_cache_only: bool = option(
        False, help="old way to train CLIP with cached outputs of T5; now encoders that are trained always run live"
    )


@dataclass(frozen=True, kw_only=True)
class Sd3DensityOptions(FlowDensityOptions):
    """Density and weight of noise levels."""

    weighting_scheme: str = option(
        "logit_normal",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
        help="density of the noise levels (logit_normal, mode; else uniform) or loss weight (sigma_sqrt, cosmap)",
    )


# dataset


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Dataset."""

    dataset_config: Path | None = option(  # noqa: RUF009
        path=True,
        help="TOML or JSON file that describes the datasets; its values win over the dataset options here, and "
        "--train_data_dir is not used",
    )
    dataset_class: str | None = option(help="own dataset class, package.module.Class, instead of all dataset options")
    train_data_dir: str | None = option(
        path=True, help="folder with image folders named <repeats>_<words>, or with the images of --in_json"
    )
    reg_data_dir: str | None = option(
        path=True, help="folder with regularization images, laid out like --train_data_dir"
    )
    in_json: str | None = option(
        path=True, help="metadata file with captions and tags for the images of --train_data_dir"
    )
    dataset_repeats: int = option(1, help="repeats of each image per epoch, where the dataset doesn't say it", least=1)
    conditioning_data_dir: str | None = option(
        path=True, help="folder with conditioning images, which have the names of the training images"
    )
    resolution: str | None = option(
        example="1024 or 768,1152", help='area to train at, "size" or "width,height" in pixels'
    )
    train_batch_size: int = option(1, help="images per step and GPU", least=1)
    enable_bucket: bool = option(
        False,
        help="train each image in a size of its own shape and about the area of --resolution instead of cropping all",
    )
    min_bucket_reso: int = option(
        256, help="least side of a bucket in pixels; not used with --bucket_no_upscale", least=1
    )
    max_bucket_reso: int = option(
        1024, help="greatest side of a bucket in pixels; not used with --bucket_no_upscale", least=1
    )
    bucket_reso_steps: int = option(64, help="sides of buckets are multiples of this, at least 16 for FLUX", least=1)
    bucket_no_upscale: bool = option(False, help="never enlarge images; buckets follow the image sizes")
    resize_interpolation: str | None = option(
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
        help="how images are resized; area for smaller and lanczos for larger when not given",
    )
    flip_aug: bool = option(False, help="mirror images at random; cached latents hold both")
    color_aug: bool = option(False, help="change hue or brightness a little at random; not with cached latents")
    random_crop: bool = option(False, help="crop at a random place instead of the centre; not with cached latents")
    face_crop_aug_range: str | None = option(
        example="2.0,4.0",
        help='crop around faces, "min,max" in multiples of the face size; needs face positions in file names',
    )
    alpha_mask: bool = option(False, help="use the images' transparency as mask of the loss")
    alpha_background: str | None = option(
        help="colour put behind transparent parts of images; when not given the colours stored under them are learned",
        example="white or #808080",
    )
    debug_dataset: bool = option(False, help="draw a contact sheet of the batches instead of training, like --dry_run")
    dry_run: bool = option(
        False, help="print plan and caption table, draw a contact sheet of what the model will see, and stop"
    )
    strict: bool = option(False, help="stop where the dataset would only be warned of")
    no_scan_cache: bool = option(
        False, help="read every image header and caption anew instead of only those of files that changed"
    )
    cache_info: bool = option(False, help="remember image sizes and captions in metadata_cache.json for faster starts")
    skip_bad_images: bool = option(False, help="leave out images that can't be read instead of stopping")
    ignore_exif_orientation: bool = option(False, help="don't turn images as their EXIF data say")
    allow_missing_captions: bool = option(
        False, help="warn instead of stop when images have no caption; the folder's words, or nothing, stand for it"
    )


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Captions."""

    caption_extension: str = option(".caption", help="suffix of caption files", example=".txt")
    caption_extention: str | None = option(help="other spelling of --caption_extension, which it replaces")
    caption_prefix: str | None = option(help="text put before each caption, with a space")
    caption_suffix: str | None = option(help="text put after each caption, with a space")
    caption_separator: str = option(",", help="what separates the tags of a caption")
    shuffle_caption: bool = option(False, help="shuffle the tags each time")
    keep_tokens: int = option(0, help="the first N tags are neither shuffled nor dropped")
    keep_tokens_separator: str = option(
        "", help="marker in captions: tags before it are kept in place, and so are those after a second one"
    )
    secondary_separator: str | None = option(help="marker that holds tags together while shuffling and dropping")
    enable_wildcard: bool = option(False, help="{a|b} picks one at random; of several lines one is picked")
    token_warmup_min: int = option(1, help="number of tags that are used at first")
    token_warmup_step: float = option(
        0, help="step at which all tags are in use; below 1 a share of the run; 0 uses all from the start"
    )
    caption_dropout_rate: float = option(0.0, help="probability of leaving out the whole caption")
    caption_dropout_every_n_epochs: int = option(0, help="leave out all captions in every Nth epoch")
    caption_tag_dropout_rate: float = option(0.0, help="probability of leaving out a tag")


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Cached latents."""

    cache_latents: bool = option(
        False, help="encode the images once before training; not with --color_aug, --random_crop"
    )
    cache_latents_to_disk: bool = option(
        False, help="store latents beside the images for later runs; implies --cache_latents"
    )
    vae_batch_size: int = option(1, help="images encoded at once", least=1)
    skip_cache_check: bool = option(False, help="trust cache files that exist without looking into them")
    cache_dir: str | None = option(path=True, help="folder for all cache files, instead of beside the images")
    cache_compact: bool = option(False, help="store cached arrays compressed and in bf16: less exact, a third the size")
    cache_posterior: bool = option(
        False, help="cache mean and deviation of the latents and draw from them at each use, instead of one drawing"
    )


@dataclass(frozen=True, kw_only=True)
class TextCacheOptions:
    """Cached text encoder outputs."""

    cache_text_encoder_outputs: bool = option(
        False,
        help="encode the captions once before training and drop the text encoders; shuffling and the like need "
        "--text_cache_variants; a text encoder that is trained stays in use",
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, help="store text encoder outputs beside the images for later runs; implies --cache_text_encoder_outputs"
    )
    text_encoder_batch_size: int | None = option(
        help="captions encoded at once; --train_batch_size when not given", least=1
    )
    text_cache_variants: int = option(
        0,
        help="drawings cached of each caption that is shuffled, thinned out or has wildcards",
        least=0,
    )


# length, precision, memory

_BACKENDS = (
    *("no", "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt"),
    *("onnxrt", "tensorrt", "tensort", "ipex", "tvm"),
)
"""Compilers; `tensort` is how it was first spelled."""


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """Length of the run."""

    max_train_steps: int = option(
        1600,
        help="number of optimizer steps in all; when --max_train_epochs is given, too, the smaller limit counts",
        least=1,
    )
    max_train_epochs: int | None = option(
        help="number of epochs in all; alone it replaces the default of --max_train_steps"
    )
    gradient_accumulation_steps: int = option(
        1, help="batches per optimizer step; the step counts below and --max_train_steps count optimizer steps", least=1
    )
    seed: int | None = option(
        help="number that decides all randomness; drawn and reported when not given", least=0, most=2**32 - 1
    )
    max_data_loader_n_workers: int = option(
        8, help="processes that read data, at most one per CPU core; 0 for none", least=0
    )
    persistent_data_loader_workers: bool = option(False, help="keep those processes between epochs")


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Precision."""

    mixed_precision: str = option(
        "no",
        choices=("no", "fp16", "bf16"),
        help="type for computing and for the parts that are not trained; bf16 is usual for FLUX",
    )
    full_fp16: bool = option(False, help="hold what is trained in fp16, too; needs --mixed_precision fp16")
    full_bf16: bool = option(False, help="hold what is trained in bf16, too; needs --mixed_precision bf16")
    fp8_base: bool = option(
        False,
        help="hold what is not trained in fp8, text encoders too; needs --mixed_precision fp16 or bf16",
    )
    fp8_scaled: bool = option(
        False, help="like --fp8_base_unet, with a scale for each row of a weight: as small, several times more exact"
    )
    int8_base: bool = option(False, help="like --fp8_scaled, in int8, for cards without fp8")
    nf4_base: bool = option(
        False, help="hold the transformer in 4 bits: half the memory of int8, less exact; faster with bitsandbytes"
    )
    fp8_compute: bool = option(
        False, help="multiply with frozen weights in fp8: faster on cards that can (Ada, Hopper), a little less exact"
    )
    int8_compute: bool = option(
        False, help="multiply with frozen weights in int8: faster on most cards, a little less exact"
    )


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Memory and speed."""

    gradient_checkpointing: bool = option(
        False, help="compute activations again in the backward pass instead of keeping them: slower, far less memory"
    )
    checkpoint_every_n_blocks: int = option(
        1, help="with --gradient_checkpointing: only each Nth block computes again; faster, more memory", least=1
    )
    attn_mode: str | None = option(
        choices=(None, "torch", "sdpa", "xformers", "flash"),
        help="attention: of torch (torch, sdpa), of xformers, or of flash-attn (flash); torch when not given",
    )
    xformers: bool = option(False, help="attention of the xformers package, like --attn_mode xformers")
    sdpa: bool = option(False, help="attention of torch, like --attn_mode torch")
    mem_eff_attn: bool = option(False, help="attention in slices")
    torch_compile: bool = option(
        False,
        help="compile each block when it is first used; where that fails it runs as it is, and a line says so",
    )
    dynamo_backend: str = option(
        "inductor",
        choices=_BACKENDS,
        help="compiler used with --torch_compile",
    )
    cuda_graphs: bool = option(
        False,
        help="record forward and backward pass once for each size of images and repeat the recording: faster where the "
        "GPU waits for Python, as with LoRA for SDXL; more memory. Where that can't be, a line says why",
    )
    vram: float | None = option(
        help="memory of the GPU to plan for, in GiB; when not given that of the GPU that is there", least=1
    )


@dataclass(frozen=True, kw_only=True)
class OffloadOptions:
    """Use of CPU memory."""

    cpu_offload_checkpointing: bool = option(
        False, help="keep checkpointed activations in CPU memory; with --gradient_checkpointing"
    )
    blocks_to_swap: int | None = option(
        help="number of transformer blocks kept in CPU memory and fetched when needed; two single blocks of FLUX count "
        "for one",
        least=0,
    )


# optimizer, schedule, loss


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer."""

    optimizer_type: str = option(
        "",
        example="AdamW8bit, Adafactor, Lion, Prodigy, AdamWScheduleFree",
        help="optimizer, capitals don't matter, or package.module.Class; AdamW when empty",
    )
    optimizer_args: tuple[str, ...] | None = option(
        example="weight_decay=0.01 betas=(0.9,0.99)", help="arguments of the optimizer as name=value"
    )
    use_8bit_adam: bool = option(False, help="old spelling of --optimizer_type AdamW8bit; not together with it")
    use_lion_optimizer: bool = option(False, help="old spelling of --optimizer_type Lion; not together with it")
    learning_rate: float = option(
        2e-6,
        help="learning rate; about 1.0 for D-adaptation and Prodigy; 0 freezes what has no rate of its own",
        example="1e-4",
    )
    max_grad_norm: float = option(1.0, help="gradients are scaled down to this norm; 0 for no limit", least=0)
    fused_backward_pass: bool = option(
        False,
        help="update each parameter during the backward pass, which saves the memory of the gradients; for most "
        "optimizers, with --gradient_accumulation_steps 1",
    )
    stop_on_nonfinite: int = option(
        3, help="stop after this many steps in a row whose loss or gradients are not finite; 0 never stops", least=0
    )
    allow_custom_modules: bool = option(
        False, help="let --config_file name networks, optimizers and schedulers that are not known; they run as code"
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Learning rate schedule."""

    lr_scheduler: str = option(
        "constant",
        help="constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt, "
        "cosine_with_min_lr, warmup_stable_decay, piecewise_constant or adafactor; schedule-free optimizers use none",
    )
    lr_scheduler_type: str = option(
        "", help="scheduler class of torch.optim.lr_scheduler, or package.module.Class, instead of --lr_scheduler"
    )
    lr_scheduler_args: tuple[str, ...] | None = option(
        help="arguments of the scheduler as name=value", example="T_max=100"
    )
    lr_scheduler_num_cycles: int = option(
        1,
        help="restarts of cosine_with_restarts; halves of a cosine for cosine_with_min_lr and warmup_stable_decay",
        least=0,
    )
    lr_scheduler_power: float = option(1, help="exponent of polynomial")
    lr_scheduler_timescale: int | None = option(help="time scale of inverse_sqrt; the warm-up steps when not given")
    lr_scheduler_min_lr_ratio: float | None = option(
        help="least learning rate as a share of the full one, for cosine_with_min_lr and warmup_stable_decay"
    )
    lr_warmup_steps: int | float = option(
        0, help="steps over which the rate grows from 0, or a share of the run", example="100, 0.1 or 10%"
    )
    lr_decay_steps: int | float = option(
        0, help="steps over which warmup_stable_decay lets the rate fall at the end, or a share of the run"
    )


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Loss."""

    loss_type: str = option("l2", choices=("l1", "l2", "huber", "smooth_l1"), help="how deviations are counted")
    huber_schedule: str = option(
        "snr",
        choices=("constant", "exponential", "snr"),
        help="how the limit of huber and smooth_l1 depends on the noise level; FLUX has no snr",
    )
    huber_c: float = option(0.1, help="limit of huber and smooth_l1, from where on deviations count linearly", least=0)
    huber_scale: float = option(1.0, help="factor on that limit, for the schedules constant and exponential", least=0)
    masked_loss: bool = option(False, help="weigh the loss by masks: conditioning images or the images' transparency")
    masked_loss_normalize: bool = option(False, help="divide the masked loss by the mean of its mask")


@dataclass(frozen=True, kw_only=True)
class PriorLossOptions:
    """Regularization images."""

    prior_loss_weight: float = option(1.0, help="weight of the loss of regularization images")


@dataclass(frozen=True, kw_only=True)
class SnrOptions:
    """Loss weights of Stable Diffusion."""

    min_snr_gamma: float | None = option(help="limit of the signal-to-noise weight of the loss", example="5")
    debiased_estimation_loss: bool = option(False, help="divide the loss by the root of the signal-to-noise ratio")
    scale_v_pred_loss_like_noise_pred: bool = option(False, help="weigh a velocity loss like a noise loss")
    v_pred_like_loss: float | None = option(help="add this share of a velocity-like loss to a noise loss")


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """Noise."""

    noise_offset: float | None = option(help="strength of noise that is constant over each channel")
    noise_offset_random_strength: bool = option(False, help="draw that strength between 0 and --noise_offset")
    adaptive_noise_scale: float | None = option(help="add the latents' mean times this to --noise_offset")
    multires_noise_iterations: int | None = option(help="number of coarser levels of noise that are added")
    multires_noise_discount: float = option(0.3, help="strength of each level relative to the finer one")
    ip_noise_gamma: float | None = option(
        help="strength of extra noise on the input that the target doesn't know of", example="0.1", least=0
    )
    ip_noise_gamma_random_strength: bool = option(False, help="draw that strength between 0 and --ip_noise_gamma")
    min_timestep: int | None = option(
        help="least timestep trained, of 0 to 1000 (0 is without noise); 0 when not given"
    )
    max_timestep: int | None = option(help="limit of the timesteps trained; 1000 when not given")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation."""

    validation_split: float = option(0.0, help="share of the training images that is kept apart for validation")
    validation_seed: int | None = option(help="number that decides which images; --seed when not given")
    validate_every_n_steps: int | None = option(help="validate every N steps; after each epoch when not given")
    validate_every_n_epochs: int | None = option(help="validate every N epochs")
    max_validation_steps: int | None = option(help="greatest number of batches per validation")
    save_best: bool = option(False, help="keep the model with the least validation loss, too, as <output_name>-best")
    early_stop_patience: int | None = option(
        help="end the training when the validation loss has not fallen for this many validations", least=1
    )


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """Moving average of the weights."""

    ema_decay: float | None = option(
        help="keep an exponential moving average of what is trained and save it, too, as <file>-ema",
        example="0.999",
        least=0,
        most=1,
    )
    ema_on_cpu: bool = option(False, help="keep the average in main memory")


# output


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """Saving."""

    output_dir: str | None = option(help="folder for models, states and sample images; made when missing")
    output_name: str | None = option(help="name of the files without suffix", example="my_lora")
    save_precision: str | None = option(
        choices=(None, "float", "fp16", "bf16"), help="type of the saved weights; as trained when not given"
    )
    save_every_n_epochs: int | None = option(help="save every N epochs", least=0)
    save_every_n_steps: int | None = option(help="save every N steps", least=0)
    save_n_epoch_ratio: int | None = option(
        help="save about N times over the run, instead of --save_every_n_epochs", least=0
    )
    save_last_n_epochs: int | None = option(
        help="of the files saved by epoch keep those of the last N epochs and delete older ones"
    )
    save_last_n_steps: int | None = option(
        help="of the files saved by step keep those of the last N steps and delete older ones"
    )


@dataclass(frozen=True, kw_only=True)
class FullSaveOptions:
    """Format of saved models."""

    save_model_as: str | None = option(
        choices=(None, "ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
        help="format of the saved model: a file in the original layout (safetensors, ckpt) or a folder in that of "
        "Diffusers; a file or a folder as the base model is one when not given",
    )
    use_safetensors: bool = option(False, help="save as safetensors when --save_model_as is not given")
    mem_eff_save: bool = option(False, help="accepted: models are always written tensor by tensor")


@dataclass(frozen=True, kw_only=True)
class StateOptions:
    """States to resume from."""

    save_state: bool = option(
        False, help="save all that is needed to go on, whenever a model is saved and at the end; needs much disk"
    )
    save_state_on_train_end: bool = option(False, help="save such a state at the end only")
    save_last_n_epochs_state: int | None = option(help="like --save_last_n_epochs, for states")
    save_last_n_steps_state: int | None = option(help="like --save_last_n_steps, for states")
    resume: str | None = option(
        path=True, help="state folder to go on from, exactly where it stopped; --max_train_steps still means the total"
    )
    resume_from_huggingface: bool = option(
        False, help="--resume names a place on the hub: user/repository/path, with :revision and :type if need be"
    )


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Upload to the Hugging Face hub."""

    huggingface_repo_id: str | None = option(
        help="repository to upload saved files to; made when missing", example="me/lora"
    )
    huggingface_repo_type: str | None = option(help="type of the repository; model when not given")
    huggingface_path_in_repo: str | None = option(help="folder in the repository")
    huggingface_token: str | None = option(
        secret="HF_TOKEN",
        help="access token, never stored; better given in the environment variable HF_TOKEN or by logging in once",
    )
    huggingface_repo_visibility: str | None = option(help="public for a public repository; private otherwise")
    save_state_to_huggingface: bool = option(False, help="upload states, too")
    async_upload: bool = option(False, help="go on training while files are uploaded")


@dataclass(frozen=True, kw_only=True)
class MetadataOptions:
    """Metadata in saved models."""

    metadata_title: str | None = option(help="title; --output_name when not given")
    metadata_author: str | None = option(help="author")
    metadata_description: str | None = option(help="description")
    metadata_license: str | None = option(help="license")
    metadata_tags: str | None = option(help="tags, separated by commas")
    metadata_usage_hint: str | None = option(help="how to use the model")
    metadata_trigger_phrase: str | None = option(help="words that bring out what was trained")
    metadata_preprocessor: str | None = option(help="how the training images were prepared")
    metadata_merged_from: str | None = option(help="models this one was merged from")
    metadata_is_negative_embedding: str | None = option(help="whether it is an embedding for negative prompts")
    metadata_thumbnail: str | None = option(path=True, help="image file that is put into the metadata")


@dataclass(frozen=True, kw_only=True)
class TrackerOptions:
    """Progress records."""

    logging_dir: str | None = option(
        help="folder for TensorBoard logs; each run gets a folder named by --log_prefix and the time"
    )
    log_with: str | None = option(
        choices=("tensorboard", "wandb", "all"),
        help="where losses and rates are recorded; tensorboard with --logging_dir",
    )
    log_prefix: str | None = option(help="begin of the name of the run's folder in --logging_dir")
    log_tracker_name: str | None = option(help="name of the project in the records")
    log_tracker_config: str | None = option(path=True, help="TOML file with arguments for starting the trackers")
    wandb_run_name: str | None = option(help="name of the run at wandb")
    wandb_api_key: str | None = option(
        secret="WANDB_API_KEY",
        help="key for wandb, never stored; better given in the environment variable WANDB_API_KEY or by logging in",
    )
    log_config: bool = option(False, help="record the options, without secrets and folders")


_SAMPLERS = (
    *("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++"),
    *("dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
)


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Sample images during training."""

    sample_prompts: str | None = option(
        path=True, help="file with prompts (.txt, .toml or .json); images go to the folder sample in --output_dir"
    )
    sample_every_n_steps: int | None = option(help="make sample images every N steps")
    sample_every_n_epochs: int | None = option(help="make sample images every N epochs, instead of every N steps")
    sample_at_first: bool = option(False, help="make sample images before the first step, too")
    sample_sampler: str = option(
        "ddim",
        choices=_SAMPLERS,
        help="sampler for prompts that don't name one",
    )


# several processes


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """Several GPUs."""

    ddp_timeout: int | None = option(
        help="minutes until processes give up waiting for each other; raise it for long caching", least=0
    )
    ddp_gradient_as_bucket_view: bool = option(False, help="gradient_as_bucket_view of DistributedDataParallel")
    ddp_static_graph: bool = option(False, help="static_graph of DistributedDataParallel")


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions:
    """DeepSpeed."""

    deepspeed: bool = option(False, help="train with DeepSpeed")
    zero_stage: int = option(2, choices=(0, 1, 2, 3), help="what is split over the processes")
    offload_optimizer_device: str | None = option(choices=(None, "cpu", "nvme"), help="where optimizer states are kept")
    offload_optimizer_nvme_path: str | None = option(help="folder on an NVMe drive for optimizer states")
    offload_param_device: str | None = option(choices=(None, "cpu", "nvme"), help="where parameters are kept")
    offload_param_nvme_path: str | None = option(help="folder on an NVMe drive for parameters")
    zero3_init_flag: bool = option(False, help="build the model in pieces (stage 3)")
    zero3_save_16bit_model: bool = option(False, help="save 16-bit weights (stage 3)")
    fp16_master_weights_and_gradients: bool = option(
        False, help="hold master weights and gradients in fp16; stage 2 with optimizer states on the CPU"
    )


# what is trained


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Network."""

    network_module: str | None = option(
        example="networks.lora_flux",
        help="module of the network to train; other packages' such as lycoris.kohya work, too",
    )
    network_weights: str | None = option(path=True, help="network file to go on training")
    network_dim: int | None = option(help="rank; 4 when not given", example="16", least=1)
    network_alpha: float = option(1, help="the network's output is scaled by alpha / rank")
    network_dropout: float | None = option(
        help="probability of leaving out elements within the network while training", least=0, most=1
    )
    network_args: tuple[str, ...] | None = option(
        example="train_blocks=single rank_dropout=0.1", help="settings of the network module as name=value"
    )
    network_train_unet_only: bool = option(False, help="train the transformer (or U-Net) part only")
    network_train_text_encoder_only: bool = option(False, help="train the text encoder part only")
    dim_from_weights: bool = option(False, help="take ranks and alphas from --network_weights instead of --network_dim")
    base_weights: tuple[str, ...] | None = option(path=True, help="network files merged into the model before training")
    base_weights_multiplier: tuple[float, ...] | None = option(help="their strengths; 1.0 for those that are missing")
    scale_weight_norms: float | None = option(
        help="after each step scale down network weights whose norm exceeds this", example="1.0", least=0
    )
    unet_lr: float | None = option(
        help="learning rate of the transformer (or U-Net) part; --learning_rate when not given", least=0
    )
    text_encoder_lr: tuple[float, ...] | None = option(
        help="learning rate of the text encoder part, or one per encoder (CLIP-L, T5); --learning_rate when not given",
        least=0,
    )
    no_metadata: bool = option(False, help="store only what is needed to use the network in the file's metadata")
    training_comment: str | None = option(help="comment stored in the file's metadata")
    initial_epoch: int | None = option(help="epoch to start at, from 1; a resumed state knows it", least=0)
    initial_step: int | None = option(
        help="number of steps that count as done, over all epochs; wins over --initial_epoch; a resumed state knows it",
        least=0,
    )
    skip_until_initial_step: bool = option(
        False, help="start within the epoch at the place that belongs to --initial_step instead of at an epoch's begin"
    )
    save_model_as: str | None = option(
        "safetensors",
        choices=(None, "ckpt", "pt", "safetensors"),
        help="format of the saved network; ckpt and pt are torch files, which hold no metadata",
    )
    fp8_base_unet: bool = option(False, help="like --fp8_base, but the text encoders stay as they are")
    split_mode: bool = option(
        False, help="old way to save memory; half of the transformer is swapped, as with --blocks_to_swap"
    )


@dataclass(frozen=True, kw_only=True)
class FluxFullOptions:
    """Fine-tuning of FLUX.1."""

    double_blocks_to_swap: int | None = option(help="old spelling of --blocks_to_swap for double blocks")
    single_blocks_to_swap: int | None = option(help="old spelling of --blocks_to_swap for single blocks")
    blockwise_fused_optimizers: bool = option(
        False, help="one optimizer per transformer block, stepped during the backward pass, which saves memory"
    )
    fused_optimizer_groups: int | None = option(
        help="number of parameter groups that are stepped during the backward pass"
    )
    skip_latents_validity_check: bool = option(False, help="old spelling of --skip_cache_check")


_TRAINED_RATE = "; 0 freezes it; negative rates make the loss grow"


@dataclass(frozen=True, kw_only=True)
class TrainEncoderOptions:
    """Fine-tuning of text encoders."""

    train_text_encoder: bool = option(False, help="train the text encoders, too")
    diffusers_xformers: bool = option(False, help="like --xformers")


@dataclass(frozen=True, kw_only=True)
class EncoderRateOptions:
    """Learning rate of the text encoder."""

    learning_rate_te: float | None = option(
        help=f"learning rate of the text encoder; --learning_rate when not given{_TRAINED_RATE}", example="1e-6"
    )


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptions:
    """DreamBooth."""

    stop_text_encoder_training: int | None = option(
        help="train the text encoder up to this step and freeze it then; -1 never trains it; it is trained to the end "
        "when not given"
    )
    no_token_padding: bool = option(
        False, help="captions aren't filled up to --max_token_length; only with batches of one image"
    )


@dataclass(frozen=True, kw_only=True)
class SdxlFullOptions:
    """Fine-tuning of SDXL."""

    learning_rate_te1: float | None = option(
        help=f"learning rate of the first text encoder; --learning_rate when not given{_TRAINED_RATE}", example="1e-6"
    )
    learning_rate_te2: float | None = option(
        help=f"learning rate of the second text encoder; --learning_rate when not given{_TRAINED_RATE}", example="1e-6"
    )
    block_lr: str | None = option(
        help="23 learning rates of the U-Net's blocks, separated by commas, instead of --learning_rate; 0 freezes a "
        "block",
        example="1e-6,1e-6,0,0,... (23 numbers)",
    )
    fused_optimizer_groups: int | None = option(
        help="cut the parameters into this many groups, each stepped during the backward pass by an optimizer of its "
        "own, which saves the memory of the gradients",
        least=0,
    )


@dataclass(frozen=True, kw_only=True)
class Sd3FullOptions:
    """Fine-tuning of SD3."""

    train_t5xxl: bool = option(False, help="train T5, too; with --train_text_encoder")
    learning_rate_te1: float | None = option(
        help=f"learning rate of CLIP-L; --learning_rate when not given{_TRAINED_RATE}", example="1e-6"
    )
    learning_rate_te2: float | None = option(
        help=f"learning rate of CLIP-G; --learning_rate when not given{_TRAINED_RATE}", example="1e-6"
    )
    learning_rate_te3: float | None = option(
        help=f"learning rate of T5; --learning_rate when not given{_TRAINED_RATE}", example="1e-6"
    )
    num_last_block_to_freeze: int | None = option(help="leave so many of the last blocks as they are", least=0)
    save_clip: bool = option(
        False, help="put CLIP-L and CLIP-G into the saved model; those that are trained always are"
    )
    save_t5xxl: bool = option(False, help="put T5 into the saved model; if it is trained it always is")
    blockwise_fused_optimizers: bool = option(
        False, help="one optimizer per transformer block, stepped during the backward pass, which saves memory"
    )
    fused_optimizer_groups: int | None = option(
        help="cut the parameters into this many groups, each stepped during the backward pass by an optimizer of its "
        "own, which saves the memory of the gradients",
        least=0,
    )
    skip_latents_validity_check: bool = option(False, help="old spelling of --skip_cache_check")


# tools


@dataclass(frozen=True, kw_only=True)
class CacheToolOptions:
    """Caching."""

    flux: bool = option(False, help="the cache is for FLUX.1; SD 1.x and 2.x when nothing tells")
    sdxl: bool = option(False, help="the cache is for SDXL")
    sd3: bool = option(False, help="the cache is for SD3")
    skip_existing: bool = option(
        False, help="leave files alone that exist; they are always checked, and right ones kept"
    )


@dataclass(frozen=True, kw_only=True)
class T5DtypeOptions:
    """Precision of T5."""

    t5xxl_dtype: str | None = option(help="type for T5; --mixed_precision when not given", example="bf16")


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """What image generation has in common."""

    prompt: str = option("A photo of a cat", help="what to show; several words in quotes")
    output_dir: str = option(".", help="folder for the images")
    offload: bool = option(False, help="keep parts on the CPU until they are needed")
    lora_weights: tuple[str, ...] = option(
        (), help="network files to apply, each with its strength after a semicolon", example='"lora.safetensors;0.8"'
    )
    merge_lora_weights: bool = option(False, help="merge the networks into the model instead of running them beside it")
    interactive: bool = option(False, help="ask for prompts until an empty one")


@dataclass(frozen=True, kw_only=True)
class FluxInferenceOptions(InferenceOptions):
    """Image generation with FLUX.1."""

    ckpt_path: str = option(required=True, path=True, help="transformer of FLUX.1, a safetensors file")
    clip_l: str | None = option(path=True, help="CLIP-L text encoder, a safetensors file")
    t5xxl: str | None = option(path=True, help="T5-XXL text encoder, a safetensors file")
    ae: str | None = option(path=True, help="autoencoder of FLUX, a safetensors file")
    apply_t5_attn_mask: bool = option(False, help="hide padding tokens from T5 and from the transformer's attention")
    negative_prompt: str | None = option(help="what not to show; used with --cfg_scale above 1")
    width: int = option(1360, help="width in pixels, rounded to a multiple of 16", least=1)
    height: int = option(768, help="height in pixels, rounded to a multiple of 16", least=1)
    steps: int | None = option(
        help="number of steps; 4 for FLUX.1-schnell and 50 for FLUX.1-dev when not given", least=0
    )
    seed: int | None = option(
        help="number that decides the image; drawn when not given", least=-(2**63), most=2**64 - 1
    )
    guidance: float = option(3.5, help="guidance that FLUX.1-dev embeds")
    cfg_scale: float = option(1.0, help="classifier-free guidance towards the prompt and away from --negative_prompt")
    dtype: str = option(
        "bfloat16", help="type of all parts that have none of their own", example="bf16, fp16 or float32"
    )
    clip_l_dtype: str | None = option(help="type of CLIP-L")
    t5xxl_dtype: str | None = option(help="type of T5")
    ae_dtype: str | None = option(help="type of the autoencoder")
    flux_dtype: str | None = option(help="type of the transformer")
    model_type: str = option("flux", choices=("flux", "chroma"), help="kind of model")


@dataclass(frozen=True, kw_only=True)
class InferenceExtraOptions:
    """Tokens."""

    tokenizer_cache_dir: str | None = option(
        path=True,
        help="folder with tokenizers, each in a sub-folder named like its hub repository with / replaced by _",
    )
    t5xxl_max_token_length: int | None = option(
        help="tokens for T5; 512 for FLUX.1-dev and 256 for FLUX.1-schnell when not given", least=1, most=4096
    )


@dataclass(frozen=True, kw_only=True)
class ShowMetadataOptions:
    """Metadata."""

    model: str = option(required=True, help="safetensors file")
    filter: tuple[str, ...] | None = option(
        example="ss_network_* modelspec.*", help="only keys that match one of these wildcards", some=True
    )
    verify: bool = option(False, help="only check that the hashes of a network file fit its weights and metadata")


@dataclass(frozen=True, kw_only=True)
class EditMetadataOptions:
    """Editing; without --save_to or --overwrite the result is shown and nothing is written."""

    strip: tuple[str, ...] | None = option(
        choices=("paths", "folders", "captions", "models", "minimal", "all"),
        some=True,
        help="make it private: cut paths down to names, replace the names of dataset folders by numbers, leave out "
        "tags and words of captions, leave out names and hashes of base models, leave out what --no_metadata would, "
        "or everything",
    )
    remove: tuple[str, ...] | None = option(
        example="ss_training_comment", help="leave out the keys that match these wildcards", some=True
    )
    set: tuple[str, ...] | None = option(
        example='modelspec.title="My cat"', help="values to put in, as name=value", some=True
    )
    save_to: str | None = option(help="file for the result")
    overwrite: bool = option(False, help="write the result in place, or over a --save_to that exists")


@dataclass(frozen=True, kw_only=True)
class NetworkMergeOptions:
    """What merging into transformers has in common."""

    models: tuple[str, ...] | None = option(path=True, help="network files to merge")
    ratios: tuple[float, ...] | None = option(help="strength of each network, in the order of --models")
    concat: bool = option(
        False,
        help="merge networks with each other exactly: ranks add up; otherwise matrices of one rank are added, "
        "which mixes them",
    )
    shuffle: bool = option(False, help="put the ranks of the merged network in random order")
    save_precision: str | None = option(
        help="type of the saved weights; as in the file they are of when not given", example="bf16, fp16, float or fp8"
    )
    loading_device: str = option("cpu", help="device that the networks are loaded to", example="cuda")
    working_device: str = option("cpu", help="device that computes; cuda is much faster", example="cuda")
    no_metadata: bool = option(False, help="don't write modelspec metadata; of a network only its kind, rank and alpha")
    overwrite: bool = option(False, help="let the result replace one of the files it is made of")


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions:
    """What extracting from transformers has in common."""

    save_to: str = option(required=True, help="file for the LoRA")
    dim: int = option(4, help="rank of the new network", least=1)
    clamp_quantile: float = option(
        0.99, help="cut matrix elements down to this quantile of their absolute values; 1 leaves them", least=0, most=1
    )
    exact: bool = option(False, help="compute all singular values instead of the largest ones, which takes long")
    device: str | None = option(help="device that computes; the CPU when not given", example="cuda")
    save_precision: str | None = option(
        choices=(None, "float", "fp16", "bf16"), help="type of the saved weights; float when not given"
    )
    no_metadata: bool = option(False, help="don't write modelspec metadata, only kind, rank and alpha")
    overwrite: bool = option(False, help="let the result replace one of the files it is made of")


@dataclass(frozen=True, kw_only=True)
class FluxMergeLoraOptions(NetworkMergeOptions):
    """Merging."""

    flux_model: str | None = option(
        path=True,
        help="transformer of FLUX.1 to merge into, a file or a Diffusers folder; without any model the "
        "networks are merged with each other",
    )
    clip_l: str | None = option(path=True, help="CLIP-L text encoder to merge into")
    t5xxl: str | None = option(path=True, help="T5-XXL text encoder to merge into")
    save_to: str | None = option(help="file for the merged transformer, or for the merged network")
    clip_l_save_to: str | None = option(help="file for the merged CLIP-L")
    t5xxl_save_to: str | None = option(help="file for the merged T5-XXL")
    diffusers: bool = option(
        False, help="the networks have the names of Diffusers or AI-toolkit, which is found out without this, too"
    )
    precision: str = option("float", help="type to compute in")
    mem_eff_load_save: bool = option(
        False, help="accepted: models are always read, merged and written tensor by tensor"
    )


@dataclass(frozen=True, kw_only=True)
class FluxExtractLoraOptions(ExtractionOptions):
    """Extraction."""

    model_org: str = option(required=True, path=True, help="original transformer, a file or a Diffusers folder")
    model_tuned: str = option(required=True, path=True, help="tuned transformer")
    mem_eff_safe_open: bool = option(False, help="accepted: models are always read tensor by tensor")


@dataclass(frozen=True, kw_only=True)
class ConvertFluxLoraOptions:
    """Conversion."""

    src: str = option("ai-toolkit", help="layout of the file: ai-toolkit, which is that of Diffusers, or sd-scripts")
    dst: str = option("sd-scripts", help="layout to convert to: sd-scripts or ai-toolkit")
    src_path: str | None = option(path=True, help="LoRA to convert")
    dst_path: str | None = option(help="file for the converted LoRA")
    overwrite: bool = option(False, help="let the result replace the file it is made of")


@dataclass(frozen=True, kw_only=True)
class ConvertDiffusersToFluxOptions:
    """Conversion."""

    diffusers_path: str = option(
        required=True, path=True, help="Diffusers folder of FLUX.1, its folder transformer, a file or the first shard"
    )
    save_to: str = option(required=True, help="file to write")
    save_precision: str | None = option(
        help="type of the saved weights; as they are when not given", example="bf16, fp16, float or fp8"
    )
    mem_eff_load_save: bool = option(False, help="accepted: tensors are always read and written one by one")
    overwrite: bool = option(False, help="let the result replace one of the files it is made of")


@dataclass(frozen=True, kw_only=True)
class MergeModelOptions:
    """Merging into a model."""

    sd_model: str | None = option(
        path=True, help="checkpoint to merge into, one file; when not given the networks are merged with each other"
    )
    concat: bool = option(
        False,
        help="merge networks with each other exactly: ranks add up; otherwise matrices of one rank are added, "
        "which mixes them",
    )
    shuffle: bool = option(False, help="put the ranks of the merged network in random order")


@dataclass(frozen=True, kw_only=True)
class MergeNetworksOptions:
    """Networks and result."""

    models: tuple[str, ...] | None = option(path=True, help="network files to merge")
    ratios: tuple[float, ...] | None = option(
        help="strength of each network, in the order of --models; 1 for all when not given", example="0.7 -0.3"
    )
    lbws: tuple[str, ...] | None = option(
        help="for each network a list of numbers by which its blocks count, 12 or 20 for SDXL, 17 or 26 for SD 1.x and "
        "2.x",
        example='"[1,1,1,1,1,1,0,0,0,0,0,0]"',
    )
    save_to: str | None = option(help="file for the result")
    precision: str = option("float", choices=("float", "fp16", "bf16"), help="type to compute in")
    save_precision: str | None = option(
        choices=(None, "float", "fp16", "bf16"),
        help="type of the saved weights; as in the model, or the first network, when not given",
    )
    device: str | None = option(help="device that computes; the CPU when not given", example="cuda")
    no_metadata: bool = option(False, help="don't write modelspec metadata; of a network only its kind, rank and alpha")
    overwrite: bool = option(False, help="let the result replace one of the files it is made of")


@dataclass(frozen=True, kw_only=True)
class MergeVersionOptions:
    """Version."""

    v2: bool = option(False, help="the networks are for SD 2.x, where neither they nor a model say it")


@dataclass(frozen=True, kw_only=True)
class SvdMergeOptions:
    """Rank of the result."""

    new_rank: int = option(4, help="rank of the result", least=1)
    new_conv_rank: int | None = option(
        help="its rank on convolutions with kernels larger than 1; --new_rank when not given", least=1
    )
    clamp_quantile: float = option(
        0.99, help="cut matrix elements down to this quantile of their absolute values; 1 leaves them", least=0, most=1
    )


@dataclass(frozen=True, kw_only=True)
class CheckLoraWeightsOptions:
    """Statistics."""

    file: str = option(required=True, position=0, help="network file")
    show_all_keys: bool = option(False, short="-s", help="show all tensors, not only the matrices")


@dataclass(frozen=True, kw_only=True)
class LoraInterrogatorOptions:
    """Interrogation."""

    sd_model: str | None = option(path=True, help="checkpoint of SD 1.x or 2.x, a file or a Diffusers folder")
    model: str | None = option(path=True, help="network file with adapters of the text encoder")
    v2: bool = option(False, help="the model is Stable Diffusion 2.x")
    batch_size: int = option(16, help="tokens encoded at once", least=1)
    clip_skip: int | None = option(
        help="compare this layer of the text encoder, counted from the end (1 is the last)", least=1
    )
    top: int = option(100, help="number of tokens that are shown", least=1)
    device: str | None = option(help="device that computes; the CPU when not given", example="cuda")
    tokenizer_cache_dir: str | None = option(
        path=True,
        help="folder with tokenizers, each in a sub-folder named like its hub repository with / replaced by _",
    )


@dataclass(frozen=True, kw_only=True)
class MergeModelsOptions:
    """Merging."""

    models: tuple[str, ...] | None = option(path=True, some=True, help="checkpoints to merge, one file each")
    ratios: tuple[float, ...] | None = option(
        some=True, help="weight of each model, in the order of --models; equal ones when not given", example="0.7 0.3"
    )
    output: str | None = option(help="file for the result; .safetensors may be left out")
    unet_only: bool = option(False, help="merge the U-Net, and take everything else from the first model")
    precision: str = option("float", choices=("float", "fp16", "bf16"), help="type to compute in")
    saving_precision: str = option("float", choices=("float", "fp16", "bf16"), help="type of the saved weights")
    device: str = option("cpu", help="device that computes", example="cuda")
    show_skipped: bool = option(False, help="list the tensors that only some of the models have")
    no_metadata: bool = option(False, help="don't write modelspec metadata")
    overwrite: bool = option(False, help="let the result replace one of the files it is made of")


@dataclass(frozen=True, kw_only=True)
class ConvertDiffusersSdOptions:
    """Conversion."""

    model_to_load: str = option(
        required=True, position=0, help="checkpoint of SD 1.x, 2.x or SDXL, a file or a Diffusers folder"
    )
    model_to_save: str = option(
        required=True, position=1, help="file (.safetensors, .ckpt) or Diffusers folder to write, told by the suffix"
    )
    v1: bool = option(False, help="the model must be SD 1.x; the version is found out without this, too")
    v2: bool = option(False, help="the model must be SD 2.x")
    fp16: bool = option(False, help="save in float16")
    bf16: bool = option(False, help="save in bfloat16")
    float: bool = option(False, help="save in float32")
    save_precision_as: str = option(
        "no", choices=("fp16", "bf16", "float"), help="save in this type; as it is when not given"
    )
    epoch: int = option(0, help="epoch written into a .ckpt file", least=0)
    global_step: int = option(0, help="step written into a .ckpt file", least=0)
    metadata: str | None = option(
        help="values for the metadata of a .safetensors file, as JSON", example='\'{"modelspec.title": "My cat"}\''
    )
    variant: str | None = option(help="read this variant of the weights in a Diffusers folder", example="fp16")
    reference_model: str | None = option(
        path=True, help="Diffusers folder that the scheduler and the tokenizers of a written folder are taken from"
    )
    use_safetensors: bool = option(False, help="write a Diffusers folder with safetensors files")
    unet_use_linear_projection: bool = option(False, help="how the U-Net of SD 2.x is built, which its weights tell")
    overwrite: bool = option(False, help="let the result replace what is there")


# which options are not used where

_DATASET_PENDING = {
    "dataset_class": "own dataset classes come later; use --dataset_config",
    "model_type=chroma": "Chroma comes later",
}

_TRAINING_PENDING = {
    **_DATASET_PENDING,
    **dict.fromkeys((spec.name for spec in options_of(DeepSpeedOptions)), "DeepSpeed comes later"),
}

_SD_ONLY = "only for Stable Diffusion"
_DDPM_ONLY = "FLUX learns a flow, which has no such noise schedule"
_HIGHVRAM = "GPU memory is always kept from one cached batch to the next"
_SLICES = "the attention of torch needs no slices"

_FLUX_IGNORED = {
    **dict.fromkeys(("v2", "v_parameterization", "clip_skip", "max_token_length", "weighted_captions"), _SD_ONLY),
    "vae": "the autoencoder of FLUX is named by --ae",
    "zero_terminal_snr": _DDPM_ONLY,
    "highvram": _HIGHVRAM,
    **dict.fromkeys(("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale"), _DDPM_ONLY),
    **dict.fromkeys(("multires_noise_iterations", "multires_noise_discount"), _DDPM_ONLY),
    **dict.fromkeys((spec.name for spec in options_of(SnrOptions)), _DDPM_ONLY),
    "sample_sampler": "FLUX has one sampler",
    "mem_eff_attn": _SLICES,
    "ddp_gradient_as_bucket_view": "gradients are averaged without DistributedDataParallel",
    "ddp_static_graph": "gradients are averaged without DistributedDataParallel",
}


@dataclass(frozen=True, kw_only=True)
class ResizeLoraOptions:
    """Resizing."""

    model: str | None = option(path=True, help="LoRA to resize")
    save_to: str | None = option(help="file for the result")
    new_rank: int = option(4, help="new rank; with --dynamic_method the largest one", least=1)
    new_conv_rank: int | None = option(help="the same for kernels larger than 1x1; --new_rank when not given", least=1)
    dynamic_method: str | None = option(
        choices=(None, "sv_ratio", "sv_fro", "sv_cumulative"),
        help="choose the rank of each module by its singular values: by the largest over the smallest kept one, by the "
        "kept part of the norm, or by the kept part of the sum",
    )
    dynamic_param: float | None = option(
        help="for --dynamic_method: a ratio above 1, or a part between 0 and 1", example="0.9"
    )
    save_precision: str | None = option(
        choices=(None, "float", "fp16", "bf16"), help="type of the saved weights; that of the file when not given"
    )
    device: str | None = option(help="device that computes; the CPU when not given", example="cuda")
    verbose: bool = option(False, help="say what is kept of each module")
    overwrite: bool = option(False, help="let the result replace the file it is made of")


@dataclass(frozen=True, kw_only=True)
class ExtractLoraOptions:
    """Extraction."""

    model_org: str = option(required=True, path=True, help="original model, a file or a Diffusers folder")
    model_tuned: str = option(required=True, path=True, help="tuned model")
    save_to: str = option(required=True, help="file for the LoRA")
    dim: int = option(4, help="rank of the new network", least=1)
    conv_dim: int | None = option(
        help="rank of kernels larger than 1x1; with it the layers around attention are taken, too", least=1
    )
    min_diff: float = option(0.01, help="leave out text encoders in which no value differs by more than this", least=0)
    clamp_quantile: float = option(
        0.99, help="cut matrix elements down to this quantile of their absolute values; 1 leaves them", least=0, most=1
    )
    exact: bool = option(False, help="compute all singular values instead of the largest ones, which takes long")
    device: str | None = option(help="device that computes; the CPU when not given", example="cuda")
    load_precision: str | None = option(
        choices=(None, "float", "fp16", "bf16"), help="round both models to this type first; as they are when not given"
    )
    save_precision: str | None = option(
        choices=(None, "float", "fp16", "bf16"), help="type of the saved weights; float when not given"
    )
    load_original_model_to: str | None = option(help="device for the original model")
    load_tuned_model_to: str | None = option(help="device for the tuned model")
    v2: bool = option(False, help="the models are SD 2.x, which is found out without this, too")
    sdxl: bool = option(False, help="the models are SDXL, which is found out without this, too")
    v_parameterization: bool | None = option(
        help="the models predict velocity; written into the metadata, and known of files that say so themselves"
    )
    no_metadata: bool = option(False, help="don't write modelspec metadata, only kind, rank and alpha")
    overwrite: bool = option(False, help="let the result replace one of the files it is made of")


@dataclass(frozen=True, kw_only=True)
class ExtractDyloraOptions:
    """Extraction."""

    model: str | None = option(path=True, help="DyLoRA file")
    save_to: str | None = option(help="file for the results; their ranks are added to the name")
    unit: int | None = option(help="rank of the first result, and by which the others differ", least=1)
    overwrite: bool = option(False, help="let a result replace the file it is made of")


_CONSOLE = (ConsoleOptions, ConfigFileOptions)
_MODEL_AND_DATA = (ModelOptions, LegacySDOptions, DatasetOptions, CaptionOptions, CacheOptions, TextCacheOptions)
_DATASET = (*_MODEL_AND_DATA, T5TextOptions, FluxOptions)
_TRAINING = (
    *(
        LengthOptions,
        PrecisionOptions,
        MemoryOptions,
        LossOptions,
        NoiseOptions,
        FlowDensityOptions,
        SaveOptions,
        StateOptions,
    ),
    *(SampleOptions, TrackerOptions, MetadataOptions, HubOptions, DistributedOptions),
)
_TRAINERS_ONLY = (OptimizerOptions, ScheduleOptions, OffloadOptions, SnrOptions, DeepSpeedOptions)

_CACHING_USES = ("sdpa", "ddp_timeout", "mixed_precision", "lowram", "fp8_base")
_UNTRAINED = "nothing is trained"
_CACHING_IGNORED = {
    **dict.fromkeys(
        (
            spec.name
            for group in (*_TRAINING, PriorLossOptions)
            for spec in options_of(group)
            if spec.name not in _CACHING_USES
        ),
        _UNTRAINED,
    ),
    **dict.fromkeys(
        ("guidance_scale", "timestep_sampling", "sigmoid_scale", "model_prediction_type", "discrete_flow_shift"),
        _UNTRAINED,
    ),
    **dict.fromkeys(("v_parameterization", "zero_terminal_snr"), _UNTRAINED),
    **dict.fromkeys(("max_data_loader_n_workers", "persistent_data_loader_workers"), "images are read by threads"),
    "highvram": _HIGHVRAM,
    "skip_existing": "files that exist are always checked, and right ones kept",
}
_NO_TEXT, _NO_IMAGES = "only latents are cached here", "only text encoder outputs are cached here"
_TEXT_ONLY = (
    *("clip_l", "t5xxl", "tokenizer_cache_dir", "clip_skip", "max_token_length", "weighted_captions"),
    *("clip_g", "apply_lg_attn_mask", "t5xxl_device", "fp8_base"),
    *("t5xxl_max_token_length", "apply_t5_attn_mask", "text_encoder_batch_size"),
    *("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
)
_IMAGES_ONLY = (
    *("ae", "vae", "vae_batch_size", "cache_latents", "cache_latents_to_disk"),
    *("resize_interpolation", "flip_aug"),
)

# scripts

FLUX_TRAIN_NETWORK = Script(
    name="flux_train_network.py",
    summary="Trains a LoRA or another network on FLUX.1.",
    groups=(
        *(*_CONSOLE, *_DATASET, NetworkOptions, *_TRAINING, *_TRAINERS_ONLY),
        *(VaePrecisionOptions, PriorLossOptions, ValidationOptions, EmaOptions),
    ),
    pending=_TRAINING_PENDING,
    refused={"weighted_captions": "FLUX can't weigh words of captions"},
    ignored=_FLUX_IGNORED,
)

FLUX_TRAIN = Script(
    name="flux_train.py",
    summary="Fine-tunes the whole transformer of FLUX.1.",
    groups=(
        *(*_CONSOLE, *_DATASET, FluxFullOptions, FullSaveOptions, *_TRAINING, *_TRAINERS_ONLY),
        *(ValidationOptions, EmaOptions),
    ),
    pending=_TRAINING_PENDING,
    refused={
        **dict.fromkeys(
            ("fp8_scaled", "int8_base", "nf4_base", "fp8_compute", "int8_compute"),
            "what is trained can't be held in so few bits; use --full_bf16",
        ),
        "save_model_as=diffusers": "FLUX models are saved as one safetensors file",
        "save_model_as=diffusers_safetensors": "FLUX models are saved as one safetensors file",
    },
    ignored={
        **_FLUX_IGNORED,
        "save_model_as=ckpt": "FLUX models are saved as one safetensors file",
        "use_safetensors": "FLUX models are always safetensors",
        "fused_optimizer_groups": "not for FLUX",
    },
)

FLUX_MINIMAL_INFERENCE = Script(
    name="flux_minimal_inference.py",
    summary="Makes images with FLUX.1.",
    groups=(FluxInferenceOptions, InferenceExtraOptions),
    pending={"model_type=chroma": "Chroma comes later"},
)

CACHE_LATENTS = Script(
    name="tools/cache_latents.py",
    summary="Encodes the images of a dataset once and stores the latents beside them.",
    groups=(
        *(*_CONSOLE, CacheToolOptions, *_DATASET, Sd3TextOptions, VaePrecisionOptions),
        *(*_TRAINING, PriorLossOptions),
    ),
    pending=_DATASET_PENDING,
    ignored={**_CACHING_IGNORED, **dict.fromkeys(_TEXT_ONLY, _NO_TEXT)},
)

CACHE_TEXT_ENCODER_OUTPUTS = Script(
    name="tools/cache_text_encoder_outputs.py",
    summary="Encodes the captions of a dataset once and stores the text encoder outputs beside the images.",
    groups=(
        *(*_CONSOLE, CacheToolOptions, *_DATASET, Sd3TextOptions, T5DtypeOptions),
        *(*_TRAINING, PriorLossOptions),
    ),
    pending=_DATASET_PENDING,
    ignored={**_CACHING_IGNORED, **dict.fromkeys(_IMAGES_ONLY, _NO_IMAGES)},
)

SHOW_METADATA = Script(
    name="tools/show_metadata.py",
    summary="Shows, filters, sets and strips the metadata of a safetensors file.",
    groups=(ShowMetadataOptions, EditMetadataOptions),
)

FLUX_MERGE_LORA = Script(
    name="networks/flux_merge_lora.py",
    summary="Merges LoRAs and other networks into FLUX.1 and its text encoders, or with each other.",
    groups=(FluxMergeLoraOptions,),
    ignored={"precision": "everything is computed in float32"},
)

FLUX_EXTRACT_LORA = Script(
    name="networks/flux_extract_lora.py",
    summary="Makes a LoRA of the difference between two FLUX.1 transformers.",
    groups=(FluxExtractLoraOptions,),
)

CONVERT_FLUX_LORA = Script(
    name="networks/convert_flux_lora.py",
    summary="Converts a LoRA for FLUX.1 between the layouts of sd-scripts and of AI-toolkit or Diffusers.",
    groups=(ConvertFluxLoraOptions,),
)

CONVERT_DIFFUSERS_TO_FLUX = Script(
    name="tools/convert_diffusers_to_flux.py",
    summary="Converts a FLUX.1 transformer from the layout of Diffusers to the file of its authors.",
    groups=(ConvertDiffusersToFluxOptions,),
)

_IN_FLOAT32 = {"precision": "everything is computed in float32"}

MERGE_LORA = Script(
    name="networks/merge_lora.py",
    summary="Merges LoRAs and other networks into an SD 1.x or 2.x checkpoint, or LoRAs with each other.",
    groups=(MergeModelOptions, MergeNetworksOptions, MergeVersionOptions),
    ignored=_IN_FLOAT32,
)

SDXL_MERGE_LORA = Script(
    name="networks/sdxl_merge_lora.py",
    summary="Merges LoRAs and other networks into an SDXL checkpoint, or LoRAs with each other.",
    groups=(MergeModelOptions, MergeNetworksOptions),
    ignored=_IN_FLOAT32,
)

MERGE_LORA_OLD = Script(
    name="networks/merge_lora_old.py",
    summary="An old name of merge_lora.py.",
    groups=(MergeModelOptions, MergeNetworksOptions, MergeVersionOptions),
    ignored=_IN_FLOAT32,
)

SVD_MERGE_LORA = Script(
    name="networks/svd_merge_lora.py",
    summary="Merges LoRAs with each other into one of a given rank.",
    groups=(MergeNetworksOptions, SvdMergeOptions),
    ignored=_IN_FLOAT32,
)

CHECK_LORA_WEIGHTS = Script(
    name="networks/check_lora_weights.py",
    summary="Prints statistics of the weights of a network.",
    groups=(CheckLoraWeightsOptions,),
)

LORA_INTERROGATOR = Script(
    name="networks/lora_interrogator.py",
    summary="Finds the tokens that a network changes most.",
    groups=(LoraInterrogatorOptions,),
)

MERGE_MODELS = Script(
    name="tools/merge_models.py",
    summary="Makes the weighted sum of checkpoints.",
    groups=(MergeModelsOptions,),
    ignored=_IN_FLOAT32,
)

CONVERT_DIFFUSERS20_ORIGINAL_SD = Script(
    name="tools/convert_diffusers20_original_sd.py",
    summary="Converts SD 1.x, 2.x and SDXL checkpoints between single files and Diffusers folders.",
    groups=(ConvertDiffusersSdOptions,),
    ignored={
        "unet_use_linear_projection": "the weights tell it",
        "use_safetensors": "folders are always written with safetensors files",
    },
)


@dataclass(frozen=True, kw_only=True)
class ConvertLoraOptions:
    """Conversion."""

    model: str = option(required=True, path=True, help="adapter to convert, safetensors; its layout is recognised")
    save_to: str = option(required=True, help="file to write, .safetensors")
    to: str = option(
        required=True,
        choices=("kohya", "comfyui", "lycoris", "diffusers", "ai-toolkit"),
        help="layout to write: that of sd-scripts (kohya), ComfyUI, LyCORIS, Diffusers and PEFT, or AI-toolkit",
    )
    source_layout: str | None = option(
        choices=(None, "kohya", "comfyui", "lycoris", "diffusers", "ai-toolkit"),
        help="layout of the file, where several fit",
    )
    family: str | None = option(
        choices=(None, "flux", "sd3", "sdxl", "sd1", "sd2"), help="what the adapter is for, where its names don't tell"
    )
    verify: bool = option(
        False, help="read the written file, and show the largest error of the changes that it makes to weights"
    )
    overwrite: bool = option(False, help="write over the file that is read")


CONVERT_LORA = Script(
    name="networks/convert_lora.py",
    summary="Converts LoRAs and other adapters between the layouts of programs, without loss.",
    groups=(ConvertLoraOptions,),
)

RESIZE_LORA = Script(
    name="networks/resize_lora.py",
    summary="Gives a LoRA another rank, fixed or chosen for each module.",
    groups=(ResizeLoraOptions,),
)

_TENSOR_BY_TENSOR = "models are read tensor by tensor, and --device computes"
EXTRACT_LORA_FROM_MODELS = Script(
    name="networks/extract_lora_from_models.py",
    summary="Makes a LoRA of the difference between two SD or SDXL models.",
    groups=(ExtractLoraOptions,),
    ignored={"load_original_model_to": _TENSOR_BY_TENSOR, "load_tuned_model_to": _TENSOR_BY_TENSOR},
)

EXTRACT_LORA_FROM_DYLORA = Script(
    name="networks/extract_lora_from_dylora.py",
    summary="Makes LoRAs of smaller ranks of a DyLoRA.",
    groups=(ExtractDyloraOptions,),
)


@dataclass(frozen=True, kw_only=True)
class CannyOptions:
    """Edges."""

    input: str | None = option(path=True, help="picture to read; needed")
    output: str | None = option(help="picture to write; needed")
    thres1: int = option(32, help="weakest change of grey that continues an edge", least=0)
    thres2: int = option(224, help="weakest change of grey that begins an edge", least=0)
    overwrite: bool = option(False, help="write over the picture that is read")


@dataclass(frozen=True, kw_only=True)
class ResizeImagesOptions:
    """Resizing."""

    src_img_folder: str = option(required=True, path=True, position=0, help="folder of pictures")
    dst_img_folder: str = option(required=True, position=1, help="folder for the copies")
    max_resolution: str = option(
        "512x512,384x384,256x256,128x128", help="sizes, each of which says how many pixels a copy may have at most"
    )
    divisible_by: int = option(1, help="cut copies at their borders until both sides are multiples of this", least=1)
    interpolation: str = option("area", choices=("area", "cubic", "lanczos4"), help="how pixels are made of others")
    save_as_png: bool = option(False, help="write PNG, with transparency, instead of JPEG")
    copy_associated_files: bool = option(
        False, help="copy files that are called like a picture once for each of its copies, under their names"
    )


@dataclass(frozen=True, kw_only=True)
class FaceOptions:
    """Faces."""

    src_dir: str | None = option(path=True, help="folder of pictures; needed")
    dst_dir: str | None = option(help="folder for the results; needed")
    rotate: bool = option(False, help="turn pictures so that the eyes are level")
    resize_fit: bool = option(False, help="resize pictures so that --crop_size just fits into them")
    resize_face_size: int | None = option(help="resize pictures so that the face has this size", least=1)
    crop_size: str | None = option(help="cut out a window of this width and height around the face", example="512,512")
    crop_ratio: str | None = option(help="the same in multiples of the face's size", example="2.5,3")
    min_size: int | None = option(help="smallest face, by its longer side", least=1)
    max_size: int | None = option(help="faces of this size or more are left out", least=1)
    multiple_faces: bool = option(False, help="write all faces of a picture, not only the largest")
    debug: bool = option(False, help="draw a frame around the face")
    face_model: str | None = option(
        path=True, help="YuNet's ONNX file, to find faces in photos; drawn ones are found by anime-face-detector"
    )


@dataclass(frozen=True, kw_only=True)
class LatentUpscalerOptions:
    """Upscaling."""

    vae_path: str | None = option(path=True, help="autoencoder of SD, a file or a folder; needed")
    weights: str | None = option(path=True, help="weights of the upscaler; needed")
    image_pattern: str | None = option(help="pictures, as a pattern in quotes; needed", example='"images/*.png"')
    output_dir: str = option(".", help="folder for the results")
    batch_size: int = option(4, help="latents refined at once", least=1)
    vae_batch_size: int = option(1, help="pictures encoded at once", least=1)
    debug: bool = option(False, help="also write the pictures as they were enlarged before")


CANNY = Script(name="tools/canny.py", summary="Draws the edges of a picture.", groups=(CannyOptions,))

RESIZE_IMAGES = Script(
    name="tools/resize_images_to_resolution.py",
    summary="Copies the pictures of a folder with fewer pixels.",
    groups=(ResizeImagesOptions,),
)

DETECT_FACE_ROTATE = Script(
    name="tools/detect_face_rotate.py",
    summary="Cuts faces out of pictures, turned upright.",
    groups=(FaceOptions,),
)

LATENT_UPSCALER = Script(
    name="tools/latent_upscaler.py",
    summary="Enlarges pictures by refining their latents.",
    groups=(LatentUpscalerOptions,),
)

# fine-tuning of Stable Diffusion and SDXL

_SD_FULL_PENDING = {name: why for name, why in _TRAINING_PENDING.items() if not name.startswith("model_type")}
_FEW_BITS = dict.fromkeys(
    ("fp8_scaled", "int8_base", "nf4_base", "fp8_compute", "int8_compute"),
    "what is trained can't be held in so few bits; use --full_bf16",
)
_SD_FULL_IGNORED = {
    name: _FLUX_IGNORED[name]
    for name in ("highvram", "mem_eff_attn", "ddp_gradient_as_bucket_view", "ddp_static_graph")
}
_NO_TEXT_FILES = {
    "cache_text_encoder_outputs_to_disk": "there are no such files for Stable Diffusion; "
    "--cache_text_encoder_outputs keeps them in memory"
}
_SD_FULL = (
    *(*_CONSOLE, ModelOptions, LegacySDOptions, DatasetOptions, CaptionOptions, CacheOptions, TextCacheOptions),
    *(VaePrecisionOptions, FullSaveOptions, *(group for group in _TRAINING if group is not FlowDensityOptions)),
    *(*_TRAINERS_ONLY, PriorLossOptions, ValidationOptions, EmaOptions),
)

TRAIN_DB = Script(
    name="train_db.py",
    summary="Fine-tunes Stable Diffusion 1.x or 2.x on a subject or a style (DreamBooth).",
    groups=(*_SD_FULL, EncoderRateOptions, DreamBoothOptions),
    pending=_SD_FULL_PENDING,
    refused={**_FEW_BITS, **_NO_TEXT_FILES},
    ignored=_SD_FULL_IGNORED,
)

FINE_TUNE = Script(
    name="fine_tune.py",
    summary="Fine-tunes Stable Diffusion 1.x or 2.x.",
    groups=(*_SD_FULL, TrainEncoderOptions, EncoderRateOptions),
    pending=_SD_FULL_PENDING,
    refused={**_FEW_BITS, **_NO_TEXT_FILES},
    ignored=_SD_FULL_IGNORED,
)

SDXL_TRAIN = Script(
    name="sdxl_train.py",
    summary="Fine-tunes SDXL.",
    groups=(*_SD_FULL, TrainEncoderOptions, SdxlFullOptions),
    pending=_SD_FULL_PENDING,
    refused={**_FEW_BITS, "v2": "sdxl_train.py is for SDXL; use fine_tune.py or train_db.py"},
    ignored={**_SD_FULL_IGNORED, "clip_skip": "SDXL always takes the layers that it was made with"},
)

# networks for Stable Diffusion and SDXL

_SD_NETWORK = (*(group for group in _SD_FULL if group is not FullSaveOptions), NetworkOptions)

TRAIN_NETWORK = Script(
    name="train_network.py",
    summary="Trains a LoRA or another network on Stable Diffusion 1.x or 2.x.",
    groups=_SD_NETWORK,
    pending=_SD_FULL_PENDING,
    refused=_NO_TEXT_FILES,
    ignored=_SD_FULL_IGNORED,
)

SDXL_TRAIN_NETWORK = Script(
    name="sdxl_train_network.py",
    summary="Trains a LoRA or another network on SDXL.",
    groups=_SD_NETWORK,
    pending=_SD_FULL_PENDING,
    refused={"v2": "sdxl_train_network.py is for SDXL; use train_network.py"},
    ignored={**_SD_FULL_IGNORED, "clip_skip": "SDXL always takes the layers that it was made with"},
)

# SD3

_SD3 = (
    *(*_CONSOLE, *_MODEL_AND_DATA, T5TextOptions, Sd3TextOptions, T5DtypeOptions, Sd3Options),
    *(Sd3DensityOptions if group is FlowDensityOptions else group for group in _TRAINING),
    *(*_TRAINERS_ONLY, VaePrecisionOptions, PriorLossOptions, ValidationOptions, EmaOptions),
)
_SD3_REFUSED = {"weighted_captions": "SD3 can't weigh words of captions"}
_SD3_LENGTHS = "CLIP always gets 77 tokens and T5 as many as --t5xxl_max_token_length says"
_FLOW_ONLY = "SD3 learns a flow, which has no such noise schedule"
_SD3_IGNORED = {
    **{name: _FLOW_ONLY if why is _DDPM_ONLY else why for name, why in _FLUX_IGNORED.items() if name != "vae"},
    "max_token_length": _SD3_LENGTHS,
    "sample_sampler": "SD3 has one sampler",
    "use_t5xxl_cache_only": "encoders that are trained run live, whatever is cached",
}
_ONE_FILE = "SD3 models are saved as one safetensors file"

SD3_TRAIN_NETWORK = Script(
    name="sd3_train_network.py",
    summary="Trains a LoRA or another network on SD3 or SD3.5.",
    groups=(*_SD3, NetworkOptions),
    pending=_SD_FULL_PENDING,
    refused=_SD3_REFUSED,
    ignored=_SD3_IGNORED,
)

SD3_TRAIN = Script(
    name="sd3_train.py",
    summary="Fine-tunes SD3 or SD3.5.",
    groups=(*_SD3, FullSaveOptions, TrainEncoderOptions, Sd3FullOptions),
    pending=_SD_FULL_PENDING,
    refused={
        **_FEW_BITS,
        **_SD3_REFUSED,
        "save_model_as=diffusers": _ONE_FILE,
        "save_model_as=diffusers_safetensors": _ONE_FILE,
    },
    ignored={
        **_SD3_IGNORED,
        "save_model_as=ckpt": _ONE_FILE,
        "use_safetensors": "SD3 models are always safetensors",
    },
)

# image generation with SDXL


@dataclass(frozen=True, kw_only=True)
class SdxlInferenceOptions(InferenceOptions):
    """Image generation with SDXL."""

    ckpt_path: str = option(required=True, path=True, help="SDXL model, a file or a Diffusers folder")
    vae: str | None = option(path=True, help="autoencoder to use instead of the model's, a file or a folder")
    prompt2: str | None = option(help="what the second text encoder gets; the same as the first when not given")
    negative_prompt: str = option("", help="what not to show")
    width: int = option(1024, help="width in pixels, rounded to a multiple of 8", least=1)
    height: int = option(1024, help="height in pixels, rounded to a multiple of 8", least=1)
    steps: int = option(50, help="number of steps", least=1, most=1000)
    seed: int | None = option(
        help="number that decides the image; drawn when not given", least=-(2**63), most=2**64 - 1
    )
    cfg_scale: float = option(7.0, help="guidance towards the prompt and away from --negative_prompt; 1 is off")
    sampler: str = option("euler", choices=_SAMPLERS, help="sampler")
    v_parameterization: bool = option(
        False, help="the model predicts velocity; files that say so themselves don't need this"
    )
    zero_terminal_snr: bool = option(
        False, help="the model was trained down to pure noise; files that say so themselves don't need this"
    )
    max_token_length: int | None = option(choices=(None, 150, 225), help="tokens of a prompt; 75 when not given")
    dtype: str = option("float16", help="type of the text encoders and the U-Net", example="bf16, fp16 or float32")
    vae_dtype: str | None = option(
        help="type of the autoencoder; that of --dtype when not given, but float32 instead of float16, which overflows"
    )
    tokenizer_cache_dir: str | None = option(
        path=True,
        help="folder with tokenizers, each in a sub-folder named like its hub repository with / replaced by _",
    )


SDXL_MINIMAL_INFERENCE = Script(
    name="sdxl_minimal_inference.py",
    summary="Makes images with SDXL.",
    groups=(SdxlInferenceOptions,),
)

# image generation with SD3


@dataclass(frozen=True, kw_only=True)
class Sd3InferenceOptions(InferenceOptions):
    """Image generation with SD3."""

    ckpt_path: str = option(required=True, path=True, help="SD3 or SD3.5 model, a file or a Diffusers folder")
    clip_l: str | None = option(path=True, help="CLIP-L text encoder; needed where the model holds none")
    clip_g: str | None = option(path=True, help="CLIP-G text encoder; needed where the model holds none")
    t5xxl: str | None = option(path=True, help="T5-XXL text encoder; without any its part of the text is left empty")
    vae: str | None = option(path=True, help="autoencoder; needed where the model holds none")
    do_not_use_t5xxl: bool = option(False, help="leave T5's part of the text empty, even if there is a T5")
    t5xxl_token_length: int = option(
        77, help="tokens for T5; for a model trained with 256, which is the trainers' default, give that", least=1
    )
    apply_lg_attn_mask: bool = option(False, help="hide padding tokens from CLIP-L and CLIP-G")
    apply_t5_attn_mask: bool = option(False, help="hide padding tokens from T5")
    negative_prompt: str = option("", help="what not to show")
    width: int = option(1024, help="width in pixels, rounded to a multiple of 16", least=1)
    height: int = option(1024, help="height in pixels, rounded to a multiple of 16", least=1)
    steps: int = option(50, help="number of steps", least=1, most=1000)
    seed: int = option(1, help="number that decides the image", least=-(2**63), most=2**64 - 1)
    cfg_scale: float = option(5.0, help="guidance towards the prompt and away from --negative_prompt; 1 is off")
    fp16: bool = option(False, help="compute in float16 instead of float32; the autoencoder stays in float32")
    bf16: bool = option(False, help="compute in bfloat16 instead of float32")
    mmdit_dtype: str | None = option(help="type of the transformer instead", example="fp8")
    t5xxl_dtype: str | None = option(help="type of T5 instead", example="fp8")
    vae_dtype: str | None = option(help="type of the autoencoder instead", example="bf16")
    attn_mode: str = option("torch", help="what computes attention: torch (sdpa is the same), xformers or flash")
    tokenizer_cache_dir: str | None = option(
        path=True,
        help="folder with tokenizers, each in a sub-folder named like its hub repository with / replaced by _",
    )


SD3_MINIMAL_INFERENCE = Script(
    name="sd3_minimal_inference.py",
    summary="Makes images with SD3 or SD3.5.",
    groups=(Sd3InferenceOptions,),
)

# tools for SD3


@dataclass(frozen=True, kw_only=True)
class Sd3MergeLoraOptions(NetworkMergeOptions):
    """Merging."""

    sd3_model: str | None = option(
        path=True,
        help="SD3 model to merge into, a transformer or a checkpoint with text encoders, or a Diffusers folder; "
        "without any model the networks are merged with each other",
    )
    clip_l: str | None = option(path=True, help="CLIP-L text encoder to merge into")
    clip_g: str | None = option(path=True, help="CLIP-G text encoder to merge into")
    t5xxl: str | None = option(path=True, help="T5-XXL text encoder to merge into")
    save_to: str | None = option(help="file for the merged model, or for the merged network")
    clip_l_save_to: str | None = option(help="file for the merged CLIP-L")
    clip_g_save_to: str | None = option(help="file for the merged CLIP-G")
    t5xxl_save_to: str | None = option(help="file for the merged T5-XXL")


@dataclass(frozen=True, kw_only=True)
class Sd3ExtractLoraOptions(ExtractionOptions):
    """Extraction."""

    model_org: str = option(
        required=True, path=True, help="original model, a transformer, a checkpoint or a Diffusers folder"
    )
    model_tuned: str = option(required=True, path=True, help="tuned model")


@dataclass(frozen=True, kw_only=True)
class MergeSd3Options:
    """Joining."""

    dit: str = option(
        required=True, path=True, help="SD3 transformer, a checkpoint that holds it, or a Diffusers folder"
    )
    vae: str | None = option(path=True, help="autoencoder to put in")
    clip_l: str | None = option(path=True, help="CLIP-L text encoder to put in")
    clip_g: str | None = option(path=True, help="CLIP-G text encoder to put in")
    t5xxl: str | None = option(path=True, help="T5-XXL text encoder to put in")
    output: str = option("merged_model.safetensors", help="file to write")
    device: str = option("cpu", help="device to load to")
    save_precision: str | None = option(
        help="type of the saved weights; as they are when not given", example="bf16, fp16, float or fp8"
    )
    overwrite: bool = option(False, help="let the result replace one of the files it is made of")


SD3_MERGE_LORA = Script(
    name="networks/sd3_merge_lora.py",
    summary="Merges LoRAs and other networks into SD3 and its text encoders, or with each other.",
    groups=(Sd3MergeLoraOptions,),
)

SD3_EXTRACT_LORA = Script(
    name="networks/sd3_extract_lora.py",
    summary="Makes a LoRA of the difference between two SD3 transformers.",
    groups=(Sd3ExtractLoraOptions,),
)

MERGE_SD3_SAFETENSORS = Script(
    name="tools/merge_sd3_safetensors.py",
    summary="Joins the transformer of SD3, its autoencoder and its text encoders into one file.",
    groups=(MergeSd3Options,),
    ignored={"device": "tensors are read and written one by one, and nothing is computed"},
)

SCRIPTS = (
    *(FLUX_TRAIN_NETWORK, FLUX_TRAIN, FLUX_MINIMAL_INFERENCE, CACHE_LATENTS, CACHE_TEXT_ENCODER_OUTPUTS, SHOW_METADATA),
    *(TRAIN_NETWORK, SDXL_TRAIN_NETWORK, TRAIN_DB, FINE_TUNE, SDXL_TRAIN, SDXL_MINIMAL_INFERENCE),
    *(SD3_TRAIN_NETWORK, SD3_TRAIN, SD3_MINIMAL_INFERENCE),
    *(FLUX_MERGE_LORA, FLUX_EXTRACT_LORA, CONVERT_FLUX_LORA, CONVERT_DIFFUSERS_TO_FLUX),
    *(MERGE_LORA, SDXL_MERGE_LORA, MERGE_LORA_OLD, SVD_MERGE_LORA, CHECK_LORA_WEIGHTS, LORA_INTERROGATOR),
    *(MERGE_MODELS, CONVERT_DIFFUSERS20_ORIGINAL_SD),
    *(CONVERT_LORA, CANNY, RESIZE_IMAGES, DETECT_FACE_ROTATE, LATENT_UPSCALER),
    *(RESIZE_LORA, EXTRACT_LORA_FROM_MODELS, EXTRACT_LORA_FROM_DYLORA),
    *(SD3_MERGE_LORA, SD3_EXTRACT_LORA, MERGE_SD3_SAFETENSORS),
)
