"""Makes the toy's two tokenizers: every word of its captions is one token, any other word is spelled."""

from __future__ import annotations

import argparse
import json
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import T5Tokenizer

from examples.toy.draw import COLOURS, COUNTS, SHAPES, SIZES, plural

CLIP_FOLDER, T5_FOLDER = "openai_clip-vit-large-patch14", "google_t5-v1_1-xxl"
"""The folders in which `--tokenizer_cache_dir` looks."""
END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """All words of the captions, sorted."""
    nouns = [*SHAPES, *(plural(noun) for noun in SHAPES)]
    return sorted({"a", "an", "and", "the", "of", "on", "background", *nouns, *COLOURS, *SIZES, *COUNTS.values()})


def byte_symbols() -> list[str]:
    """A printable character for each byte, as byte-level tokenizers write it.

    Source: the byte table of GPT-2's tokenizer: printable Latin-1 stands for itself, the rest follows at 256.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + hidden.index(byte)) for byte in range(256)]


def merges() -> list[tuple[str, str]]:
    """Byte-pair merges in order, the most frequent pair first, until every word is one symbol."""
    spelled = {word: [*word[:-1], word[-1] + END_OF_WORD] for word in words()}
    found: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for symbols in spelled.values() for pair in pairwise(symbols))
        if not pairs:
            return found
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best)
        spelled = {word: merged(symbols, best) for word, symbols in spelled.items()}


def merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with each occurrence of the pair joined."""
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def write_clip(folder: Path) -> None:
    """Writes CLIP's tokenizer: bytes, bytes that end a word, merges, and the two marks, which come last."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = merges()
    symbols = byte_symbols()
    entries = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *(a + b for a, b in pairs), START, END]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **marks}
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]))
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1))
    write_text(folder / "special_tokens_map.json", json.dumps(marks, indent=1))


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 with plain line ends and one at the end."""
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def write_t5(folder: Path) -> None:
    """Writes T5's tokenizer: whole words are likely pieces, single characters unlikely ones."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [("▁" + word, -3.0) for word in words()]
    pieces += [(character, -8.0) for character in string.ascii_letters + string.digits + string.punctuation]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Reads the command line and writes both tokenizers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder for --tokenizer_cache_dir")
    arguments = parser.parse_args()
    write_clip(arguments.folder / CLIP_FOLDER)
    write_t5(arguments.folder / T5_FOLDER)


if __name__ == "__main__":
    main()
