"""LoRA on one module: a product of two small matrices beside the module's own weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.log import DataError
from library.models.memory import is_narrow, keep
from networks.base import ModuleAdapter


class Factor(nn.Module):
    """Holds one of the two matrices, so that its key in files ends in `.weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@dataclass(frozen=True)
class Dropouts:
    """Probabilities, in training only."""

    neuron: float = 0.0
    """Of each element between the two matrices."""
    rank: float = 0.0
    """Of each rank, per sample."""
    module: float = 0.0
    """Of the whole adapter, per call."""


class LoraAdapter(ModuleAdapter):
    """`W x + multiplier * alpha / rank * up down x`.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.
    """

    lora_down: Factor
    lora_up: Factor
    alpha: Tensor

    def __init__(
        self,
        name: str,
        module: nn.Module,
        component: str,
        *,
        rank: int,
        alpha: float | None,
        multiplier: float = 1.0,
        dropouts: Dropouts | None = None,
    ) -> None:
        """A new adapter that changes nothing yet; alpha None or 0 means the rank."""
        super().__init__(name, module, component, multiplier)
        self.rank = rank
        self.dropouts = dropouts or Dropouts()
        down_shape, up_shape = _factor_shapes(module, rank)
        down = torch.empty(down_shape)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.lora_down = Factor(down)
        self.lora_up = Factor(torch.zeros(up_shape))
        self.register_buffer("alpha", torch.tensor(alpha or rank))
        self.scale = float(alpha or rank) / rank
        self.register_load_state_dict_post_hook(_refresh_scale)  # type: ignore[no-untyped-call]

    def fits(self, names: Collection[str]) -> bool:
        """Whether both matrices are there."""
        return "lora_down.weight" in names and "lora_up.weight" in names

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over a file's matrices and alpha; without alpha it is the rank.

        Errors: DataError when a shape differs.
        """
        for key, parameter in (("lora_down.weight", self.lora_down.weight), ("lora_up.weight", self.lora_up.weight)):
            self._take(key, tensors[key], parameter)
        alpha = tensors.get("alpha", torch.tensor(self.rank))
        self.alpha = alpha.detach().clone().to(self.lora_up.weight.device)
        self.scale = float(alpha) / self.rank

    def _take(self, key: str, tensor: Tensor, parameter: nn.Parameter) -> None:
        """1x1 convolutions are written with and without their two last axes; both are read."""
        wanted = tuple(parameter.shape)
        if tuple(tensor.shape) != wanted:
            if tuple(tensor.flatten(1).shape) != tuple(parameter.flatten(1).shape):
                what = f"{self.name}.{key} is {tuple(tensor.shape)} in the file, {wanted} in this network"
                hint = "if only the rank differs, give --dim_from_weights or the file's --network_dim"
                raise DataError(what, "network weights", hint, code="E-NETWORK-SHAPE")
            tensor = tensor.reshape(wanted)
        with torch.no_grad():
            parameter.copy_(tensor)

    @property
    def strength(self) -> float:
        """What `up down` is multiplied by."""
        return self.multiplier * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """What the module would answer with its weight changed."""
        dropouts = self.dropouts
        dropped = self.training and dropouts.module > 0 and float(torch.rand((), device="cpu")) < dropouts.module
        if dropped or self.multiplier == 0:
            return cast("Tensor", self.original_forward(x))
        module = self.module
        if isinstance(module, nn.Conv2d):
            return self._convolve(module, x)
        down, up = self.lora_down.weight, self.lora_up.weight
        dtype = _compute_dtype(x)
        if self._is_plain(module):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (T, in)
            gate = self._gate((*x.shape[:-1], self.rank), x.device, dtype)
            if gate is not None:
                gate = gate.expand(*x.shape[:-1], self.rank).reshape(-1, self.rank)
            return fused(flat, module.weight, module.bias, down, up, gate, self.strength).view(*x.shape[:-1], -1)
        middle = F.linear(x.to(dtype), down.to(dtype))
        return self._added(x, middle, self._gate(middle.shape, x.device, dtype), up.to(dtype))

    def _is_plain(self, module: nn.Module) -> bool:
        """Whether the module is nothing but `x W^T + b` with a frozen W, so that one fused function can replace it."""
        return type(module) is nn.Linear and not self.covers_a_hook and not module.weight.requires_grad

    def _convolve(self, module: nn.Conv2d, x: Tensor) -> Tensor:
        dtype = _compute_dtype(x)
        down, up = self.lora_down.weight.to(dtype), self.lora_up.weight.to(dtype)
        middle = F.conv2d(x.to(dtype), down, None, module.stride, module.padding, module.dilation)
        return self._added(x, middle, self._gate(middle.shape, x.device, dtype, channels=1), up)

    def _added(self, x: Tensor, middle: Tensor, gate: Tensor | None, up: Tensor) -> Tensor:
        """The module's own answer with the low-rank term added."""
        middle = middle * self.strength if gate is None else middle * (gate * self.strength)
        out: Tensor = self.original_forward(x)
        return out + (F.conv2d(middle, up) if up.ndim == 4 else F.linear(middle, up)).to(out.dtype)

    def _gate(
        self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, channels: int = -1
    ) -> Tensor | None:
        """What the activations between the two matrices are multiplied by: 0 where dropped, more than 1 elsewhere.

        `shape` is theirs, the batch first and the ranks on axis `channels`. None: nothing is dropped.
        """
        neuron, rank = self.dropouts.neuron, self.dropouts.rank
        if not self.training or not (neuron or rank):
            return None
        gate = torch.ones((), device=device, dtype=dtype)
        if neuron:
            gate = _kept(shape, neuron, device, dtype)
        if rank:
            per_sample = [shape[0], *[1] * (len(shape) - 1)]
            per_sample[channels] = self.rank
            gate = gate * _kept(per_sample, rank, device, dtype)
        return gate

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The change of the module's weight at multiplier 1, float32, in the shape of the weight."""
        down, up = self.lora_down.weight.float(), self.lora_up.weight.float()
        return (up.flatten(1) @ down.flatten(1) * self.scale).view(_weight(self.module).shape)

    @torch.no_grad()
    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta`, 0-d, from two rank x rank matrices."""
        down, up = self.lora_down.weight.float().flatten(1), self.lora_up.weight.float().flatten(1)
        squared = ((up.T @ up) * (down @ down.T)).sum()
        return squared.clamp(min=0).sqrt() * self.scale

    def factors(self) -> list[nn.Parameter]:
        """The two matrices: multiplying both by the root of q multiplies the change by q."""
        return [self.lora_down.weight, self.lora_up.weight]


class LowRankLinear(torch.autograd.Function):
    """`x W^T + b + strength * (gate * x down^T) up^T` for x (T, in) and a frozen W and b.

    The low-rank terms are added in place to the results of the big products, forward and backward, which saves two
    passes over the activations each way; only a product that checkpointing may keep stays as it is. W isn't copied;
    where its type is another one it is converted for each product, and not kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        gate: Tensor | None,
        strength: float,
    ) -> Tensor:
        dtype = x.dtype
        small_down, small_up = down.to(dtype), up.to(dtype)
        middle = x @ small_down.T  # (T, r)
        if gate is not None:
            middle = middle * gate

        def product() -> Tensor:
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))  # (T, out)

        if is_narrow(weight):
            out = torch.addmm(keep(product), middle, small_up.T, alpha=strength)
        else:
            out = product().addmm_(middle, small_up.T, alpha=strength)
        ctx.save_for_backward(x, weight, small_down, small_up, middle, gate)
        ctx.strength, ctx.dtypes = strength, (down.dtype, up.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, middle, gate = ctx.saved_tensors
        needs_x, _, _, needs_down, needs_up, *_ = ctx.needs_input_grad
        down_dtype, up_dtype = ctx.dtypes
        grad_middle = grad @ (up * ctx.strength)  # (T, r)
        if gate is not None:
            grad_middle *= gate
        grad_x = (grad @ weight.to(grad.dtype)).addmm_(grad_middle, down) if needs_x else None
        grad_down = (grad_middle.T @ x).to(down_dtype) if needs_down else None
        grad_up = (grad.T @ middle).to(up_dtype).mul_(ctx.strength) if needs_up else None
        return grad_x, None, None, grad_down, grad_up, None, None


fused = cast("Callable[..., Tensor]", LowRankLinear.apply)


def _factor_shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(module, nn.Conv2d):
        assert module.groups == 1, "grouped convolutions have no adapter"
        return (rank, module.in_channels, *module.kernel_size), (module.out_channels, rank, 1, 1)
    assert isinstance(module, nn.Linear)
    return (rank, module.in_features), (module.out_features, rank)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _kept(shape: Sequence[int], probability: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    keep = 1 - probability
    mask = torch.rand(shape, device=device) < keep
    return mask.to(dtype) / keep if keep > 0 else mask.to(dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _refresh_scale(adapter: nn.Module, _: Any) -> None:
    assert isinstance(adapter, LoraAdapter)
    adapter.scale = float(adapter.alpha) / adapter.rank
