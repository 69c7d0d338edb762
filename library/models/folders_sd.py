"""Whole checkpoints of SD 1.x, 2.x and SDXL as Diffusers folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from library.files import write_text
from library.log import ResourceError, get_logger
from library.models.checkpoints_sd import TEXT_2, UNET, VAE, read_json
from library.models.joined import Joined
from library.models.keymaps import Shapes
from library.models.loading_sd import build_encoder, build_vae
from library.models.saving_sd import Product, opened
from library.models.unet import build_unet

if TYPE_CHECKING:
    from torch import nn

logger = get_logger(__name__)

_LATENT_SCALES = {"1": 0.18215, "2": 0.18215, "xl": 0.13025}
_SAMPLE_SIZES = {"1": 64, "2": 64, "xl": 128}
"""Height and width of the latents that pipelines make when not told; SD 2.x models that predict v have 96."""
_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}


def save_folder(path: Path, product: Product, *, safetensors: bool) -> None:
    """Write a Diffusers folder, whole or not at all; an older one of this name is replaced.

    Args:
        safetensors: instead of PyTorch's own format.

    Raises:
        ResourceError: disk full, no permission.
    """
    with _replacing(path) as folder:
        written = [name for name in product.parts if _save_part(folder / name, name, product, safetensors)]
        scheduler = _save_scheduler(folder, product)
        tokenizers = [name for name in _tokenizer_names(product) if _save_tokenizer(folder, name, product)]
        index = _index(product, written, tokenizers, scheduler)
        _write_json(folder / "model_index.json", index)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `path` when the block succeeds, and goes otherwise."""
    mark = token_hex(4)
    temporary, old = path.with_name(f".{path.name}.{mark}.tmp"), path.with_name(f".{path.name}.{mark}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except OSError as error:
        if old.exists() and not path.exists():
            with suppress(OSError):
                old.rename(path)
        what, hint = f"cannot write: {error.strerror or error}", "check the disk and the rights of the folder"
        raise ResourceError(what, str(path), hint, code="E-DISK-WRITE") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _save_part(folder: Path, name: str, product: Product, safetensors: bool) -> bool:
    """Whether there was something to write."""
    with opened(product, name) as part:
        if part is None:
            return False
        tensors, recipes, shapes = part
        joined = Joined()
        joined.add(tensors, recipes, dtype=product.dtype)
        stem = "diffusion_pytorch_model" if name in (UNET, VAE) else "model" if safetensors else "pytorch_model"
        if safetensors:
            joined.save_safetensors(folder / f"{stem}.safetensors", {"format": "pt"})
        else:
            joined.save_pickled(folder / f"{stem}.bin")
    _write_json(folder / "config.json", _config(name, product, shapes))
    return True


def _config(name: str, product: Product, shapes: Shapes) -> dict[str, Any]:
    """What Diffusers or Transformers builds the model by: that of the source folder, or made from the shapes."""
    theirs = read_json(product.source.path / name / "config.json") if product.source.is_folder else {}
    if theirs and not (name == VAE and product.vae is not None):
        return {key: value for key, value in theirs.items() if key != "_name_or_path"}
    model: Any = _empty(name, product, shapes)
    version = product.source.version
    if name not in (UNET, VAE):
        settings: dict[str, Any] = json.loads(model.config.to_json_string())
        return {"architectures": [type(model).__name__]} | settings
    if name == VAE:
        model.register_to_config(scaling_factor=_LATENT_SCALES[version])
    else:
        high = version == "2" and product.v_prediction
        model.register_to_config(sample_size=96 if high else _SAMPLE_SIZES[version], upcast_attention=high)
    config: dict[str, Any] = json.loads(model.to_json_string())
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _empty(name: str, product: Product, shapes: Shapes) -> nn.Module:
    import torch

    with torch.device("meta"):
        if name == UNET:
            return build_unet(shapes)
        return build_vae(shapes) if name == VAE else build_encoder(shapes, name, product.source.version)


_SCHEDULER = ("scheduler", "scheduler_config.json")


def _save_scheduler(target: Path, product: Product) -> str:
    """Writes the scheduler of the source folder, or the usual one, with the prediction of this run; gives its class."""
    import diffusers

    prediction = "v_prediction" if product.v_prediction else "epsilon"
    folder = product.reference or (product.source.path if product.source.is_folder else None)
    settings = read_json(folder.joinpath(*_SCHEDULER)) if folder is not None else {}
    if "_class_name" not in settings:
        xl = product.source.version == "xl"
        kind = diffusers.EulerDiscreteScheduler if xl else diffusers.DDIMScheduler
        own = {"timestep_spacing": "leading"} if xl else {"clip_sample": False, "set_alpha_to_one": False}
        settings = json.loads(kind(**_NOISE, **own).to_json_string())
    settings["prediction_type"] = prediction
    if product.zero_terminal:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    _write_json(target.joinpath(*_SCHEDULER), settings)
    return str(settings["_class_name"])


def _tokenizer_names(product: Product) -> list[str]:
    return [name.replace("text_encoder", "tokenizer") for name in product.source.encoders]


def _save_tokenizer(folder: Path, name: str, product: Product) -> bool:
    """Whether a tokenizer was at hand."""
    if name in product.tokenizers:
        product.tokenizers[name].save_pretrained(str(folder / name))
        return True
    if product.source.is_folder and (product.source.path / name).is_dir():
        shutil.copytree(product.source.path / name, folder / name)
        return True
    logger.warning("no files of the %s are at hand: put them into the folder before a pipeline loads it", name)
    return False


def _index(product: Product, parts: list[str], tokenizers: list[str], scheduler: str) -> dict[str, Any]:
    """`model_index.json`: the pipeline and the class of each part."""
    import diffusers

    xl = product.source.version == "xl"
    classes = {UNET: "UNet2DConditionModel", VAE: "AutoencoderKL", TEXT_2: "CLIPTextModelWithProjection"}
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler],
    }
    index |= (
        {"force_zeros_for_empty_prompt": True}
        if xl
        else {
            "requires_safety_checker": False,
            "safety_checker": [None, None],
        }
    )
    for name in parts:
        index[name] = ["diffusers" if name in (UNET, VAE) else "transformers", classes.get(name, "CLIPTextModel")]
    return index | {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
