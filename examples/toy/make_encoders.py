"""Trains the toy's two text encoders to say what a caption is about; names as in the files of CLIP-L and T5-XXL."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from examples.toy.draw import COLOURS, COUNTS, SHAPES, SIZES, plural
from examples.toy.make_tokenizers import CLIP_FOLDER, T5_FOLDER, words

WIDTH = 128
HEAD_WIDTH = 64
CLIP_LENGTH, T5_LENGTH = 77, 24
NOTHING = "nothing"
QUESTIONS = {
    "amount": ("a", *SIZES, *COUNTS.values()),
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "other colour": (NOTHING, *COLOURS),
    "other shape": (NOTHING, *SHAPES),
    "background": tuple(COLOURS),
}
"""What is asked about a caption, and the possible answers."""


def caption(rng: random.Random) -> tuple[str, list[int]]:
    """A caption of the toy's grammar, and the right answers to the questions."""
    background, first, second = rng.sample(list(COLOURS), 3)
    noun, other = rng.sample(list(SHAPES), 2)
    amount = rng.choice(QUESTIONS["amount"])
    if amount == "a" and rng.random() < 0.5:
        text = f"a {first} {noun} and a {second} {other}"
    else:
        second = other = NOTHING
        lead = f"a {amount}" if amount in SIZES else amount
        text = f"{lead} {first} {plural(noun) if amount in COUNTS.values() else noun}"
    said = (amount, first, noun, second, other, background)
    answers = [options.index(word) for options, word in zip(QUESTIONS.values(), said, strict=True)]
    return f"{text} on a {background} background", answers


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text model with random weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=WIDTH // HEAD_WIDTH,
            max_position_embeddings=CLIP_LENGTH,
            hidden_act="quick_gelu",
        )
    )


def build_t5(vocabulary: int) -> T5EncoderModel:
    """A small T5 encoder with random weights."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=WIDTH,
            d_kv=HEAD_WIDTH,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


class Encoders(nn.Module):
    """Both encoders, and for each a linear answer to every question."""

    def __init__(self, tokenizers: Path) -> None:
        super().__init__()
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(str(tokenizers / CLIP_FOLDER), local_files_only=True)
        self.t5_tokenizer = T5Tokenizer.from_pretrained(str(tokenizers / T5_FOLDER), local_files_only=True)
        self.clip = build_clip(self.clip_tokenizer)
        self.t5 = build_t5(len(self.t5_tokenizer))
        answers = sum(len(options) for options in QUESTIONS.values())
        self.clip_answers = nn.Linear(WIDTH, answers)
        self.t5_answers = nn.Linear(WIDTH, answers)

    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Logits (B, answers) of CLIP's state at the end mark, and of the mean of T5's states, padding included."""
        clip_ids = padded(self.clip_tokenizer, captions, T5_LENGTH)
        end = (clip_ids == self.clip_tokenizer.eos_token_id).int().argmax(dim=1)
        states = self.clip(input_ids=clip_ids).last_hidden_state
        pooled = states[torch.arange(len(captions)), end]
        hidden = self.t5(input_ids=padded(self.t5_tokenizer, captions, T5_LENGTH)).last_hidden_state
        return self.clip_answers(pooled), self.t5_answers(hidden.mean(dim=1))


def padded(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str], length: int) -> Tensor:
    """Token ids (B, length)."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids: Tensor = tokens["input_ids"]
    return ids


def wrongness(logits: Tensor, answers: Tensor) -> tuple[Tensor, float]:
    """Cross entropy summed over the questions, and the part of captions with all answers right."""
    parts = torch.split(logits, [len(options) for options in QUESTIONS.values()], dim=1)
    losses = [F.cross_entropy(part, answers[:, i]) for i, part in enumerate(parts)]
    right = torch.stack([part.argmax(dim=1) == answers[:, i] for i, part in enumerate(parts)]).all(dim=0)
    return torch.stack(losses).sum(), right.float().mean().item()


def train(encoders: Encoders, rng: random.Random, steps: int) -> None:
    """Teaches both encoders to answer."""
    optimizer = torch.optim.AdamW(encoders.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for index in range(steps):
        texts, answers = zip(*(caption(rng) for _ in range(64)), strict=True)
        wanted = torch.tensor(answers)
        (clip_loss, clip_right), (t5_loss, t5_right) = (wrongness(logits, wanted) for logits in encoders(list(texts)))
        optimizer.zero_grad()
        (clip_loss + t5_loss).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if index % 50 == 49:
            print(f"encoders {index + 1}/{steps} all right: CLIP {clip_right:.2f} T5 {t5_right:.2f}", flush=True)


def clip_tensors(model: CLIPTextModel) -> dict[str, Tensor]:
    """The tensors as the file of CLIP-L has them, all below `text_model.`."""
    tensors = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    return {f"text_model.{name}": value.half() for name, value in tensors.items() if "position_ids" not in name}


def t5_tensors(model: T5EncoderModel) -> dict[str, Tensor]:
    """The tensors as the file of T5-XXL has them; the embedding once, as `shared.weight`."""
    return {name: value.half() for name, value in model.state_dict().items() if "embed_tokens" not in name}


@torch.no_grad()
def spread_rest(encoders: Encoders) -> None:
    """Gives the pieces of spelled words, which no caption has used, embeddings as far apart as the used ones."""
    text = " ".join(words())
    for tokenizer, embedding in (
        (encoders.clip_tokenizer, encoders.clip.get_input_embeddings()),
        (encoders.t5_tokenizer, encoders.t5.get_input_embeddings()),
    ):
        known = sorted({*tokenizer(text)["input_ids"], tokenizer.pad_token_id})
        used, unknown = embedding.weight[known], sorted({*range(embedding.num_embeddings)} - {*known})
        embedding.weight[unknown] = used.mean(dim=0) + used.std(dim=0) * torch.randn(len(unknown), WIDTH)


def main() -> None:
    """Reads the command line, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where clip_l.safetensors and t5xxl.safetensors go")
    parser.add_argument("--tokenizers", type=Path, required=True, help="the folder that make_tokenizers wrote")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    encoders = Encoders(arguments.tokenizers)
    train(encoders, random.Random(arguments.seed), arguments.steps)
    spread_rest(encoders)
    save_file(clip_tensors(encoders.clip), arguments.folder / "clip_l.safetensors")
    save_file(t5_tensors(encoders.t5), arguments.folder / "t5xxl.safetensors")


if __name__ == "__main__":
    main()
