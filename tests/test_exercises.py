"""
Answers to the README's exercises, one test each: the docstring says the answer, the test shows it.

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
    """TenLines fills G as TopK does, k weights a row, and the layer computes what the equation says."""
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
