"""LoRA on a linear layer that holds several layers one below the other, with matrices for each of them.

Queries, keys and values of one layer learn apart, each at the full rank. All down matrices are one stacked matrix, so
the input is multiplied once; all up matrices make one block-diagonal matrix, which is also what files hold. So a file
is that of an ordinary LoRA of rank n * r for n layers, and any reader gets the same output: alpha / rank is the same
when alpha, too, is n times that of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from library.log import DataError, get_logger
from networks.factored import Dropouts, weight_shape
from networks.low_rank import Factor, LowRankAdapter
from networks.reading import Rank, by_module, low_rank, ranks
from networks.targets import Target

logger = get_logger(__name__)


class Blocks(nn.Module):
    """Up matrices (outputs, rank) of several layers, kept one below the other."""

    mask: Tensor

    def __init__(self, parts: Sequence[int], rank: int) -> None:
        """Zeros; `parts` are the numbers of outputs."""
        super().__init__()
        self.blocks = nn.Parameter(torch.zeros(sum(parts), rank))
        owners = [torch.full((part, 1), index) for index, part in enumerate(parts)]
        own = torch.cat(owners) == torch.arange(len(parts))  # (out, n)
        self.register_buffer("mask", own[:, :, None], persistent=False)

    def whole(self) -> Tensor:
        """The block-diagonal matrix (out, n * rank) of them, through which gradients flow."""
        return torch.where(self.mask, self.blocks[:, None, :], 0.0).flatten(1)


class SplitAdapter(LowRankAdapter):
    """A LoRA of its own for each part of a linear layer; see the module.

    `rank` and `alpha` are those of the whole: as many times those of one part as there are parts.
    """

    lora_down: Factor
    lora_up: Blocks

    def __init__(
        self,
        target: Target,
        component: str,
        *,
        size: Rank,
        multiplier: float = 1.0,
        dropouts: Dropouts | None = None,
    ) -> None:
        """A new adapter that changes nothing yet; `size` is that of one part, and alpha 0 means the rank."""
        self.parts, count = target.parts, len(target.parts)
        super().__init__(
            target.name,
            target.module,
            component,
            rank=count * size.rank,
            alpha=count * size.alpha,
            multiplier=multiplier,
            dropouts=dropouts,
        )
        down = torch.empty(self.rank, weight_shape(target.module)[1])
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.lora_down = Factor(down)
        self.lora_up = Blocks(target.parts, size.rank)

    def pair(self) -> tuple[Tensor, Tensor]:
        """See `LowRankAdapter.pair`."""
        return self.lora_down.weight, self.lora_up.whole()

    def fits(self, names: Collection[str]) -> bool:
        """Whether the matrices of an ordinary LoRA are there."""
        return "lora_down.weight" in names and "lora_up.weight" in names

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the matrices and alpha of an ordinary LoRA.

        Errors: DataError when a shape differs, or the up matrix isn't block-diagonal.
        """
        up = tensors["lora_up.weight"].flatten(1)
        wanted = (sum(self.parts), self.rank)
        if tuple(up.shape) != wanted:
            raise _misfit(f"{self.name}.lora_up.weight is {tuple(up.shape)} in the file, {wanted} in this network")
        blocks = diagonal(up, self.parts)
        if blocks is None:
            raise _misfit(f"{self.name} isn't split in the file: its up matrix isn't block-diagonal")
        super().load({**tensors, "lora_up.blocks": blocks})

    @torch.no_grad()
    def scale_by(self, ratio: Tensor) -> None:
        """See `ModuleAdapter.scale_by`."""
        root = ratio.sqrt()
        for factor in (self.lora_down.weight, self.lora_up.blocks):
            factor.mul_(root.to(factor.dtype))

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors of an ordinary LoRA."""
        down, up = self.pair()
        return {"alpha": self.alpha, "lora_down.weight": down, "lora_up.weight": up}


def of_file(
    target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float, dropouts: Dropouts
) -> SplitAdapter | None:
    """A split adapter of the size that a module has in a file; None: it has no parts, or isn't LoRA.

    Errors: DataError when the file's rank isn't one for each part.
    """
    whole = low_rank(tensors)
    if whole is None or not target.parts:
        return None
    count = len(target.parts)
    if whole.rank % count:
        raise _misfit(f"{target.name} isn't split in the file: its rank {whole.rank} isn't a multiple of {count}")
    size = Rank(whole.rank // count, whole.alpha / count)
    return SplitAdapter(target, component, size=size, multiplier=multiplier, dropouts=dropouts)


def diagonal(up: Tensor, parts: Sequence[int]) -> Tensor | None:
    """The blocks (out, rank) of a block-diagonal matrix (out, n * rank); None: it has other values beside them."""
    rank = up.shape[1] // len(parts)
    rows = up.split_with_sizes(list(parts))
    blocks = [row[:, index * rank : (index + 1) * rank] for index, row in enumerate(rows)]
    if sum(int(block.count_nonzero()) for block in blocks) != int(up.count_nonzero()):
        return None
    return torch.cat(blocks)


def as_trained(tensors: Mapping[str, Tensor], parts: Mapping[str, Sequence[int]]) -> Mapping[str, Tensor]:
    """The tensors of a file to be read into split adapters, as they were trained.

    Older scripts write the alpha of one part, where all readers expect that of the whole, so that the file does a
    third or a quarter of what was trained. Their files have one alpha for all modules, split or not; with ours it
    isn't so. What can't be told apart, such as a file of queries, keys and values only, stays as it is.

    Args:
        tensors: those of the file.
        parts: of each module of the denoiser, empty where it has none.
    """
    sizes = {name: size for name, size in ranks(tensors).items() if name in parts}
    counts = {len(parts[name]) for name in sizes}
    if len({size.alpha for size in sizes.values()}) != 1 or len(counts) < 2:
        return tensors
    split = {name: size for name, size in sizes.items() if parts[name]}
    modules = by_module(tensors)
    for name, size in split.items():
        up = modules[name]["lora_up.weight"].flatten(1)
        count = len(parts[name])
        if size.rank % count or up.shape[0] != sum(parts[name]) or diagonal(up, parts[name]) is None:
            return tensors
    logger.info("the alpha of %d split modules is that of one part, and taken as such", len(split))
    return {
        **tensors,
        **{f"{name}.alpha": torch.tensor(size.alpha * len(parts[name])) for name, size in split.items()},
    }


def _misfit(what: str) -> DataError:
    hint = "leave split_qkv out of --network_args, or give the --network_dim of the file"
    return DataError(what, "network weights", hint, code="E-NETWORK-SHAPE")
