"""
Every paper's headline, one command each: what does the idea do when you run it?

    python tests/claims.py switch              run what is missing, print the table, draw the picture, say the verdict
    python tests/claims.py switch --quick      the same at a size where it takes a minute and the numbers mean nothing
    python tests/claims.py --list              the claims there are
    python tests/claims.py evomoe --seeds=5 --workers=4 --flags="--device=cuda --n_embd=256 --max_steps=3000"
    python tests/claims.py phases --log=out/log.jsonl    the phases of an EvoMoE run (python train.py --log_every=1)

A claim is a table of contestants (flags of train.py) and measures (functions of a run's log). Contestants share seeds,
and differences are paired by seed. Time is the CPU time of one thread (on a GPU: the clock), start-up left out. Runs
are kept in --out, one folder each; a second call runs only what is missing or was cut off. Beside them: CLAIM.csv,
CLAIM.svg.

In the flags of a contestant, {NAME} is the folder of the contestant NAME of the same seed, and {A/B} is --max_steps
times the time of A over the time of B: as many steps as fit into the time that A took. A verdict asks whether zero lies
outside of the 95 % interval of the difference in the first measure, paired by seed (Student's t: of three seeds 4.3
standard errors to each side, of five 2.8).
"""

import argparse
import csv
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
QUICK = ("--n_layer=2 --n_embd=32 --block_size=32 --batch_size=8 --max_steps=30 --warmup=10 --learning_rate=4e-3 "
         "--eval_batches=2 --eval_every=10 --bleu_sentences=4 --beams=1")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Measures: functions of a log, a list of dicts


def held_out(name):
    return lambda log: [e[f"val_{name}"] for e in log if f"val_{name}" in e][-1]


def bleu(log):
    return next(value for e in reversed(log) for key, value in e.items() if key.endswith("_bleu"))


def every_step(log):
    return [e for e in log if "loss" in e]


def training(log):
    """One step in ten: what curves and means of the last quarter are made of."""
    return [e for e in every_step(log) if e["step"] == 1 or e["step"] % 10 == 0]


def last_quarter(log):
    lines = training(log)
    return lines[-max(1, len(lines) // 4) :]


def steps(log):
    return every_step(log)[-1]["step"]


def seconds(log):
    """Of the whole run, from the time between its first and its last line: of the CPU, or on a GPU the clock's."""
    import torch

    first, last = every_step(log)[0], every_step(log)[-1]
    clock = "seconds" if torch.cuda.is_available() else "cpu_seconds"
    return (last[clock] - first[clock]) / max(1, last["step"] - first["step"]) * last["step"]


def rows(log):
    """Expert-rows per token and MoE layer, mean over the run."""
    return statistics.mean(e.get("experts_per_token", 1.0) for e in every_step(log))


def at_the_end(name):
    """Mean of the last quarter of the lines."""
    return lambda log: statistics.mean(e[name] for e in last_quarter(log))


def between_nodes(log):
    """Share of the rows that leave their node, in the last quarter of the run."""
    return statistics.mean(far_share(e) for e in last_quarter(log))


def far_share(entry):
    sent = [entry.get(f"tokens_{where}", 0) for where in ("far", "node", "rank")]
    return sent[0] / max(1, sum(sent))


def on_the_wire(log, bits_per_second=1e9):
    """Modelled: ms a step for the rows between two nodes, last quarter of the run. A layer makes four exchanges, and
    both nodes send at once: the mean of the two directions, of which the busier one would decide."""
    sent = statistics.mean(e.get("bytes_far", 0) for e in last_quarter(log))
    return 4 * sent / 2 / (bits_per_second / 8) * 1e3


def last_move(log):
    """The last evaluated step at which more than 1 % of the held-out tokens had another expert than before."""
    return max([e["step"] for e in log if e.get("val_moved", 0) > 0.01], default=0)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: functions of {contestant: [log of each seed]} -> title, {line: [(x, low, mean, high), ...]}, label of x


def band(rows):
    """[(x, y)] of several runs -> [(x, mean - sd, mean, mean + sd)], as far as all of them go."""
    points = []
    for group in zip(*rows):
        ys = [y for _, y in group]
        sd = statistics.stdev(ys) if len(ys) > 1 else 0.0
        points.append((group[0][0], statistics.mean(ys) - sd, statistics.mean(ys), statistics.mean(ys) + sd))
    return points


def smooth(values, n=5):
    return [statistics.mean(values[max(0, i - n) : i + 1]) for i in range(len(values))]


def over_steps(title, value, paired=True, timed=False):
    """A picture: value(log entry) over the steps, smoothed, mean and band over seeds, a line for each contestant.
    paired: less the first contestant's of the same seed, so that what all see in common is gone. timed: over the CPU
    time instead, at the mean pace of a contestant's runs. What is taken away is then what the first contestant has at
    the same step, of the same batch, plus how far it falls between that step and the one it has reached by that time
    (a mean over a third of the run so far, without the noise of single batches)."""

    def draw(logs):
        first, lines, at = next(iter(logs)), {}, {}
        curve = lambda log: np.array(smooth([value(e) for e in training(log)]))
        for contestant, runs in logs.items():
            if "time" in contestant or "labels" in contestant:
                continue
            pace = statistics.mean(seconds(log) / steps(log) for log in runs) if timed else 1
            at[contestant] = [pace * e["step"] for e in training(runs[0])]
            x = [t for t in at[contestant][: len(at[first])] if t <= at[first][-1]]
            rows = []
            for log, zero in zip(runs, logs[first]):
                n, y = len(x), curve(log)[: len(x)]
                if paired:
                    c = curve(zero)
                    slow = np.array([c[i - i // 3 : i + 1].mean() for i in range(len(c))])
                    y = y - c[:n] + slow[:n] - np.interp(x, at[first], slow)
                rows.append(list(zip(x, y)))
            lines[contestant] = band(rows)
        less = f" less that of {first}" if paired else ""
        return f"{title}{less}, mean and band over seeds", lines, "CPU seconds" if timed else "steps"

    return draw


def over_budget(logs):
    """A picture: the held-out loss over the share of the dense budget, of contestants called "NAME SHARE %"."""
    lines = {}
    for contestant, runs in logs.items():
        if match := re.fullmatch(r"(.+) (\d+) %", contestant):
            ends = [[(int(match[2]), held_out("loss")(log))] for log in runs]
            lines.setdefault(match[1], []).extend(band(ends))
    return "held-out loss, mean and band over seeds", lines, "% of the dense model's steps"


# ---------------------------------------------------------------------------------------------------------------------
# The claims

LOSS = {"held-out loss": held_out("loss")}
COST = {"seconds": seconds, "rows per token": rows}


@dataclass
class Claim:
    headline: str  # what the paper says
    contestants: dict  # {name: flags}
    says: tuple = ()  # (better, worse): the order that the headline predicts
    common: str = ""  # flags of all
    measures: dict = field(default_factory=lambda: LOSS | COST)
    ranks: int = 1
    higher: bool = False  # is more of the first measure better?
    quick: str = ""  # flags on top of QUICK
    patch: str = ""  # a function below that changes train.py before the run
    picture: Callable = over_steps("training loss", lambda e: e["loss"])
    setup: Callable | None = None  # makes what the contestants' flags name {LIKE_THIS}: -> {name: path}


METHODS = {
    "dense": "--n_experts=1",
    "switch": "--gate=switch",
    "hash": "--gate=hash",
    "base": "--gate=base",
    "stablemoe": "--gate=stablemoe",
    "evomoe": "--gate=dts",
    "evomoe_id": "--gate=dts --gate_args=reads=id",
}
CAUSAL = ("soft topk switch gshard noisytopk topp deepseekv3 dts remoe dselectk comet hash randomrouted stablemoe base "
          "locmoe locmoeplus skip gumbelmatching")  # fmt: skip


def few_labels(out, sizes=(50, 200, 1000), T=64):
    """Corpora for classify with few labelled passages of T tokens, the held-out part whole: -> {"labels50": folder}."""
    from data import files

    files.prepare_missing("stdlib/packages")
    source, folders = files.corpus_folder("stdlib/packages"), {}
    meta = files.load_meta(source)
    tokens = files.load_split(source, meta, "train")
    for n in sizes:
        folder = folders[f"labels{n}"] = os.path.join(out, f"labels{n}")
        shutil.copytree(source, folder, dirs_exist_ok=True)
        share = max(T + 2, n * T // len(meta["splits"]["train"]["domains"]))
        parts = {name: tokens[a : min(b, a + share)] for name, (a, b, _) in meta["splits"]["train"]["domains"].items()}
        ends = np.cumsum([0, *map(len, parts.values())]).tolist()
        domains = {name: [a, b, 3 * (b - a)] for name, a, b in zip(parts, ends, ends[1:])}
        small = {"tokens": ends[-1], "bytes": 3 * ends[-1], "domains": domains}
        np.concatenate(list(parts.values())).tofile(os.path.join(folder, "train.bin"))
        with open(os.path.join(folder, "meta.json"), "w") as f:
            json.dump(meta | {"splits": meta["splits"] | {"train": small}}, f)
    return folders


def at_equal_time(methods):
    return methods | {
        f"{m}, dense's time": f"{flags} --max_steps={{dense/{m}}}" for m, flags in methods.items() if m != "dense"
    }


def budgets(dense_steps=600):
    """From a trained dense model (sunk cost; "dense on" stays dense) and from scratch, with shares of its budget."""
    table = {"dense": f"--n_experts=1 --max_steps={dense_steps}"}
    for percent in (10, 25, 50, 100, 200):
        n = f"--max_steps={dense_steps * percent // 100}"
        table |= {f"evomoe {percent} %": f"--gate=dts --init_from={{dense}} {n}",
                  f"copies {percent} %": f"--gate=switch --spawn=copy --init_from={{dense}} {n}",
                  f"dense on {percent} %": f"--n_experts=1 --init_from={{dense}} {n}",
                  f"switch {percent} %": f"--gate=switch {n}", f"hash {percent} %": f"--gate=hash {n}"}  # fmt: skip
    return table


STUDENT = (
    "--init_from={teacher} --n_experts=4 --gate=hash --distill=1 --expert_hidden=128 --spawn_ratio=0.67 --max_steps=300"
)
LOCAL = "--gate=locmoe --gate_args=locality="
AFTER_SPAWN = "--gate=switch --diversify=0.05"
CLAIMS = {
    "evomoe": Claim(
        "EvoMoE ends at a lower loss than Switch, BASE, Hash and StableMoE at equal steps (GPT)",
        at_equal_time(METHODS), ("evomoe", "switch")),
    "evomoe_roberta": Claim(
        "the same for masked language modelling", at_equal_time(METHODS | {
            "switch after the spawn": AFTER_SPAWN, "hash after the spawn": "--gate=hash --diversify=0.05"}),
        ("evomoe", "switch"), "--objective=roberta"),
    "heads": Claim(
        "the same for masked language modelling with heads that start at random",
        at_equal_time(METHODS), ("evomoe", "switch"), "--objective=roberta --max_steps=2000", patch="random_heads"),
    "evomoe_translation": Claim(
        "the same for translation", at_equal_time(METHODS), ("evomoe", "switch"), "--objective=translation",
        LOSS | {"BLEU": bleu} | COST),
    "gates": Claim(
        "every gate in the same run; a fixed table rivals learned routing (Hash)",
        {"dense": METHODS["dense"]} | {gate: f"--gate={gate}" for gate in CAUSAL.split()}, ("hash", "switch")),
    "parts": Claim(
        "both phases of EvoMoE matter: one expert first, and dense to sparse",
        {"switch": "--gate=switch", "switch after the spawn": AFTER_SPAWN,
         "dts from the start": "--gate=dts --diversify=0", "evomoe": METHODS["evomoe"],
         "evomoe, the paper's schedule": "--gate=dts --diversify=0.1 --gate_args=tau_max=2,tau_min=0.3,noise=constant,"
                                     "tighten=0.001,dense=0.1667,hard=0.3333"},
        ("evomoe", "dts from the start")),
    "map": Claim(
        "one expert first pays where experts are many and each sees few tokens",
        {f"{m} E {E}{f', {n} steps' * (n < 600)}": f"{flags} --n_experts={E} --max_steps={n}"
         for n in (600, 300) for E in (8, 32)
         for m, flags in (("switch", METHODS["switch"]), ("evomoe", METHODS["evomoe"]),
                          ("switch after the spawn", AFTER_SPAWN))},
        ("switch after the spawn E 32, 300 steps", "switch E 32, 300 steps")),
    "howmany": Claim(
        "dense to sparse finds how many experts a token needs, better than its rivals do",
        {"evomoe": METHODS["evomoe"], "topp": "--gate=topp", "remoe": "--gate=remoe"}, ("evomoe", "remoe")),
    "crossover": Claim(
        "starting from a trained dense model pays until about 100 to 120 % of its budget (sparse upcycling)",
        budgets(), ("copies 100 %", "switch 100 %"), quick="--max_steps=10", picture=over_budget),
    "switch": Claim(
        "more experts, lower loss at equal FLOPs: the dense model's loss is reached in a fraction of the steps",
        {"dense": "--n_experts=1"} | {f"E {E}": f"--n_experts={E} --gate=switch" for E in (2, 4, 8, 16, 32)}
        | {f"E 8, {n} steps": f"--n_experts=8 --gate=switch --max_steps={n}" for n in (300, 400, 500)},
        ("E 32", "dense")),
    "fine": Claim(
        "more and finer experts, one of them shared, are better at the same active size (DeepSeekMoE)",
        {"switch": "--gate=switch", "2 of 16": "--gate=topk --n_experts=16 --expert_hidden=256",
         "1 of 16, one shared": "--gate=topk --k=1 --n_experts=16 --expert_hidden=256 --shared_hidden=256"},
        ("1 of 16, one shared", "switch")),
    "capacity": Claim(
        "hardly more slots than the fair share are enough: capacity factors of 1 to 1.25 (Switch, table 1)",
        {"dropless": "--gate=switch"}
        | {f"factor {c}": f"--gate=switch --capacity_factor={c}" for c in (2, 1.25, 1, 0.75)},
        ("factor 1.25", "dropless"), "",
        LOSS | {"dropped": lambda log: statistics.mean(e.get("dropped", 0.0) for e in every_step(log)),
                "dropped at the end": at_the_end("dropped")} | COST),
    "pays": Claim(
        "a mixture learns more than the dense model in the same time",
        at_equal_time({m: METHODS[m] for m in ("dense", "switch", "hash", "evomoe")}),
        ("switch, dense's time", "dense"), picture=over_steps("training loss", lambda e: e["loss"], timed=True)),
    "locmoe": Claim(
        "a locality loss keeps tokens on their node without loss of quality",
        {"switch": "--gate=switch", "hash": "--gate=hash", "locmoe 0.01": LOCAL + "0.01", "locmoe 0.1": LOCAL + "0.1",
         "locmoe 1": LOCAL + "1", "randomrouted": "--gate=randomrouted",
         "locmoe 1, mixed data": LOCAL + "1 --shard_by_domain=false"},
        ("locmoe 0.01", "switch"), "--ranks_per_node=1 --shard_by_domain",
        {"between nodes": between_nodes} | LOSS | COST | {"ms a step between nodes at 1 Gbit/s": on_the_wire}, ranks=2,
        picture=over_steps("share of the rows that leave their node", far_share, paired=False)),
    "locmoeplus": Claim(
        "experts need ever fewer tokens, at the same loss",
        {"floor 1 (never fewer)": "--gate=locmoeplus --gate_args=floor=1", "floor 0.5": "--gate=locmoeplus "
                                                                                        "--gate_args=floor=0.5",
         "floor 0.25": "--gate=locmoeplus", "floor 0.1": "--gate=locmoeplus --gate_args=floor=0.1",
         "locmoe, capacity 1.1": "--gate=locmoe --capacity_factor=1.1"},
        ("floor 0.25", "floor 1 (never fewer)"), "",
        LOSS | {"rows kept at the end": at_the_end("experts_per_token"), "dropped": at_the_end("dropped")} | COST),
    "stability": Claim(
        "StableMoE's routing stops changing after its first stage; Switch's and BASE's go on to the end",
        {m: METHODS[m] for m in ("stablemoe", "switch", "base", "hash")}, ("stablemoe", "switch"), "--eval_every=50",
        {"last step with moves": last_move, "moved at the end": held_out("moved")} | LOSS, patch="record_moves"),
    "moebert": Claim(
        "experts cut from a dense model by importance beat a random cut, before and after distillation",
        {"teacher": "--n_experts=1", "importance": STUDENT + " --spawn=importance",
         "random": STUDENT + " --spawn=importance --label_smoothing=0"},
        ("importance", "random"), "--objective=roberta --moe_every=1",
        LOSS | {"loss of the first step": lambda log: training(log)[0]["loss"]} | COST,
        quick="--n_hidden=128 --expert_hidden=64 --spawn_ratio=0.75", patch="random_cut"),
    "pretraining": Claim(
        "pre-training pays where labels are few",
        {"roberta": "--objective=roberta --max_steps=1000 --learning_rate=4e-3 --warmup=200 --dropout=0"}
        | {f"{how}, {n} labels": f"--objective=classify --dataset={{labels{n}}} --max_steps=150 {flags}"
           for n in (50, 200, 1000) for how, flags in (("tuned", "--init_from={roberta}"), ("scratch", ""))},
        ("tuned, 200 labels", "scratch, 200 labels"), "--eval_every=25",
        {"best accuracy": lambda log: max(e["val_accuracy"] for e in log if "val_accuracy" in e),
         "last accuracy": held_out("accuracy")} | LOSS, higher=True, setup=few_labels),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Patches: what a claim changes in train.py, in the process of the run


def record_moves(train):
    """Every evaluation also tells which share of a fixed batch of held-out tokens has another expert than before."""
    import torch

    real, before = train.evaluate, []

    def evaluate(run, split, eval_batches=0):
        result, seen = real(run, split, eval_batches), []
        hooks = [g.register_forward_hook(lambda gate, args, r: seen.append(r.G.argmax(1))) for g in run.model.gates()]
        (batch,) = train.batches.micro_batches(next(run.objective.held_out(split, 1)), 1, run.mesh)
        with train.evaluating(run.model), run.autocast:
            train.task_loss(run.model, batch)
        for hook in hooks:
            hook.remove()
        now = torch.stack(seen)
        result["moved"] = float((now != before[-1]).float().mean()) if before else 1.0
        before.append(now)
        return result

    train.evaluate = evaluate


def random_heads(train):
    """RoBERTa's heads start at random, like all others."""
    import model

    model.RoBERTa.look_around = lambda roberta: None


def random_cut(train):
    """The contestant called random: neurons are dealt out in random order instead of by importance."""
    import torch

    real = train.evomoe.importance

    def importance(dense, losses):
        return {name: torch.rand_like(scores) for name, scores in real(dense, losses).items()}

    if os.environ.get("CONTESTANT") == "random":
        train.evomoe.importance = importance


def patched(name, argv):
    """Run train.py's main with a patch."""
    import train

    globals()[name](train)
    train.main(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def read_log(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def finished(folder, argv):
    """The log of a run that came to its end, or None. SystemExit if it had other flags than argv, a string."""
    try:
        with open(os.path.join(folder, "done")) as f:
            before = f.read()
        log = read_log(os.path.join(folder, "log.jsonl"))
    except (OSError, ValueError):
        return None
    if before != argv:
        raise SystemExit(
            f"claims: {folder} was made with other flags ({before.strip()}): name another --out, or delete it"
        )
    return log


def launch(argv, contestant, patch, ranks, threads):
    """One run of train.py in a process of its own. SystemExit with its last lines if it fails."""
    start = (
        ["-c", f"import claims; claims.patched({patch!r}, {argv!r})"]
        if patch
        else [os.path.join(ROOT, "train.py"), *argv]
    )
    if ranks > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *start]
    path = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, "CONTESTANT": contestant}
    p = subprocess.run([sys.executable, *start], env=env, capture_output=True, text=True, cwd=ROOT)
    if p.returncode:
        raise SystemExit(f"claims: train.py {' '.join(argv)}\n{p.stderr[-2000:].strip()}")


def chosen(name, claim, methods):
    """The contestants that --methods asks for. SystemExit, one line, for none, or one that needs a run of another."""
    there = claim.contestants
    try:
        some = {c: there[c] for c in there if not methods or any(re.fullmatch(m, c) for m in methods.split(";"))}
    except re.error as error:
        raise SystemExit(f"claims: --methods={methods} is no regular expression: {error}") from None
    if not some:
        raise SystemExit(f"claims: --methods={methods} names no contestant of {name}; there are: {'; '.join(there)}")
    for contestant, flags in some.items():
        for needed in re.findall(r"[^{}/]+(?=[/}])", flags):  # of {NAME} and {A/B}
            if needed in there and needed not in some:
                raise SystemExit(f"claims: {name}'s {contestant!r} needs {needed!r}: add it to --methods")
    return some


def one_seed(name, claim, seed, a, places):
    """All contestants of one seed, in order. -> {contestant: log}."""
    import dist
    from data import files

    logs, places = {}, dict(places)
    for contestant, flags in claim.contestants.items():
        folder = places[contestant] = os.path.join(
            a.out, f"{name}-{contestant}-{seed}".replace(" ", "_").replace("%", "")
        )
        argv = f"{claim.common} {flags} {QUICK + ' ' + claim.quick if a.quick else ''} {a.flags} --seed={seed}"
        if ratio := re.search(r"--max_steps=\{([^/}]+)/([^}]+)\}", argv):
            n = round(steps(logs[ratio[2]]) * seconds(logs[ratio[1]]) / seconds(logs[ratio[2]]))
            argv = argv.replace(ratio[0], "") + f" --max_steps={max(1, n)}"
        flags = " ".join(argv.split())
        argv = [re.sub(r"\{(\w+)\}", lambda m: places[m[1]], arg) for arg in argv.split()]
        if (log := finished(folder, flags)) is None:
            os.makedirs(folder, exist_ok=True)
            with files.at_work(folder) as mine:
                if mine is False:
                    raise SystemExit(f"claims: another run is writing to {folder}: wait for it, or name another --out")
                shutil.rmtree(folder, ignore_errors=True)
            argv += [f"--out_dir={folder}", "--log_every=1", "--save_every=0", "--sample_tokens=1"]
            argv += [] if "--eval_every" in " ".join(argv) else ["--eval_every=0"]
            launch(argv, contestant, claim.patch, claim.ranks, a.threads)
            state = dist.find(folder)[1]
            if state["step"] < state["config"]["max_steps"]:  # Ctrl-C reaches it too, and it ends half-way in peace
                raise SystemExit(
                    f"claims: {folder} was stopped at step {state['step']}; the same command begins it again"
                )
            log = read_log(os.path.join(folder, "log.jsonl"))
            with open(os.path.join(folder, "done"), "w") as f:
                f.write(flags)
            print(f"{name}: {contestant}, seed {seed}: {claim_line(claim, log)}", flush=True)
        logs[contestant] = log
    return logs


def claim_line(claim, log):
    return ", ".join(f"{title} {f(log):.4g}" for title, f in claim.measures.items())


def run_claim(name, claim, a):
    """-> {contestant: [log of each seed]}."""
    claim = replace(claim, contestants=chosen(name, claim, a.methods))
    places = claim.setup(a.out) if claim.setup else {}
    with ThreadPoolExecutor(a.workers) as pool:
        seeds = list(pool.map(lambda seed: one_seed(name, claim, seed, a, places), range(a.first, a.first + a.seeds)))
    return {contestant: [logs[contestant] for logs in seeds] for contestant in seeds[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Table, verdict, picture


def spread(values):
    """mean ± sample standard deviation."""
    sd = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{sd}"


def tell(name, claim, logs, out):
    """Print the table and the verdict of {contestant: [log of each seed]}, write the CSV, draw the picture."""
    titles = list(claim.measures)
    values = {c: {t: [f(log) for log in runs] for t, f in claim.measures.items()} for c, runs in logs.items()}
    print(f"\n### {name}: {claim.headline}\n\n| contestant | {' | '.join(titles)} |\n|{'---|' * (len(titles) + 1)}")
    for contestant, by in values.items():
        print(f"| {contestant} | {' | '.join(spread(by[t]) for t in titles)} |")
    print("\n" + verdict(claim, values))
    with open(os.path.join(out, f"{name}.csv"), "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["contestant", "run", *titles])
        for contestant, by in values.items():
            table.writerows([contestant, i, *row] for i, row in enumerate(zip(*(by[t] for t in titles))))
    title, lines, xlabel = claim.picture(logs)
    if any(lines.values()):
        chart(os.path.join(out, f"{name}.svg"), f"{name}: {title}", lines, xlabel, "")


T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # runs -> Student's t


def verdict(claim, values):
    """One sentence: does the difference go the way that the headline says, and its 95 % interval not reach zero?"""
    better, worse = claim.says
    if better not in values or worse not in values:
        return "no verdict: contestants are missing"
    title = next(iter(claim.measures))
    differences = [x - y for x, y in zip(values[better][title], values[worse][title])]
    mean, n = statistics.mean(differences), len(differences)
    if n == 1:
        return f"no significant difference from one seed: {title}, {better} - {worse}: {mean:+.4f}"
    error = statistics.stdev(differences) / math.sqrt(n)
    gain = mean if claim.higher else -mean
    reach = T95.get(n, 2.26) * error  # for more than ten runs a little too strict
    says = "reproduced" if gain > reach else "the other way round" if gain < -reach else "no significant difference"
    return (f"{says}: {title}, {better} - {worse}, paired by seed: {mean:+.4f} ± {error:.4f} (standard error, {n} "
            f"runs; 95 %: {mean - reach:+.4f} to {mean + reach:+.4f})")  # fmt: skip


COLORS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()
STYLE = ('<style>text{font:12px sans-serif;fill:#222}.axis{stroke:#999;fill:none}@media (prefers-color-scheme:dark){'
         "text{fill:#ddd}.axis{stroke:#777}}</style>")  # fmt: skip


def chart(path, title, lines, xlabel, ylabel):
    """An SVG of {name: [(x, low, mean, high), ...]}: a line and a band each; the y axis spans what the last three
    quarters need, the legend stands beside the curves."""
    xs = [x for points in lines.values() for x, *_ in points]
    ys = sorted(y for points in lines.values() for _, low, _, high in points[len(points) // 4 :] for y in (low, high))
    left, right, low, high = min(0, *xs), max(max(xs), 1e-9), ys[0], max(ys[-1], ys[0] + 1e-9)
    digits = max(0, 2 - math.floor(math.log10(high - low)))
    at = lambda x, y: f"{60 + 430 * (x - left) / (right - left):.1f},{40 + 270 * (high - y) / (high - low):.1f}"
    frame = 'x="60" y="40" width="430" height="270"'
    parts = [f'<clipPath id="frame"><rect {frame}/></clipPath><rect class="axis" {frame}/><text x="60" y="20">{title}'
             "</text>"]  # fmt: skip
    for f in (0, 0.25, 0.5, 0.75, 1):
        y, x = high - f * (high - low), left + f * (right - left)
        parts.append(f'<text x="54" y="{44 + 270 * f:.0f}" text-anchor="end">{y:.{digits}f}</text>')
        parts.append(f'<text x="{60 + 430 * f:.0f}" y="326" text-anchor="middle">{x:.4g}</text>')
    for i, (name, points) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        band = [at(x, a) for x, a, _, _ in points] + [at(x, b) for x, _, _, b in reversed(points)]
        line = " ".join(at(x, m) for x, _, m, _ in points)
        parts.append(f'<g clip-path="url(#frame)"><polygon points="{" ".join(band)}" fill="{color}" opacity="0.15"/>'
                     f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/></g>')  # fmt: skip
        parts.append(f'<rect x="505" y="{44 + 18 * i}" width="12" height="4" fill="{color}"/>')
        parts.append(f'<text x="522" y="{52 + 18 * i}">{name}</text>')
    parts.append(f'<text x="275" y="346" text-anchor="middle">{xlabel}</text><text x="6" y="20">{ylabel}</text>')
    with open(path, "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 356">{STYLE}{"".join(parts)}</svg>\n')


def phases(source, path):
    """The first steps of one EvoMoE run, from its log.jsonl (--log_every=1 shows most): loss, experts per token and the
    gate's bar, the phases shaded behind them; as many steps again as it takes until the last phase begins."""
    try:
        log = [{"phase": "diversify", "bar": math.nan} | e for e in every_step(read_log(source))]
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"claims: --log={source} cannot be read: {error}") from None
    if all(e["bar"] != e["bar"] for e in log):
        raise SystemExit(f"claims: {source} is not the log of a run with --gate=dts")
    begins = {}
    for e in log:
        begins.setdefault(e["phase"], e["step"] - 1)
    right = min(log[-1]["step"], 2 * max(begins.values()) + 20)
    log, x = [e for e in log if e["step"] <= right], lambda step: 60 + 620 * step / right
    parts = ['<text x="10" y="24" font-weight="bold">EvoMoE: one expert, then all, then as few as it takes</text>']
    parts.append(f'<text x="10" y="46">The first {right} steps of a run. The spawn does not disturb the loss; experts '
                 "per token fall while the bar rises.</text>")  # fmt: skip
    for i, ((name, first), last) in enumerate(zip(begins.items(), [*list(begins.values())[1:], right])):
        wide = x(last) - x(first)
        parts.append(f'<rect x="{x(first):.1f}" y="60" width="{wide:.1f}" height="460" fill="{COLORS[0]}" '
                     f'opacity="{0.18 if i % 2 else 0.06}"/>')  # fmt: skip
        parts.append(f'<text x="{x(first) + wide / 2:.1f}" y="76" text-anchor="middle">{name}</text>')
    rows = {"loss": [e["loss"] for e in log], "experts per token": [e.get("experts_per_token", 1.0) for e in log],
            "bar": [e["bar"] for e in log]}  # fmt: skip
    for i, (label, ys) in enumerate(rows.items()):
        real, top = [y for y in ys if y == y], 100 + 145 * i
        low, high = (min(real), max(real)) if i == 0 else (0.0, 1.05 * max(real))
        at = lambda y: top + 110 * (high - y) / (high - low or 1)
        points = " ".join(f"{x(e['step']):.1f},{at(y):.1f}" for e, y in zip(log, ys) if y == y)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLORS[3]}" stroke-width="2"/>')
        parts.append(f'<text x="672" y="{top + 50}" text-anchor="end">{label}</text>')
        parts += [f'<text x="54" y="{at(y) + 4:.0f}" text-anchor="end">{y:.3g}</text>' for y in (low, max(real))]
    parts += [f'<text x="{x(n):.0f}" y="538" text-anchor="middle">{n}</text>' for n in {0, *begins.values(), right}]
    with open(path, "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 550">{STYLE}{"".join(parts)}</svg>\n')


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def main():
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CLAIMS, "unbiased", "comet", "phases"]
    parser.add_argument("claims", nargs="*", help="; ".join(names))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a minute or a few, to see that it works")
    parser.add_argument("--seeds", type=positive, help="how many (3; with --quick 1)")
    parser.add_argument("--first", type=int, default=1337, help="the first seed")
    parser.add_argument("--methods", default="", help="regular expressions of contestants, with ; between them")
    parser.add_argument("--flags", default="", help="more flags of train.py for every run")
    parser.add_argument("--workers", type=positive, default=2, help="seeds at a time")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads per run")
    parser.add_argument("--log", default=os.path.join(ROOT, "out", "log.jsonl"), help="phases: of which run")
    parser.add_argument(
        "--out", default="", help='folder of the runs; "": out-claims, and a name of its own for --flags'
    )
    a = parser.parse_args()
    a.seeds = a.seeds or (1 if a.quick else 3)
    a.out = a.out or os.path.join(ROOT, "out-claims" + "-quick" * a.quick + re.sub(r"[^\w.=]+", "-", a.flags))
    if unknown := set(a.claims) - set(names):
        raise SystemExit(f"claims: {', '.join(sorted(unknown))} is unknown; there are: {', '.join(names)}")
    if a.claims:
        try:
            os.makedirs(a.out, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"claims: cannot write to --out={a.out} ({error.strerror}): name another folder") from None
    if a.list or not a.claims:
        print("\n".join(f"{name:20} {claim.headline}" for name, claim in CLAIMS.items()))
        print(
            "unbiased             skipping is unbiased and has less variance than balanced matching, exactly "
            "enumerated\n"
            "comet                permutation search finds better assignments with fewer trials\n"
            "phases               (no claim: draws loss, bar and experts per token of an EvoMoE run, --log)"
        )
    if a.quick:
        print("--quick: a few steps, to see that it works; the numbers and verdicts mean nothing", flush=True)
    for name in a.claims:
        if name == "phases":
            picture = os.path.join(os.path.dirname(a.log), "phases.svg")
            phases(a.log, picture)
            print(f"drawn: {picture}")
        elif name in ("unbiased", "comet"):
            import toys

            getattr(toys, name)(a)
        else:
            tell(name, CLAIMS[name], run_claim(name, CLAIMS[name], a), a.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("claims: interrupted; the same command goes on with what is missing") from None
