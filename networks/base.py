"""The adapter engine: hooks adapters onto modules, groups their parameters, saves, loads and merges them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library import files, metadata
from library.log import DataError, get_logger
from library.models.products import dense
from library.models.quantized import replace
from library.types import DENOISER, Chance
from networks import groups, reading

logger = get_logger(__name__)


def encoder_component(index: int) -> str:
    """Component name of a text encoder, by its position among the family's encoders (from 0)."""
    return f"textencoder {index + 1}"


class ModuleAdapter(nn.Module, ABC):
    """Replaces the forward of one module. The module stays where it is, with its own weight."""

    def __init__(self, name: str, module: nn.Module, component: str, multiplier: float = 1.0) -> None:
        super().__init__()
        self.name, self.component, self.multiplier = name, component, multiplier
        self.lr: float | None = None
        """A learning rate of its own; None: that of the component."""
        self.block: groups.BlockRate | None = None
        """The block whose share of the component's learning rate it gets; None: all of it."""
        self._module = (module,)  # in a tuple, so that its weights don't count as the adapter's
        self.hooked = False
        self.covers_a_hook = False
        """Whether something else had replaced the module's forward before."""
        self.original_forward: Any = module.forward

    @property
    def module(self) -> nn.Module:
        """The module that the adapter changes."""
        return self._module[0]

    def hook(self) -> None:
        """Puts the adapter's forward in the place of the module's."""
        assert not self.hooked, f"{self.name} is hooked twice"
        self.covers_a_hook = "forward" in self.module.__dict__
        self.original_forward = self.module.forward
        self.module.forward = self.forward
        self.hooked = True

    def unhook(self) -> None:
        """Gives the module its own forward back. Of several adapters on one module the last one goes first."""
        if not self.hooked:
            return
        assert self.module.__dict__.get("forward") == self.forward, f"another hook lies over {self.name}"
        if self.covers_a_hook:
            self.module.forward = self.original_forward
        else:
            del self.module.forward
        self.hooked = False

    @property
    def chance(self) -> Chance:
        """Where it draws random numbers in training."""
        return Chance.NOWHERE

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """What the module would answer if its weight were changed."""

    @abstractmethod
    def delta(self) -> Tensor:
        """The change of the module's weight at multiplier 1, float32, in the shape of the weight."""

    @abstractmethod
    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta`, 0-d."""

    @abstractmethod
    def scale_by(self, ratio: Tensor) -> None:
        """Multiplies the change by `ratio`, 0-d, in place."""

    @abstractmethod
    def fits(self, names: Collection[str]) -> bool:
        """Whether these are the names of tensors (without the module's name) that `load` needs."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the tensors of a file, named without the module's name."""

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors of a file, named without the module's name; where they aren't those of `state_dict`, override."""
        return dict(self.state_dict())


class Network(nn.Module):
    """Adapters of one file, for any number of components. Implements the plug-in protocol of `--network_module`."""

    def __init__(
        self,
        adapters: Sequence[ModuleAdapter],
        lr_ratios: groups.LrRatios | None = None,
        translate: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """`translate` makes of the tensors of a file those that are loaded; what it made itself stays as it is."""
        super().__init__()
        self._created = list(adapters)
        self._lr_ratios = lr_ratios or groups.LrRatios()
        self._translate = translate or dict

    @property
    def adapters(self) -> list[ModuleAdapter]:
        """The adapters in use; before `apply_to` none is."""
        return [child for child in self.children() if isinstance(child, ModuleAdapter)]

    @property
    def created(self) -> Sequence[ModuleAdapter]:
        """All adapters, whether `apply_to` took them or not."""
        return self._created

    def apply_to(
        self,
        text_encoders: object = None,
        denoiser: object = None,
        apply_text_encoder: bool = True,
        apply_denoiser: bool = True,
    ) -> None:
        """Hooks the adapters of the wanted components; the others are left out of everything, files included."""
        for adapter in self._created:
            if apply_denoiser if adapter.component == DENOISER else apply_text_encoder:
                adapter.hook()
                self.add_module(adapter.name, adapter.train(self.training))
        counts = {name: len(members) for name, members in self._by_component().items()}
        logger.info("adapters: %s", ", ".join(f"{name} {count}" for name, count in counts.items()) or "none")

    def restore(self) -> None:
        """Takes the adapters off the modules again."""
        for adapter in self.adapters:
            adapter.unhook()

    def set_multiplier(self, multiplier: float) -> None:
        """Sets the strength of all adapters; 0 leaves the model as it is without them."""
        for adapter in self._created:
            adapter.multiplier = multiplier

    # training

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lrs: float | Sequence[float] | None,
        unet_lr: float | None,
        default_lr: float | None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups for an optimizer, and their descriptions.

        A missing rate means `default_lr`; one rate for the encoders counts for all of them. Adapters with a rate of
        their own form groups such as "unet lr=0.0001", those of a block with a share such as "unet_block3". What gets
        no rate, or 0, is frozen and belongs to no group.
        """
        components = self._by_component()
        rates = {name: groups.rate_of(name, text_encoder_lrs, unet_lr, default_lr) for name in components}
        return groups.parameter_groups(components, rates, self._lr_ratios)

    def prepare_optimizer_params(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """As `prepare_optimizer_params_with_multiple_te_lrs`, under the older name."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def prepare_grad_etc(self, text_encoders: object = None, denoiser: object = None) -> None:
        """Makes all adapters in use trainable."""
        self.requires_grad_(True)

    def get_trainable_params(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: what lies between the two matrices is small."""

    def on_epoch_start(self, text_encoders: object = None, denoiser: object = None) -> None:
        """Switches the adapters to training."""
        self.train()

    def on_step_start(self) -> None:
        """Nothing to do."""

    def chance(self) -> Chance:
        """Where the adapters of the denoiser draw random numbers in training."""
        return max((one.chance for one in self.adapters if one.component == DENOISER), default=Chance.NOWHERE)

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm: float, device: object = None) -> tuple[Tensor, Tensor, Tensor]:
        """Scales changes down whose norm is above `max_norm`; (number scaled, mean norm, largest norm) afterwards.

        The three are 0-d tensors on the device, so that nobody waits for them.
        """
        adapters = self.adapters
        norms = torch.stack([adapter.delta_norm() for adapter in adapters]).clamp(min=max_norm / 2)
        ratios = norms.clamp(max=max_norm) / norms
        for adapter, ratio in zip(adapters, ratios.unbind(), strict=True):
            adapter.scale_by(ratio)
        norms = norms * ratios
        return (ratios != 1).sum(), norms.mean(), norms.max()

    # files

    def load_weights(self, file: str | Path) -> str:
        """Takes over a file's weights into the adapters in use; says in words what matched and what didn't.

        Errors: DataError when nothing matches or a shape differs.
        """
        return self.load_tensors(reading.read_weights(file), str(file))

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str = "") -> str:
        """As `load_weights`, with the tensors of a file."""
        by_module = reading.by_module(self._translate(tensors))
        matched = [adapter for adapter in self.adapters if adapter.fits(by_module.get(adapter.name, {}))]
        if not matched:
            raise DataError(f"no weight fits this network: {reading.describe(tensors)}", where, code="E-NETWORK-FILE")
        for adapter in matched:
            adapter.load(by_module[adapter.name])
        missing = len(self.adapters) - len(matched)
        unknown = sorted(set(by_module) - {adapter.name for adapter in matched})
        report = f"{len(matched)} modules loaded, {missing} not in the file, {len(unknown)} of the file not in use"
        if unknown:
            logger.warning("%s: not in use: %s", where, _abridged(unknown))
        return report

    def file_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors of a file, on the CPU; `dtype` None keeps theirs."""
        return {
            f"{adapter.name}.{key}": tensor.detach().to("cpu", dtype).contiguous()
            for adapter in self.adapters
            for key, tensor in adapter.file_tensors().items()
        }

    def save_weights(
        self, file: str | Path, dtype: torch.dtype | None = None, metadata_: Mapping[str, str] | None = None
    ) -> None:
        """Writes a `.safetensors` file with metadata and hashes, or for any other extension a torch file without."""
        path, tensors = Path(file), self.file_tensors(dtype)
        if path.suffix != ".safetensors":
            with files.atomic_write(path) as temporary:
                torch.save(tensors, temporary)
            return
        values = dict(metadata_ or {})
        files.save_safetensors(tensors, path, {**values, **metadata.network_hashes(tensors, values)})

    # merging

    def is_mergeable(self) -> bool:
        """Whether `merge_to` works."""
        return True

    @torch.no_grad()
    def merge_to(
        self,
        text_encoders: object = None,
        denoiser: object = None,
        weights_sd: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Adds the changes to the weights of the modules, in float32, and stores them as they were.

        With `weights_sd` those weights are taken over first. `device` is where to compute, None: where the weight lies.
        """
        by_module = reading.by_module(self._translate(weights_sd)) if weights_sd is not None else None
        for adapter in self._created:
            if by_module is not None:
                if not adapter.fits(by_module.get(adapter.name, {})):
                    continue
                adapter.load(by_module[adapter.name])
            weight = adapter.module.weight
            assert isinstance(weight, Tensor)
            place = torch.device(device) if device is not None else weight.device
            change = adapter.to(place).delta().to(place) * adapter.multiplier
            replace(adapter.module, dense(adapter.module, torch.float32).to(place) + change)

    def _by_component(self) -> dict[str, list[ModuleAdapter]]:
        """The adapters in use; encoders first, in the order of the file."""
        components: dict[str, list[ModuleAdapter]] = {}
        for adapter in self.adapters:
            components.setdefault(adapter.component, []).append(adapter)
        return dict(sorted(components.items(), key=lambda item: (item[0] == DENOISER, item[0])))


def _abridged(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
