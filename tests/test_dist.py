"""
dist.py: W processes give what one process gives. (Its checkpoints: test_checkpoints.py.)

Every layout is compared in float64 with one process on the whole batch; then the same comparison must fail for each of
a list of seeded bugs (MUTANTS), which shows that it can. The gradients are compared, not only the losses: Adam hides
a constant factor in them (see Mesh.sync_grads).
"""

import os
import signal
from contextlib import nullcontext
from functools import lru_cache
from unittest.mock import patch

import pytest
import torch
import torch.distributed as td
from torch.multiprocessing import ProcessRaisedException
from torch import nn

from ranks import run_ranks
import dist
import train
from dist import Mesh, make_mesh
from experts import Experts, MoE
from router import NoisyTopK, TopK

E, D, H, K, V, STEPS, MICRO, N = 8, 6, 5, 2, 11, 5, 2, 24  # N tokens in a global micro-batch
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (W, ep)


# -- a small model -----------------------------------------------------------------------------------------


def layer(mesh, gate):
    """The real thing, with a buffer that is divided among the ranks like the experts' weights."""
    n = E // mesh.ep
    experts = Experts(n, D, H, bias=True, first=mesh.ep_rank * n, sharded=True)
    experts.init(1, 0, D**-0.5, H**-0.5)
    experts.register_buffer("age", mesh.part(torch.arange(E).float()))
    for p in gate.parameters():
        p.data.normal_()
    shared = Experts(1, D, H, bias=True)  # every rank has it whole: its gradient is summed like a dense layer's
    shared.init(0, 1, 0.5, 0.5)
    return MoE(gate, experts, mesh, shared=shared)


class Net(nn.Module):
    """The balance loss of TopK is a sum over tokens, the importance loss of NoisyTopK a square of one: it needs
    mesh.sum, and its noise must not depend on the number of ranks."""

    def __init__(self, mesh):
        super().__init__()
        torch.manual_seed(1)
        self.inp, self.head = nn.Linear(D, D), nn.Linear(D, V)
        self.layers = nn.ModuleList([layer(mesh, TopK(D, E, k=K)), layer(mesh, NoisyTopK(D, E, k=K))])
        self.idle = nn.Parameter(torch.ones(3))  # no gradient on any rank
        self.rare = nn.Parameter(torch.ones(D))  # a gradient on some ranks only
        self.register_buffer("temperature", torch.tensor(2.0))

    def forward(self, x):
        h, aux = self.inp(x), 0
        if (x[:, 0] > 9).any():
            h = h + self.rare * (x[:, :1] > 9)
        for layer in self.layers:
            y, terms = layer(h, torch.zeros(len(h), dtype=torch.long))
            h, aux = h + y, aux + 0.3 * terms.get("balance", 0) + 0.1 * terms.get("importance", 0)
        return self.head(h) / self.temperature, aux


def batch(step, dtype=torch.float64):
    """(MICRO, N, D) inputs, (MICRO, N) targets: dense at the start, none at all in the last quarter."""
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(MICRO, N, D, generator=g, dtype=dtype), torch.randint(0, V, (MICRO, N), generator=g)
    x[:, 0, 0] = 10.0
    y[torch.rand(MICRO, N, generator=g) < torch.linspace(0, 1.3, N)] = -1
    y[:, -N // 4 :] = -1
    return x, y


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def make(mesh, dtype=torch.float64):
    torch.set_default_dtype(dtype)
    model = Net(mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def train_step(model, opt, mesh, step, dtype=torch.float64, micro=MICRO, after_sync=None):
    """One step on this rank's slice of the global batch -> logits (micro, n, V), global task loss, norm."""
    x, y = (t[:micro].chunk(mesh.world, 1)[mesh.rank] for t in batch(step, dtype))
    targets = mesh.all_reduce((y >= 0).sum())
    opt.zero_grad(set_to_none=True)
    torch.manual_seed(step)  # of the gates' noise
    logits, loss = [], 0
    for xs, ys in zip(x, y):
        out, aux = model(xs)
        share = nn.functional.cross_entropy(out, ys, ignore_index=-1, reduction="sum") / targets
        (share + aux / micro).backward()
        logits, loss = logits + [out.detach()], loss + share.detach()
    mesh.sync_grads(model)
    if after_sync:
        after_sync(model)
    norm = mesh.clip_grad_norm(model, 0.1)  # always clips
    opt.step()
    return torch.stack(logits), mesh.all_reduce(loss), norm


def record(mesh, steps=STEPS):
    """What a run looks like: everything whole, so that any two layouts can be compared."""
    model, opt = make(mesh)
    grads, seen = {}, {"loss": [], "norm": []}

    def keep(model):
        experts = dist.expert_ids(model)
        for n, p in model.named_parameters():
            g = torch.zeros_like(p) if p.grad is None else p.grad
            grads[n] = (mesh.whole(g) if id(p) in experts else g).clone()

    for step in range(steps):
        logits, loss, norm = train_step(model, opt, mesh, step, after_sync=keep if step == 0 else None)
        seen["loss"].append(loss)
        seen["norm"].append(norm)
        if step == 0:
            seen["logits"] = logits
    state = dist.full_state(model, opt, mesh)
    return seen, grads, state


def largest(pairs):
    worst = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    return worst if worst == worst else float("inf")


@lru_cache
def one_process(steps):
    return record(Mesh(), steps)


def parity(rank, world, steps, one, ep, local=0, two_level=False, mutant=None):
    """{part: largest difference to one process}; with a mutant a bug is seeded into the run on many ranks."""
    one, grads1, state1 = one
    mesh = make_mesh(rank, world, E, ep, local, two_level=two_level)
    with MUTANTS[mutant][1](mesh) if mutant else nullcontext():
        many, grads, state = record(mesh, steps)
    one = one | {"logits": one["logits"].chunk(world, 1)[rank]}
    out = {k: largest(zip(one[k], many[k])) for k in ("logits", "loss", "norm")}
    kind = {n: "router" if "gate" in n else "expert" if "experts" in n else "dense" for n in grads}
    for k in ("router", "expert", "dense"):
        out[k] = largest((grads1[n], grads[n]) for n in grads if kind[n] == k)
    out["params"] = largest((state1["model"][n], state["model"][n]) for n in grads)
    out["moments"] = largest(
        (t, state["optimizer"][n].get(k, torch.zeros(())))
        for n in grads
        for k, t in state1["optimizer"].get(n, {}).items()
    )
    return out


@pytest.mark.parametrize(
    "world, ep, local, two_level",
    [
        (2, 1, 0, False),
        (2, 2, 0, False),
        (4, 1, 0, False),
        (4, 2, 0, False),
        (4, 4, 0, False),
        (4, 4, 2, True),
        (8, 4, 2, True),
    ],
)
def test_equals_one_process(world, ep, local, two_level):
    """First step: logits, gradients of router, experts and the rest. Losses, norms, weights of 5 steps."""
    steps = STEPS if world < 8 else 2
    for errors in run_ranks(world, parity, steps, one_process(steps), ep, local, two_level):
        assert max(errors.values()) < 1e-12, errors


# -- seeded bugs: the comparison above must fail for each --------------------------------------------------


def on_reduce(mesh, group, change):
    """Every all_reduce over that group goes wrong: change(tensor, the real all_reduce)."""
    real = td.all_reduce

    def wrong(t, group=None):
        change(t, lambda t: real(t, group=group)) if group is chosen else real(t, group=group)

    chosen = mesh.process_groups.get(group)
    return patch.object(td, "all_reduce", wrong)


def on_sync(change, before=False):
    real = Mesh.sync_grads

    def wrong(self, model):
        experts = dist.expert_ids(model)
        missing = [p for p in model.parameters() if p.grad is None]
        dense = [p for p in model.parameters() if id(p) not in experts]
        keep = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in dense]
        real(self, model)
        change(self, model, dense, keep, missing)

    return patch.object(Mesh, "sync_grads", wrong)


def set_grads(params, grads):
    for p, g in zip(params, grads):
        p.grad = g


def scale_experts(model, by):
    for layer in model.layers:
        for p in layer.experts.parameters():
            p.grad *= by


def clip_with(square):
    """A clip whose norm is wrong: square(mesh, sum of squares of this rank's experts)."""

    def wrong(self, model, max_norm):
        experts = dist.expert_ids(model)
        dense = sum((p.grad**2).sum() for p in model.parameters() if id(p) not in experts)
        mine = sum((p.grad**2).sum() for p in model.parameters() if id(p) in experts)
        norm = (dense + square(self, mine)).sqrt()
        nn.utils.clip_grads_with_norm_(list(model.parameters()), max_norm, norm)
        return norm

    return patch.object(Mesh, "clip_grad_norm", wrong)


def backward_with(change):
    real = dist.AllToAll.backward
    wrong = staticmethod(lambda ctx, grad, tie: change(ctx, grad, tie, real))
    return patch.object(dist.AllToAll, "backward", wrong)


def same_way(ctx, grad, tie, real):
    ctx.inverse = ctx.move
    return real(ctx, grad, tie)


def no_way(ctx, grad, tie, real):
    grad, *rest = real(ctx, grad, tie)
    return grad * 0, *rest


def other_experts(self, *args):
    self.first = (self.first + self.n) % E
    real_init(self, *args)


real_send, real_init, real_exchange, real_reduce = dist.send, Experts.init, dist.exchange, Mesh.all_reduce
MUTANTS = {  # name: (the part of the comparison that must show it, the bug)
    "experts not summed over replicas": ("expert", lambda m: on_reduce(m, "dp", lambda t, real: None)),
    "experts averaged over replicas": ("expert", lambda m: on_reduce(m, "dp", lambda t, real: (real(t), t.div_(m.dp)))),
    "experts summed too often": ("expert", lambda m: on_sync(lambda s, model, *_: scale_experts(model, s.ep))),
    "experts divided by ep": ("expert", lambda m: on_sync(lambda s, model, *_: scale_experts(model, 1 / s.ep))),
    "dense gradients averaged": (
        "router",
        lambda m: on_sync(lambda s, model, dense, *_: set_grads(dense, [p.grad / s.world for p in dense])),
    ),
    "dense gradients not summed": (
        "router",
        lambda m: on_sync(lambda s, model, dense, keep, _: set_grads(dense, keep)),
    ),
    "missing gradients stay missing": (
        "params",
        lambda m: on_sync(lambda s, model, dense, keep, missing: set_grads(missing, [None] * len(missing))),
    ),
    "clip per rank": ("moments", lambda m: clip_with(lambda s, square: square)),
    "clip counts replicas": ("moments", lambda m: clip_with(lambda s, square: s.all_reduce(square))),
    "clip leaves experts out": ("moments", lambda m: clip_with(lambda s, square: square * 0)),
    "swapped splits": (
        "crash",
        lambda m: patch.object(dist, "send", lambda x, to, frm, group: real_send(x, frm, to, group)),
    ),
    "no block transpose": ("logits", lambda m: patch.object(dist, "swap", lambda x, sizes: x)),
    "transpose on one way only": (
        "logits",
        lambda m: patch.object(dist, "to_owner", lambda x, sizes, mesh: real_exchange(x, sizes.sum(2), mesh)),
    ),
    "backward goes the same way": ("crash", lambda m: backward_with(same_way)),
    "backward brings nothing": ("dense", lambda m: backward_with(no_way)),
    "auxiliary loss from local load": ("router", lambda m: patch.object(Mesh, "sum", lambda s, t: t)),
    "mean of means": (
        "dense",
        lambda m: patch.object(Mesh, "all_reduce", lambda s, t: real_reduce(s, t) if t.dim() else t.detach() * s.world),
    ),
    "another rank's experts": ("logits", lambda m: patch.object(Experts, "init", other_experts)),
}


def seeded(rank, world, one, mutants):
    return {mutant: parity(rank, world, 2, one, 2, mutant=mutant) for mutant in mutants}


@lru_cache
def wrong_numbers():
    """What every bug but those that end in a crash does, rank by rank."""
    names = [name for name, (part, _) in MUTANTS.items() if part != "crash"]
    ranks = run_ranks(4, seeded, one_process(2), [*names, None])
    assert all(max(of_rank.pop(None).values()) < 1e-12 for of_rank in ranks), "a bug was not taken out again"
    return ranks


@pytest.mark.parametrize("mutant", MUTANTS)
def test_seeded_bug_is_caught(mutant):
    part = MUTANTS[mutant][0]
    if part == "crash":
        with pytest.raises(ProcessRaisedException, match="(?i)split|connection"):
            run_ranks(4, seeded, one_process(2), [mutant])
    else:
        errors = [of_rank[mutant] for of_rank in wrong_numbers()]
        assert max(e[part] for e in errors) > 1e-6, errors


# -- all-to-all --------------------------------------------------------------------------------------------


def random_counts(world, seed):
    """(world, E) row counts; some ranks send nothing, some experts get nothing, seed 0: nothing at all."""
    g = torch.Generator().manual_seed(seed)
    c = torch.randint(0, 5, (world, E), generator=g)
    c[torch.rand(world, generator=g) < 0.25] = 0
    c[:, torch.rand(E, generator=g) < 0.3] = 0
    return c * (seed > 0), g


def all_to_all(rank, world, ep, local):
    flat = make_mesh(rank, world, E, ep, local)
    deep = make_mesh(rank, world, E, ep, local, two_level=True)
    assert "inter" in deep.process_groups
    base, n = rank - flat.ep_rank, E // ep
    for seed in range(30 if world == 4 else 8):
        c, g = random_counts(world, seed)
        shape = (seed % 3 + 1,) * (seed % 3)  # rows of 0, 1 and 2 more dimensions
        xs = [torch.randn(int(s), *shape, generator=g) for s in c.sum(1)]
        ys = [torch.randn(int(s), *shape, generator=g) for s in c.sum(1)]
        got = []
        for mesh in (flat, deep):
            x = xs[rank].clone().requires_grad_()
            rows, counts, back = mesh.to_experts(x, c[rank])
            blocks = [
                xs[s].split(c[s].tolist())[e]
                for e in range(flat.ep_rank * n, (flat.ep_rank + 1) * n)
                for s in range(base, base + ep)
            ]  # by my expert, then by source rank
            assert torch.equal(rows, torch.cat(blocks))
            assert torch.equal(counts, c[base : base + ep, flat.ep_rank * n : (flat.ep_rank + 1) * n].sum(0))
            assert torch.equal(back.table, c[base : base + ep])
            there = mesh.to_experts(ys[rank], c[rank])[0].detach()
            rows.backward(there)  # adjoint = inverse
            assert torch.equal(x.grad, ys[rank])
            y = there.clone().requires_grad_()
            home = mesh.to_tokens(y, back)
            home.backward(xs[rank])
            assert torch.equal(home, ys[rank]) and torch.equal(y.grad, rows)
            dot = torch.stack([(rows.detach() * there).sum(), (x.detach() * ys[rank]).sum()]).double()
            dot = mesh.all_reduce(dot)  # <A x, A y> = <x, y>
            assert abs(dot[0] - dot[1]) < 1e-4
            got.append((rows, home, x.grad, y.grad))
        assert all(torch.equal(a, b) for a, b in zip(*got))
    for dtype in (torch.bfloat16, torch.int64):  # other types travel as they are
        x = torch.arange(int(c[rank].sum())).to(dtype)
        rows, _, back = deep.to_experts(x, c[rank])
        assert rows.dtype == dtype and torch.equal(deep.to_tokens(rows, back), x)


@pytest.mark.parametrize("world, ep, local", [(4, 4, 2), (8, 8, 2), (8, 4, 2)])
def test_two_level_equals_flat_and_reference(world, ep, local):
    run_ranks(world, all_to_all, ep, local)


def test_swap_example():
    x = ["a0b0", "a0b0", "a0b1", "a1b0", "a1b1", "a1b1", "a1b1"]
    y = dist.swap(torch.arange(7), torch.tensor([[2, 1], [1, 3]]))
    assert [x[i] for i in y] == ["a0b0", "a0b0", "a1b0", "a0b1", "a1b1", "a1b1", "a1b1"]


def stepping_out(rank, world, tie):
    """Rank 0 is frozen below, rank 1 gets no rows and returns something unconnected."""
    mesh = make_mesh(rank, world, E)
    x = torch.ones(3, D, requires_grad=rank > 0)
    counts = torch.zeros(E, dtype=torch.long)
    counts[0] = 3  # everything to rank 0
    w = torch.tensor(2.0, requires_grad=True)
    rows, mine, back = mesh.to_experts(x, counts)
    y = rows * w if len(rows) else torch.zeros(0, D)
    back = back if tie else back._replace(link=torch.zeros(()))
    y = mesh.to_tokens(y, back)
    (y.sum() if y.requires_grad else x.sum()).backward()
    assert rank == 0 or not tie or torch.equal(x.grad, torch.full_like(x, 2.0))
    return w.grad


def test_every_rank_takes_part_in_backward():
    assert run_ranks(2, stepping_out, True, timeout=20)[0] == 2 * 3 * D
    hangs = pytest.raises((TimeoutError, ProcessRaisedException), match="(?i)timed? ?out|no end after|closed by peer")
    with hangs:  # without the tie: rank 0 waits for a rank that has left
        run_ranks(2, stepping_out, False, timeout=2)


# -- small collectives, gradients --------------------------------------------------------------------------


def collectives(rank, world):
    mesh = make_mesh(rank, world, E, 4, 2)
    x = torch.tensor([0.1 * (rank + 1), 1e8 + rank], requires_grad=True)
    s = mesh.sum(x)
    (s**2).sum().backward()
    assert torch.equal(x.grad, 2 * s.detach())  # as if only this rank's term varied
    assert mesh.any(rank == 2) is True and mesh.any(False) is False
    assert mesh.any(torch.tensor([False, rank == 1]))
    assert mesh.all_reduce(torch.tensor(rank)) == 6
    assert mesh.all_reduce(torch.tensor(float("nan") if rank == 1 else 0.0)).isnan()
    assert mesh.from_main({"path": rank}) == {"path": 0} and mesh.from_all(rank * 3) == [3 * r for r in range(world)]
    whole = torch.arange(E * 3.0).view(E, 3)
    assert torch.equal(mesh.part(whole), whole[2 * rank : 2 * rank + 2])
    assert torch.equal(mesh.whole(mesh.part(whole)), whole)
    assert (mesh.main, mesh.node, mesh.n_nodes, mesh.dp) == (rank == 0, rank // 2, 2, 1)
    c, _ = random_counts(world, 5)
    _, _, back = mesh.to_experts(torch.zeros(int(c[rank].sum()), D), c[rank])
    t = mesh.traffic(back.table, 4 * D)
    to = c[rank].view(4, 2).sum(1)
    near = rank ^ 1  # the other rank of my node
    want = {"rank": to[rank], "node": to[near], "far": to.sum() - to[rank] - to[near]}
    assert all(t[f"tokens_{k}"] == n and t[f"bytes_{k}"] == n * 4 * D for k, n in want.items())
    model, _ = make(mesh, torch.float32)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan") if rank == 1 and p is model.layers[0].experts.w1 else 1.0)
    assert mesh.clip_grad_norm(model, 1.0).isnan()  # on every rank: all skip the step, or none
    mesh.barrier()
    return s.detach()


def test_collectives():
    values = run_ranks(4, collectives)
    assert all(torch.equal(v, values[0]) for v in values)


def long_run(rank, world, ep, steps):
    mesh = make_mesh(rank, world, E, ep)
    model, opt = make(mesh, torch.float32)
    for step in range(steps):
        norm = train_step(model, opt, mesh, step, torch.float32, micro=1)[2]
    experts = dist.expert_ids(model)
    return norm, {n: (id(p) in experts, p.detach()) for n, p in model.named_parameters()}


@pytest.mark.parametrize("world, ep", [(2, 1), (2, 2), (4, 2)])
def test_replicas_stay_bit_identical(world, ep):
    ranks = run_ranks(world, long_run, ep, 12)
    for rank, (norm, params) in enumerate(ranks):
        assert torch.equal(norm, ranks[0][0])
        for name, (expert, p) in params.items():
            twin = ranks[rank % ep if expert else 0][1][name][1]
            assert torch.equal(p, twin), (rank, name)


def test_clip_matches_torch_and_zero_only_measures():
    model, opt = make(Mesh())
    model(batch(0)[0][0])[0].sum().backward()
    Mesh().sync_grads(model)
    assert model.idle.grad.eq(0).all()  # None became zeros, in one process as well
    before = [p.grad.clone() for p in model.parameters()]
    norm = Mesh().clip_grad_norm(model, 0)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters()))
    assert torch.equal(Mesh().clip_grad_norm(model, 0.1), norm)
    assert abs(nn.utils.clip_grad_norm_(model.parameters(), 9) - 0.1) < 1e-6


def traffic_of_replicas(rank, world):
    mesh = make_mesh(rank, world, 4, 2, 2)  # ranks 2 and 3 are a node of their own, with experts of their own
    counts = torch.tensor([1, 2, 3, 4]) * (rank + 1)
    back = mesh.to_experts(torch.zeros(int(counts.sum()), 3), counts)[2]
    return {name: int(n) for name, n in mesh.traffic(back.table, 12).items()}


def test_traffic_of_the_second_replica():
    for rank, t in enumerate(run_ranks(4, traffic_of_replicas)):
        own, other = ((3, 7), (7, 3))[rank % 2]
        assert [t["tokens_rank"], t["tokens_node"], t["tokens_far"]] == [own * (rank + 1), other * (rank + 1), 0]


def test_single_process_is_the_identity():
    from copy import deepcopy

    mesh, x, c = Mesh(), torch.randn(5, D, requires_grad=True), torch.tensor([2, 0, 3])
    rows, counts, back = mesh.to_experts(x, c)
    assert rows is x and counts is c and mesh.to_tokens(rows, back) is x
    assert all(f(x) is x for f in (mesh.sum, mesh.whole, mesh.part)) and torch.equal(mesh.all_reduce(x), x)
    assert mesh.any(True) and not mesh.any(False) and mesh.from_main(7) == 7 and deepcopy(mesh) is mesh
    assert mesh.traffic(back.table, 2) == dict(
        tokens_rank=5, tokens_node=0, tokens_far=0, bytes_rank=10, bytes_node=0, bytes_far=0
    )
    mesh.barrier()
    mesh.close()


# -- start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world, args, message",
    [
        (4, dict(ep=3), "--ep=3 must divide the 4 processes and the 8 experts: choose from 1, 2, 4"),
        (6, dict(ep=6), "--ep=6 must divide the 6 processes and the 8 experts: choose from 1, 2"),
        (4, dict(ep=-2), "--ep=-2 must divide the 4 processes and the 8 experts: choose from 1, 2, 4"),
        (1, dict(ep=2), "--ep=2 must divide the 1 processes and the 8 experts: choose from 1"),
        (6, dict(ranks_per_node=4), "--ranks_per_node=4 must divide the 6 processes that torchrun started: choose"),
        (
            6,
            dict(ep=2, ranks_per_node=3, two_level=True),
            "--two_level needs ep=2 to be a multiple or a divisor of ranks_per_node=3",
        ),
    ],
)
def test_layout_errors_come_before_any_communication(monkeypatch, world, args, message):
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(world))
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")  # would fail, slowly, if it were used
    nodes = args.pop("ranks_per_node", 0)
    with pytest.raises(ValueError) as error:  # from init if it can know it, else from the layout of the experts
        if not args:
            dist.init(nodes, device="cpu")
        dist.spread_experts(Mesh(0, world, 1, nodes or world), 8, **args)
    assert str(error.value).startswith(message)


def test_init_without_torchrun(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    mesh = dist.spread_experts(dist.init(device="cpu"), 8)
    assert (mesh.world, mesh.ep, mesh.n_nodes, mesh.process_groups) == (1, 1, 1, {})
    assert dist.check_layout(12, 8) == (4, 12) and dist.check_layout(4, 0) == (1, 4)  # the defaults; a dense model
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is set but not RANK, LOCAL_RANK, LOCAL_WORLD_SIZE"):
        dist.init(device="cpu")


def test_a_node_is_what_torchrun_started_on_one_machine(monkeypatch):
    monkeypatch.setattr(dist, "join", lambda *args: None)
    env = dict(RANK=3, WORLD_SIZE=4, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, MASTER_ADDR="nowhere.invalid", MASTER_PORT=1)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    mesh = dist.init(device="cpu")
    assert (mesh.rank, mesh.world, mesh.n_nodes, mesh.node) == (3, 4, 2, 1)


def test_a_signal_sent_again_after_two_seconds_ends_at_once(monkeypatch):
    """Two seconds after the first one, whatever came in between."""
    now, raised = [0.0], []
    monkeypatch.setattr(dist.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    dist.stop_on_signals()
    for now[0] in (10.0, 11.5, 13.0):
        assert not raised
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
    assert raised == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# -- errors ------------------------------------------------------------------------------------------------


def errors_on_ranks(rank, world):
    mesh, seen = make_mesh(rank, world, E), []

    def fails(on):
        if rank in on:
            raise OSError("no space")
        return rank

    for on in ((), (0,), (1,), (0, 1)):
        try:
            seen.append(mesh.on_all(lambda: fails(on)))
        except ValueError as error:
            seen.append(str(error))
    for action in (lambda: rank + 7, lambda: fails((0,)), lambda: fails((1,))):
        try:
            seen.append(mesh.on_main(action))
        except ValueError as error:
            seen.append(str(error))
    return seen


def test_an_error_on_one_rank_is_everybodys():
    for rank, seen in enumerate(run_ranks(2, errors_on_ranks)):
        assert seen == [rank, "no space", "no space (process 1)", "no space", 7, "no space", 0]


def opens_on(rank, world, which):
    mesh = make_mesh(rank, world, 1, 1)
    try:
        return mesh.on_all(lambda: open("/nowhere") if rank in which else rank)
    except ValueError as error:
        return str(error)


def test_an_error_of_the_system_is_one_line_on_every_rank():
    assert run_ranks(2, opens_on, []) == [0, 1]
    said = "cannot use /nowhere (No such file or directory): mend that, or name another file or folder"
    assert run_ranks(2, opens_on, [1]) == [f"{said} (process 1)"] * 2
    assert run_ranks(2, opens_on, [0, 1]) == [said] * 2


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("RANK", "zero", "RANK=zero is not a number"),
        ("WORLD_SIZE", "2.5", "WORLD_SIZE=2.5 is not a number"),
        ("LOCAL_RANK", "", "LOCAL_RANK= is not a number"),
        ("MASTER_PORT", "http", "MASTER_PORT=http is not a number"),
        ("RANK", "2", "RANK=2 must be below WORLD_SIZE=2"),
        ("WORLD_SIZE", "0", "RANK=1 must be below WORLD_SIZE=0"),
        ("MASTER_ADDR", "127.0.0.1", "process 1 cannot join the other 1 through MASTER_ADDR:MASTER_PORT=127.0.0.1:1: "),
    ],
)
def test_a_wrong_environment_is_one_line(monkeypatch, name, value, message):
    env = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for key, text in (env | {name: value}).items():
        monkeypatch.setenv(key, text)
    with pytest.raises(ValueError) as error:
        dist.init(device="cpu", timeout=1)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert dist.speaks_for(error.value)  # each process that meets it prints it itself


def test_one_gpu_is_not_for_many_processes(monkeypatch):
    """--device=cuda:1 is honoured by a single process of torchrun, and refused where each takes a GPU of its own."""
    env = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "join", lambda *args: None)
    for key, text in env.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(ValueError, match="--device=cuda:1 is one GPU for 2 processes"):
        dist.init(device="cuda:1")
    assert str(dist.init(device="cuda").device) == "cuda:0"
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert str(dist.init(device="cuda:1").device) == "cuda:1" and chosen == ["cuda:0", "cuda:1"]


def test_check_device():
    for name in ("", "cpu"):
        dist.check_device(name)
    for name in ("gpu", "cuda:x", "cuda:99", "cpu:0", "mps:1"):
        with pytest.raises(ValueError, match=f"--device={name}"):
            dist.check_device(name)
    with patch.object(torch.backends.mps, "is_available", return_value=False):
        with pytest.raises(ValueError, match="no usable Apple GPU"):
            dist.check_device("mps")


@pytest.mark.parametrize(
    "error, text",
    [
        (RuntimeError("shape mismatch"), None),
        (RuntimeError("[enforce fail] Connection closed by peer [127.0.0.1]:4"), "another process has ended"),
        (
            RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms for recv"),
            "did not answer",
        ),
        (td.DistBackendError("NCCL error: unhandled"), "lost each other"),
        (td.DistNetworkError("Broken pipe"), "has ended"),
        (td.DistStoreError("wait timeout after 2000ms"), "did not"),
    ],
)
def test_one_line(error, text):
    assert dist.one_line(ValueError("said\n in two lines")) == "said in two lines"
    assert dist.one_line(OSError("said by us")) == "said by us"
    assert dist.one_line(OSError(5, "Input/output error", "val.bin")).startswith(
        "cannot use val.bin (Input/output error)"
    )
    assert "lower --batch_size" in dist.one_line(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    line = dist.one_line(error)
    assert line is None if text is None else text in line and "--init_from=resume" in line and "\n" not in line


def speakers(rank, world):
    os.environ["RANK"] = str(rank)
    errors = dist.EverybodysError("common"), ValueError(f"of rank {rank}"), dist.OwnError(f"own {rank}")
    return [str(error) for error in errors if dist.speaks_for(error)]


def test_each_error_is_printed_once(monkeypatch):
    assert run_ranks(2, speakers) == [["common", "of rank 0", "own 0"], ["of rank 1", "own 1"]]
    monkeypatch.setenv("LOCAL_RANK", "1")  # left over in a shell: without WORLD_SIZE there is one process
    assert dist.speaks_for(ValueError("mine"))


def test_processes_started_one_by_one_speak_for_themselves(monkeypatch):
    """torchrun gives all the same flags: one tells. Somebody who starts each by hand may mistype one."""
    for name, value in dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert dist.speaks_for(ValueError("--n_layer=0"))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert not dist.speaks_for(ValueError("--n_layer=0"))


def other_flags(rank, world):
    mesh = make_mesh(rank, world, E)
    train.refuse_unless_alike({"seed": 3, "device": f"cuda:{rank}"}, mesh)
    said = []
    for given in ({"seed": 3 + rank}, {"gate": "topk"} if rank else {}):
        try:
            train.refuse_unless_alike(given, mesh)
        except dist.EverybodysError as error:
            said.append(str(error))
    return said


def test_ranks_with_other_flags_are_refused():
    assert run_ranks(2, other_flags) == 2 * [[
        "process 0 has --seed=3, process 1 has --seed=4: give all the same flags",
        "process 0 has no --gate, process 1 has --gate=topk: give all the same flags",
    ]]  # fmt: skip


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    dist.stop_on_signals()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
