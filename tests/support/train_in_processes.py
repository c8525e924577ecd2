"""Train in the processes of one launch, one run after the other.

    python -m torch.distributed.run --nproc_per_node 2 -m tests.support.train_in_processes RUN …

RUN is KIND:CONFIG or KIND:CONFIG:resume. KIND is "ddp" or "fsdp". accelerate turns FSDP on for GPUs alone; here it is
turned on for CPUs, with gloo.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

from facesnap_lab.training.config import read_config
from facesnap_lab.training.trainer import train

FSDP = {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}


def run(kind: str, config: Path, resume: bool) -> None:
    os.environ["ACCELERATE_USE_FSDP"] = str(kind == "fsdp").lower()
    state = PartialState(cpu=True)
    if kind == "fsdp":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    train(read_config(config), resume)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    AcceleratorState._reset_state()
    GradientState._reset_state()
    state.wait_for_everyone()


if __name__ == "__main__":
    os.environ.update(FSDP)
    for argument in sys.argv[1:]:
        kind, config, *resume = argument.split(":")
        run(kind, Path(config), bool(resume))
