"""
Injected faults: what a run does when it is killed, stopped, moved, given damaged files, wrong flags or bad numbers.

    python tests/faults.py                  all parts; prints "N of N" for each
    python tests/faults.py kills flags      some of them
    python tests/faults.py --quick          a few cases of each, under a minute

What has to hold: a run that goes on equals the uninterrupted one bit for bit (weights, moments, log); what is refused
ends with status 1 and one line on stderr that names the value, and nothing is written; no bad checkpoint is ever
written.

A case is a name and a function of a folder of its own, which raises if something is not so. `python train.py FLAGS` is
a fork of this process, which has imported torch already: its own signals, streams and exit status at little cost.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from runs import ROOT, TINY, Command, assert_same_run, log, newest, nothing, refuse, run, snapshot, write_corpora
import dist
import model
from data import objectives

# ---------------------------------------------------------------------------------------------------------------------
# Corpora and runs

CORPORA = Path(tempfile.mkdtemp(prefix="faults-"))


def flags(out, *more, objective="gpt"):
    kind = "pairs" if objective == "translation" else "text"
    longer = "--max_steps=12 --eval_every=5 --save_every=3 --timeout=8".split()
    return [*TINY, *longer, f"--objective={objective}", f"--dataset={CORPORA / kind}", f"--out_dir={out}", *more]


def refused(argv, folder, *words, **more):
    """One line, and no file has changed."""
    before = snapshot(folder)
    refuse(argv, folder, *words, **more)
    assert snapshot(folder) == before, f"written: {set(snapshot(folder).items()) ^ set(before.items())}"


def some(table, n):
    """n rows of a table (or all), evenly spread."""
    n = min(n, len(table))
    return [list(table)[i * len(table) // n] for i in range(n)]


def assert_close(one, two):
    """As far as sums in another order agree, and the same lines in the log."""
    a, b = newest(one), newest(two)
    assert a["step"] == b["step"] and [e["step"] for e in log(one)] == [e["step"] for e in log(two)], "steps differ"
    for name, t in a["model"].items():
        assert (t.double() - b["model"][name].double()).abs().max() < 1e-3, f"{name} differs"


KINDS = {  # of runs: how many processes, flags
    "gpt": (1, ["--gate=switch"]),
    "roberta, 2 processes": (2, ["--gate=topk", "--objective=roberta"]),
    "translation": (1, ["--gate=noisytopk", "--objective=translation", f"--dataset={CORPORA}/pairs"]),
    "EvoMoE, 2 processes": (2, ["--gate=dts", "--diversify=0.4", "--gate_args=dense=0.3,hard=0.7"]),
    "dropout, capacity": (1, ["--gate=gshard", "--dropout=0.1", "--capacity_factor=0.7"]),
    "classify": (1, ["--objective=classify"]),
    "StableMoE": (1, ["--gate=stablemoe"]),
    "COMET with permutation": (1, ["--gate=comet", "--permute=0.5"]),
}


def uninterrupted(kind):
    """(out_dir of the whole run, its seconds), made at the first call."""
    folder = CORPORA / f"whole-{kind}".replace(" ", "-")
    if not (folder / "seconds").exists():
        folder.mkdir()
        world, more = KINDS[kind]
        began = time.time()
        run(flags("out", *more), folder, world=world)
        (folder / "seconds").write_text(str(time.time() - began))
    return folder / "out", float((folder / "seconds").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Kills, signals, restarts, other numbers of processes


def go_on(kind, folder):
    """Again, from the newest checkpoint or, if there is none yet, from the start: as a user would."""
    world, more = KINDS[kind]
    found = dist.find(folder / "out")
    return Command(
        ["--out_dir=out", "--init_from=resume", "--timeout=8"] if found else flags("out", *more), folder, world
    )


def kills(n):
    """SIGKILL to one process, at a random moment, three times; then the run goes on to its end."""
    for i in range(n):
        kind = list(KINDS)[i % len(KINDS)]

        def case(folder, kind=kind, rng=random.Random(i)):
            whole, seconds = uninterrupted(kind)
            for _ in range(3):
                command = go_on(kind, folder)
                time.sleep(rng.uniform(0, seconds))
                os.kill(rng.choice(command.processes).pid, signal.SIGKILL)
                status, out, err = command.wait()
                assert "Traceback" not in err, err
            status, out, err = go_on(kind, folder).wait()
            assert not any(status) and not err, f"status {status}, stderr {err[-500:]!r}"
            assert_same_run(whole, folder / "out")

        yield f"{kind}, killed three times", case


def signals(n):
    """Ctrl-C and the like, once, twice at once, different ones: the step is finished, saved, and the run goes on."""
    INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    sent = [[INT], [TERM], [HUP], [INT, INT], [TERM, TERM], [HUP, HUP], [INT, TERM], [HUP, INT, TERM]]
    for i in range(n):
        kind, numbers = list(KINDS)[i * 3 % len(KINDS)], sent[i % len(sent)]

        def case(folder, kind=kind, numbers=numbers, rng=random.Random(i)):
            whole, _ = uninterrupted(kind)
            command = go_on(kind, folder)
            command.until(f"step {rng.randrange(1, 9):5d}/")
            for number in numbers:
                os.kill(rng.choice(command.processes).pid, number)
            status, out, err = command.wait()
            assert not any(status) and not err, f"status {status}, stderr {err[-500:]!r}"
            step = newest(folder / "out")["step"]
            assert f"stopped after step {step};" in out or step == 12, out[-300:]
            status, out, err = go_on(kind, folder).wait()
            assert not any(status) and not err, f"status {status}, stderr {err[-500:]!r}"
            assert_same_run(whole, folder / "out")

        yield f"{kind}, {' '.join(number.name for number in numbers)}", case


def restarts(n):
    """A worker of the real torchrun is killed, twice: all are started again and go on from the newest checkpoint."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=5"]
    for i in range(n):
        kind = ["EvoMoE, 2 processes", "roberta, 2 processes"][i % 2]

        def case(folder, kind=kind, rng=random.Random(i)):
            whole, _ = uninterrupted(kind)
            said, command = folder / "said", [*torchrun, str(ROOT / "train.py"), *flags("out", *KINDS[kind][1])]
            environ = os.environ | {"OMP_NUM_THREADS": "1"}
            with open(said, "w") as f:
                launch = subprocess.Popen(command, stdout=f, stderr=f, cwd=folder, env=environ)
            children, end = Path(f"/proc/{launch.pid}/task/{launch.pid}/children"), time.time() + 120
            for step in (rng.randrange(1, 6), rng.randrange(6, 10)):
                while f"step {step:5d}/" not in said.read_text() and launch.poll() is None and time.time() < end:
                    time.sleep(0.01)
                with contextlib.suppress(ProcessLookupError, IndexError, FileNotFoundError):  # the run was quicker
                    os.kill(int(rng.choice(children.read_text().split())), signal.SIGKILL)
            try:
                assert launch.wait(max(1, end - time.time())) == 0, said.read_text()[-1000:]
            finally:
                launch.kill()
            assert_same_run(whole, folder / "out")

        yield f"{kind}, a worker killed twice", case


def resharding(n):
    """A run begun on some processes and finished on others is the uninterrupted one, but for the order of sums."""
    pairs = [(2, 1), (1, 2), (4, 2), (2, 4), (1, 4), (4, 1), (4, 4), (2, 2), (1, 1)]
    for i in range(n):
        (a, b), more = pairs[i % 9], [["--gate=topk"], ["--gate=gshard", "--ep=1"], ["--n_experts=1"]][i // 9 % 3]

        def case(folder, a=a, b=b, more=more):
            argv = flags("out", "--n_experts=12", *more)
            run(argv, folder, world=a)
            shutil.copytree(folder / "out", folder / "moved")
            (folder / "moved/ckpt_000012.pt").unlink()
            layout = [flag for flag in more if flag.startswith("--ep=")]  # is of a start, not of a run
            out = run(["--out_dir=moved", "--init_from=resume", *layout], folder, world=b)
            assert "loaded moved/ckpt_000009.pt" in out and f"{b} process(es)" in out, out[:300]
            (assert_same_run if a == b else assert_close)(folder / "out", folder / "moved")

        yield f"{a} -> {b} processes, {' '.join(more)}", case


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints


def rewrite(change):
    """Damage to a file's bytes."""
    return lambda path: path.write_bytes(change(bytearray(path.read_bytes())))


def edit(*keys, put=None, drop=False):
    """Another content in an intact file: state[keys[0]][keys[1]]... = put (a function: put(old)), or without it."""

    def damage(path):
        state = torch.load(path)
        at = state
        for key in keys[:-1]:
            at = at[key]
        old = at.pop(keys[-1])
        if not drop:
            at[keys[-1]] = put(old) if callable(put) else put
        torch.save(state, path)

    return damage


def flipped(data):
    data[len(data) // 2] ^= 4
    return data


def folder_instead(path):
    path.unlink()
    path.mkdir()


WTE = "wte.weight"
DAMAGE = {
    "truncated": rewrite(lambda data: data[:-500]),
    "one bit flipped": rewrite(flipped),
    "empty": rewrite(lambda data: b""),
    "a page of zeros": rewrite(lambda data: data[:4096] + bytes(4096) + data[8192:]),
    "text": rewrite(lambda data: b"not a checkpoint\n"),
    "a folder": folder_instead,
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "another program's file": lambda path: torch.save({"epoch": 3, "state_dict": {WTE: torch.zeros(3)}}, path),
    "lacks a parameter": edit("model", WTE, drop=True),
    "lacks moments": edit("optimizer", WTE, drop=True),
    "lacks the step": edit("step", drop=True),
    "empty config": edit("config", put={}),
    "config is a list": edit("config", put=[1]),
    "step is text": edit("step", put="9"),
    "step is negative": edit("step", put=-9),
    "number of domains is text": edit("n_domains", put="2"),
    "layers in words": edit("config", "n_layer", put="two"),
    "an unknown gate": edit("config", "gate", put="nogate"),
    "a weight in whole numbers": edit("model", WTE, put=torch.Tensor.int),
    "a weight is a number": edit("model", WTE, put=3),
    "a sparse weight": edit("model", WTE, put=torch.Tensor.to_sparse),
    "a weight without content": edit("model", WTE, put=lambda t: t.to("meta")),
    "moments of another shape": edit("optimizer", WTE, "exp_avg", put=torch.zeros(3)),
    "moments without a step": edit("optimizer", WTE, "step", drop=True),
    "a NaN in the weights": edit("model", WTE, put=lambda t: t.index_fill(0, torch.tensor([0]), float("nan"))),
    "an infinity in the moments": edit("optimizer", WTE, "exp_avg_sq", put=lambda t: t + float("inf")),
}


def checkpoints(n):
    """A damaged newest checkpoint is passed over with a warning, and the run goes on from the one before it."""
    for name, damage in some(DAMAGE.items(), n):

        def case(folder, name=name, damage=damage):
            whole, _ = uninterrupted("gpt")
            shutil.copytree(whole, folder / "out")
            damage(folder / "out/ckpt_000012.pt")
            resume = [] if name == "a folder" else [["--init_from=resume"]]  # nothing can be saved in its place
            for again in (["--eval_only"], ["--sample=x"], *resume):
                out = run(["--out_dir=out", *again], folder)
                warning, loaded = out.splitlines()[:2]
                assert warning.startswith("warning: ") and "out/ckpt_000012.pt" in warning, out[:300]
                assert loaded.startswith("loaded out/ckpt_000009.pt"), out[:300]
            if resume:
                assert_same_run(whole, folder / "out")

        yield f"{name}: the one before is used", case

        def case(folder, name=name, damage=damage, world=1 + (len(name) % 3 == 0)):
            shutil.copytree(uninterrupted("gpt")[0], folder / "out")
            for path in dist.checkpoints(folder / "out"):
                damage(path)
            refused(["--out_dir=out", "--init_from=resume"], folder, "none of the 2 checkpoints in out", world=world)

        yield f"{name}, both of them: refused", case


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

FLAGS = """
--leraning_rate=1                         did you mean learning_rate?
--learning_rate=nan
--learning_rate=inf
--learning_rate=1e400                     --learning_rate=inf
--learning_rate=0
--learning_rate=fast                      float
--n_layer=2.5                             int
--n_layer=0
--n_layer=-1
--n_layer=99999999999999999999
--n_layer                                 --n_layer needs a value
n_layer=2                                 --name=value
-n_layer=2                                --name=value
--bias=maybe                              bool
--objective=gtp                           did you mean gpt?
--objective=
--gate=swich                              did you mean switch?
--gate=
--gate=switch --gate_args=jiter=1         did you mean jitter?
--gate=switch --gate_args=jitter=high     float
--gate=switch --gate_args=jitter=1e400    finite
--gate=switch --gate_args=jitter=-1       jitter=-1.0 must be from 0
--gate_args=jitter                        jitter
--schedule=linear                         cosine
--drop_order=score_                       did you mean score?
--spawn=masks                             did you mean mask?
--activation=relu                         gelu
--dtype=float16                           float32
--device=gpu                              cpu
--device=cuda:99                          cpu
--gate=switch --k=9                       leave --k out
--gate=topk --k=9                         --n_experts=8
--n_experts=0
--n_experts=99999999999
--moe_every=3                             --n_layer=2
--n_embd=10 --n_head=4                    not divisible
--capacity_factor=-1
--capacity_factor=nan
--capacity_factor=inf
--groups=3                                --batch_size=4
--grad_accum=3                            --batch_size=4
--batch_size=0
--batch_size=-4
--batch_size=99999999999
--block_size=0
--dropout=1
--beta2=1
--label_smoothing=1
--weight_decay=-1
--grad_clip=-1
--seed=-1
--seed=0x10                               int
--warmup=-1
--max_steps=0
--temperature=-1
--temperature=nan
--top_k=-1
--timeout=0
--ep=3                                    ep=3
--ranks_per_node=3                        ranks_per_node=3
--diversify=1
--spawn_ratio=2
--distill=1                               needs a teacher
--shard_by_domain                         several nodes
--gate=expertchoice                       --insist
--dataset=nothing                         stdlib
--dataset=/nowhere                        stdlib
--dataset=/                               /meta.json
--init_from=scrath                        did you mean scratch?
--init_from=/nowhere                      folder of a dense run
--init_from=.                             no checkpoint
--init_from=resume                        no checkpoint (ckpt_*.pt) in out
--eval_only                               no checkpoint (ckpt_*.pt) in out
--sample=x                                no checkpoint (ckpt_*.pt) in out
--distill=1 --teacher=/nowhere            choose from gpt2, or the folder of a dense run
--distill=1 --teacher=resume              choose from gpt2, or the folder of a dense run
--teacher=out                             teaches nothing without --distill
--distill=1 --teacher=.                   no checkpoint
--out_dir=
--out_dir=/dev/null/out                   --out_dir=/dev/null/out (Not a directory): name another folder
--out_dir=/dev/null                       --out_dir=/dev/null (File exists): name another folder
--out_dir=/proc/nowhere                   --out_dir=/proc/nowhere (No such file or directory): name another folder
""".strip().splitlines()


def wrong_flags(n):
    """A flag that cannot be: its line names the flag and value, or what the right column says."""
    for i, line in enumerate(some(FLAGS, n)):
        argv, _, words = line.partition("  ")

        def case(folder, argv=argv.split(), words=words.strip(), world=1 + (i % 8 == 3)):
            refused(flags("out", *argv), folder, words or argv[0], world=world)

        yield argv, case


LIMITS = """
--capacity_factor=1e300
--capacity_factor=1e-320
--grad_clip=1e300
--grad_clip=1e-320
--beta2=0
--dropout=0.99
--label_smoothing=0.99
--diversify=0.5 --spawn_ratio=1
--warmup=99999999999999999999
--eval_every=99999999999999999999
--eval_batches=99999999999999999999
--timeout=1000000
--batch_size=1
--block_size=1
--sample_tokens=0
--temperature=1e-320
--temperature=1e-3
--temperature=1e300
--top_k=1
--top_k=99999999999999999999
--learning_rate=1e-12
--dataset= --max_steps=1 --eval_batches=1
""".strip().splitlines()


def limits(n):
    """Values at the far end of what is allowed: the run ends well, and so does a sample from it."""
    for argv in some(LIMITS, n):

        def case(folder, more=argv.split()):
            run(flags("out", *more), folder)
            run(["--out_dir=out", "--sample=the cat", *more], folder)

        yield argv, case


def config(**fields):
    """A checkpoint whose config holds something else."""

    def damage(path):
        state = torch.load(path)
        state["config"] |= fields
        torch.save(state, path)

    return damage


def huge(path):
    """Finite weights that are of no use."""
    state = torch.load(path)
    state["model"] = {name: t * 1e30 if t.is_floating_point() else t for name, t in state["model"].items()}
    torch.save(state, path)


USES = {  # of a finished run: kind, what is done to its checkpoints, flags, words
    "layers in words": ("gpt", config(n_layer="two"), ["--eval_only"], "n_layer='two'"),
    "half a layer": ("gpt", config(n_layer=2.5), ["--init_from=resume"], "n_layer=2.5"),
    "an objective in a list": ("gpt", config(objective=["gpt"]), ["--sample=x"], "objective=['gpt']"),
    "a dataset in numbers": ("gpt", config(dataset=3), ["--sample=x"], "dataset=3"),
    "an unknown gate": ("gpt", config(gate="nogate"), ["--eval_only"], "--gate=nogate"),
    "another width": ("gpt", config(n_embd=32), ["--eval_only"], "does not fit this model"),
    "too few steps": ("gpt", nothing, ["--init_from=resume", "--max_steps=2"], "--max_steps=2"),
    "another model": ("gpt", nothing, ["--init_from=resume", "--n_embd=32"], "n_embd=32"),
    "huge weights, evaluated": ("gpt", huge, ["--eval_only"], "not finite"),
    "huge weights, sampled": ("gpt", huge, ["--sample=x"], "not finite"),
    "huge weights, sampled by two": ("EvoMoE, 2 processes", huge, ["--sample=x"], "not finite"),
    "huge weights, translated": ("translation", huge, ["--sample=x"], "not finite"),
    "huge weights, BLEU": ("translation", huge, ["--eval_only"], "not finite"),
    "huge weights, classified": ("classify", huge, ["--eval_only"], "not finite"),
    "huge weights, masks": ("roberta, 2 processes", huge, ["--sample=a <mask>"], "not finite"),
    "huge weights, a class": ("classify", huge, ["--sample=the cat"], "not finite"),
    "no text": ("translation", nothing, ["--sample="], '--sample=""'),
    "a long text": ("translation", nothing, ["--sample=" + "x" * 99], "99 tokens"),
    "a mixture as a teacher": ("gpt", nothing, ["--init_from=out", "--out_dir=new"], "dense run"),
}


def uses(n):
    """A checkpoint that cannot be used as it is asked for: refused in one line, and nothing is written."""
    for name, (kind, damage, argv, words) in some(USES.items(), n):

        def case(folder, kind=kind, damage=damage, argv=argv, words=words):
            shutil.copytree(uninterrupted(kind)[0], folder / "out")
            for path in dist.checkpoints(folder / "out"):
                damage(path)
            refused(["--out_dir=out", *argv], folder, words, world=KINDS[kind][0])

        yield f"{name}: {' '.join(argv)[:40]}", case


def ended(n):
    """Resuming a run that had ended changes neither its checkpoint nor its log: nothing is written twice."""
    for kind in some(sorted(KINDS, reverse=True), n):  # a translation first: it ends with BLEU

        def case(folder, kind=kind):
            whole, _ = uninterrupted(kind)
            shutil.copytree(whole, folder / "out")
            for _ in range(2):
                run(["--out_dir=out", "--init_from=resume"], folder, world=KINDS[kind][0])
            assert_same_run(whole, folder / "out")

        yield f"{kind}, resumed twice after its end", case


CORPUS = {  # what is done to the folder, words of the message; names with .src or .tgt are of a translation
    "train.bin": [lambda p: p.unlink(), "is missing"],
    "val.bin": [rewrite(lambda data: b""), "is empty"],
    "train.bin ": [rewrite(lambda data: data[:-10]), "bytes where meta.json says"],
    "train.bin  ": [rewrite(lambda data: data[:14] + b"\xff\xff" + data[16:]), "token id 65,535"],
    "val.bin ": [folder_instead, "bytes where meta.json says"],
    "meta.json": [lambda p: p.unlink(), "is missing"],
    "meta.json ": [rewrite(lambda data: data[:50]), "is damaged"],
    "meta.json  ": [rewrite(lambda data: b"[]"), "is damaged"],
    "meta.json   ": [rewrite(lambda data: b"\xff\xfe"), "is damaged"],
    "meta.json    ": [folder_instead, "cannot read"],
    "train.src.idx": [rewrite(lambda data: data[:-8]), "bytes where meta.json says"],
    "train.tgt.idx": [rewrite(lambda data: data[:8] + data[16:24] + data[8:16] + data[24:]), "does not fit"],
    "train.tgt.bin": [lambda p: p.unlink(), "is missing"],
    "val.src.bin": [rewrite(lambda data: b"\xff\xff" + data[2:]), "token id 65,535"],
}


def nobody():
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


def forbidden(n):
    """Files and folders that may not be read or written: the line names them and says what to do."""
    cases = {
        "out": (0o555, "cannot write to --out_dir=out/run (Permission denied): name another folder"),
        "out/run": (0o555, "cannot write to --out_dir=out/run (Permission denied): name another folder"),
        "data/train.bin": (0, "train.bin (Permission denied): prepare it again"),
        "data/meta.json": (0, "meta.json (Permission denied): prepare it again"),
    }
    for name, (mode, words) in some(cases.items(), n):

        def case(folder, name=name, mode=mode, words=words):
            shutil.copytree(CORPORA / "text", folder / "data")
            (folder / "out").mkdir()
            if name == "out/run":
                (folder / name).mkdir()
            for path in (CORPORA, folder, *folder.rglob("*")):
                path.chmod(0o777)
            (folder / name).chmod(mode)
            refused(flags("out/run", f"--dataset={folder / 'data'}"), folder, words, before=nobody)

        yield f"{name} with mode {mode:o}", case


def corpora(n):
    """Damage to a corpus: the line names the file."""
    for name, (damage, words) in some(CORPUS.items(), n):

        def case(folder, name=name.strip(), damage=damage, words=words):
            objective = "translation" if ".src" in name or ".tgt" in name else "gpt"
            shutil.copytree(CORPORA / ("pairs" if objective == "translation" else "text"), folder / "data")
            damage(folder / "data" / name)
            refused(flags("out", f"--dataset={folder / 'data'}", objective=objective), folder, name, words)

        yield f"{name.strip()} {words}", case


# ---------------------------------------------------------------------------------------------------------------------
# Bad numbers, too little memory, and processes that lose each other


def at_step(step, action, rank="0"):
    """A fault to put in: action(batch) when the batch of a step has been made, on one rank."""

    def before():
        real = objectives.Objective.train_batch

        def train_batch(self, i, *more):
            batch = real(self, i, *more)
            if i == step and os.environ.get("RANK", "0") == rank:
                action(batch)
            return batch

        objectives.Objective.train_batch = train_batch

    return before


def fails(error):
    def action(batch):
        raise error

    return action


def spoiled_head():
    """Logits that are NaN in evaluation only."""
    real = model.Model.head
    model.Model.head = lambda self, *args: real(self, *args) * (1 if self.training else float("nan"))


def spoiled_moments():
    """Adam's moments overflow in the sixth update, the weights do not."""
    real, calls = torch.optim.AdamW.step, []

    def step(self, *args):
        real(self, *args)
        calls.append(1)
        if len(calls) == 6:
            next(iter(self.state.values()))["exp_avg_sq"].view(-1)[0] = float("inf")

    torch.optim.AdamW.step = step


def little_memory():
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**29,) * 2)


WILD = ["--learning_rate=1e30", "--grad_clip=0", "--warmup=0"]
NUMBERS = {  # flags, fault, steps of the checkpoints that are left, words
    "learning rate 1e30": (WILD, nothing, [], "not finite at step 2; there is no checkpoint yet"),
    "learning rate 1e30, saved each step": (
        [*WILD, "--save_every=1"],
        nothing,
        [1],
        "the last good checkpoint is step 1",
    ),
    "learning rate 1e300": (["--learning_rate=1e300", "--save_every=1"], nothing, [], "not finite at step"),
    "weight decay 1e300": (["--weight_decay=1e300"], nothing, [], "not finite at step"),
    "held-out loss NaN": (["--save_every=1"], spoiled_head, [3, 4], "held-out loss is not finite at step 5"),
    "held-out loss NaN at the end": (
        ["--eval_every=0"],
        spoiled_head,
        [6, 9],
        "held-out loss is not finite at step 12",
    ),
    "moments infinite": (["--save_every=2"], spoiled_moments, [2, 4], "moments are not finite at step 6"),
}


def numbers(n):
    """Numbers that are not finite end the run with a line, on one process and on two; no bad checkpoint is written."""
    both = [(world, *row) for world in (1, 2) for row in NUMBERS.items()]
    for world, name, (more, fault, steps, words) in some(both, n):

        def case(folder, more=more, fault=fault, steps=steps, words=words, world=world):
            status, _, err = Command(flags("out", *more), folder, world, fault).wait()
            assert set(status) == {1} and words in err and err.count("\n") == 1, f"status {status}, stderr {err!r}"
            left = dist.checkpoints(folder / "out")
            assert [dist.load_usable(path)["step"] for path in left] == steps, left
            assert all(np.isfinite(v) for e in log(folder / "out") for v in e.values() if isinstance(v, float)), "log"

        yield f"{name}, {world} process(es)", case


ALONE = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
QUIET = socket.create_server(("127.0.0.1", 0))  # takes calls and never answers
GONE, SILENT = "another process has ended", "another process did not answer in time"
stop = lambda batch: os.kill(os.getpid(), signal.SIGSTOP)  # noqa: E731
PEERS = {  # environment or number of processes, fault, flags, {rank: words of its line}; --quick: one GONE, one SILENT
    "an error on rank 1": (2, at_step(4, fails(ValueError("a bad row")), "1"), [], {0: GONE, 1: "a bad row"}),
    "an OSError on rank 0": (2, at_step(4, fails(OSError(5, "I/O", "x.bin"))), [], {0: "x.bin", 1: GONE}),
    "no memory on rank 1": (2, at_step(4, fails(MemoryError()), "1"), [], {0: GONE, 1: "lower --batch_size"}),
    "rank 1 is gone": (2, at_step(4, lambda batch: os._exit(1), "1"), [], {0: GONE}),
    "rank 1 hangs": (2, at_step(4, stop, "1"), ["--timeout=2"], {0: SILENT}),
    "rank 0 hangs": (2, at_step(4, stop), ["--timeout=2"], {1: SILENT}),
    "no master": (ALONE, nothing, ["--timeout=2"], {0: "through MASTER_ADDR:MASTER_PORT=localhost:1"}),
    "an unknown master": (ALONE | {"MASTER_ADDR": "no.such"}, nothing, ["--timeout=2"], {0: "MASTER_PORT=no.such:1"}),
    "rank 1 never comes": (ALONE | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "0"}, nothing, ["--timeout=2"],
                           {0: "cannot join"}),
    "RANK=zero": (ALONE | {"RANK": "zero"}, nothing, [], {0: "RANK=zero is not a number"}),
    "a master that says nothing": (ALONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(QUIET.getsockname()[1])},
                                   nothing, ["--timeout=1"], {0: "whoever listens there says nothing"}),
    "RANK=-1": (ALONE | {"RANK": "-1"}, nothing, [], {0: "RANK=-1 is not a number"}),
    "RANK=2 of 2": (ALONE | {"RANK": "2"}, nothing, [], {0: "RANK=2 must be below WORLD_SIZE=2"}),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "2"}, nothing, [], {0: "start with torchrun"}),
    "flags of the second node": (ALONE | {"LOCAL_RANK": "0"}, nothing, ["--device=cuda:99"], {0: "--device=cuda:99"}),
    "flags of one process": (ALONE, nothing, ["--n_layer=0"], {0: "--n_layer=0"}),
    "--batch_size=8192": (1, little_memory, ["--batch_size=8192", "--n_embd=256"], {0: "lower --batch_size"}),
    "--n_experts=16384": (1, little_memory, ["--n_experts=16384", "--n_embd=64"], {0: "smaller model"}),
    "--n_embd=65536": (1, little_memory, ["--n_embd=65536"], {0: "smaller model"}),
    "no memory in Python": (1, at_step(4, fails(MemoryError())), [], {0: "lower --batch_size"}),
}  # fmt: skip


def peers(n):
    """A process that fails, ends or hangs alone, or cannot meet the others: each that is left says why, in one line."""
    for name, (where, fault, more, words) in some(PEERS.items(), n):

        def case(folder, where=where, fault=fault, more=more, words=words):
            world, env = (where, {}) if isinstance(where, int) else (1, where)
            command = Command(flags("out", *more), folder, world, fault, env)
            for rank in words:
                command.processes[rank].join(30)
            for process in command.processes:
                process.kill()  # the one that hangs
            status, _, err = command.wait()
            assert "Traceback" not in err and all(status[rank] == 1 for rank in words), f"{status} {err[-500:]!r}"
            for rank in range(world):  # torch itself may say more
                lines = [line for line in command.text("stderr", rank).splitlines() if line.startswith("train.py: ")]
                assert len(lines) == (rank in words) and all(words[rank] in line for line in lines), (rank, lines, err)

        yield name, case


# ---------------------------------------------------------------------------------------------------------------------
# The runner

PARTS = {  # the cases, how many of them (the last: with --quick)
    "kills": (kills, 48, 1),
    "signals": (signals, 32, 1),
    "restarts": (restarts, 6, 0),
    "resharding": (resharding, 27, 1),
    "ended": (ended, 8, 1),
    "checkpoints": (checkpoints, 99, 1),
    "flags": (wrong_flags, 999, 10),
    "uses": (uses, 99, 3),
    "limits": (limits, 99, 1),
    "corpora": (corpora, 99, 3),
    "forbidden": (forbidden, 99 * (os.geteuid() == 0), 2 * (os.geteuid() == 0)),  # root only can become somebody else
    "numbers": (numbers, 99, 3),
    "peers": (peers, 99, 4),
}


def campaign(name, quick=False):
    """-> (cases that held, cases), each with a line if it did not."""
    part, n, few = PARTS[name]
    held = total = 0
    for case_name, case in part(few if quick else n):
        total += 1
        folder = Path(tempfile.mkdtemp(dir=CORPORA))
        try:
            case(folder)
            held += 1
        except Exception as error:
            text = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            print(f"    FAILED {name}: {case_name}: {text}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    return held, total


def main(argv):
    torch.set_num_threads(1)
    quick, names = "--quick" in argv, [name for name in argv if name != "--quick"] or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"faults.py: {unknown[0]} is unknown; choose from {', '.join(PARTS)}")
    failed = 0
    try:
        write_corpora(CORPORA)
        for name in names:
            began = time.time()
            held, total = campaign(name, quick)
            failed += total - held
            print(f"{name:12} {held} of {total}   {PARTS[name][0].__doc__}   ({time.time() - began:.0f} s)", flush=True)
    finally:
        shutil.rmtree(CORPORA, ignore_errors=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
