"""Run training steps under DistributedDataParallel on the visible GPU; print the memory peaks.

    python replicated.py bert-mini 16 fp16

The other rank is fake: the virtual GPU has no arithmetic to reduce with, and reducing in place needs no memory.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.nn.parallel.distributed as ddp
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_bsopt.workloads.training_step import TrainingStep, autocast_forward
from hf_bsopt.workloads.workload import describe


def fake_all_reduce(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def main() -> None:
    name, size, precision = sys.argv[1:]
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    ddp._verify_param_shape_across_processes = lambda *_, **__: True
    workload = describe(name, max_length=128, precision=precision)
    with torch.device("cuda"):
        model = workload.build()
    parallel = ddp.DistributedDataParallel(model, device_ids=[0], find_unused_parameters=True)
    parallel.register_comm_hook(None, lambda state, bucket: fake_all_reduce(bucket))
    step = TrainingStep(model, workload.settings, "cuda")
    forward = autocast_forward(model, workload.precision, "cuda")
    if forward is not model:
        model.forward = forward
    step._forward = parallel
    for _ in range(3):
        step.worst_case(workload, int(size), "cuda")
    print(json.dumps([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]))


if __name__ == "__main__":
    main()
