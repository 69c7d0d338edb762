"""Makes the weighted sum of checkpoints. Options: `python tools/merge_models.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import UserError, command, get_logger
from library.option_groups import MERGE_MODELS, MergeModelsOptions
from library.options import parse

logger = get_logger(__name__)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Checks what is given, then adds and writes tensor by tensor."""
    options = parse(MERGE_MODELS, argv)[MergeModelsOptions]
    from library import devices
    from library.models import mixing
    from networks import results

    paths, ratios = options.models or (), _ratios(options)
    path = results.check_output(_with_suffix(options.output), paths, overwrite=options.overwrite, option="--output")
    dtype, device = results.PRECISIONS[options.saving_precision], devices.device_of(options.device, "--device")
    models = [mixing.Model.of(model) for model in paths]
    mixing.check(models, show_skipped=options.show_skipped)
    with ExitStack() as stack:
        tensors = [stack.enter_context(mixing.opened(model)) for model in models]
        mixed = mixing.Mixed(models, tensors, ratios, dtype=dtype, device=device, unet_only=options.unet_only)
        mixed.save(path, {} if options.no_metadata else mixing.mixed_metadata(models, path))


def _ratios(options: MergeModelsOptions) -> Sequence[float]:
    count = len(options.models or ())
    if count < 1:
        raise UserError("no model to merge", "--models", "give two files or more")
    ratios = options.ratios or [1 / count] * count
    if len(ratios) != count:
        what = f"{len(ratios)} ratios for {count} models"
        raise UserError(what, "--ratios", "give one for each of --models, in their order")
    if abs(sum(ratios) - 1) > 1e-3:
        logger.warning("--ratios sum up to %g; models are usually mixed with ratios that sum up to 1", sum(ratios))
    return ratios


def _with_suffix(output: str | None) -> str | None:
    return f"{output}.safetensors" if output and not Path(output).suffix else output


if __name__ == "__main__":
    main()
