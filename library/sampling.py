"""From a request to an image: the one sampler behind previews and inference scripts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from library import files, samplers
from library.objectives import Objective
from library.prompts import SampleRequest as SampleRequest
from library.types import Cond, Size


class Predict(Protocol):
    """A denoiser with everything but its inputs settled."""

    def __call__(self, x: Tensor, timesteps: Tensor, cond: Cond, guidance: Tensor, /) -> Tensor:
        """The answer (B, C, h, w) for latents x at timesteps (B,) in [0, 1000], with embedded guidance (B,)."""


class SizeCond(Protocol):
    """See `library.families.base.Family.size_cond`."""

    def __call__(self, original_sizes: Sequence[Size], crops: Sequence[tuple[int, int]], size: Size, /) -> Cond:
        """What the denoiser is told about sizes and crops."""


@torch.no_grad()
def generate(
    request: SampleRequest,
    *,
    predict: Predict,
    objective: Objective,
    cond: Cond,
    negative_cond: Cond | None = None,
    size_cond: SizeCond | None = None,
    latent_channels: int,
    stride: int,
    patch: int = 2,
    shift: bool,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents (1, C, h, w), float32, on the device.

    `cond` and `negative_cond` hold one prompt each; the latter is needed when `request.negative` isn't None. `stride`
    is pixels per latent cell, `patch` latent cells per side of a token; sides are lowered to whole tokens. `dtype` is
    the type in which the denoiser gets the latents. `progress` is called with steps done and all steps. Noise is drawn
    on the CPU from the request's seed, the same on every device; no other generator is touched.

    Errors: UserError for a sampler that isn't known.
    """
    request = request.fitted(stride * patch)
    height, width = request.height // stride, request.width // stride
    tokens = (height // patch) * (width // patch)
    sampler = samplers.create(objective, request.sampler, steps=request.steps, tokens=tokens, shift=shift)
    generator = torch.Generator()
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)
    x = sampler.begin(torch.randn(1, latent_channels, height, width, generator=generator).to(device))
    sizes = {} if size_cond is None else size_cond([request.size], [(0, 0)], request.size)
    sizes = {name: tensor.to(device) for name, tensor in sizes.items()}
    conds = [cond | sizes]
    if request.negative is not None:
        assert negative_cond is not None
        conds = _joined(negative_cond | sizes, cond | sizes)
    for i, timestep in enumerate(sampler.timesteps):
        answers = [
            _answer(predict, sampler.scale(x, i).to(dtype), timestep, part, request.guidance or 0.0).float()
            for part in conds
        ]
        prediction = answers[0] if len(answers) == 1 else torch.cat(answers)
        if request.negative is not None:
            negative, positive = prediction.chunk(2)
            prediction = negative + request.cfg * (positive - negative)
        x = sampler.step(prediction, i, x, generator)
        if progress is not None:
            progress(i + 1, len(sampler.timesteps))
    return x


def _joined(negative: Cond, positive: Cond) -> list[Cond]:
    """Both in one batch, or one after the other where their texts have different lengths."""
    if any(negative[name].shape != tensor.shape for name, tensor in positive.items()):
        return [negative, positive]
    return [{name: torch.cat([negative[name], tensor]) for name, tensor in positive.items()}]


def _answer(predict: Predict, x: Tensor, timestep: float, cond: Cond, guidance: float) -> Tensor:
    batch = next((len(tensor) for tensor in cond.values()), 1)

    def each(value: float) -> Tensor:
        return torch.full((batch,), value, device=x.device)

    return predict(x.expand(batch, -1, -1, -1), each(timestep), cond, each(guidance))


# image files


def to_image(pixels: Tensor) -> Image.Image:
    """A picture of pixels (3, H, W) or (1, 3, H, W) in [-1, 1]; what isn't finite becomes grey."""
    pixels = pixels.detach().squeeze(0).float().nan_to_num(0, 0, 0).clamp(-1, 1)
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().contiguous().numpy())


def image_metadata(request: SampleRequest) -> dict[str, str]:
    """How an image was made, as text by name."""
    values = {
        "prompt": request.prompt,
        "prompt2": request.prompt2,
        "negative_prompt": request.negative,
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "cfg": request.cfg,
        "sampler": request.sampler,
        "size": request.size,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a PNG file with text chunks; the file appears whole or not at all."""
    chunks = PngInfo()
    for name, text in metadata.items():
        chunks.add_itxt(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def preview_name(
    request: SampleRequest,
    output_name: str | None,
    *,
    step: int,
    epoch: int | None = None,
    moment: datetime | None = None,
) -> str:
    """File name of a preview: after an epoch (counted from 1) if given, else after a step."""
    prefix = f"{output_name}_" if output_name else ""
    when = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
    seed = "" if request.seed is None else f"_{request.seed}"
    return f"{prefix}{when}_{request.index:02d}_{timestamp(moment)}{seed}.png"


def timestamp(moment: datetime | None = None) -> str:
    """yyyymmddHHMMSS of a moment, or of now."""
    return (moment or datetime.now()).strftime("%Y%m%d%H%M%S")


# many images in one

GAP = 8
ROW_LABEL_WIDTH = 120


def overview(
    images: Sequence[Sequence[Path | Image.Image | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    cell: int = 256,
) -> Image.Image:
    """A table of images, such as training steps (rows) by prompts (columns), with labels; None leaves a cell empty.

    Images are scaled to fit square cells of so many pixels.
    """
    font = _font(max(12, cell // 16))
    labels = ["\n".join(textwrap.wrap(label, width=max(8, cell // 9))[:3]) for label in columns]
    line_height = _text_height(font)
    top = 2 * GAP + line_height * max((label.count("\n") + 1 for label in labels), default=1)
    left = ROW_LABEL_WIDTH + GAP
    sheet = Image.new("RGB", (left + len(columns) * (cell + GAP), top + len(rows) * (cell + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        draw.multiline_text((left + column * (cell + GAP), GAP), label, fill="black", font=font)
    for row, (label, line) in enumerate(zip(rows, images, strict=True)):
        y = top + row * (cell + GAP)
        draw.text((GAP, y + (cell - line_height) // 2), label, fill="black", font=font)
        for column, image in enumerate(line):
            if image is not None:
                _paste(sheet, image, left + column * (cell + GAP), y, cell)
    return sheet


def _paste(sheet: Image.Image, image: Path | Image.Image, x: int, y: int, cell: int) -> None:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    else:
        picture = image.convert("RGB")
    scale = cell / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    sheet.paste(picture, (x + (cell - width) // 2, y + (cell - height) // 2))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _text_height(font: Any) -> int:
    _, top, _, bottom = font.getbbox("Ag")
    return int(1.4 * (bottom - top)) + 4
