"""Pictures of twice the size: enlarged, encoded, refined as latents, decoded: `tools/latent_upscaler.py`."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library import devices
from library.data import picture_files
from library.data.picture_files import Pixels
from library.data.resizing import resize
from library.log import DataError, UserError, get_logger
from library.models import autoencoder, refiner
from library.models.checkpoints_sd import find_vae
from library.models.loading import Filling, filled
from library.models.loading_sd import build_vae
from library.models.locations import locate, open_tensors
from library.option_groups import LatentUpscalerOptions
from library.progress import Progress
from library.types import Size

logger = get_logger(__name__)

SCALE = 0.18215
"""Latents of SD are this many times what the autoencoder gives."""
TIMES = 2
MULTIPLE = 8
SEED = 0


@dataclass
class LatentUpscaler:
    """What programs that make images call to enlarge theirs."""

    model: refiner.LatentRefiner

    def support_latents(self) -> bool:
        """Whether it takes latents; it wants pictures."""
        return False

    def to(self, *args: Any, **kwargs: Any) -> LatentUpscaler:
        """As `nn.Module.to`."""
        self.model.to(*args, **kwargs)
        return self

    def eval(self) -> LatentUpscaler:
        """As `nn.Module.eval`; it always is."""
        return self

    @torch.no_grad()
    def upscale(
        self,
        vae: Any,
        lowreso_images: Sequence[Image.Image],
        lowreso_latents: Tensor | None,
        dtype: torch.dtype,
        width: int,
        height: int,
        batch_size: int = 1,
        vae_batch_size: int = 1,
    ) -> Tensor:
        """Latents (B, 4, height / 8, width / 8) of the pictures at that size, scaled as SD's.

        Args:
            vae: the autoencoder.
            lowreso_images: what to enlarge.
            lowreso_latents: not used.
            dtype: of the autoencoder.
            width: of the result.
            height: of the result.
            batch_size: latents that are refined at once.
            vae_batch_size: pictures that are encoded at once.
        """
        size = Size(width, height)
        pixels = [resize(np.asarray(image.convert("RGB")), size, "lanczos") for image in lowreso_images]
        latents = torch.cat([_encoded(vae, batch, dtype) for batch in _batches(pixels, vae_batch_size)])
        parameter = next(self.model.parameters())
        latents = latents.to(parameter.device, parameter.dtype)
        return torch.cat([self.model(batch) for batch in torch.split(latents, batch_size)]) * SCALE


def create_upscaler(*, weights: str, **_: object) -> LatentUpscaler:
    """An upscaler with the weights of a file. Errors: DataError when they aren't its."""
    with open_tensors(locate(weights, "--weights")) as tensors:
        model = refiner.load(dict(tensors), f"--weights {weights}")
    return LatentUpscaler(model)


def run(options: LatentUpscalerOptions) -> None:
    """Enlarges the pictures that the pattern names. Errors: UserError for missing options, DataError for files."""
    paths = _paths(options)
    device = devices.best_device()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    upscaler = create_upscaler(weights=options.weights or "").to(device, dtype)
    part = find_vae(options.vae_path or "", "--vae_path")
    with part.opened() as tensors:
        vae: Any = filled(lambda: build_vae(part.shapes), tensors, part.shapes, Filling(dtype, device))
    by_size: dict[tuple[int, int], list[Path]] = {}
    for path in paths:
        height, width = _cut(path).shape[:2]
        by_size.setdefault((width, height), []).append(path)
    with Progress("upscaling", len(paths), "images") as progress, torch.no_grad():
        for (width, height), same in by_size.items():
            for some in _batches(same, options.batch_size):
                images = [Image.fromarray(_cut(path)) for path in some]
                sizes = width * TIMES, height * TIMES
                latents = upscaler.upscale(vae, images, None, dtype, *sizes, options.batch_size, options.vae_batch_size)
                for path, image, row in zip(some, images, latents / SCALE, strict=True):
                    _write(options, path, image, _decoded(vae, row))
                    progress.advance()
    logger.info("%s: %d pictures of twice the size", options.output_dir, len(paths))


def _paths(options: LatentUpscalerOptions) -> list[Path]:
    for name in ("vae_path", "weights", "image_pattern"):
        if not getattr(options, name):
            raise UserError(f"--{name} is needed", f"--{name}", "see --help")
    paths = [Path(name) for name in sorted(glob.glob(options.image_pattern or ""))]  # noqa: PTH207 - any pattern
    if not paths:
        what = "no file has such a name"
        raise DataError(what, f"--image_pattern {options.image_pattern}", "put it in quotes", code="E-FILE-MISSING")
    for path in paths:
        picture_files.check_name(path, "--image_pattern")
    return paths


def _cut(path: Path) -> Pixels:
    """The picture with sides that are multiples of 8. Errors: DataError when nothing is left."""
    pixels = picture_files.upright(path).on(None)
    height, width = (side - side % MULTIPLE for side in pixels.shape[:2])
    if not height or not width:
        raise DataError("the picture is too small", str(path), "give pictures of 8x8 or more", code="E-IMAGE")
    return np.ascontiguousarray(pixels[:height, :width])


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), max(1, size)):
        yield items[start : start + max(1, size)]


def _encoded(vae: Any, pixels: Sequence[Pixels], dtype: torch.dtype) -> Tensor:
    """Unscaled latents, sampled with the same noise each time."""
    device = next(vae.parameters()).device
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
    posterior = autoencoder.encode(vae, batch.to(dtype))
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(SEED))
    return posterior.sample(noise.to(device))


def _decoded(vae: Any, latents: Tensor) -> Pixels:
    pixels = autoencoder.decode(vae, latents[None])[0].float()
    shown = ((pixels + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    return np.ascontiguousarray(shown.permute(1, 2, 0).numpy())


def _write(options: LatentUpscalerOptions, path: Path, image: Image.Image, pixels: Pixels) -> None:
    folder = Path(options.output_dir)
    if options.debug:
        size = Size(image.width * TIMES, image.height * TIMES)
        plain = resize(np.asarray(image), size, "lanczos")
        picture_files.save(plain, folder / f"{path.stem}_lanczos4{path.suffix}")
    picture_files.save(pixels, folder / f"{path.stem}_upscaled{path.suffix}")
