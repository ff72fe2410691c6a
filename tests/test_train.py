"""
train.py: the learning rate, the loop with every gate, numbers that are not finite, gradient accumulation, resumption,
many processes. (Its flags, messages and signals: test_commands.py.)
"""

import copy
import functools
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import dist
import evomoe
import train
from data import objectives
from data.log import describe
from router import gates
from ranks import environment, meeting_point
from runs import (
    LAST, OBJECTIVES, ROOT, assert_close_run, assert_same_run, config, copy_of, flags, log, newest, nothing, run,
    snapshot,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate


def test_inverse_sqrt_schedule():
    cfg = config(schedule="inverse_sqrt", warmup=100, learning_rate=1.0, max_steps=600)
    rate = [train.learning_rate(step, cfg) for step in (0, 49, 99, 399)]
    assert np.allclose(rate, [0.01, 0.5, 1.0, 0.5])


def test_a_short_run_reaches_its_peak_half_way():
    cfg = config(warmup=200, learning_rate=1.0, max_steps=100, min_lr=0.1)
    rate = [train.learning_rate(step, cfg) for step in range(101)]
    assert np.allclose([rate[0], rate[24], rate[49], rate[50], rate[75], rate[100]], [0.02, 0.5, 1, 1, 0.55, 0.1])
    assert train.learning_rate(0, config(warmup=200, learning_rate=1.0, max_steps=1)) == 1


def test_the_seed_of_a_step():
    """Gates on several ranks draw alike; dropout does not."""
    four = [dist.Mesh(rank, 4) for rank in range(4)]
    seeds = lambda **more: {train.step_seed(s, config(**more), mesh) for s in range(5) for mesh in four}
    assert len(seeds()) == 5 and len(seeds(dropout=0.1)) == 20
    assert train.step_seed(3, config(), four[2]) == train.step_seed(3, config(dropout=0.1), dist.Mesh())


# ---------------------------------------------------------------------------------------------------------------------
# One step and one evaluation, by hand


def set_up(corpora, out, *more, objective="gpt"):
    return train.set_up(train.parse(flags(corpora, out, "--n_experts=4", *more, objective=objective), train.Config))


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("gate, args", [("switch", "balance=5"), ("skip", "score=3"), ("deepseekv3", "balance=3"),
                                        ("locmoeplus", "")])  # fmt: skip
def test_one_step_by_hand(corpora, tmp_path, gate, args, objective, accum):
    """The loss is the mean over the batch's targets, plus weights times auxiliary losses and the term of a sampled
    choice, means over the micro-batches; its gradient is clipped; then optimizer and gates are told, once."""
    more = [f"--gate={gate}", f"--gate_args={args}", f"--grad_accum={accum}", "--grad_clip=0.05"]
    if gate == "switch":
        more.append("--capacity_factor=0.7")
    run = set_up(corpora, tmp_path, *more, objective=objective)
    run.model.double()  # so that sums in another order are the same
    model, batch, smoothing = run.model.train(), run.objective.train_batch(0), run.cfg.label_smoothing
    twin, size, n_targets = copy.deepcopy(model), len(batch["y"]) // accum, int((batch["y"] >= 0).sum())
    weights, loss, task = twin.gates()[0].loss_weights, 0.0, 0.0
    torch.manual_seed(5)
    for i in range(accum):
        part = {name: t[i * size : (i + 1) * size] for name, t in batch.items()}
        y = part.pop("y")
        logits, aux = twin(**part, pick=y >= 0)
        nll = F.cross_entropy(logits, y[y >= 0], reduction="none")
        task += nll.sum().item() / n_targets
        loss = loss + F.cross_entropy(logits, y[y >= 0], reduction="sum", label_smoothing=smoothing) / n_targets
        if gate == "skip":  # the advantage: a sequence's mean loss, less that of the others
            mean = torch.stack([nll[(y >= 0).nonzero()[:, 0] == b].mean() for b in range(size)]).detach()
            others = (mean.sum() - mean) / (size - 1)
            loss = loss + weights["log_prob"] * ((mean - others) * aux.pop("log_prob")).mean() / accum
        loss = loss + sum(weights.get(name, 0) * value for name, value in aux.items()) / accum
    loss.backward()
    want = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.named_parameters()}
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    seen, told = {}, []
    run.optimizer.step = lambda: seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
    for moe_gate in model.gates():
        moe_gate.update = lambda: told.append(1)
    torch.manual_seed(5)
    got_task, _, got_norm = train.train_step(run, model, batch)
    assert got_task.item() == pytest.approx(task, rel=1e-5) and got_norm.item() == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.1 and len(told) == len(model.gates()) and seen.keys() == want.keys()
    for name, g in seen.items():
        assert torch.allclose(g, want[name] * (0.05 / norm), rtol=1e-3, atol=1e-7), name


@pytest.mark.parametrize("gate", ["switch", "skip", "locmoeplus", "deepseekv3", "remoe"])
def test_evaluation_by_hand(corpora, tmp_path, gate):
    """Without dropout, noise, capacity; nothing that the gates hold is touched."""
    run = set_up(corpora, tmp_path, f"--gate={gate}", "--dropout=0.5", "--capacity_factor=0.3")
    before = {name: t.clone() for name, t in run.model.named_buffers()}
    run.model.wte.weight.data[ord(" ")] *= 50  # guesses a space at about half of the places: sometimes it is one
    got = train.evaluate(run, "val")
    assert run.model.training and all(torch.equal(t, before[name]) for name, t in run.model.named_buffers())
    run.model.eval()
    seen = []  # of each target: its loss, whether the model is right, its domain
    with torch.no_grad():
        for batch in run.objective.held_out("val"):
            live = batch["y"] >= 0
            logits, y = run.model(batch["x"], batch["domain"])[0][live], batch["y"][live]
            nll = F.cross_entropy(logits, y, reduction="none")
            seen.append(torch.stack([nll, logits.argmax(1) == y, batch["domain"][live]]))
    nll, right, domain = torch.cat(seen, 1).double()
    assert got["loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert got["accuracy"] == pytest.approx(right.mean().item(), rel=1e-5) and right.any()
    for i, name in enumerate(("prose", "code")):
        assert got[f"loss_{name}"] == pytest.approx(nll[domain == i].mean().item(), rel=1e-5)


def test_bits_per_byte_of_an_evaluation(corpora, tmp_path):
    run = set_up(corpora, tmp_path)
    got, split = train.evaluate(run, "val"), run.objective.corpus.meta["splits"]["val"]
    assert got["bpb"] == pytest.approx(got["loss"] / math.log(2) * split["tokens"] / split["bytes"])


def test_what_the_log_says_about_a_step(corpora, tmp_path):
    """An auxiliary loss is its mean over layers and micro-batches; the output layer counts where there is a target."""
    run = set_up(corpora, tmp_path, "--gate=switch", "--grad_accum=2", "--moe_every=1", objective="roberta")
    seen, batch = [], run.objective.train_batch(0)
    for moe in run.model.moes():
        moe.register_forward_hook(lambda module, args, out: seen.append(out[1]["balance"].item()))
    task, told, _ = train.train_step(run, run.model.train(), batch)
    entry, _ = describe(run, 1, batch, task, told)
    assert len(seen) == 4 and entry["balance"] == pytest.approx(sum(seen) / 4)
    share = (batch["y"] >= 0).float().mean().item()
    assert entry["flops_per_token"] == pytest.approx(run.model.flops_per_token(1, 16, share)) and share < 0.5


@pytest.mark.parametrize("accum", [1, 2])
def test_one_step_with_a_teacher_by_hand(corpora, tmp_path, accum):
    """What the teacher has to say is a mean over all positions, or targets, of the batch, however it is cut."""
    more = ["--n_experts=1", f"--grad_accum={accum}", "--grad_clip=0"]
    run = set_up(corpora, tmp_path, *more, objective="roberta")
    run.cfg.distill, run.teacher, twin = 3.0, copy.deepcopy(run.model).eval(), copy.deepcopy(run.model)
    run.teacher.wte.weight.data.mul_(20)  # so that mse and kl are of one size
    batch, seen = run.objective.train_batch(0), {}
    x, pick = batch["x"], batch["y"] >= 0
    with evomoe.watch(twin) as student, evomoe.watch(run.teacher) as teacher:
        loss = F.cross_entropy(twin(x, pick=pick)[0], batch["y"][pick])
        run.teacher(x, pick=pick)
    mse, kl = evomoe.distillation(student, teacher, x.numel(), int(pick.sum())).values()
    (loss + 3 * mse + 3 * kl).backward()
    run.optimizer.step = lambda: seen.update({name: p.grad.clone() for name, p in run.model.named_parameters()})
    _, told, _ = train.train_step(run, run.model.train(), batch)
    assert [told["mse"].item(), told["kl"].item()] == pytest.approx([mse.item(), kl.item()], rel=1e-4)
    for name, p in twin.named_parameters():
        assert torch.allclose(seen[name], p.grad, rtol=1e-3, atol=1e-5), name


def test_a_student_and_its_teacher_are_compared_in_the_same_precision(corpora, tmp_path):
    run = set_up(corpora, tmp_path, "--n_experts=1", "--dtype=bfloat16")
    run.cfg.distill, run.teacher = 1.0, copy.deepcopy(run.model).eval()
    _, told, _ = train.train_step(run, run.model.train(), run.objective.train_batch(0))
    assert told["mse"] == 0 and told["kl"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train_all(rank, world, runs):
    """Child process, one rank of `world`: every run (port, flags, before) in turn; rank 0 calls before()."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    for port, argv, before in runs:
        os.environ.update(environment(rank, world, port))
        if rank == 0:
            before()  # the others wait for rank 0 when they join it
        train.main(argv)


def on_processes(runs):
    """{processes: [(flags, before) of a run]}: one run after the other on 1, on 2 and on 4 processes, all at the same
    time."""
    stores = {world: [meeting_point() for _ in some] for world, some in runs.items()}
    runs = {w: [(store.port, *run) for store, run in zip(stores[w], runs[w])] for w in runs}
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
    meets every objective, one of them on 2 processes (every fourth gate: on 4); 12 turns (`pytest
    tests/test_train.py -k every_gate --turns=12`) are the whole product. Several processes lose what one with as many
    routing groups loses; a run taken up in its middle (with one turn two of the three) is the uninterrupted one bit for
    bit, with what the gate remembers and its schedules."""
    runs, twins, turns, at = {1: [], 2: [], 4: []}, [], request.config.getoption("--turns"), sorted(gates()).index(gate)
    worlds = [1, 2, 4] if turns > 1 else [1, 2 if at % 4 else 4, 1]

    def halfway(one, other):
        """A copy of a run's folder without its last checkpoint."""
        shutil.copytree(one, other, ignore=shutil.ignore_patterns(LAST))

    for turn, o in itertools.product(range(turns), range(3)):
        i = o + at
        objective, world = OBJECTIVES[o], worlds[(i + turn) % 3]
        mode = [["--capacity_factor=0.7"], ["--dtype=bfloat16"]]
        mode = [[], *mode, mode[0] + mode[1]][(i + turn // 3) % 4]
        argv = [f"--gate={gate}", *"--n_experts=4 --insist --save_every=3 --beams=1".split(),
                *"--bleu_sentences=1 --eval_batches=1 --sample_tokens=2".split(), *mode]  # fmt: skip
        name = lambda kind: tmp_path / kind / f"{objective}-{world}-{turn}"
        whole, again, drop = name("whole"), name("again"), ["--dropout=0.1"] * (world == 1)
        runs[world].append((flags(corpora, whole, *argv, *drop, objective=objective), nothing))
        if turns > 1 or (i + turn) % 3 < 2:
            runs[world].append(([f"--out_dir={again}", "--init_from=resume"], functools.partial(halfway, whole, again)))
        if world > 1:
            twins.append((name("twin"), whole, 0.02 if "--dtype=bfloat16" in mode else 1e-4))
            runs[1].append((flags(corpora, name("twin"), *argv, f"--groups={world}", objective=objective), nothing))
    on_processes(runs)
    for run in (tmp_path / "again").iterdir():
        assert newest(run)["step"] == 6
        assert_same_run(tmp_path / "whole" / run.name, run)
    for one, many, tol in twins:
        a, b = ([e["loss"] for e in log(out) if "loss" in e] for out in (one, many))
        assert len(a) == 6 and a == pytest.approx(b, rel=tol), many.name


def test_the_loop_follows_its_schedules(corpora, tmp_path, monkeypatch):
    """Every rate; and --eval_only finds the losses it told, in dts' dense phase that of a batch, in the end of all."""
    rates, real = [], train.train_step
    watched = lambda run, *more: (rates.append([g["lr"] for g in run.optimizer.param_groups]), real(run, *more))[1]
    monkeypatch.setattr(train, "train_step", watched)
    more = "--diversify=0 --gate_args=dense=0.6,hard=0.8 --eval_every=3 --eval_batches=1 --save_every=3".split()
    train.main(flags(corpora, tmp_path, "--gate=dts", "--learning_rate=0.01", *more))
    by_hand = [0.005, 0.01, 0.01, 0.00868198, 0.0055, 0.00231802]  # half a cosine from 0.01 to 0.001, in 4 steps
    assert all(len(r) == 2 and r == pytest.approx([want] * 2) for r, want in zip(rates, by_hand, strict=True))
    told = {e["step"]: e["val_loss"] for e in log(tmp_path) if "val_loss" in e}
    for step, n in ((6, 0), (3, 1)):
        run = train.set_up({"out_dir": str(tmp_path), "eval_only": True})
        assert run.first == step and train.evaluate(run, "val", n)["loss"] == pytest.approx(told[step], rel=1e-5)
        (tmp_path / f"ckpt_{step:06}.pt").unlink()


def test_every_step_draws_anew_and_is_logged_with_its_learning_rate(corpora, tmp_path, monkeypatch):
    seen, real = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: (seen.append(torch.initial_seed()), real(*args))[1])
    train.main(flags(corpora, tmp_path, "--learning_rate=0.01", "--seed=5"))
    assert seen == [5 * 1_000_003 + step for step in range(6)]
    by_hand = [0.005, 0.01, 0.01, 0.00868198, 0.0055, 0.00231802]  # two steps up, then a cosine down to a tenth
    assert [entry["lr"] for entry in log(tmp_path) if "lr" in entry] == pytest.approx(by_hand)


def test_eval_only_takes_the_whole_split(trained, capsys):
    whole = [entry["val_loss"] for entry in log(trained) if "val_loss" in entry][-1]
    train.main([f"--out_dir={trained}", "--eval_only"])
    assert f"val: loss {whole:.4f}" in capsys.readouterr().out


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
    assert dist.find(tmp_path / "c") is None


def test_a_held_out_loss_that_is_not_finite_ends_the_run(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *args: {"loss": float("nan"), "accuracy": 0.0})
    with pytest.raises(ValueError, match="the held-out loss is not finite at step 6"):
        train.main(flags(corpora, tmp_path / "out", "--eval_every=0"))
    assert "NaN" not in (tmp_path / "out" / "log.jsonl").read_text()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_accumulation_equals_one_big_batch(objective, corpora, tmp_path):
    """Also with ragged numbers of targets (masks, padding)."""
    ragged = objectives.OBJECTIVES[objective].kind == "translation"  # padding: a mean of means is another
    knobs = "balance=0" if ragged else "balance=0,z=0.1"
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


@pytest.mark.parametrize("more", [["--gate=dts", "--diversify=0.34"], ["--gate=skip", "--grad_accum=2"]], ids=" ".join)
def test_a_compiled_run_is_the_same_run(more, corpora, tmp_path, monkeypatch):
    """Through a spawn and all phases. Torch's own operators run the captured graphs: no C++ compiler is needed."""
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    train.main(flags(corpora, tmp_path / "plain", "--eval_every=3", *more))
    assert not graphs
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        train.main(flags(corpora, tmp_path / "compiled", "--eval_every=3", "--compile", *more))
    assert_close_run(tmp_path / "plain", tmp_path / "compiled")
    multiplied = sum("linear" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    assert multiplied >= 8, "attention (2 in each layer), the dense layer (2), a gate and the head are captured"


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


@pytest.mark.parametrize("more", [
    ["--grad_accum=2"], ["--capacity_factor=0.7", "--groups=2"], ["--n_experts=1"], ["--dtype=bfloat16", "--bias"],
    ["--bias"],
    ["--gate=dts", "--diversify=0.34", "--gate_args=dense=0.25,hard=0.5"],
    ["--gate=dts", "--diversify=0.67", "--gate_args=dense=0.5,hard=0.75"],
    ["--schedule=inverse_sqrt", "--grad_clip=0", "--moe_every=1"],
], ids=" ".join)  # fmt: skip
def test_resume_is_bit_for_bit(more, corpora, tmp_path):
    resume_equals(corpora, tmp_path, "gpt", *more)


def test_a_corpus_may_move(trained, corpora, tmp_path):
    shutil.copytree(corpora["gpt"], tmp_path / "moved")
    out = copy_of(trained, tmp_path, LAST)
    train.main([f"--out_dir={out}", "--init_from=resume", f"--dataset={tmp_path / 'moved'}"])
    assert_same_run(out, trained)


def test_a_copied_run_goes_on_where_it_lies(trained, tmp_path, capsys):
    before, out = snapshot(trained), copy_of(trained, tmp_path, LAST)
    train.main([f"--out_dir={out}", "--init_from=resume", "--max_steps=7", "--learning_rate=1e-3"])
    assert newest(out)["step"] == 7 and snapshot(trained) == before
    said = capsys.readouterr().out
    assert "from here on --max_steps=7 (before: 6), --learning_rate=0.001 (before: " in said
    assert "learning rate and phases follow the new length" in said
    assert newest(out)["config"]["init_from"] == "scratch"  # what the whole run began with
    train.main([f"--out_dir={out}", "--init_from=resume"])
    assert "from here on" not in capsys.readouterr().out  # nothing new is said about what is as it was


def test_the_active_parameters_are_those_of_the_last_phase(corpora, tmp_path, capsys):
    said = set()
    for argv in (["--gate=hash"], ["--gate=dts", "--diversify=0"], ["--gate=dts", "--diversify=0.5"]):
        train.set_up(train.parse(flags(corpora, tmp_path / "out", *argv), train.Config))
        said.add(re.search(r"([\d.]+ M) active", capsys.readouterr().out)[1])
    assert len(said) == 1


def test_a_spoiled_log_does_not_stop_a_resume(trained, tmp_path):
    out = copy_of(trained, tmp_path, LAST)
    good = (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(b'\n[1]\n{"loss": 1}\n\xff\n' + good + b'{"step": 5, "lo')
    train.main([f"--out_dir={out}", "--init_from=resume"])
    assert_same_run(out, trained)


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


@pytest.mark.parametrize("objective, world, more", [
    ("gpt", 2, ["--gate=switch"]), ("gpt", 4, ["--gate=gshard", "--ep=2"]), 
    ("roberta", 2, ["--gate=topk", "--grad_accum=2"]),
    ("translation", 2, ["--gate=noisytopk"]),
    ("gpt", 4, ["--gate=dts", "--diversify=0.34", "--gate_args=dense=0.25,hard=0.5"]),
    ("gpt", 4, ["--n_experts=1"]), ("gpt", 4, ["--ranks_per_node=2", "--two_level"]),
    ("gpt", 2, ["--ranks_per_node=1", "--groups=2"]),
    ("gpt", 2, ["--gate=topk", "--permute=0.67"]),
], ids=lambda v: " ".join(v) if isinstance(v, list) else str(v))  # fmt: skip
def test_many_processes_equal_one(objective, world, more, corpora, tmp_path):
    one = [f for f in more if not f.startswith(("--ep", "--ranks_per_node", "--two_level"))]
    run(flags(corpora, tmp_path / "many", "--save_every=3", *more, objective=objective), tmp_path, world=world)
    train.main(flags(corpora, tmp_path / "one", "--save_every=3", *one, objective=objective))
    assert_close_run(tmp_path / "one", tmp_path / "many")


def test_importance_of_sharded_data(corpora, tmp_path):
    """Each node reads its own domain, also for the spawn."""
    more = "--n_experts=2 --diversify=0.34 --spawn=importance --expert_hidden=32 --ranks_per_node=1 --shard_by_domain"
    run(flags(corpora, tmp_path / "out", *more.split()), tmp_path, world=2)
    assert newest(tmp_path / "out")["step"] == 6


def test_a_resumed_run_keeps_its_nodes(corpora, tmp_path):
    """Without them a locality loss would be zero. On another number of processes it is told what cannot stay."""
    more = ["--gate=locmoe", "--gate_args=locality=1", "--ranks_per_node=1", "--ep=2", "--save_every=3"]
    run(flags(corpora, tmp_path / "out", *more), tmp_path, world=2)
    again = copy_of(tmp_path / "out", tmp_path, LAST)
    assert "from here on" not in run([f"--out_dir={again}", "--init_from=resume"], tmp_path, world=2)
    assert_same_run(tmp_path / "out", again)
    assert all(e["locality"] > 0.01 for e in log(again) if "loss" in e)
    said = run([f"--out_dir={again}", "--init_from=resume", "--max_steps=7", "--ranks_per_node=2"], tmp_path, world=2)
    assert "--ranks_per_node=2 (before: 1)" in said
    assert newest(again)["config"]["ep"] == 2
    more = ["--n_experts=2", "--ranks_per_node=2", "--ep=2", "--batch_size=4"]
    run(flags(corpora, tmp_path / "two", *more), tmp_path, world=2)
    said = run([f"--out_dir={tmp_path / 'two'}", "--init_from=resume", "--max_steps=7"], tmp_path)
    assert "--ep=0 (before: 2)" in said and "--ranks_per_node=0 (before: 2)" in said


def test_capacity_and_groups(corpora, tmp_path):
    """Two processes drop as one with two groups; not as one with one."""
    more = ["--gate=gshard", "--capacity_factor=0.7"]
    run(flags(corpora, tmp_path / "many", *more), tmp_path, world=2)
    train.main(flags(corpora, tmp_path / "one", *more, "--groups=2"))
    assert_close_run(tmp_path / "one", tmp_path / "many")


def test_distillation_on_two_processes(corpora, tmp_path):
    """mse and kl are shares of global means: logged and learned from as on one process."""
    train.main(flags(corpora, tmp_path / "teacher", "--n_experts=1", objective="roberta"))
    more = [f"--init_from={tmp_path / 'teacher'}", "--n_experts=4", "--gate=hash", "--distill=1", "--spawn=importance"]
    more += ["--expert_hidden=16", "--spawn_ratio=0.5", "--grad_accum=2"]
    run(flags(corpora, tmp_path / "many", *more, objective="roberta"), tmp_path, world=2)
    train.main(flags(corpora, tmp_path / "one", *more, objective="roberta"))
    assert_close_run(tmp_path / "one", tmp_path / "many")
    one, many = ([(e["mse"], e["kl"]) for e in log(tmp_path / out) if "loss" in e] for out in ("one", "many"))
    assert torch.tensor(one).allclose(torch.tensor(many), rtol=1e-4) and min(one[0]) > 0


def test_resume_on_another_number_of_processes(corpora, tmp_path):
    """1 -> 2 -> 4 -> 1 processes, with a number of experts that is not the default."""
    argv = flags(corpora, tmp_path / "whole", "--n_experts=12", "--gate=topk", "--save_every=2", "--max_steps=8")
    train.main(argv)
    out = tmp_path / "out"
    stop = lambda n: [p.unlink() for p in dist.checkpoints(out) if int(p.stem[5:]) > n]
    train.main([*argv, f"--out_dir={out}"])
    for step, world in ((2, 2), (4, 4), (6, 1)):
        if step == 2:  # prune kept 6 and 8: start again from an earlier point
            shutil.rmtree(out)
            run([*argv, f"--out_dir={out}", "--max_steps=8"], tmp_path)
        stop(6)
        run([f"--out_dir={out}", "--init_from=resume"], tmp_path, world=world)
    assert_close_run(tmp_path / "whole", out)


@pytest.mark.parametrize("world", [2, 4])
def test_the_spawn_on_more_processes_than_the_run_began_with(world, corpora, tmp_path, monkeypatch):
    """One process trains the one expert, `world` go on: they spawn (at step 3) and finish as one process would have."""
    evo = ["--gate=dts", "--n_experts=4", "--diversify=0.5", "--gate_args=dense=0.4,hard=0.8", "--save_every=1"]
    real = objectives.LanguageModelling.train_batch
    train.main(flags(corpora, tmp_path / "one", *evo))
    stop = lambda self, step, nodes: 1 / 0 if step == 2 else real(self, step, nodes)
    monkeypatch.setattr(objectives.LanguageModelling, "train_batch", stop)
    with pytest.raises(ZeroDivisionError):
        train.main(flags(corpora, tmp_path / "many", *evo))
    monkeypatch.undo()
    assert newest(tmp_path / "many")["step"] == 2
    run([f"--out_dir={tmp_path / 'many'}", "--init_from=resume"], tmp_path, world=world)
    assert_close_run(tmp_path / "one", tmp_path / "many", tol=1e-4)


def test_evaluation_samples_and_fine_tuning_on_two_ranks(trained, corpora, tmp_path):
    for flag in ("--eval_only", "--sample=the cat"):
        said = [run([f"--out_dir={trained}", flag], tmp_path, world=world).strip().splitlines()[-1] for world in (1, 2)]
        assert said[0] == said[1]
    train.main(flags(corpora, tmp_path / "roberta", "--n_experts=2", objective="roberta"))
    tune = ["--n_experts=2", "--dropout=0", f"--init_from={tmp_path / 'roberta'}"]
    tune = [f for f in flags(corpora, tmp_path / "two", *tune, objective="classify") if "n_layer" not in f]
    run(tune, tmp_path, world=2)
    train.main([*tune, f"--out_dir={tmp_path / 'one'}"])
    assert_close_run(tmp_path / "one", tmp_path / "two")


def test_torchrun_recovers_from_a_killed_worker(trained, corpora, tmp_path):
    """The real torchrun: rank 1 is killed after a checkpoint; the run ends as if nothing had happened."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=3"]
    argv = flags(corpora, tmp_path / "out", "--save_every=10", "--max_steps=100", "--log_every=10")
    with open(tmp_path / "stdout.txt", "w") as f:
        launch = subprocess.Popen(
            [*torchrun, str(ROOT / "train.py"), *argv], stdout=f, stderr=f, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    text = lambda: (tmp_path / "stdout.txt").read_text()
    train.main([*argv, f"--out_dir={tmp_path / 'one'}"])  # while the others import torch
    end = time.time() + 90
    while "step    20/" not in text():
        assert time.time() < end and launch.poll() is None, text()[-3000:]
        time.sleep(0.05)
    children = Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert launch.wait(120) == 0, text()[-3000:]
    assert re.search(r"loaded \S+ckpt_0000[1-9]0.pt", text()), text()[-3000:]
    assert_close_run(tmp_path / "one", tmp_path / "out", tol=1e-3)
