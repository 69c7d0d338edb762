"""Image generation with FLUX.1 for `flux_minimal_inference.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library import devices, findings
from library.families.flux import Flux
from library.generate.session import Session
from library.log import UserError, get_logger
from library.models import detect, quantized
from library.option_groups import FluxInferenceOptions, InferenceExtraOptions
from library.places import check_readable, check_writable
from library.sampling import SampleRequest, to_image
from library.sampling import generate as sample
from library.types import Cond, Finding
from networks import lora_flux, oft_flux, reading

if TYPE_CHECKING:
    from PIL import Image

    from library.options import Options

logger = get_logger(__name__)

STEPS = {True: 50, False: 4}
"""Default number of steps, by whether the model embeds guidance (dev) or not (schnell)."""


@dataclass(frozen=True)
class LoraFile:
    """A network to apply, and how strongly."""

    path: str
    multiplier: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """From `path` or `path;multiplier`. Errors: UserError for a multiplier that isn't a number."""
        path, separator, multiplier = text.rpartition(";")
        if not separator:
            return cls(text)
        try:
            return cls(path, float(multiplier))
        except ValueError:
            raise UserError(
                f"the multiplier {multiplier!r} is not a number", "--lora_weights", 'write "file.safetensors;0.8"'
            ) from None


@dataclass(frozen=True)
class Dtypes:
    """Types of the parts."""

    clip_l: torch.dtype
    t5xxl: torch.dtype
    ae: torch.dtype
    flux: torch.dtype

    @classmethod
    def from_options(cls, options: FluxInferenceOptions) -> Dtypes:
        """Each part's own option, else `--dtype`. Errors: UserError for an unknown type."""

        def of(part: str) -> torch.dtype:
            option = f"{part}_dtype" if getattr(options, f"{part}_dtype") else "dtype"
            return devices.dtype_of(getattr(options, option), f"--{option}")

        return cls(of("clip_l"), of("t5xxl"), of("ae"), of("flux"))


@dataclass
class Painter:
    """Makes images with one FLUX.1 model. Its parts are loaded when needed; with `offload` they wait on the CPU."""

    family: Flux
    dtypes: Dtypes
    device: torch.device
    offload: bool = False
    loras: Sequence[LoraFile] = ()
    merge: bool = False
    keep_encoders: bool = True
    """False: the text encoders are dropped after use, where only one prompt comes."""
    _parts: dict[str, nn.Module] = field(default_factory=dict)
    _networks: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)
    """By part; each with the position of its file among the networks."""
    _fitting: set[int] = field(default_factory=set)
    """Networks that changed something so far."""

    def render(self, request: SampleRequest) -> Image.Image:
        """The image of a request."""
        cond, negative = self._encode(request)
        with self._in_use("flux") as denoiser, self._precision(self.dtypes.flux):
            latents = sample(
                request,
                predict=lambda x, t, c, guidance: self.family.predict(denoiser, x, t, c, guidance),
                objective=self.family.objective(),
                cond=cond,
                negative_cond=negative,
                latent_channels=self.family.traits.latent_channels,
                stride=self.family.traits.latent_stride,
                shift=self.family.sampling_shift(),
                device=self.device,
            )
        with self._in_use("ae") as vae:
            pixels = self.family.decode_latents(vae, latents)
        return to_image(pixels)

    def set_multipliers(self, multipliers: Sequence[float]) -> None:
        """Changes the strengths of the networks, in the order in which they were given."""
        if self.merge:
            logger.warning("the networks are merged into the model; their multipliers can't be changed any more")
            return
        self.loras = [replace(lora, multiplier=value) for lora, value in zip(self.loras, multipliers, strict=False)]
        for number, network in chain.from_iterable(self._networks.values()):
            network.set_multiplier(self.loras[number].multiplier)

    def _encode(self, request: SampleRequest) -> tuple[Cond, Cond | None]:
        prompts = [request.prompt, *([] if request.negative is None else [request.negative])]
        conds: list[Cond] = [{} for _ in prompts]
        for name in self.family.encoder_names:
            with self._in_use(name) as encoder, torch.no_grad(), self._precision(getattr(self.dtypes, name)):
                for prompt, cond in zip(prompts, conds, strict=True):
                    tokens = {key: value.to(self.device) for key, value in self.family.tokenize([prompt]).items()}
                    cond |= self.family.encode_text({name: encoder}, tokens)
            if not self.keep_encoders:
                del encoder
                self._parts.pop(name)
                self._networks.pop(name, None)
                devices.release_memory()
        for cond in conds:
            _refuse_nan(cond)
        return conds[0], conds[1] if len(conds) > 1 else None

    @contextmanager
    def _in_use(self, name: str) -> Iterator[nn.Module]:
        module = self._part(name).to(self.device)
        yield module
        if self.offload:
            module.to("cpu")
            devices.release_memory()

    def _part(self, name: str) -> nn.Module:
        if name not in self._parts:
            self._parts[name] = self._load(name)
            if name != "ae" and self.merge:
                self._attach(name)
                self._store(name)
            elif name != "ae":  # networks cover the module as it is stored
                self._store(name)
                self._attach(name)
        return self._parts[name]

    def _load(self, name: str) -> nn.Module:
        device = torch.device("cpu") if self.offload else self.device
        dtype: torch.dtype = getattr(self.dtypes, name)
        compute = torch.bfloat16 if quantized.is_float8(dtype) else dtype
        if name == "ae":
            return self.family.load_vae(device, compute)
        if name == "flux":
            return self.family.load_denoiser(device, compute).requires_grad_(False)
        return self.family.load_encoders([name], device, compute)[name]

    def _store(self, name: str) -> None:
        """Puts a part that shall be stored in eight bits into them; networks are merged before, in full precision."""
        dtype: torch.dtype = getattr(self.dtypes, name)
        if quantized.is_float8(dtype):
            quantized.store_linears(self._parts[name], "fp8")

    def _attach(self, name: str) -> None:
        """Applies or merges the networks to one part, each as far as it has weights for it.

        Errors: DataError, with the last part, for a network that fits none.
        """
        module = self._parts[name]
        encoders = [module if name == encoder else None for encoder in self.family.encoder_names]
        denoiser = module if name == "flux" else None
        networks = []
        for number, lora in enumerate(self.loras):
            weights = reading.read_weights(lora.path)
            plugin = oft_flux if any(name.startswith("oft_unet_") for name in weights) else lora_flux
            own = plugin.weights_for(weights, encoders, denoiser)
            self._fitting |= {number} if own else set()
            if not own and (denoiser is None or number in self._fitting):
                continue
            network, _ = plugin.create_network_from_weights(
                lora.multiplier, lora.path, None, encoders, denoiser, own or weights, for_inference=True
            )
            if self.merge:
                network.merge_to(encoders, denoiser, own, None, None)
                continue
            network.apply_to(encoders, denoiser, name != "flux", name == "flux")
            network.load_tensors(own, lora.path)
            network.to(self.device).eval().requires_grad_(False)
            networks.append((number, network))
        if networks:
            self._networks[name] = networks

    @contextmanager
    def _precision(self, dtype: torch.dtype) -> Iterator[None]:
        compute = torch.bfloat16 if quantized.is_float8(dtype) else dtype
        with torch.autocast(self.device.type, dtype=compute, enabled=compute != torch.float32):
            yield


def generate(options: Options) -> None:
    """Makes the images that the inference script's options ask for."""
    group, extra = options[FluxInferenceOptions], options[InferenceExtraOptions]
    family = Flux.from_inference_options(group, extra)
    loras = [LoraFile.parse(text) for text in group.lora_weights]
    findings.report([*_check_files(group, loras), *family.findings()])
    dtypes = Dtypes.from_options(group)
    findings.report(_idle(options, family, dtypes))
    family.load_tokenizers()
    painter = Painter(
        family,
        dtypes,
        devices.best_device(),
        offload=group.offload,
        loras=loras,
        merge=group.merge_lora_weights,
        keep_encoders=group.interactive,
    )
    first_request = SampleRequest(
        prompt=group.prompt,
        negative_prompt=group.negative_prompt,
        width=group.width,
        height=group.height,
        seed=group.seed,
        steps=group.steps or STEPS[family.embeds_guidance],
        guidance=group.guidance,
        cfg=1.0 if group.negative_prompt is None else group.cfg_scale,
    )
    session = Session(painter.render, Path(group.output_dir), set_multipliers=painter.set_multipliers)
    if group.interactive:
        session.run_interactive(first_request)
    else:
        session.run([first_request])


def _check_files(group: FluxInferenceOptions, loras: Sequence[LoraFile]) -> Iterator[Finding]:
    """What is wrong with the files and folders besides those of the model itself."""
    for name in ("clip_l", "t5xxl", "ae"):
        if not getattr(group, name):
            yield findings.error("a model file is missing", f"--{name}", f"give --{name} FILE", "E-MODEL-NONE")
    yield from check_writable(Path(group.output_dir), "--output_dir")
    for lora in loras:
        missing = check_readable(lora.path, "--lora_weights")
        wrong = None if missing else detect.check(lora.path, "--lora_weights", "network")
        yield from (*missing, *filter(None, [wrong]))


def _idle(options: Options, family: Flux, dtypes: Dtypes) -> Iterator[Finding]:
    """A warning for each option that does nothing beside the others, or with this model."""
    group = options[FluxInferenceOptions]
    if group.cfg_scale != 1.0 and group.negative_prompt is None and not group.interactive:
        yield findings.warning("it does nothing without --negative_prompt", "--cfg_scale", "an empty one will do")
    if group.cfg_scale == 1.0 and group.negative_prompt and not group.interactive:
        yield findings.warning("it does nothing without --cfg_scale above 1", "--negative_prompt")
    if group.merge_lora_weights and not group.lora_weights:
        yield findings.warning("it does nothing without --lora_weights", "--merge_lora_weights")
    if options.given("guidance") and not family.embeds_guidance:
        yield findings.warning("it does nothing: this model has no guidance input", "--guidance")
    if quantized.is_float8(dtypes.ae):
        yield findings.warning("fp8 is for the other parts: the autoencoder is kept in bfloat16", "--ae_dtype")
    for name in ("prompt", "negative_prompt", "seed") if group.interactive else ():
        if options.given(name):
            yield findings.warning("it does nothing with --interactive, which asks for it", f"--{name}")


def _refuse_nan(cond: Cond) -> None:
    for name, tensor in cond.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"the text encoder gives values that are not numbers ({name})",
                "--clip_l / --t5xxl",
                "use --dtype bfloat16 or float32 for the text encoders",
                code="E-NONFINITE",
            )
