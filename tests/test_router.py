"""router.py: what every gate promises, whatever its method. Gates are found by gates()."""

import copy

import pytest
import torch
import torch.nn.functional as F

import router
from layers import B, D, E, GATES, STEPS, T, assert_close, gate_args, new_gate, seeded_route, tokens
from router import Place, gates, make_gate


# ---------------------------------------------------------------------------------------------------------------------
# The interface


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
        ("stablemoe", "dim=0", "stablemoe's dim=0 must be at least 1"),
        ("stablemoe", "stage1=2", "stablemoe's stage1=2.0 must be from 0 to 1"),
        ("locmoe", "eps=0", "locmoe's eps=0.0 must be between 0 and 1"),
        ("deepseekv3", "gamma=-0.1", "deepseekv3's gamma=-0.1 must be at least 0"),
        ("deepseekv3", "route_scale=0", "deepseekv3's route_scale=0.0 must be above 0"),
        ("gumbelmatching", "clip=-1", "gumbelmatching's clip=-1.0 must be at least 0"),
        ("dts", "tau_min=3", "dts's tau_min=3.0 must be above 0 and at most tau_max=2.0"),
        ("dts", "hard=0.1", "dts's hard=0.1 must be at least anneal="),
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


# ---------------------------------------------------------------------------------------------------------------------
# python router.py


def test_the_printout_shows_every_gate(capsys):
    router.show()
    shown = capsys.readouterr().out
    assert all(f"\n{name}" in shown for name in GATES)
    assert len(shown.splitlines()) == 1 + 6 * (len(GATES) + 1)  # the words; an idea and four experts each; dts twice
