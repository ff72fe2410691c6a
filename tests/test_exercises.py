"""
Answers to the exercises of EXERCISES.md, one test each: the docstring says the answer, the test shows it.

Read an answer after you have one of your own. Each test stands by itself and runs on one process.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ranks  # noqa: F401  puts the repository on the path
from dist import Mesh
from evomoe import offspring
from experts import Experts, MoE, drop, drop_priority, every_expert
from router import BASE, ExpertChoice, Gate, Place, Routing, Soft, Switch, TopK, balance_loss, linear


def new_layer(gate, seed=0):
    """An MoE layer in float64 around a gate, its router's weights of size 1 so that they say something."""
    torch.manual_seed(seed)
    experts = Experts(gate.E, gate.D, 2 * gate.D)
    experts.init(seed, layer=0, std1=0.5, std2=0.5)
    nn.init.normal_(gate.weight)
    return MoE(gate, experts).double()


def new_tokens(n, D, seed=1):
    """x (n, D) in float64, ids (n,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator, dtype=torch.float64), torch.arange(n)


# -- 1: top-k in ten lines -------------------------------------------------------------------------------------------


class TenLines(Gate):
    def __init__(self, D, E, k=2):
        super().__init__(D, E, k)
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
        self.loss_weights = {"balance": 0.01}

    def forward(self, x, ids):
        p = linear(x, self.weight).softmax(1)
        w, idx = p.topk(self.k, dim=1)
        w = w / w.sum(1, keepdim=True) if self.k > 1 else w
        G = torch.zeros_like(p).scatter(1, idx, w)
        return Routing(G, {"balance": balance_loss(p, G > 0, self.place)})


@pytest.mark.parametrize("k", [1, 2])
def test_1_top_k_in_ten_lines(k):
    """TenLines fills G as TopK does, k weights a row, and the layer computes what the equation says. For k = 1 the
    weight stays p: divided by itself it would be a constant (exercise 3)."""
    layer, (x, ids) = new_layer(TenLines(D=8, E=4, k=k)), new_tokens(32, 8)
    G = layer.gate(x, ids).G
    assert ((G != 0).sum(1) == k).all()
    assert torch.allclose(layer(x, ids)[0], every_expert(x, G, layer.experts))
    ours = TopK(D=8, E=4, k=k).double()
    ours.load_state_dict(layer.gate.state_dict())
    assert torch.allclose(G, ours(x, ids).G)


# -- 2: counts that carry a gradient ---------------------------------------------------------------------------------


def test_2_counts_that_carry_a_gradient():
    """With p for the counts the loss is E sum_e P_e^2: it wants even mean probabilities and is content with four tokens
    of which three choose expert 0, while the counts of the real loss still push them apart."""
    p = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]], dtype=torch.float64)  # its mean is (1/2, 1/2)
    logits = p.log().requires_grad_()

    def force(loss):
        """How much gradient descent on the loss, a function of p, changes the logits of each token."""
        return -torch.autograd.grad(loss(logits.softmax(1)), logits)[0]

    with_counts = force(lambda p: balance_loss(p, p > 0.5, Place(4)))
    with_p = force(lambda p: 2 * p.mean(0).square().sum())
    assert (with_counts[:, 0] < -0.01).all() and (with_counts[:, 1] > 0.01).all()  # away from the crowded expert 0
    assert with_p.abs().max() < 1e-12  # nothing to do: the mean is even

    def without_detach(p):
        f, P = (p > 0.5).double().mean(0), p.mean(0)
        return 2 * (f / f.sum() * P).sum()

    assert torch.allclose(force(without_detach), with_counts)  # a comparison has no gradient that one could detach


# -- 3: Switch's weight renormalised to 1 ----------------------------------------------------------------------------


class WeightOne(Switch):
    def forward(self, x, ids):
        G, aux, *rest = super().forward(x, ids)
        return Routing(G / G.sum(1, keepdim=True), aux, *rest)


def test_3_a_weight_of_one_teaches_the_router_nothing():
    """p / p is the constant 1: the task loss then sends the router no gradient, and the balance loss, which never saw
    the weight, still moves it."""
    x, ids = new_tokens(32, 8)

    def gradients(gate):
        """Of the task loss and of the balance loss, the largest entry each."""
        layer = new_layer(gate)
        y, aux = layer(x, ids)
        task = torch.autograd.grad((y - x).square().mean(), gate.weight, retain_graph=True)[0]
        balance = torch.autograd.grad(aux["balance"], gate.weight)[0]
        return task.abs().max(), balance.abs().max()

    task, balance = gradients(Switch(D=8, E=4))
    assert task > 1e-3 and balance > 1e-3
    task, balance = gradients(WeightOne(D=8, E=4))
    assert task < 1e-12 and balance > 1e-3


# -- 4: who is dropped -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order, dropped",
    [
        ("arrival", [(2, 1), (3, 0), (4, 0), (4, 2)]),  # whoever comes third or later
        ("choice", [(0, 0), (1, 1), (4, 0), (4, 2)]),  # expert 0: tokens 1, 3 and 4 have it as first choice, 0 has not
        ("score", [(0, 0), (1, 0), (1, 1), (3, 2)]),  # expert 0 keeps 0.9 and 0.7
    ],
)
def test_4_who_is_dropped(order, dropped):
    """(token, expert) that go when each expert has two slots. Token 4 loses both its experts by arrival and by choice,
    token 1 by score: their output is zero, only the residual connection is left of them."""
    G = torch.tensor([[0.4, 0.6, 0], [0.55, 0.45, 0], [0, 0.55, 0.45], [0.9, 0, 0.1], [0.7, 0, 0.3]])
    kept = drop(G, 2, drop_priority(order, G, Place(5)))
    assert [tuple(pair) for pair in ((G != 0) & (kept == 0)).nonzero().tolist()] == dropped
    left_out = (kept == 0).all(1).nonzero()[:, 0].tolist()
    assert left_out == ([1] if order == "score" else [4])


# -- 5: who looks at later tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gate, training, looks",
    [
        (BASE(D=2, E=2), True, True),
        (BASE(D=2, E=2), False, False),
        (ExpertChoice(D=2, E=2, k=1), True, True),
        (ExpertChoice(D=2, E=2, k=1), False, True),
    ],
)
def test_5_who_looks_at_later_tokens(gate, training, looks):
    """The first of two tokens prefers expert 0. If the second one prefers it more, BASE gives the first expert 1 in
    training and keeps to its wish at evaluation; expert choice, k = 1, turns it away at evaluation as well."""
    nn.init.eye_(gate.weight)  # so that the logits are x itself
    gate.train(training)

    def experts_of_the_first(second):
        x = torch.tensor([[1.0, 0.0], second])
        return gate(x, torch.zeros(2, dtype=torch.long)).G[0].nonzero()[:, 0].tolist()

    assert experts_of_the_first(second=[0.0, 2.0]) == [0]
    assert experts_of_the_first(second=[2.0, 0.0]) == ([1] if looks else [0])


# -- 6: what makes experts part --------------------------------------------------------------------------------------


def updates_after_a_spawn(ratio, router_std):
    """How far w1 of each of four experts spawned from one has moved after 20 steps of SGD (4, H, D), and the router."""
    torch.manual_seed(0)
    first, experts, gate = Experts(1, 8, 16).double(), Experts(4, 8, 16).double(), Soft(D=8, E=4).double()
    first.init(0, layer=0, std1=0.5, std2=0.5)
    children = [offspring(first, 0, e, SimpleNamespace(seed=0, spawn="mask", spawn_ratio=ratio)) for e in range(4)]
    for name, p in experts.named_parameters():
        p.data = torch.stack([child[name].value for child in children]).detach()
    nn.init.normal_(gate.weight, std=router_std)
    layer, (x, ids) = MoE(gate, experts), new_tokens(32, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    w1, router = experts.w1.detach().clone(), gate.weight.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        (layer(x, ids)[0] - x).square().mean().backward()
        optimizer.step()
    return experts.w1.detach() - w1, gate.weight.detach() - router


@pytest.mark.parametrize("ratio, router_std, part", [(0.0, 0.0, False), (0.3, 0.0, True), (0.0, 1.0, True)])
def test_6_what_makes_experts_part(ratio, router_std, part):
    """Copies with equal weights get equal gradients, and a choice between equal outputs teaches the router nothing:
    they never part. Masks make the gradients differ; so do unequal weights in G."""
    moved, router = updates_after_a_spawn(ratio, router_std)
    spread = (moved - moved.mean(0)).abs().max() / moved.abs().max()
    assert moved.abs().max() > 0.01
    assert spread > 0.1 if part else spread < 1e-9
    assert router.abs().max() > 1e-3 if part else router.abs().max() < 1e-9


# -- 7: rows that cross nodes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ep, rank, node, far", [(4, 4, 3, 5), (2, 5, 7, 0)])
def test_7_rows_that_cross_nodes(ep, rank, node, far):
    """With one expert on each of four ranks 5 of 12 rows cross nodes, 3 change the rank inside a node, 4 stay. With
    ep = 2 every node has all experts: no row crosses, but the gradients of two replicas of each expert do."""
    sends = torch.tensor(  # (token, expert): where G is not zero; ranks 0 to 3 hold two tokens each
        [[1, 0, 1, 0], [0, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 0]]
    )
    counts = sends.view(4, 2, 4).sum(1)  # (rank, expert): rows of each rank to each expert
    total = {"rank": 0, "node": 0, "far": 0}
    for r in range(4):
        mesh = Mesh(rank=r, world=4, ep=ep, ranks_per_node=2)
        my_group = counts[r - mesh.ep_rank :][:ep]  # what to_experts gathers: the rows of the ranks that share experts
        sent = mesh.traffic(my_group, row_bytes=1)
        total = {where: n + int(sent[f"tokens_{where}"]) for where, n in total.items()}
    assert total == {"rank": rank, "node": node, "far": far}


# -- 8: a wrong factor in the gradients ------------------------------------------------------------------------------


def losses_and_gradient(make_optimizer, divide_by):
    """(40,) losses of a run in which the experts' gradients are divided, and the first such gradient."""
    layer, (x, ids) = new_layer(TopK(D=8, E=4)), new_tokens(64, 8)
    optimizer, losses, gradients = make_optimizer(layer.parameters()), [], []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (layer(x, ids)[0] - x.roll(1, dims=1)).square().mean()
        loss.backward()
        for p in layer.experts.parameters():
            p.grad /= divide_by
        optimizer.step()
        losses.append(loss.detach())
        gradients.append(layer.experts.w1.grad.clone())
    return torch.stack(losses), gradients[0]


def test_8_adam_hides_a_wrong_factor():
    """Adam's step m / sqrt(v) does not change when all gradients of a parameter are a quarter of what they should be:
    the loss curve is the same to 1e-3. That of SGD is not, and the gradients themselves show the factor at once."""
    adam = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.2)
    (right, gradient), (wrong, wrong_gradient) = losses_and_gradient(adam, 1), losses_and_gradient(adam, 4)
    assert right[-1] < 0.8 * right[0] and (right - wrong).abs().max() < 1e-3 * right[0]
    assert torch.allclose(wrong_gradient, gradient / 4) and gradient.abs().max() > 1e-3
    (right, _), (wrong, _) = losses_and_gradient(sgd, 1), losses_and_gradient(sgd, 4)
    assert right[-1] < 0.8 * right[0] and (right - wrong).abs().max() > 0.05 * right[0]


# -- 9: a frozen parameter that moves --------------------------------------------------------------------------------


def zero_gradient(p):
    p.grad = torch.zeros_like(p)


def no_gradient(p):
    p.requires_grad_(False)
    p.grad = None


def gradient_left_behind(p):
    p.requires_grad_(False)


@pytest.mark.parametrize(
    "freeze, least, most", [(zero_gradient, 9, 11), (no_gradient, 0, 0), (gradient_left_behind, 299, 301)]
)
def test_9_a_frozen_parameter_moves(freeze, least, most):
    """In learning rates: a zero gradient lets the momentum carry a parameter on by ten (the powers 1, 2, 3, ... of
    0.9 / sqrt(0.98) add up to 10.0); without a gradient Adam skips it. requires_grad=False alone is not enough: a
    gradient that is still there is used again at every step."""
    p, lr = nn.Parameter(torch.zeros(1, dtype=torch.float64)), 0.01
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(500):
        p.grad = torch.ones_like(p)
        optimizer.step()
    frozen_at = p.item()
    for _ in range(300):
        freeze(p)
        optimizer.step()
    assert least <= (frozen_at - p.item()) / lr <= most
