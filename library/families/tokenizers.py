"""Finds the tokenizers of the text encoders on the user's disk; the hub is the last resort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.log import ResourceError, get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer by the name under which the hub knows it."""

    repository: str
    class_name: str
    files: tuple[str, ...]
    """One of these must be in a folder that holds the tokenizer."""

    @property
    def folder(self) -> str:
        """Its folder below `--tokenizer_cache_dir`."""
        return self.repository.replace("/", "_")


CLIP_L = TokenizerSource("openai/clip-vit-large-patch14", "CLIPTokenizerFast", ("tokenizer.json", "vocab.json"))
T5_XXL = TokenizerSource("google/t5-v1_1-xxl", "T5TokenizerFast", ("tokenizer.json", "spiece.model"))


def load_tokenizer(source: TokenizerSource, cache_dir: str | None, beside: Sequence[str | None]) -> Any:
    """The tokenizer, from `cache_dir`, from a folder `tokenizer*` beside one of the files in `beside`, or from the hub.

    Errors: ResourceError when it is nowhere and the hub can't be reached.
    """
    for folder in _candidates(source, cache_dir, beside):
        if any((folder / name).is_file() for name in source.files):
            return _load(source, str(folder), local=True)
    try:
        tokenizer = _load(source, source.repository, local=False)
    except (OSError, ValueError) as error:
        where = Path(cache_dir or "TOKENIZER_CACHE_DIR") / source.folder
        raise ResourceError(
            f"the tokenizer {source.repository} is not on this computer and the hub can't be reached",
            str(where),
            f"put its files ({' or '.join(source.files)}) there and give --tokenizer_cache_dir",
            code="E-TOKENIZER",
        ) from error
    if cache_dir is not None:
        tokenizer.save_pretrained(str(Path(cache_dir) / source.folder))
        logger.info("tokenizer %s stored in %s", source.repository, cache_dir)
    return tokenizer


def _candidates(source: TokenizerSource, cache_dir: str | None, beside: Sequence[str | None]) -> list[Path]:
    folders = [Path(cache_dir) / source.folder] if cache_dir else []
    for file in beside:
        if file is not None:
            parent = Path(file).parent
            folders += [parent / source.folder, parent / "tokenizers" / source.folder, parent / "tokenizer"]
    return folders


def _load(source: TokenizerSource, place: str, *, local: bool) -> Any:
    import transformers

    return getattr(transformers, source.class_name).from_pretrained(place, local_files_only=local)
