"""
Runs of train.py at a tiny size: flags, the script as a process, what a run has left behind.

A command runs as a fork of this process, which has imported torch already: `python train.py ...` with its own signals,
exit status and streams, without 6 s of imports. Where torchrun itself matters, it is the real one.
"""

import json
import os
import re
import resource
import runpy
import shutil
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  AdamW imports it, 3 s: once here instead of once in every child
import torch.multiprocessing as mp

import dist
import train
from data.bpe import Tokenizer
from ranks import free_port

ROOT = Path(train.__file__).parent
TINY = ("--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_steps=6 --warmup=2 --eval_every=0 "
        "--eval_batches=2 --log_every=1 --save_every=0 --sample_tokens=5 --bleu_sentences=2 --beams=2 "
        "--device=cpu").split()  # fmt: skip
OBJECTIVES = ["gpt", "roberta", "translation"]
BYTES = Tokenizer("bytes", [bytes([i]) for i in range(256)])
LAST, FIRST = "ckpt_000006.pt", "ckpt_000003.pt"  # checkpoints of the fixture `trained`


def config(gate="switch", **more):
    """A Config for models that are built without a run."""
    sizes = dict(n_layer=2, n_head=2, n_embd=16, n_experts=4, block_size=16, max_steps=10, k=0)
    return train.Config(**sizes | dict(gate=gate) | more)


def flags(corpora, out, *more, objective="gpt"):
    return [*TINY, f"--objective={objective}", f"--dataset={corpora[objective]}", f"--out_dir={out}", *more]


# ---------------------------------------------------------------------------------------------------------------------
# The script


def as_script(argv, cwd, env, limit):
    """Child process: what `python train.py ARGV` does, from __main__ on."""
    os.chdir(cwd)
    os.environ.update(env)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{env.get('RANK', '')}{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        setattr(sys, name, open(fd, "w", buffering=1, closefd=False))
    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["train.py", *map(str, argv)]
    status = 1
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


class Command:
    """`python train.py ARGV`, or W of them as torchrun would start them, running in the folder cwd."""

    def __init__(self, argv, cwd, world=0, limit=0, env={}):
        self.cwd, fork, port = Path(cwd), mp.get_context("fork"), free_port()
        self.processes = []
        for rank in range(max(1, world)):
            names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="localhost",
                         MASTER_PORT=port) if world else {}  # fmt: skip
            names = {k: str(v) for k, v in names.items()} | env
            self.processes.append(fork.Process(target=as_script, args=(argv, cwd, names, limit)))
            self.processes[-1].start()
        self.pids = [p.pid for p in self.processes]

    def wait(self, timeout=60):
        """Exit status (of the first rank that failed), stdout and stderr of rank 0."""
        try:
            for p in self.processes:
                p.join(timeout)
                assert p.exitcode is not None, f"still running after {timeout} s: {self.text('stdout')[-2000:]}"
        finally:
            for p in self.processes:
                p.kill()
        status = next((p.exitcode for p in self.processes if p.exitcode), 0)
        return status, self.text("stdout"), self.text("stderr")

    def text(self, name):
        path = self.cwd / f"{0 if len(self.processes) > 1 else ''}{name}.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, pattern, timeout=60):
        """Wait until stdout shows the pattern."""
        end = time.time() + timeout
        while not re.search(pattern, self.text("stdout")):
            assert time.time() < end and self.processes[0].is_alive(), self.text("stdout") + self.text("stderr")
            time.sleep(0.05)


def run(argv, cwd, **more):
    status, out, err = Command(argv, cwd, **more).wait()
    assert status == 0, out[-2000:] + err[-4000:]
    return out


def refuse(argv, cwd, *parts, **more):
    """The command must fail with one line that holds all the parts."""
    status, out, err = Command(argv, cwd, **more).wait()
    assert status not in (0, None) and "Traceback" not in err + out, err
    assert len(err.strip().splitlines()) == 1 and err.startswith("train.py: "), err
    for part in parts:
        assert part in err, f"{part!r} is not in {err!r}"


# ---------------------------------------------------------------------------------------------------------------------
# What a run has left behind


def newest(out):
    return dist.load(dist.latest(out))


def log(out, keep=("step", "loss", "norm", "val_loss", "lr", "load")):
    """The log's lines, without what depends on the clock; keep=None: all of it."""
    with open(Path(out) / "log.jsonl") as f:
        return [{k: v for k, v in json.loads(line).items() if keep is None or k in keep} for line in f]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_run(a, b):
    """Bit for bit: weights, moments, step, and the log."""
    one, two = newest(a), newest(b)
    for part in ("model", "optimizer", "step"):
        assert same(one[part], two[part]), part
    assert log(a) == log(b)


def assert_close_run(a, b, tol=1e-5):
    """Losses, norms and weights agree as far as float32 sums in another order do."""
    assert [e["step"] for e in log(a)] == [e["step"] for e in log(b)]
    for x, y in zip(log(a), log(b)):
        for key in ("loss", "norm", "val_loss"):
            assert key not in x or abs(x[key] - y[key]) < tol * max(1, abs(x[key])), (x, y)
    one, two = newest(a), newest(b)
    for name, t in one["model"].items():
        error = float((t.double() - two["model"][name].double()).abs().max())
        assert error < 100 * tol, (name, error)


def copy_of(out, tmp_path, *drop):
    new = tmp_path / "copy"
    shutil.copytree(out, new)
    for name in drop:
        (new / name).unlink()
    return new


def snapshot(folder):
    """{path: content} of a folder, to see that nothing was touched."""
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
