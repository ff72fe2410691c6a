"""
train.py as a user meets it: flags, bad data, checkpoints that do not fit, full disks, locks, signals, and every command
of the documentation. What goes wrong is said in one line, and nothing is lost by it.
"""

import argparse
import base64
import contextlib
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import dist
import experts
import router
import train
from data import files, objectives
from data.bpe import Tokenizer
from data.files import write_text
from data.log import Log
from data.objectives import LanguageModelling
from router import gates
from runs import (
    FIRST, LAST, ROOT, Command, assert_same_run, copy_of, flags, log, newest, refuse, run, same, snapshot,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Flags


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
    (["--objective=gtp"], ["--objective=gtp", "did you mean gpt?", "gpt, roberta, classify"]),
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
    (["--ep=2"], ["ep=2 must divide the 1 processes"]),
    (["--ep=-1"], ["--ep=-1"]), (["--device=cuda:99"], ["--device=cuda:99"]),
    (["--ranks_per_node=3"], ["ranks_per_node=3 must divide the 1 processes"]),
    (["--dataset=nothing"], ["--dataset=nothing", "stdlib"]),
    (["--gate=expertchoice"], ["--gate=expertchoice", "later tokens", "--insist"]),
    (["--gate=gumbelmatching", "--gate_args=capacity_factor=0.5"], ["capacity_factor=0.5"]),
    (["--gate=locmoe", "--n_experts=3"], ["--n_experts=3", "divide --n_embd=16"]),
    (["--gate=hash", "--k=3"], ["--k=3"]),
    (["--gate=remoe", "--gate_args=start=0"], ["start=0", "from 1e-9 to 1"]),
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
    words = ["--learning_rate=1", "--bias", "--n_layer=3", "--compile=false", "--gate_args=a=1,b=2", "--sample="]
    given = train.parse(words, train.Config)
    assert given == dict(learning_rate=1.0, bias=True, n_layer=3, compile=False, gate_args="a=1,b=2", sample="")
    assert isinstance(given["learning_rate"], float)
    text = train.help_text(train.__doc__, train.Config)
    for field in train.dataclasses.fields(train.Config):
        assert re.search(rf"^  --{field.name}=.*\S  +\S.*|^  --{field.name}=\S* +\S", text, re.M), (
            f"{field.name} has no comment"
        )


def test_help_and_errors_of_the_script(tmp_path, corpora):
    out = run(["--help"], tmp_path)
    assert "--capacity_factor=0.0" in out and "The mixture" in out
    refuse(["--n_experts=zero"], tmp_path, "--n_experts=zero")
    assert not (tmp_path / "out").exists()


def test_bad_numbers_of_processes(corpora, tmp_path):
    refuse(flags(corpora, tmp_path / "out", "--batch_size=3"), tmp_path, "--batch_size=3", "1 * 2 * 1 = 2", world=2)
    refuse(flags(corpora, tmp_path / "out", "--groups=4"), tmp_path, "--batch_size=4", "1 * 2 * 4 = 8", world=2)
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


CONFIGS = {
    "layers in words": lambda c: c | {"n_layer": "two"},
    "an unknown gate": lambda c: c | {"gate": "nosuch"},
    "a number too large": lambda c: c | {"capacity_factor": 10**400},
}


@pytest.mark.parametrize("how", CONFIGS)
def test_a_config_that_no_run_can_have(how, trained, tmp_path, capsys):
    """Two such files of a higher number: the run goes on from the good one, to its end, and deletes nothing usable."""
    out = copy_of(trained, tmp_path, LAST)
    for name in ("ckpt_000025.pt", "ckpt_000030.pt"):
        state = dist.load(out / FIRST)
        state["config"], state["step"] = CONFIGS[how](state["config"]), int(name[5:-3])
        torch.save(state, out / name)
    train.main([f"--out_dir={out}", "--init_from=resume", "--max_steps=5"])
    text = capsys.readouterr().out
    assert f"loaded {out / FIRST}" in text and text.count("is not usable") >= 2
    assert (out / FIRST).exists() and dist.load(out / "ckpt_000005.pt")["step"] == 5


@pytest.mark.parametrize("names, fit", [(["n_experts", "objective"], True), (["dataset", "n_layer"], False)])
def test_a_config_without_some_fields(names, fit, corpora, tmp_path):
    """As if from another version: they get their defaults; where those do not fit the weights, one line says so."""
    train.main(flags(corpora, tmp_path / "dense", "--n_experts=1", "--max_steps=1"))
    state = newest(tmp_path / "dense")
    for name in names:
        del state["config"][name]
    del state["vocabulary"]
    dist.save(tmp_path / "dense" / "ckpt_000001.pt", state)
    train.main(flags(corpora, tmp_path / "new", f"--init_from={tmp_path / 'dense'}", "--max_steps=1"))
    for argv in (["--eval_only"], ["--init_from=resume"]):
        with contextlib.nullcontext() if fit else pytest.raises(ValueError, match="does not fit this model.*missing"):
            train.main([f"--out_dir={tmp_path / 'dense'}", f"--dataset={corpora['gpt']}", *argv])


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
    assert "n_embd=32 (there: 16)" in message and "gate='hash' (there: 'dts')" in message
    assert "n_layer" not in message and "another --out_dir" in message and snapshot(trained) == before


def test_weights_from_another_config_name_the_fields(corpora, tmp_path):
    train.main(flags(corpora, tmp_path / "dense", "--n_experts=1"))
    with pytest.raises(ValueError, match="n_embd=32 .there: 16.*choose another --init_from"):
        train.main(flags(corpora, tmp_path / "new", f"--init_from={tmp_path / 'dense'}", "--n_embd=32"))


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


def test_fewer_steps_than_the_checkpoint_has_are_refused(trained):
    with pytest.raises(ValueError, match="--max_steps=2: .* is already at step 6"):
        train.main([f"--out_dir={trained}", "--init_from=resume", "--max_steps=2"])


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


def test_torchrun_does_not_take_over_an_earlier_run(trained, corpora, tmp_path):
    """A restarted worker resumes what its own launch began, never what was there before."""
    out = copy_of(trained, tmp_path)
    before = snapshot(out)
    for count in "01":
        refuse(flags(corpora, out), tmp_path, "earlier run", world=2, env={"TORCHELASTIC_RESTART_COUNT": count})
    assert snapshot(out) == before


# ---------------------------------------------------------------------------------------------------------------------
# Folders, full disks and locks


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


def disk_of(size):
    """A disk with room for so many bytes per file."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_disk_full_while_saving(trained, corpora, tmp_path):
    """The previous checkpoint survives, and the run can go on from it."""
    out = copy_of(trained, tmp_path, LAST)
    before = (out / FIRST).read_bytes()
    refuse([f"--out_dir={out}", "--init_from=resume"], tmp_path, "cannot save", LAST, before=disk_of(50_000))
    assert (out / FIRST).read_bytes() == before and sorted(p.name for p in out.iterdir()) == [FIRST, "log.jsonl"]
    run([f"--out_dir={out}", "--init_from=resume"], tmp_path)
    assert_same_run(out, trained)


def test_disk_full_while_logging(corpora, tmp_path):
    argv = flags(corpora, tmp_path / "out", "--max_steps=20")
    refuse(argv, tmp_path, "cannot write", "log.jsonl", before=disk_of(4000))


def full_stdout():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def test_where_nobody_hears_the_run_it_saves_and_ends(corpora, trained, tmp_path):
    """A closed terminal, `| head`, a full disk behind stdout."""
    out = tmp_path / "out"
    refuse(flags(corpora, out), tmp_path, "cannot write to stdout (No space", "--init_from=resume", before=full_stdout)
    assert newest(out)["step"] == 1
    run([f"--out_dir={out}", "--init_from=resume"], tmp_path)
    argv = ["--eval_only", f"--out_dir={trained}"]
    refuse(argv, tmp_path, "stdout", before=full_stdout)


def test_other_text_on_one_process(corpora, tmp_path):
    """As many tokens of the same vocabulary, but not the same ones."""

    def other_text():
        if os.environ["RANK"] == "1":
            real = LanguageModelling.batch
            LanguageModelling.batch = lambda *args: {name: t.flip(0) for name, t in real(*args).items()}

    argv = flags(corpora, tmp_path / "out")
    refuse(argv, tmp_path, "--dataset=", "other data for some processes", world=2, before=other_text)
    assert not list(tmp_path.glob("out/ckpt_*"))


def test_closed_streams(corpora, tmp_path):
    def close():
        sys.stdout = sys.stderr = None

    run(flags(corpora, tmp_path / "out"), tmp_path, before=close)
    assert newest(tmp_path / "out")["step"] == 6


def test_a_folder_that_is_moved_away(trained, tmp_path):
    out = copy_of(trained, tmp_path)
    with Log(str(out), dist.Mesh(), 6) as log:
        log({"step": 7})
        out.rename(tmp_path / "moved")
        for _ in range(2):  # there is none, then another one
            with pytest.raises(OSError, match="was moved or replaced"):
                log({"step": 8})
            out.mkdir(exist_ok=True)
    assert not list(out.iterdir())


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path):
    with Log(str(tmp_path), dist.Mesh(), None) as log:
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").mkdir()
        with pytest.raises(OSError, match="cannot write .*Is a directory"):
            log({"step": 1})


def test_a_full_disk_does_not_tear_the_log(tmp_path):
    """What was written of the line that no longer fits is taken back."""

    def write(folder):
        with Log(folder, dist.Mesh(), None) as log:
            log({"step": 1})
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            with pytest.raises(OSError, match="cannot write .*File too large"):
                log({"step": 2})

    child = multiprocessing.get_context("fork").Process(target=write, args=(str(tmp_path),))
    child.start()
    child.join(20)
    assert child.exitcode == 0 and (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


def test_a_checkpoint_that_appears_between_loading_and_training(trained, tmp_path):
    """The run before was still saving: it is not thrown away."""
    out = copy_of(trained, tmp_path)
    before = snapshot(out)
    with pytest.raises(ValueError, match=f"another run has just written .*{LAST}"):
        Log(str(out), dist.Mesh(), 3)
    assert snapshot(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / LAST).write_bytes(b"damaged")
    Log(str(tmp_path / "other"), dist.Mesh(), 3).lock.close()


def test_the_log_of_a_run_without_a_checkpoint_is_kept(corpora, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text("of a run that was killed\n")
    run(flags(corpora, tmp_path / "out"), tmp_path)
    assert (tmp_path / "out" / "log.jsonl.old").read_text() == "of a run that was killed\n"


def test_flags_without_effect_are_named(corpora, tmp_path):
    said = run(flags(corpora, tmp_path / "out", "--n_experts=1", "--k=5", "--shared_hidden=8"), tmp_path)
    assert "note: without effect with --n_experts=1, the dense model: --k, --shared_hidden\n" in said
    assert "without effect" not in run(flags(corpora, tmp_path / "b", "--n_experts=1"), tmp_path)
    own = ["--gate=skip", "--capacity_factor=1", "--drop_order=score", "--permute=0.5"]
    said = run(flags(corpora, tmp_path / "c", *own), tmp_path)
    assert "note: --gate=skip looks at later tokens in training; evaluation does not\n" in said
    assert "note: without effect with --gate=skip: --capacity_factor, --drop_order\n" in said
    said = run(flags(corpora, tmp_path / "d", "--gate=locmoe", "--gate_args=delta=0.1", *own[1:3]), tmp_path)
    assert "--gate=locmoe (drop order: score) looks at later" in said and "--gate=locmoe: --capacity_factor\n" in said


def test_two_runs_at_once_in_one_folder(corpora, tmp_path):
    out = tmp_path / "out"
    command = Command(flags(corpora, out, "--max_steps=3000"), tmp_path)
    command.until(r"step +3/")
    refuse(flags(corpora, out, "--gate=switch"), tmp_path, "another run is writing to", str(out))
    command.kill(signal.SIGKILL)
    command.wait()
    run(flags(corpora, out), tmp_path)  # a lock is gone with its process


# ---------------------------------------------------------------------------------------------------------------------
# Signals


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
    command.kill(signal.SIGINT)
    status, out, err = command.wait()
    first = newest(tmp_path / "out")["step"]
    assert not any(status) and not err and f"stopped after step {first}; continue with --init_from=resume" in out, err
    command = Command(again, tmp_path)
    command.until(rf"step +{first // 10 * 10 + 23}/")
    command.kill(signal.SIGKILL)
    assert command.wait()[0] == [-signal.SIGKILL]
    assert first < newest(tmp_path / "out")["step"] < 120
    with open(tmp_path / "out" / "log.jsonl", "a") as f:
        f.write('{"step": 119, "lo')  # torn by the kill
    run(again, tmp_path)
    train.main(flags(corpora, tmp_path / "whole", *settings))
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_signal_to_one_of_many(corpora, tmp_path):
    argv = flags(corpora, tmp_path / "out", "--max_steps=5000")
    command = Command(argv, tmp_path, world=2)
    command.until(r"step +5/")
    command.kill(signal.SIGTERM, rank=1)
    status, out, err = command.wait()
    assert not any(status) and not err and f"stopped after step {newest(tmp_path / 'out')['step']};" in out


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
    given = train.parse(words[at + 1 :], train.Config)
    world = int(next((w.split("=")[1] for w in words[:at] if w.startswith("--nproc_per_node")), 1))
    needs = given.get("init_from") == "resume" or given.get("eval_only") or "sample" in given
    if needs:
        argv = words[at + 1 :] + [f"--out_dir={copy_of(trained, tmp_path)}", "--device=cpu", "--sample_tokens=5"]
        argv += ["--max_steps=8"] if "max_steps" in given else []
    else:
        objective = given.get("objective", "gpt")
        argv = [
            *words[at + 1 :],
            *flags(corpora, tmp_path / "here", "--max_steps=2", objective=objective),
            f"--batch_size={4 * world}",
        ]
        argv += ["--compile=false"] if given.get("compile") else []
        argv += ["--expert_hidden=16"] if "expert_hidden" in given else []
        for folder in (given.get("init_from", "scratch"), given.get("teacher", "")):
            if folder not in ("scratch", "") and not folder.startswith("gpt2"):  # the folder of a dense run
                trained_for = "roberta" if objective == "classify" else objective
                train.main(flags(corpora, tmp_path / folder, "--n_experts=1", objective=trained_for))
    out = run(argv, tmp_path, world=world)
    assert ("val: loss" if given.get("eval_only") else "\n" if "sample" in given else "a sample:") in out


def test_no_documented_command_is_forgotten():
    for command in documented():
        assert re.match(r"(python|torchrun) .*train\.py", command) or re.match(ELSEWHERE, command), command


def test_the_code_of_the_readme(corpora, tmp_path):
    """The gate, the objective and the corpus that it adds, as they stand there."""
    _, gate, objective, corpus, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    there = dict(vars(router))
    exec(gate, there)
    r = there["Cosine"](8, 4, k=2)(torch.randn(10, 8), None)
    assert ((r.G != 0).sum(1) == 2).all() and list(r.aux) == ["balance"]
    there = dict(vars(objectives))
    exec(objective, there)
    cfg = train.configure(dict(dataset=str(corpora["gpt"]), block_size=16, batch_size=4))
    y = there["SecondHalf"](train.open_objective(cfg).corpus, cfg).train_batch(0)["y"]
    assert (y[:, :8] == -1).all() and (y[:, 8:] >= 0).all()
    for name, text in ("prepare.py", corpus), ("one.txt", "held out"), ("two.txt", "trained on"):
        (tmp_path / name).write_text(text)
    argv = [f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}", "--tokenizer=bytes"]
    subprocess.run(
        [sys.executable, tmp_path / "prepare.py", *argv], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    meta = files.load_meta(tmp_path / "out")
    assert (
        files.load_tokenizer(tmp_path / "out").decode(files.load_split(tmp_path / "out", meta, "val")[:8]) == "held out"
    )
    (tmp_path / "two.txt").unlink()
    there = {"__name__": "mine", "__file__": str(tmp_path / "prepare.py")}
    exec(corpus, there)  # of one file the end is held out
    out = str(tmp_path / "one")
    there["main"](argparse.Namespace(data_dir=str(tmp_path), out_dir=out, tokenizer="bytes", vocab_size=0))
    assert files.load_meta(out)["splits"]["val"]["bytes"] == 1


@pytest.mark.parametrize("k", [1, 2])
def test_the_mixture_of_the_readme(k):
    """Its few lines are the real layer: output, balance loss and all gradients."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    there = dict(torch=torch, nn=torch.nn)
    exec(code, there)
    naive, gate = there["Mixture"](8, 16, 4, k).double(), router.TopK(8, 4, k).double()
    real = experts.MoE(gate, experts.Experts(4, 8, 16).double())
    gate.weight.data = naive.router.weight.data.clone()
    real.experts.w1.data = torch.stack([e[0].weight.data for e in naive.experts])  # (E, H, D)
    real.experts.w2.data = torch.stack([e[2].weight.data.t() for e in naive.experts])
    x = torch.randn(50, 8, dtype=torch.float64)
    y, balance = naive(x)
    want, aux = real(x, torch.zeros(50, dtype=torch.long))
    assert torch.allclose(y, want) and torch.allclose(balance, aux["balance"])
    (y.square().sum() + balance).backward()
    (want.square().sum() + aux["balance"]).backward()
    assert torch.allclose(naive.router.weight.grad, gate.weight.grad)
    for e, expert in enumerate(naive.experts):
        assert torch.allclose(expert[0].weight.grad, real.experts.w1.grad[e])
        assert torch.allclose(expert[2].weight.grad.t(), real.experts.w2.grad[e])


def test_the_gpt2_of_the_readme(corpora, tmp_path):
    pytest.importorskip("transformers")
    gpt2 = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[-1]
    train.main(flags(corpora, tmp_path / "out-dense", "--n_experts=1"))
    subprocess.run([sys.executable, "-c", gpt2], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert (tmp_path / "gpt2-dense" / "config.json").exists()
