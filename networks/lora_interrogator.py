"""Finds the tokens that a network changes most. Options: `python networks/lora_interrogator.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import UserError, command
from library.option_groups import LORA_INTERROGATOR, LoraInterrogatorOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tokens, the most changed first."""
    options = parse(LORA_INTERROGATOR, argv)[LoraInterrogatorOptions]
    if not options.sd_model or not options.model:
        missing = "--model" if options.sd_model else "--sd_model"
        raise UserError(f"{missing} is missing", "command line", "give a model and a network")
    from library.families.tokenizers import CLIP_L, load_tokenizer
    from networks.interrogating import interrogate

    beside = str(Path(options.sd_model) / "model_index.json") if Path(options.sd_model).is_dir() else options.sd_model
    tokenizer = load_tokenizer(CLIP_L, options.tokenizer_cache_dir, [beside])
    for token, change in interrogate(options, len(tokenizer), tokenizer.all_special_ids)[: options.top]:
        sys.stdout.write(f"[{tokenizer.decode([token])}] {change:.6f}\n")


if __name__ == "__main__":
    main()
