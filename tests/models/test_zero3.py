"""ZeRO-3 gathers weights around the modules that own them, and the heads use weights of other modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_two_ranks_with_partitioned_weights_give_the_plain_gradients() -> None:
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launch} | {"OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.models.zero3_ranks"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
