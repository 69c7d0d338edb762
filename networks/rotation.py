"""OFT on one module: its outputs are rotated in blocks."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.log import DataError, UserError
from library.models.memory import is_narrow, keep
from library.models.products import PRODUCTS, compute_dtype, dense, stored
from networks.base import ModuleAdapter
from networks.factored import covers_plain_linear, weight_shape
from networks.targets import Target

EPSILON = 1e-8
KEY = "oft_blocks"
DEFAULT_ALPHA = 1e-3


def parts_of(target: Target) -> tuple[int, ...]:
    """The numbers of outputs that are rotated on their own: those of the layers fused in a module."""
    return target.parts or weight_shape(target.module)[:1]


def check_blocks(targets: Iterable[Target], count: int) -> None:
    """Errors: UserError when a number of blocks doesn't divide the outputs of each module, or is below 1."""
    sizes = [(size, target.path) for target in targets for size in parts_of(target)]
    for size, path in sizes:
        if count < 1 or size % count:
            what = f"{count} blocks don't divide the {size} outputs of {path}"
            fitting = _divisors_near(count, math.gcd(*(size for size, _ in sizes)))
            hint = f"give {' or '.join(map(str, fitting))}, which fits all modules"
            raise UserError(what, "--network_dim", hint, code="E-NETWORK-ARGS")


def _divisors_near(count: int, size: int) -> list[int]:
    """The divisors of `size` next to a number, below and above."""
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    return divisors[bisect.bisect(divisors, count) - 1 :][:2] if count > 0 else divisors[:1]


def shapes_of(tensors: Mapping[str, Tensor]) -> list[tuple[int, int, int]]:
    """The shapes of the blocks of each part in a file; empty when there are none."""
    shapes: list[tuple[int, int, int]] = []
    while (tensor := tensors.get(f"{KEY}.{len(shapes)}")) is not None and tensor.ndim == 3:
        shapes.append((tensor.shape[0], tensor.shape[1], tensor.shape[2]))
    return shapes


class RotationAdapter(ModuleAdapter):
    """`W' = R_m^T W` for each block of rows of W, with `R_m = I + m (R - I)`, m the multiplier, R orthogonal.

    R is made of a free matrix A by `Q = A - A^T`, which alpha times the number of outputs limits in norm, and Cayley's
    transform. The outputs of layers that are fused in one are rotated on their own. What is rotated is the answer
    before the bias, which is less work than rotating the weight.

    Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (2023), section 3.
    """

    alpha: Tensor

    def __init__(
        self,
        name: str,
        module: nn.Module,
        component: str,
        *,
        blocks: Sequence[int],
        sizes: Sequence[int],
        alpha: float,
        multiplier: float = 1.0,
    ) -> None:
        """A new adapter that changes nothing yet.

        Args:
            blocks: numbers of blocks of the parts.
            sizes: numbers of outputs of the parts, which their numbers of blocks divide.
        """
        super().__init__(name, module, component, multiplier)
        assert sum(sizes) == weight_shape(module)[0], "the parts aren't the module's outputs"
        shapes = [(count, size // count, size // count) for count, size in zip(blocks, sizes, strict=True)]
        self.oft_blocks = nn.ParameterList([torch.zeros(shape) for shape in shapes])
        self.register_buffer("alpha", torch.tensor(alpha))
        self._limit = float(alpha)
        self._ready: tuple[object, list[Tensor]] | None = None
        self.register_load_state_dict_post_hook(_refresh_limit)  # type: ignore[no-untyped-call]

    # files

    def fits(self, names: Collection[str]) -> bool:
        """Whether the blocks of all parts are there."""
        return all(f"{KEY}.{index}" in names for index in range(len(self.oft_blocks)))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over a file's blocks and alpha; without alpha its own stays. Errors: DataError for another shape."""
        for index, parameter in enumerate(self.oft_blocks):
            tensor = tensors[f"{KEY}.{index}"]
            if tensor.shape != parameter.shape:
                what = f"{self.name}.{KEY}.{index} is {tuple(tensor.shape)} in the file, {tuple(parameter.shape)} here"
                hint = "if only the number of blocks differs, give --dim_from_weights or the file's --network_dim"
                raise DataError(what, "network weights", hint, code="E-NETWORK-SHAPE")
            with torch.no_grad():
                parameter.copy_(tensor)
        if "alpha" in tensors:
            self.alpha = tensors["alpha"].detach().clone().to(self.alpha.device)
            self._limit = float(self.alpha)

    # rotations

    def turns(self) -> list[Tensor]:
        """`R - I` of each part (blocks, size, size), float32."""
        return [turn(blocks, self._limit) for blocks in self.oft_blocks]

    def _turns(self, dtype: torch.dtype) -> list[Tensor]:
        """`R_m - I` in a type. Made again for each pass in training, and kept while the network is only used."""
        if torch.is_grad_enabled() or self.training:
            return [(self.multiplier * part).to(dtype) for part in self.turns()]
        state = (dtype, self.multiplier, *((part.device, part.dtype, part._version) for part in self.oft_blocks))
        if self._ready is None or self._ready[0] != state:
            self._ready = state, [(self.multiplier * part).to(dtype) for part in self.turns()]
        return self._ready[1]

    def train(self, mode: bool = True) -> RotationAdapter:
        """See `torch.nn.Module.train`."""
        self._ready = None
        return super().train(mode)

    # application

    def forward(self, x: Tensor) -> Tensor:
        """What the module would answer with its weight changed."""
        if self.multiplier == 0:
            return cast("Tensor", self.original_forward(x))
        dtype = compute_dtype(x)
        turns, module = self._turns(dtype), self.module
        if covers_plain_linear(self):
            bias = cast("Tensor | None", module.bias)
            out = _fused(x.reshape(-1, x.shape[-1]).to(dtype), *stored(module), bias, *turns)
            return out.view(*x.shape[:-1], -1)
        base: Tensor = self.original_forward(x)
        weight = dense(module, dtype)
        if isinstance(module, nn.Conv2d):
            answer: Tensor = module._conv_forward(x.to(dtype), weight, None)
            return base + rotated(answer.movedim(1, -1), turns).movedim(-1, 1).to(base.dtype)
        return base + rotated(F.linear(x.to(dtype), weight), turns).to(base.dtype)

    # as a change of the weight

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The change of the module's weight at multiplier 1, float32, in the shape of the weight."""
        weight = dense(self.module, torch.float32)
        return rotated(weight.transpose(0, -1), self.turns()).transpose(0, -1)

    @torch.no_grad()
    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta`, 0-d."""
        norm: Tensor = torch.linalg.vector_norm(self.delta())
        return norm

    @torch.no_grad()
    def scale_by(self, ratio: Tensor) -> None:
        """Multiplies the angles, and so the change as long as it is small, by `ratio`."""
        for blocks in self.oft_blocks:
            shrunk = blocks * (_shrinking(blocks - blocks.mT, self._limit) * ratio).to(blocks.dtype)
            blocks.copy_(torch.where(ratio == 1, blocks, shrunk))


def turn(blocks: Tensor, alpha: float) -> Tensor:
    """`R - I` for free matrices A (blocks, size, size), in float32, or float64 where they are that.

    `Q = A - A^T` is limited in norm to alpha times the number of outputs, and `R = (I + Q) (I - Q)^-1`.
    """
    free = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    with torch.autocast(free.device.type, enabled=False):
        skew = free - free.mT
        return cast("Tensor", Cayley.apply(skew * _shrinking(skew, alpha)))  # type: ignore[no-untyped-call]


def _shrinking(skew: Tensor, alpha: float) -> Tensor:
    """What brings the norm of all blocks together down to the limit; 1 where it is below."""
    count, size, _ = skew.shape
    limit = alpha * count * size
    norm: Tensor = torch.linalg.vector_norm(skew)
    return torch.where(norm > limit, (limit + EPSILON) / (norm + EPSILON), torch.ones_like(norm))


class Cayley(torch.autograd.Function):
    """`D = R - I = 2 (I - Q)^-1 Q` for skew-symmetric Q, one or several.

    As `dR = (I + R) dQ (I + R) / 2`, the backward pass needs no further equations solved.
    """

    @staticmethod
    def forward(ctx: Any, skew: Tensor) -> Tensor:
        one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        change: Tensor
        change, _ = torch.linalg.solve_ex(one - skew, 2 * skew)  # always solvable, so the device needn't be asked
        ctx.save_for_backward(change)
        return change

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (change,) = ctx.saved_tensors
        twice: Tensor = change.mT + 2 * torch.eye(change.shape[-1], dtype=change.dtype, device=change.device)
        return (twice @ grad @ twice) / 2


class RotatedLinear(torch.autograd.Function):
    """`x W^T R + b` for x (T, in), a frozen W and b, and R block by block the identity and one of `turns`.

    Instead of x the answer before the rotation is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        product: str,
        bias: Tensor | None,
        *turns: Tensor,
    ) -> Tensor:
        def big() -> Tensor:
            return PRODUCTS[product].forward(x, weight, scale, None)  # (T, out)

        answer = keep(big) if is_narrow(sum(map(_width, turns)), x.shape[1]) else big()
        ctx.save_for_backward(weight, scale, answer, *turns)
        ctx.product = product
        out = rotated(answer, turns).add_(answer)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, answer, *turns = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_answer = rotated(grad, [part.mT for part in turns]).add_(grad)
            grad_x = PRODUCTS[ctx.product].back(grad_answer, weight, scale)
        pairs = zip(_in_blocks(answer, turns), _in_blocks(grad, turns), strict=True)
        return grad_x, None, None, None, None, *(left.mT @ right for left, right in pairs)


_fused = cast("Callable[..., Tensor]", RotatedLinear.apply)


def rotated(x: Tensor, turns: Sequence[Tensor]) -> Tensor:
    """Each block of x (..., out) times its matrix, put together again."""
    flat = x.reshape(-1, x.shape[-1])
    done = [
        (block @ part).transpose(0, 1).flatten(1) for block, part in zip(_in_blocks(flat, turns), turns, strict=True)
    ]
    return torch.cat(done, 1).view(x.shape) if len(done) > 1 else done[0].reshape(x.shape)


def _in_blocks(x: Tensor, turns: Sequence[Tensor]) -> list[Tensor]:
    """The parts of x (T, out), each as (blocks, T, size)."""
    parts = torch.split(x, [_width(part) for part in turns], 1)
    return [
        part.reshape(len(x), len(matrices), -1).transpose(0, 1) for part, matrices in zip(parts, turns, strict=True)
    ]


def _width(matrices: Tensor) -> int:
    return matrices.shape[0] * matrices.shape[1]


def _refresh_limit(adapter: nn.Module, _: Any) -> None:
    assert isinstance(adapter, RotationAdapter)
    adapter._limit = float(adapter.alpha)
