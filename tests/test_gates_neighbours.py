"""LocMoE, LocMoE+, random routed experts, Kool et al.'s estimators, expert choice, DeepSeek-V3: each against something
independent of its code (enumeration, brute force, simulation, hand-worked numbers)."""

import inspect
import itertools
import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from experts import Experts, MoE
from router import (
    Place,
    DeepSeekV3,
    ExpertChoice,
    GumbelMatching,
    LocMoE,
    LocMoEPlus,
    RandomRouted,
    Skip,
    best_assignment,
    block_means,
    cap_probability,
    locality_loss,
    gates,
    locmoe_capacity,
    make_gate,
    matching_log_q,
    queue,
    skip_weights,
)

NAMES = ["locmoe", "locmoeplus", "randomrouted", "skip", "gumbelmatching", "expertchoice", "deepseekv3"]
HOMES = torch.arange(8) // 2 == torch.arange(4)[:, None]  # (4, 8): 8 experts on 4 nodes, two each


def build(name, D, E, k=2, args=""):
    torch.manual_seed(0)
    k = k if "k" in inspect.signature(gates()[name]).parameters else 0
    return make_gate(name, args, k, D=D, E=E, V=50, layer=1, seed=0, n_domains=3, steps=100)


def kept(G, priority, capacity):
    """(N, E) bool: who keeps a slot, by a loop over experts."""
    keep = torch.zeros_like(G, dtype=torch.bool)
    for e in range(G.shape[1]):
        rows = G[:, e].nonzero()[:, 0]
        keep[rows[priority[rows, e].argsort(descending=True)[: int(capacity[e])]], e] = True
    return keep


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("N, E, k", [(1, 6, 1), (1, 1, 1), (7, 1, 1), (13, 6, 6), (24, 6, 2), (5, 12, 3), (0, 6, 2)])
def test_boundary_cases(name, N, E, k):
    gate = build(name, 12, E, k)
    for x in (torch.randn(N, 12), torch.ones(N, 12), torch.zeros(N, 12), 100 * torch.randn(N, 12)):
        for training in (True, False):
            gate.train(training)
            x.requires_grad_()
            r = gate(x, torch.zeros(N, dtype=torch.long))
            loss = r.G.sum() + sum(v.sum() for v in r.aux.values())
            assert r.G.shape == (N, E) and r.G.dtype == torch.float32 and (r.G >= 0).all() and loss.isfinite()
            if loss.requires_grad:
                loss.backward()
                assert all(t.grad is None or t.grad.isfinite().all() for t in (x, *gate.parameters()))
            most = {"expertchoice": E}.get(name, gate.k)
            assert ((r.G > 0).sum(1) <= most).all()
            if N and not training and name not in ("expertchoice",):
                assert ((r.G > 0).sum(1) == gate.k).all()  # nobody is dropped at evaluation
        gate.update()


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_routes_in_float32(name):
    gate = build(name, 24, 6)
    x, ids = torch.randn(40, 24), torch.arange(40)
    torch.manual_seed(1)
    plain = gate(x, ids)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gate(x, ids)
    assert mixed.G.dtype == torch.float32 and torch.equal(plain.G, mixed.G)
    assert gate(x.bfloat16(), ids).G.dtype == torch.float32


class Recorder:
    """A mesh of two ranks, played one after the other: sum() adds what the other rank said at the same call."""

    def __init__(self, other=None):
        self.said, self.other = [], iter(other or [])

    def sum(self, t):
        self.said.append(t.detach().clone())
        return t + next(self.other, torch.zeros_like(t))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_two_ranks_equal_one_batch_with_two_groups(name, training):
    args = {"locmoe": "noise=0.1", "locmoeplus": "capacity_factor=0.8"}.get(name, "")
    gate = build(name, 32, 8, args=args).train(training)
    x, ids, domain, node = torch.randn(50, 32), torch.arange(50), torch.arange(50) % 3, torch.arange(50) // 13
    sizes = [20, 30]

    def call(rows, sizes, mesh):
        torch.manual_seed(5)
        if name == "deepseekv3":
            gate.load.zero_()
        b = Place(len(rows), rows, 50, sizes, domain[rows], node[rows], HOMES, mesh)
        return gate(x[rows], ids[rows], b), gate.load.clone() if name == "deepseekv3" else 0

    whole, load = call(torch.arange(50), sizes, None)
    shards = torch.arange(50).split(sizes)
    said = []
    for rows in shards:
        said.append(Recorder())
        call(rows, [len(rows)], said[-1])
    parts = [call(rows, [len(rows)], Recorder(said[1 - i].said)) for i, rows in enumerate(shards)]
    assert torch.equal(torch.cat([r.G for r, _ in parts]), whole.G)
    if name == "locmoeplus" and training:
        assert torch.equal(torch.cat([r.capacity for r, _ in parts]), whole.capacity)
    for r, part_load in parts:
        for key, v in whole.aux.items():
            if key != "log_prob":
                assert torch.allclose(v, r.aux[key], atol=1e-6), key
        assert torch.equal(torch.as_tensor(load), torch.as_tensor(part_load))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_causality_is_as_declared(name, training):
    """Change the second half of the tokens: does the routing of the first half notice?"""
    gate = build(name, 32, 8).train(training)
    x, ids = torch.randn(64, 32), torch.arange(64) % 50
    other = torch.cat([x[:32], x[:32] + 0.1 * torch.randn(32, 32)])

    def route(x):
        torch.manual_seed(3)
        r = gate(x, ids)
        return r.G * kept(r.G, r.priority, r.capacity[0]) if r.priority is not None else r.G

    same = torch.equal(route(x)[:32], route(other)[:32])
    assert same == (gate.looks_ahead == "never" or gate.looks_ahead == "training" and not training)


def test_unusable_settings_are_one_clear_line():
    for name, args, D, E in (
        ("locmoe", "", 10, 4),
        ("locmoeplus", "", 10, 4),
        ("gumbelmatching", "capacity_factor=0.5", 8, 4),
        ("deepseekv3", "expert_groups=3", 8, 4),
        ("deepseekv3", "expert_groups=4,keep_groups=1", 8, 4),
        ("skip", "capacity_factor=0", 8, 4),
        ("locmoeplus", "capacity_factor=0", 8, 4),
        ("locmoeplus", "floor=2", 8, 4),
    ):
        with pytest.raises(ValueError) as e:
            build(name, D, E, args=args)
        assert "\n" not in str(e.value) and (
            name in str(e.value) or "--n_experts=4 must divide --n_embd=10" in str(e.value)
        )


# ---------------------------------------------------------------------------------------------------------------------
# LocMoE


def test_grouped_average_pooling_is_block_means_with_orthogonal_rows():
    x = torch.randn(5, 12)
    y = block_means(x, 3)
    for n in range(5):
        for e in range(3):
            assert y[n, e].item() == pytest.approx(sum(x[n, 4 * e : 4 * e + 4].tolist()) / 4, abs=1e-6)
    W = block_means(torch.eye(12), 3).T  # (E, D)
    assert torch.allclose(W @ W.T, torch.eye(3) * 3 / 12)
    assert sum(p.numel() for p in LocMoE(12, 3).parameters()) == 0
    assert sum(p.numel() for p in LocMoEPlus(12, 3).parameters()) == 0


def test_layernorm_without_bias_makes_logits_sum_to_zero():
    assert block_means(F.layer_norm(torch.randn(64, 48) + 3, (48,)), 6).sum(1).abs().max() < 1e-5


def test_relu_sends_every_negative_token_to_one_expert():
    x, ids = torch.randn(500, 128) - 0.9, torch.zeros(500, dtype=torch.long)
    loads = [(LocMoE(128, 4, relu=relu)(x, ids).G > 0).sum(0).max().item() for relu in (True, False)]
    assert loads[0] > 490 and loads[1] < 200


def test_paper_temperature_is_flat_and_unit_variance_is_not():
    x, ids = torch.randn(2000, 512), torch.zeros(2000, dtype=torch.long)
    paper = LocMoE(512, 8, unit_variance=False)(x, ids).G.sum(1).mean().item()
    ours = LocMoE(512, 8)(x, ids).G.sum(1).mean().item()
    assert paper == pytest.approx(0.149, abs=0.003) and ours > 0.3


def test_cosine_and_logit_agree_over_experts_and_not_over_tokens():
    x = torch.randn(200, 32)
    x[7] *= 10
    ids = torch.zeros(200, dtype=torch.long)
    r = LocMoEPlus(32, 4)(x, ids)
    logits = block_means(x, 4)
    assert torch.equal(logits.argmax(1), r.priority.argmax(1))
    assert not torch.equal(logits.argsort(0), r.priority.argsort(0))
    assert torch.allclose(
        r.priority, F.cosine_similarity(x[:, None], block_means(torch.eye(32), 4).T[None], dim=2), atol=1e-6
    )


def test_locality_loss_by_hand():
    eps, node = 0.1, torch.arange(4).repeat_interleave(3)
    b = Place(12, node=node, near=HOMES)
    target = torch.where(HOMES, (1 - eps) / 2, eps / 6)
    assert locality_loss(target[node], b, eps).abs() < 1e-6
    local = HOMES[node] / 2.0
    assert locality_loss(local, b, eps).item() == pytest.approx(-math.log(1 - eps), abs=1e-5)
    # the direction: KL(uniform || target), not KL(target || uniform)
    uniform = torch.full((12, 8), 1 / 8)
    assert locality_loss(uniform, b, eps).item() == pytest.approx(1.191, abs=1e-3)
    assert (target[0] * (target[0] * 8).log()).sum().item() == pytest.approx(0.919, abs=0.05)  # what it is not
    # a mean over nodes, not over tokens: node 0 has half of all tokens, and is the only one that is local
    skewed = torch.tensor([0, 0, 0, 1, 2, 3])
    p = torch.where((skewed == 0)[:, None], target[skewed], torch.full((6, 8), 1 / 8))
    assert locality_loss(p, Place(6, node=skewed, near=HOMES), eps).item() == pytest.approx(1.191 * 3 / 4, abs=1e-3)


def test_locality_loss_without_nodes_tokens_or_experts():
    p = torch.randn(6, 8).softmax(1).requires_grad_()
    one = Place(6, node=torch.zeros(6, dtype=torch.long), near=torch.ones(1, 8, dtype=torch.bool))
    assert locality_loss(p, Place(6), 0.1) == 0 and locality_loss(p, one, 0.1) == 0
    some = torch.tensor([0, 0, 0, 2, 2, 2])  # nodes 1 and 3 have no tokens here
    homes = HOMES.clone()
    homes[2] = False  # and node 2 no experts
    loss = locality_loss(p, Place(6, node=some, near=homes), 0.1)
    alone = locality_loss(p[:3], Place(3, node=some[:3], near=HOMES), 0.1)
    loss.backward()
    assert (
        loss.item() == pytest.approx(alone.item(), abs=1e-6) and p.grad.isfinite().all() and p.grad[:3].abs().sum() > 0
    )
    x = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    b = Place(6, node=torch.arange(6) // 3, near=torch.eye(2).bool().repeat_interleave(2, 1))
    assert torch.autograd.gradcheck(lambda x: locality_loss(x.softmax(1), b, 0.1), x)


def test_balance_loss_is_global():
    """Perfectly local routing is perfectly balanced in the global batch, and as bad as can be on each rank alone."""
    node = torch.arange(4).repeat_interleave(8)
    x = torch.zeros(32, 8)
    x[torch.arange(32), 2 * node + torch.arange(32) % 2] = 100.0
    gate, ids = LocMoE(8, 8), torch.zeros(32, dtype=torch.long)
    assert gate(x, ids, Place(32, node=node, near=HOMES)).aux["balance"].item() == pytest.approx(1)
    assert gate(x[:8], ids[:8]).aux["balance"].item() == pytest.approx(4)


@pytest.mark.parametrize("sharded", [False, True])
def test_only_sharded_data_becomes_local(sharded):
    """Four domains, a linear layer below the gate, only the gate's own losses. With i.i.d. shards the routing cannot
    know the node and the inter-node share stays 1 - 1/4; with one domain a node it falls."""
    torch.manual_seed(0)
    D, E, N = 32, 8, 512
    centre, below = torch.randn(4, D), torch.nn.Linear(D, D)
    gate, opt = LocMoE(D, E, locality=1.0), torch.optim.Adam(below.parameters(), lr=1e-2)
    for step in range(60):
        domain = torch.randint(4, (N,))
        node = domain if sharded else torch.randint(4, (N,))
        x = F.layer_norm(below(centre[domain] + 0.5 * torch.randn(N, D)), (D,))
        r = gate(x, domain, Place(N, node=node, near=HOMES))
        loss = sum(gate.loss_weights[key] * v for key, v in r.aux.items())
        opt.zero_grad()
        loss.backward()
        opt.step()
    share = 1 - HOMES[node].gather(1, r.G.argmax(1, keepdim=True)).float().mean().item()
    assert share < 0.1 if sharded else abs(share - 0.75) < 0.08


def test_cap_probability():
    for delta in (0.001, 0.03, 0.3, 0.9, 0.999):
        assert cap_probability(delta, 2) == pytest.approx(2 / math.pi * math.acos(delta), rel=1e-10)
        assert cap_probability(delta, 3) == pytest.approx(1 - delta, rel=1e-10)  # Archimedes
        d5 = 1 - 1.5 * delta + 0.5 * delta**3
        assert cap_probability(delta, 5) == pytest.approx(d5, rel=1e-6)
    for (D, delta), p in {(64, 0.125): 0.3211, (128, 0.177): 0.0448, (768, 0.03): 0.4061, (5120, 0.03): 0.0318}.items():
        assert cap_probability(delta, D) == pytest.approx(p, abs=1e-4)
    assert cap_probability(0, 8) == 1 and cap_probability(1, 8) == 0
    # smooth where the two continued fractions meet
    x = [cap_probability(0.17 + 0.0002 * i, 64) for i in range(50)]
    assert all(a > b for a, b in zip(x, x[1:])) and max(a - b for a, b in zip(x, x[1:])) < 0.001


def test_capacity_bound_against_simulation():
    torch.manual_seed(0)
    gate = LocMoE(64, 4)
    x = torch.randn(100_000, 64)
    chosen = gate(x, torch.zeros(1)).G > 0
    cos = block_means(F.normalize(x, dim=1), 4) * 4.0  # |w_e| = 1/4
    for delta in (0.125, 0.25, 0.375):
        q = cap_probability(delta, 64) / 2
        n_q = 1 / locmoe_capacity(delta, 64, 4)[0]
        assert n_q == pytest.approx(4 * q)
        assert ((cos >= delta).float().mean().item()) == pytest.approx(q, rel=0.05)  # one cap, not two
        p = (cos[chosen] >= delta).float().mean().item()
        assert q <= p <= min(1, n_q) * 1.05
    assert chosen.float().mean(0).sub(0.25).abs().max() < 0.01
    # equality from 1/sqrt(2) on
    x = torch.randn(200_000, 6)
    cos = block_means(F.normalize(x, dim=1), 3) * math.sqrt(2)
    assert (cos.amax(1) >= 0.75).float().mean().item() == pytest.approx(1 / locmoe_capacity(0.75, 6, 3)[0], rel=0.03)


def test_capacity_closed_form_never_overshoots():
    for D, E, delta in itertools.product((4, 16, 256, 5120), (2, 4), (0.01, 0.1, 0.3, 0.6, 0.9)):
        exact, closed = locmoe_capacity(delta, D, E)
        assert closed <= exact
    gate = LocMoE(64, 4, delta=0.375, slots=2.0)
    x, ids = torch.randn(10, 64), torch.zeros(10)
    bound = 2 / (4 * 0.0021)
    assert gate(x, ids).capacity == pytest.approx(2 * bound, rel=0.05)
    assert gate.eval()(x, ids).capacity is None and LocMoE(64, 4)(x, ids).capacity is None


# ---------------------------------------------------------------------------------------------------------------------
# LocMoE+


def test_both_sides_choose():
    x, ids = torch.randn(64, 32), torch.zeros(64, dtype=torch.long)
    r = LocMoEPlus(32, 8, k=2)(x, ids)
    C = r.capacity[0]
    keep = kept(r.G, r.priority, C)
    assert (keep <= (r.G > 0)).all() and (keep.sum(0) <= C).all() and (keep.sum(1) <= 2).all()
    assert keep.sum() < (r.G > 0).sum()
    # experts choose among those who chose them: more survive than choosers that are in the global top C
    both = torch.zeros_like(keep)
    for e in range(8):
        both[r.priority[:, e].topk(int(C[e])).indices, e] = True
    assert keep.sum() > (both & (r.G > 0)).sum()
    for e in range(8):  # the kept are the closest
        mine, out = keep[:, e], (r.G[:, e] > 0) & ~keep[:, e]
        assert not out.any() or r.priority[mine, e].min() >= r.priority[out, e].max()


def test_plus_becomes_token_choice_and_expert_choice_at_its_ends():
    x, ids = torch.randn(48, 32), torch.zeros(48, dtype=torch.long)
    one = LocMoEPlus(32, 4, k=1)(x, ids)
    keep = kept(one.G, one.priority, (one.G > 0).sum(0))
    assert torch.equal(keep, F.one_hot(block_means(x, 4).argmax(1), 4).bool())
    assert torch.equal(one.G > 0, LocMoEPlus(32, 4, k=1).eval()(x, ids).G > 0)
    every = LocMoEPlus(32, 4, k=4)(x, ids)
    keep = kept(every.G, every.priority, torch.full((4,), 12))
    cos = block_means(F.normalize(x, dim=1), 4)
    assert torch.equal(keep, torch.zeros_like(keep).scatter(0, cos.topk(12, dim=0).indices, True))


def test_plus_weights_are_the_softmax_over_the_chosen():
    x, ids = torch.randn(48, 32), torch.zeros(48, dtype=torch.long)
    for k in (2, 4):
        r = LocMoEPlus(32, 4, k=k)(x, ids)
        w = (r.priority * 32**0.5).masked_fill(r.G == 0, -math.inf).softmax(1)
        assert torch.allclose(r.G, w, atol=1e-6)
    assert LocMoEPlus(32, 4, k=1)(x, ids).G.sum(1).max() < 0.999


def test_slots_by_brute_force():
    """Steps of more and less aligned features, each held against the least aligned so far."""
    gate, ids = LocMoEPlus(32, 4, k=2, floor=0.1, capacity_factor=1.1), torch.zeros(60)
    noise, goal = torch.randn(60, 32), 2 * F.one_hot(torch.arange(60) % 4, 4).repeat_interleave(8, 1)
    most, least = math.ceil(1.1 * 2 * 60 / 4), gate.least.item()
    assert least == pytest.approx(torch.randn(20000, 4).topk(2, 1).values.relu().mean().item() * 32**-0.5, rel=0.03)
    seen = set()
    for x in (
        noise + 0.3 * goal,
        noise - 0.3 * block_means(noise, 4).repeat_interleave(8, 1),
        noise,
        noise + 0.1 * goal,
        noise + goal,
    ):
        r = gate(x, ids)
        least = min(least, r.priority.topk(2, 1).values.clamp(min=0).mean().item())
        assert gate.least.item() == pytest.approx(least)
        for e in range(4):
            a, n = sorted(r.priority[r.G[:, e] > 0, e].clamp(min=0).tolist(), reverse=True), 0
            while n < len(a) and sum(a[:n]) < most * least:
                n += 1
            want = most if sum(a) < most * least else min(max(n, math.ceil(0.1 * most)), most)
            assert (r.capacity[:, e] == want).all()
            seen.add(want)
    assert most in seen and len(seen) > 8
    gate.eval()(0.01 * noise, ids)
    assert gate.least.item() == pytest.approx(least)  # training sets the bar


def test_tokens_per_expert_fall_as_features_converge():
    """Also when they start worse than at random, and from a fresh gate."""
    torch.manual_seed(0)
    ids = torch.zeros(800, dtype=torch.long)
    direction, noise = F.one_hot(torch.arange(800) % 8, 8).repeat_interleave(8, 1).float(), torch.randn(800, 64)
    for x in (noise, noise - 0.5 * block_means(noise, 8).repeat_interleave(8, 1)):
        gate, slots = LocMoEPlus(64, 8, floor=0.2), []
        for t in (0, 0.2, 0.4, 0.6, 0.8, 1):
            r = gate(t * direction * 64**0.5 / 8 * 2 + (1 - t) * x, ids)
            assert r.aux["slots"].item() == pytest.approx(r.capacity.float().mean().item())
            slots.append(r.aux["slots"].item())
        assert (
            slots[0] > 0.85 * 110 and all(a >= b for a, b in zip(slots, slots[1:])) and 22 <= slots[-1] <= 23
        )  # the floor
        assert gate.eval()(noise, ids).capacity is None
    assert LocMoEPlus(64, 8, floor=0.2)(direction, ids).aux["slots"] < 25


def test_each_group_has_slots_of_its_own():
    torch.manual_seed(0)
    gate, x, sizes = LocMoEPlus(32, 4, floor=1), torch.randn(200, 32), [180, 20]
    C = gate(x, torch.zeros(200), Place(200, sizes=sizes)).capacity
    assert (C[:180] == math.ceil(1.1 * 180 / 4)).all() and (C[180:] == math.ceil(1.1 * 20 / 4)).all()


def test_a_batch_that_says_nothing_does_not_set_the_bar():
    gate = LocMoEPlus(32, 4)
    before = gate.least.item()
    gate(torch.zeros(0, 32), torch.zeros(0)), gate(torch.zeros(3, 32), torch.zeros(3))
    assert gate.least.item() == before > 0


def test_theorem_5_against_simulation():
    """One relevant token at a uniform place, routed to its expert with probability p; s - 1 others: each arrives at
    that expert with chance 1/E (token choice), or outscores the relevant one with chance q (expert choice)."""
    torch.manual_seed(0)
    s, E, p, q, C, trials = 64, 4, 0.6, 0.1, 8, 2500

    def cdf(n, p, c):
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(min(c, n) + 1))

    token_choice = p / s * sum(cdf(k - 1, 1 / E, C - 1) for k in range(1, s + 1))
    expert_choice = cdf(s - 1, q, C - 1)
    tcr = ecr = 0
    for _ in range(trials):
        place = torch.randint(s, (1,)).item()
        to = torch.randint(E, (s,))
        to[place] = 0 if torch.rand(1) < p else 1
        order, slot, _ = queue(to, -torch.arange(s).float(), E)  # arrival
        tcr += (to[place] == 0).item() and (slot[order == place] < C).item()
        score = torch.where(torch.rand(s) < q, 1.0, -1.0)
        score[place] = 0
        order, slot, _ = queue(torch.zeros(s, dtype=torch.long), score, E)  # affinity
        ecr += (slot[order == place] < C).item()
    assert tcr / trials == pytest.approx(token_choice, abs=0.03) and ecr / trials == pytest.approx(
        expert_choice, abs=0.03
    )


def test_queue():
    expert, key = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([0.1, 0.5, 0.9, 0.4, 0.6])
    order, place, load = queue(expert, key, 4)
    assert order.tolist() == [4, 1, 2, 3, 0] and place.tolist() == [0, 1, 0, 1, 2] and load.tolist() == [2, 0, 3, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Random routed experts


def test_random_routed_is_a_function_of_domain_and_id():
    gate = RandomRouted(8, 7, V=500, n_domains=3, layer=2, seed=1)
    ids, domain = torch.randint(500, (4000,)), torch.randint(3, (4000,))
    e = gate(torch.randn(4000, 8), ids, Place(4000, domain=domain)).G.argmax(1)
    seen = {}
    for key in zip(domain.tolist(), ids.tolist(), e.tolist()):
        assert seen.setdefault(key[:2], key[2]) == key[2]
    groups = [set(e[domain == d].tolist()) for d in range(3)]
    assert set().union(*groups) == set(range(7)) and sum(map(len, groups)) == 7  # disjoint, all used
    assert {len(g) for g in groups} == {2, 3}
    for d in range(3):  # uniform over the vocabulary
        counts = gate.table[d].bincount(minlength=7)[list(groups[d])] / 500
        assert (counts - 1 / len(groups[d])).abs().max() < 0.1
    again, other = RandomRouted(8, 7, 500, 3, layer=2, seed=1), RandomRouted(8, 7, 500, 3, layer=3, seed=1)
    assert torch.equal(gate.table, again.table) and not torch.equal(gate.table, other.table)
    assert "table" in gate.state_dict() and not list(gate.parameters())
    assert torch.equal(gate(torch.randn(500, 8), torch.arange(500)).G.argmax(1), gate.table[0])  # no domain: one domain


def test_the_experts_of_a_domain_can_be_cut_out():
    """A layer that has only them gives the domain's tokens what the whole layer gives."""
    gate = RandomRouted(8, 6, V=50, n_domains=2)
    whole, half = Experts(6, 8, 16), Experts(3, 8, 16)
    whole.init(0, 1, 0.3, 0.3)
    x, ids = torch.randn(40, 8), torch.randint(50, (40,))
    for domain in (0, 1):
        mine = slice(3 * domain, 3 * domain + 3)
        half.w1.data, half.w2.data = whole.w1.data[mine], whole.w2.data[mine]
        small = RandomRouted(8, 3, V=50)
        small.table.copy_(gate.table[domain] - 3 * domain)
        of = torch.full((1, 40), domain)
        assert torch.allclose(
            MoE(gate, whole)(x[None], ids[None], domain=of)[0], MoE(small, half)(x[None], ids[None])[0], atol=1e-6
        )


def test_random_routed_with_more_domains_than_experts():
    gate = RandomRouted(8, 3, V=20, n_domains=8)
    domain = torch.arange(8)
    assert gate(torch.randn(8, 8), domain, Place(8, domain=domain)).G.argmax(1).tolist() == [d % 3 for d in range(8)]


# ---------------------------------------------------------------------------------------------------------------------
# Kool et al.: enumerate everything
#
# n = 6 datapoints, 3 experts, capacity 2; router logits theta (n, 3) free, expert z predicts phi_z,
# loss (a_i - phi_z)^2.

n, k, c = 6, 3, 2
rng = torch.Generator().manual_seed(3)
theta = torch.randn(n, k, generator=rng, dtype=torch.double) * 1.2
a, phi = torch.randn(n, generator=rng, dtype=torch.double), torch.tensor([-1.0, 0.3, 1.2], dtype=torch.double)
P = theta.softmax(1)
L, dL = (a[:, None] - phi) ** 2, -2 * (a[:, None] - phi)  # (n, k)
TRUTH = torch.cat([(P * (L - (P * L).sum(1, keepdim=True))).flatten(), (P * dL).sum(0)]) / n


def gradient(Z, w, b=0.0, score=True):
    """The estimator in router.py's comment, for M samples at once. Z, w, b (M, n) -> (M, n * k + k): theta, phi."""
    one = F.one_hot(Z, k).double()  # (M, n, k)
    l, i = (one * L).sum(2), torch.arange(n)
    g_theta = (w * (l - b))[:, :, None] * (one - P) * score
    g_phi = (w[:, :, None] * one * dL[i]).sum(1)
    return torch.cat([g_theta.flatten(1), g_phi], 1) / n


def scenarios(proposal):
    """All samples, all surviving subsets: Z (M, n), kept (M, n), probability (M,)."""
    Z, K, pr = [], [], []
    for z in itertools.product(range(k), repeat=n):
        prob = math.prod(proposal[i, e].item() for i, e in enumerate(z))
        members = [[i for i in range(n) if z[i] == e] for e in range(k)]
        sets = list(itertools.product(*(itertools.combinations(m, min(len(m), c)) for m in members)))
        for s in sets:
            Z.append(z)
            K.append([any(i in part for part in s) for i in range(n)])
            pr.append(prob / len(sets))
    return torch.tensor(Z), torch.tensor(K), torch.tensor(pr, dtype=torch.double)


def bias(pr, g):
    return ((pr[:, None] * g).sum(0) - TRUTH).norm().item() / TRUTH.norm().item()


@pytest.fixture(scope="module")
def toy():
    Z, K, pr = scenarios(P)
    w = torch.stack([skip_weights(z, kept + 0.5 * torch.rand(n, dtype=torch.double), k, c) for z, kept in zip(Z, K)])
    return Z, K, pr, w


def test_skip_is_exactly_unbiased(toy):
    Z, K, pr, w = toy
    assert pr.sum().item() == pytest.approx(1) and torch.equal(w > 0, K)
    assert torch.allclose(w.sum(1), torch.full((len(w),), 6.0, dtype=torch.double)) and (w[K] >= 1).all()
    l = L[torch.arange(n), Z]
    for b in (0.0, 0.7, -3.0, a[None]):  # any baseline that does not know z
        assert bias(pr, gradient(Z, w, b)) < 1e-12
    one = K.double()
    assert bias(pr, gradient(Z, one)) > 1e-3  # no weight
    assert bias(pr, gradient(Z, one * n / one.sum(1, keepdim=True))) > 1e-3  # a mean over the survivors
    own = (one * l).sum(1, keepdim=True) / one.sum(1, keepdim=True)
    assert bias(pr, gradient(Z, w, own)) > 1e-3  # a baseline that contains the own loss
    assert bias(pr, gradient(Z, w, score=False)) > 1e-3
    # dropping by position or by probability instead of at random
    single = torch.tensor(list(itertools.product(range(k), repeat=n)))
    prob = P[torch.arange(n), single].prod(1)
    assert bias(prob, gradient(single, torch.ones(len(single), n))) < 1e-12  # no capacity: plain REINFORCE
    for key in (-torch.arange(n).double().expand(len(single), n), P[torch.arange(n), single]):
        assert bias(prob, gradient(single, torch.stack([skip_weights(z, u, k, c) for z, u in zip(single, key)]))) > 1e-3
    greedy = P.argmax(1)[None]
    assert bias(torch.ones(1).double(), gradient(greedy, torch.ones(1, n))) > 1e-3


def test_leave_one_out_baseline_needs_pairwise_weights(toy):
    Z, K, pr, w = toy
    l, same = L[torch.arange(n), Z], (Z[:, :, None] == Z[:, None]).double()  # same[., i, m]
    load = same.sum(2)  # (M, n), of the expert of i
    m_load = load.clamp(max=c)
    pair = torch.where(same.bool(), ((load - 1) / (m_load - 1).clamp(min=1))[:, :, None], (load / m_load)[:, None, :])
    others = K[:, None, :].double() * (1 - torch.eye(n))
    exact = (others * pair * l[:, None]).sum(2) / (n - 1)
    naive = (others * (load / m_load)[:, None, :] * l[:, None]).sum(2) / (n - 1)
    assert bias(pr, gradient(Z, w, exact)) < 1e-12 < 1e-3 < bias(pr, gradient(Z, w, naive))


def test_skip_from_a_balanced_proposal(toy):
    q = P.clone()
    for _ in range(200):
        q = q / q.sum(0) * n / k
        q = q / q.sum(1, keepdim=True)
    Z, K, pr = scenarios(q)
    cap = torch.stack([skip_weights(z, kept.double() + 0.5 * torch.rand(n), k, c) for z, kept in zip(Z, K)])
    ratio = (P / q)[torch.arange(n), Z]
    assert bias(pr, gradient(Z, cap * ratio)) < 1e-12 and bias(pr, gradient(Z, cap)) > 1e-3


def test_survivors_are_uniformly_random_not_first_come():
    z = torch.tensor([0, 1, 0, 0, 1])
    counts = {}
    for u in itertools.permutations([0.1, 0.2, 0.3, 0.4, 0.5]):  # all orders: exact
        w = skip_weights(z, torch.tensor(u), 3, 2)
        assert w.sum().item() == pytest.approx(5)
        counts[tuple(w.nonzero()[:, 0].tolist())] = counts.get(tuple(w.nonzero()[:, 0].tolist()), 0) + 1
    assert counts == {(0, 1, 2, 4): 40, (0, 1, 3, 4): 40, (1, 2, 3, 4): 40}
    assert skip_weights(z * 0, torch.rand(5).double(), 3, 3).max().item() == 5 / 3
    assert skip_weights(z, torch.rand(5), 3, 5).tolist() == [1] * 5  # enough room: i.i.d.


@pytest.mark.parametrize("cls", [Skip, GumbelMatching])
def test_gate_and_its_score_term_reproduce_the_gradient(cls):
    """The loss of router.py's comment, built from G and log_prob as the gate returns them, over many samples. E[G] = p,
    E[gradient] = the exact one; and without the weights both are off."""
    torch.manual_seed(0)
    gate, x, ids = cls(k, k), torch.eye(n)[:, :k] + 0.5 * torch.randn(n, k), torch.arange(n)
    target, expert = a.float(), phi.float().clone().requires_grad_()
    gate.weight.data.normal_()
    p = (x @ gate.weight.T).softmax(1)
    exact = torch.autograd.grad((p * (target[:, None] - expert) ** 2).sum() / n, (gate.weight, expert))
    exact, mean_p, gs, plain, Gs = torch.cat([g.flatten() for g in exact]), p.detach(), [], [], []
    for _ in range(400):
        r = gate(x, ids)
        assert (r.G > 0).sum(0).max() <= c == r.capacity
        losses = (target[:, None] - expert) ** 2
        hard = (losses * (r.G > 0)).sum(1).detach()
        loss = ((r.G * losses).sum(1) + r.aux["log_prob"] * (hard - 0.5)).sum() / n
        gs.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (gate.weight, expert))]))
        Gs.append(r.G)
    for sample, want in ((torch.stack(gs), exact), (torch.stack(Gs), mean_p)):
        assert ((sample.mean(0) - want) / (sample.std(0) / 400**0.5 + 1e-9)).abs().max() < 4.5
    hard = (torch.stack(Gs) > 0).float()
    assert ((hard.mean(0) - mean_p) / (hard.std(0) / 400**0.5)).abs().max() > 6
    if cls is Skip:
        assert torch.allclose(torch.stack(Gs).sum((1, 2)), torch.full((400,), 6.0))
    assert gate.eval()(x, ids).G.tolist() == F.one_hot(p.argmax(1), k).tolist()


def assignments(n, E, c):
    return torch.tensor([z for z in itertools.product(range(E), repeat=n) if all(z.count(e) <= c for e in range(E))])


def test_best_assignment_is_optimal():
    torch.manual_seed(0)
    for trial in range(60):
        n, E = torch.randint(1, 7, (1,)).item(), torch.randint(1, 4, (1,)).item()
        c = -(-n // E) + trial % 2
        S = torch.randn(n, E, dtype=torch.double) * (0.1, 1, 30)[trial % 3]
        if trial % 7 == 0:
            S = S.round()  # ties
        Z = assignments(n, E, c)
        z, _ = best_assignment(S, c)
        i = torch.arange(n)
        assert z.bincount(minlength=E).max() <= c
        assert S[i, z].sum().item() == pytest.approx(S[i, Z].sum(1).max().item(), abs=1e-6)


@pytest.mark.parametrize("n, E, c", [(1024, 8, 128), (1023, 7, 147), (400, 5, 100)])
def test_best_assignment_of_many_tokens_has_no_improving_cycle(n, E, c):
    torch.manual_seed(0)
    S = torch.randn(n, E) + 3 * torch.randn(E)
    z, dist = best_assignment(S, c)
    load = z.bincount(minlength=E)
    S = S.double()
    none = torch.full((1, E), math.inf)  # an expert may be empty
    cost = torch.stack([torch.cat([S[z == e, e, None] - S[z == e], none]).amin(0) for e in range(E)])  # cheapest e -> .
    cost = torch.where((load < c)[:, None], cost.clamp(max=0), cost)
    best = cost.clone()
    for _ in range(E):  # Bellman and Ford: walks of up to E + 1 edges
        best = torch.minimum(best, (best[:, :, None] + cost[None]).amin(1))
    assert load.max() <= c and best.diagonal().min() > -1e-6
    assert torch.allclose(dist.fill_diagonal_(0), best.fill_diagonal_(0), atol=1e-6)


@pytest.mark.parametrize("c", [2, 3, 6])
def test_conditional_is_brute_force(c):
    torch.manual_seed(c)
    Z, i = assignments(n, k, c), torch.arange(n)
    for trial in range(10):
        logp = (torch.randn(n, k, dtype=torch.double) * 2).log_softmax(1)
        S = logp - (-torch.rand(n, k, dtype=torch.double).log()).log()
        z, dist = best_assignment(S, c)
        q = matching_log_q(logp, z, dist)
        for row in range(n):
            others = S[i, Z].sum(1) - S[row, Z[:, row]]
            V = torch.stack([others[Z[:, row] == e].max() for e in range(k)])
            assert torch.allclose(q[row], (logp[row] + V).log_softmax(0), atol=1e-9)
        if c == n:
            assert torch.allclose(q, logp)  # room for all: i.i.d.


def test_conditional_by_drawing_one_row_again():
    torch.manual_seed(0)
    logp = (2 * torch.randn(n, k)).log_softmax(1)
    noise = Place(n).gumbel(k)
    hits = torch.zeros(k)
    for _ in range(400):
        noise[2] = Place(1).gumbel(k)[0]
        z, dist = best_assignment(logp + noise, c)
        hits[z[2]] += 1
        q = matching_log_q(logp, z, dist)[2].exp()  # the same at every draw
    assert (hits / 400 - q).abs().max() < 4 * (0.25 / 400) ** 0.5 and (q - logp[2].exp()).abs().max() > 0.05


def test_matching_is_exactly_balanced_and_clip_bounds_weights():
    torch.manual_seed(0)
    x, ids = torch.randn(96, 8), torch.arange(96)
    gate = GumbelMatching(8, 6, clip=1.5)
    gate.weight.data.normal_()
    G = gate(x, ids).G
    assert ((G > 0).sum(0) == 16).all() and G.max() == 1.5
    gate.clip = 0.0
    assert gate(x, ids).G.max() > 1.5
    a, b = gate(x, ids, Place(96, sizes=[36, 60])).G.split([36, 60])
    assert ((a > 0).sum(0) == 6).all() and ((b > 0).sum(0) == 10).all()


def test_skip_survivors_fit_per_group():
    torch.manual_seed(0)
    gate = Skip(8, 4, capacity_factor=1.25)
    gate.weight.data.normal_()
    r = gate(torch.randn(100, 8), torch.arange(100), Place(100, sizes=[40, 60]))
    a, b = r.G.split([40, 60])
    assert (a > 0).sum(0).max() <= 13 and (b > 0).sum(0).max() <= 19 == r.capacity
    assert a.sum().item() == pytest.approx(40) and b.sum().item() == pytest.approx(60)
    assert torch.equal(r.aux["log_prob"] != 0, r.G.sum(1) != 0)


# ---------------------------------------------------------------------------------------------------------------------
# Expert choice and DeepSeek-V3


@pytest.mark.parametrize("training", [True, False])
def test_expert_choice_is_exact(training):
    x, ids = torch.randn(50, 8), torch.arange(50)
    gate = ExpertChoice(8, 5, k=2).train(training)
    gate.weight.data.normal_()
    p = (x @ gate.weight.T).softmax(1)
    r = gate(x, ids)
    assert r.capacity == 20 and ((r.G > 0).sum(0) == 20).all()
    for e in range(5):
        best = sorted(range(50), key=lambda i: -p[i, e].item())[:20]
        assert sorted(best) == r.G[:, e].nonzero()[:, 0].tolist()
    assert torch.allclose(r.G[r.G > 0], p[r.G > 0])  # not renormalised
    per_token = (r.G > 0).sum(1)
    assert per_token.min() < 2 < per_token.max()
    a, b = gate(x, ids, Place(50, sizes=[20, 30])).G.split([20, 30])
    assert ((a > 0).sum(0) == 8).all() and ((b > 0).sum(0) == 12).all()
    assert torch.allclose(ExpertChoice(8, 5, k=5)(x, ids).G.sum(1), torch.ones(50))  # k = E: dense


def test_deepseek_weights_come_from_unbiased_scores():
    torch.manual_seed(0)
    gate, x, ids = DeepSeekV3(8, 6, k=2, route_scale=2.5), torch.randn(40, 8), torch.arange(40)
    gate.weight.data.normal_()
    G = gate(x, ids).G
    gate.bias += 3.0
    assert torch.equal(gate(x, ids).G, G)  # a shift of all biases changes nothing
    gate.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0, -9]))
    G = gate(x, ids).G
    assert (G[:, 0] > 0).all() and (G[:, 5] == 0).all()
    s = torch.sigmoid(x @ gate.weight.T)
    assert torch.allclose(G, 2.5 * s * (G > 0) / (s * (G > 0)).sum(1, keepdim=True), atol=1e-6)
    gate.bias.requires_grad_()
    G = gate(x, ids).G
    assert torch.autograd.grad(G.square().sum(), gate.bias, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(G.square().sum(), gate.weight)[0].abs().sum() > 0


def test_deepseek_top_1_keeps_its_gradient():
    gate = DeepSeekV3(8, 4, k=1)
    gate(torch.randn(20, 8), torch.arange(20)).G.sum().backward()
    assert gate.weight.grad.abs().sum() > 0


def test_deepseek_bias_moves_by_gamma_against_the_load():
    gate, x, ids = DeepSeekV3(2, 4, k=1, gamma=0.01), torch.ones(8, 2), torch.arange(8)
    gate.weight.data.copy_(torch.tensor([[2.0, 2], [1, 1], [0, 0], [-1, -1]]))  # all go to expert 0
    for step in range(1, 4):
        gate(x[:5], ids[:5])  # two calls a step: gradient accumulation
        gate(x[5:], ids[5:])
        assert gate.load.tolist() == [8, 0, 0, 0]
        gate.update()
        assert torch.allclose(gate.bias, 0.01 * step * torch.tensor([-1.0, 1, 1, 1])) and gate.load.sum() == 0
    before = gate.bias.clone()
    gate.eval()(x, ids)
    gate.update()
    assert torch.equal(gate.bias, before)  # evaluation does not count, and no tokens, no change
    gate.train()
    for _ in range(200):
        gate(x, ids)
        gate.update()
    assert (gate.bias[0] - gate.bias[1]).item() < -(
        torch.sigmoid(torch.tensor(4.0)) - torch.sigmoid(torch.tensor(2.0))
    ) + 0.1
    assert {"bias", "gamma"} <= set(gate.state_dict())


def test_deepseek_gamma_is_a_function_of_the_step():
    gate = DeepSeekV3(8, 4, gamma=0.5, anneal=0.9, steps=10)
    rates = []
    for step in (8, 9, 3, 10):
        gate.set_step(step)
        rates.append(gate.gamma.item())
    assert rates == [0.5, 0, 0.5, 0]
    forever = DeepSeekV3(8, 4, gamma=0.5)
    forever.set_step(10**9)
    assert forever.gamma == 0.5


def test_deepseek_groups():
    torch.manual_seed(0)
    x, ids = torch.randn(200, 8), torch.arange(200)
    gate = DeepSeekV3(8, 12, k=3, expert_groups=4, keep_groups=2)
    gate.weight.data.normal_()
    used = (gate(x, ids).G > 0).view(200, 4, 3)
    assert (used.any(2).sum(1) <= 2).all() and (used.sum((1, 2)) == 3).all()
    s = torch.sigmoid(x @ gate.weight.T).view(200, 4, 3)
    for i in range(200):
        score = sorted(range(4), key=lambda g: -sum(sorted(s[i, g].tolist())[-2:]))[:2]
        rest = sorted(((s[i, g, e].item(), g, e) for g in score for e in range(3)), reverse=True)[:3]
        assert {(g, e) for _, g, e in rest} == {tuple(t) for t in used[i].nonzero().tolist()}
    gate.bias.copy_(torch.tensor([5.0, 5, 0] + [0] * 9))  # the bias counts in the score of a group
    assert (gate(x, ids).G[:, :2] > 0).all()


def test_deepseek_balance_by_hand():
    gate = DeepSeekV3(2, 2, k=1)
    gate.weight.data.copy_(torch.tensor([[math.log(3), 0.0], [0, 0]]))  # s = (3/4, 1/2), and (1/4, 1/2)
    x = torch.tensor([[1.0, 0], [1, 0], [1, 0], [-1, 0]])
    P0 = (3 * 0.6 + 1 / 3) / 4
    assert gate(x, torch.zeros(4)).aux["balance"].item() == pytest.approx(2 * (0.75 * P0 + 0.25 * (1 - P0)))
