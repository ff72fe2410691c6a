"""Every gate of router.py at one small size, in float64, and the tokens that it routes: for test_router.py and
test_experts.py. A class added to router.py is found by gates() and tested without being named."""

import inspect

import torch

from router import Place, gates, make_gate

GATES = sorted(gates())
D, H, E, V, B, T, STEPS = 8, 6, 4, 30, 4, 8, 20  # STEPS: length of the run that schedules see
COUNTS = torch.arange(V, 0, -1)  # token counts, for gates that balance a table


def gate_args(name, D=D, E=E, k=2):
    """What feed_forward offers to every gate, and k to those that take it."""
    k = k if "k" in inspect.signature(gates()[name]).parameters else 0
    return dict(D=D, E=E, k=k, V=V, layer=1, seed=3, counts=COUNTS, n_domains=2, steps=STEPS)


def new_gate(name, lively=True, **sizes):
    """A gate in float64. lively: random weights of size 1 instead of its own, often cautious, initialisation, so that
    routing depends on content and schedules have something to cut off."""
    torch.manual_seed(5)
    gate = make_gate(name, **gate_args(name, **sizes)).double()
    if lively:
        for p in gate.parameters():
            p.data.normal_()
    gate.set_step(0)
    return gate


def tokens(seed=0, n=B * T, D=D):
    """x (n, D), ids (n,), domain (n,)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g, dtype=torch.float64)
    return x, torch.randint(0, V, (n,), generator=g), torch.randint(0, 2, (n,), generator=g)


def seeded_route(gate, x, ids, domain=None, seed=7, **where):
    """What the gate returns, with the same noise at every call."""
    torch.manual_seed(seed)
    return gate(x, ids, Place(len(x), domain=domain, **where))


def assert_close(a, b, tol=1e-10, note=""):
    error = float((a.detach() - b.detach()).abs().max()) if a.numel() else 0.0
    assert a.shape == b.shape and error <= tol, f"{note}: differs by {error}"
