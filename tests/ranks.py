"""run_ranks: a function on W forked processes with a gloo group, in a fraction of a second a launch."""

import random
import socket
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  AdamW imports it, 3 s: once here instead of once in every child
import torch.distributed as td
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for bench.py, which pytest does not start


def free_port():
    """A port for a master that is started later. It lies below the range from which systems deal out the other ends of
    connections (gloo's, for one), so that none of those takes it in the meantime."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("localhost", port))
            return port


def _child(rank, world, folder, timeout, fn, args):
    torch.set_num_threads(1)  # the parent's OpenMP threads do not survive a fork
    td.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    torch.save(fn(rank, world, *args), f"{folder}/{rank}.pt")
    td.barrier()
    td.destroy_process_group()


def run_ranks(world, fn, *args, timeout=60):
    """[fn(rank, world, *args) for each rank], run in parallel; the process group exists already.

    The first exception of a rank is raised here with its traceback, TimeoutError after `timeout` seconds. fn
    must be a module-level function: with a GPU processes are spawned, since CUDA does not survive a fork.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            _child,
            (world, folder, timeout, fn, args),
            world,
            join=False,
            start_method="spawn" if torch.cuda.is_available() else "fork",
        )
        end = time.time() + timeout
        try:
            while not ranks.join(timeout=max(0.01, end - time.time())):
                if time.time() > end:
                    raise TimeoutError(f"{fn.__name__} on {world} ranks: no end after {timeout} s")
        finally:
            for process in ranks.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]
