"""
The basic gates (Soft, TopK, NoisyTopK, GShard, Switch, Hash, BASE), the two losses they share, the score-function term
of train.py, and masked tokens at the gates that route by id: each against something independent of its code, that is a
formula in numpy, numbers worked by hand, an enumeration, a count or a certificate.

A gate whose weight is the identity has x as its logits, so a test writes down the logits it wants.
"""

import functools
import itertools
import math
import types
from statistics import NormalDist

import numpy as np
import pytest
import torch

import evomoe
import router
import train
from data.batches import mask_tokens
from data.bpe import Tokenizer
from dist import Mesh
from experts import feed_forward
from model import RoBERTa
from router import (
    BASE, Place, GShard, Hash, NoisyTopK, Soft, Switch, TopK,
    balance_loss, balanced_assignment, balanced_table, best_assignment, skip_weights, z_loss,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def identity(cls, E, **more):
    """A gate in float64 with logits = x."""
    gate = cls(E, E, **more).double()
    gate.weight.data = torch.eye(E, dtype=torch.float64)
    return gate


def doubles(rows):
    return torch.tensor(rows, dtype=torch.float64)


def route(gate, x):
    return gate(x, torch.zeros(len(x), dtype=torch.long))


def softmax(z):
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# Content decides


def test_soft_is_the_softmax():
    gate, x = Soft(6, 5).double(), torch.randn(40, 6, dtype=torch.float64)
    r = route(gate, x)
    assert np.allclose(r.G.detach().numpy(), softmax(x.numpy() @ gate.weight.detach().numpy().T), atol=1e-12)
    assert (r.G > 0).all() and not r.aux
    assert (route(Soft(6, 1), x.float()).G == 1).all()


@pytest.mark.parametrize("k, want, tied", [
    (1, [0, 0.6, 0], [0, 0, 0.5]), (2, [1 / 3, 2 / 3, 0], [0, 1 / 3, 2 / 3]),
    (3, [0.3, 0.6, 0.1], [0.25, 0.25, 0.5])])  # fmt: skip
def test_topk_by_hand(k, want, tied):
    """p = (.3, .6, .1), and (.25, .5, .25) with a tie. k = 1 keeps p itself, k >= 2 shares out 1."""
    G = route(identity(TopK, 3, k=k), doubles([[3, 6, 1], [1, 2, 1]]).log()).G
    assert np.allclose(G[0].tolist(), want) and np.allclose(sorted(G[1].tolist()), tied)


@pytest.mark.parametrize(
    "cls, k",
    [(TopK, 1), (TopK, 2), (TopK, 5), (NoisyTopK, 1), (NoisyTopK, 2), (NoisyTopK, 5), (Switch, 1), (GShard, 2)],
)
def test_ties_use_exactly_k_experts(cls, k):
    gate = cls(5, 5, k=k) if cls in (TopK, NoisyTopK) else cls(5, 5)
    gate.weight.data = torch.eye(5)
    for x in (torch.zeros(7, 5), torch.ones(7, 5), torch.randint(2, (50, 5)).float()):
        assert ((route(gate.eval(), x).G > 0).sum(1) == k).all()


def test_switch_is_the_softmax_at_the_argmax():
    gate, x = Switch(6, 5).double().eval(), torch.randn(40, 6, dtype=torch.float64)
    p = softmax(x.numpy() @ gate.weight.detach().numpy().T)
    G = route(gate, x).G.detach().numpy()
    assert np.allclose(G, p * (p == p.max(1, keepdims=True)), atol=1e-12)


def test_switch_jitter():
    """Two experts, logits (x0 - x1, 0): G tells what the jittered x0 - x1 was. At x = (3, 1) and jitter 0.1 it lies in
    2 +- 0.4 if each number has a factor of its own, in 2 +- 0.2 if a token had only one."""
    gate = Switch(2, 2, jitter=0.1).double()
    gate.weight.data = doubles([[1, -1], [0, 0]])
    x = doubles([[3, 1]]).repeat(4000, 1)
    p = route(gate, x).G.detach()[:, 0]
    seen = (p / (1 - p)).log()
    assert 1.6 <= seen.min() < 1.64 and 2.36 < seen.max() <= 2.4 and seen.mean() == pytest.approx(2, abs=0.01)
    assert (x == doubles([3, 1])).all()  # the experts will see x, not what the router saw
    for training, jitter in ((False, 0.1), (True, 0.0)):
        gate.train(training).jitter = jitter
        assert (route(gate, x).G[:, 0] - 1 / (1 + math.exp(-2))).abs().max() < 1e-12
    assert Switch(2, 2).jitter == 0.01


def test_switch_learns_through_p():
    """y = p_a v_a: dy / dlogit_j = v_a p_a ([j = a] - p_j), and the logits are x W^T."""
    gate, x, v = (
        Switch(6, 5, jitter=0.0).double(),
        torch.randn(40, 6, dtype=torch.float64),
        torch.randn(40, 5, dtype=torch.float64),
    )
    p = softmax(x.numpy() @ gate.weight.detach().numpy().T)
    (route(gate, x).G * v).sum().backward()
    a = p.argmax(1)
    slope = (v.numpy() * p)[np.arange(40), a][:, None] * (np.eye(5)[a] - p)
    assert np.allclose(gate.weight.grad.numpy(), slope.T @ x.numpy(), atol=1e-12) and np.abs(slope).max() > 0.01


def test_gshard_by_hand():
    """p = (.6, .3, .1): weights 2/3 and 1/3, all first choices at expert 0, so that the balance loss is 3 * .6."""
    gate, x = identity(GShard, 3), doubles([[6, 3, 1]]).log().repeat(4000, 1)
    r = route(gate.eval(), x)
    assert np.allclose(r.G[0].tolist(), [2 / 3, 1 / 3, 0]) and float(r.aux["balance"].detach()) == pytest.approx(1.8)
    r = route(gate.train(), x)
    second = r.G[:, 1] > 0
    assert (
        np.allclose(r.G[:, 0].tolist(), 2 / 3)
        and np.allclose(r.G[second, 1].tolist(), 1 / 3)
        and (r.G[:, 2] == 0).all()
    )
    assert second.double().mean() == pytest.approx(2 / 3, abs=0.04)  # five standard deviations
    assert float(r.aux["balance"].detach()) == pytest.approx(1.8)


@pytest.mark.parametrize("g2", [0.02, 0.1, 0.25, 0.4, 0.5])
def test_gshard_uses_the_second_expert_with_probability_2_g2(g2):
    gate, x = identity(GShard, 2), doubles([[1 - g2, g2]]).log().repeat(4000, 1)
    used = (route(gate, x).G > 0).double()
    assert used[:, 0].all() if g2 < 0.5 else used.all()
    assert used.mean(0).min() == pytest.approx(min(1, 2 * g2), abs=0.04)
    assert (route(gate.eval(), x).G > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# The losses


def test_balance_loss_by_hand():
    batch = Place(3)
    p = doubles([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]]).requires_grad_()  # P = (.6, .4), f = (2/3, 1/3)
    chosen = (p.detach() > 0.5) * p / p.detach()  # 0 or 1, with a gradient that nobody may take
    loss = balance_loss(p, chosen, batch)
    assert loss.item() == pytest.approx(2 * (2 / 3 * 0.6 + 1 / 3 * 0.4))
    (slope,) = torch.autograd.grad(loss, p)
    assert np.allclose(slope.numpy(), [[4 / 9, 2 / 9]] * 3)  # E f / N: only the means move, the counts stay
    top2 = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 0]]).bool()  # six choices: f = (3, 2, 1) / 6
    p = doubles([[0.6, 0.3, 0.1], [0.6, 0.1, 0.3], [0.6, 0.2, 0.2]])
    assert balance_loss(p, top2, batch).item() == pytest.approx(3 * (3 * 0.6 + 2 * 0.2 + 1 * 0.2) / 6)
    assert balance_loss(p, torch.eye(3).bool(), batch).item() == pytest.approx(1)  # balanced, whatever p is
    all_to_one = doubles([[0, 1, 0]] * 3)
    assert balance_loss(all_to_one, all_to_one.bool(), batch).item() == 3
    p = doubles([[0.51, 0.49]] + [[0.1, 0.9]] + [[0.51, 0.49]])
    assert balance_loss(p, p > 0.5, batch).item() < 1  # 1 is not the minimum


def test_z_loss_by_hand():
    logits = doubles([[1, 1], [3, 1]]).log()  # logsumexp: log 2 and log 4 = 2 log 2
    assert z_loss(logits, Place(2)).item() == pytest.approx(2.5 * math.log(2) ** 2)
    assert z_loss(logits - math.log(2), Place(2)).item() == pytest.approx(0.5 * math.log(2) ** 2)  # a shift counts
    for gate in (TopK(2, 2, k=1), Switch(2, 2, jitter=0.0)):
        gate.double().weight.data = torch.eye(2, dtype=torch.float64)
        aux = route(gate, logits).aux
        assert aux["z"].item() == pytest.approx(2.5 * math.log(2) ** 2)
        assert aux["balance"].item() == pytest.approx(2 * (0.5 + 0.75) / 2)  # the tie goes to expert 0 too: f = (1, 0)


def test_noisy_topk_importance_by_hand():
    """Two tokens, k = 2: G = (.75, .25, 0) and (.25, 0, .75). Importance (1, .25, .75): mean 2/3, variance 7/72."""
    gate = identity(NoisyTopK, 3, k=2).eval()
    r = route(gate, doubles([[3, 1, 0.1], [1, 0.1, 3]]).log())
    assert np.allclose(r.G.tolist(), [[0.75, 0.25, 0], [0.25, 0, 0.75]])
    assert r.aux["importance"].item() == pytest.approx(7 / 72 / (4 / 9)) and "load" not in r.aux


@pytest.mark.parametrize("k", [1, 2, 4])
def test_noisy_topk_load_is_the_chance_of_a_redraw(k, monkeypatch):
    """P(x, i) by drawing expert i's noise 4000 times again, at its quantiles, while the others keep theirs."""
    E, M = 5, 4000
    gate = NoisyTopK(3, E, k).double()
    for w in (gate.weight, gate.noise):
        w.data.normal_()
    x, held = torch.randn(6, 3, dtype=torch.float64), np.random.default_rng(1).normal(size=(6, E))
    clean, sigma = (x.numpy() @ w.detach().numpy().T for w in (gate.weight, gate.noise))
    sigma = np.log1p(np.exp(sigma)) + 0.01
    redrawn = np.array([NormalDist().inv_cdf((m + 0.5) / M) for m in range(M)])
    want = np.zeros((6, E))
    for n, i in itertools.product(range(6), range(E)):
        h = np.tile(clean[n] + sigma[n] * held[n], (M, 1))
        h[:, i] = clean[n, i] + sigma[n, i] * redrawn
        want[n, i] = ((h > h[:, i : i + 1]).sum(1) < k).mean()

    batch, summed = Place(6), []
    batch.normal = lambda *shape: torch.from_numpy(held)
    r = gate(x, None, batch)
    load = want.sum(0)
    assert r.aux["load"].item() == pytest.approx(load.var() / load.mean() ** 2, abs=2e-3)
    assert r.G.shape == (6, E) and ((r.G > 0).sum(1) == k).all()
    monkeypatch.setattr(router, "cv_squared", lambda t: summed.append(t) or t.sum())
    for n in range(6):
        batch = Place(1)
        batch.normal = lambda *shape: torch.from_numpy(held[n : n + 1])
        gate(x[n : n + 1], None, batch)
        assert np.abs(summed[-1].detach().numpy() - want[n]).max() < 1 / M
    assert ((want > 0.05) & (want < 0.95)).sum() > 5  # the example is not a trivial one


# ---------------------------------------------------------------------------------------------------------------------
# The token id decides


def zipf(V):
    return [int(10_000 / (t + 1)) for t in np.random.default_rng(0).permutation(V)]


@pytest.mark.parametrize(
    "counts, E", [(zipf(500), 8), (zipf(50), 7), ([5] * 12, 4), ([0] * 9, 3), ([100, 1, 1], 8), (zipf(300), 1)]
)
def test_balanced_table_is_within_one_token_of_even(counts, E):
    table = balanced_table(counts, E)
    load = [sum(c for c, e in zip(counts, table.tolist()) if e == expert) for expert in range(E)]
    assert len(table) == len(counts) and max(load) <= sum(counts) / E + max(counts)
    if counts == [5] * 12:
        assert load == [15] * 4
    if counts == zipf(500):  # even, but for the most frequent token, which is more than a share by itself
        assert max(load) == max(counts) and np.ptp(sorted(load)[:-1]) < 0.01 * sum(counts) / E


def test_unseen_ids_are_dealt_out_too():
    """They weigh nothing, so the lightest expert stays the lightest and would get them all; held-out text has them."""
    counts = zipf(300) + [0] * 100
    table = balanced_table(counts, 8)
    assert np.ptp(table[300:].bincount(minlength=8).numpy()) <= 1 and torch.equal(
        table[:300], balanced_table(counts[:300], 8)
    )


def test_counts_may_be_fractions():
    """As RoBERTa's are, of which a part is masked: one of .9 weighs as much as three of .3."""
    (table,) = Hash(4, 2, 4, counts=[0.9, 0.3, 0.3, 0.3]).table.tolist()
    assert table in ([0, 1, 1, 1], [1, 0, 0, 0])


@pytest.mark.parametrize("kind", ["balanced", "random"])
def test_hash_depends_on_seed_and_layer_alone(kind):
    V, counts = 500, zipf(500)
    make = lambda layer=1, seed=2, D=4: Hash(D, 8, V, kind=kind, counts=counts, layer=layer, seed=seed).table
    table = make()
    torch.randn(7)  # whatever else was drawn
    assert torch.equal(table, make()) and torch.equal(table, make(D=9))
    for other in (make(layer=2), make(seed=3), make(layer=2, seed=1)):
        assert (table != other).float().mean() > 0.5
    if kind == "random":
        assert table[0].bincount(minlength=8).min() > 30  # 62.5 ids an expert


@pytest.mark.parametrize("kind", ["balanced", "random"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_hash_routes_by_id(kind, k):
    """k experts, one of each pool, with weight 1; the same id goes to the same experts, wherever it stands."""
    E, V, counts = 8, 300, zipf(300)
    gate = Hash(4, E, V, k=k, kind=kind, counts=counts)
    ids = torch.randint(V, (2000,))
    G = gate(torch.randn(2000, 4), ids).G
    assert set(G.unique().tolist()) == {0.0, 1.0} and (G.view(2000, k, E // k).sum(2) == 1).all()
    again = gate.eval()(torch.randn(2000, 4), ids.flip(0)).G.flip(0)
    assert torch.equal(G, again)
    seen = {}
    for token, row in zip(ids.tolist(), G.tolist()):
        assert seen.setdefault(token, row) == row
    assert not list(gate.parameters()) and "table" in gate.state_dict()
    if kind == "balanced":
        whole = gate(torch.zeros(V, 4), torch.arange(V)).G
        load = (whole * torch.tensor(counts)[:, None]).sum(0)
        assert load.max() <= sum(counts) / (E // k) + max(counts)


class Text:
    """A batch of masked text, twice: the second has other tokens under the masks."""

    tok = Tokenizer("bytes", [bytes([i]) for i in range(60)])

    def __init__(self, B=4, T=64):
        a = torch.randint(60, (B, T))
        self.x, self.y = mask_tokens(a, self.tok, np.random.default_rng(0), share=0.5)
        self.hidden = self.x == self.tok.mask
        b = torch.where(self.hidden, (a + 1 + torch.randint(58, a.shape)) % 60, a)
        self.x2, self.y2 = mask_tokens(b, self.tok, np.random.default_rng(0), share=0.5)


@pytest.mark.parametrize("name", ["hash", "stablemoe", "randomrouted"])
@pytest.mark.parametrize("training", [True, False])
def test_masked_tokens_are_spread_and_do_not_tell_what_is_under_them(name, training):
    text = Text()
    cfg = train.Config(n_layer=2, n_head=2, n_embd=16, n_experts=4, block_size=64, max_steps=10, k=0, gate=name)
    ids = text.tok.vocab_size + cfg.block_size
    counts = RoBERTa.route_counts(torch.ones(text.tok.vocab_size), cfg.block_size)
    ffn = functools.partial(feed_forward, cfg, V=ids, counts=counts, steps=cfg.max_steps)
    model = RoBERTa(cfg, text.tok.vocab_size, ffn, text.tok.mask).train(training)
    evomoe.set_step(model, cfg.max_steps, cfg)  # StableMoE in its second stage: by id in training too
    seen = []
    for gate in model.gates():
        gate.register_forward_hook(lambda gate, args, r: seen.append((args[1], r.G)))
    for x, y in ((text.x, text.y), (text.x2, text.y2)):
        train.task_loss(model, dict(x=x, y=y))
    (ids, G), (ids2, G2) = seen
    assert (text.y != text.y2)[text.hidden].all() and text.hidden.sum() > 80
    assert torch.equal(ids, ids2) and torch.equal(G, G2)

    hidden, position = text.hidden.flatten(), torch.arange(64).repeat(4)
    assert torch.equal(ids[hidden], text.tok.vocab_size + position[hidden])  # an id for each position of a mask
    assert torch.equal(ids[~hidden], text.x.flatten()[~hidden])
    load = (G[hidden] > 0).sum(0)
    assert load.sum() == hidden.sum() and load.min() > 0 and load.max() < 0.6 * load.sum()


# ---------------------------------------------------------------------------------------------------------------------
# BASE


@pytest.mark.parametrize("case", ["normal", "skewed", "low rank", "almost repeated"])
def test_balanced_assignment_against_a_certified_optimum(case):
    """N = 2048, E = 8. The exact sum comes with its proof: any prices v bound every balanced assignment from above by
    sum_n max_e (S[n, e] - v_e) + (N / E) sum_e v_e, and for the right v the bound is attained."""
    N, E = 2048, 8
    s = {
        "normal": lambda: torch.randn(N, E),
        "skewed": lambda: torch.randn(N, E) + 5 * torch.randn(E),
        "low rank": lambda: torch.randn(N, 2) @ torch.randn(2, E),
        "almost repeated": lambda: torch.randn(5, E)[torch.randint(5, (N,))] + 0.05 * torch.randn(N, E),
    }[case]().double()
    z, dist = best_assignment(s, N // E)
    v = dist[:, 0]
    bound = float((s - v).amax(1).sum() + N // E * v.sum())
    best = float(s.gather(1, z[:, None]).sum())
    assert z.bincount(minlength=E).tolist() == [N // E] * E and best == pytest.approx(bound, abs=1e-6)

    a = balanced_assignment(s)
    got = float(s.gather(1, a[:, None]).sum())
    inner = s - s.mean(1, keepdim=True)
    sigma = float((inner - inner.mean(0)).std(unbiased=False))
    assert a.bincount(minlength=E).tolist() == [N // E] * E
    assert best - 2 * N * 0.05 * sigma <= got <= best + 1e-6
    if case == "normal":
        assert best - got < 0.005 * N * sigma  # "as a rule"
    gate = BASE(E, E).double()
    gate.weight.data = torch.eye(E, dtype=torch.float64)
    G = route(gate, s).G
    assert torch.equal(G.argmax(1), a) and torch.equal((G > 0).sum(1), torch.ones(N, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------------
# The score-function term
#
# Three sequences, each makes two choices, the second after the first (as one layer after another) and so with
# probabilities that depend on it; both move the losses of its one or two targets.

X, AIM = doubles([0.7, -1.1, 0.4]), doubles([[1.0, -0.5], [0.3, 2.0], [-1.2, 0.0]])
PICK = torch.tensor([[True, True], [True, True], [True, False]])
MESH = Mesh()


def parameters():
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2,), (2, 2), (2, 2))]


def log_p(first, second, z):
    """log p of the choices z (B, 2), (B,)."""
    a = (X[:, None] * first).log_softmax(1).gather(1, z[:, :1])
    b = (X[:, None] * second[z[:, 0]]).log_softmax(1).gather(1, z[:, 1:])
    return (a + b)[:, 0]


def losses(expert, z):
    """(B, T) squared errors."""
    return (AIM - X[:, None] * expert[z[:, 0], z[:, 1]][:, None]).square()


def test_score_function_term_is_unbiased():
    first, second, expert = p = parameters()
    mean = lambda loss: (loss * PICK).sum(1) / PICK.sum(1)  # (B,)
    each = [torch.tensor([z] * 3) for z in itertools.product((0, 1), repeat=2)]
    exact = sum((log_p(first, second, z).exp() * mean(losses(expert, z))).sum() for z in each) / 3
    exact = torch.autograd.grad(exact, p)
    total = 0.0
    for z in itertools.product((0, 1), repeat=6):
        z = torch.tensor(z).view(3, 2)
        lp, loss = log_p(first, second, z), losses(expert, z)
        chance = lp.sum().exp().detach()
        total = total + chance * (router.score_function_term(lp, loss[PICK], PICK, 3, MESH) + mean(loss).mean())
    for got, want in zip(torch.autograd.grad(total, p), exact):
        assert np.allclose(got.numpy(), want.numpy(), atol=1e-12)
    assert np.abs(exact[0].numpy()).max() > 0.01


def test_score_function_term_by_hand():
    """Sequence losses 2, 4, 9; the others' means 6.5, 5.5, 3. And a sequence alone has no baseline."""
    nll, lp = doubles([1, 3, 4, 4, 9]), doubles([0.5, 0.25, 1.0]).requires_grad_()
    term = router.score_function_term(lp, nll.requires_grad_(), PICK, 3, MESH)
    assert term.item() == pytest.approx((-4.5 * 0.5 - 1.5 * 0.25 + 6 * 1.0) / 3)
    slope, no = torch.autograd.grad(term, (lp, nll), allow_unused=True)
    assert np.allclose(slope.tolist(), [-1.5, -0.5, 2.0]) and no is None  # the advantage is a number
    alone = router.score_function_term(doubles([0.5]), doubles([1, 3]), PICK[:1], 1, MESH)
    assert alone.item() == pytest.approx(2 * 0.5)
    same = router.score_function_term(lp, torch.ones(5, dtype=torch.float64), PICK, 3, MESH)
    assert same.item() == 0


@pytest.mark.parametrize("c, exact", [(3, True), (2, False), (1, False)])
def test_score_function_term_is_off_when_sequences_share_a_capacity(c, exact):
    """Three sequences of one token, two experts with c slots, Skip's weights. Who is skipped has another loss, and
    whether the others are skipped depends on this one's choice: the baseline is no longer independent of it."""
    theta, phi, aim = (
        torch.randn(3, 2, dtype=torch.float64, requires_grad=True),
        doubles([-1.0, 1.2]),
        doubles([0.5, -0.8, 2.0]),
    )
    logp, loss = theta.log_softmax(1), (aim[:, None] - phi).square()
    (want,) = torch.autograd.grad((logp.exp() * loss).sum() / 3, theta, retain_graph=True)
    total, n, one = 0.0, torch.arange(3), torch.ones(3, 1, dtype=torch.bool)
    for z, u in itertools.product(itertools.product((0, 1), repeat=3), itertools.permutations((0.1, 0.2, 0.3))):
        z = torch.tensor(z)
        w, lp = skip_weights(z, doubles(u), 2, c), logp[n, z]
        nll = torch.where(w > 0, loss[n, z], aim.square())  # skipped: the output is 0
        total = total + lp.sum().exp().detach() / 6 * router.score_function_term(w * lp, nll, one, 3, MESH)
    (got,) = torch.autograd.grad(total, theta)
    error = float((got - want).norm() / want.norm())
    assert error < 1e-12 if exact else error > 1e-2
