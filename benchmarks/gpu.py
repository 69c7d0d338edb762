"""Times LoRA steps of whole models on a GPU, with random weights, and writes what they took. See README.md here."""

from __future__ import annotations

import json
from pathlib import Path

import step

from library import devices

COMMON = ("--whole", "--dtype", "bf16", "--resolution", "1024", "--steps", "10", "--warmup", "3")
CASES = {
    "FLUX.1": ("--checkpointing",),
    "SD3.5-medium": ("--family", "sd3", "--cuda_graphs"),
    "SDXL": ("--family", "sdxl", "--cuda_graphs"),
    "SDXL, recomputed": ("--family", "sdxl", "--checkpointing", "--cuda_graphs"),
    "SDXL, batches of 4, recomputed": ("--family", "sdxl", "--batch", "4", "--checkpointing", "--cuda_graphs"),
}
RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"


def main() -> None:
    """Measures one after the other; what fails is written, too."""
    found: dict[str, object] = {}
    for name, words in CASES.items():
        try:
            found[name], _ = step.measured(step.parser().parse_args([*COMMON, *words]))
        except RuntimeError as error:
            found[name] = str(error)
        devices.release_memory()
        print(f"{name}: {json.dumps(found[name])}")
        RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
