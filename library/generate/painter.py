"""Makes images with one model of any family: loads its parts when they are needed, applies networks, samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from library import devices, files, findings
from library.families.base import Family
from library.log import UserError, get_logger
from library.models import detect, quantized
from library.places import check_readable
from library.sampling import SampleRequest, to_image
from library.sampling import generate as sample
from library.types import DENOISER, Cond, Finding
from networks import reading

if TYPE_CHECKING:
    from PIL import Image

logger = get_logger(__name__)

VAE = "vae"
"""Name of the autoencoder among the parts; the denoiser's is `DENOISER`, text encoders have those of the family."""

Encoders = Sequence["nn.Module | None"]


class Plugin(Protocol):
    """What a network module must have, see `networks.plugin.Plugin`."""

    def weights_for(
        self, weights: Mapping[str, Tensor], encoders: Encoders, denoiser: nn.Module | None, /
    ) -> dict[str, Tensor]:
        """Those tensors of a file that belong to these parts of the model."""

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str,
        vae: None,
        encoders: Encoders,
        denoiser: nn.Module | None,
        weights: Mapping[str, Tensor],
        /,
        *,
        for_inference: bool,
    ) -> tuple[Any, Mapping[str, Tensor]]:
        """A network for the parts that are there."""


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

    def findings(self) -> list[Finding]:
        """What is wrong with the file."""
        missing = check_readable(self.path, "--lora_weights")
        wrong = None if missing else detect.check(self.path, "--lora_weights", "network")
        return [*missing, *filter(None, [wrong])]


def misfits(
    loras: Sequence[LoraFile],
    plugin_of: Callable[[Mapping[str, Tensor]], Plugin],
    encoder_names: Sequence[str],
    outline: Callable[[str], nn.Module],
) -> Iterator[Finding]:
    """Networks made for other models, told from the headers only.

    That is what `Painter` would find when it loads the parts. What changes text encoders only has to fit one of them.

    Args:
        loras: files that can be read.
        plugin_of: as for `Painter`.
        encoder_names: those of the family.
        outline: gives a part without its weights, by name.
    """
    outlined = cache(outline)
    for lora in loras:
        shapes = files.header(lora.path).shapes
        weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        plugin = plugin_of(weights)
        names = (DENOISER, *(encoder_names if reading.for_encoders_only(weights) else ()))
        if not any(plugin.weights_for(weights, *_placed(outlined(name), name, encoder_names)) for name in names):
            what = f"no weight fits this model: {reading.describe(weights)}"
            hint = "use a network that was made for it"
            yield findings.error(what, f"--lora_weights {lora.path}", hint, "E-NETWORK-FILE")


def _placed(module: nn.Module, name: str, encoder_names: Sequence[str]) -> tuple[Encoders, nn.Module | None]:
    """A part as plug-ins want it: the text encoders with all others left out, and the denoiser or None."""
    encoders = [module if name == encoder else None for encoder in encoder_names]
    return encoders, module if name == DENOISER else None


@dataclass
class Painter:
    """Makes images with one model. Its parts are loaded when needed; with `offload` they wait on the CPU."""

    family: Family
    dtypes: Mapping[str, torch.dtype]
    """Type of each part."""
    device: torch.device
    plugin_of: Callable[[Mapping[str, Tensor]], Plugin]
    """The network module for a file with these tensors."""
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
        family, traits = self.family, self.family.traits
        cond, negative = self._encode(request)
        with self._in_use(DENOISER) as denoiser, self._precision(self.dtypes[DENOISER]):
            latents = sample(
                request,
                predict=lambda x, t, c, guidance: family.predict(denoiser, x, t, c, guidance),
                objective=family.objective(),
                cond=cond,
                negative_cond=negative,
                size_cond=family.size_cond,
                latent_channels=traits.latent_channels,
                stride=traits.latent_stride,
                patch=traits.patch,
                shift=family.sampling_shift(),
                device=self.device,
            )
        with self._in_use(VAE) as vae:
            pixels = family.decode_latents(vae, latents)
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
        second = request.prompt if request.prompt2 is None else request.prompt2
        texts = [(request.prompt, second)]  # for the first encoder, and for those behind it
        if request.negative is not None:
            texts.append((request.negative, request.negative))
        conds: list[Cond] = [{} for _ in texts]
        for index, name in enumerate(self.family.encoder_names):
            with self._in_use(name) as encoder, torch.no_grad(), self._precision(self.dtypes[name]):
                for text, cond in zip(texts, conds, strict=True):
                    tokens = self.family.tokenize([text[min(index, 1)]])
                    tokens = {key: value.to(self.device) for key, value in tokens.items()}
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
            if name != VAE and self.merge:
                self._attach(name)
                self._store(name)
            elif name != VAE:  # networks cover the module as it is stored
                self._store(name)
                self._attach(name)
        return self._parts[name]

    def _load(self, name: str) -> nn.Module:
        device = torch.device("cpu") if self.offload else self.device
        compute = _compute_type(self.dtypes[name])
        if name == VAE:
            return self.family.load_vae(device, compute)
        if name == DENOISER:
            return self.family.load_denoiser(device, compute).requires_grad_(False)
        return self.family.load_encoders([name], device, compute)[name]

    def _store(self, name: str) -> None:
        """Puts a part that shall be stored in eight bits into them; networks are merged before, in full precision."""
        if quantized.is_float8(self.dtypes[name]):
            quantized.store_linears(self._parts[name], "fp8")

    def _attach(self, name: str) -> None:
        """Applies or merges the networks to one part, each as far as it has weights for it.

        Errors: DataError, with the last part, for a network that fits none, or not the denoiser that it was made for.
        """
        encoders, denoiser = _placed(self._parts[name], name, self.family.encoder_names)
        networks = []
        for number, lora in enumerate(self.loras):
            weights = reading.read_weights(lora.path)
            plugin = self.plugin_of(weights)
            own = plugin.weights_for(weights, encoders, denoiser)
            self._fitting |= {number} if own else set()
            for_text = number in self._fitting and reading.for_encoders_only(weights)
            if not own and (denoiser is None or for_text):
                continue
            network, _ = plugin.create_network_from_weights(
                lora.multiplier, lora.path, None, encoders, denoiser, own or weights, for_inference=True
            )
            if self.merge:
                network.merge_to(encoders, denoiser, own, None, None)
                continue
            network.apply_to(encoders, denoiser, denoiser is None, denoiser is not None)
            network.load_tensors(own, lora.path)
            network.to(self.device).eval().requires_grad_(False)
            networks.append((number, network))
        if networks:
            self._networks[name] = networks

    @contextmanager
    def _precision(self, dtype: torch.dtype) -> Iterator[None]:
        compute = _compute_type(dtype)
        with torch.autocast(self.device.type, dtype=compute, enabled=compute != torch.float32):
            yield


def idle_networks(merge: bool, loras: Sequence[object]) -> Iterator[Finding]:
    """A warning where networks would be merged, but there are none."""
    if merge and not loras:
        yield findings.warning("it does nothing without --lora_weights", "--merge_lora_weights")


def idle_in_session(given: Callable[[str], bool], names: Sequence[str]) -> Iterator[Finding]:
    """A warning for each of the options that were given although prompts are typed."""
    for name in names:
        if given(name):
            yield findings.warning("it does nothing with --interactive, which asks for it", f"--{name}")


def _compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if quantized.is_float8(dtype) else dtype


def _refuse_nan(cond: Cond) -> None:
    for name, tensor in cond.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"the text encoder gives values that are not numbers ({name})",
                "--dtype",
                "use bfloat16 or float32 for the text encoders",
                code="E-NONFINITE",
            )
