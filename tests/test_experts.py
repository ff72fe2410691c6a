"""
experts.py, with every gate of router.py. A class added there is tested here without being named.

    y_n = sum_e G[n, e] * FFN_e(x_n)

is computed once as written, with a dense einsum and a brute-force queue at each expert, and compared with the layer:
values, gradients, what is skipped, who is dropped, padding, ranks. float64 throughout, so that equal means 1e-10.

In the order: the oracle, the experts' matrix product, capacity, the layer's promises (who may look at whom, padding,
corners), and W ranks against one process.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dist
import router
from experts import Experts, MoE, drop, drop_priority, expert_seed, feed_forward, grouped_mm, log_stats, near_experts
from layers import B, D, E, GATES, H, STEPS, T, assert_close, new_gate, seeded_route, tokens
from ranks import run_ranks
from router import Place, gates, make_gate
from runs import config


def new_layer(name, capacity=0.0, groups=1, nodes=1, mesh=None, order="", E=E, **more):
    gate = new_gate(name, E=E, **more)
    mesh = mesh or dist.Mesh()
    mesh.n_nodes = nodes if mesh.world == 1 else mesh.n_nodes  # one process plays several
    mine = E // mesh.ep
    experts = Experts(mine, D, H, bias=True, first=mesh.ep_rank * mine, sharded=True).double()
    experts.init(0, 1, 0.5, 0.5)
    for i in range(mine):
        experts.b1.data[i] = 0.1 * (mesh.ep_rank * mine + i)
        experts.b2.data[i] = 0.2 - 0.1 * (mesh.ep_rank * mine + i)
    layer = MoE(gate, experts, mesh, capacity, drop_order=order, groups=groups)
    return layer


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


def survivors(G, slots, key):
    """(N, E) bool by brute force: at each expert a queue sorted by key(n, e), smallest first, and slots[e] places."""
    keep = torch.zeros_like(G, dtype=torch.bool)
    for e in range(G.shape[1]):
        queue = sorted(G[:, e].nonzero()[:, 0].tolist(), key=lambda n: key(n, e))
        keep[queue[: int(slots[e])], e] = True
    return keep


def queue_key(order, G, u=None):
    """key(n, e) of a drop order; u (N, E) the noise of "random"."""
    if order == "arrival":
        return lambda n, e: n
    w = G.tolist()
    if order == "choice":  # which choice of the token is e? equal weights: the smaller number first
        return lambda n, e: (sorted(range(len(w[n])), key=lambda i: -w[n][i]).index(e), n)
    if order == "score":
        return lambda n, e: (-w[n][e], n)
    return lambda n, e: (-float(u[n, e]), n)


def oracle(layer, x, ids, domain, seed):
    """y (N, D), aux and G (N, E) of a layer, as the equation says: every expert on every token."""
    torch.manual_seed(seed)
    place = layer.place_of(x, None, None, domain)
    routing = layer.gate(x, ids, place)
    G, factor = routing.G, layer.capacity_factor if layer.training else 0
    if factor or routing.capacity is not None:
        random = layer.drop_order == "random" and routing.priority is None
        u = place.rand(layer.gate.E, dtype=torch.float32) if random else None
        keep, start = torch.zeros_like(G, dtype=torch.bool), 0
        for n in place.sizes:
            rows = slice(start, start + n)
            own = math.ceil(factor * layer.gate.k * n / layer.gate.E) if routing.capacity is None else routing.capacity
            slots = (
                own[rows][0] if torch.is_tensor(own) and own.dim() == 2 else torch.as_tensor(own).expand(layer.gate.E)
            )
            if routing.priority is not None:
                p = routing.priority[rows]
                key = lambda n, e: (-float(p[n, e]), n)
            else:
                key = queue_key(layer.drop_order, G[rows].detach(), None if u is None else u[rows])
            keep[rows], start = survivors(G[rows].detach(), slots, key), start + n
        G = G * keep
    w = layer.experts
    h = F.gelu(torch.einsum("nd,ehd->neh", x, w.w1) + w.b1)
    return torch.einsum("ne,ned->nd", G, torch.einsum("neh,ehd->ned", h, w.w2) + w.b2), routing.aux, G


def total_loss(gate, y, aux, seed=11, aux_weight=0.3):
    """A loss in which everything that can carry a gradient does: y (..., D), aux."""
    g = torch.Generator().manual_seed(seed)
    loss = (y * torch.randn(y.shape, generator=g, dtype=y.dtype)).sum()
    if "log_prob" in aux:
        loss = loss + (aux["log_prob"] * torch.randn(aux["log_prob"].shape, generator=g, dtype=y.dtype)).sum()
    return loss + aux_weight * sum(aux[name] for name in gate.loss_weights if name in aux and name != "log_prob")


def gradients(layer, x, loss):
    """{name: gradient}, zeros where there is none. A gate whose weights are constant (hash) may leave x without."""
    named = {"x": x} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(loss, named.values(), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), got)}


def test_every_expert_of_every_layer_has_a_seed_of_its_own():
    some = [expert_seed(seed, layer, e) for seed in (0, 1, 1337, 2**40 - 1) for layer in (0, 1, 2, 1999)
            for e in (0, 1, 1008, 1009, 1010, 2017, 2018, 2**14 - 1, 2**14)]  # fmt: skip
    assert len(set(some)) == len(some) and all(s % 2 == 0 and 0 <= s < 2**63 for s in some)
    assert expert_seed(1337, 2, 5) == ((1337 * 1009 + 2) * 1009 + 5) * 2


def test_a_shared_expert_sees_every_token():
    """Beside the routed ones, also where capacity drops a token from all of them; padding stays 0."""
    x, ids, domain = tokens()
    layer, live = new_layer("topk", capacity=0.3), torch.arange(len(x)) % 5 > 0
    without = layer(x, ids, live, domain)[0]
    layer.shared = Experts(1, D, 3, bias=True, first=E).double()
    layer.shared.init(0, 1, 0.5, 0.5)
    layer.shared.b2.data.fill_(0.7)
    ffn = F.gelu(x @ layer.shared.w1[0].T) @ layer.shared.w2[0] + 0.7
    assert (without == 0).all(1).sum() > (~live).sum()
    assert_close(layer(x, ids, live, domain)[0], without + ffn * live[:, None])


SCENARIOS = {
    "dropless": dict(),
    "binding": dict(capacity=0.6),
    "two groups": dict(capacity=0.6, groups=2),
    "two nodes": dict(capacity=0.6, groups=4, nodes=2),
}
BRIEFLY = {  # a capacity changes G, whatever the step: one of them is enough for each order
    "ample": dict(capacity=100.0),
    **{order: dict(capacity=0.6, order=order) for order in ("arrival", "choice", "score", "random")},
}
MOMENTS = [(0, True), (STEPS // 2, True), (STEPS, True), (STEPS, False)]  # step, training


@pytest.mark.parametrize("name", GATES)
def test_layer_equals_the_equation(name):
    """Values and gradients, and exactly the rows with a non-zero weight are computed."""
    x, ids, domain = tokens()
    for scenario, more in (SCENARIOS | BRIEFLY).items():
        for step, training in MOMENTS if scenario in SCENARIOS else MOMENTS[1:2]:
            layer = new_layer(name, **more)
            note = f"{scenario}, step {step}, {'training' if training else 'evaluation'}"
            layer.gate.set_step(step)
            layer.train(training)
            twin, computed = copy.deepcopy(layer), []
            layer.experts.register_forward_pre_hook(lambda m, args: computed.append(len(args[0])))
            xs = [x.clone().requires_grad_() for _ in range(2)]
            torch.manual_seed(step)
            y, aux = layer(xs[0], ids, domain=domain)
            want, want_aux, G = oracle(twin, xs[1], ids, domain, step)
            assert_close(y, want, note=f"{note}: y")
            assert aux.keys() == want_aux.keys()
            for key in aux:
                assert_close(aux[key], want_aux[key], note=f"{note}: {key}")
            got = gradients(layer, xs[0], total_loss(layer.gate, y, aux))
            for key, g in gradients(twin, xs[1], total_loss(twin.gate, want, want_aux)).items():
                assert_close(got[key], g, note=f"{note}: gradient of {key}")
            assert computed == [int((G != 0).sum())], f"{note}: {computed} rows for {int((G != 0).sum())} weights"
            assert torch.equal(layer.stats["kept"], (G != 0).sum(0))
            asked = layer.stats["asked"]
            assert (asked >= layer.stats["kept"]).all() and not asked.requires_grad
            if scenario == "binding" and training and layer.gate.k < E:
                own_capacity = seeded_route(layer.gate, x, ids, domain).capacity is not None
                assert own_capacity or int(asked.sum()) > int((G != 0).sum()), f"{note}: nothing was dropped"
            if scenario == "ample" or not training:
                own_capacity = seeded_route(layer.gate, x, ids, domain).capacity is not None
                assert own_capacity or torch.equal(asked, layer.stats["kept"]), f"{note}: somebody was dropped"


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("lively", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_the_router_learns(name, lively, k):
    """The task loss alone, without any balance loss, reaches the weights of every gate that has some; also with k = 1,
    where a weight that is renormalised to 1 would have no gradient."""
    layer = new_layer(name, lively=lively, k=k)
    learned = [p for p in layer.gate.parameters() if p.requires_grad]
    if learned:
        x, ids, domain = tokens()
        y, aux = layer(x, ids, domain=domain)
        loss = total_loss(layer.gate, y, aux, aux_weight=0.0)
        grads = [g for g in torch.autograd.grad(loss, learned, allow_unused=True) if g is not None]
        note = "the task loss does not reach the router: with k = 1 a weight divided by its sum is the constant 1"
        assert sum(float(g.abs().sum()) for g in grads) > 1e-8, note


# ---------------------------------------------------------------------------------------------------------------------
# The experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouped_mm_equals_a_loop(dtype):
    torch.manual_seed(0)
    for counts in ([3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0]):
        for shape in ((16, 8), (8, 24), (6, 10)):  # the last one is not aligned to 16 bytes
            rows = torch.randn(sum(counts), shape[0], dtype=dtype, requires_grad=True)
            w = torch.randn(4, *shape, dtype=dtype, requires_grad=True)
            want = torch.cat([r @ m for r, m in zip(rows.split(counts), w)])
            got = grouped_mm(rows, w, torch.tensor(counts))
            seed = torch.randn_like(want)
            tol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
            assert_close(got, want, tol)
            for a, b in zip(torch.autograd.grad(got, (rows, w), seed), torch.autograd.grad(want, (rows, w), seed)):
                assert_close(a, b, tol)


def test_experts_compute_in_the_precision_of_autocast():
    for n in (1, 4):
        experts, seen = Experts(n, 16, 32), []
        experts.init(0, 0, 0.1, 0.1)
        experts.dropout.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            y = experts(torch.randn(4, 16), torch.full((n,), 4 // n))
        assert y.dtype == torch.bfloat16 and seen == [torch.bfloat16]


def test_rows_travel_in_the_precision_of_autocast(monkeypatch):
    """There and back; what counts the bytes is told."""
    sent, layer = [], feed_forward(config(), 1, True, V=10)
    for way in ("to_experts", "to_tokens"):
        real = getattr(dist.Mesh, way)
        monkeypatch.setattr(dist.Mesh, way, lambda mesh, rows, *more, real=real: (
            sent.append(rows.dtype), real(mesh, rows, *more))[1])  # fmt: skip
    x, ids, _ = tokens(D=16)
    for on, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y, _ = layer(x.float().view(1, -1, 16), ids.view(1, -1))
        assert sent[-2:] == [dtype, dtype] and layer.stats["row_bytes"] == 16 * dtype.itemsize
        assert y.dtype == torch.float32


def test_a_mixture_is_made_as_the_config_says():
    layer = feed_forward(config(capacity_factor=0.7, drop_order="score", groups=3), 1, True, V=10)
    assert (layer.capacity_factor, layer.drop_order, layer.groups) == (0.7, "score", 3)
    layer = feed_forward(config(shared_hidden=8, activation="gelu_tanh", dropout=0.3, bias=True), 1, True, V=10)
    for ffn in (layer.experts, layer.shared):
        assert (ffn.gelu, ffn.dropout.p, ffn.b1 is not None) == ("tanh", 0.3, True)
    assert ("permuted", 49) in feed_forward(config(permute=0.5), 1, True, V=10, steps=100).gate.phases()


def test_gelu_tanh_is_gpt2s_approximation():
    ffn, x = feed_forward(config(n_experts=1, activation="gelu_tanh"), 0, False).double(), 30 * tokens(D=16)[0]
    h = x @ ffn.w1[0].T
    want = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) @ ffn.w2[0]
    assert_close(ffn(x), want)


# ---------------------------------------------------------------------------------------------------------------------
# Capacity


def random_G(seed, n=40, E=5):
    g = torch.Generator().manual_seed(seed)
    G = torch.rand(n, E, generator=g, dtype=torch.float64)
    G[torch.rand(n, E, generator=g) < 0.4] = 0
    G[::3] = G[::3].round(decimals=1)  # equal weights
    return G


@pytest.mark.parametrize("order", ["arrival", "choice", "score", "random"])
def test_survivors_are_the_right_ones(order):
    for seed in range(6):
        G = random_G(seed)
        n_e = (G != 0).sum(0)
        batch = Place(len(G))
        torch.manual_seed(seed)
        priority = drop_priority(order, G, batch)
        torch.manual_seed(seed)
        u = batch.rand(5)
        for capacity in (0, 1, 7, 1000, n_e, n_e - 1, n_e + 1, torch.tensor([0, 1, 100, int(n_e[3]), int(n_e[4]) - 1])):
            slots = torch.as_tensor(capacity).expand(5)
            want = G * survivors(G, slots, queue_key(order, G, u))
            got = drop(G, capacity, priority)
            assert torch.equal(got, want), (order, seed, capacity)
            assert torch.equal((got != 0).sum(0), torch.minimum(n_e, slots.clamp(min=0)))


def test_a_random_drop_order_does_not_depend_on_the_number_of_ranks():
    layer = new_layer("topk")

    def drawn(rank, world):
        layer.mesh, n = dist.Mesh(rank, world, 1, world), 6 // world
        torch.manual_seed(0)
        return drop_priority("random", torch.ones(n, E), layer.place_of(torch.zeros(n, D), None, None, None))

    assert torch.equal(torch.cat([drawn(0, 2), drawn(1, 2)]), drawn(0, 1))


def test_drop_is_a_map_with_the_gradient_of_what_survives():
    G = random_G(0).requires_grad_()
    out = drop(G, 3)
    out.sum().backward()
    assert torch.equal(G.grad, torch.where((G != 0) & (out == 0), 0.0, 1.0).double())


def test_capacity_is_rounded_up_and_counts_per_group():
    gate = make_gate("switch", D=D, E=E)
    layer = MoE(gate, Experts(E, D, H), capacity_factor=1.25, groups=3)
    G = F.one_hot(torch.zeros(20, dtype=torch.long), E).double()  # everybody wants expert 0
    place = layer.place_of(torch.zeros(20, D), None, None, None)
    kept = layer.apply_capacity(router.Routing(G, {}), place)
    assert place.sizes == [7, 7, 6]
    assert [int(part[:, 0].sum()) for part in kept.split(place.sizes)] == [3, 3, 2]  # ceil(1.25 * n / 4)
    layer.eval()
    assert torch.equal(layer.apply_capacity(router.Routing(G, {}), place), G)
    slots = [
        router.fair_slots(*case) for case in ((1.1, 100, 10), (1.1, 800, 8), (2.2, 50, 10), (1.25, 7, 4), (9, 6, 3))
    ]
    assert slots == [11, 110, 11, 3, 6]  # exact products stay, others go up, and nobody needs more than all


@pytest.mark.parametrize("name, args", [("locmoeplus", ""), ("locmoe", "delta=0.3"), ("skip", "")])
def test_a_capacity_factor_that_a_gate_ignores_cuts_nothing(name, args):
    """Nor behind a permutation that is being searched, which takes the gate's own capacity away."""
    x, ids, _ = tokens()
    for wrap in (lambda gate: gate, lambda gate: router.Permuted(gate, steps=100)):
        kept = []
        for factor in (0, 0.5):
            torch.manual_seed(0)
            gate = wrap(make_gate(name, args, D=D, E=E)).double()
            gate.set_step(0)
            layer = MoE(gate, Experts(E, D, H).double(), capacity_factor=factor)
            kept.append(layer.apply_capacity(gate(x, ids), layer.place_of(x, None, None, None)))
        assert torch.equal(*kept), wrap


def test_what_the_log_says_about_two_layers():
    """Layer 1: all six tokens want expert 0, which has three slots; layer 2: two experts each, one of them shared."""
    wants = [F.one_hot(torch.zeros(6, dtype=torch.long), 4).double(), torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0]] * 3)]
    layers = []
    for G, factor in zip(wants, (2.0, 0.0)):
        layer = MoE(make_gate("switch", D=D, E=4), Experts(4, D, H).double(), capacity_factor=factor)
        layer.gate.forward = lambda x, ids, G=G.double(): router.Routing(G, {})
        layer.experts.init(0, 0, 0.1, 0.1)
        layer(torch.randn(6, D, dtype=torch.float64), torch.zeros(6, dtype=torch.long))
        layers.append(layer)
    seen = log_stats(layers, dist.Mesh())
    assert seen["experts_per_token"] == (3 + 12) / 12 and seen["dropped"] == pytest.approx(3 / 18)
    assert seen["load"] == [4, 0, 0, 0] and (seen["load_min"], seen["load_max"]) == (0, 4)
    assert log_stats(layers[::-1], dist.Mesh())["load_max"] == 4  # in whichever layer


def traffic_of_two_layers(rank, world):
    """Rank r of two sends r + 1 rows to the other's expert and one to its own, in each of two layers."""
    mesh = dist.make_mesh(rank, world, 2, ranks_per_node=1)
    layers = []
    for layer in range(2):
        moe = MoE(make_gate("switch", D=D, E=2), Experts(1, D, H, first=rank, sharded=True), mesh)
        moe.experts.init(0, layer, 0.1, 0.1)
        to = torch.tensor([rank] + [1 - rank] * (rank + 1))
        moe.gate.forward = lambda x, ids, to=to: router.Routing(F.one_hot(to, 2).float(), {})
        moe(torch.randn(len(to), D), torch.zeros(len(to), dtype=torch.long))
        layers.append(moe)
    return log_stats(layers, mesh)


def test_traffic_is_that_of_all_layers_and_ranks():
    for seen in run_ranks(2, traffic_of_two_layers):
        assert (seen["tokens_far"], seen["tokens_rank"], seen["tokens_node"]) == (2 * (1 + 2), 2 * 2, 0)
        assert seen["bytes_far"] == seen["tokens_far"] * D * 4
        assert seen["load"] == [1.2, 0.8] and (seen["experts_per_token"], seen["dropped"]) == (1, 0)  # 3 and 2 rows


@pytest.mark.parametrize("world, ep, per_node", [(4, 4, 2), (8, 4, 2), (8, 2, 4), (8, 8, 2), (8, 1, 4), (12, 6, 3)])
def test_near_is_what_a_rank_reaches_on_its_node(world, ep, per_node):
    n = 24
    near = near_experts(dist.Mesh(0, world, ep, per_node), n, world // per_node)
    for rank in range(world):
        group = range(rank // ep * ep, rank // ep * ep + ep)  # of expert parallelism
        home = [group[e * ep // n] for e in range(n)]
        assert near[rank // per_node].tolist() == [r // per_node == rank // per_node for r in home]


def test_locality_needs_nodes_of_whole_groups():
    """Six processes, three a node, pairs that share experts: the second pair has a leg on each node."""
    build = lambda gate, *mesh: feed_forward(config(gate, n_experts=8), 1, True, mesh=dist.Mesh(0, *mesh), V=10)
    with pytest.raises(ValueError, match="--gate=locmoe: with --ep=2 and 3 processes a node"):
        build("locmoe", 6, 2, 3)
    build("switch", 6, 2, 3), build("locmoe", 8, 4, 2), build("locmoe", 8, 2, 4)  # whole groups or nodes


# ---------------------------------------------------------------------------------------------------------------------
# Who may look at whom


def with_new_end(t, seed=1):
    """Twice x, ids, domain: the same rows before t, others from there on."""
    old, new = tokens(0), tokens(seed)
    return old, [torch.cat([a[:t], b[t:]]) for a, b in zip(old, new)]


def kept(layer, x, ids, domain):
    """G after the capacity, with the same noise at every call."""
    torch.manual_seed(7)
    place = layer.place_of(x, None, None, domain)
    return layer.apply_capacity(layer.gate(x, ids, place), place)


@pytest.mark.parametrize("name", GATES)
def test_no_look_at_the_future(name):
    """Other tokens from position t on: the rows before t stay as they are, dropped ones too (in arrival order)."""
    layer = new_layer(name, capacity=0.6, order="arrival")
    for step in (0, STEPS):
        layer.gate.set_step(step)
        for training in (True, False):
            layer.train(training)
            if layer.gate.looks_ahead == "never" or (layer.gate.looks_ahead == "training" and not training):
                for t in (1, 7, B * T - 1):
                    a, b = (kept(layer, *rows)[:t] for rows in with_new_end(t))
                    assert_close(a, b, 1e-12, f"step {step}, training {training}, t {t}")


@pytest.mark.parametrize("name", [n for n in GATES if gates()[n].looks_ahead != "never"] or ["none"])
def test_gates_that_look_ahead_say_so(name):
    """The promise is not given away lightly: looks_ahead = "training" and "always" are claims that can be seen."""
    if name != "none":
        layer = new_layer(name, capacity=0.6).train(gates()[name].looks_ahead == "training")
        pairs = ([kept(layer, *rows)[:16] for rows in with_new_end(16, seed)] for seed in range(1, 9))
        assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", [n for n in GATES if gates()[n].looks_ahead != "always"])
def test_evaluation_does_not_depend_on_neighbours(name):
    layer = new_layer(name, capacity=0.6).eval()
    x, ids, domain = tokens()
    for step in (0, STEPS):
        layer.gate.set_step(step)
        y = layer(x, ids, domain=domain)[0]
        for rows in (slice(5, 6), slice(3, 17), slice(None, None, 3)):
            assert_close(layer(x[rows], ids[rows], domain=domain[rows])[0], y[rows], 1e-12, f"step {step}, {rows}")


# ---------------------------------------------------------------------------------------------------------------------
# Padding and corners


@pytest.mark.parametrize("name", GATES)
def test_padding_is_invisible(name):
    """Padding gets 0, changes nobody's output and no loss; without it the evaluation is the same."""
    layer = new_layer(name, capacity=0.6)
    x, ids, domain = (t.view(B, T, *t.shape[1:]) for t in tokens())
    live = torch.arange(T) < torch.tensor([T, 3, 0, 5])[:, None]
    results = []
    for junk in (0.0, 50.0):
        torch.manual_seed(3)
        layer.gate.load_state_dict(new_gate(name).state_dict())
        padded = torch.where(live[..., None], x, x + junk)
        results.append(layer(padded, torch.where(live, ids, 1), live, domain))
        assert (results[-1][0][~live] == 0).all()
        assert layer.stats["tokens"] == int(live.sum())
    (y, aux), (y2, aux2) = results
    assert_close(y, y2, 0.0, "y")
    for key in aux:
        assert_close(aux[key], aux2[key], 0.0, key)
    layer.eval()
    if layer.gate.looks_ahead != "always":
        y = layer(x, ids, live, domain)[0]
        assert_close(y[live], layer(x[live], ids[live], domain=domain[live])[0], 1e-12, "without padding")


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("case", ["one token", "no token", "all alike", "more experts than tokens", "k = E", "k = 1"])
def test_corners(name, case):
    sizes = dict(E=8) if "more" in case else dict(k=E) if case == "k = E" else dict(k=1) if case == "k = 1" else {}
    x, ids, domain = tokens(n={"one token": 1, "no token": 0, "more experts than tokens": 5}.get(case, B * T))
    if case == "all alike":
        x, ids, domain = (t[:1].expand_as(t).contiguous() for t in (x, ids, domain))
    for capacity in (0.0, 0.6):
        layer = new_layer(name, capacity, **sizes)
        for step in (0, STEPS):
            layer.gate.set_step(step)
            for training in (True, False):
                layer.train(training)
                t = x.clone().requires_grad_()
                torch.manual_seed(1)
                y, aux = layer(t, ids, domain=domain)
                assert y.shape == x.shape and y.isfinite().all()
                assert all(v.isfinite().all() for v in aux.values()), aux
                layer.zero_grad()
                total_loss(layer.gate, y, aux).backward()
                for key, p in layer.named_parameters():
                    assert p.grad is None or p.grad.isfinite().all(), key
                idle = layer.stats["kept"] == 0
                for key, p in layer.experts.named_parameters():
                    assert p.grad is not None, f"{key}: an idle expert has no gradient instead of a zero one"
                    assert (p.grad[idle] == 0).all(), key
                if len(x) and layer.gate.k < E and capacity == 0:
                    assert int(layer.stats["asked"].sum()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Expert parallelism: W ranks equal one process with groups = W


def two_layers(name, mesh, groups, nodes, capacity):
    """Two layers on top of each other, so that gradients cross both ways of both exchanges."""
    return nn.ModuleList(new_layer(name, capacity, groups, nodes, mesh) for _ in range(2))


def run_layers(name, mesh, groups=1, nodes=1, capacity=0.0, live=None):
    """One training step on this rank's rows -> {part: tensor}, everything whole, so that layouts can be compared."""
    layers = two_layers(name, mesh, groups, nodes, capacity)
    x, ids, domain = (t.view(B, T, *t.shape[1:]) for t in tokens())
    mine = slice(mesh.rank * B // mesh.world, (mesh.rank + 1) * B // mesh.world)
    g = torch.Generator().manual_seed(2)
    target, advantage = (torch.randn(B, T, n, generator=g, dtype=torch.float64) for n in (D, 1))
    h = x[mine].clone().requires_grad_()
    start, loss, out = h, 0.0, {}
    torch.manual_seed(17)
    for i, layer in enumerate(layers):
        y, aux = layer(h, ids[mine], None if live is None else live[mine], domain[mine])
        h = h + y
        loss = loss + 0.3 * sum(aux[key] for key in layer.gate.loss_weights if key in aux and key != "log_prob")
        if "log_prob" in aux:
            loss = loss + (aux.pop("log_prob") * advantage[mine][..., 0]).sum() / (B * T)
        out |= {f"aux {i} {key}": value.detach() for key, value in aux.items()}
        out[f"load {i}"] = mesh.all_reduce(layer.stats["asked"])
    task = (h * target[mine]).sum() / (B * T)
    (loss + task).backward()
    mesh.sync_grads(layers)
    for layer in layers:
        layer.gate.update()
    experts = dist.expert_ids(layers)
    out |= {
        f"gradient {n}": mesh.whole(p.grad) if id(p) in experts else p.grad
        for n, p in layers.named_parameters()
        if p.requires_grad
    }
    out |= {f"state {n}": t for n, t in layers.named_buffers()}
    out["task loss"] = mesh.all_reduce(task)
    rows = slice(None) if mesh.world == 1 else mine
    return out, {"y": h.detach(), "gradient x": start.grad}, rows


RAGGED = torch.arange(T) < torch.tensor([T, 3, 0, 5])[:, None]  # padding; the third row has no token at all
CASES = {2: [dict(), dict(capacity=0.6, live=RAGGED), dict(capacity=0.6)]}
CASES[4] = CASES[2][:2]


def ranks_differ(rank, world, one):
    """[(what, largest difference to one process), ...] over every gate and layout. one: {(name, nodes, case): run}."""
    worst = []
    layouts = [(ep, world) for ep in range(1, world) if world % ep == 0] + [(world, world // 2)]
    for ep, local in layouts:  # the last one: two nodes, for gates that know where they are
        mesh = dist.make_mesh(rank, world, E, ep, local)
        for name in GATES:
            for i, case in enumerate(CASES[world]):
                want, want_rows, _ = one[name, world // local, i]
                got, got_rows, rows = run_layers(name, mesh, **case)
                assert want.keys() == got.keys()
                pairs = [(key, t, got[key]) for key, t in want.items()]
                pairs += [(key, t[rows], got_rows[key]) for key, t in want_rows.items()]
                worst += [
                    (
                        f"{name}, ep {ep}, {world // local} nodes, {', '.join(case) or 'dropless'}: {key}",
                        float((a.double() - b.double()).abs().max()),
                    )
                    for key, a, b in pairs
                    if a.numel()
                ]
    return worst


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world):
    """Outputs, losses, loads, gradients of router, experts and input, state after the step: every gate, every
    layout."""
    one = {
        (name, nodes, i): run_layers(name, dist.Mesh(), world, nodes, **case)
        for name in GATES
        for nodes in (1, 2)
        for i, case in enumerate(CASES[world])
    }
    for worst in run_ranks(world, ranks_differ, one, timeout=120):
        assert len(worst) > 8 * len(GATES)
        wrong = [(key, error) for key, error in worst if not error < 1e-12]
        assert not wrong, wrong[:20]
