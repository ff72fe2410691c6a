"""
The comparison: which way of routing learns most from the same data, the same compute, the same time?

    python tests/claims.py gpt                                 all methods, 3 seeds, on the CPU
    python tests/claims.py gpt roberta translation --seeds=5 --workers=4 --device=cuda
    python tests/claims.py tune                                each method's learning rate and knobs, gpt, one seed
    python tests/claims.py table                               the tables again, from what has been run
    python tests/claims.py picture --log=out/log.jsonl         EvoMoE's phases: loss, temperature, experts per token

Every method has the same active parameters, data, learning rate and length. Three yardsticks, each with runs of its own,
because a learning-rate schedule that is cut short is not a fair run:

    steps   the same number of optimizer steps
    rows    as many steps as use the Switch run's number of expert-rows (token-expert pairs, summed over layers)
    time    as many steps as fit in the dense run's time, by the measured time per step

Runs go to --out (one folder each, kept: a second call runs only what is missing), results to OUT/results.json, the
training curves to OUT/curves-OBJECTIVE.svg. On a CPU time is the process's CPU time with one thread, so that workers and whatever
else the machine does don't count; on a GPU it is the clock's, and the machine should do nothing else.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

EVOMOE = "--gate=dts --diversify=0.1"
METHODS = {  # flags beyond the common ones
    "dense": "--n_experts=1",
    "switch": "--gate=switch",
    "hash": "--gate=hash",
    "base": "--gate=base",
    "stablemoe": "--gate=stablemoe",
    "evomoe": EVOMOE,
    "evomoe_id": EVOMOE + " --gate_args=reads=id",
}
KNOBS = {  # for every method three learning rates; then, at its best one, a few values of its own knobs
    "dense": [],
    "switch": ["--gate_args=balance=0.001", "--gate_args=balance=0.1"],
    "hash": ["--gate_args=kind=random", "--diversify=0.1"],
    "base": [],
    "stablemoe": ["--gate_args=stage1=0.25", "--gate_args=balance=0.03"],
    "evomoe": ["--diversify=0", "--diversify=0.2", "--gate_args=balance=0", "--gate_args=balance=0.1", "--diversify=0.2 --gate_args=anneal=0.0625,hard=0.1875",
               "--gate_args=anneal=0.444,hard=0.667", "--spawn=noise"],
    "evomoe_id": [],
}
RATES = [f"--learning_rate={rate}" for rate in ("2e-3", "4e-3", "8e-3")]
SIZES = {  # small enough for a CPU; raise them on a GPU with --flags
    "gpt": "--n_layer=4 --n_embd=64 --n_head=4 --block_size=64 --batch_size=16 --max_steps=500 --warmup=200 --learning_rate=4e-3",
    "roberta": "--n_layer=2 --n_embd=64 --n_head=4 --block_size=64 --batch_size=64 --max_steps=600 --warmup=200 --learning_rate=4e-3",
    "translation": "--n_layer=2 --n_embd=64 --n_head=4 --batch_size=32 --max_steps=800 --warmup=200 --learning_rate=4e-3 --bleu_sentences=50",
}


def run(name, flags, a):
    """One training run in OUT/name, unless it is there already. -> {"loss", "steps", "seconds", "rows", "curve"}."""
    out = os.path.join(a.out, name)
    done = os.path.join(out, "done.json")
    if os.path.exists(done):
        with open(done) as f:
            return json.load(f)
    subprocess.run(["rm", "-rf", out])
    command = [sys.executable, os.path.join(ROOT, "train.py"), *flags.split(), f"--out_dir={out}", "--eval_every=0",
               "--save_every=0", "--log_every=10", "--sample_tokens=1"] + ([f"--device={a.device}"] if a.device else [])  # fmt: skip
    env = dict(os.environ, OMP_NUM_THREADS=str(a.threads))
    p = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    if p.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{p.stderr[-2000:]}")
    with open(os.path.join(out, "log.jsonl")) as f:
        log = [json.loads(line) for line in f]
    train, held_out = [e for e in log if "loss" in e], [e for e in log if "val_loss" in e][-1]
    bleu = [value for e in log for key, value in e.items() if key.endswith("_bleu")]
    per_token = [e.get("experts_per_token", 1.0) for e in train]
    steps = held_out["step"]
    clock = "seconds" if "cuda" in a.device else "cpu_seconds"
    speed = (train[-1][clock] - train[0][clock]) / max(1, train[-1]["step"] - train[0]["step"])  # s per step, without start-up
    result = {
        "loss": held_out["val_loss"], "bleu": bleu[-1] if bleu else None, "steps": steps,
        "seconds": speed * steps,
        "rows": steps * statistics.mean(per_token),  # expert-rows per token and MoE layer, in units of one step's tokens
        "curve": [(e["step"], e["loss"], e[clock] - train[0][clock], e.get("experts_per_token", 1.0)) for e in train],
    }  # fmt: skip
    with open(done, "w") as f:
        json.dump(result, f)
    print(f"{name:40s} loss {result['loss']:.4f}  steps {steps}  {result['seconds']:.0f} s", flush=True)
    return result


def compare(objective, a):
    """All methods, seeds and yardsticks of one objective. -> {method: {yardstick: [result per seed]}}."""
    common = f"--objective={objective} {SIZES[objective]} {a.flags}"
    max_steps = int([f for f in common.split() if f.startswith("--max_steps=")][-1].split("=")[1])
    methods = a.methods.split(",") if a.methods else list(METHODS)

    def job(method, seed, yardstick, steps):
        return run(f"{objective}-{method}-{yardstick}-{seed}", f"{common} {METHODS[method]} --seed={seed} --max_steps={steps}", a)

    results = {m: {} for m in methods}
    with ThreadPoolExecutor(a.workers) as pool:
        first = {(m, s): pool.submit(job, m, s, "steps", max_steps) for s in range(a.seeds) for m in methods}
        first = {key: f.result() for key, f in first.items()}
        time_of = {m: statistics.median(first[m, s]["seconds"] for s in range(a.seeds)) for m in methods}
        rows_of = {m: statistics.median(first[m, s]["rows"] for s in range(a.seeds)) for m in methods}
        for yardstick, cost, target in (("rows", rows_of, rows_of.get("switch")), ("time", time_of, time_of.get("dense"))):
            if not target or yardstick not in a.yardsticks:
                continue
            pending = {}
            for m in methods:
                steps = round(max_steps * target / cost[m])
                near = abs(steps / max_steps - 1) < 0.02 or (yardstick == "rows" and m == "dense")
                for s in range(a.seeds):
                    pending[m, s] = None if near else pool.submit(job, m, s, yardstick, steps)
            for (m, s), f in pending.items():
                results[m].setdefault(yardstick, []).append(f.result() if f else first[m, s])
    for (m, s), r in first.items():
        results[m].setdefault("steps", []).append(r)
    return results


def show(values, digits=3):
    """mean +- sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(objective, results):
    """A Markdown table of held-out losses (nats per target), one row a method."""
    print(f"\n### {objective}: held-out loss, mean ± standard deviation over seeds\n")
    bleu = any(r["bleu"] is not None for by in results.values() for r in by["steps"])
    print("| method | equal steps | equal expert-rows | equal time | ms per step | experts per token |" + " BLEU at equal steps |" * bleu)
    print("|---|---|---|---|---|---|" + "---|" * bleu)
    for method, by in results.items():
        r = by["steps"]
        ms = 1000 * statistics.median(x["seconds"] / x["steps"] for x in r)
        cells = [show([x["loss"] for x in by[y]]) if y in by else "-" for y in ("steps", "rows", "time")]
        bleu = f" {show([x['bleu'] for x in r], 1)} |" if r[0]["bleu"] is not None else ""
        print(f"| {method} | {' | '.join(cells)} | {ms:.0f} | {statistics.mean(x['rows'] / x['steps'] for x in r):.2f} |{bleu}")
    for method, by in results.items():
        if method != "switch" and "switch" in results:  # paired by seed: what the spread over seeds hides
            pairs = {y: [m["loss"] - s["loss"] for m, s in zip(by[y], results["switch"][y])] for y in by if y in results["switch"]}
            print(f"{method} - switch, paired by seed: " + ", ".join(f"{y} {show(d)}" for y, d in pairs.items()))


def panel(x0, y0, W, H, lines, right, low, high, label):
    """One chart as SVG elements: lines [(color, [(x, y)])], x from 0 to right, y from low to high, label beneath."""
    parts = [f'<rect x="{x0}" y="{y0}" width="{W}" height="{H}" fill="none" stroke="#aaa"/>',
             f'<text x="{x0 + W / 2}" y="{y0 + H + 30}" text-anchor="middle">{label}</text>']  # fmt: skip
    for f in (0, 0.5, 1):
        parts.append(f'<text x="{x0 + f * W}" y="{y0 + H + 14}" text-anchor="middle">{f * right:.0f}</text>')
        parts.append(f'<text x="{x0 - 5}" y="{y0 + 4 + f * H}" text-anchor="end">{high - f * (high - low):.2f}</text>')
    for color, points in lines:
        points = " ".join(f"{x0 + W * x / right:.1f},{y0 + H * (high - y) / (high - low):.1f}" for x, y in points if low <= y <= high)
        parts.append(f'<polyline fill="none" stroke="{color}" points="{points}"/>')
    return parts


def save_svg(path, W, H, parts):
    with open(path, "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{W}" height="{H}" font-family="sans-serif" font-size="11">'
                f'<rect width="{W}" height="{H}" fill="white"/>{"".join(parts)}</svg>\n')  # fmt: skip


def smooth(values, n=5):
    return [statistics.mean(values[max(0, i - n) : i + 1]) for i in range(len(values))]


def curves(objective, results, path):
    """Training loss against steps and against time, first seed, as a plain SVG (no plotting package needed)."""
    colors = ["#333333", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#d62728", "#8c564b"]
    data = {m: by["steps"][0]["curve"] for m, by in results.items()}
    low = min(min(smooth([c[1] for c in d])) for d in data.values())
    high = statistics.median([d[min(len(d) - 1, 6)][1] for d in data.values()])
    parts = []
    for x0, axis, label in ((50, 0, "steps"), (530, 2, "seconds")):
        lines = [(color, list(zip([c[axis] for c in d], smooth([c[1] for c in d])))) for color, d in zip(colors, data.values())]
        parts += panel(x0, 10, 420, 300, lines, max(d[-1][axis] for d in data.values()), low, high, f"training loss of {objective} against {label}")
    parts += [f'<text x="390" y="{30 + 16 * i}" fill="{color}" font-size="13">{m}</text>' for i, (color, m) in enumerate(zip(colors, data))]
    save_svg(path, 970, 350, parts)


def picture(source, path):
    """EvoMoE's phases over the steps of one run: loss, temperature, experts per token, from its log.jsonl."""
    with open(source) as f:
        log = [e for e in map(json.loads, f) if "loss" in e]
    log = [{"phase": "diversify", "tau": math.nan} | e for e in log]
    if all(e["tau"] != e["tau"] for e in log):
        raise SystemExit(f"claims: {source} is not the log of a run with --gate=dts")
    right, parts = log[-1]["step"], []
    values = {"loss": smooth([e["loss"] for e in log], 2), "temperature": [e["tau"] for e in log],
              "experts per token": [e.get("experts_per_token", 1.0) for e in log]}  # fmt: skip
    for i, (label, ys) in enumerate(values.items()):
        real = [y for y in ys if y == y]
        low, high = (min(real), max(real)) if i == 0 else (0, max(real))
        parts += panel(50, 30 + 190 * i, 520, 140, [("#1f77b4", list(zip([e["step"] for e in log], ys)))], right, low, high, label)
    for e, before in zip(log, [{"phase": ""}] + log):
        if e["phase"] != before["phase"]:
            x = 50 + 520 * (before.get("step", 0)) / right
            parts.append(f'<line x1="{x}" x2="{x}" y1="16" y2="550" stroke="#d62728" stroke-dasharray="3"/><text x="{x + 3}" y="24" fill="#d62728">{e["phase"]}</text>')
    save_svg(path, 600, 590, parts)


def tune(a):
    """Learning rate, then each method's own knobs at the best of them, on gpt, one seed."""
    common = f"--objective=gpt {SIZES['gpt']} {a.flags} --seed=100"
    with ThreadPoolExecutor(a.workers) as pool:
        job = lambda m, knob: pool.submit(run, f"tune-{m}{knob}".replace(" ", ""), f"{common} {METHODS[m]} {knob}", a)
        rates = {m: {rate: job(m, rate) for rate in RATES} for m in KNOBS}
        best = {m: min(by, key=lambda rate: by[rate].result()["loss"]) for m, by in rates.items()}
        more = {m: {knob: job(m, f"{best[m]} {knob}") for knob in KNOBS[m]} for m in KNOBS}
        table = {m: {k: f.result()["loss"] for k, f in (rates[m] | more[m]).items()} for m in KNOBS}
    print("\n| method | learning rate, or knob at the best one | loss |\n|---|---|---|")
    for m, by in table.items():
        for knob, loss in by.items():
            print(f"| {m} | `{knob}` | {loss:.3f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("what", nargs="+", choices=[*SIZES, "tune", "table", "picture"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="", help="comma-separated; all by default")
    parser.add_argument("--yardsticks", default="steps,rows,time")
    parser.add_argument("--flags", default="", help="more flags for every run, for example '--n_embd=256 --max_steps=3000'")
    parser.add_argument("--device", default="")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per run")
    parser.add_argument("--log", default=os.path.join(ROOT, "out", "log.jsonl"), help="picture: of which run; drawn beside it as phases.svg")
    parser.add_argument("--out", default=os.path.join(ROOT, "out-claims"))
    a = parser.parse_args()
    os.makedirs(a.out, exist_ok=True)
    path = os.path.join(a.out, "results.json")
    results = json.load(open(path)) if os.path.exists(path) else {}
    for what in a.what:
        if what == "tune":
            tune(a)
        elif what == "picture":
            picture(a.log, os.path.join(os.path.dirname(a.log), "phases.svg"))
        elif what in SIZES:
            results[what] = compare(what, a)
            with open(path, "w") as f:
                json.dump(results, f)
    for objective, r in results.items():
        table(objective, r)
        curves(objective, r, os.path.join(a.out, f"curves-{objective}.svg"))


if __name__ == "__main__":
    main()
