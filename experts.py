"""
Dispatch and combine: from G to y.

    y_n = sum_e G[n, e] * E_e(x_n)

One dispatch serves every gate. The non-zeros of G, read expert by expert, are the rows: gather them, send them to the
ranks that own their experts (dist.py; nothing moves on one process), run one grouped matrix product over the stacked
expert weights, send them back, scale by G, add them up. Exactly the routed rows are computed and sent. One expert per
token, eight, or a number that the gate learns: the code is the same.

    x (N, D) --gather--> rows (M, D) --to_experts--> --E_e--> --to_tokens--> (M, D) * g --index_add--> y (N, D)

Everything before the dispatch is a map from G to G. A permutation of experts is G @ P; capacity is G with the overflow
of each expert set to zero (drop); padding is rows that never reach the gate.

Decisions, with the reason measured on 2 CPU cores at N 8192, D 256, H 1024, k 2 (python tests/bench.py):
- torch.nn.functional.grouped_mm instead of a loop over experts: see the benchmark for the ratio, it grows with E.
- Never an (N, E, C) one-hot tensor: it is quadratic in N (C grows with N).
- One device sync per layer: nonzero() has to know M (one more with capacity, one with padding). A static (E, C) table
  avoids it, and computes padding instead.

Letters: N tokens, D width, H expert hidden width, E experts, M rows = non-zeros of G, C capacity.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from dist import Mesh
from router import Batch


class Experts(nn.Module):
    """n feed-forward networks D -> H -> D with stacked weights; n = 1 is the FFN of a dense Transformer.

    w1 and w2 are both (n, H, D): row j of each belongs to hidden neuron j. As (n, D, H), w1 made a layer with 64 experts
    7 % slower on a CPU.

    An expert without rows gets a zero gradient, not None, so that every rank and every step updates the same
    parameters. sharded: the experts are a rank's part of a larger set (dist.py then sums their gradients over replicas
    only and checkpoints gather them by global number, which starts at `first`).
    """

    def __init__(self, n, D, H, bias=False, dropout=0.0, first=0, sharded=False, activation="gelu"):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n, H, D))
        self.w2 = nn.Parameter(torch.empty(n, H, D))
        self.b1 = nn.Parameter(torch.zeros(n, H)) if bias else None
        self.b2 = nn.Parameter(torch.zeros(n, D)) if bias else None
        self.n, self.first, self.sharded, self.dropout = n, first, sharded, nn.Dropout(dropout)
        self.gelu = "tanh" if activation == "gelu_tanh" else "none"  # GPT-2's approximation, or the exact form

    @torch.no_grad()
    def init(self, seed, layer, std1, std2):
        """Normal weights. Each expert draws from its own generator, keyed by its global number: the same experts
        whatever the number of ranks, and expert 0 is the FFN that a dense model would have here."""
        for i in range(self.n):
            rng = torch.Generator().manual_seed(((seed * 1009 + layer) * 1009 + self.first + i) * 2 + 1)
            self.w1[i] = torch.empty(self.w1[i].t().shape).normal_(0, std1, generator=rng).t()
            self.w2[i].normal_(0, std2, generator=rng)

    def forward(self, rows, counts=None):
        """rows (M, D) sorted by expert, counts (n,) rows of each -> (M, D). With n = 1, rows (..., D), no counts."""
        w1, w2, b1, b2 = self.w1, self.w2, self.b1, self.b2
        if torch.is_autocast_enabled(rows.device.type):  # grouped_mm is not on autocast's list
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, w1, w2 = rows.to(dtype), w1.to(dtype), w2.to(dtype)
        if self.n == 1:
            h = F.linear(rows, w1[0], None if b1 is None else b1[0])
            y = self.dropout(F.gelu(h, approximate=self.gelu)) @ w2[0]
            return y if b2 is None else y + b2[0]
        h = grouped_mm(rows, w1.transpose(1, 2), counts)  # (M, H)
        h = h if b1 is None else h + b1.to(h.dtype).repeat_interleave(counts, 0, output_size=len(rows))
        y = grouped_mm(self.dropout(F.gelu(h, approximate=self.gelu)), w2, counts)  # (M, D)
        return y if b2 is None else y + b2.repeat_interleave(counts, 0, output_size=len(rows))


def grouped_mm(rows, w, counts):
    """Each expert's rows times its matrix: rows (M, A) sorted by expert, w (E, A, B), counts (E,) -> (M, B)."""
    aligned = all(width * rows.element_size() % 16 == 0 for width in w.shape[1:])
    known = rows.dtype == torch.bfloat16 or rows.dtype == torch.float32 and rows.device.type == "cpu"
    if not known or not aligned or not len(rows):  # what the kernel does not promise: the plain loop, with a sync
        return torch.cat([r @ m for r, m in zip(rows.split(counts.tolist()), w.unbind())])
    if w.is_cuda and w.requires_grad:
        # On Blackwell the weight gradient of an expert without rows is left uninitialised (pytorch issue 172439)
        w = w.view_as(w)
        w.register_hook(lambda grad: grad.masked_fill((counts == 0)[:, None, None], 0))
    return F.grouped_mm(rows.contiguous(), w, offs=counts.cumsum(0).to(torch.int32))


def drop(G, capacity, priority=None):
    """Capacity as a map from G to G: each expert keeps `capacity` rows, the rest of its column becomes exactly 0.

    G (N, E); capacity an int or (E,) tensor; priority (N, E), higher is kept first, None = arrival order, that is
    token order, which is causal for any k: a token's slot depends on earlier tokens only.
    """
    expert, token = G.t().nonzero(as_tuple=True)  # (M,) expert by expert, tokens in order
    if priority is not None:
        by_priority = priority[token, expert].argsort(descending=True, stable=True)
        order = by_priority[expert[by_priority].argsort(stable=True)]
        expert, token = expert[order], token[order]
    counts = (G != 0).sum(0)  # (E,); bincount would synchronise
    place = torch.arange(len(expert), device=G.device) - (counts.cumsum(0) - counts)[expert]  # place in the queue
    capacity = torch.as_tensor(capacity, device=G.device).expand(G.shape[1])
    over = torch.zeros_like(G, dtype=torch.bool)
    over[token, expert] = place >= capacity[expert]
    return G.masked_fill(over, 0)


def drop_priority(order, G, batch):
    """(N, E) priority for a named drop order, or None for "arrival". "choice": every token's strongest expert before
    any token's second (GShard); "score": larger weights first; "random": any. All but arrival look at later tokens."""
    if order == "arrival":
        return None
    if order == "choice":
        return -G.detach().argsort(dim=1, descending=True, stable=True).argsort(1)
    if order == "score":
        return G.detach()
    if order == "random":
        return batch.rand(G.shape[1], G.device)
    raise ValueError(f"drop_order={order!r} is unknown; there are: arrival, choice, score, random")


def local_experts(mesh, E, nodes):
    """(nodes, E) bool: the experts that a node's ranks reach without leaving the node. On one process that plays
    several nodes, the experts are dealt out evenly."""
    e, v = torch.arange(E), torch.arange(nodes)[:, None]
    if mesh.world == 1:
        return e * nodes // E == v
    first_rank = v * mesh.local  # of the node; its experts live in its own expert-parallel group
    return (first_rank // mesh.ep * mesh.ep + e * mesh.ep // E) // mesh.local == v


class MoE(nn.Module):
    """A mixture-of-experts layer: a gate, E experts spread over the mesh, capacity.

    capacity_factor       slots per expert = ceil(factor * k * N / E) in each routing group, in training; 0: no limit
    eval_capacity_factor  the same at evaluation; 0 by default: evaluation drops nothing
    drop_order            "" (the gate's own), "arrival", "choice", "score" or "random"
    groups                routing groups of this process (see router.Batch): groups = W on one process drops, balances
                          and assigns exactly as W ranks do
    """

    def __init__(self, gate, experts, mesh=None, capacity_factor=0.0, eval_capacity_factor=0.0, drop_order="", groups=1):
        super().__init__()
        if capacity_factor < 0 or eval_capacity_factor < 0:
            raise ValueError(f"capacity_factor={min(capacity_factor, eval_capacity_factor)}: use a positive number, or 0 for no limit")
        self.gate, self.experts, self.mesh = gate, experts, mesh or Mesh()
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.drop_order, self.groups, self.nodes = drop_order or gate.drop_order, groups, self.mesh.n_nodes
        self.stats = {}  # detached tensors of the last call, for the log: never synchronised here

    def forward(self, x, ids, live=None, domain=None):
        """x (..., D), ids (...) token ids, live (...) bool, False = padding, domain (...) long -> y like x, aux.

        Padding takes no slot, no load and no loss; its y is 0. aux: see router.Routing, "log_prob" has the shape of ids.
        """
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        ids, domain = ids.reshape(-1), None if domain is None else domain.reshape(-1)
        index = None if live is None else live.reshape(-1).nonzero()[:, 0]
        batch = self.batch(x, live, index, domain)
        rows = x if index is None else x.index_select(0, index)  # (N, D) without padding
        routing = self.gate(rows, ids if index is None else ids[index], batch)
        G = self.apply_capacity(routing, batch)  # (N, E)
        y = self.dispatch(rows, G)  # (N, D)
        self.stats |= {"asked": (routing.G.detach() != 0).sum(0), "tokens": len(rows)}  # load before the drop
        aux = dict(routing.aux)
        if index is not None:
            y = x.new_zeros(x.shape).index_copy(0, index, y)
            if "log_prob" in aux:
                aux["log_prob"] = aux["log_prob"].new_zeros(len(x)).index_copy(0, index, aux["log_prob"])
        if "log_prob" in aux:
            aux["log_prob"] = aux["log_prob"].view(shape[:-1])
        return y.view(shape), aux

    def batch(self, x, live, index, domain):
        """Where these rows stand in the global batch: rank r holds rows r * n to (r + 1) * n, padding included."""
        mesh, n = self.mesh, len(x)
        if index is None:
            sizes = [len(t) for t in torch.arange(n).tensor_split(self.groups)]
            rows = torch.arange(n, device=x.device) + mesh.rank * n if mesh.world > 1 else None
        else:
            sizes = [len(index)]
            if self.groups > 1:
                sizes = torch.stack([part.sum() for part in live.reshape(-1).tensor_split(self.groups)]).tolist()
            domain = domain if domain is None else domain[index]
            rows = index + mesh.rank * n
        node = local = None
        if self.nodes > 1:  # several nodes, real (mesh) or played by the groups of one process
            group_node = [mesh.node if mesh.world > 1 else g * self.nodes // self.groups for g in range(self.groups)]
            node = torch.tensor(group_node, device=x.device).repeat_interleave(torch.tensor(sizes, device=x.device))
            local = local_experts(mesh, self.gate.E, self.nodes).to(x.device)
        return Batch(sum(sizes), rows, n * mesh.world, sizes, domain, node, local, mesh if mesh.world > 1 else None)

    def apply_capacity(self, routing, batch):
        """G with the overflow of each expert set to zero, per routing group."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        G, capacity = routing.G, routing.capacity
        if capacity is None and not factor:
            return G
        priority = routing.priority
        if priority is None:
            priority = drop_priority(self.drop_order, G, batch)
        if torch.is_tensor(capacity):
            capacity = capacity.expand(len(G), -1)  # (N, E), equal rows in each group

        def drop_group(G, priority, slots):
            if slots is None:
                slots = math.ceil(factor * self.gate.k * len(G) / self.gate.E)
            elif torch.is_tensor(slots):
                slots = slots[:1].sum(0)  # (E,), also for a group without rows
            return drop(G, slots, priority)

        return batch.per_group(drop_group, G, priority, capacity)

    @torch.compiler.disable
    def dispatch(self, x, G):
        """x (N, D), G (N, E) -> y (N, D): computes exactly the rows where G is not zero."""
        N, E = G.shape
        expert, token = G.t().nonzero(as_tuple=True)  # (M,) expert by expert; the sync
        counts = (G != 0).sum(0)  # (E,)
        rows = x.index_select(0, token)  # (M, D)
        rows, my_counts, back = self.mesh.to_experts(rows, counts)
        rows = self.experts(rows, my_counts)
        rows = self.mesh.to_tokens(rows, back)  # (M, D), in the order in which they left
        g = G.flatten().gather(0, token * E + expert)  # (M,)
        y = torch.zeros(N, x.shape[1], dtype=g.dtype, device=x.device).index_add_(0, token, rows * g[:, None])
        self.stats = {"load": counts, "table": getattr(back, "table", None)}
        return y.to(x.dtype)
