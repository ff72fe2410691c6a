"""
Two claims that need no Transformer, for tests/claims.py:

    python tests/claims.py unbiased     every sample and every survivor of a small problem, enumerated: bias and spread
    python tests/claims.py comet        multi-task regression on shared experts: trials needed with and without search
"""

import csv
import functools
import itertools
import math
import multiprocessing
import os
import random
import statistics
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F

from router import COMET, DSelectK, Hash, Permuted, TopK, best_assignment, matching_log_q, skip_weights

# ---------------------------------------------------------------------------------------------------------------------
# Unbiased: n datapoints, E experts, c slots each. Router logits theta (n, E) are free, expert z predicts phi_z, the
# loss is (a_i - phi_z)^2. The gradient of sum_i E_{z ~ softmax(theta_i)} loss_i(z) / n is known exactly


@functools.cache
def subsets(n, E, c):
    """Of all E^n samples, in order, every subset that may survive c slots per expert: the sample's number (M,), the
    weights (M, n), and how many subsets the sample has (M,). The same for all routers."""
    sample, W, share = [], [], []
    for i, z in enumerate(torch.tensor(list(itertools.product(range(E), repeat=n)))):
        members = [(z == e).nonzero()[:, 0].tolist() for e in range(E)]
        sets = list(itertools.product(*(itertools.combinations(m, min(len(m), c)) for m in members)))
        for kept in sets:
            u = torch.zeros(n, dtype=torch.double)
            u[[i for part in kept for i in part]] = 1
            sample.append(i), W.append(skip_weights(z, u, E, c)), share.append(len(sets))
    return torch.tensor(sample), torch.stack(W), torch.tensor(share)


class Problem:
    """n datapoints, E experts, c = n / E slots; skew: how much all datapoints prefer the same expert. Router and
    targets are drawn from the seed."""

    def __init__(self, skew, seed, n=6, E=3):
        g = torch.Generator().manual_seed(seed)
        self.n, self.E, self.c = n, E, n // E
        theta = torch.randn(n, E, generator=g, dtype=torch.double) * 0.7
        theta[:, 0] += skew
        a, phi = torch.randn(n, generator=g, dtype=torch.double), torch.linspace(-1, 1.2, E, dtype=torch.double)
        self.logp, self.p = theta.log_softmax(1), theta.softmax(1)
        self.loss, self.slope = (a[:, None] - phi) ** 2, -2 * (a[:, None] - phi)  # (n, E)
        centred = self.loss - (self.p * self.loss).sum(1, keepdim=True)
        self.truth = torch.cat([(self.p * centred).flatten(), (self.p * self.slope).sum(0)]) / n

    def gradient(self, z, w, baseline):
        """Samples z (M, n), weights w (M, n) -> (M, n * E + E): w (grad log p (loss - baseline) + grad loss)."""
        one = F.one_hot(z, self.E).double()
        loss = (one * self.loss).sum(2)
        theta = (w * (loss - baseline))[:, :, None] * (one - self.p)
        return torch.cat([theta.flatten(1), (w[:, :, None] * one * self.slope).sum(1)], 1) / self.n

    def samples(self):
        """Every z and its probability."""
        z = torch.tensor(list(itertools.product(range(self.E), repeat=self.n)))
        return z, self.logp[torch.arange(self.n), z].sum(1).exp()

    def skipping(self, weighted):
        """Independent samples; a full expert keeps a random c: all surviving subsets of all samples."""
        z, prob = self.samples()
        sample, w, share = subsets(self.n, self.E, self.c)
        return z[sample], w if weighted else (w > 0).double(), prob[sample] / share

    def matching(self, weighted, draws=4000):
        """Gumbel-Matching: balanced samples with weights p / q, by simulation (the noise is continuous)."""
        g, Z, W = torch.Generator().manual_seed(0), [], []
        for _ in range(draws):
            noise = -(-torch.rand(self.n, self.E, generator=g, dtype=torch.double).log()).log()
            z, dist = best_assignment(self.logp + noise, self.c)
            log_w = (self.logp - matching_log_q(self.logp, z, dist)).gather(1, z[:, None])[:, 0]
            Z.append(z), W.append(log_w.exp() if weighted else torch.ones(self.n, dtype=torch.double))
        return torch.stack(Z), torch.stack(W), torch.full((draws,), 1 / draws, dtype=torch.double)


SKEWS = (0.0, 0.75, 1.5)


def unbiased(a):
    """Bias and standard deviation of the gradient, relative to its norm, from an even router to a skewed one; on
    --seeds problems."""
    import claims

    draws, problems = (20, range(3, 4)) if a.quick else (4000, range(3, 3 + a.seeds))
    print("\n### unbiased: skipping is unbiased and spreads less than balanced matching\n")
    print(f"Bias (the length of mean - truth) and spread (root of the summed variance), as multiples of the true\n"
          f"gradient; mean of {len(problems)} problems. Skipping and no capacity: exact, by enumeration. Matching:\n"
          f"{draws} draws, so a bias below about 0.02 is noise.\n")  # fmt: skip
    head = ["estimator", "baseline", *(f"{what}, skew {skew}" for skew in SKEWS for what in ("bias", "spread"))]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    kinds = {
        "no capacity": lambda p: (*p.samples()[:1], torch.ones(len(p.samples()[0]), p.n).double(), p.samples()[1]),
        "skipping, weighted": lambda p: p.skipping(True),
        "skipping, unweighted": lambda p: p.skipping(False),
        "matching, weighted": lambda p: p.matching(True, draws),
        "matching, unweighted": lambda p: p.matching(False, draws),
    }
    table, found = [], {}  # found: (bias, spread) of each kind by problem and skew, with the exact mean as the baseline
    for name, sample in kinds.items():
        some = {how: torch.zeros(len(problems), len(SKEWS), 2) for how in ("none", "exact mean")}
        for (i, seed), (j, skew) in itertools.product(enumerate(problems), enumerate(SKEWS)):
            problem = Problem(skew, seed)
            z, w, prob = sample(problem)
            for how, values in some.items():
                g = problem.gradient(z, w, (problem.p * problem.loss).sum(1) if how != "none" else 0.0)
                mean = (prob[:, None] * g).sum(0)
                spread = (prob[:, None] * (g - mean) ** 2).sum().sqrt()
                values[i, j] = torch.stack([(mean - problem.truth).norm(), spread]) / problem.truth.norm()
        for how, values in some.items():
            table.append([name, how, *(f"{v:.3f}" for v in values.mean(0).flatten().tolist())])
            print(f"| {' | '.join(table[-1])} |", flush=True)
        found[name] = values
    skip, match = found["skipping, weighted"], found["matching, weighted"]
    less = [", ".join(f"{v:.2f}" for v in column) for column in (skip[..., 1] / match[..., 1]).T.tolist()]
    print(f"\nverdict: skipping {'is' if skip[..., 0].max() < 1e-9 else 'is NOT'} unbiased, exactly; its spread is "
          + "; ".join(f"{some} of matching's at skew {skew}" for some, skew in zip(less, SKEWS)))  # fmt: skip
    write(a, "unbiased", head, table)
    lines = {m: [(x, min(v), statistics.mean(v), max(v)) for x, v in zip(SKEWS, error.norm(dim=2).T.tolist())]
             for m, error in found.items()}  # fmt: skip
    title = "unbiased: error of the gradient, as a multiple of its length"
    claims.chart(os.path.join(a.out, "unbiased.svg"), title, lines, "skew of the router", "rms")


# ---------------------------------------------------------------------------------------------------------------------
# COMET: the paper's recommender in small. Eight tasks share four linear experts; a task's target is a fixed random
# mixture of two of four hidden functions of x. The gate reads the task (one-hot), as a task-specific gate does there


def make_task(seed, tasks=8, D=12, hidden=4, n=512):
    g = torch.Generator().manual_seed(seed)
    functions = torch.randn(hidden, D, D, generator=g) / D**0.5
    mix = torch.zeros(tasks, hidden)
    for t in range(tasks):
        mix[t, torch.randperm(hidden, generator=g)[:2]] = torch.tensor([1.0, 0.7])
    x, task = torch.randn(3 * n, D, generator=g), torch.randint(tasks, (3 * n,), generator=g)
    features = torch.stack([(x @ f).tanh().sum(1) for f in functions], 1) / D**0.5  # (3n, hidden)
    y = (mix[task] * features).sum(1) + 0.05 * torch.randn(3 * n, generator=g)
    return [(x[s], task[s], y[s]) for s in (slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n))]


def gate_of(method, tasks, E, knobs, steps):
    k, gamma, loss = 2, knobs["gamma"], knobs["loss"]
    make = {
        "hash": lambda: Hash(tasks, E, V=tasks, k=k, kind="random", seed=knobs["seed"]),
        "topk": lambda: TopK(tasks, E, k, balance=loss),
        "dselectk": lambda: DSelectK(tasks, E, k, gamma, entropy=loss),
        "comet": lambda: COMET(tasks, E, k, gamma, entropy=loss),
    }
    gate = make[method.rstrip("+")]()
    return Permuted(gate, steps, knobs["search"]) if method.endswith("+") else gate


def trial(method, seed, steps, data=0, tasks=8, E=4, D=12, H=4):
    """One random configuration, trained on data set `data`: -> (validation, test) mean squared error at the best of
    five validations."""
    rng = random.Random(seed * 1009 + 7)
    knobs = dict(
        seed=seed, loss=10 ** rng.uniform(-5, -1), gamma=10 ** rng.uniform(-1, 1), search=rng.uniform(0.02, 0.3)
    )
    rate = 10 ** rng.uniform(-3, -1)
    torch.manual_seed(seed)
    train, val, test = make_task(data, tasks, D)
    gate = gate_of(method, tasks, E, knobs, steps)
    w1 = torch.nn.Parameter(torch.randn(E, D, H) / D**0.5)
    w2 = torch.nn.Parameter(torch.randn(E, H) / H**0.5)
    optimizer = torch.optim.Adam([p for p in [w1, w2, *gate.parameters()] if p.requires_grad], lr=rate)

    def error(data):
        x, task, y = data
        routing = gate(F.one_hot(task, tasks).float(), task)
        out = torch.einsum("neh,eh->ne", torch.einsum("nd,edh->neh", x, w1).tanh(), w2)  # (N, E)
        return ((routing.G * out).sum(1) - y).square().mean(), routing.aux

    best = (math.inf, math.inf)
    for step in range(steps):
        gate.train().set_step(step)
        loss, aux = error(train)
        loss = loss + sum(gate.loss_weights.get(name, 0) * value for name, value in aux.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, steps // 5) == 0:
            gate.eval()
            with torch.no_grad():
                best = min(best, (float(error(val)[0]), float(error(test)[0])))
    return best


def expected_best(results, s, draws=2000):
    """Bootstrap: mean test error of the best by validation among s of the finished trials."""
    rng = random.Random(0)
    return statistics.mean(min(rng.choices(results, k=s))[1] for _ in range(draws))


METHODS = ["hash", "hash+", "topk", "topk+", "dselectk", "dselectk+", "comet", "comet+"]


def trials_of(job):
    """The (validation, test) errors of all trials of a method on a data set; kept in a file, read from it if there."""
    file, method, data, trials, steps = job
    if not os.path.exists(file):
        some = [trial(method, data * trials + i, steps, data) for i in range(trials)]
        with open(file + ".partial", "w", newline="") as f:
            csv.writer(f).writerows(some)
        os.replace(file + ".partial", file)
    with open(file, newline="") as f:
        return [tuple(map(float, row)) for row in csv.reader(f)]


def comet(a):
    """Random search, the same number of trials for each method; how many does it need with and without local search?
    On --seeds data sets; the trials of each method on each set are kept in --out and not repeated."""
    import claims

    sets, trials, steps = (1, 2, 5) if a.quick else (a.seeds, 100, 400)
    jobs = [
        (os.path.join(a.out, f"comet-{m}-{data}-{trials}x{steps}.csv"), m, data, trials, steps)
        for data in range(sets)
        for m in METHODS
    ]
    each = {"initializer": torch.set_num_threads, "initargs": (a.threads,)}
    with ProcessPoolExecutor(a.workers, multiprocessing.get_context("spawn"), **each) as pool:
        done = [[e for e in found if math.isfinite(e[0])] for found in pool.map(trials_of, jobs)]
    every = [dict(zip(METHODS, done[i : i + len(METHODS)])) for i in range(0, len(done), len(METHODS))]
    print(f"\n### comet: permutation search ({sets} data sets, {trials} trials of {steps} steps each for every method; "
          "+ is with local search)\n")  # fmt: skip
    counts = [s for s in (1, 2, 5, 10, 20, 50, 100) if s <= trials]
    head = ["method", "best 5 %", "each data set", *(f"best of {s}" for s in counts)]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    rows, best, curves = [], {}, {}
    for m in METHODS:
        top = [[test for _, test in sorted(results[m])[: max(1, len(results[m]) // 20)]] for results in every]
        best[m] = {"test error of the best 5 % by validation": [statistics.mean(some) for some in top]}
        curves[m] = [[expected_best(results[m], s) for results in every] for s in counts]
        (errors,) = best[m].values()
        means = [statistics.mean(some) for some in (errors, *curves[m])]
        rows.append([m, f"{means[0]:.4f}", ", ".join(f"{e:.4f}" for e in errors), *(f"{v:.4f}" for v in means[1:])])
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    print()
    better = []
    for m in ("hash", "topk", "dselectk", "comet"):
        need = []
        for results in every:
            target = expected_best(results[m], trials)
            enough = (s for s in range(1, trials + 1) if expected_best(results[m + "+"], s, 300) <= target)
            need.append(str(next(enough, "never")))
        print(f"{m}: its best of {trials} is reached by {m}+ with so many trials: {', '.join(need)}")
        says = claims.verdict(claims.Claim("", {}, (m + "+", m), measures=best[m]), best)
        print(f"    {says}")
        better += [m] * says.startswith("reproduced")
    print(
        f"\nverdict: with local search the best are significantly better for {', '.join(better) or 'none of the four'}"
    )
    write(a, "comet", head, rows)
    lines = {m: [(s, *band([x - y for x, y in zip(v, w)])) for s, v, w in zip(counts, curves[m], curves["topk"])]
             for m in METHODS if "hash" not in m}  # fmt: skip
    title = "comet: best test error of so many trials, less topk's"
    claims.chart(os.path.join(a.out, "comet.svg"), title, lines, "trials", "mse")


def band(values):
    """(mean - standard error, mean, mean + standard error)"""
    mean, n = statistics.mean(values), len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    return mean - error, mean, mean + error


def write(a, name, head, rows):
    with open(os.path.join(a.out, f"{name}.csv"), "w", newline="") as f:
        csv.writer(f).writerows([head, *rows])
