"""run_ranks: a function on W forked processes with a gloo group, in a fraction of a second a launch."""

import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  AdamW imports it, 3 s: once here instead of once in every child
import torch.distributed as td
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for bench.py, which pytest does not start


def meeting_point():
    """The store in which the processes of a run meet, kept here as torchrun's agent keeps it: nobody waits for rank 0
    to open one. It must live as long as they do."""
    return td.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def environment(rank, world, port):
    """What torchrun tells a process on one machine. port: of the meeting point."""
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="localhost",
                 MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE=True)  # fmt: skip
    return {name: str(value) for name, value in names.items()} if world > 1 else {}


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
