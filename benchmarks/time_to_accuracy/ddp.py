"""One rank of PyTorch DistributedDataParallel: ``ddp.py FOLDER RANK ADDRESS PORT``.

Every rank takes the same number of its own rows a step. Rank 0 evaluates after each epoch while the others
wait and the clock stands.
"""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from task import SET_UP_S, Curve, Task, evaluate, meet, set_up_process, train_pass, warm_up
from torch.nn.parallel import DistributedDataParallel


def main(folder: str, rank: int, address: str, port: str) -> None:
    set_up_process()
    # torch 2.13 warns about its own use of names that it deprecated.
    warnings.simplefilter("ignore", FutureWarning)
    task = Task.load(folder)
    rows = task.rows(rank)
    least = min(len(task.rows(i)[1]) for i in range(len(task.devices)))
    steps, test = least // task.rows_a_step, task.test_rows()
    warm_up(task, rows, task.rows_a_step)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=len(task.devices),
        timeout=timedelta(seconds=2 * SET_UP_S),
    )  # fmt: skip
    bare = task.build_model()
    model = DistributedDataParallel(bare)
    optimizer = task.build_optimizer(model)
    curve = Curve.of(task)
    meet(task, str(rank))
    dist.barrier()
    curve.start()
    for epoch in range(task.passes):
        order = task.order(len(rows[1]), rank, epoch)
        train_pass(model, optimizer, task, rows, order, batch=task.rows_a_step, steps=steps)
        dist.barrier()
        curve.stop()
        over = torch.zeros(1)
        if rank == 0:
            over += curve.add(*evaluate(bare, test))
        dist.broadcast(over, 0)
        if over.item():
            break
        curve.start()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
