"""What text encoders and the autoencoder need in memory beside their weights, roughly. Pure arithmetic.

They are small beside the denoiser, which `library.models.activations` reckons exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

AUTOENCODER = 83_819_683
"""Weights of FLUX's, which is taken where its shapes aren't known."""
CHANNELS = 128
"""Of its first layer, the one with as many pixels as the image."""
ENCODING, DECODING = 5, 6
"""Tensors with these channels and as many pixels as the image, at the worst place on the way."""
HEAD = 64
"""Width of a head of the usual text encoders."""


def matrices(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """The linear layers of a model: (outputs, inputs) by name."""
    return {
        name: (shape[0], shape[1])
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith("weight") and not any(word in name for word in ("embed", "shared", "bias"))
    }


def encoding(shapes: Shapes, texts: int, tokens: int, size: int) -> int:
    """Bytes for encoding so many texts at once: one layer's feed-forward part, and all pairs of tokens of each head."""
    layers = matrices(shapes)
    if not layers:
        return 0
    wide = max(map(max, layers.values()))
    heads = min(map(min, layers.values())) // HEAD
    return texts * tokens * size * (3 * wide + 2 * heads * tokens)


def encoder_training(shapes: Shapes, texts: int, tokens: int, size: int, *, checkpointed: bool) -> int:
    """Bytes that a text encoder with trained adapters keeps for the backward pass: what goes into and out of layers."""
    layers = matrices(shapes)
    kept = texts * tokens * size * sum(map(sum, layers.values()))
    one = encoding(shapes, texts, tokens, size)
    return one + (kept // 10 if checkpointed else kept)


def autoencoder(pixels: int, size: int, *, decoding: bool) -> int:
    """Bytes for encoding images of so many pixels together, or for decoding them."""
    return pixels * CHANNELS * size * (DECODING if decoding else ENCODING)


def elements(shapes: Shapes) -> int:
    """Numbers in all tensors."""
    return sum(map(math.prod, shapes.values()))
