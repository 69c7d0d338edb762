"""Finds the tokenizers of the text encoders on the user's disk; the hub is the last resort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library import hub
from library.log import DataError, ResourceError, get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer by the name under which the hub knows it."""

    repository: str
    class_name: str
    files: tuple[tuple[str, ...], ...]
    """Sets of files, each of which is enough to make it."""
    subfolder: str = ""
    """Where it lies in the repository."""
    open_clip: bool = False
    """Whether its encoder was trained by OpenCLIP."""

    @property
    def folder(self) -> str:
        """Its folder below `--tokenizer_cache_dir`."""
        return self.repository.replace("/", "_")

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds it."""
        return any(all((folder / name).is_file() for name in names) for names in self.files)


CLIP_L = TokenizerSource(
    "openai/clip-vit-large-patch14", "CLIPTokenizer", (("tokenizer.json",), ("vocab.json", "merges.txt"))
)
T5_XXL = TokenizerSource("google/t5-v1_1-xxl", "T5Tokenizer", (("tokenizer.json",), ("spiece.model",)))

_CLIP_FILES = CLIP_L.files
OPEN_CLIP_H = TokenizerSource(
    "stabilityai/stable-diffusion-2", "CLIPTokenizer", _CLIP_FILES, subfolder="tokenizer", open_clip=True
)
"""Of SD 2.x."""
OPEN_CLIP_G = TokenizerSource("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "CLIPTokenizer", _CLIP_FILES, open_clip=True)
"""Of SDXL's second encoder."""

EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that come with every tokenizer."""
LEAST_TOKENS = 100
"""A tokenizer with fewer was made of nothing, which the library that reads them does without a word."""


def load_tokenizer(
    source: TokenizerSource, cache_dir: str | None, beside: Sequence[str | None], own: Path | None = None
) -> Any:
    """The tokenizer: of `cache_dir`, of a folder beside one of the files in `beside`, of the hub's cache, of the hub.

    `own` is the folder where a model in the Diffusers layout would have it.

    The hub is asked only where nothing is on the disk. Errors: ResourceError when it is nowhere and the hub can't be
    reached, DataError when its files are damaged.
    """
    for folder in (*_candidates(source, cache_dir, beside), *([] if own is None else [own])):
        if source.is_in(folder):
            return _load(source, folder)
    found = _fetched(source, cached_only=True)
    if found is not None:
        return _load(source, found)
    logger.info("the tokenizer %s is not on this computer: asking the hub for it", source.repository)
    found = _fetched(source, cached_only=False)
    if found is None:
        needed = ", or ".join(" and ".join(files) for files in source.files)
        raise ResourceError(
            f"the tokenizer {source.repository} is not on this computer and the hub can't be reached",
            str(Path(cache_dir or "TOKENIZER_CACHE_DIR") / source.folder),
            f"put {needed}, with {' and '.join(EXTRAS)}, into that folder and give --tokenizer_cache_dir",
            code="E-TOKENIZER",
        )
    tokenizer = _load(source, found)
    if cache_dir is not None:
        tokenizer.save_pretrained(str(Path(cache_dir) / source.folder))
        logger.info("tokenizer %s stored in %s", source.repository, cache_dir)
    return tokenizer


def _fetched(source: TokenizerSource, *, cached_only: bool) -> Path | None:
    """The folder of the hub that holds it; None when there is none."""
    names = sorted({name for files in source.files for name in files} | set(EXTRAS))
    if source.subfolder:
        names = [f"{source.subfolder}/{name}" for name in names]
    found = hub.fetch_folder(source.repository, names, cached_only=cached_only)
    folder = None if found is None else found / source.subfolder
    return folder if folder is not None and source.is_in(folder) else None


def _candidates(source: TokenizerSource, cache_dir: str | None, beside: Sequence[str | None]) -> list[Path]:
    folders = [Path(cache_dir) / source.folder] if cache_dir else []
    for file in beside:
        if file is not None:
            parent = Path(file).parent
            folders += [parent / source.folder, parent / "tokenizers" / source.folder, parent / "tokenizer"]
    return folders


def _load(source: TokenizerSource, folder: Path) -> Any:
    import transformers

    try:
        tokenizer = getattr(transformers, source.class_name).from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, str(error).splitlines()[0]) from error
    if len(tokenizer) < LEAST_TOKENS:
        raise _damaged(folder, f"it has {len(tokenizer)} tokens only")
    return tokenizer


def _damaged(folder: Path, reason: str) -> DataError:
    return DataError(f"the tokenizer can't be read: {reason}", str(folder), "fetch its files again", code="E-TOKENIZER")
