"""Shows and edits the metadata of a safetensors file. Options: `python tools/show_metadata.py --help`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import metadata_editing as editing
from library.log import DataError, UserError, command
from library.option_groups import SHOW_METADATA, EditMetadataOptions, ShowMetadataOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the header of the file only; where something is written, the tensors are copied byte by byte."""
    options = parse(SHOW_METADATA, argv)
    path, wanted = options[ShowMetadataOptions].model, options[EditMetadataOptions]
    filters = options[ShowMetadataOptions].filter or ()
    edit = editing.Edit(filters, wanted.strip or (), wanted.remove or (), wanted.set or ())
    if options[ShowMetadataOptions].verify:
        sys.stdout.write(editing.verify(path) + "\n")
    elif wanted.save_to or wanted.overwrite:
        editing.rewrite(path, _target(path, wanted), edit)
    else:
        found = editing.read(path)
        if not found and not wanted.set:
            raise DataError("no metadata found", path, "the file was saved without", code="E-METADATA-NONE")
        sys.stdout.write(json.dumps(edit(found), indent=4, sort_keys=True) + "\n")


def _target(path: str, options: EditMetadataOptions) -> Path:
    target = Path(options.save_to or path)
    if target.exists() and not options.overwrite:
        raise UserError("the file is there already", f"--save_to {target}", "give --overwrite, or another name")
    return target


if __name__ == "__main__":
    main()
