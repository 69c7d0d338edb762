"""What a model family must be able to do; the rest of the project knows families only through this."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from library.models.activations import ActivationModel
from library.types import Cond, Finding, Posterior, Saving, Size, Tokens, Traits

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.objectives import Objective
    from library.options import Options
    from library.randomness import Draws


class Family(Protocol):
    """An architecture: how to load, tokenize, encode, predict and name. Holds paths and tokenizers, never models."""

    traits: ClassVar[Traits]

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """Text encoders that there are, in the order in which network plug-ins expect them."""

    @classmethod
    def from_options(cls, options: Options) -> Family:
        """The family as a training or caching script's options want it."""

    def findings(self) -> list[Finding]:
        """What is wrong with the model files named in the options, read from their headers only."""

    def part_shapes(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Shapes of the tensors of the denoiser (`unet`) and of each text encoder, by name, from the headers only."""

    def activations(self) -> ActivationModel:
        """What the denoiser needs in memory beside its weights."""

    def text_output_bytes(self) -> int:
        """Room on the disk that the text outputs of one caption need, at most."""

    def load_tokenizers(self) -> None:
        """Loads the tokenizers. Errors: UserError when their files are found nowhere."""

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Token ids and masks, padded to the encoders' lengths and cut there."""

    def count_tokens(self, captions: Sequence[str]) -> dict[str, list[int]]:
        """Number of tokens of each caption, end mark included and nothing cut, by encoder name."""

    def token_limits(self) -> dict[str, int]:
        """Longest token sequence by encoder name."""

    def load_encoders(
        self,
        names: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        finished: Callable[[str, nn.Module], None] | None = None,
        keep_float8: bool = False,
    ) -> dict[str, nn.Module]:
        """The named text encoders, frozen, in evaluation mode. For the last two see `load_denoiser`."""

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The image autoencoder, frozen, in evaluation mode."""

    def load_denoiser(
        self,
        device: torch.device,
        dtype: torch.dtype | None,
        finished: Callable[[str, nn.Module], None] | None = None,
        keep_float8: bool = False,
    ) -> nn.Module:
        """The denoiser; dtype None keeps that of the file.

        `finished` is called for each module, with its name, when all of its own tensors are there, before others are
        read, so that the module can be stored in fewer bits, or moved. `keep_float8` leaves linear layers of blocks as
        they are that the file has in float8.
        """

    def encode_text(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """What the given encoders say; those that aren't given leave their arrays out."""

    def encode_images(self, vae: nn.Module, pixels: Tensor) -> Posterior:
        """The posterior of the latents (B, C, h, w), before `Traits.for_denoiser`, of pixels (B, 3, H, W).

        Pixels are in [-1, 1].
        """

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], float32."""

    def objective(self) -> Objective:
        """What is learned, with the settings of the options."""

    def predict(
        self, denoiser: nn.Module, x: Tensor, timesteps: Tensor, cond: Cond, guidance: Tensor | None = None
    ) -> Tensor:
        """The denoiser's answer (B, C, h, w) for noisy latents x at timesteps (B,) in [0, 1000].

        `guidance` (B,) is the embedded guidance; None takes the training value of the options.
        """

    def size_cond(self, original_sizes: Sequence[Size], crops: Sequence[tuple[int, int]], size: Size) -> Cond:
        """What `predict` must find in `cond` besides the text outputs, on the CPU; empty where sizes mean nothing.

        Sizes of the images before anything was done to them, left and top of their crops, and the size they have now:
        of a batch in training; of the wanted image, uncropped, for a sample.
        """

    def train_at(self, resolutions: Sequence[Size], sizes: Collection[Size]) -> list[Finding]:
        """Told which resolutions the datasets have, and which sizes their images come in, before anything is predicted.

        Gives what is wrong with them.
        """

    def vary(self, cond: Cond, size: Size, draws: Draws) -> Cond:
        """What the denoiser is told of a batch of images of a size, with what training changes in it at random."""

    def vae_identity(self) -> str:
        """Changes when the autoencoder, or anything else that decides the latents, changes."""

    def text_identity(self) -> str:
        """Changes when a text encoder, a tokenizer or an option that decides the text outputs changes."""

    def sampling_shift(self) -> bool:
        """Whether the sampling schedule is shifted by the number of image tokens."""

    def architecture(self) -> str:
        """`modelspec.architecture` of the base model."""

    def modelspec(self) -> dict[str, Any]:
        """Arguments of `library.metadata.build_modelspec` that only the family knows."""

    def metadata(self) -> dict[str, object]:
        """Family-specific `ss_*` values, names without the prefix; they win over the values of options."""

    def unused_parameters(self) -> Mapping[str, Sequence[str]]:
        """Beginnings of the names of parameters of text encoders, by encoder, on which `encode_text` doesn't depend."""

    def model_elements(self) -> int:
        """How many numbers a whole model holds that `save_model` writes, from the headers only."""

    def model_extension(self, kind: str | None) -> str:
        """What the name of a whole model ends in, saved as `--save_model_as` says, with its dot; empty: a folder."""

    def save_model(self, path: Path, parts: Mapping[str, nn.Module], saving: Saving) -> None:
        """Writes a whole model, whole or not at all: these parts, by name, and the others from where they came.

        Errors: ResourceError for a full disk and the like.
        """
