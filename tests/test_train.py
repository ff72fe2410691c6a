"""
train.py as a user meets it: the documented commands, flags, bad input, interruption, resumption, many processes.

A command runs as a fork of this process, which has imported torch already: `python train.py ...` with its own signals,
exit status and streams, without 6 s of imports. Where torchrun itself matters, it is the real one.
"""

import base64
import itertools
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401  AdamW imports it, 3 s: once here instead of once in every child
import torch.multiprocessing as mp

from ranks import run_ranks  # puts the repository on the path, too
import dist
import train
from data.bpe import Tokenizer
from data.files import write_pairs, write_text
from data.objectives import LanguageModelling
from router import gates

ROOT = Path(train.__file__).parent
TINY = ("--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_steps=6 --warmup=2 --eval_every=0 "
        "--eval_batches=2 --log_every=1 --save_every=0 --sample_tokens=5 --bleu_sentences=2 --beams=2 "
        "--device=cpu").split()  # fmt: skip
OBJECTIVES = ["gpt", "roberta", "translation"]


# ---------------------------------------------------------------------------------------------------------------------
# Tiny corpora, and ways to run the script


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """{objective: folder}: two domains of text, and sentence pairs, in bytes."""
    folder, tok = tmp_path_factory.mktemp("data"), Tokenizer("bytes", [bytes([i]) for i in range(256)])
    words = "the cat sat on a mat and saw two dogs run far away from him".split()
    rng = np.random.default_rng(0)
    texts = lambda n: [" ".join(rng.choice(words, 12)) for _ in range(n)]
    split = lambda n: {"prose": texts(n), "code": [t.upper() for t in texts(n)]}
    write_text(str(folder / "text"), tok, {"train": split(40), "val": split(8)}, "a test")
    pairs = lambda n: [(t[:13], t[::-1][:11]) for t in texts(n)]
    write_pairs(
        str(folder / "pairs"), tok, ("en", "ne"), {"train": pairs(80), "val": pairs(12), "test": pairs(9)}, "a test"
    )
    return {
        "gpt": folder / "text",
        "roberta": folder / "text",
        "classify": folder / "text",
        "translation": folder / "pairs",
    }


@pytest.fixture(autouse=True)
def handlers():
    """A run in this process leaves its signal handlers behind."""
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for s, handler in old.items():
        signal.signal(s, handler)


def flags(corpora, out, *more, objective="gpt"):
    return [*TINY, f"--objective={objective}", f"--dataset={corpora[objective]}", f"--out_dir={out}", *more]


def newest(out):
    return dist.load(dist.latest(out))


def log(out, keep=("step", "loss", "norm", "val_loss", "lr", "load")):
    """The log's lines, without what depends on the clock."""
    with open(Path(out) / "log.jsonl") as f:
        return [{k: v for k, v in json.loads(line).items() if k in keep} for line in f]


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


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


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


def snapshot(folder):
    """{path: content} of a folder, to see that nothing was touched."""
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Flags. In this process: nothing here gets as far as training


@pytest.mark.parametrize("argv, parts", [
    (["--leraning_rate=1"], ["--leraning_rate", "did you mean learning_rate?"]),
    (["--learn=1"], ["unknown argument --learn"]),
    (["--objective="], ["--objective=", "gpt"]),
    (["--schedule="], ["--schedule=", "cosine"]),
    (["--moe_every=3"], ["--moe_every=3", "--n_layer=2"]),
    (["--gate=switch", "--k=2"], ["--k=2", "switch"]),
    (["learning_rate=1"], ["--name=value"]),
    (["--n_layer"], ["--n_layer needs a value"]),
    (["--n_layer=2.5"], ["--n_layer=2.5", "int", "default is 4"]),
    (["--learning_rate=fast"], ["--learning_rate=fast", "float"]),
    (["--bias=maybe"], ["--bias=maybe", "bool"]),
    (["--objective=gtp"], ["--objective=gtp", "did you mean gpt?", "classify, gpt, roberta, translation"]),
    (["--gate=swich"], ["--gate=swich", "did you mean switch?", "topk"]),
    (["--gate=switch", "--gate_args=jiter=1"], ["jiter", "did you mean jitter?"]),
    (["--gate=switch", "--gate_args=jitter=high"], ["jitter=high", "float"]),
    (["--drop_order=score_"], ["--drop_order=score_", "did you mean score?"]),
    (["--init_from=scrath"], ["--init_from=scrath", "did you mean scratch?"]),
    (["--gate=topk", "--k=9"], ["--k=9", "--n_experts=8"]),
    (["--k=-1"], ["--k=-1"]),
    (["--capacity_factor=-1.5"], ["--capacity_factor=-1.5", "at least 0"]),
    (["--block_size=0"], ["--block_size=0", "from 1 to"]),
    (["--batch_size=0"], ["--batch_size=0", "from 1 to"]),
    (["--batch_size=4000000"], ["--batch_size=4000000", "from 1 to"]),
    (["--n_experts=99999999999"], ["--n_experts=99999999999", "from 1 to"]),
    (["--timeout=99999999999"], ["--timeout=99999999999", "from 1 to"]),
    (["--gate=dselectk", "--gate_args=gamma=-1"], ["gamma=-1", "above 0"]),
    (["--gate=switch", "--gate_args=balance=nan"], ["balance=nan", "finite"]),
    (["--teacher=/nowhere", "--distill=1"], ["--teacher=/nowhere", "folder of a dense run"]),
    (["--n_experts=0"], ["--n_experts=0"]),
    (["--n_layer=-1"], ["--n_layer=-1"]),
    (["--max_steps=0"], ["--max_steps=0"]),
    (["--n_embd=10", "--n_head=4"], ["--n_embd=10", "--n_head=4", "not divisible"]),
    (["--batch_size=6", "--grad_accum=4"], ["--batch_size=6", "grad_accum"]),
    (["--batch_size=6", "--groups=4"], ["--batch_size=6", "groups"]),
    (["--groups=0"], ["--groups=0"]),
    (["--learning_rate=nan"], ["--learning_rate=nan"]),
    (["--learning_rate=inf"], ["--learning_rate=inf"]),
    (["--dropout=1"], ["--dropout=1"]),
    (["--beta2=1.5"], ["--beta2=1.5"]),
    (["--label_smoothing=2"], ["--label_smoothing=2"]),
    (["--weight_decay=-1"], ["--weight_decay=-1"]),
    (["--grad_clip=nan"], ["--grad_clip=nan"]),
    (["--seed=-1"], ["--seed=-1"]),
    (["--warmup=-5"], ["--warmup=-5"]),
    (["--seed=10000000000000"], ["--seed=10000000000000", "from 0 to"]),
    (["--out_dir="], ["--out_dir="]),
    (["--shard_by_domain"], ["--shard_by_domain", "several nodes"]),
    (["--eval_every=-5"], ["--eval_every=-5"]),
    (["--temperature=-1"], ["--temperature=-1"]),
    (["--n_hidden=-4"], ["--n_hidden=-4"]),
    (["--timeout=0"], ["--timeout=0"]),
    (["--device=gpu"], ["--device=gpu", "cpu"]),
    (["--device=cpu:x"], ["--device=cpu:x"]),
    (["--ep=2"], ["ep=2 must divide the 1 ranks"]),
    (["--ep=-1"], ["--ep=-1"]), (["--device=cuda:99"], ["--device=cuda:99"]),
    (["--ranks_per_node=3"], ["ranks_per_node=3 must divide the 1 ranks"]),
    (["--dataset=nothing"], ["--dataset=nothing", "stdlib"]),
    (["--gate=expertchoice"], ["--gate=expertchoice", "later tokens", "--insist"]),
    (["--gate=gumbelmatching", "--gate_args=capacity_factor=0.5"], ["capacity_factor=0.5"]),
    (["--gate=locmoe", "--n_experts=3"], ["--n_experts=3", "divide --n_embd=16"]),
    (["--gate=hash", "--k=3"], ["--k=3"]),
])  # fmt: skip
def test_a_wrong_flag_is_one_line(argv, parts, corpora, tmp_path):
    if argv[0].startswith("--gate=") and argv[0][7:] not in gates() and "did you mean" not in str(parts):
        pytest.skip(f"no {argv[0]}")
    dataset = [] if argv[0].startswith("--dataset") else flags(corpora, tmp_path / "out")
    with pytest.raises(ValueError) as error:
        train.main([*dataset, *argv])
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()


def test_flags_are_typed_and_documented(capsys):
    given = train.parse(
        ["--learning_rate=1", "--bias", "--n_layer=3", "--compile=false", "--gate_args=a=1,b=2", "--sample="]
    )
    assert given == dict(learning_rate=1.0, bias=True, n_layer=3, compile=False, gate_args="a=1,b=2", sample="")
    assert isinstance(given["learning_rate"], float)
    text = train.help_text()
    for field in train.dataclasses.fields(train.Config):
        assert re.search(rf"^  --{field.name}=.*\S  +\S.*|^  --{field.name}=\S* +\S", text, re.M), (
            f"{field.name} has no comment"
        )


def test_help_and_errors_of_the_script(tmp_path, corpora):
    out = run(["--help"], tmp_path)
    assert "--capacity_factor=0.0" in out and "The mixture" in out
    refuse(["--n_experts=zero"], tmp_path, "--n_experts=zero")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Data


def damaged(corpora, tmp_path, objective, change):
    folder = tmp_path / "data"
    shutil.copytree(corpora[objective], folder)
    change(folder)
    return flags(corpora, tmp_path / "out", objective=objective) + [f"--dataset={folder}"]


def rewrite(name, change):
    def apply(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(change(data))

    return apply


def edit_meta(change):
    def apply(folder):
        meta = json.loads((folder / "meta.json").read_text())
        change(meta)
        (folder / "meta.json").write_text(json.dumps(meta))

    return apply


def beyond(data):
    ids = np.frombuffer(data, np.uint16).copy()
    ids[7] = 999
    return ids.tobytes()


def short(split, tokens):
    """Cut a split to so many tokens, consistently."""

    def apply(folder):
        rewrite(f"{split}.bin", lambda data: data[: 2 * tokens])(folder)
        edit_meta(
            lambda m: m["splits"].__setitem__(
                split, dict(tokens=tokens, bytes=tokens, domains={"all": [0, tokens, tokens]})
            )
        )(folder)

    return apply


BAD_DATA = {
    "train.bin missing": ("gpt", lambda f: (f / "train.bin").unlink(), ["train.bin is missing"]),
    "train.bin empty": ("gpt", rewrite("train.bin", lambda d: b""), ["train.bin is empty"]),
    "train.bin truncated": ("gpt", rewrite("train.bin", lambda d: d[:-10]), ["train.bin has", "bytes where"]),
    "val.bin truncated": ("roberta", rewrite("val.bin", lambda d: d[:-1]), ["val.bin has"]),
    "token beyond the vocabulary": ("gpt", rewrite("train.bin", beyond), ["train.bin holds token id 999", "260"]),
    "training text shorter than a block": ("gpt", short("train", 16), ["train", "longer than one block of 16 tokens"]),
    "held-out text shorter than a block": ("gpt", short("val", 16), ["val", "longer than one block of 16 tokens"]),
    "meta.json missing": ("gpt", lambda f: (f / "meta.json").unlink(), ["meta.json is missing"]),
    "meta.json damaged": ("gpt", rewrite("meta.json", lambda d: d[:50]), ["meta.json is damaged"]),
    "meta.json without a size": ("gpt", edit_meta(lambda m: m["splits"]["val"].pop("bytes")), ["meta.json is damaged"]),
    "domains beyond the text": (
        "gpt",
        edit_meta(lambda m: m["splits"]["val"]["domains"].update(code=[0, 10**6, 1])),
        ["meta.json is damaged"],
    ),
    "another number type": ("gpt", edit_meta(lambda m: m.update(dtype="float33")), ["meta.json is damaged"]),
    "meta.json without domains": ("gpt", edit_meta(lambda m: m["splits"]["train"].pop("domains")), ["meta.json"]),
    "no held-out split": ("gpt", edit_meta(lambda m: m["splits"].pop("val")), ["val"]),
    "train.src.idx truncated": ("translation", rewrite("train.src.idx", lambda d: d[:-8]), ["train.src.idx has"]),
    "train.tgt.bin missing": ("translation", lambda f: (f / "train.tgt.bin").unlink(), ["train.tgt.bin is missing"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line(case, corpora, tmp_path):
    objective, change, parts = BAD_DATA[case]
    argv = damaged(corpora, tmp_path, objective, change)
    with pytest.raises((ValueError, OSError)) as error:
        train.main(argv)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert not list(tmp_path.glob("out/ckpt_*"))


def test_a_corpus_of_the_wrong_kind(corpora, tmp_path):
    for objective, other in (("gpt", "translation"), ("translation", "gpt")):
        with pytest.raises(ValueError, match="kind"):
            train.main([*flags(corpora, tmp_path / "out"), f"--objective={objective}", f"--dataset={corpora[other]}"])


def test_the_smallest_text_that_fits(corpora, tmp_path):
    train.main(damaged(corpora, tmp_path, "gpt", lambda f: (short("train", 17)(f), short("val", 17)(f))))
    assert newest(tmp_path / "out")["step"] == 6


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="session")
def trained(corpora, tmp_path_factory):
    """An out_dir after 6 steps, with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train.main(flags(corpora, out, "--save_every=3"))
    return out


def copy_of(out, tmp_path, *drop):
    new = tmp_path / "copy"
    shutil.copytree(out, new)
    for name in drop:
        (new / name).unlink()
    return new


LAST, FIRST = "ckpt_000006.pt", "ckpt_000003.pt"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "bit-flipped", "empty", "not ours"])
def test_a_damaged_checkpoint(how, trained, tmp_path, capsys):
    """The one before it is used, with a warning; when none is left, one line."""
    change = {"truncated": lambda p: p.write_bytes(p.read_bytes()[:-500]), "bit-flipped": flip,
              "empty": lambda p: p.write_bytes(b""),
              "not ours": lambda p: torch.save({"weights": torch.ones(2)}, p)}[how]  # fmt: skip
    out = copy_of(trained, tmp_path)
    change(out / LAST)
    if how == "not ours":
        (out / FIRST).unlink()
    else:
        train.main([f"--out_dir={out}", "--eval_only"])
        text = capsys.readouterr().out
        assert f"loaded {out / FIRST}" in text and f"{LAST} is damaged" in text
        change(out / FIRST)
    before = snapshot(out)
    for argv in (["--init_from=resume"], ["--eval_only"], ["--sample=x"]):
        with pytest.raises(ValueError) as error:
            train.main([f"--out_dir={out}", *argv])
        assert "\n" not in str(error.value) and str(out) in str(error.value)
    assert snapshot(out) == before


def test_no_checkpoint(tmp_path):
    for argv in (["--init_from=resume"], ["--eval_only"], ["--sample=x"]):
        with pytest.raises(ValueError, match=f"no checkpoint .* in {tmp_path}"):
            train.main([f"--out_dir={tmp_path}", *argv])
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_from_another_config_names_the_fields(trained, tmp_path):
    before = snapshot(trained)
    with pytest.raises(ValueError) as error:
        train.main([f"--out_dir={trained}", "--init_from=resume", "--n_embd=32", "--gate=hash", "--n_layer=2"])
    message = str(error.value)
    assert "n_embd=32 (there: 16)" in message and "gate='hash' (there: 'switch')" in message
    assert "n_layer" not in message and snapshot(trained) == before


def test_another_vocabulary(trained, corpora, tmp_path):
    """The corpus was prepared again, in another way, since."""

    def more_tokens(meta):
        meta["tokenizer"], meta["vocab_size"] = "bpe", 261

    out = copy_of(trained, tmp_path)
    folder = tmp_path / "data"
    shutil.copytree(corpora["gpt"], folder)
    edit_meta(more_tokens)(folder)
    tok = Tokenizer("bpe", [bytes([i]) for i in range(256)] + [b"th"])
    (folder / "vocab.txt").write_text("".join(base64.b64encode(t).decode() + "\n" for t in tok.tokens))
    state = newest(out)
    state["config"]["dataset"] = str(folder)
    dist.save(out / LAST, state)
    with pytest.raises(ValueError, match="another vocabulary"):
        train.main([f"--out_dir={out}", "--eval_only"])
    folder, tok = (
        tmp_path / "other",
        Tokenizer("bpe", [bytes([255 - i]) for i in range(256)]),
    )  # as large, but other tokens
    write_text(
        str(folder), tok, {"train": {"all": ["what else " * 9] * 9}, "val": {"all": ["what else " * 9] * 9}}, "a test"
    )
    with pytest.raises(ValueError, match="another vocabulary"):
        train.main([f"--out_dir={copy_of(trained, tmp_path / 'b')}", "--eval_only", f"--dataset={folder}"])


def test_a_corpus_may_move(trained, corpora, tmp_path):
    shutil.copytree(corpora["gpt"], tmp_path / "moved")
    out = copy_of(trained, tmp_path, LAST)
    train.main([f"--out_dir={out}", "--init_from=resume", f"--dataset={tmp_path / 'moved'}"])
    assert_same_run(out, trained)


def test_a_copied_run_goes_on_where_it_lies(trained, tmp_path):
    before, out = snapshot(trained), copy_of(trained, tmp_path, LAST)
    train.main([f"--out_dir={out}", "--init_from=resume", "--max_steps=7"])
    assert newest(out)["step"] == 7 and snapshot(trained) == before


def test_two_runs_at_once_in_one_folder(corpora, tmp_path):
    out = tmp_path / "out"
    command = Command(flags(corpora, out, "--max_steps=3000"), tmp_path)
    command.until(r"step +3/")
    refuse(flags(corpora, out, "--gate=switch"), tmp_path, "another run is writing to", str(out))
    os.kill(command.pids[0], signal.SIGKILL)
    command.wait()
    run(flags(corpora, out), tmp_path)  # a lock is gone with its process


def test_a_spoiled_log_does_not_stop_a_resume(trained, tmp_path):
    out = copy_of(trained, tmp_path, LAST)
    good = (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(b'\n[1]\n{"loss": 1}\n\xff\n' + good + b'{"step": 5, "lo')
    train.main([f"--out_dir={out}", "--init_from=resume"])
    assert_same_run(out, trained)


def test_flags_that_fit_the_checkpoint_fit(corpora, tmp_path):
    """They are not held against the defaults of a fresh run, whose batches are smaller and heads more."""
    out = tmp_path / "out"
    train.main(
        flags(
            corpora,
            out,
            "--n_embd=15",
            "--n_head=1",
            "--n_layer=1",
            "--moe_every=1",
            "--batch_size=64",
            "--max_steps=2",
        )
    )
    train.main(
        [f"--out_dir={out}", "--init_from=resume", "--grad_accum=32", "--n_embd=15", "--n_layer=1", "--max_steps=3"]
    )
    assert newest(out)["step"] == 3


def test_a_student_needs_no_teacher_to_be_used(corpora, tmp_path, capsys):
    teacher, out = tmp_path / "teacher", tmp_path / "student"
    train.main(flags(corpora, teacher, "--n_experts=1", objective="roberta"))
    train.main(flags(corpora, out, f"--init_from={teacher}", "--n_experts=4", "--distill=1", objective="roberta"))
    shutil.rmtree(teacher)
    train.main([f"--out_dir={out}", "--eval_only"])
    assert "loss" in capsys.readouterr().out


def test_an_earlier_run_is_not_overwritten(trained, corpora):
    before = snapshot(trained)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        train.main(flags(corpora, trained))
    assert snapshot(trained) == before


def test_out_dir_is_not_a_folder(corpora, tmp_path):
    (tmp_path / "file").write_text("precious")
    refuse(flags(corpora, tmp_path / "file"), tmp_path, str(tmp_path / "file"))
    refuse(flags(corpora, tmp_path / "file" / "deeper"), tmp_path, str(tmp_path / "file"))
    refuse(flags(corpora, "/proc/nowhere"), tmp_path, "/proc/nowhere")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_out_dir_is_not_writable(corpora, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refuse(flags(corpora, tmp_path / "locked"), tmp_path, "locked")
    refuse(flags(corpora, tmp_path / "locked" / "out"), tmp_path, "locked")


def test_disk_full_while_saving(trained, corpora, tmp_path):
    """The previous checkpoint survives, and the run can go on from it."""
    out = copy_of(trained, tmp_path, LAST)
    before = (out / FIRST).read_bytes()
    refuse([f"--out_dir={out}", "--init_from=resume"], tmp_path, "cannot save", LAST, limit=50_000)
    assert (out / FIRST).read_bytes() == before and sorted(p.name for p in out.iterdir()) == [FIRST, "log.jsonl"]
    run([f"--out_dir={out}", "--init_from=resume"], tmp_path)
    assert_same_run(out, trained)


def test_disk_full_while_logging(corpora, tmp_path):
    refuse(flags(corpora, tmp_path / "out", "--max_steps=20"), tmp_path, "cannot write", "log.jsonl", limit=4000)


def test_nan_names_the_step_and_the_last_good_checkpoint(corpora, tmp_path):
    with pytest.raises(ValueError, match="not finite at step [1-4]; there is no checkpoint yet"):
        train.main(flags(corpora, tmp_path / "a", "--learning_rate=1e30", "--grad_clip=0", "--warmup=0"))
    with pytest.raises(ValueError, match="not finite at step"):
        train.main(
            flags(
                corpora, tmp_path / "d", "--gate=gumbelmatching", "--learning_rate=1e30", "--grad_clip=0", "--warmup=0"
            )
        )
    out = tmp_path / "b"
    with pytest.raises(
        ValueError, match="loss or its gradient is not finite at step 2; the last good checkpoint is step 1 "
    ):
        train.main(flags(corpora, out, "--learning_rate=1e25", "--grad_clip=0", "--warmup=0", "--save_every=1"))
    assert newest(out)["step"] == 1
    with pytest.raises(ValueError, match="weights are not finite at step 1; there is no checkpoint yet"):
        train.main(
            flags(corpora, tmp_path / "c", "--learning_rate=1e300", "--grad_clip=0", "--warmup=0", "--save_every=1")
        )
    assert dist.latest(tmp_path / "c") is None


# ---------------------------------------------------------------------------------------------------------------------
# Resumption


def resume_equals(corpora, tmp_path, objective, *more):
    """Run to the end; run again from the checkpoint in the middle: the same run."""
    out = tmp_path / "out"
    train.main(flags(corpora, out, "--save_every=3", "--eval_every=2", *more, objective=objective))
    again = copy_of(out, tmp_path, LAST)
    train.main([f"--out_dir={again}", "--init_from=resume"])
    assert newest(again)["step"] == 6
    assert_same_run(out, again)


def train_all(rank, world, runs):
    """Child process, one rank of `world`: every run (port, flags) in turn."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    names = (
        dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="localhost")
        if world > 1
        else {}
    )
    for port, argv in runs:
        os.environ.update({k: str(v) for k, v in names.items()} | {"MASTER_PORT": str(port)})
        train.main(argv)


def on_processes(runs):
    """{processes: [flags of a run]}: one run after the other on 1, on 2 and on 4 processes, all at the same time."""
    runs = {world: [(free_port(), argv) for argv in argvs] for world, argvs in runs.items()}
    children = [mp.get_context("fork").Process(target=train_all, args=(r, w, runs[w])) for w in runs for r in range(w)]
    for child in children:
        child.start()
    for child in children:
        child.join(900)
        child.kill()
        assert child.exitcode == 0


@pytest.mark.parametrize("gate", sorted(gates()))
def test_every_gate_in_the_training_loop(gate, corpora, tmp_path, request):
    """Three objectives x 1, 2 and 4 processes x with and without capacity x float32 and bfloat16. In one turn each gate
    meets each of these once; 12 turns (`pytest tests/test_train.py -k every_gate --turns=12`) are the whole product.
    Several processes lose what one with as many routing groups loses; a run taken up in its middle is the uninterrupted
    one bit for bit, with what the gate remembers and its schedules."""
    whole, again, twins = {1: [], 2: [], 4: []}, {1: [], 2: [], 4: []}, []
    for turn, o in itertools.product(range(request.config.getoption("--turns")), range(3)):
        i = o + sorted(gates()).index(gate)
        objective, world = OBJECTIVES[o], [1, 2, 4][(i + turn) % 3]
        mode = [[], ["--capacity_factor=0.7"], ["--dtype=bfloat16"], ["--capacity_factor=0.7", "--dtype=bfloat16"]][
            (i + turn // 3) % 4
        ]
        argv = [
            f"--gate={gate}",
            "--n_experts=4",
            "--insist",
            "--save_every=3",
            "--beams=1",
            "--bleu_sentences=1",
            "--eval_batches=1",
            *mode,
        ]
        name = lambda kind: tmp_path / kind / f"{objective}-{world}-{turn}"
        whole[world].append(
            flags(corpora, name("whole"), *argv, *["--dropout=0.1"] * (world == 1), objective=objective)
        )
        again[world].append([f"--out_dir={name('again')}", "--init_from=resume"])
        if world > 1:
            twins.append((name("twin"), name("whole"), 0.02 if "--dtype=bfloat16" in mode else 1e-4))
            whole[1].append(flags(corpora, name("twin"), *argv, f"--groups={world}", objective=objective))
    on_processes(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for last in tmp_path.glob(f"again/*/{LAST}"):
        last.unlink()
    on_processes(again)
    for run in (tmp_path / "whole").iterdir():
        assert newest(tmp_path / "again" / run.name)["step"] == 6
        assert_same_run(run, tmp_path / "again" / run.name)
    for one, many, tol in twins:
        a, b = ([e["loss"] for e in log(out) if "loss" in e] for out in (one, many))
        assert len(a) == 6 and a == pytest.approx(b, rel=tol), many.name


@pytest.mark.parametrize("world", [2, 4])
def test_the_spawn_on_more_processes_than_the_run_began_with(world, corpora, tmp_path, monkeypatch):
    """One process trains the one expert, `world` go on: they spawn (at step 3) and finish as one process would have."""
    evo = ["--gate=dts", "--n_experts=4", "--diversify=0.5", "--gate_args=anneal=0.4,hard=0.8", "--save_every=1"]
    real = LanguageModelling.train_batch
    train.main(flags(corpora, tmp_path / "one", *evo))
    stop = lambda self, step, nodes: 1 / 0 if step == 2 else real(self, step, nodes)
    monkeypatch.setattr(LanguageModelling, "train_batch", stop)
    with pytest.raises(ZeroDivisionError):
        train.main(flags(corpora, tmp_path / "many", *evo))
    monkeypatch.undo()
    assert newest(tmp_path / "many")["step"] == 2
    run([f"--out_dir={tmp_path / 'many'}", "--init_from=resume"], tmp_path, world=world)
    assert_close_run(tmp_path / "one", tmp_path / "many", tol=1e-4)


@pytest.mark.parametrize("more", [
    ["--grad_accum=2"], ["--capacity_factor=0.7", "--groups=2"], ["--n_experts=1"], ["--dtype=bfloat16", "--bias"],
    ["--bias"],
    ["--gate=dts", "--diversify=0.34", "--gate_args=anneal=0.25,hard=0.5"],
    ["--gate=dts", "--diversify=0.67", "--gate_args=anneal=0.5,hard=0.75"],
    ["--schedule=inverse_sqrt", "--grad_clip=0", "--moe_every=1"],
], ids=" ".join)  # fmt: skip
def test_resume_is_bit_for_bit(more, corpora, tmp_path):
    resume_equals(corpora, tmp_path, "gpt", *more)


@pytest.mark.parametrize(
    "numbers", [[signal.SIGINT], [signal.SIGTERM] * 2, [signal.SIGHUP], [signal.SIGINT, signal.SIGTERM]]
)
def test_stopped_by_a_signal(numbers, trained, corpora, tmp_path, monkeypatch):
    """Ctrl-C, SIGTERM and SIGHUP, also sent twice at once, as a worker gets them from the terminal and from torchrun:
    the step at hand is finished and saved; the log continues without a gap or a double."""
    real, out = LanguageModelling.train_batch, tmp_path / "out"

    def interrupt(self, step, *more):
        if step == 3:
            for number in numbers:
                os.kill(os.getpid(), number)
        return real(self, step, *more)

    monkeypatch.setattr(LanguageModelling, "train_batch", interrupt)
    train.main(flags(corpora, out, "--save_every=3"))
    assert newest(out)["step"] == 4
    monkeypatch.undo()
    train.main([f"--out_dir={out}", "--init_from=resume"])
    assert same(newest(out)["model"], newest(trained)["model"])
    assert [e["step"] for e in log(out) if "loss" in e] == [1, 2, 3, 4, 5, 6]


def test_stopped_and_killed_as_a_process(corpora, tmp_path):
    """The same from outside: Ctrl-C ends with status 0; kill -9 loses what came after the last checkpoint, no more."""
    settings = ["--max_steps=120", "--save_every=10", "--eval_every=7"]
    again = [f"--out_dir={tmp_path / 'out'}", "--init_from=resume"]
    command = Command(flags(corpora, tmp_path / "out", *settings), tmp_path)
    command.until(r"step +13/")
    os.kill(command.pids[0], signal.SIGINT)
    status, out, err = command.wait()
    first = newest(tmp_path / "out")["step"]
    assert status == 0 and not err and f"stopped after step {first}; continue with --init_from=resume" in out, err
    command = Command(again, tmp_path)
    command.until(rf"step +{first // 10 * 10 + 23}/")
    os.kill(command.pids[0], signal.SIGKILL)
    assert command.wait()[0] == -signal.SIGKILL
    assert first < newest(tmp_path / "out")["step"] < 120
    with open(tmp_path / "out" / "log.jsonl", "a") as f:
        f.write('{"step": 119, "lo')  # torn by the kill
    run(again, tmp_path)
    train.main(flags(corpora, tmp_path / "whole", *settings))
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_accumulation_equals_one_big_batch(objective, corpora, tmp_path):
    """Also with ragged numbers of targets (masks, padding)."""
    knobs = "balance=0" if objective == "translation" else "balance=0,z=0.1"  # a mean of means, where padding is ragged
    for n in (1, 2, 4):
        train.main(
            flags(
                corpora,
                tmp_path / str(n),
                "--gate=topk",
                f"--gate_args={knobs}",
                f"--grad_accum={n}",
                objective=objective,
            )
        )
        assert_close_run(tmp_path / "1", tmp_path / str(n))


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


@pytest.mark.parametrize("objective, world, more", [
    ("gpt", 2, ["--gate=switch"]), ("gpt", 4, ["--gate=gshard", "--ep=2"]), 
    ("roberta", 2, ["--gate=topk", "--grad_accum=2"]),
    ("translation", 2, ["--gate=noisytopk"]),
    ("gpt", 4, ["--gate=dts", "--diversify=0.34", "--gate_args=anneal=0.25,hard=0.5"]),
    ("gpt", 4, ["--n_experts=1"]), ("gpt", 4, ["--ranks_per_node=2", "--two_level"]),
    ("gpt", 2, ["--ranks_per_node=1", "--groups=2"]),
    ("gpt", 2, ["--gate=topk", "--permute=0.67"]),
], ids=lambda v: " ".join(v) if isinstance(v, list) else str(v))  # fmt: skip
def test_many_processes_equal_one(objective, world, more, corpora, tmp_path):
    one = [f for f in more if not f.startswith(("--ep", "--ranks_per_node", "--two_level"))]
    run(flags(corpora, tmp_path / "many", "--save_every=3", *more, objective=objective), tmp_path, world=world)
    train.main(flags(corpora, tmp_path / "one", "--save_every=3", *one, objective=objective))
    assert_close_run(tmp_path / "one", tmp_path / "many")


def test_capacity_and_groups(corpora, tmp_path):
    """Two processes drop as one with two groups; not as one with one."""
    more = ["--gate=gshard", "--capacity_factor=0.7"]
    run(flags(corpora, tmp_path / "many", *more), tmp_path, world=2)
    train.main(flags(corpora, tmp_path / "one", *more, "--groups=2"))
    assert_close_run(tmp_path / "one", tmp_path / "many")


def test_resume_on_another_number_of_processes(corpora, tmp_path):
    """1 -> 2 -> 4 -> 1 processes, with a number of experts that is not the default."""
    argv = flags(corpora, tmp_path / "whole", "--n_experts=12", "--gate=topk", "--save_every=2", "--max_steps=8")
    train.main(argv)
    out = tmp_path / "out"
    stop = lambda n: [p.unlink() for p in dist.checkpoints(out) if int(p.stem[5:]) > n]
    train.main([*argv, f"--out_dir={out}"])
    for step, world in ((2, 2), (4, 4), (6, 0)):
        if step == 2:  # prune kept 6 and 8: start again from an earlier point
            shutil.rmtree(out)
            state = run([*argv, f"--out_dir={out}", "--max_steps=8"], tmp_path)
        stop(6)
        run([f"--out_dir={out}", "--init_from=resume"], tmp_path, world=world)
    assert_close_run(tmp_path / "whole", out)


def fails_on(rank, world, which):
    mesh = dist.make_mesh(rank, world, 1, 1)
    try:
        return mesh.on_all(lambda: open("/nowhere") if rank in which else rank)
    except ValueError as error:
        return str(error)


def test_an_error_on_one_rank_is_everybodys():
    assert run_ranks(2, fails_on, []) == [0, 1]
    assert run_ranks(2, fails_on, [1]) == ["[Errno 2] No such file or directory: '/nowhere' (process 1)"] * 2
    assert run_ranks(2, fails_on, [0, 1]) == ["[Errno 2] No such file or directory: '/nowhere'"] * 2


def test_bad_numbers_of_processes(corpora, tmp_path):
    refuse(flags(corpora, tmp_path / "out", "--batch_size=3"), tmp_path, "--batch_size=3", "processes = 2", world=2)
    refuse(flags(corpora, tmp_path / "out", "--n_experts=3", "--ep=2"), tmp_path, "ep=2", "3 experts", world=2)
    refuse(flags(corpora, tmp_path / "out", "--ranks_per_node=3"), tmp_path, "ranks_per_node=3", world=2)
    refuse(flags(corpora, tmp_path / "out", "--dataset=nothing"), tmp_path, "--dataset=nothing", world=2)
    refuse(flags(corpora, tmp_path / "out", "--init_from=resume"), tmp_path, "no checkpoint", world=2)
    refuse(flags(corpora, "/proc/nowhere"), tmp_path, "/proc/nowhere", world=2)
    refuse(
        flags(corpora, tmp_path / "nan", "--learning_rate=1e30", "--grad_clip=0", "--warmup=0"),
        tmp_path,
        "not finite",
        world=2,
    )
    assert not (tmp_path / "out").exists()


def test_signal_to_one_of_many(corpora, tmp_path):
    argv = flags(corpora, tmp_path / "out", "--max_steps=5000")
    command = Command(argv, tmp_path, world=2)
    command.until(r"step +5/")
    os.kill(command.pids[1], signal.SIGTERM)
    status, out, err = command.wait()
    assert status == 0 and not err and f"stopped after step {newest(tmp_path / 'out')['step']};" in out


def test_torchrun_recovers_from_a_killed_worker(trained, corpora, tmp_path):
    """The real torchrun: rank 1 is killed after a checkpoint; the run ends as if nothing had happened."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=3"]
    argv = flags(corpora, tmp_path / "out", "--save_every=10", "--max_steps=100", "--log_every=10")
    with open(tmp_path / "stdout.txt", "w") as f:
        launch = subprocess.Popen(
            [*torchrun, str(ROOT / "train.py"), *argv], stdout=f, stderr=f, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    text = lambda: (tmp_path / "stdout.txt").read_text()
    end = time.time() + 90
    while "step    20/" not in text():
        assert time.time() < end and launch.poll() is None, text()[-3000:]
        time.sleep(0.05)
    children = Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert launch.wait(120) == 0, text()[-3000:]
    assert re.search(r"loaded \S+ckpt_0000[1-9]0.pt", text()), text()[-3000:]
    train.main([*argv, f"--out_dir={tmp_path / 'one'}"])
    assert_close_run(tmp_path / "one", tmp_path / "out", tol=1e-3)


def test_evaluation_samples_and_fine_tuning_on_two_ranks(trained, corpora, tmp_path):
    for flag in ("--eval_only", "--sample=the cat"):
        said = [run([f"--out_dir={trained}", flag], tmp_path, world=world).strip().splitlines()[-1] for world in (0, 2)]
        assert said[0] == said[1]
    train.main(flags(corpora, tmp_path / "roberta", "--n_experts=2", objective="roberta"))
    tune = ["--n_experts=2", "--dropout=0", f"--init_from={tmp_path / 'roberta'}"]
    tune = [f for f in flags(corpora, tmp_path / "two", *tune, objective="classify") if "n_layer" not in f]
    run(tune, tmp_path, world=2)
    train.main([*tune, f"--out_dir={tmp_path / 'one'}"])
    assert_close_run(tmp_path / "one", tmp_path / "two")


def test_torchrun_does_not_take_over_an_earlier_run(trained, corpora, tmp_path):
    """A restarted worker resumes what its own launch began, never what was there before."""
    out = copy_of(trained, tmp_path)
    before = snapshot(out)
    for count in "01":
        refuse(flags(corpora, out), tmp_path, "earlier run", world=2, env={"TORCHELASTIC_RESTART_COUNT": count})
    assert snapshot(out) == before


# ---------------------------------------------------------------------------------------------------------------------
# The documented commands


def documented():
    """Every command of the README's sh blocks and of the manual at the head of train.py."""
    readme = ROOT / "README.md"
    text = "\n".join(re.findall(r"```sh\n(.*?)```", readme.read_text(), re.S)) if readme.exists() else ""
    text += "\n" + "\n".join(re.findall(r"^    ((?:python|torchrun) .*?)(?:  +.*)?$", train.__doc__, re.M))
    commands = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        commands += [
            part.strip() for part in re.split(r"&&", line.split("  #")[0]) if part.strip() and part.strip()[0] != "#"
        ]
    return list(dict.fromkeys(commands))


ELSEWHERE = (
    r"(pip install|python -m venv|source|git clone|cd|ls|cat|python -m pytest|pytest|python router.py|python data/|"
    r"python tests/|nvidia-smi)\b"
)


@pytest.mark.parametrize("command", [c for c in documented() if re.match(r"(python|torchrun) .*train\.py", c)])
def test_documented_command(command, trained, corpora, tmp_path):
    """As it stands, at a tiny size. A run from scratch gets its own out_dir; what needs a checkpoint gets one."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith("train.py"))
    given = train.parse(words[at + 1 :])
    world = int(next((w.split("=")[1] for w in words[:at] if w.startswith("--nproc_per_node")), 0))
    needs = given.get("init_from") == "resume" or given.get("eval_only") or "sample" in given
    if needs:
        argv = words[at + 1 :] + [f"--out_dir={copy_of(trained, tmp_path)}", "--device=cpu", "--sample_tokens=5"]
        argv += ["--max_steps=8"] if "max_steps" in given else []
    else:
        objective = given.get("objective", "gpt")
        argv = [
            *words[at + 1 :],
            *flags(corpora, tmp_path / "here", "--max_steps=2", objective=objective),
            f"--batch_size={4 * max(1, world)}",
        ]
        argv += ["--compile=false"] if given.get("compile") else []
        for folder in (given.get("init_from", "scratch"), given.get("teacher", "")):
            if folder not in ("scratch", "") and not folder.startswith("gpt2"):  # the folder of a dense run
                trained_for = "roberta" if objective == "classify" else objective
                train.main(flags(corpora, tmp_path / folder, "--n_experts=1", objective=trained_for))
    out = run(argv, tmp_path, world=world)
    assert ("val: loss" if given.get("eval_only") else "\n" if "sample" in given else "a sample:") in out


def test_no_documented_command_is_forgotten():
    for command in documented():
        assert re.match(r"(python|torchrun) .*train\.py", command) or re.match(ELSEWHERE, command), command


def test_fewer_steps_than_the_checkpoint_has_are_refused(trained):
    with pytest.raises(ValueError, match="--max_steps=2: .* is already at step 6"):
        train.main([f"--out_dir={trained}", "--init_from=resume", "--max_steps=2"])


def test_a_held_out_loss_that_is_not_finite_ends_the_run(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *args: {"loss": float("nan"), "accuracy": 0.0})
    with pytest.raises(ValueError, match="the held-out loss is not finite at step 6"):
        train.main(flags(corpora, tmp_path / "out", "--eval_every=0"))
    assert "NaN" not in (tmp_path / "out" / "log.jsonl").read_text()


def test_moments_that_are_not_finite_are_not_saved(tmp_path):
    """Weights can still be finite when Adam's moments are not: such a checkpoint is no good one to resume from."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["exp_avg_sq"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="moments are not finite at step 7; there is no checkpoint yet"):
        dist.save_checkpoint(tmp_path, 7, model, optimizer, dist.Mesh(), config={"a": 1})
    assert dist.latest(tmp_path) is None
    optimizer.state[model.weight]["exp_avg_sq"][0, 0] = 1.0
    dist.save_checkpoint(tmp_path, 7, model, optimizer, dist.Mesh(), config={"a": 1})
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weights are not finite at step 9; the last good checkpoint is step 7"):
        dist.save_checkpoint(tmp_path, 9, model, optimizer, dist.Mesh(), config={"a": 1})
