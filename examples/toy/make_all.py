"""Makes the toy from nothing: pictures, tokenizers, encoders, autoencoder, and the denoiser by flux_train.py.

Run from the repository's root: `python -m examples.toy.make_all`. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = HERE / "work"
"""Pictures, caches and the states of the pretraining; may be deleted afterwards."""
QUICKSTART = ROOT / "examples" / "quickstart"


def python(*arguments: str | Path) -> None:
    """Runs Python from the repository's root. Errors: CalledProcessError when it fails."""
    print("$ python", *arguments, flush=True)
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def draw() -> None:
    """The pictures of the pretraining, and those of the quickstart."""
    python("-m", "examples.toy.draw", WORK / "images", "--count", "3000", "--seed", "1")
    python("-m", "examples.toy.draw", QUICKSTART / "zogs", "--count", "16", "--seed", "7", "--creature")
    python("-m", "examples.toy.draw", QUICKSTART / "others", "--count", "16", "--seed", "8")


def tokenizers() -> None:
    """Both tokenizers."""
    python("-m", "examples.toy.make_tokenizers", HERE / "tokenizers")


def encoders() -> None:
    """Both text encoders."""
    python("-m", "examples.toy.make_encoders", HERE, "--tokenizers", HERE / "tokenizers")


def autoencoder() -> None:
    """The image autoencoder, and a picture of what it can do."""
    python("-m", "examples.toy.make_autoencoder", HERE / "ae.safetensors", "--show", WORK / "ae.png")


def denoiser() -> None:
    """The denoiser: random weights, then the pretraining."""
    python("-m", "examples.toy.make_flux", WORK / "flux_random.safetensors")
    python("flux_train.py", "--config_file", HERE / "pretrain.toml", "--output_dir", WORK / "pretrained")
    shutil.copyfile(WORK / "pretrained" / "flux.safetensors", HERE / "flux.safetensors")


STEPS: dict[str, Callable[[], None]] = {
    step.__name__: step for step in (draw, tokenizers, encoders, autoencoder, denoiser)
}


def main() -> None:
    """Reads the command line and makes what is asked for, or everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", help=f"any of {', '.join(STEPS)}; all, in this order, when none is given")
    arguments = parser.parse_args()
    unknown = set(arguments.steps) - set(STEPS)
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    WORK.mkdir(exist_ok=True)
    for name, step in STEPS.items():
        if not arguments.steps or name in arguments.steps:
            step()


if __name__ == "__main__":
    main()
