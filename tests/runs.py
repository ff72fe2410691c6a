"""
Runs of train.py at a tiny size: corpora, flags, the script as a process, what a run has left behind. For the tests and
for faults.py, so without pytest.

A command runs as a fork of this process, which has imported torch already: `python train.py ...` with its own signals,
exit status and streams, without 6 s of imports. Where torchrun itself matters, it is the real one.
"""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # noqa: F401  AdamW imports it, 3 s: once here instead of once in every child
import torch.multiprocessing as mp

from ranks import environment, meeting_point
import dist
import train
from data import objectives
from data.bpe import make_tokenizer
from data.files import write_pairs, write_text

ROOT = Path(train.__file__).parent
TINY = ("--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_steps=6 --warmup=2 --eval_every=0 "
        "--eval_batches=2 --log_every=1 --save_every=0 --sample_tokens=5 --bleu_sentences=2 --beams=2 "
        "--device=cpu").split()  # fmt: skip
OBJECTIVES = [name for name, objective in objectives.OBJECTIVES.items() if not objective.continues]
BYTES = make_tokenizer("bytes", 0, ())
LAST, FIRST = "ckpt_000006.pt", "ckpt_000003.pt"  # checkpoints of the fixture `trained`


def write_corpora(folder):
    """folder/text with two domains, folder/pairs with sentence pairs, in bytes."""
    words, rng = "the cat sat on a mat and saw two dogs run far away from him".split(), np.random.default_rng(0)
    texts = lambda n: [" ".join(rng.choice(words, 12)) for _ in range(n)]
    domains = lambda n: {"prose": texts(n), "code": [t.upper() for t in texts(n)]}
    pairs = lambda n: [(t[:13], t[::-1][:11]) for t in texts(n)]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        write_text(str(folder / "text"), BYTES, {"train": domains(40), "val": domains(8)}, "a test")
        splits = {"train": pairs(80), "val": pairs(12), "test": pairs(9)}
        write_pairs(str(folder / "pairs"), BYTES, ("en", "ne"), splits, "a test")


def config(gate="switch", **more):
    """A Config for models that are built without a run."""
    sizes = dict(n_layer=2, n_head=2, n_embd=16, n_experts=4, block_size=16, max_steps=10, k=0)
    return train.Config(**sizes | dict(gate=gate) | more)


def flags(corpora, out, *more, objective="gpt"):
    return [*TINY, f"--objective={objective}", f"--dataset={corpora[objective]}", f"--out_dir={out}", *more]


# ---------------------------------------------------------------------------------------------------------------------
# The script


def nothing(*where):
    """No fault, no damage."""


def as_script(argv, folder, said, env, before):
    """In a child: what `python train.py ARGV` does, from __main__ on. before(): a fault to put in."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, also where the tests run under nohup
    os.chdir(folder)
    os.environ.update(env)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        setattr(sys, name, open(fd, "w", buffering=1, closefd=False))
    torch.set_num_threads(1)
    sys.argv = ["train.py", *map(str, argv)]
    status = 1
    try:
        before()
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


class Command:
    """`python train.py ARGV` in `folder`, or `world` > 1 of them as torchrun would start them."""

    def __init__(self, argv, folder, world=1, before=nothing, env={}):
        fork, self.store, self.said = mp.get_context("fork"), meeting_point(), tempfile.TemporaryDirectory()
        self.processes = []
        for rank in range(world):
            names = environment(rank, world, self.store.port) | env
            args = argv, folder, f"{self.said.name}/{rank}", names, before
            self.processes.append(fork.Process(target=as_script, args=args))
            self.processes[-1].start()

    def text(self, name, rank="*"):
        paths = sorted(Path(self.said.name).glob(f"{rank}.{name}"))
        return "".join(path.read_text(errors="replace") for path in paths)

    def until(self, pattern, timeout=60):
        """Wait until stdout shows the pattern, or the run is over."""
        end = time.time() + timeout
        while not re.search(pattern, self.text("stdout")) and self.processes[0].is_alive():
            assert time.time() < end, f"no {pattern!r} after {timeout} s"
            time.sleep(0.01)

    def kill(self, number, rank=0):
        os.kill(self.processes[rank].pid, number)

    def wait(self, timeout=60):
        """-> exit statuses, stdout, stderr of all ranks together."""
        end = time.time() + timeout
        for process in self.processes:
            process.join(max(0.1, end - time.time()))
        hung = [process.pid for process in self.processes if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not hung, f"still running after {timeout} s: {self.text('stdout')[-300:]} {self.text('stderr')[-300:]}"
        return [process.exitcode for process in self.processes], self.text("stdout"), self.text("stderr")


def run(argv, folder, **more):
    """Run to a good end -> stdout."""
    status, out, err = Command(argv, folder, **more).wait()
    assert not any(status) and not err, f"status {status}, stdout {out[-500:]!r}, stderr {err[-4000:]!r}"
    return out


def refuse(argv, folder, *words, **more):
    """The run ends with status 1 on every rank and one line on stderr that has the words."""
    status, out, err = Command(argv, folder, **more).wait()
    assert set(status) == {1} and err.startswith("train.py: "), f"status {status}, stderr {err[-500:]!r}"
    assert err.count("\n") == 1, f"{err.count(chr(10))} lines: {err[-500:]!r}"
    assert all(word in err for word in words), f"{words} are not all in {err!r}"
    assert "[Errno" not in err, f"a bare errno: {err!r}"


# ---------------------------------------------------------------------------------------------------------------------
# What a run has left behind


def newest(out):
    return dist.find(out)[1]


def log(out):
    """The log's lines, without what depends on the clock."""
    clock = "seconds", "cpu_seconds", "tokens_per_s"
    with open(Path(out) / "log.jsonl") as f:
        return [{key: v for key, v in json.loads(line).items() if key not in clock} for line in f]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_run(a, b):
    """Bit for bit: weights, moments, step, and the log."""
    one, two = newest(a), newest(b)
    for part in ("model", "optimizer", "step"):
        assert same(one[part], two[part]), f"another {part}"
    assert log(a) == log(b), f"another log: {[pair for pair in zip(log(a), log(b)) if pair[0] != pair[1]][:2]}"


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
    return {str(p): p.read_bytes() if p.is_file() else "" for p in sorted(Path(folder).rglob("*"))}
