"""BASE, StableMoE, DSelect-k, COMET and permutation search against enumeration, hand-worked numbers, finite
differences and an exact assignment solver that is itself checked against all n! permutations."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn as nn

from router import (
    BASE,
    COMET,
    Place,
    DSelectK,
    Permuted,
    Routing,
    StableMoE,
    TopK,
    balanced_assignment,
    best_permutation,
    entropy,
    gates,
    smooth_step,
    tree_leaves,
)

D, V = 12, 30


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def data(N=40):
    return torch.randn(N, D), torch.randint(V, (N,))


def total_loss(gate, r):
    return r.G.square().sum() + sum(gate.loss_weights.get(name, 0) * value for name, value in r.aux.items())


# ---------------------------------------------------------------------------------------------------------------------
# Smooth-step and trees


@pytest.mark.parametrize("gamma", [0.01, 0.3, 1.0, 10.0])
def test_smooth_step(gamma):
    t = torch.tensor([-9.0, -0.5, 0.5, 9.0]) * gamma
    assert smooth_step(t, gamma).tolist() == [0, 0, 1, 1]
    t = torch.linspace(-0.7, 0.7, 2001, dtype=torch.float64, requires_grad=True)
    s = smooth_step(gamma * t, gamma)
    assert torch.allclose(s.flip(0), 1 - s) and torch.allclose(s, smooth_step(t, 1.0))
    (slope,) = torch.autograd.grad(s.sum(), t)
    assert (slope[t.abs() > 0.5] == 0).all() and slope.max() == pytest.approx(1.5, abs=1e-5)
    assert slope.diff().abs().max() < 0.01  # no jump at the joins
    assert torch.allclose((s[2:] - s[:-2]) / (t[2:] - t[:-2]), slope[1:-1], atol=5e-3)
    edge = torch.tensor([-0.5, 0.5])[:, None] + torch.linspace(-1e-3, 1e-3, 4001)
    assert smooth_step(gamma * edge, gamma).min() >= 0 and smooth_step(gamma * edge, gamma).max() <= 1


def walk(h, E):
    """Leaf probabilities by recursion over the heap, left to right: the slow way to tree_leaves."""
    out = []

    def visit(node, p):
        if node >= E - 1:
            out.append((node, p))
        else:
            visit(2 * node + 1, p * h[node])
            visit(2 * node + 2, p * (1 - h[node]))

    visit(0, 1.0)
    return out


@pytest.mark.parametrize("E", range(1, 18))
def test_tree(E):
    h = torch.rand(3, 2, E - 1, dtype=torch.float64)
    p = tree_leaves(h)
    assert p.shape == (3, 2, E) and torch.allclose(p.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    want = torch.tensor([q for _, q in walk(h[1, 1].tolist(), E)], dtype=torch.float64)
    assert torch.allclose(p[1, 1], want)
    hard = tree_leaves((h > 0.5).double())
    assert ((hard == 0) | (hard == 1)).all() and (hard.sum(-1) == 1).all()


def test_tree_leaf_order_and_swap():
    for E, order in {5: [7, 8, 4, 5, 6], 6: [7, 8, 9, 10, 5, 6], 9: [15, 16, 8, 9, 10, 11, 12, 13, 14]}.items():
        assert [node for node, _ in walk([0.5] * (E - 1), E)] == order
    assert tree_leaves(torch.tensor([1.0, 1.0, 0.0, 0.0])).tolist() == [0, 1, 0, 0, 0]  # left, left, right: node 8
    h = torch.tensor([0.9, 0.2, 0.7])
    p, flipped = (
        tree_leaves(h),
        tree_leaves(torch.tensor([0.1, 0.7, 0.2])),
    )  # the other sign at the root, subtrees swapped
    assert torch.allclose(p, flipped.roll(2)) and p[0] == pytest.approx(0.9 * 0.2)


# ---------------------------------------------------------------------------------------------------------------------
# COMET and DSelect-k


def comet_oracle(gate, x):
    G = torch.zeros(len(x), gate.E)
    for n in range(len(x)):
        pairs = []
        for j in range(gate.k):
            nodes = range(j * (gate.E - 1), (j + 1) * (gate.E - 1))
            h = [float(smooth_step(gate.split[i] @ x[n] + gate.split_bias[i], gate.gamma)) for i in nodes]
            alpha = gate.leaf[j * gate.E : (j + 1) * gate.E] @ x[n] + gate.leaf_bias[j * gate.E : (j + 1) * gate.E]
            pairs += [(e, p * math.exp(alpha[e])) for e, (_, p) in enumerate(walk(h, gate.E))]
        for e, q in pairs:
            G[n, e] += q / sum(q for _, q in pairs)
    return G


@pytest.mark.parametrize("E, k", [(1, 1), (2, 1), (2, 2), (5, 2), (6, 6), (8, 3)])
@torch.no_grad()
def test_comet_is_a_distribution(E, k):
    gate, (x, ids) = COMET(D, E, k), data(9)
    gate.split.mul_(40)  # a mix of soft and saturated nodes
    G = gate(x, ids).G
    assert (
        (G >= 0).all()
        and torch.allclose(G.sum(1), torch.ones(9))
        and torch.allclose(G, comet_oracle(gate, x), atol=1e-6)
    )
    gate.leaf_bias += 50
    assert torch.allclose(gate(x, ids).G, G, atol=1e-5)  # one softmax: a constant on all pairs changes nothing
    assert torch.allclose(gate(x[3:4], ids[3:4]).G, G[3:4], atol=1e-5)  # one token


def test_comet_undecided():
    gate, (x, ids) = COMET(D, 8, k=3), data()
    for p in gate.parameters():
        nn.init.zeros_(p)
    r = gate(x, ids)
    assert torch.allclose(r.G, torch.full((40, 8), 1 / 8))
    assert float(r.aux["entropy"].detach()) == pytest.approx(3 * math.log(8), abs=1e-4)


@pytest.mark.parametrize("E, k", [(5, 1), (8, 1), (6, 3), (8, 8)])
def test_comet_saturated(E, k):
    gate, (x, ids) = COMET(D, E, k), data()
    with torch.no_grad():
        gate.split.mul_(1e6)
    x.requires_grad_()
    r = gate(x, ids)
    h = ((x @ gate.split.T).unflatten(1, (k, E - 1)) > 0).float()
    p = tree_leaves(h)  # one-hot
    alpha = ((x @ gate.leaf.T + gate.leaf_bias).unflatten(1, (k, E)) * p).sum(2).softmax(1)
    assert torch.allclose(r.G, (alpha[..., None] * p).sum(1), atol=1e-6)
    assert ((r.G > 0).sum(1) <= k).all() and abs(float(r.aux["entropy"].detach())) < 1e-4
    total_loss(gate, r).backward()
    assert (gate.split.grad == 0).all() and (gate.split_bias.grad == 0).all()  # exactly: the flat part of S
    if k == 1:
        assert r.G.max() == 1 and (gate.leaf.grad == 0).all() and (x.grad == 0).all()
    else:
        assert gate.leaf.grad.abs().max() > 0


def test_gradient_is_zero_only_for_saturated_tokens():
    gate, (x, ids) = COMET(D, 8, k=1), data(6)
    x = torch.cat([x[:3] * 1e4, x[3:] * 1e-2]).requires_grad_()
    with torch.no_grad():
        gate.split_bias.zero_()
    gate(x, ids).G.square().sum().backward()
    assert (x.grad[:3] == 0).all() and (x.grad[3:].abs().amax(1) > 0).all()


@pytest.mark.parametrize("gate", [COMET(4, 5, 2), DSelectK(4, 6, 2), DSelectK(4, 8, 3)])
def test_gradients_by_finite_differences(gate):
    gate = copy.deepcopy(gate).double()
    names = [n for n, _ in gate.named_parameters()]
    start = [p.detach() * (20 if n in ("split", "weight") else 1) for n, p in gate.named_parameters()]
    x = torch.randn(3, 4, dtype=torch.float64)

    def f(x, *values):
        r = torch.func.functional_call(gate, dict(zip(names, values)), (x, torch.zeros(3, dtype=torch.long)))
        return (r.G, *r.aux.values())

    inputs = [v.clone().requires_grad_() for v in (x, *start)]
    assert torch.autograd.gradcheck(f, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("E", [2, 4, 8, 16])
def test_comet_with_one_plane_per_level_is_dselectk(E):
    gate, (x, ids) = DSelectK(D, E, k=1), data()
    with torch.no_grad():
        gate.weight.mul_(30)
    s = smooth_step(x @ gate.weight.T + gate.bias, 1.0)  # (N, bits); a set bit goes right
    h = torch.cat([(1 - s[:, t, None]).expand(-1, 2**t) for t in range(gate.bits)], 1)
    assert torch.allclose(tree_leaves(h), gate(x, ids).G, atol=1e-6)


@pytest.mark.parametrize("E, k", [(1, 1), (2, 1), (5, 2), (6, 6), (8, 2)])
def test_dselectk_by_enumeration(E, k):
    gate, (x, ids) = DSelectK(D, E, k), data(7)
    with torch.no_grad():
        gate.weight.mul_(20)
    r = gate(x, ids)
    s = smooth_step(x @ gate.weight.T + gate.bias, 1.0).view(7, k, -1)
    mix = (x @ gate.mix.T + gate.mix_bias).softmax(1)
    want = torch.zeros(7, E)
    for e in range(E):
        for j in range(k):
            term = mix[:, j]
            for t in range(gate.bits):
                term = term * (s[:, j, t] if e >> (gate.bits - 1 - t) & 1 else 1 - s[:, j, t])
            want[:, e] += term
    assert torch.allclose(r.G, want, atol=1e-6)
    power = E & (E - 1) == 0
    assert torch.allclose(r.G.sum(1), torch.ones(7)) == power and bool((r.G.sum(1) < 1 + 1e-5).all())
    assert ("reciprocal" not in r.aux) if power else r.aux["reciprocal"] > k
    total_loss(gate, r).backward()
    assert (gate.mix.grad.abs().max() == 0) == (k == 1)  # one selector: its softmax is the constant 1


@torch.no_grad()
def test_dselectk_static_and_codes():
    gate, (x, ids) = DSelectK(D, 8, k=1, static=True), data()
    assert {n for n, _ in gate.named_parameters()} == {"bias", "mix_bias"}
    G = gate(x, ids).G
    assert (G == G[:1]).all() and (G > 0).all()
    gate.bias.copy_(torch.tensor([5.0, 5.0, -5.0]))  # 110: expert 6
    assert gate(x, ids).G[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]
    gate = DSelectK(D, 6, k=1, static=True)
    gate.bias.fill_(5.0)  # 111: there is no expert 7
    r = gate(x, ids)
    assert (r.G == 0).all() and float(r.aux["reciprocal"].detach()) == pytest.approx(1e6)


@pytest.mark.parametrize("make", [COMET, DSelectK])
@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
def test_nothing_is_saturated_at_the_start(make, gamma):
    assert (make(256, 8, 2, gamma=gamma)(torch.randn(50, 256), None).G > 0).all()


def test_entropy_reaches_its_ends():
    assert float(entropy(torch.eye(4)).abs().max()) < 1e-5
    assert entropy(torch.full((4,), 0.25)).item() == pytest.approx(math.log(4), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# BASE


def sigma(s):
    s = s - s.mean(1, keepdim=True)
    return float((s - s.mean(0)).std(unbiased=False))


def value(s, a):
    assert a.shape == (len(s),) and a.dtype == torch.long
    counts = torch.bincount(a, minlength=s.shape[1])
    assert len(counts) == s.shape[1] and counts.max() - counts.min() <= 1
    return float(s.gather(1, a[:, None]).sum())


def hard_cases(N, E):
    few = torch.randn(5, E)
    return {
        "normal": torch.randn(N, E),
        "skewed": torch.randn(N, E) + 5 * torch.randn(E),
        "collapsed": 100 * torch.arange(E) + 0.01 * torch.randn(N, E),
        "low rank": torch.randn(N, 2) @ torch.randn(2, E),
        "repeated rows": few[torch.randint(5, (N,))],
        "almost repeated": few[torch.randint(5, (N,))] + 0.05 * torch.randn(N, E),
        "binary": (torch.rand(N, E) < 0.2).float(),
        "heavy tail": torch.randn(N, E) ** 5,
    }


@pytest.mark.parametrize("N, E", [(1, 1), (7, 1), (1, 5), (3, 5), (4, 4), (31, 5), (64, 8), (300, 7), (600, 64)])
def test_base_is_always_balanced(N, E):
    cases = hard_cases(N, E)
    cases |= {"alike": torch.randn(1, E).expand(N, E), "zero": torch.zeros(N, E), "nan": torch.full((N, E), torch.nan)}
    cases |= {
        "one nan": torch.randn(N, E).index_fill(0, torch.tensor([0]), torch.nan),
        "huge": torch.randn(N, E) * 1e38,
    }
    cases |= {
        "inf": torch.randn(N, E).index_fill(1, torch.tensor([E - 1]), torch.inf),
        "bf16": torch.randn(N, E).bfloat16(),
    }
    for s in cases.values():
        value(s, balanced_assignment(s))
        value(s, balanced_assignment(s, rounds=1))  # the fallback keeps the balance too
        value(s, balanced_assignment(s, rounds=0))


def test_base_against_enumeration():
    for N, E in ((4, 2), (6, 3), (8, 2), (6, 2), (5, 5)):
        for s in hard_cases(N, E).values():
            labels = [e for e in range(E) for _ in range(N // E)]
            best = max(sum(float(s[n, e]) for n, e in enumerate(a)) for a in set(itertools.permutations(labels)))
            got = value(s, balanced_assignment(s))
            assert best - 2 * 0.05 * N * sigma(s) - 1e-4 <= got <= best + 1e-3


def optimum(s):
    """Largest sum with N // E or N // E + 1 tokens an expert: a square problem in which each expert has its seats
    as columns and E - N % E dummy rows may only take additional seats."""
    N, E = s.shape
    if N % E == 0:
        square = s.double().repeat_interleave(N // E, 1)
    else:
        square = torch.cat([s.repeat_interleave(N // E, 1), s], 1).double()
        dummies = torch.full((E - N % E, square.shape[1]), -1e6, dtype=torch.float64)
        dummies[:, -E:] = 0
        square = torch.cat([square, dummies])
    return float(square.gather(1, best_permutation(square)[:, None]).sum())


@pytest.mark.parametrize("N, E", [(96, 6), (64, 16), (75, 8)])
def test_base_is_near_the_optimum(N, E):
    for name, s in hard_cases(N, E).items():
        got, best = value(s, balanced_assignment(s)), optimum(s)
        assert best - 2 * 0.05 * N * sigma(s) - 1e-3 <= got <= best + 1e-2, name
        shuffled = max(value(s, torch.arange(N)[torch.randperm(N)] % E) for _ in range(20))
        assert got >= shuffled - 1e-3, name


def test_base_gate():
    gate, (x, ids) = BASE(D, 5), data(43)
    assert torch.allclose(gate.weight @ gate.weight.T, 0.01 * torch.eye(5), atol=1e-6)
    with torch.no_grad():
        gate.weight[0] += 3 * x.mean(0) + 1  # a crowded expert
    r = gate(x, ids)
    a, s = r.G.argmax(1), x @ gate.weight.T
    counts = (r.G > 0).sum(0)
    assert ((r.G > 0).sum(1) == 1).all() and counts.max() == 9 and counts.min() == 8
    assert torch.allclose(r.G.sum(1), s.gather(1, a[:, None])[:, 0].sigmoid())
    assert float(r.aux["greedy_load"].detach()) == pytest.approx(5 * float(s.argmax(1).bincount().max()) / 43)
    r.G.sum().backward()  # the sigmoid is the only way to W
    w = r.G.sum(1).detach()
    want = torch.zeros(5, D).index_add(0, a, (w * (1 - w))[:, None] * x)
    assert torch.allclose(gate.weight.grad, want, atol=1e-5)


def test_base_is_greedy_and_causal_at_evaluation_only():
    gate, (x, ids) = BASE(D, 4), data(64)
    x[32:] += 2 * x[0]
    assert not torch.equal(gate(x[:32], ids[:32]).G > 0, gate(x, ids).G[:32] > 0)  # training looks ahead
    gate.eval()
    G = gate(x, ids).G
    assert torch.equal(G.argmax(1), (x @ gate.weight.T).argmax(1)) and torch.equal(gate(x[:32], ids[:32]).G, G[:32])


def test_base_deals_out_each_group_by_itself():
    gate, (x, ids) = BASE(D, 4), data(50)
    G = gate(x, ids, Place(50, sizes=[16, 33, 1])).G
    for rows, part in zip(x.split([16, 33, 1]), G.split([16, 33, 1])):
        assert torch.allclose(part, gate(rows, None).G, atol=1e-6)
        assert (part > 0).sum(0).max() - (part > 0).sum(0).min() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# StableMoE


def stable(**knobs):
    gate = StableMoE(D, 4, V, steps=100, **knobs)
    gate.set_step(0)
    return gate


def test_stablemoe_stages():
    gate, (x, ids) = stable(), data()
    content, known = (x @ gate.weight.T).argmax(1), (gate.words[ids] @ gate.what.T).argmax(1)
    assert not torch.equal(content, known)
    chosen = {}
    for step in (0, 9, 10, 99):
        gate.set_step(step)
        r = gate(x, ids)
        chosen[step] = r.G.argmax(1)
        w = (x @ gate.weight.T).gather(1, chosen[step][:, None]).sigmoid()[:, 0]
        assert torch.allclose(r.G.sum(1), w)  # in both stages the weight comes from the content
        assert bool(r.aux["distill"] == 0) == bool(r.aux["balance"] == 0) == (step >= 10)
    assert torch.equal(chosen[0], content) and torch.equal(chosen[9], content)
    assert torch.equal(chosen[10], known) and torch.equal(chosen[99], known)
    gate.set_step(0)
    gate.eval()
    assert torch.equal(gate(x, ids).G.argmax(1), known)  # the distilled router evaluates, in stage 1 too
    assert float(gate(x, ids).aux["agreement"].detach()) == pytest.approx(float((content == known).float().mean()))


def test_stablemoe_balance_loss():
    gate = stable()
    x = torch.cat([torch.eye(4).repeat_interleave(torch.tensor([5, 1, 1, 1]), 0), torch.zeros(8, D - 4)], 1)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(4, D))
    r = gate(x, torch.zeros(8, dtype=torch.long))
    p = 1 / (1 + math.exp(-1))  # loads 5, 1, 1, 1 of mean 2: factors 1.5 and -0.5
    assert float(r.aux["balance"].detach()) == pytest.approx((5 * 1.5 * p - 3 * 0.5 * p) / 8, rel=1e-5)
    r.aux["balance"].backward()
    slope = gate.weight.grad.diagonal()
    assert slope[0] == pytest.approx(5 * 1.5 * p * (1 - p) / 8, rel=1e-4) and (slope[1:] < 0).all()
    even = torch.cat([torch.eye(4).repeat(3, 1), torch.zeros(12, D - 4)], 1)
    assert float(gate(even, torch.zeros(12, dtype=torch.long)).aux["balance"].detach()) == 0


def test_stablemoe_distillation_touches_only_the_distilled_router():
    gate, (x, ids) = stable(), data()
    x.requires_grad_()
    r = gate(x, ids)
    content = (x @ gate.weight.T).argmax(1)
    logp = (gate.words[ids] @ gate.what.T).log_softmax(1)
    assert float(r.aux["distill"].detach()) == pytest.approx(
        -float(logp.gather(1, content[:, None]).mean().detach()), rel=1e-5
    )
    r.aux["distill"].backward()
    assert x.grad is None and gate.weight.grad is None
    assert gate.words.grad.abs().max() > 0 and gate.what.grad.abs().max() > 0


def train(gate, optimizer, steps, x, ids):
    for step in steps:
        gate.set_step(step)
        optimizer.zero_grad()
        r = gate(x, ids)
        (total_loss(gate, r) - 2 * r.G.sum()).backward()
        for p in gate.parameters():  # as when gradients are summed over ranks: a missing one counts as zero
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        gate.update()


def test_stablemoe_learns_then_freezes():
    gate, ids = stable(), torch.randint(V, (200,))
    x = torch.randn(V, D)[ids]
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.05, weight_decay=0.1)
    before = float(gate(x, ids).aux["agreement"].detach())
    train(gate, optimizer, range(10), x, ids)
    after = float(gate(x, ids).aux["agreement"].detach())
    assert after > max(before, 0.8)
    gate(x, ids).aux["distill"].backward()
    gate.set_step(10)
    assert gate.words.grad is None and gate.what.grad is None  # a gradient left over from stage 1 is gone
    gate.set_step(9)
    frozen, weight = (gate.words.clone(), gate.what.clone()), gate.weight.clone()
    chosen = gate.eval()(x, ids).G > 0
    gate.train()
    train(gate, optimizer, range(10, 100), x, ids)
    assert torch.equal(gate.words, frozen[0]) and torch.equal(gate.what, frozen[1])
    assert gate.words.grad is None and not gate.words.requires_grad and not torch.equal(gate.weight, weight)
    assert torch.equal(gate(x, ids).G > 0, chosen)  # the routing too

    resumed = stable()
    resumed.load_state_dict(gate.state_dict())
    assert torch.equal(resumed(x, ids).G, gate(x, ids).G)  # stage 2 comes with the checkpoint
    resumed.set_step(100)
    assert not resumed.words.requires_grad and torch.equal(resumed(x, ids).G, gate(x, ids).G)
    resumed.set_step(3)
    assert resumed.words.requires_grad and float(resumed(x, ids).aux["distill"].detach()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Permutation search


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_best_permutation_by_enumeration(n):
    for score in (torch.randn(n, n), torch.randint(3, (n, n)).float(), torch.zeros(n, n), torch.randn(n, n) * 1e4):
        got = best_permutation(score)
        assert got.sort().values.tolist() == list(range(n))
        best = max(sum(float(score[i, p[i]]) for i in range(n)) for p in itertools.permutations(range(n)))
        assert float(score.double().gather(1, got[:, None]).sum()) == pytest.approx(best, rel=1e-5, abs=1e-5)


def permuted(gate=None, schedule="corrected", steps=100):
    gate = Permuted(gate or TopK(D, 5, k=2), steps=steps, search=0.1, schedule=schedule)  # T = 10
    gate.set_step(0)
    return gate


CYCLE = [1, 2, 0, 4, 3]  # output i feeds expert CYCLE[i]: not its own inverse


def with_cycle(gate):
    with torch.no_grad():
        gate.logits.copy_(torch.eye(5)[CYCLE])
    gate.set_step(1)
    return gate


@pytest.mark.parametrize("schedule", ["corrected", "official"])
def test_permutation_multiplies_on_the_right(schedule):
    gate, (x, ids) = with_cycle(permuted(schedule=schedule)), data()
    P, G = torch.eye(5)[CYCLE], gate.gate(x, ids).G
    for step in (5, 9, 50):
        gate.set_step(step)
        got = gate.eval()(x, ids).G
        assert torch.equal(got, G @ P) and not torch.equal(got, G @ P.T)
    gate.train()
    assert torch.equal(gate(x, ids).G, G @ P)  # step 50: frozen in training too
    soft = with_cycle(permuted(gate.gate, schedule=schedule))
    assert torch.allclose(soft(x, ids).G, G @ P, atol=1e-3) and float(soft(x, ids).aux["permutation"].detach()) < 0.1
    experts = torch.randn(5, D)  # permuting columns of G is the same as feeding the experts in another order
    assert torch.allclose(got @ experts, G @ experts[CYCLE], atol=1e-6)


@pytest.mark.parametrize("schedule", ["corrected", "official"])
def test_permutation_is_soft_before_T_and_hard_from_T(schedule):
    gate, (x, ids) = permuted(schedule=schedule), data()
    plain = gate.gate(x, ids).G
    for step in range(12):
        gate.set_step(step)
        gate.zero_grad()
        r = gate(x, ids)
        assert torch.allclose(r.G.sum(1), plain.sum(1), atol=1e-5)
        total_loss(gate, r).backward()
        if step + 1 < 10:
            assert gate.logits.grad is not None and float(r.aux["permutation"].detach()) > 0
            assert (r.G > 0).sum() > (plain > 0).sum()
            with torch.no_grad():
                gate.logits += 0.01 * torch.randn(5, 5)
        else:
            assert (
                gate.logits.grad is None and not gate.logits.requires_grad and float(r.aux["permutation"].detach()) == 0
            )
            assert torch.equal(r.G, plain[:, gate.source])
    frozen = gate.source.clone()
    assert frozen.sort().values.equal(torch.arange(5))
    if schedule == "corrected":
        assert torch.equal(best_permutation(gate.logits)[frozen], torch.arange(5))
    with torch.no_grad():
        gate.logits.copy_(torch.randn(5, 5))
    gate.set_step(50)
    gate(x, ids), gate.eval()(x, ids)
    assert torch.equal(gate.source, frozen)


def test_permutation_schedules():
    gate, official = permuted(), permuted(schedule="official")
    for step, tau, tau_official, iterations in ((4, 10**-2.15, 1e-5, 85), (9, 1e-3, 1e-7, 150), (70, 1e-3, 1e-7, 150)):
        gate.set_step(step), official.set_step(step)
        assert float(gate.tau) == pytest.approx(tau, rel=1e-4) and float(official.tau) == pytest.approx(
            tau_official, rel=1e-4
        )
        assert int(gate.iterations) == int(official.iterations) == iterations
    for step in range(9):
        gate.set_step(step), official.set_step(step)
        P, Q = gate.soft(), official.soft()
        assert torch.allclose(P.sum(1), torch.ones(5), atol=1e-5) and (P.sum(0) - 1).abs().max() < 0.1
        assert torch.allclose(Q.sum(0), torch.ones(5), atol=1e-5)


def test_evaluation_during_the_search():
    gate, (x, ids) = permuted(), data()
    plain = gate.gate(x, ids).G
    assert torch.equal(gate.eval()(x, ids).G, plain)  # before any training: the identity
    for step in (1, 2, 5):
        gate.set_step(step)
        with torch.no_grad():
            gate.logits.copy_(torch.randn(5, 5))
        to = best_permutation(gate.logits)
        assert torch.equal(gate(x, ids).G, plain @ torch.eye(5)[to])


def test_permutation_is_left_alone_by_adamw_after_T():
    gate, (x, ids) = permuted(), data()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.01, weight_decay=0.1)
    start = gate.logits.clone()
    train(gate, optimizer, range(9), x, ids)
    searched = gate.logits.clone()
    assert not torch.equal(searched, start)
    train(gate, optimizer, range(9, 60), x, ids)
    assert torch.equal(gate.logits, searched)


@pytest.mark.parametrize("schedule", ["corrected", "official"])
@pytest.mark.parametrize("step", [4, 8, 30])
def test_permutation_resumes(schedule, step):
    gate, (x, ids) = permuted(schedule=schedule), data()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.01)
    train(gate, optimizer, range(step + 1), x, ids)
    resumed = permuted(schedule=schedule)
    resumed.load_state_dict(gate.state_dict())
    assert torch.equal(resumed(x, ids).G, gate(x, ids).G)
    for later in (step + 1, 40):
        resumed.set_step(later), gate.set_step(later)
        assert torch.equal(resumed.source, gate.source) and torch.equal(
            resumed.train()(x, ids).G, gate.train()(x, ids).G
        )
        assert torch.equal(resumed.eval()(x, ids).G, gate.eval()(x, ids).G)


class Everything(nn.Module):
    """A gate with all extras (not a Gate, which would enter gates())."""

    D, E, k, looks_ahead, drop_order, loss_weights = D, 5, 3, "always", "score", {"a": 2.0}
    steps = updates = 0

    def set_step(self, step):
        self.steps += 1

    def update(self):
        self.updates += 1

    def forward(self, x, ids, batch=None):
        G = x[:, :5].exp()
        return Routing(G, {"a": G.sum()}, priority=-G, capacity=torch.arange(5))


def test_permutation_wraps_everything_a_gate_may_have():
    gate, (x, ids) = with_cycle(permuted(Everything())), data()
    assert "permuted" not in gates()
    assert (gate.k, gate.E, gate.looks_ahead, gate.drop_order) == (3, 5, "always", "score")
    assert gate.loss_weights == {"a": 2.0, "permutation": 1e-4}
    gate.update()
    assert gate.gate.steps == 2 and gate.gate.updates == 1
    soft, hard = gate(x, ids), gate.eval()(x, ids)
    inverse = torch.tensor(CYCLE).argsort()
    assert torch.equal(hard.G, x[:, :5].exp()[:, inverse]) and torch.equal(hard.priority, -hard.G)
    assert hard.capacity.tolist() == inverse.tolist() and hard.capacity.dtype == torch.long
    assert soft.priority.shape == (40, 5) and soft.capacity is None  # while P is soft every expert sees every token


def test_permutation_of_one_expert():
    gate, (x, ids) = permuted(COMET(D, 1, 1)), data()
    for step in (0, 5, 9):
        gate.set_step(step)
        assert torch.allclose(gate(x, ids).G, torch.ones(40, 1))


# ---------------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize(
    "make",
    [
        lambda: BASE(D, 6),
        lambda: stable(),
        lambda: DSelectK(D, 6),
        lambda: DSelectK(D, 8, static=True),
        lambda: COMET(D, 6),
        lambda: permuted(),
    ],
)
def test_routing_is_float32_under_autocast_and_survives_odd_batches(make):
    gate = make()
    for x in (torch.randn(1, D), torch.randn(1, D).expand(9, D), torch.zeros(9, D), torch.randn(9, D)):
        ids = torch.zeros(len(x), dtype=torch.long)
        for mode in (True, False):
            r = gate.train(mode)(x, ids)
            with torch.autocast("cpu", torch.bfloat16):
                again = gate(x, ids).G
            assert r.G.shape == (len(x), gate.E) and r.G.isfinite().all() and (r.G >= 0).all()
            assert again.dtype == torch.float32 and torch.equal(again, r.G)
            if r.G.requires_grad:
                gate.zero_grad()
                total_loss(gate, r).backward()
                assert all(p.grad is None or p.grad.isfinite().all() for p in gate.parameters())
