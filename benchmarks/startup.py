"""Times how long scripts take to answer, and to reach the first training step. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.option_groups import SCRIPTS

QUICKSTART = ROOT / "examples" / "quickstart" / "flux_lora.toml"
FIRST_STEP = re.compile(rb"step 1/\d+")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of --help for each script")
    parser.add_argument("--only_help", action="store_true", help="leave the training out")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    result: dict[str, float | None] = {
        f"{script.name} --help": round(median(answer(script.name) for _ in range(args.repeats)), 3)
        for script in SCRIPTS
    }
    if not args.only_help:
        result["first training step of the quickstart"] = first_step()
    if args.json:
        print(json.dumps(result, indent=2))
        return
    width = max(map(len, result))
    for name, seconds in result.items():
        print(f"{name:<{width}}  {'-' if seconds is None else f'{seconds:.2f} s'}")


def answer(script: str) -> float:
    """Seconds that a script takes to print its help."""
    start = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / script), "--help"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - start


def first_step() -> float | None:
    """Seconds from the start of the quickstart, with its caches as they are, to the first step; None if it fails."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "flux_train_network.py"), "--config_file", str(QUICKSTART)]
        command += ["--output_dir", folder, "--max_train_steps", "1", "--console_log_simple", "--no_sample_at_first"]
        start = time.perf_counter()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if FIRST_STEP.search(line):
                    seconds = time.perf_counter() - start
                    process.communicate()
                    return round(seconds, 2)
    return None


if __name__ == "__main__":
    main()
