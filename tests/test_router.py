"""
router.py, chapter by chapter: what every gate promises, whatever its method, and then each method against something
independent of its code, that is a formula in numpy, numbers worked by hand, an enumeration, a brute force, a
simulation, finite differences or a certificate.

Gates are found by gates(), and a class added to router.py is tested here without being named.
"""

import copy
import functools
import inspect
import itertools
import math
import multiprocessing
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves_of

import evomoe
import router
import train
from data.batches import mask_tokens
from data.bpe import Tokenizer
from dist import Mesh
from experts import Experts, MoE, feed_forward
from layers import B, E, GATES, STEPS, T, assert_close, gate_args, new_gate, seeded_route, tokens
from model import RoBERTa
from router import (
    BASE, COMET, DTS, DeepSeekV3, DSelectK, ExpertChoice, GShard, GumbelMatching, Hash, LocMoE, LocMoEPlus, NoisyTopK,
    Permuted, Place, RandomRouted, ReMoE, Routing, Skip, Soft, StableMoE, Switch, TopK, TopP,
    balance_loss, balanced_assignment, balanced_table, best_assignment, best_permutation, block_means, cap_probability,
    entropy, gates, locality_loss, locmoe_capacity, make_gate, matching_log_q, queue, skip_weights, smooth_step,
    tree_leaves, z_loss,
)  # fmt: skip

D, V = 12, 30  # width and vocabulary of the gates that are made in this file


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def data(N=40):
    return torch.randn(N, D), torch.randint(V, (N,))


def identity(cls, E, **more):
    """A gate in float64 with logits = x."""
    gate = cls(E, E, **more).double()
    gate.weight.data = torch.eye(E, dtype=torch.float64)
    return gate


def doubles(rows):
    return torch.tensor(rows, dtype=torch.float64)


def route(gate, x):
    """Routing by content alone: every id is 0."""
    return gate(x, torch.zeros(len(x), dtype=torch.long))


def softmax(z):
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def total_loss(gate, r):
    """Something that depends on every weight, and the gate's own losses."""
    return r.G.square().sum() + sum(gate.loss_weights.get(name, 0) * value for name, value in r.aux.items())


def build(name, D, E, k=2, args=""):
    """A gate by its name in float32, with k if it takes one."""
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


# ---------------------------------------------------------------------------------------------------------------------
# The interface


@pytest.mark.parametrize("gate", GATES)
def test_float64_is_asked_for_by_name(gate, monkeypatch):
    """Some devices have none, so every tensor of float64 that a gate makes on its device goes through router.wide."""
    monkeypatch.setattr(router, "wide", lambda x: x.float())
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            here = [t for t in tree_leaves_of(out) if torch.is_tensor(t)]
            if op is not torch.ops.aten.lift_fresh.default:  # numpy's, on the CPU
                seen.extend(str(op) for t in here if t.dtype == torch.float64)
            return out

    g, x, ids = build(gate, D, 4), torch.randn(24, D, requires_grad=True), torch.randint(V, (24,))
    with Watch():
        for step in (0, 50, 99):
            g.set_step(step)
            r = g(x, ids)
            if r.G.requires_grad:
                r.G.sum().backward()
            g.update()
    assert not seen


def test_make_gate_explains_what_is_wrong():
    for name, args, message in [
        ("swich", "", r"--gate=swich is unknown \(did you mean switch\?\)"),
        ("switch", "jiter=1", r"no knob 'jiter' \(did you mean jitter\?\)"),
        ("switch", "jitter=much", "jitter=much should be of type float"),
        ("switch", "D=3", "no knob 'D'"),
        ("topk", "jitter", "no knob 'jitter'"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            make_gate(name, args, **(gate_args(name) if name in gates() else {}))
        assert "\n" not in str(error.value)
    for k in (-1, E + 1):
        with pytest.raises(ValueError, match=f"--k={k} experts per token is impossible with --n_experts={E}"):
            make_gate("topk", D=D, E=E, k=k)
    for name, args, message in [
        ("switch", "balance=-1", "balance=-1.0 is the weight of a loss and must not be negative"),
        ("switch", "balance=nan", "balance=nan must be a finite number"),
        ("switch", "jitter=1", "switch's jitter=1.0 must be from 0 to below 1"),
        ("dselectk", "gamma=-1", "dselectk's gamma=-1.0 must be above 0"),
        ("comet", "gamma=0", "comet's gamma=0.0 must be above 0"),
        ("switch", "balance=1e30", "balance=1e30 is out of all proportion"),
        ("dts", "tau_min=1e-46", "tau_min=1e-46 is out of all proportion"),
        ("stablemoe", "dim=999999999", "dim=999999999 is out of all proportion"),
        ("switch", "balance=0.1,balance=0.2", "balance is given twice"),
        ("stablemoe", "dim=0", "stablemoe's dim=0 must be at least 1"),
        ("stablemoe", "stage1=2", "stablemoe's stage1=2.0 must be from 0 to 1"),
        ("locmoe", "eps=0", "locmoe's eps=0.0 must be between 0 and 1"),
        ("deepseekv3", "gamma=-0.1", "deepseekv3's gamma=-0.1 must be at least 0"),
        ("deepseekv3", "route_scale=0", "deepseekv3's route_scale=0.0 must be above 0"),
        ("gumbelmatching", "clip=-1", "gumbelmatching's clip=-1.0 must be at least 0"),
        ("dts", "tau_min=3", "dts's tau_min=3.0 must be above 0 and at most tau_max=1.0"),
        ("dts", "hard=0.01", "dts's hard=0.01 must be at least dense="),
        ("dts", "reads=words", "dts's reads=words must be content or id"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            make_gate(name, args, **gate_args(name))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--k=2: --gate=switch sets the number of experts per token itself"):
        make_gate("switch", D=D, E=E, k=2)
    with pytest.raises(ValueError, match="search=1 must be between 0 and 1"):
        router.Permuted(make_gate("switch", D=D, E=E), search=1)
    assert make_gate("switch", "jitter=0.5, balance=2", **gate_args("switch")).jitter == 0.5


def test_the_weights_of_the_losses_are_those_of_the_papers_or_as_documented():
    weights = {name: make_gate(name, **gate_args(name)).loss_weights for name in gates()}
    known = dict(switch={"balance": 0.01}, noisytopk={"importance": 0.1, "load_cv": 0.1}, deepseekv3={"balance": 1e-4},
                 topp={"balance": 0.01, "entropy": 1e-4}, skip={"log_prob": 0.01}, gumbelmatching={"log_prob": 0.01},
                 locmoe={"balance": 0.01, "locality": 0.01}, locmoeplus={"balance": 0.01, "locality": 0.01},
                 topk={"balance": 0.01}, gshard={"balance": 0.01}, dselectk={"entropy": 0.01, "reciprocal": 1.0},
                 comet={"entropy": 0.001}, remoe={"l1": 1.0}, stablemoe={"balance": 0.3, "distill": 1.0})  # fmt: skip
    for name, expected in known.items():
        assert expected.items() <= weights[name].items(), (name, weights[name])


def test_groups_are_closed_whatever_the_bias():
    """A bias that makes every score negative must not open the group that lost (its experts then count as 0)."""
    gate = router.DeepSeekV3(4, 4, k=2, expert_groups=2, keep_groups=1)
    gate.weight.data, gate.bias = torch.eye(4), torch.full((4,), -2.0)
    assert (gate(torch.tensor([[5.0, 4, 0, 0]]), None).G[0] > 0).tolist() == [True, True, False, False]


def test_noisy_top_1_weighs_with_the_noise():
    gate = router.NoisyTopK(4, 4, k=1).double()
    gate.weight.data.normal_()
    x, noise, place = torch.randn(6, 4).double(), torch.randn(6, 4).double(), Place(6)
    place.normal = lambda *shape: noise
    h = x @ gate.weight.T + noise * (F.softplus(x @ gate.noise.T) + 1e-2)
    assert torch.allclose(gate(x, None, place).G, h.softmax(1) * F.one_hot(h.argmax(1), 4))


def test_a_knob_has_a_type(monkeypatch):
    class Mine(TopK):
        def __init__(self, D, E, k=1, *, sharpness):
            super().__init__(D, E, k)

    monkeypatch.setattr(router, "gates", lambda: {"mine": Mine})
    with pytest.raises(TypeError, match="--gate=mine: sharpness is a knob and needs a default"):
        make_gate("mine", D=4, E=4)


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


@pytest.mark.parametrize("name", GATES)
def test_routing_is_finite_and_float32_also_under_bf16(name):
    x, ids, domain = tokens()
    gate = new_gate(name).float()
    for training in (True, False):
        gate.train(training)
        for t in (x.float(), 100 * x.float(), 0 * x.float()):
            t = t.bfloat16()
            plain = seeded_route(gate, t.float(), ids, domain)
            with torch.autocast("cpu", torch.bfloat16):
                r = seeded_route(gate, t, ids, domain)
            assert r.G.shape == (B * T, E) and r.G.dtype == torch.float32 and r.G.isfinite().all()
            assert torch.equal(r.G, plain.G), "routing depends on autocast"
            for key, value in r.aux.items():
                assert value.shape == ((B * T,) if key == "log_prob" else ()) and value.isfinite().all(), key
                assert value.dtype == torch.float32, key
            assert r.priority is None or r.priority.shape == r.G.shape
            assert gate.looks_ahead in ("never", "training", "always")
    r = seeded_route(gate.train().bfloat16(), x.bfloat16(), ids, domain)  # a model that was cast, weights and all
    assert r.G.dtype == torch.float32 and r.G.isfinite().all()


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


# gates with a capacity, a domain or a load of their own
NAMES = ["locmoe", "locmoeplus", "randomrouted", "skip", "gumbelmatching", "expertchoice", "deepseekv3"]


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


@pytest.mark.parametrize("name", GATES)
def test_every_weighted_loss_exists(name):
    """A weight whose name is in no aux would be ignored in silence. (Some losses exist only where E is no power of
    2.)"""
    x, ids, domain = tokens(D=24)
    sized = [new_gate(name, D=24, E=E) for E in (4, 6)]
    assert set(sized[0].loss_weights) <= {key for gate in sized for key in seeded_route(gate, x, ids, domain).aux}


@pytest.mark.parametrize("name", GATES)
def test_schedules_are_functions_of_the_step(name):
    x, ids, domain = tokens()
    walked = new_gate(name)
    for n in (*range(STEPS + 1), 3, 0):  # forward, and back again
        walked.set_step(n)
        if n in (0, 3, STEPS // 2, STEPS):
            fresh = new_gate(name)
            fresh.set_step(n)
            for key, t in fresh.state_dict().items():
                assert torch.equal(t, walked.state_dict()[key]), (n, key)
            assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in walked.parameters()], n
            same = copy.deepcopy(walked)  # a call in training may count loads
            assert torch.equal(seeded_route(fresh, x, ids, domain).G, seeded_route(same, x, ids, domain).G), n


@pytest.mark.parametrize("name", GATES)
def test_state_round_trip(name):
    """A state_dict holds all that a gate knows: schedules, biases, tables, memories of past steps."""
    x, ids, domain = tokens()
    gate = new_gate(name)
    for step in range(5):
        gate.set_step(step)
        seeded_route(gate, x, ids, domain)
        gate.update()
    torch.manual_seed(99)
    other = make_gate(name, **gate_args(name)).double()
    other.load_state_dict(gate.state_dict())
    other.set_step(5)
    gate.set_step(5)
    for training in (True, False):
        a, b = (seeded_route(g.train(training), x, ids, domain) for g in (gate, other))
        assert torch.equal(a.G, b.G) and a.aux.keys() == b.aux.keys()
        assert all(torch.equal(a.aux[key], b.aux[key]) for key in a.aux)


@pytest.mark.parametrize("name", GATES)
def test_update_hears_every_micro_batch_and_no_evaluation(name):
    """What a gate collects for `update` are sums over the micro-batches of a step, so their order does not matter; an
    evaluation between them adds nothing."""
    x, ids, domain = tokens()
    halves = [slice(0, 20), slice(20, None)]

    def state(*calls):
        gate = new_gate(name)
        for step in range(2):
            gate.set_step(step)
            for rows, training in calls:
                seeded_route(gate.train(training), x[rows] if training else -x[rows], ids[rows], domain[rows])
            gate.train().update()
        return dict(gate.named_buffers())

    first, second = [(rows, True) for rows in halves]
    want = state(first, second)
    for calls in [(second, first), (first, *[(slice(None), False)] * 9, second)]:
        for key, t in state(*calls).items():
            assert torch.allclose(t, want[key], atol=1e-12, equal_nan=True), (key, calls)


HOMES = torch.arange(8) // 2 == torch.arange(4)[:, None]  # (4, 8): 8 experts on 4 nodes, two each


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


# ---------------------------------------------------------------------------------------------------------------------
# What several gates share


def test_balance_loss_counts_carry_no_gradient():
    torch.manual_seed(0)
    p = torch.rand(10, E, dtype=torch.float64).softmax(1).requires_grad_()
    chosen = p.detach() >= p.detach().topk(2, dim=1).values[:, 1:]
    loss = router.balance_loss(p, chosen, Place(10))
    f = chosen.double().mean(0) / 2  # divided by k
    assert_close(loss, E * (f * p.mean(0)).sum(), 1e-14)
    (grad,) = torch.autograd.grad(loss, p)
    assert_close(grad, (E * f / 10).expand_as(p), 1e-14)
    even = torch.full((E, E), 1 / E)
    assert router.balance_loss(even, torch.eye(E).bool(), Place(E)) == 1
    one = F.one_hot(torch.zeros(6, dtype=torch.long), E)
    assert router.balance_loss(one.float(), one.bool(), Place(6)) == E


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


# ---------------------------------------------------------------------------------------------------------------------
# Top-k and its relatives: content decides


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


def test_every_choice_counts_in_topk_balance():
    """Of two tokens both ask for expert 1, one for 0, one for 2: shares 1/4, 1/2, 1/4 of four choices."""
    r = route(identity(TopK, 3, k=2), doubles([[3, 6, 1], [1, 6, 3]]).log())
    assert r.aux["balance"].item() == pytest.approx(3 * (0.25 * 0.2 + 0.5 * 0.6 + 0.25 * 0.2))


def test_gshard_serves_first_choices_first():
    assert GShard.drop_order == "choice"


def test_noisy_topk_starts_without_an_opinion():
    assert not any(p.any() for p in router.NoisyTopK(6, 4).parameters())


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


def test_switch_starts_small_and_cut_off_at_two_deviations():
    """Truncated at 2 sigma a normal variable has 0.880 of its standard deviation; a tenth of the usual variance."""
    w, std = Switch(4096, 8).weight.detach(), (0.1 / 4096) ** 0.5
    assert w.abs().max() <= 2 * std and w.std() == pytest.approx(0.8796 * std, rel=0.02)


def test_z_loss_is_of_the_logits():
    x = torch.randn(30, 6)
    for gate in (TopK(6, 4), Switch(6, 4, jitter=0.0)):
        gate.weight.data.normal_()
        z = x @ gate.weight.T
        assert torch.allclose(route(gate, x).aux["z"], z.exp().sum(1).log().square().mean(), rtol=1e-5)


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


def test_coarse_noise_is_uniform_and_the_same_for_any_slice():
    n, cols = 9001, 7
    torch.manual_seed(3)
    whole = Place(n).coarse(cols)
    torch.manual_seed(3)
    assert torch.equal(Place(10, rows=torch.arange(5, 15), total=n).coarse(cols), whole[5:15])
    level = (255 * whole).round().long()
    assert (whole - level / 255).abs().max() < 1e-6
    expected = n * cols / 256
    chi2 = ((level.flatten().bincount(minlength=256) - expected).square() / expected).sum()
    assert 255 - 5 * 510**0.5 < chi2 < 255 + 5 * 510**0.5  # chi-square of 255 degrees: variance 510
    flat = whole.flatten() - 0.5
    for lag in range(1, 17):  # bytes of one word, and of neighbouring words, know nothing of each other
        assert abs((flat[lag:] * flat[:-lag]).mean() * 12) < 5 / (n * cols) ** 0.5
    assert Place(3).coarse(1, dtype=torch.float64).dtype == torch.float64


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


def test_noisy_topk_importance_by_hand():
    """Two tokens, k = 2: G = (.75, .25, 0) and (.25, 0, .75). Importance (1, .25, .75): mean 2/3, variance 7/72."""
    gate = identity(NoisyTopK, 3, k=2).eval()
    r = route(gate, doubles([[3, 1, 0.1], [1, 0.1, 3]]).log())
    assert np.allclose(r.G.tolist(), [[0.75, 0.25, 0], [0.25, 0, 0.75]])
    assert r.aux["importance"].item() == pytest.approx(7 / 72 / (4 / 9)) and "load_cv" not in r.aux


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
    assert r.aux["load_cv"].item() == pytest.approx(load.var() / load.mean() ** 2, abs=2e-3)
    assert r.G.shape == (6, E) and ((r.G > 0).sum(1) == k).all()
    monkeypatch.setattr(router, "cv_squared", lambda t: summed.append(t) or t.sum())
    for n in range(6):
        batch = Place(1)
        batch.normal = lambda *shape: torch.from_numpy(held[n : n + 1])
        gate(x[n : n + 1], None, batch)
        assert np.abs(summed[-1].detach().numpy() - want[n]).max() < 1 / M
    assert ((want > 0.05) & (want < 0.95)).sum() > 5  # the example is not a trivial one


def test_topp_is_the_smallest_set_that_reaches_p():
    """By enumeration: of all sets of experts with a sum of at least p the smallest, and of these the likeliest."""
    gate, x = identity(TopP, 5, p=0.7), torch.randn(100, 5, dtype=torch.float64) * 1.5
    P = softmax(x.numpy())
    sets = [list(c) for size in range(1, 6) for c in itertools.combinations(range(5), size)]
    r = route(gate, x)
    for G, row in zip(r.G.detach().numpy(), P):
        best = min((c for c in sets if row[c].sum() >= 0.7), key=lambda c: (len(c), -row[c].sum()))
        assert np.flatnonzero(G).tolist() == best and np.allclose(G[best], row[best])  # not renormalised
    assert {1, 2, 3} <= set((r.G > 0).sum(1).tolist())
    assert r.aux["entropy"].item() == pytest.approx(-(P * np.log(P)).sum(1).mean())


def test_topp_by_hand():
    """P = (1/2, 1/4, 1/4): one expert reaches 1/2, two reach 0.6. f = (1, 0, 0) of all choices, then (1/2, 1/2, 0)."""
    x = doubles([[2, 1, 1]]).log()
    for p, n, balance in ((0.5, 1, 3 / 2), (0.6, 2, 3 * (1 / 4 + 1 / 8)), (0.76, 3, 1)):
        r = route(identity(TopP, 3, p=p), x)
        assert (r.G > 0).sum() == n and r.aux["balance"].item() == pytest.approx(balance)
        assert r.aux["entropy"].item() == pytest.approx(1.5 * math.log(2))
    for E in (4, 5, 8, 10, 16):  # a flat row is the one that needs most; k is the number of experts in it
        gate = identity(TopP, E)
        assert gate.k == math.ceil(2 * E / 5) == (route(gate, torch.zeros(1, E).double()).G > 0).sum()
    for E, p in (10, 0.6), (25, 0.2), (50, 0.3):  # 0.1 six times is a hair less than 0.6, and is meant
        gate = TopP(4, E, p=p)
        assert gate.k == round(p * E) == (route(gate, torch.zeros(1, 4)).G > 0).sum()
    assert (route(identity(TopP, 4, p=1.0), torch.randn(9, 4).double()).G > 0).all()
    for p in (0, 1.1):
        with pytest.raises(ValueError, match="topp's p=.* must be above 0 and at most 1"):
            TopP(4, 4, p=p)


# ---------------------------------------------------------------------------------------------------------------------
# Balance without a loss


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


def test_deepseek_quantile_rule():
    """Each bias moves to where N k / E tokens have a positive margin, if the others' cutoffs stay: by sorting. Step
    after step the loads even out."""
    gate, x, N, k, E = DeepSeekV3(8, 8, k=2, rule="quantile"), torch.randn(400, 8), 400, 2, 8
    x[:, 0] = 1
    gate.weight.data.normal_()
    load = lambda: (gate.eval()(x, None).G > 0).sum(0)
    assert load().max() > 1.5 * N * k / E
    gate.update()
    assert not gate.bias.any()  # no tokens of a training call, no change
    for step in range(10):
        before, key = gate.bias.tolist(), (x @ gate.weight.T).sigmoid().detach() + gate.bias
        margins = key - key.sort(1).values[:, -k - 1, None]
        for rows in torch.arange(N).split([150, 250]):  # the calls of a step are added up
            gate.train()(x[rows], None)
        gate.update()
        for e in range(E):
            cutoff = sorted(margins[:, e].tolist(), reverse=True)[N * k // E]
            assert gate.bias[e] == pytest.approx(before[e] - cutoff, abs=6e-4)
    assert load().max() < 1.1 * N * k / E and not gate.margins.any()
    said = [Recorder(), Recorder()]
    gate.train()
    for rows, recorder in zip(torch.arange(N).split([150, 250]), said):
        gate(x[rows], None, Place(len(rows), mesh=recorder))
    whole, _ = gate.margins.clone(), gate.margins.zero_()
    gate(x[:150], None, Place(150, mesh=Recorder(said[1].said)))
    assert torch.equal(gate.margins, whole) and whole.sum() == N * E  # a rank counts the tokens of all
    gate.gamma.zero_()
    before = gate.bias.clone()
    gate.update()
    assert torch.equal(gate.bias, before)  # annealed
    DeepSeekV3(8, 4, k=4, rule="quantile")(x, None)  # nothing to balance
    with pytest.raises(ValueError, match="deepseekv3's rule=quantile must be sign, or quantile in one group"):
        DeepSeekV3(8, 4, rule="quantile", expert_groups=2, keep_groups=2)


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
    gate.bias.copy_(torch.tensor([0.0, 9.0]))  # now all choose expert 1, and that is what counts
    assert gate(x, torch.zeros(4)).aux["balance"].item() == pytest.approx(2 * (1 - P0))


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


# ---------------------------------------------------------------------------------------------------------------------
# Dense to sparse, bits, trees: how many experts is learned


def test_remoe_lambda_stays_within_bounds():
    """Where nothing turns experts off it would grow until the loss is infinite."""
    gate = ReMoE(D, 4)
    for asked, price in (4.0, 1e3), (0.0, gate.start):
        for _ in range(200):
            gate.count.copy_(torch.tensor([asked, 1.0]))
            gate.update()
        assert float(gate.price) == pytest.approx(price)


def test_remoe_by_hand():
    """Scores (1, -1, 0) and (2, 3, -1): shares (1, 1/2, 0), means (3/2, 3/2, 0), L1 = 3 / k lambda (3/2 + 3/4)."""
    x = doubles([[1, -1, 0], [2, 3, -1]]).requires_grad_()
    for k, factor in ((1, 1.2), (2, 1 / 1.2)):  # 3 / 2 experts per token: too many for k = 1, too few for k = 2
        gate = identity(ReMoE, 3, k=k)
        gate.price.fill_(0.5)
        r = route(gate, x)
        assert r.G.tolist() == [[1, 0, 0], [2, 3, 0]]
        assert r.aux["l1"].item() == pytest.approx(0.5 * 3 / k * 2.25)
        (slope,) = torch.autograd.grad(r.aux["l1"], x)
        assert np.allclose(slope, [[0.75 / k, 0, 0], [0.75 / k, 0.375 / k, 0]])  # lambda f_e / N where G > 0
        route(gate.eval(), -x)  # evaluation does not count
        assert gate.count.tolist() == [3, 2]
        gate.update()
        assert gate.price.item() == pytest.approx(0.5 * factor) and gate.state_dict().keys() == {"weight", "price"}
        gate.update()
        assert gate.price.item() == pytest.approx(0.5 * factor)  # no tokens, no change
    gate.train()
    for rows in (x[:1], x[1:], x[1:]):  # 1 + 2 + 2 for 3 tokens: the calls of a step are added up
        route(gate, rows)
    assert gate.count.tolist() == [5, 3]
    gate.price.fill_(1e-8)
    gate.update()
    assert gate.price.item() == 1e-8  # not below its start


def test_remoe_holds_k_experts_per_token():
    """Its own loss against a task that wants all of 8 experts on: 2 in the mean, alike loaded. The tokens share a
    direction; had they none, half of all scores would be positive whatever W is."""
    gate, x, seen = ReMoE(8, 8, k=2, start=1e-4), torch.randn(100, 8), []
    x[:, 0] = 1
    optimizer = torch.optim.SGD(gate.parameters(), 0.3)
    for _ in range(250):
        r = route(gate, x)
        ((1 - r.G).square().mean() + r.aux["l1"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        gate.update()
        seen.append((r.G > 0).float().mean(0))
    load = torch.stack(seen[150:]).mean(0)
    assert seen[20].sum() > 7 and load.sum().item() == pytest.approx(2, abs=0.3) and load.max() < 1.2 * load.min()


def test_remoe_on_two_ranks_is_one_batch():
    gate, x, parts = ReMoE(8, 4), torch.randn(50, 8), torch.arange(50).split([20, 30])
    gate.price.fill_(0.3)

    def call(rows, mesh=None):
        gate.count.zero_()
        l1 = gate(x[rows], None, Place(len(rows), mesh=mesh)).aux["l1"]
        return l1.item(), torch.autograd.grad(l1, gate.weight)[0], gate.count.tolist()

    whole = call(torch.arange(50))
    said = [Recorder(), Recorder()]
    for rows, recorder in zip(parts, said):
        call(rows, recorder)
    a, b = (call(rows, Recorder(said[1 - i].said)) for i, rows in enumerate(parts))
    assert a[0] == pytest.approx(whole[0]) and b[0] == pytest.approx(whole[0]) and a[2] == b[2] == whole[2]
    assert torch.allclose(a[1] + b[1], whole[1], atol=1e-6)  # each rank has its share of the gradient


def dts(n=E, tau=1.0, s=1.0, tight=0.0, hard=False, **knobs):
    """A DTS gate whose logits are its input, with noise of scale s."""
    g = DTS(n, n, **knobs)
    g.weight = nn.Parameter(torch.eye(n))
    g.set("hard" if hard else "dense", tau, s, tight)
    return g


def weights_of(g, x, seed=1):  # not the seed of x: noise and x would be the same draws
    torch.manual_seed(seed)
    return g(x, None).G


@pytest.mark.parametrize("tau", [2.0, 0.1])
def test_constant_noise_makes_the_choice_a_sample_of_softmax_at_any_temperature(tau):
    z = torch.tensor([1.0, 0.0, -1.0, 0.5])
    best = weights_of(dts(tau=tau, noise="constant"), z.expand(20000, -1)).argmax(1)
    assert (torch.bincount(best, minlength=E) / 20000 - z.softmax(0)).abs().max() < 0.015
    best = weights_of(dts(tau=tau, s=0.5, noise="annealed"), z.expand(20000, -1)).argmax(1)  # half way
    assert (torch.bincount(best, minlength=E) / 20000 - (2 * z).softmax(0)).abs().max() < 0.015
    quiet = dts(tau=tau, noise="constant", tight=0.0).eval()
    for seed in range(5):  # noise is off at evaluation
        y = (z / tau).softmax(0)
        assert torch.allclose(weights_of(quiet, z[None], seed), y * ((y > 0.001) | (y == y.max())))


def test_dts_weights_and_balance_by_hand():
    """The weights are y, or with combine=softmax those at temperature 1; the mask and the balance loss are y's."""
    x = torch.randn(50, E)
    for combine, temperature in (("gumbel", 0.4), ("softmax", 1.0)):
        r = dts(tau=0.4, s=0.0, combine=combine)(x, None)
        y = (x / 0.4).softmax(1)
        m = (y > 0.001) | (y == y.amax(1, keepdim=True))
        assert 0 < (~m).sum() and torch.allclose(r.G, (x / temperature).softmax(1) * m)
        f = m.float().mean(0) / m.float().mean(0).sum()
        assert torch.allclose(r.aux["balance"], E * (f * y.mean(0)).sum())
    G = weights_of(dts(tau=0.4, s=1.0, combine="softmax"), x)  # noise decides who is asked, not with what weight
    assert 0 < (G == 0).sum() and torch.allclose(G[G > 0], x.softmax(1)[G > 0])


def test_reading_ids_the_gate_sees_nothing_else():
    g, ids = DTS(8, E, reads="id", V=10).eval(), torch.tensor([3, 7, 3])
    G = g(torch.randn(3, 8), ids).G
    y = (g.weight[ids] / g.tau).softmax(1)
    assert torch.equal(G, y * (y > 0.001)) and torch.equal(G[0], G[2]) and not torch.equal(G[0], G[1])
    G[:, 0].sum().backward()
    assert (g.weight.grad != 0).any(1).nonzero()[:, 0].tolist() == [3, 7]


def test_limits_of_the_temperature():
    x = torch.randn(64, E)
    torch.manual_seed(1)
    best = (x + Place(64).gumbel(E)).topk(2)
    clear = best.values[:, 0] - best.values[:, 1] > 0.02
    cold = weights_of(dts(tau=1e-3), x) - nn.functional.one_hot(best.indices[:, 0], E)
    assert clear.sum() > 50 and cold[clear].abs().max() < 1e-6
    assert (weights_of(dts(tau=1e4), x) - 1 / E).abs().max() < 1e-3


@pytest.mark.parametrize("k", [1, 2])
def test_experts_per_token_fall_to_k_and_never_below(k):
    x = torch.randn(512, 16)
    n = [(weights_of(dts(16, tau=tau, k=k), x) > 0).sum(1) for tau in (2, 1, 0.5, 0.3, 0.1)]
    n += [(weights_of(dts(16, tau=0.1, tight=t, k=k), x) > 0).sum(1) for t in (0.3, 0.6, 1)]
    assert all((a >= b).all() for a, b in zip(n, n[1:]))  # each token's
    assert n[0].float().mean() > 15.9 and (n[-1] == k).all()  # more than half can go to one only
    assert ((weights_of(dts(16, tau=0.5, hard=True, k=k), x) > 0).sum(1) == k).all()
    many = torch.randn(8, 2048)  # 1 / 2048 is below the threshold: without the guard nobody would be left
    assert ((weights_of(dts(2048, tau=1e3, k=k), many) > 0).sum(1) == k).all()


def test_experts_per_token_of_standard_normal_logits():
    """E = 16, one standard normal logit each: an independent count gave 15.1, 8.2, 4.4 and 1.8."""
    x = torch.randn(20000, 16)
    for tau, expected in (1.0, 15.1), (0.5, 8.2), (0.3, 4.4), (0.1, 1.8):
        assert (weights_of(dts(16, tau=tau), x) > 0).sum(1).float().mean() == pytest.approx(expected, rel=0.03)


def test_balance_loss_is_one_when_balanced_and_has_no_gradient_while_dense():
    g, x = dts(tau=2.0), torch.randn(256, E)
    loss = g(x, None).aux["balance"]
    loss.backward()
    assert loss.item() == pytest.approx(1, abs=1e-5) and g.weight.grad.abs().max() < 1e-6
    g = dts(tau=0.1, s=0.0)
    g(x[x[:, 0] > 1], None).aux["balance"].backward()  # crowded: there is a force
    assert g.weight.grad.abs().max() > 1e-3


def test_the_router_keeps_its_gradient():
    x = torch.randn(64, E)
    for hard in False, True:
        g = dts(tau=0.5, s=0.0, hard=hard)
        out = g(x, None).G
        (out * torch.randn_like(out)).sum().backward()
        assert (g.weight.grad.abs().sum(1) > 0).all()


def test_hard_switch_takes_away_no_more_than_the_lesser_experts():
    """The step from soft to hard takes at most 1 - max y out of a row of G; and nothing at all, in value and gradient,
    once the bar has risen: above one half there is room for one."""
    x, direction = torch.randn(256, E), torch.randn(256, E)
    for tight in 0.0, 1.0:
        soft, hard = (dts(tau=0.3, s=0.0, tight=tight, hard=h) for h in (False, True))
        a, b = weights_of(soft, x), weights_of(hard, x)
        assert ((a - b).sum(1) <= 1 - a.max(1).values + 1e-6).all()
        (a * direction).sum().backward(), (b * direction).sum().backward()
        assert torch.equal(a, b) == torch.equal(soft.weight.grad, hard.weight.grad) == (tight == 1)


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


def test_entropy_reaches_its_ends():
    assert float(entropy(torch.eye(4)).abs().max()) < 1e-5
    assert entropy(torch.full((4,), 0.25)).item() == pytest.approx(math.log(4), abs=1e-4)


@pytest.mark.parametrize("E, k", [(1, 1), (2, 1), (5, 2), (6, 6), (8, 2)])
def test_dselectk_by_enumeration(E, k):
    gate, (x, ids) = DSelectK(D, E, k), data(7)
    with torch.no_grad():
        gate.weight.mul_(20)
    r = gate(x, ids)
    s = smooth_step(x @ gate.weight.T + gate.bias, 1.0).view(7, k, -1)
    mix = (x @ gate.mix.T + gate.mix_bias).softmax(1)
    code = torch.ones(7, k, E)
    for e in range(E):
        for t in range(gate.bits):
            code[:, :, e] *= s[:, :, t] if e >> (gate.bits - 1 - t) & 1 else 1 - s[:, :, t]
    assert torch.allclose(r.G, (mix[:, :, None] * code).sum(1), atol=1e-6)
    entropies = -(code * (code + 1e-6).log()).sum(2)  # (7, k)
    assert torch.allclose(r.aux["entropy"], entropies.sum(1).mean(), atol=1e-5)
    power = E & (E - 1) == 0
    assert torch.allclose(r.G.sum(1), torch.ones(7)) == power and bool((r.G.sum(1) < 1 + 1e-5).all())
    used = (1 / (1e-6 + code.sum(2))).sum(1).mean()
    assert ("reciprocal" not in r.aux) if power else r.aux["reciprocal"].item() == pytest.approx(used.item(), rel=1e-5)
    assert power or used > 1.01 * k
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


def test_comet_entropy_is_of_the_trees_not_of_their_weights():
    gate, x = COMET(6, 4, 3), torch.randn(20, 6)  # two levels
    for p in gate.parameters():
        p.data.normal_(0, 0.3)
    h = smooth_step((x @ gate.split.T + gate.split_bias).view(20, 3, 3), 1.0)  # root, left, right
    p = torch.stack([h[..., 0] * h[..., 1], h[..., 0] * (1 - h[..., 1]),
                     (1 - h[..., 0]) * h[..., 2], (1 - h[..., 0]) * (1 - h[..., 2])], 2)  # fmt: skip
    assert gate(x, None).aux["entropy"].item() == pytest.approx(-(p * (p + 1e-6).log()).sum((1, 2)).mean().item())


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


@pytest.mark.parametrize("E", [2, 4, 8, 16])
def test_comet_with_one_plane_per_level_is_dselectk(E):
    gate, (x, ids) = DSelectK(D, E, k=1), data()
    with torch.no_grad():
        gate.weight.mul_(30)
    s = smooth_step(x @ gate.weight.T + gate.bias, 1.0)  # (N, bits); a set bit goes right
    h = torch.cat([(1 - s[:, t, None]).expand(-1, 2**t) for t in range(gate.bits)], 1)
    assert torch.allclose(tree_leaves(h), gate(x, ids).G, atol=1e-6)


@pytest.mark.parametrize("make, E, k", [(COMET, 5, 2), (DSelectK, 6, 2), (DSelectK, 8, 3)])
def test_gradients_by_finite_differences(make, E, k):
    gate = make(4, E, k).double()
    names = [n for n, _ in gate.named_parameters()]
    start = [p.detach() * (20 if n in ("split", "weight") else 1) for n, p in gate.named_parameters()]
    x = torch.randn(3, 4, dtype=torch.float64)

    def f(x, *values):
        r = torch.func.functional_call(gate, dict(zip(names, values)), (x, torch.zeros(3, dtype=torch.long)))
        return (r.G, *r.aux.values())

    inputs = [v.clone().requires_grad_() for v in (x, *start)]
    assert torch.autograd.gradcheck(f, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "make", [TopK, Switch, TopP, DeepSeekV3, ExpertChoice, DTS, ReMoE, LocMoE, LocMoEPlus, NoisyTopK, GShard, BASE]
)
def test_gradients_of_evaluated_weights(make):
    """G by finite differences, with respect to x and to every weight that G depends on. Which experts are asked does
    not change in so small a step; with what weight must."""
    many = "k" in inspect.signature(make).parameters
    gate = make(8, 4, **({"k": 2} if many else {})).double().eval()
    for p in gate.parameters():
        p.data.normal_()
    gate.set_step(0)
    names = [n for n, _ in gate.named_parameters() if n != "noise"]  # NoisyTopK's: in training only
    x, ids = torch.randn(5, 8, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    f = lambda x, *values: torch.func.functional_call(gate, dict(zip(names, values)), (x, ids)).G
    inputs = [v.detach().clone().requires_grad_() for v in (x, *(dict(gate.named_parameters())[n] for n in names))]
    assert torch.autograd.gradcheck(f, inputs, eps=1e-6, atol=1e-6)
    assert all(g.abs().max() > 1e-4 for g in torch.autograd.grad(f(*inputs).square().sum(), inputs))


@pytest.mark.parametrize("make", [COMET, DSelectK])
@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
def test_nothing_is_saturated_at_the_start(make, gamma):
    assert (make(256, 8, 2, gamma=gamma)(torch.randn(50, 256), None).G > 0).all()


@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_trees_and_bits_start_undecided(gamma):
    """The authors' ranges: U(+-gamma/100) for splits and bits, U(+-0.05) for what weighs the leaves and selectors."""
    ranges = {}
    for gate in (COMET(64, 16, 2, gamma=gamma), DSelectK(64, 16, 2, gamma=gamma)):
        ranges |= {f"{type(gate).__name__}.{name}": p.abs().max().item() for name, p in gate.named_parameters()}
    for name, top in ranges.items():
        end = 0.05 if "leaf" in name or "mix" in name else gamma / 100
        assert 0.4 * end < top <= end, name


# ---------------------------------------------------------------------------------------------------------------------
# Tables: the token's id decides


def zipf(V):
    return [int(10_000 / (t + 1)) for t in np.random.default_rng(0).permutation(V)]


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
def test_hash_tables_know_nothing_of_each_other(kind):
    """Two tokens that meet in an expert of one layer meet in another layer, seed or pool no more often than by chance.
    Counted by occurrences: the frequent ids, each with a count of its own, are what matters."""
    V, E = 4096, 8
    counts = [10**6 // (t + 10) ** 1.0 + 0.001 * t for t in range(V)]
    mass = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    make = lambda layer=1, seed=2, k=1: Hash(8, E * k, V, k, kind, counts, layer, seed).table
    first, pools = make()[0], make(k=2)
    for mine, other in ((first, make(layer=3)[0]), (first, make(seed=3)[0]), (pools[0], pools[1] - E)):
        both = torch.zeros(E, E, dtype=torch.float64).index_put_((mine, other), mass, accumulate=True)
        again = both.square().sum() / both.sum(1).square().sum()  # P(together there | together here)
        assert again < 1.5 / E, again
        assert both.sum(0).max() < (1.01 if kind == "balanced" else 1.6) / E


def test_hash_without_counts_deals_out_the_ids():
    table = Hash(8, 4, 50).table[0]
    assert sorted(table.bincount(minlength=4).tolist()) == [12, 12, 13, 13]


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


def stable(**knobs):
    gate = StableMoE(D, 4, V, steps=100, **knobs)
    gate.set_step(0)
    return gate


def descend(gate, optimizer, steps, x, ids):
    """Training steps of a gate alone, on its own losses and towards larger weights."""
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


def test_stablemoe_stages():
    gate, (x, ids) = stable(), data()
    content, known = (x @ gate.weight.T).argmax(1), (gate.words[ids] @ gate.w_hat.T).argmax(1)
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


def test_tables_and_centroids_at_the_start():
    """What is learned by token id starts as an embedding does, normal with variance 1: then no two words agree. The
    centroids of BASE and StableMoE start orthogonal, each of length 0.1."""
    stable, by_id = StableMoE(64, 8, 1000, dim=50), DTS(64, 8, reads="id", V=1000)
    for table in (stable.words.detach(), by_id.weight.detach()):
        assert table.shape[0] == 1000 and abs(table.mean()) < 0.05 and table.std() == pytest.approx(1, abs=0.05)
    for c in (stable.weight.detach(), stable.w_hat.detach(), router.BASE(64, 8).weight.detach()):
        assert torch.allclose(c @ c.T, 0.01 * torch.eye(8), atol=1e-6)


def test_stablemoe_says_when_it_freezes():
    gate = StableMoE(4, 2, 5, steps=100, stage1=0.55)  # 55.00000000000001
    assert gate.phases() == [("learn", 0), ("frozen", 55)]
    for step, stage in ((54, 1), (55, 2)):
        gate.set_step(step)
        assert gate.stage == stage and gate.words.requires_grad == (stage == 1)
    assert StableMoE(4, 2, 5, steps=100, stage1=0).phases() == [("frozen", 0)]


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
    logp = (gate.words[ids] @ gate.w_hat.T).log_softmax(1)
    assert float(r.aux["distill"].detach()) == pytest.approx(
        -float(logp.gather(1, content[:, None]).mean().detach()), rel=1e-5
    )
    r.aux["distill"].backward()
    assert x.grad is None and gate.weight.grad is None
    assert gate.words.grad.abs().max() > 0 and gate.w_hat.grad.abs().max() > 0


def test_stablemoe_learns_then_freezes():
    gate, ids = stable(), torch.randint(V, (200,))
    x = torch.randn(V, D)[ids]
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.05, weight_decay=0.1)
    before = float(gate(x, ids).aux["agreement"].detach())
    descend(gate, optimizer, range(10), x, ids)
    after = float(gate(x, ids).aux["agreement"].detach())
    assert after > max(before, 0.8)
    gate(x, ids).aux["distill"].backward()
    gate.set_step(10)
    assert gate.words.grad is None and gate.w_hat.grad is None  # a gradient left over from stage 1 is gone
    gate.set_step(9)
    frozen, weight = (gate.words.clone(), gate.w_hat.clone()), gate.weight.clone()
    chosen = gate.eval()(x, ids).G > 0
    gate.train()
    descend(gate, optimizer, range(10, 100), x, ids)
    assert torch.equal(gate.words, frozen[0]) and torch.equal(gate.w_hat, frozen[1])
    assert gate.words.grad is None and not gate.words.requires_grad and not torch.equal(gate.weight, weight)
    assert torch.equal(gate(x, ids).G > 0, chosen)  # the routing too

    resumed = stable()
    resumed.load_state_dict(gate.state_dict())
    assert torch.equal(resumed(x, ids).G, gate(x, ids).G)  # stage 2 comes with the checkpoint
    resumed.set_step(100)
    assert not resumed.words.requires_grad and torch.equal(resumed(x, ids).G, gate(x, ids).G)
    resumed.set_step(3)
    assert resumed.words.requires_grad and float(resumed(x, ids).aux["distill"].detach()) > 0


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
# Balanced assignment


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
# Locality and capacity: LocMoE


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


def test_locmoe_is_quiet_at_evaluation():
    gate, x = LocMoE(8, 4, noise=1.0), torch.randn(30, 8)
    assert torch.equal(route(gate.eval(), x).G, route(LocMoE(8, 4).eval(), x).G)
    assert not torch.equal(route(gate.train(), x).G, route(LocMoE(8, 4), x).G)


def test_locmoe_rectifies_what_the_noise_made():
    gate, x, z, place = LocMoE(8, 4, noise=0.5, relu=True), torch.randn(30, 8), torch.randn(30, 4), Place(30)
    place.normal = lambda *shape: z
    p = (2**0.5 * (x.view(30, 4, 2).mean(2) + 0.5 * z).clamp(min=0)).softmax(1)
    assert torch.allclose(gate(x, None, place).G, p * F.one_hot(p.argmax(1), 4))


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
    # of the nodes that have tokens
    some = Place(4, node=torch.tensor([0, 0, 1, 1]), near=HOMES)
    assert locality_loss(uniform[:4], some, eps).item() == pytest.approx(1.191, abs=1e-3)
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


def test_a_permuted_gate_is_local_where_its_experts_live():
    """Behind a permutation the locality loss looks at the node of the expert that an output feeds."""
    node = torch.arange(4).repeat_interleave(2)
    x, ids = torch.zeros(8, 8), torch.zeros(8, dtype=torch.long)
    x[torch.arange(8), torch.arange(8)] = 100.0  # row n to output n
    gate, place = router.Permuted(LocMoE(8, 8), steps=10, search=0.1), Place(8, node=node, near=HOMES)
    gate.set_step(10)
    losses = {}
    for shift in (0, 2):  # output i feeds the expert after next: on the next node
        gate.source.copy_(torch.arange(8).roll(shift))
        r = gate(x, ids, place)
        assert torch.equal(r.G.argmax(1), (torch.arange(8) + shift) % 8)
        losses[shift] = r.aux["locality"].item()
    assert losses[0] == pytest.approx(-math.log(0.9), abs=1e-4)  # all at home, eps = 0.1
    assert losses[2] == pytest.approx(-math.log(0.1 / 3), abs=1e-4)  # all away: 0.1 is spread over six experts
    assert place.near is HOMES
    gate.frozen.fill_(False)
    assert gate(x, ids, place).aux["locality"] == 0  # each output feeds every expert


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


# ---------------------------------------------------------------------------------------------------------------------
# Locality and capacity: LocMoE+


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


# ---------------------------------------------------------------------------------------------------------------------
# Unbiased samples: enumerate everything (Kool et al.)
#
# n = 6 datapoints, 3 experts, capacity 2; router logits theta (n, 3) free, expert z predicts phi_z,
# loss (a_i - phi_z)^2. These names hold to the end of the file.


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


def test_skip_survivors_fit_per_group():
    torch.manual_seed(0)
    gate = Skip(8, 4, capacity_factor=1.25)
    gate.weight.data.normal_()
    r = gate(torch.randn(100, 8), torch.arange(100), Place(100, sizes=[40, 60]))
    a, b = r.G.split([40, 60])
    assert (a > 0).sum(0).max() <= 13 and (b > 0).sum(0).max() <= 19 == r.capacity
    assert a.sum().item() == pytest.approx(40) and b.sum().item() == pytest.approx(60)
    assert torch.equal(r.aux["log_prob"] != 0, r.G.sum(1) != 0)


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
    exact, mean_p, gs, Gs = torch.cat([g.flatten() for g in exact]), p.detach(), [], []
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


# ---------------------------------------------------------------------------------------------------------------------
# Unbiased samples: the score-function term
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


# ---------------------------------------------------------------------------------------------------------------------
# A permutation around any gate


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


@pytest.mark.parametrize("schedule", ["corrected", "official"])
def test_one_update_is_a_search(schedule):
    """What the first step has learnt counts, in the evaluation after it and in a search that has no second step."""
    for window, decided in ((10, False), (2, True)):
        gate, (x, ids) = Permuted(TopK(D, 5, 2), steps=100, search=window / 100, schedule=schedule), data()
        plain = gate.gate(x, ids).G
        gate.set_step(0)
        with torch.no_grad():
            gate.logits.copy_(5 * torch.eye(5)[CYCLE])
        gate.update()
        if decided:
            gate.set_step(1)
            assert gate.frozen and gate.phases() == [("mixture", 0), ("permuted", 1)]
        assert torch.equal(gate.eval()(x, ids).G, plain @ torch.eye(5)[CYCLE])


def test_permutation_loss_by_hand():
    """H(P) + H(P / row sums), sums over all entries."""
    gate, (x, ids) = permuted(schedule="official"), data()
    gate.set_step(0)
    P = gate.soft().detach().double()
    rows = P / P.sum(1, keepdim=True)
    want = -(P * (P + 1e-6).log()).sum() - (rows * (rows + 1e-6).log()).sum()
    assert (rows - P).abs().max() > 0.01 and gate(x, ids).aux["permutation"].item() == pytest.approx(want.item(), 1e-4)


def test_the_authors_harden_the_soft_permutation():
    """The best assignment of the last soft P, which is often not that of L."""
    gate, different = permuted(schedule="official"), 0
    for _ in range(30):
        gate.set_step(8)
        with torch.no_grad():
            gate.logits.copy_(0.3 * torch.randn(5, 5))
        want = best_permutation(gate.soft()).argsort()
        different += not torch.equal(want, best_permutation(gate.logits).argsort())
        gate.harden()
        assert torch.equal(gate.source, want)
    assert different > 3


def test_permutation_is_left_alone_by_adamw_after_T():
    gate, (x, ids) = permuted(), data()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.01, weight_decay=0.1)
    start = gate.logits.clone()
    descend(gate, optimizer, range(9), x, ids)
    searched = gate.logits.clone()
    assert not torch.equal(searched, start)
    descend(gate, optimizer, range(9, 60), x, ids)
    assert torch.equal(gate.logits, searched)


@pytest.mark.parametrize("schedule", ["corrected", "official"])
@pytest.mark.parametrize("step", [4, 8, 30])
def test_permutation_resumes(schedule, step):
    gate, (x, ids) = permuted(schedule=schedule), data()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.01)
    descend(gate, optimizer, range(step + 1), x, ids)
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

    D, E, k, looks_ahead, drop_order, drops_itself, loss_weights = D, 5, 3, "always", "score", True, {"a": 2.0}
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
    assert (gate.k, gate.E, gate.looks_ahead, gate.drop_order, gate.drops_itself) == (3, 5, "always", "score", True)
    assert gate.loss_weights == {"a": 2.0, "permutation": 1e-4}
    gate.update()
    assert gate.gate.steps == 2 and gate.gate.updates == 1
    soft, hard = gate(x, ids), gate.eval()(x, ids)
    inverse = torch.tensor(CYCLE).argsort()
    assert torch.equal(hard.G, x[:, :5].exp()[:, inverse]) and torch.equal(hard.priority, -hard.G)
    assert hard.capacity.tolist() == inverse.tolist() and hard.capacity.dtype == torch.long
    assert soft.priority.shape == (40, 5) and soft.capacity is None  # while P is soft every expert sees every token


def test_freezing_takes_the_gradient_of_the_permutation():
    gate = router.Permuted(router.TopK(4, 4), steps=10, search=0.5)
    gate.set_step(0)
    gate(torch.randn(5, 4), None).G[:, 0].sum().backward()
    assert gate.logits.grad is not None
    gate.set_step(4)
    assert gate.logits.grad is None and not gate.logits.requires_grad


def test_permutation_of_one_expert():
    gate, (x, ids) = permuted(COMET(D, 1, 1)), data()
    for step in (0, 5, 9):
        gate.set_step(step)
        assert torch.allclose(gate(x, ids).G, torch.ones(40, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Appendix: solvers


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


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_best_permutation_by_enumeration(n):
    for score in (torch.randn(n, n), torch.randint(3, (n, n)).float(), torch.zeros(n, n), torch.randn(n, n) * 1e4):
        got = best_permutation(score)
        assert got.sort().values.tolist() == list(range(n))
        best = max(sum(float(score[i, p[i]]) for i in range(n)) for p in itertools.permutations(range(n)))
        assert float(score.double().gather(1, got[:, None]).sum()) == pytest.approx(best, rel=1e-5, abs=1e-5)


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


def test_capacity_closed_form_never_overshoots():
    for D, E, delta in itertools.product((4, 16, 256, 5120), (2, 4), (0.01, 0.1, 0.3, 0.6, 0.9)):
        exact, closed = locmoe_capacity(delta, D, E)
        assert closed <= exact
    gate = LocMoE(64, 4, delta=0.375, slots=2.0)
    x, ids = torch.randn(10, 64), torch.zeros(10)
    bound = 2 / (4 * 0.0021)
    assert gate(x, ids).capacity == pytest.approx(2 * bound, rel=0.05)
    assert gate.eval()(x, ids).capacity is None and LocMoE(64, 4)(x, ids).capacity is None


def test_queue():
    expert, key = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([0.1, 0.5, 0.9, 0.4, 0.6])
    order, place, load = queue(expert, key, 4)
    assert order.tolist() == [4, 1, 2, 3, 0] and place.tolist() == [0, 1, 0, 1, 2] and load.tolist() == [2, 0, 3, 0]
    for alike in torch.zeros(5), None:
        order, place, _ = queue(expert, alike, 4)
        assert order.tolist() == [1, 4, 0, 2, 3] and place.tolist() == [0, 1, 0, 1, 2]


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


def test_infinite_scores_do_not_hang_the_matching():
    """An overflowing router ends in the loop's own message; until then every token has an expert with a slot."""
    child = multiprocessing.get_context("fork").Process(target=match_infinite_scores)
    child.start()
    child.join(30)
    child.kill()  # if it hangs
    assert child.exitcode == 0


def match_infinite_scores():
    inf = math.inf
    torch.manual_seed(0)
    for size in range(60):  # differences that float64 can no longer add up
        logp = (torch.randn(32, 4) * 10.0 ** (size % 38)).log_softmax(1)
        assert best_assignment(logp, 8)[0].bincount(minlength=4).tolist() == [8] * 4
    for S in ([[0, -inf], [0, -1], [0, 0]], [[inf, 0], [0, inf], [0, 0]], [[math.nan, 3e38], [-3e38, 0], [0, 0]]):
        z, dist = best_assignment(torch.tensor(S), 2)
        assert z.bincount(minlength=2).max() <= 2 and dist.isfinite().all()
    assert best_assignment(torch.tensor([[0, -inf], [0, -1], [0, 0]]), 2)[0].tolist() == [0, 0, 1]
    gate = router.GumbelMatching(8, 2)
    gate.weight.data = torch.tensor([[0.0] * 8, [-2.0] * 8])
    assert gate(torch.full((4, 8), 3e38), torch.zeros(4).long()).G.shape == (4, 2)


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


def test_matching_weighs_by_the_conditional_of_its_noise():
    """The gate's own G, with noise that we know: the best of all assignments, and p / q by trying them all."""
    gate, place = GumbelMatching(k, k).double(), Place(n)
    gate.weight.data.normal_()
    x, noise = torch.randn(n, k).double(), Place(n).gumbel(k).double()
    place.gumbel = lambda *shape: noise
    G, logp = gate(x, None, place).G, (x @ gate.weight.T).log_softmax(1)
    Z, i = assignments(n, k, c), torch.arange(n)
    value = (logp + noise)[i, Z]  # (assignments, n)
    best = Z[value.sum(1).argmax()]
    assert torch.equal(G.argmax(1), best)
    for row in range(n):
        others = value.sum(1) - value[:, row]
        V = torch.stack([others[Z[:, row] == e].max() for e in range(k)])
        w = (logp[row] - (logp[row] + V).log_softmax(0)).exp()
        assert torch.allclose(G[row], w * F.one_hot(best[row], k))


def test_locmoeplus_losses_by_hand():
    """Two choices a token, four nodes of two experts each."""
    gate, x, node = LocMoEPlus(32, 8, k=2), torch.randn(40, 32), torch.arange(40) // 10
    r = gate(x, None, Place(40, node=node, near=HOMES))
    cos = x.view(40, 8, 4).sum(2) / x.norm(dim=1, keepdim=True) / 2  # |w_e| = 1/2: four ones, over four
    p = (32**0.5 * cos).softmax(1)
    chosen = torch.zeros(40, 8).scatter(1, p.topk(2, dim=1).indices, 1.0)
    assert r.aux["balance"].item() == pytest.approx(8 * (chosen.mean(0) / 2 * p.mean(0)).sum().item(), rel=1e-5)
    target = torch.where(HOMES, 0.9 / 2, 0.1 / 6)
    kl = [(m * (m / target[v]).log()).sum().item() for v in range(4) for m in [p[node == v].mean(0)]]
    assert r.aux["locality"].item() == pytest.approx(sum(kl) / 4, rel=1e-4)


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


# ---------------------------------------------------------------------------------------------------------------------
# python router.py


def test_the_printout_shows_every_gate(capsys):
    router.show()
    shown = capsys.readouterr().out
    assert all(f"\n{name}" in shown for name in GATES)
    assert len(shown.splitlines()) == 1 + 6 * (len(GATES) + 2)  # an idea and four experts each; dts thrice
