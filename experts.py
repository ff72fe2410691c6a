"""
Dispatch and combine: from G to y.

    y_n = sum_e G[n, e] * FFN_e(x_n)               every_expert, below, is this line and nothing else

One dispatch serves every gate. The non-zeros of G, read expert by expert, are the rows: gather them, send them to the
ranks that own their experts (dist.py; nothing moves on one process), run one grouped matrix product over the stacked
expert weights, send them back, scale by G, add them up. Exactly the routed rows are computed and sent. One expert per
token, eight, or a number that the gate learns: the code is the same.

    x (N, D) --gather--> rows (M, D) --to_experts--> FFN_e --to_tokens--> (M, D) * g --index_add--> y (N, D)

Everything before the dispatch is a map from G to G. A permutation of experts is G @ P; capacity is G with the overflow
of each expert set to zero (drop); padding is rows that never reach the gate.

Decisions, with the reason measured on 2 CPU cores at N 8192, D 256, H 1024, k 2 (python tests/bench.py):
- torch.nn.functional.grouped_mm instead of a loop over experts: 1.19 dense layers' time against 1.65 at E 64 (1.07
  against 1.15 at E 8).
- Never an (N, E, C) one-hot tensor: it is quadratic in N (C grows with N).
- One device sync per layer: nonzero() has to know M (one more with capacity, with padding, and to exchange counts with
  other ranks). A static (E, C) table avoids it, and computes padding instead.

Letters: N tokens, D width, H expert hidden width, E experts, M rows = non-zeros of G, C capacity.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from dist import Mesh
from router import Permuted, Place, fair_slots, make_gate, queue


def every_expert(x, G, experts):
    """The definition, with every expert on every token: x (N, D), G (N, E), experts (Experts) -> y (N, D).

    MoE.dispatch computes the same without the zeros. This form costs E times a dense layer; read it, test with it.
    """
    N, E = G.shape
    rows, counts = x.repeat(E, 1), torch.full((E,), N, device=x.device)  # (E * N, D), all tokens for each expert
    y = experts(rows, counts).view(E, N, -1)  # (E, N, D)
    return torch.einsum("ne,end->nd", G, y.to(G.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# The experts


def expert_seed(seed, layer, e):
    """The seed of expert e (global number) of a layer: an even number, from which the spawn draws (which numbers the
    mixtures, not the layers); the odd one after it is for the expert's own weights."""
    return ((seed * 1009 + layer) * 1009 + e % 1009) * 2 + (e // 1009 << 58)  # digits to the base 1009, a prime


class Experts(nn.Module):
    """n feed-forward networks D -> H -> D with stacked weights; n = 1 is the FFN of a dense Transformer.

    w1 and w2 are both (n, H, D): row j of each belongs to hidden neuron j. As (n, D, H), w1 made a layer with 64
    experts 7 % slower on a CPU.

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
        whatever the number of ranks, and expert 0 is the FFN that a dense model would have here. w1 is drawn as
        (D, H), only so that a seed goes on giving the weights that it gave when w1 was stored like that."""
        for i in range(self.n):
            rng = torch.Generator().manual_seed(expert_seed(seed, layer, self.first + i) + 1)
            self.w1[i] = torch.empty(self.w1[i].t().shape).normal_(0, std1, generator=rng).t()  # as (D, H)
            self.w2[i].normal_(0, std2, generator=rng)

    def forward(self, rows, counts=None):
        """rows (M, D) sorted by expert, counts (n,) rows of each -> (M, D). With n = 1, rows (..., D), no counts."""
        rows = autocast(rows)
        h = self.affine(rows, self.w1.transpose(1, 2), self.b1, counts)  # (M, H)
        return self.affine(self.dropout(F.gelu(h, approximate=self.gelu)), self.w2, self.b2, counts)

    def affine(self, rows, w, b, counts):
        """Each expert's rows times its matrix, plus its bias: rows (M, A), w (n, A, B), b (n, B) or None -> (M, B)."""
        w, b = w.to(rows.dtype), None if b is None else b.to(rows.dtype)
        if self.n == 1:
            return rows @ w[0] if b is None else rows @ w[0] + b[0]
        y = grouped_mm(rows, w, counts)
        return y if b is None else y + b.repeat_interleave(counts, 0, output_size=len(rows))


def autocast(rows):
    """rows in autocast's precision, if it is on: grouped_mm is not on its list, and fewer bytes travel."""
    device = rows.device.type
    return rows.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows


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


# ---------------------------------------------------------------------------------------------------------------------
# Capacity


def drop(G, capacity, priority=None):
    """Capacity as a map from G to G: each expert keeps `capacity` rows, the rest of its column becomes exactly 0.

    G (N, E); capacity an int, an (E,) or an (N, E) tensor; priority (N, E), higher is kept first, None = arrival order,
    that is token order, which is causal for any k: a token's slot depends on earlier tokens only. What is left of a row
    is not renormalised; a row that loses all its entries gives y = 0, and the block's residual carries its token on.
    """
    expert, token = G.t().nonzero(as_tuple=True)  # (M,) expert by expert, tokens in order
    order, position, _ = queue(expert, None if priority is None else priority[token, expert], G.shape[1])
    expert, token = expert[order], token[order]
    capacity = torch.as_tensor(capacity, device=G.device).expand_as(G)
    over = torch.zeros_like(G, dtype=torch.bool)
    over[token, expert] = position >= capacity[token, expert]
    return G.masked_fill(over, 0)


ORDERS = ("", "arrival", "choice", "score", "random")  # "": the gate's own


def drop_priority(order, G, place):
    """(N, E) priority for a named drop order, or None for "arrival". "choice": every token's strongest expert before
    any token's second (GShard); "score": larger weights first; "random": any (place says how to draw, the others do not
    read it). All but arrival look at later tokens."""
    if order == "arrival":
        return None
    if order == "choice":
        return -G.detach().argsort(dim=1, descending=True, stable=True).argsort(1)
    if order == "score":
        return G.detach()
    if order == "random":
        return place.rand(G.shape[1], G.device)
    raise ValueError(f"--drop_order={order} is unknown; choose from {', '.join(ORDERS[1:])}")


# ---------------------------------------------------------------------------------------------------------------------
# The layer


def near_experts(mesh, E, nodes):
    """(nodes, E) bool: which experts live on a node, for the ranks there. Four ranks, two a node, E = 4: with ep = 4
    each rank has one expert, near are [[1, 1, 0, 0], [0, 0, 1, 1]]; with ep = 2 each node has a copy of all four, and
    all are near. The ranks of a node agree on it if ep divides ranks_per_node or is a multiple of it (feed_forward
    refuses others with a locality loss). One process that plays several nodes deals the experts out evenly."""
    e, node = torch.arange(E), torch.arange(nodes)[:, None]
    if mesh.world == 1:
        return e * nodes // E == node
    first_rank = node * mesh.ranks_per_node  # of the node; its experts live in its own expert-parallel group
    return (first_rank // mesh.ep * mesh.ep + e * mesh.ep // E) // mesh.ranks_per_node == node


def group_sizes(n, live, groups):
    """Lengths of the routing groups: n rows, padding left out, in `groups` consecutive runs."""
    if live is None:
        return [len(part) for part in torch.arange(n).tensor_split(groups)]
    return torch.stack([part.sum() for part in live.tensor_split(groups)]).tolist()


def without_padding(t, index):
    """t (n, ...) -> its rows at index (N,); all of them if index is None."""
    return t if index is None else t.index_select(0, index)


def with_padding(t, index, n):
    """The way back: (N, ...) -> (n, ...), zero where there is padding."""
    return t if index is None else t.new_zeros(n, *t.shape[1:]).index_copy(0, index, t)


class MoE(nn.Module):
    """A mixture-of-experts layer: a gate, E experts spread over the mesh, capacity.

    capacity_factor  slots per expert = ceil(factor * k * N / E) in each routing group, in training; 0: no limit. Of no
                     effect on gates that return a capacity of their own. Evaluation drops nothing
    drop_order       "" (the gate's own), "arrival", "choice", "score" or "random"
    groups           routing groups of this process: groups = W on one process drops, balances and assigns exactly as W
                     ranks do, each of which is a routing group of its own
    shared           None, or an FFN (Experts with n = 1) that every token visits besides: y = shared(x) + the above
                     (DeepSeekMoE, arXiv:2401.06066; several of them are one as wide as all). Every rank has it whole,
                     like a dense layer: no row is sent for it, and no capacity counts it
    stats            detached tensors of the last call, for `log_stats`: never synchronised here
    """

    def __init__(self, gate, experts, mesh=None, capacity_factor=0.0, drop_order="", groups=1, shared=None):
        super().__init__()
        if capacity_factor < 0 or not math.isfinite(capacity_factor):
            raise ValueError(f"--capacity_factor={capacity_factor}: use a positive number, or 0 for no limit")
        self.gate, self.experts, self.mesh, self.shared = gate, experts, mesh or Mesh(), shared
        self.capacity_factor, self.drop_order, self.groups = capacity_factor, drop_order or gate.drop_order, groups
        drop_priority(self.drop_order, torch.zeros(1, gate.E), Place(1))  # an unknown order should stop the run now
        self.stats = {}

    def forward(self, x, ids, live=None, domain=None):
        """x (..., D), ids (...) token ids, live (...) bool, False = padding, domain (...) long -> y like x, aux.

        Padding takes no slot, no load and no loss; its y is 0. aux: see router.Routing; "log_prob" is shaped like ids.
        """
        shape, flat = x.shape, x.reshape(-1, x.shape[-1])
        live = None if live is None else live.reshape(-1)
        index = None if live is None else live.nonzero()[:, 0]  # of the rows that are no padding
        domain = None if domain is None else without_padding(domain.reshape(-1), index)
        place = self.place_of(flat, live, index, domain)
        y, aux = self.route(without_padding(flat, index), without_padding(ids.reshape(-1), index), place)
        if "log_prob" in aux:
            aux["log_prob"] = with_padding(aux["log_prob"], index, len(flat)).view(shape[:-1])
        return with_padding(y, index, len(flat)).view(shape), aux

    def route(self, x, ids, place):
        """x (N, D) without padding -> y (N, D), aux: the gate fills G, capacity thins it out, dispatch computes."""
        routing = self.gate(x, ids, place)
        G = self.apply_capacity(routing, place)  # (N, E)
        y, sent = self.dispatch(x, G)  # (N, D)
        y = y if self.shared is None else y + self.shared(x)
        self.stats = {"asked": (routing.G.detach() != 0).sum(0), "tokens": len(x), **sent}  # asked: before the drop
        return y, dict(routing.aux)

    def place_of(self, x, live, index, domain):
        """What the gate may know of the live rows among x (n, D): their numbers in the global batch (rank r holds r * n
        to (r + 1) * n, padding counted), groups, domain, node. live (n,) or None; index (N,) of the live rows or None;
        domain (N,) or None."""
        mesh, n, device = self.mesh, len(x), x.device
        rows = index
        if mesh.world > 1:
            rows = (torch.arange(n, device=device) if index is None else index) + mesh.rank * n
        if index is not None and self.groups == 1:
            sizes = [len(index)]  # known already; group_sizes would wait for the device
        else:
            sizes = group_sizes(n, live, self.groups)
        node = near = None
        if mesh.n_nodes > 1:  # several nodes, real (mesh) or, in tests, played by the groups of one process
            of_group = [mesh.node if mesh.world > 1 else g * mesh.n_nodes // self.groups for g in range(self.groups)]
            node = torch.tensor(of_group).repeat_interleave(torch.tensor(sizes)).to(device)
            near = near_experts(mesh, self.gate.E, mesh.n_nodes).to(device)
        return Place(sum(sizes), rows, total=n * mesh.world, sizes=sizes, domain=domain, node=node, near=near,
                     mesh=mesh if mesh.world > 1 else None)  # fmt: skip

    def apply_capacity(self, routing, place):
        """G with the overflow of each expert set to zero, per routing group."""
        G, capacity = routing.G, routing.capacity
        factor = 0 if "capacity_factor" in self.gate.ignores or not self.training else self.capacity_factor
        if self.gate.drops_itself or (capacity is None and not factor):
            return G
        priority = routing.priority
        if priority is None:
            priority = drop_priority(self.drop_order, G, place)
        if torch.is_tensor(capacity):
            capacity = capacity.expand_as(G)  # so that it is cut into groups like G

        def drop_group(G, priority, slots):
            return drop(G, fair_slots(factor, self.gate.k * len(G), self.gate.E) if slots is None else slots, priority)

        return place.per_group(drop_group, G, priority, capacity)

    def dispatch(self, x, G):
        """Dispatch, experts, combine: x (N, D), G (N, E) -> y (N, D), from exactly the rows where G is not zero; and,
        for stats, what was sent: kept (E,) rows of each expert, the table of to_experts, the bytes of a row."""
        N, E = G.shape
        expert, token = G.t().nonzero(as_tuple=True)  # (M,) expert by expert; the sync
        counts = (G != 0).sum(0)  # (E,); bincount would synchronise
        rows = autocast(x.index_select(0, token))  # (M, D)
        row_bytes = rows.element_size() * rows.shape[1]
        rows, my_counts, back = self.mesh.to_experts(rows, counts)
        rows = self.experts(rows, my_counts)
        rows = self.mesh.to_tokens(rows, back)  # (M, D), in the order in which they left
        g = G.flatten().gather(0, token * E + expert)  # (M,) = G[token, expert], with a faster backward
        y = torch.zeros(N, x.shape[1], dtype=g.dtype, device=x.device).index_add_(0, token, rows * g[:, None])
        return y.to(x.dtype), {"kept": counts, "table": back.table, "row_bytes": row_bytes}


def feed_forward(cfg, layer, is_moe, std=0.02, mesh=None, **offered):
    """The feed-forward part of one layer: a dense FFN if cfg.n_experts is 1 or the layer is no MoE layer, else an MoE.

    layer: its number, which keys its weights and tables (a decoder's layers count on after the encoder's). std: of the
    weights at the start. offered: what a gate's constructor may ask for: V (number of token ids), counts (V,) of the
    training text, n_domains, steps (from the moment that the mixture exists to the end of the run).
    """
    mesh, hidden = mesh or Mesh(), cfg.n_hidden or 4 * cfg.n_embd
    stds = std, std / math.sqrt(2 * cfg.n_layer)  # of w1, of w2
    alike = dict(bias=cfg.bias, dropout=cfg.dropout, activation=cfg.activation)
    if cfg.n_experts == 1 or not is_moe:
        ffn = Experts(1, cfg.n_embd, hidden, **alike)
        ffn.init(cfg.seed, layer, *stds)
        return ffn
    with torch.random.fork_rng(devices=[]):  # the gate's own stream: the rest of the model is not disturbed
        torch.manual_seed(cfg.seed * 1000 + layer)
        gate = make_gate(
            cfg.gate, cfg.gate_args, cfg.k, D=cfg.n_embd, E=cfg.n_experts, layer=layer, seed=cfg.seed, **offered
        )
        if cfg.permute:
            gate = Permuted(gate, offered.get("steps", 1), cfg.permute)
    if gate.loss_weights.get("locality") and mesh.ep % mesh.ranks_per_node and mesh.ranks_per_node % mesh.ep:
        raise ValueError(
            f"--gate={cfg.gate}: with --ep={mesh.ep} and {mesh.ranks_per_node} processes a node, what is near differs "
            "within a node: choose an --ep that divides this number or is a multiple of it"
        )
    mine = cfg.n_experts // mesh.ep  # experts on this rank
    experts = Experts(mine, cfg.n_embd, cfg.expert_hidden or hidden, **alike, first=mesh.ep_rank * mine, sharded=True)
    experts.init(cfg.seed, layer, *stds)
    shared = Experts(1, cfg.n_embd, cfg.shared_hidden, **alike, first=cfg.n_experts) if cfg.shared_hidden else None
    if shared:
        shared.init(cfg.seed, layer, *stds)
    return MoE(gate, experts, mesh, cfg.capacity_factor, cfg.drop_order, cfg.groups, shared)


def check_causality(moes, causal, cfg):
    """ValueError for a gate that looks at later tokens even at evaluation, in a causal model; -> a note for one that
    does so in training, or when the user insists."""
    if not causal or not moes:
        return ""
    moe = moes[0]
    gate = getattr(moe.gate, "gate", moe.gate)  # inside Permuted
    drops = (cfg.capacity_factor or getattr(gate, "capacity", None)) and "drop_order" not in gate.ignores
    what = f"--gate={cfg.gate}" + (f" (drop order: {moe.drop_order})" if drops else "")
    if gate.looks_ahead == "always" and not cfg.insist:
        raise ValueError(
            f"{what} looks at later tokens, even at evaluation: it cannot run in a causal model (--insist "
            "to do it all the same)"
        )
    if gate.looks_ahead == "always":
        return f"note: {what} looks at later tokens, at evaluation too: the held-out loss means nothing\n"
    if gate.looks_ahead != "never" or (drops and moe.drop_order != "arrival"):
        return f"note: {what} looks at later tokens in training; evaluation does not\n"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# What the log shows about the layers


def log_stats(moes, mesh):
    """Numbers about the last training call of the MoE layers, over all ranks. Collective; {} if there are no layers.

    experts_per_token  rows computed per token        dropped  share of the routed rows that capacity cut off
    load               of each expert of the first layer, before capacity, relative to the mean: 1 is the fair share.
                       Gates that drop by themselves (skip) have done so: their drops show in experts_per_token only
    load_min, _max     the lightest and heaviest expert of all layers
    tokens_*, bytes_*  with several processes: rows that stayed on the rank, on the node, and that went far; one way,
                       and only rows that kept a slot: a capacity that cuts off far ones looks like locality
    """
    if not moes:
        return {}
    loads = mesh.all_reduce(torch.stack([m.stats["asked"] for m in moes])).cpu().double()  # (layers, E)
    kept = float(mesh.all_reduce(sum(m.stats["kept"].sum() for m in moes)))
    tokens = float(mesh.all_reduce(torch.tensor(sum(m.stats["tokens"] for m in moes), device=mesh.device)))
    relative = loads / loads.mean(1, keepdim=True).clamp(min=1e-9)
    out = {
        "experts_per_token": kept / max(1.0, tokens),
        "dropped": 1 - kept / max(1.0, float(loads.sum())),
        "load_min": float(relative.min()),
        "load_max": float(relative.max()),
        "load": [round(v, 3) for v in relative[0].tolist()],
    }
    if mesh.world > 1:
        traffic = [mesh.traffic(m.stats["table"], m.stats["row_bytes"]) for m in moes]
        out |= {name: int(mesh.all_reduce(sum(t[name] for t in traffic))) for name in traffic[0]}
    return out
