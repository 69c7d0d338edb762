"""needs B1: a process that is slow in caching is waited for, longer than a collective of the training would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys, time
from datetime import timedelta
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from library.train import processes
dist.init_process_group("gloo", timeout=timedelta(seconds=4))
if dist.get_rank() == 1:
    time.sleep(9)
processes.wait_for_all()
total = torch.ones(1)
dist.all_reduce(total)
open(sys.argv[1] + str(dist.get_rank()), "w").write(str(int(total)))
processes.leave()
"""


@pytest.mark.slow
def test_a_slow_process_is_waited_for(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT.format(root=str(ROOT)), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        str(tmp_path / "met"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"met{rank}").read_text(encoding="utf-8") for rank in (0, 1)] == ["2", "2"]
