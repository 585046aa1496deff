"""A run, and the memory that it takes beside what its plan says: a line of JSON on each rank.

    python -m bench.run_memory {sft,reward,ppo} CONFIG.yaml     (or under torchrun)

The baseline is the process with everything imported and the compiled libraries loaded. Measured is the peak less that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.process_memory import peak, start_watching
from rlhf_fast.cli import set_environment


def main(command: str, file: str) -> None:
    set_environment()  # as the command line does, before torch is there
    import deepspeed.runtime.bf16_optimizer  # noqa: F401
    import peft  # noqa: F401

    from rlhf_fast.build import load_generation, load_ops
    from rlhf_fast.config_loading import load_config
    from rlhf_fast.distributed import init_distributed
    from rlhf_fast.plan import IMPORTS, memory_plan
    from rlhf_fast.trainers import CONFIGS, TRAINERS

    config = load_config(CONFIGS[command], Path(file))
    load_ops()
    load_generation()
    world = init_distributed()
    plan = memory_plan(config)
    baseline = start_watching()
    trainer = TRAINERS[command](config)
    trainer.train()
    found = {"rank": world.rank, "baseline": baseline, "measured": peak() - baseline, "plan": plan.total - IMPORTS}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
