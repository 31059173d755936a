"""Run a function in several gloo processes on the CPU, and never wait for them without end."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 60  # seconds that one process waits for the others


def spread(function, world_size, *arguments, seconds=300):
    """Return what ``function(rank, world_size, *arguments)`` returned in each process.

    Raises what one of them raised, or TimeoutError where they are not done in time.
    """
    # Forked from a server that has imported everything, in which nothing has been computed.
    multiprocessing.get_context("forkserver").set_forkserver_preload([function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _work,
            (function, world_size, folder, arguments),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        end = time.monotonic() + seconds
        while not context.join(timeout=1):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{world_size} processes are not done after {seconds} s")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def _work(rank, function, world_size, folder, arguments):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    torch.save(function(rank, world_size, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
