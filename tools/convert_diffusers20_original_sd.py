"""Converts SD and SDXL between files and folders. Options: `python tools/convert_diffusers20_original_sd.py --help`."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import DataError, UserError, command, get_logger
from library.option_groups import CONVERT_DIFFUSERS20_ORIGINAL_SD, ConvertDiffusersSdOptions
from library.options import parse

logger = get_logger(__name__)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Checks what is given, then converts."""
    options = parse(CONVERT_DIFFUSERS20_ORIGINAL_SD, argv)[ConvertDiffusersSdOptions]
    precision, facts = _precision(options), _facts(options.metadata)
    if options.v1 and options.v2:
        raise UserError("both --v1 and --v2", "command line", "give one of them, or none")
    reference = Path(options.reference_model) if options.reference_model else None
    if reference is not None and not reference.is_dir():
        what, hint = "no such folder", "give a Diffusers folder on this computer"
        raise DataError(what, f"--reference_model {reference}", hint, code="E-FILE-MISSING")
    from library.models import converting_sd
    from networks.results import PRECISIONS

    target, source = Path(options.model_to_save), Path(options.model_to_load)
    converting_sd.check_target(target, source, overwrite=options.overwrite, option="model_to_save")
    found = converting_sd.find(options.model_to_load, "model_to_load", options.variant)
    wanted = "1" if options.v1 else "2" if options.v2 else found.version
    if found.version != wanted:
        is_xl = found.version == "xl"
        what = f"this is {'SDXL' if is_xl else f'SD {found.version}.x'}, not SD {wanted}.x"
        raise DataError(what, options.model_to_load, "leave --v1 and --v2 out", code="E-MODEL-KIND")
    conversion = converting_sd.Conversion(
        found,
        target,
        PRECISIONS[precision] if precision else None,
        options.epoch,
        options.global_step,
        facts,
        reference,
    )
    if facts and target.suffix != ".safetensors":
        logger.warning("--metadata has no effect: only .safetensors files hold any")
    conversion.run()


def _precision(options: ConvertDiffusersSdOptions) -> str | None:
    """Errors: UserError when there are several."""
    given = {name for name in ("fp16", "bf16", "float") if getattr(options, name)}
    given |= {options.save_precision_as} - {"no"}
    if len(given) > 1:
        raise UserError(f"several types: {', '.join(sorted(given))}", "command line", "give one")
    return next(iter(given), None)


def _facts(text: str | None) -> dict[str, str]:
    """`--metadata`, which is JSON, or as Python writes such things. Errors: UserError."""
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
    if not isinstance(found, dict) or not all(isinstance(value, str | int | float) for value in found.values()):
        hint = """such as '{"modelspec.title": "My cat"}'"""
        raise UserError("no JSON object of names and values", f"--metadata {text}", hint)
    return {str(key): str(value) for key, value in found.items()}


if __name__ == "__main__":
    main()
