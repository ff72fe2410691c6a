"""
Gates: every way to decide which experts a token goes to.

    y_n = sum_e G[n, e] * FFN_e(x_n)

A gate maps tokens to G, an (N, E) matrix of combine weights in which an exact zero means "not sent". Nothing else
tells one method from another: top-k, hashing, balanced assignment, trees, thresholded Gumbel-softmax are all ways to
fill G. The number of experts a token uses is the number of non-zeros in its row. experts.py turns G into work.
`python router.py` prints G of every gate for the same tokens, before any capacity.

To add a gate, write one class here:

    class MyGate(Gate):
        def __init__(self, D, E, k=1, sharpness=1.0):         # names what it needs (see make_gate); the rest are knobs
            super().__init__(D, E, k)
            self.loss_weights = {"balance": 0.01}             # a loss without a weight is only logged
        def forward(self, x, ids):                            # x (N, D), ids (N,); what else there is: self.place
            return Routing(G, {"balance": ...})

and run `python train.py --gate=mygate --gate_args="sharpness=2"`; the parametrised tests find it by themselves.

Decisions, each learned the hard way by somebody:
- Routing is float32 (the matrix product too) even when the model runs in bf16: the softmax of a bf16 logit is noise.
- A top-1 weight is the probability p from the full softmax. Renormalised to 1 it would be a constant: the task loss
  would send the router no gradient at all, only the balance loss would still move it, towards balance and nothing else.
  Skip and GumbelMatching, whose weights carry none, learn through log p of what they sampled instead.
- Counts (who was chosen) carry no gradient, probabilities do. Counts are taken before capacity drops anybody.
- Padding never reaches a gate. Most gates leave capacity to experts.py; those whose method has one return it.

Chapters: the interface; what several share; top-k and its relatives; balance without a loss; dense to sparse, bits,
trees; tables; balanced assignment; locality; unbiased samples; a permutation around any gate; an appendix of solvers.

Letters: N tokens, D model width, E experts, k experts per token, V vocabulary. Shapes stand where they change.
"""

import copy
import heapq
import inspect
import math
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.flags import closest

# ---------------------------------------------------------------------------------------------------------------------
# The interface


class Routing(NamedTuple):
    """What a gate returns. G is all that most methods need.

    G         (N, E) float, combine weights; exactly 0 where token n is not sent to expert e
    aux       {name: scalar}, raw losses of this layer; Gate.loss_weights says which of them join the task loss. One
              name is special: "log_prob" (N,), weight times log p of a token's sampled choice: MoE.forward lays it out
              like ids, Stack.forward adds up layers and tokens, train.py hands it to score_function_term
    priority  (N, E) or None: who keeps a slot when an expert is full, higher first (None: the gate's drop_order)
    capacity  slots per expert: an int, an (E,) tensor, an (N, E) tensor with equal rows in each routing group, or None
              (the layer's capacity factor decides)
    """

    G: Tensor
    aux: dict
    priority: Tensor | None = None
    capacity: Tensor | int | None = None


class Gate(nn.Module):
    """Base of all gates: gate(x (N, D), ids (N,), place) -> Routing, by the subclass's forward(x, ids).

    looks_ahead   may a row of G depend on later tokens? "never"; "training" (balanced assignment); "always", also at
                  evaluation (expert choice). experts.check_causality says so or refuses
    drop_order    who keeps a slot when an expert is full: "arrival", "choice" (all first choices before any second),
                  "score" or "random"; experts.drop_priority explains
    drops_itself  is G within the gate's own capacity already? Then the layer does not look for an overflow; the
                  capacity that such a gate returns is for whoever wants to know
    ignores       flags of the layer that are without effect on this gate
    diversify     share of the run that it wants to begin with one expert per layer, see evomoe.py
    k             experts per token on which capacity is based: C = ceil(factor * k * N / E)
    loss_weights  {aux name: weight in the loss}; an entry of aux without a weight is only logged
    place         where the rows stand in the global batch, see Place

    What changes over a run follows from the step alone: set_step fills it in, so a resumed run has the same. What
    forward reads of it is held in 0-dim buffers: a compiled forward reads a tensor instead of being compiled anew for
    each value.
    """

    looks_ahead = "never"
    drop_order = "arrival"
    drops_itself = False
    ignores = ()
    diversify = 0.0

    def __init__(self, D, E, k=1):
        super().__init__()
        if not 1 <= k <= E:
            raise ValueError(f"--k={k} experts per token is impossible with --n_experts={E}: choose k from 1 to {E}")
        self.D, self.E, self.k = D, E, k
        self.loss_weights = {}

    def __call__(self, x, ids, place=None):
        self.place = place or Place(len(x))  # an attribute, so that forward needs x and ids only
        routing = super().__call__(x, ids)
        if not isinstance(routing, Routing):
            raise TypeError(f"{type(self).__name__}.forward must return Routing(G, aux), not {type(routing).__name__}")
        return routing

    def forward(self, x, ids):
        """x (N, D) hidden vectors, ids (N,) token ids -> Routing. What else it may read is in self.place."""
        raise NotImplementedError

    def set_step(self, step):
        """Fill the schedule buffers for this step, counted from the moment that the gate's experts exist. Called before
        it. A constructor that names `steps` is told how many there will be."""

    def update(self):
        """Called once after each optimizer step, for state that no gradient reaches (a balancing bias)."""

    def phases(self):
        """[(name, first step)] of its schedule, for the table at the start of a run."""
        return [("mixture", 0)]

    def report(self):
        """{name: number or text} for the log line."""
        return {}


class Place:
    """Where the N rows of a call stand in the global batch; all that a gate may know beyond x and ids.

    On one process a gate sees the whole batch, and most of this is trivial. With several, each rank routes its own
    rows: statistics that a paper takes over "the batch" go through mean(), noise through rand(), and assignments that
    couple tokens (balanced assignment, expert choice, capacity) through per_group(): one group per rank, as in GShard.

    The global batch is what all ranks hold in this call: with --grad_accum a micro-batch of it. Sums over a whole step
    are collected until Gate.update.

    n        N; rows (N,) their global numbers (None: 0..N-1); total: rows in the global batch, padding included
    sizes    lengths of the routing groups, consecutive runs of rows; sum(sizes) == N. "Group" alone always means these
    domain   (N,) long, the document's domain (or language), or None
    node     (N,) long, the node a row lives on; near (nodes, E) bool, the experts that live on each node
    mesh     dist.Mesh, or None for one process
    """

    def __init__(self, n, rows=None, total=None, sizes=None, domain=None, node=None, near=None, mesh=None):
        self.n, self.rows, self.total = n, rows, total or n
        self.sizes, self.domain, self.node, self.near, self.mesh = sizes or [n], domain, node, near, mesh

    def rand(self, cols, device=None, dtype=torch.float32):
        """(n, cols) uniform in [0, 1). Drawn for the whole global batch and then sliced, so that a token's noise does
        not depend on the number of ranks (train.py seeds the generator per step, alike on every rank; not so with
        dropout, for which each rank needs a stream of its own)."""
        u = torch.rand(self.total, cols, device=device, dtype=dtype)
        return u if self.rows is None else u[self.rows]

    def coarse(self, cols, device=None, dtype=torch.float32):
        """(n, cols) uniform like `rand`; on a CPU only the values j / 255, eight numbers from each draw of 64 bits.
        For noise on every number of a hidden state: a draw each takes a CPU as long as the rest of the gate. A GPU
        draws as fast as it writes."""
        if device is not None and torch.device(device).type != "cpu":
            return self.rand(cols, device, dtype)
        words = torch.randint(-(2**63), 2**63 - 1, (-(self.total * cols // -8),))
        u = words.view(torch.uint8)[: self.total * cols].view(self.total, cols)
        return (u if self.rows is None else u[self.rows]).to(dtype) / 255

    def gumbel(self, cols, device=None, dtype=torch.float32):
        """(n, cols) standard Gumbel noise: argmax(logits + gumbel) is a sample from softmax(logits)."""
        u = self.rand(cols, device, dtype).clamp(torch.finfo(dtype).tiny, 1 - torch.finfo(dtype).eps / 2)
        return -(-u.log()).log()

    def normal(self, cols, device=None, dtype=torch.float32):
        """(n, cols) standard normal noise, by the inverse of its distribution function."""
        u = self.rand(cols, device, dtype).clamp(torch.finfo(dtype).eps, 1 - torch.finfo(dtype).eps)
        return torch.special.ndtri(u)

    def sum(self, t):
        """Sum over the rows of the global batch, (n, ...) -> (...): the value is global, the gradient this rank's
        share (train.py adds the gradients of all ranks)."""
        t = t.sum(0)
        return t if self.mesh is None else self.mesh.sum(t)

    def mean(self, t):
        """Mean over the rows of the global batch, (n, ...) -> (...); value global, gradient this rank's share."""
        rows = t.flatten(1) if t.dim() > 1 else t[:, None]  # a rank may have no row at all
        s = self.sum(torch.cat([rows, t.new_ones(t.shape[0], 1)], 1))
        return (s[:-1] / s[-1].detach().clamp(min=1)).view(t.shape[1:])

    def per_group(self, fn, *args):
        """fn on each routing group's rows, results concatenated; tensors (n, ...) are split, all else is passed on. A
        group may have no rows."""
        if len(self.sizes) == 1:
            return fn(*args)
        parts = [t.split(self.sizes) if isinstance(t, Tensor) else [t] * len(self.sizes) for t in args]
        return torch.cat([fn(*rows) for rows in zip(*parts)])


def gates():
    """{name: class} of every gate in this file; the name is the class name in lower case."""
    classes = [c for c in globals().values() if isinstance(c, type) and issubclass(c, Gate) and c is not Gate]
    return {c.__name__.lower(): c for c in classes}


def make_gate(name, args="", k=0, **offered):
    """Build the gate called `name`. Its constructor receives those of `offered` (D, E, V, layer, seed, counts,
    n_domains, steps) that it names, k experts per token (0: its own default), and the knobs in `args`, like
    "gamma=0.1,entropy=0.05". ValueError with one line for an unknown gate or knob, a value of the wrong type, or one
    that the gate refuses."""
    if name not in gates():
        raise ValueError(f"--gate={name} is unknown{closest(name, gates())}; choose from {', '.join(sorted(gates()))}")
    parameters = inspect.signature(gates()[name]).parameters
    if k and "k" not in parameters:
        raise ValueError(f"--k={k}: --gate={name} sets the number of experts per token itself; leave --k out")
    kwargs = {p: v for p, v in offered.items() if p in parameters} | ({"k": k} if k else {})
    knobs = {p: v.default for p, v in parameters.items() if p not in offered and not (k and p == "k")}
    for knob, default in knobs.items():
        if default is inspect.Parameter.empty:
            raise TypeError(f"--gate={name}: {knob} is a knob and needs a default, whose type is the knob's")
    for pair in filter(None, args.replace(" ", "").split(",")):
        key, _, text = pair.partition("=")
        if key in kwargs and key not in offered:
            raise ValueError(f"--gate_args={args}: {key} is given twice")
        if key not in knobs:
            raise ValueError(
                f"--gate_args={args}: {name} has no knob {key!r}{closest(key, knobs)}; it has: "
                f"{', '.join(knobs) or 'none'}"
            )
        kwargs[key] = read_knob(key, text, knobs[key])
    gate = gates()[name](**kwargs)
    for loss, weight in gate.loss_weights.items():
        if weight < 0:
            raise ValueError(f"--gate_args: {loss}={weight} is the weight of a loss and must not be negative")
    return gate


def read_knob(key, text, default):
    """The value of a knob, of the type of its default; ValueError if it has none."""
    kind = type(default)
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"--gate_args: {key}={text} should be of type {kind.__name__}, like {key}={default}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--gate_args: {key}={text} must be a finite number")
    if isinstance(value, (int, float)) and value and not 1e-9 <= abs(value) <= 1e6:
        raise ValueError(f"--gate_args: {key}={text} is out of all proportion: choose 0 or a size from 1e-9 to 1e6")
    return value


def refuse_unless(gate, **conditions):
    """ValueError naming the gate's first knob whose condition does not hold: knob=(value, holds, what it must be)."""
    for knob, (value, holds, text) in conditions.items():
        if not holds:
            raise ValueError(f"--gate_args: {gate}'s {knob}={value} must be {text}")


# ---------------------------------------------------------------------------------------------------------------------
# What several gates share


def full_precision(x):
    """x in float32 (float64 stays): routing decisions do not survive bf16."""
    return x if x.dtype == torch.float64 else x.float()


def wide(x):
    """x in float64, for sums and sorts whose rounding would show. Apple's GPUs have none: from there it goes to the
    CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def linear(x, weight, bias=None):
    """Router logits (N, E) = x weight^T in float32, the product too: autocast would quietly run it in bf16, and a model
    that was cast to bf16 has such weights."""
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else full_precision(bias)
        return F.linear(full_precision(x), full_precision(weight), bias)


def scatter(idx, w, E):
    """idx (N, k) expert numbers, distinct in a row, and w (N, k) their weights -> G (N, E)."""
    return w.new_zeros(w.shape[0], E).scatter(1, idx, w)


def fair_slots(factor, rows, E):
    """Slots of an expert: factor times its fair share of the rows, rounded up, at least one and at most all. 1.1 * 100
    / 10 is a hair above 11 in floating point, and 11 are meant."""
    return max(math.ceil(min(factor * rows / E, rows) - 1e-6), min(1, rows))


def queue(expert, key, E):
    """The queue in front of each expert, highest key first, equal keys (or key None: all) in the order given. expert
    (M,) numbers, key (M,) -> order (M,), rows expert by expert; position (M,) of those rows in their expert's queue,
    from 0; load (E,)."""
    order = expert.argsort(stable=True)
    if key is not None:
        order = key.argsort(descending=True, stable=True)
        order = order[expert[order].argsort(stable=True)]
    load = expert.new_zeros(E).scatter_add(0, expert, torch.ones_like(expert))
    position = torch.arange(len(expert), device=expert.device) - (load.cumsum(0) - load)[expert[order]]
    return order, position, load


def balance_loss(p, chosen, place):
    """E * sum_e f_e P_e, the load balance loss of Switch (arXiv:2101.03961, eq. 4) and GShard.

    p (N, E) probabilities, P_e their mean: it carries the gradient, which lowers the logits of crowded experts.
    chosen (N, E) bool, before any drop; f_e is expert e's share of all choices: a count, divided by k, no gradient.
    1 at perfect balance, E when everything goes to one expert with certainty; but about 1 for any f while P is flat, so
    that only the load shows whether there is a collapse. 1 is not the minimum: f and P can be anti-aligned. Both
    means run over the global batch.
    """
    f, P = place.mean(torch.stack([chosen.to(p.dtype), p], 1))
    f = f.detach() / f.detach().sum().clamp(min=1e-9)
    return p.shape[1] * (f * P).sum()


def z_loss(logits, place):
    """mean_n (logsumexp_e logits)^2, keeps router logits small (ST-MoE, arXiv:2202.08906, eq. 5; weight 1e-3).
    Not invariant to a shift of the logits, and it does not balance anything."""
    return place.mean(logits.logsumexp(1).square())


def cv_squared(t):
    """Squared coefficient of variation of t (E,), population variance / mean^2: 0 when all entries are equal."""
    return t.var(unbiased=False) / t.mean().square().clamp(min=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Top-k and its relatives: content decides


class Soft(Gate):
    """Every token visits every expert, weighted by a softmax: the oldest mixture (Jacobs et al. 1991).

        G = softmax(x W^T)

    The bound on cost for all that follow, but not on quality: experts that all see every token learn much the same
    (tests/RESULTS.md). With E = 1 the weight is exactly 1: a dense model. (Not Soft MoE, 2308.00951, whose experts read
    mixtures of tokens instead of tokens: no G can say that.)

    Reads: content. Balanced by: nothing, every expert sees all. Looks ahead: never.
    """

    def __init__(self, D, E):
        super().__init__(D, E, k=E)
        self.weight = nn.Parameter(torch.randn(E, D) * D**-0.5)

    def forward(self, x, ids):
        return Routing(linear(x, self.weight).softmax(1), {})


class TopK(Gate):
    """The k likeliest experts of each token, with their softmax weights (Mixtral, arXiv:2401.04088).

        p = softmax(x W^T);  G = the k largest entries of each row of p, divided by their sum if k >= 2

    k = 1 keeps p as it is, see the head of this file. z: weight of `z_loss`, off by default.

    Reads: content. Balanced by: `balance_loss`. Looks ahead: never.
    """

    def __init__(self, D, E, k=2, balance=0.01, z=0.0):
        super().__init__(D, E, k)
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
        self.loss_weights = {"balance": balance, "z": z}

    def forward(self, x, ids):
        logits = linear(x, self.weight)
        p = logits.softmax(1)
        w, idx = p.topk(self.k, dim=1)
        if self.k > 1:
            w = w / w.sum(1, keepdim=True)
        G = scatter(idx, w, self.E)
        return Routing(G, {"balance": balance_loss(p, G > 0, self.place), "z": z_loss(logits, self.place)})


class Switch(Gate):
    """Top-1: one expert per token, and its probability teaches the router (Switch Transformer, arXiv:2101.03961,
    section 2).

        x' = x * U(1 - jitter, 1 + jitter)      training only; the experts see x, not x'
        p = softmax(x' W^T),  e = argmax p,  y = p_e FFN_e(x)

    Init of the router: truncated normal, std sqrt(0.1 / D), as the paper's (which scales its experts so, too; ours keep
    the model's). At the start p_e is near 1/E and scales every expert down: Switch is slow at first. The paper's text
    multiplies the input by the jitter, its pseudo-code adds it to the logits (nearly a no-op under softmax); the
    authors' code multiplies, and so do we. z: weight of `z_loss`.

    Reads: content. Balanced by: `balance_loss`, eq. 4, alpha = 0.01. Looks ahead: never.
    """

    def __init__(self, D, E, balance=0.01, jitter=0.01, z=0.0):
        super().__init__(D, E, k=1)
        self.weight = nn.Parameter(torch.empty(E, D))
        std = (0.1 / D) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        refuse_unless("switch", jitter=(jitter, 0 <= jitter < 1, "from 0 to below 1"))
        self.jitter = jitter
        self.loss_weights = {"balance": balance, "z": z}

    def forward(self, x, ids):
        if self.training and self.jitter:
            x = full_precision(x)
            x = x * (1 + self.jitter * (2 * self.place.coarse(self.D, x.device, x.dtype) - 1))
        logits = linear(x, self.weight)
        p = logits.softmax(1)
        w, idx = p.max(1, keepdim=True)
        G = scatter(idx, w, self.E)
        return Routing(G, {"balance": balance_loss(p, G > 0, self.place), "z": z_loss(logits, self.place)})


class GShard(Gate):
    """Top-2 whose second expert is used at random, as often as it matters (GShard, arXiv:2006.16668, algorithm 1).

        p = softmax(x W^T);  g1, g2 = the two largest, divided by their sum (before capacity)
        training: the second is used with probability min(1, 2 g2);  evaluation: always

    A weak second opinion is not worth its slot. When an expert is full, all first choices go before any second choice.

    Reads: content. Balanced by: E sum_e f_e P_e over first choices, weight 1e-2 (authors' code; the paper prints it
    without E^2). Looks ahead: never by itself; its drop order does, in training with a capacity.
    """

    drop_order = "choice"

    def __init__(self, D, E, balance=0.01):
        super().__init__(D, E, k=2)
        self.weight = nn.Parameter(torch.randn(E, D) * D**-0.5)
        self.loss_weights = {"balance": balance}

    def forward(self, x, ids):
        p = linear(x, self.weight).softmax(1)
        g, idx = p.topk(2, dim=1)
        g = g / (g.sum(1, keepdim=True) + 1e-9)  # (N, 2)
        if self.training:
            keep = self.place.rand(1, x.device)[:, 0] < 2 * g[:, 1].detach()
            g = torch.stack([g[:, 0], g[:, 1] * keep], 1)
        first = F.one_hot(idx[:, 0], self.E).bool()
        return Routing(scatter(idx, g, self.E), {"balance": balance_loss(p, first, self.place)})


class NoisyTopK(Gate):
    """The sparsely-gated layer: noise, whose size is learned, lets experts take turns (Shazeer et al. 2017,
    arXiv:1701.06538).

        H = x W^T + N(0, 1) * (softplus(x W_noise^T) + 1e-2)    eq. 4, noise in training only
        G = softmax over the k largest of H, 0 elsewhere        eq. 3, 5
        importance = CV(sum_n G)^2                              eq. 6, 7
        load = CV(sum_n P(expert e would be in the top k if its own noise were drawn again))^2    eq. 8 to 11

    W and W_noise start at zero, so that the start is balanced by noise alone. The softmax runs after the selection;
    for k = 1 that weight would be a constant 1, so there we take the full softmax of H instead. The 1e-2 and the
    weights 0.1 and 0.1 are those of the authors' code and language model.

    Reads: content. Balanced by: the two losses. Looks ahead: never.
    """

    def __init__(self, D, E, k=2, importance=0.1, load=0.1):
        super().__init__(D, E, k)
        self.weight = nn.Parameter(torch.zeros(E, D))
        self.noise = nn.Parameter(torch.zeros(E, D))
        self.loss_weights = {"importance": importance, "load_cv": load}

    def forward(self, x, ids):
        clean = linear(x, self.weight)  # (N, E)
        sigma = F.softplus(linear(x, self.noise)) + 1e-2
        h = clean + self.place.normal(self.E, x.device, clean.dtype) * sigma if self.training else clean
        top, idx = h.topk(min(self.k + 1, self.E), dim=1)
        w = top[:, : self.k].softmax(1) if self.k > 1 else h.softmax(1).gather(1, idx[:, :1])
        G = scatter(idx[:, : self.k], w, self.E)
        aux = {"importance": cv_squared(self.place.sum(G))}
        if self.training and self.k < self.E:
            # the bar that expert e has to clear: the k-th largest of the *other* noisy logits
            chosen = scatter(idx[:, : self.k], torch.ones_like(w), self.E) > 0
            bar = torch.where(chosen, top[:, self.k : self.k + 1], top[:, self.k - 1 : self.k])
            aux["load_cv"] = cv_squared(self.place.sum(torch.special.ndtr((clean - bar) / sigma)))
        return Routing(G, aux)


class TopP(Gate):
    """The likeliest experts until they sum to p: a token of which the router is unsure gets more ("Harder Tasks Need
    More Experts", Huang et al. 2024, arXiv:2403.07652).

        P = softmax(x W^T);  experts in order of falling P, and the first t whose sum is at least p;  G = P at those

    No row needs more than p E experts, rounded up (a flat one does): that is the k of a capacity. Where the sum is
    exactly p, the authors' code takes one more.
        entropy   mean_n -sum_e P log P, the "dynamic loss", weight 1e-4. Without it the cheapest way to a low task loss
                  is a flat P, hence many experts
        balance   weight 1e-2; f is a share of all choices, theirs of all tokens, which also grows with their number

    Reads: content. Balanced by: `balance_loss`. Looks ahead: never.
    """

    def __init__(self, D, E, p=0.4, balance=0.01, entropy=1e-4):
        super().__init__(D, E, k=max(1, min(E, math.ceil(p * E - 1e-6))))
        refuse_unless("topp", p=(p, 0 < p <= 1, "above 0 and at most 1"))
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
        self.p = p
        self.loss_weights = {"balance": balance, "entropy": entropy}

    def forward(self, x, ids):
        logits = linear(x, self.weight)
        P = logits.softmax(1)
        w, idx = P.sort(dim=1, descending=True, stable=True)
        before = w.detach().cumsum(1) - w.detach()  # what the stronger experts sum to: 0 for the first
        G = scatter(idx, w * (before < self.p - 1e-6), self.E)
        aux = {"entropy": self.place.mean(-(P * logits.log_softmax(1)).sum(1))}
        return Routing(G, aux | {"balance": balance_loss(P, G > 0, self.place)})


# ---------------------------------------------------------------------------------------------------------------------
# Balance without a loss


class DeepSeekV3(Gate):
    """Sigmoid scores, and a bias per expert that balances without a loss (DeepSeek-V3, arXiv:2412.19437, section
    2.1.2).

        s = sigmoid(x W^T);  chosen = the k largest of s + b;  G = route_scale * s / sum of the chosen s
        after each step  b_e += gamma * sign(mean load - load_e),  loads of the global batch since the last step

    b takes part in the choice only: no gradient reaches it and it never enters a weight. For k = 1 the weight is s
    itself: divided by its sum it would be 1, without a gradient. expert_groups > 1 limits where a token may go: experts
    form equal groups (nodes), a node's score is the sum of its two largest s + b, and the best keep_groups compete.
    gamma becomes 0 after the share `anneal` of the mixture's steps (14.3T of 14.8T tokens). Paper: k = 8 of 256, 4 of 8
    groups, route_scale 2.5 and a shared expert beside the routed ones (--shared_hidden). expert_groups, keep_groups
    (their n_expert_groups, n_limited_groups) and route_scale have the defaults of their code.

    rule=quantile takes no step size (Jianlin Su, kexue.fm/archives/11619, 2026; used by Kimi K3): b_e moves so that,
    with the other biases as they are, expert e's s + b would exceed the (k+1)-th largest s + b of k N / E tokens.

        m = s + b - the (k+1)-th largest of s + b;   b_e -= the (1 - k / E) quantile of m_e over the step's tokens

    Coordinate descent on the dual of the balanced assignment problem. We read the quantile off a histogram, which adds
    up over calls and ranks: exact to a bin of 0.001. anneal holds, gamma does not matter unless it is 0.

    Reads: content. Balanced by: b, and balance = 1e-4 times E sum_e f_e P_e with P from s / sum s and f from the
    choices made (eq. 18 takes it per sequence, and f from the k largest s, without b; a gate does not see sequences and
    takes the global batch). Looks ahead: never.
    """

    def __init__(self, D, E, k=2, gamma=0.001, anneal=0.966, balance=1e-4, route_scale=1.0, expert_groups=1,
                 keep_groups=1, rule="sign", steps=0):  # fmt: skip
        super().__init__(D, E, k)
        fits = expert_groups > 0 and E % expert_groups == 0
        enough = fits and 1 <= keep_groups <= expert_groups and keep_groups * E // expert_groups >= k
        refuse_unless(
            "deepseekv3",
            expert_groups=(expert_groups, fits, f"a divisor of E={E}"),
            keep_groups=(keep_groups, enough, f"from 1 to {expert_groups}, and enough for k={k} experts"),
            gamma=(gamma, gamma >= 0, "at least 0"),
            anneal=(anneal, 0 <= anneal <= 1, "from 0 to 1"),
            rule=(rule, rule == "sign" or rule == "quantile" and expert_groups == 1, "sign, or quantile in one group"),
            route_scale=(route_scale, route_scale > 0, "above 0"),
        )
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
        self.start_gamma, self.last_step = gamma, anneal * steps if steps else math.inf
        self.route_scale, self.expert_groups, self.keep_groups = route_scale, expert_groups, keep_groups
        self.register_buffer("bias", torch.zeros(E))
        self.register_buffer("load", torch.zeros(E), persistent=False)  # choices since the last update
        bins = 2000 if rule == "quantile" and k < E else 0
        self.register_buffer("margins", torch.zeros(E, bins), persistent=False)  # a histogram of m, from -1 to 1
        self.register_buffer("gamma", torch.tensor(gamma))
        self.loss_weights = {"balance": balance}

    def set_step(self, step):
        self.gamma.fill_(self.start_gamma if step < self.last_step else 0.0)

    def forward(self, x, ids):
        s = linear(x, self.weight).sigmoid()
        key = s.detach() + self.bias  # (N, E)
        if self.keep_groups < self.expert_groups:
            parts = key.unflatten(1, (self.expert_groups, self.E // self.expert_groups))  # (N, groups, E / groups)
            score = parts.topk(min(2, parts.shape[2]), dim=2).values.sum(2)
            best = score.topk(self.keep_groups, dim=1).indices
            closed = torch.ones_like(score, dtype=torch.bool).scatter(1, best, False)
            key = parts.masked_fill(closed[:, :, None], -math.inf).flatten(1)
        idx = key.topk(self.k, dim=1).indices
        w = s.gather(1, idx)
        if self.k > 1:
            w = w / w.sum(1, keepdim=True).clamp(min=1e-20)
        chosen = torch.zeros_like(s, dtype=torch.bool).scatter(1, idx, True)
        if self.training:
            with torch.no_grad():
                self.load += self.place.sum(chosen.to(self.load.dtype))
                if self.margins.numel():
                    self.margins += self.place.sum(self.histogram(key - key.topk(self.k + 1, dim=1).values[:, -1:]))
        aux = {"balance": balance_loss(s / s.sum(1, keepdim=True).clamp(min=1e-20), chosen, self.place)}
        return Routing(scatter(idx, self.route_scale * w, self.E), aux)

    def histogram(self, m):
        """(N, E) -> (1, E, bins): how many rows of each column fall into each bin."""
        h = torch.zeros_like(self.margins)
        at = ((m.t().clamp(-1, 1) + 1) / 2 * (h.shape[1] - 1)).round().long()
        return h.scatter_add(1, at, h.new_ones(()).expand(at.shape))[None]

    @torch.no_grad()
    def update(self):
        step = self.gamma * (self.load.mean() - self.load).sign()
        if self.margins.numel():
            below = self.margins.cumsum(1)  # (E, bins)
            at = torch.searchsorted(below, (1 - self.k / self.E) * below[:, -1:])  # (E, 1)
            step = (1 - 2 * at[:, 0] / (below.shape[1] - 1)) * ((self.gamma > 0) & (below[:, -1] > 0))
        self.bias += step
        self.load.zero_()
        self.margins.zero_()


class ExpertChoice(Gate):
    """Experts choose tokens, so that each has the same number of them (Zhou et al. 2022, arXiv:2202.09368).

        p = softmax(x W^T) over experts;  each expert takes the C = k N / E tokens with the largest p;  G = p at those

    k is the paper's capacity factor c, the mean number of experts per token: a token gets from 0 to E. Weights are not
    renormalised (section 3.2). The paper's variant with a cap on the experts per token is not built.

    Reads: content. Balanced by: construction. Looks ahead: always. Whether a token is taken depends on all others of
    its routing group, and at evaluation there is no other rule to fall back on: a token's row of p alone does not say
    whether it is among an expert's C best. Use it in encoders; a decoder trained with it looks into the future.
    """

    looks_ahead = "always"
    drops_itself = True
    ignores = "capacity_factor", "drop_order"

    def __init__(self, D, E, k=2):
        super().__init__(D, E, k)
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)

    def slots(self, n):
        return math.ceil(self.k * n / self.E)

    def take(self, p):
        """One group: p (n, E) -> (n, E), 1 where expert e is given token n."""
        return torch.zeros_like(p).scatter(0, p.topk(self.slots(len(p)), dim=0).indices, 1)

    def forward(self, x, ids):
        p = linear(x, self.weight).softmax(1)
        taken = self.place.per_group(self.take, p.detach())
        return Routing(p * taken, {}, capacity=self.slots(max(self.place.sizes)))


# ---------------------------------------------------------------------------------------------------------------------
# Dense to sparse, bits, trees: how many experts is learned


class DTS(Gate):
    """Dense to sparse: from all experts to k, on the way as many as a token's own scores ask for (EvoMoE, Nie et al.
    2021, arXiv:2112.14397).

        y = softmax((x W^T + s g) / tau),  g ~ Gumbel(0, 1)
        m = y > bar, and always the k largest;  in the end only these
        G = m * y   (combine=gumbel)   or   m * softmax(x W^T)   (combine=softmax)

        phase    begins             tau                  bar                    experts of a token
        dense    at once            tau_max to tau_min   threshold              nearly all
        tighten  after dense=0.02   tau_min              threshold to tighten   those above the bar
        hard     after hard=0.06    tau_min                                     k

    The knob dense is where the phase dense ends, hard where the phase hard begins, shares of the steps since the
    experts exist; threshold and tighten are the bar's first and last value. Above a bar of 0.5 there is room for
    one expert only, so nothing jumps at the end. G is not renormalised: with k = 1 a weight would always be 1, and
    the router would get no gradient. A dropped expert gets no gradient, but comes back when its score does: it is
    part of the others' softmax. More knobs:
        noise    none; annealed (s from 1 to 0 over the dense phase); constant (s = 1). None at evaluation
        init     scale of W, not of the table by id; 1 gives logits of unit variance
        reads    content; or id: the logits are a learned table by token id, what Hash reads
        combine  gumbel or softmax, the two G above: one and the same at tau 1 without noise, as by default
    The defaults are ours. The authors cool a noisy gate under a fixed bar, and for longer: tau_max=2, noise=constant,
    tighten=0.001, a tau_min of 0.3 to 0.5 (their scripts say 0.5) and, for example, dense=0.17, hard=0.33; with a
    larger W (init=0.58), mostly combine=softmax, balance=0, and they evaluate with one expert even while the gate is
    dense. Their balance loss is not divided by k and sees kept weights only. With constant noise the choice stays a
    sample of softmax(x W^T) at any tau. From E = 1 / threshold on (1000) an even share is below the first bar, and the
    dense phase is not dense: choose less. tests/RESULTS.md: what each knob was worth.

    Reads: content, or the token id. Balanced by: `balance_loss` of y and m. Looks ahead: never.
    """

    diversify = 0.05

    def __init__(self, D, E, k=1, tau_max=1.0, tau_min=1.0, dense=0.02, hard=0.06, threshold=0.001, tighten=0.5,
                 combine="gumbel", noise="none", balance=0.01, reads="content", init=0.1, V=0, steps=0):  # fmt: skip
        super().__init__(D, E, k)
        refuse_unless(
            "dts",
            combine=(combine, combine in ("gumbel", "softmax"), "gumbel or softmax"),
            noise=(noise, noise in ("none", "annealed", "constant"), "none, annealed or constant"),
            reads=(reads, reads in ("content", "id"), "content or id"),
            tau_min=(tau_min, 0 < tau_min <= tau_max, f"above 0 and at most tau_max={tau_max}"),
            hard=(hard, 0 <= dense <= hard <= 1, f"at least dense={dense}, and both from 0 to 1"),
            threshold=(threshold, 0 < threshold <= tighten <= 1, f"above 0 and at most tighten={tighten} <= 1"),
            init=(init, init >= 0, "at least 0"),
        )
        self.by_id = reads == "id"
        self.weight = nn.Parameter(torch.randn(V, E) if self.by_id else init * torch.randn(E, D) * D**-0.5)
        self.final_k, self.bar_range, self.weights_from_y = k, (threshold, tighten), combine == "gumbel"
        self.tau_range = tau_max, tau_min
        self.noise_range = dict(none=(0.0, 0.0), annealed=(1.0, 0.0), constant=(1.0, 1.0))[noise]
        self.sparse_from, self.hard_from, self.steps = round(dense * steps), round(hard * steps), steps
        self.register_buffer("tau", torch.tensor(0.0))
        self.register_buffer("noise", torch.tensor(0.0))
        self.register_buffer("bar", torch.tensor(0.0))
        self.register_buffer("hard", torch.tensor(False))
        self.loss_weights = {"balance": balance}
        self.set("dense", tau_max, self.noise_range[0])

    def phases(self):
        table = [
            ("dense", 0, self.sparse_from),
            ("tighten", self.sparse_from, self.hard_from),
            ("hard", self.hard_from, self.steps),
        ]
        return [(name, first) for name, first, end in table if first < end]

    def set_step(self, step):
        high, low = self.tau_range
        first, last = self.noise_range
        if step < self.sparse_from:
            t = step / self.sparse_from
            self.set("dense", high + (low - high) * t, first + (last - first) * t)
        elif step < self.hard_from:
            self.set("tighten", low, last, (step - self.sparse_from) / (self.hard_from - self.sparse_from))
        else:
            self.set("hard", low, last, 1.0)

    def set(self, phase, tau, noise=0.0, tight=0.0):
        """What holds from the next call on: the temperature, the scale of the noise, and how far the bar has risen (0
        to 1, geometrically); in the phase "hard" only the k largest count."""
        low, high = self.bar_range
        self.phase = phase
        self.tau.fill_(tau)
        self.noise.fill_(noise)
        self.bar.fill_(low * (high / low) ** tight)
        self.hard.fill_(phase == "hard")
        self.k = self.final_k if phase == "hard" else self.E  # for capacity: a dense gate asks every expert

    def report(self):
        return {"phase": self.phase, "tau": float(self.tau), "bar": float(self.bar)}

    def forward(self, x, ids):
        z = full_precision(self.weight[ids]) if self.by_id else linear(x, self.weight)  # (N, E)
        noise = self.noise * self.place.gumbel(self.E, x.device, z.dtype) if self.training else 0.0
        y = ((z + noise) / self.tau).softmax(1)
        top = torch.zeros_like(y, dtype=torch.bool).scatter(1, y.topk(self.final_k, dim=1).indices, True)
        m = top | ((y > self.bar) & ~self.hard)
        G = (y if self.weights_from_y else z.softmax(1)) * m
        return Routing(G, {"balance": balance_loss(y, m, self.place)})


class ReMoE(Gate):
    """A rectifier instead of top-k: an expert is on where its score is positive, and a price on scores keeps k of them
    on (Wang et al. 2024, arXiv:2412.14711).

        G = relu(x W^T)                                                       continuous, also where an expert turns on
        L1 = lambda * sum_e f_e mean_n G[n, e],  f_e = E / k * share of tokens at e           dear where it is crowded
        after each step  lambda *= alpha^sign(experts per token - k)          on the global batch since the last step

    lambda starts at 1e-8 and is felt after 60 to 100 steps; then the number of experts falls to k, a mean over
    tokens, and no capacity fits before. Traps: a token may get no expert at all (a row of zeros: it passes by this
    layer). What is off has no gradient and comes back with a change of x only: our default with k = 1 overshot at
    step 85 and kept 0.6 to 0.7 experts per token from step 200 to 300. W has no bias: it can close an expert
    because the tokens' vectors have a common mean; had they none, half of the scores would stay positive. The
    authors share one lambda between the layers, which so may differ in their experts per token; a gate knows one
    layer. At sign 0 their code lowers lambda, the paper and we leave it. It stays between its start and 1000: ours.

    Reads: content. Balanced by: f_e in the price. Looks ahead: never.
    """

    def __init__(self, D, E, k=1, start=1e-8, alpha=1.2):
        super().__init__(D, E, k)
        refuse_unless(
            "remoe",
            start=(start, 1e-9 <= start <= 1, "from 1e-9 to 1"),
            alpha=(alpha, 1 <= alpha <= 10, "from 1 to 10"),
        )
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
        self.start, self.alpha = start, alpha
        self.register_buffer("price", torch.tensor(start))  # lambda
        self.register_buffer("count", torch.zeros(2), persistent=False)  # experts asked, tokens since the last update
        self.loss_weights = {"l1": 1.0}

    def report(self):
        return {"log10_lambda": math.log10(float(self.price))}

    def forward(self, x, ids):
        G = linear(x, self.weight).relu()
        on = (G > 0).to(G.dtype)
        share, mean = self.place.mean(torch.stack([on, G], 1))  # (E,) each
        if self.training:
            with torch.no_grad():
                asked = torch.stack([on.sum(1), on.new_ones(len(on))], 1)
                self.count += self.place.sum(asked.to(self.count.dtype))
        return Routing(G, {"l1": self.price * self.E / self.k * (share.detach() * mean).sum()})

    @torch.no_grad()
    def update(self):
        asked, tokens = self.count
        self.price.mul_(self.alpha ** (asked - self.k * tokens).sign()).clamp_(self.start, 1e3)
        self.count.zero_()


def smooth_step(t, gamma):
    """S(t): 0 below -gamma/2, 1 above gamma/2, in between the cubic that joins them with a continuous slope
    (arXiv:2002.07772). gamma is the width of the soft band. Outside it value and gradient are exact: 0 or 1, and 0."""
    t = (t / gamma).clamp(-0.5, 0.5)
    return (t * (1.5 - 2 * t * t) + 0.5).clamp(0, 1)  # the second clamp: a fused multiply-add may round below 0


def entropy(p):
    """Entropy of the rows of p (..., n) -> (...), with the 1e-6 inside the logarithm of DSelect-k and COMET."""
    return -(p * (p + 1e-6).log()).sum(-1)


class DSelectK(Gate):
    """k selectors, each of which spells an expert's number in smooth bits (DSelect-k, arXiv:2106.03760).

        z = x W^T + b  (k, m),  m = ceil(log2 E);   s = S(z)          S: smooth_step, soft while |z| < gamma / 2
        r_j(e) = product over bits t of s_jt if bit t of e is set, else 1 - s_jt      most significant bit first
        G(e) = sum_j softmax(x A^T + c)_j r_j(e)

    Starts dense; k experts per token or fewer once all bits are saturated, which nothing enforces: use it without
    capacity. Codes above E - 1 hold mass when E is no power of two, so rows sum to 1 or less; they are not
    renormalised. static=True drops x: all tokens share one row. W and b start in U(+-gamma/100): z has then a standard
    deviation of gamma sqrt(D) / 170, and hardly a bit is saturated.
        entropy     mean_n sum_j H(r_j), hardens the bits. Authors' code: 1e-6 times the sum over the batch; we take the
                    mean, as COMET does, with 0.01 (the same at 10k tokens)
        reciprocal  mean_n sum_j 1 / (1e-6 + sum_e r_j(e)), pulls mass off unused codes, if any; k at best. Authors'
                    code: a sum and no 1e-6. A selector wholly on an unused code gets no gradient either way; near one
                    the loss is steep, so clip gradients

    Reads: content. Balanced by: nothing. Looks ahead: never.
    """

    def __init__(self, D, E, k=2, gamma=1.0, static=False, entropy=0.01, reciprocal=1.0):
        super().__init__(D, E, k)
        refuse_unless("dselectk", gamma=(gamma, gamma > 0, "above 0"))
        self.bits, self.gamma, self.static = (E - 1).bit_length(), gamma, static
        self.bias = nn.Parameter((torch.rand(k * self.bits) - 0.5) * gamma / 50)
        self.mix_bias = nn.Parameter((torch.rand(k) - 0.5) / 10)
        if not static:
            self.weight = nn.Parameter((torch.rand(k * self.bits, D) - 0.5) * gamma / 50)
            self.mix = nn.Parameter((torch.rand(k, D) - 0.5) / 10)
        self.loss_weights = {"entropy": entropy, "reciprocal": reciprocal}

    def forward(self, x, ids):
        z = self.bias.expand(len(x), -1) if self.static else linear(x, self.weight, self.bias)
        mix = self.mix_bias.expand(len(x), -1) if self.static else linear(x, self.mix, self.mix_bias)
        s = smooth_step(z.unflatten(1, (self.k, self.bits)), self.gamma)  # (N, k, bits)
        r = s.new_ones(len(x), self.k, 1)
        for t in range(self.bits):
            r = torch.stack([r * (1 - s[..., t, None]), r * s[..., t, None]], -1).flatten(2)
        r = r[..., : self.E]
        aux = {"entropy": self.place.mean(entropy(r).sum(1))}
        if self.E < 2**self.bits:
            aux["reciprocal"] = self.place.mean((1 / (1e-6 + r.sum(2))).sum(1))
        return Routing((mix.softmax(1)[..., None] * r).sum(1), aux)


def tree_leaves(h):
    """(..., E - 1) probabilities of going left at the split nodes -> (..., E) of reaching the leaves, left to right.

    Nodes are numbered as in a heap: 0 is the root, 2i + 1 and 2i + 2 are the children of i, nodes from E - 1 on are
    leaves. So the tree is complete for every E, and the leaves on the deeper of two levels stand to the left:

        E = 5:        0            Level by level: each level is the previous one times h and 1 - h.
                   1     2         A path costs its depth, not E - 1 factors.
                 3   4  5 6        leaves 7 8 4 5 6
                7 8
    """
    E = h.shape[-1] + 1
    level, leaves, node = torch.ones_like(h[..., :1]) if E > 1 else h.new_ones(*h.shape[:-1], 1), [], 0
    while level.shape[-1]:
        width = level.shape[-1]
        splits = min(max(E - 1 - node, 0), width)
        leaves.insert(0, level[..., splits:])
        left, p = h[..., node : node + splits], level[..., :splits]
        level = torch.stack([p * left, p * (1 - left)], -1).flatten(-2)
        node += width
    return torch.cat(leaves, -1)


class COMET(Gate):
    """k trees whose leaves are the experts; any E, no code is wasted (COMET, arXiv:2306.02824).

        h = S(x W^T + b)              (k, E - 1) probability of going left at every node; S: smooth_step
        p = tree_leaves(h)            (k, E) each tree sums to 1
        q = p exp(alpha) / sum over all k E pairs,   alpha = x V^T + c  (k, E)      one joint softmax, not one per tree
        G(e) = sum_j q_j(e)           rows sum to 1

    Starts dense; once a token's paths are saturated its row has at most k non-zeros (trees may agree), exact zeros
    otherwise: use it without capacity. Nothing enforces k before that; gamma and the entropy weight do. A token whose
    whole path is saturated sends no gradient to W, and with k = 1 none to V: its choice is final.
        entropy   mean_n sum_j H(p_j), on p and not on q; 0 when decided. Authors search weights 1e-4 to 100; in a fresh
                  GPT all tokens share two experts by step 30 from 0.01 on (tests/RESULTS.md, "Every gate")
    The authors' code adds 1e-8 to p inside a logarithm; we multiply by p, which keeps zeros exact. Otherwise it is
    their per-example gate (whose last release does not run: its leaf scores read a missing attribute).

    Reads: content. Balanced by: nothing. Looks ahead: never. Cost: (2E - 1) k logits per token instead of E.
    """

    def __init__(self, D, E, k=2, gamma=1.0, entropy=0.001):
        super().__init__(D, E, k)
        refuse_unless("comet", gamma=(gamma, gamma > 0, "above 0"))
        self.gamma = gamma
        self.split = nn.Parameter((torch.rand(k * (E - 1), D) - 0.5) * gamma / 50)
        self.split_bias = nn.Parameter((torch.rand(k * (E - 1)) - 0.5) * gamma / 50)
        self.leaf = nn.Parameter((torch.rand(k * E, D) - 0.5) / 10)
        self.leaf_bias = nn.Parameter((torch.rand(k * E) - 0.5) / 10)
        self.loss_weights = {"entropy": entropy}

    def forward(self, x, ids):
        h = smooth_step(linear(x, self.split, self.split_bias).unflatten(1, (self.k, self.E - 1)), self.gamma)
        p = tree_leaves(h)  # (N, k, E)
        alpha = linear(x, self.leaf, self.leaf_bias).unflatten(1, (self.k, self.E))
        alpha = alpha.masked_fill(p == 0, -torch.inf)
        q = p * (alpha - alpha.amax((1, 2), keepdim=True)).exp()
        return Routing(q.sum(1) / q.sum((1, 2))[:, None], {"entropy": self.place.mean(entropy(p).sum(1))})


# ---------------------------------------------------------------------------------------------------------------------
# Tables: the token's id decides


class Hash(Gate):
    """A fixed table from token id to expert, weight 1: nothing is learned, nothing drifts (Hash Layers,
    arXiv:2106.04426).

        G[n, table[id_n]] = 1

    kind="balanced": each id goes to the expert that is lightest so far, frequent ids first (counts: how often each
    occurs; None: all alike); "random": uniform. Each layer has its own table. MultiHash, k > 1: the experts form k
    pools and hash j picks one from pool j, which is an FFN cut into k segments, each chosen by its own hash (give the
    experts 1/k of the width).

    Reads: the token id. Balanced by: the table, by what its layer reads of the training text (in translation encoder
    and decoder read different ids). Looks ahead: never.
    """

    def __init__(self, D, E, V, k=1, kind="balanced", counts=None, layer=0, seed=0):
        super().__init__(D, E, k)
        if E % k:
            raise ValueError(f"--k={k}: hash needs a number of experts divisible by k, not --n_experts={E}")
        refuse_unless("hash", kind=(kind, kind in ("balanced", "random"), "balanced or random"))
        rng = torch.Generator().manual_seed(seed * 1000 + layer)
        table = torch.empty(k, V, dtype=torch.long)
        for j in range(k):
            if kind == "random":
                table[j] = torch.randint(E // k, (V,), generator=rng)
            else:
                table[j] = balanced_table([1.0] * V if counts is None else counts, E // k, rng)
            table[j] += j * (E // k)
        self.register_buffer("table", table)

    def forward(self, x, ids):
        idx = self.table[:, ids].t()  # (N, k)
        return Routing(scatter(idx, full_precision(x).new_ones(idx.shape), self.E), {})


class RandomRouted(Gate):
    """Random routed experts of PanGu-Sigma: the domain owns a few experts, the token id picks one (arXiv:2303.10845).

        e = table[domain, id],  table[d, :] uniform over the experts of domain d;  weight 1

    Each layer draws its own table, once, from the seed. A domain's experts are consecutive; domains differ by at most
    one in their number, and with more domains than experts, domain d shares expert d % E. So the traffic is known
    before the model runs, and the experts of one domain can be cut out as a smaller model. Uniform over ids is not
    uniform over tokens (Zipf): Hash balances by counts, this does not. A prompt (--sample) counts as the first domain.
    We follow the description in LocMoE (section 3.1); weight 1 is our reading.

    Reads: domain and token id. Balanced by: chance. Looks ahead: never.
    """

    def __init__(self, D, E, V, n_domains=1, layer=0, seed=0):
        super().__init__(D, E, k=1)
        rng = torch.Generator().manual_seed(seed * 1000 + layer)
        n = min(n_domains, E)
        start = torch.arange(n + 1) * E // n  # domain d: experts start[d] to start[d + 1] - 1
        u = torch.rand(n, V, generator=rng, dtype=torch.float64)
        self.register_buffer("table", (start[:-1, None] + u * start.diff()[:, None]).long())

    def forward(self, x, ids):
        domain = torch.zeros_like(ids) if self.place.domain is None else self.place.domain
        idx = self.table[domain % len(self.table), ids][:, None]  # (N, 1)
        return Routing(scatter(idx, full_precision(x).new_ones(idx.shape), self.E), {})


def orthogonal(E, D):
    """(E, D) orthogonal rows of length 0.1 (columns where E > D): the centroids of BASE and StableMoE."""
    return nn.init.orthogonal_(torch.empty(E, D), gain=0.1)


class StableMoE(Gate):
    """Learn a routing, distil it into the token ids, then never change it (StableMoE, arXiv:2204.08396).

        s = x W^T
        stage 1   a_n = argmax_e s[n, e],              y_n = sigmoid(s[n, a_n]) FFN_a(x_n)
                  balance = mean_n (load_a / mean load - 1) sigmoid(s[n, a_n])                       weight 0.3
                  distill = mean_n -log softmax(words[id_n] W_hat^T)[a_n]                             weight 1
        stage 2   a_n = argmax_e (words[id_n] W_hat^T)_e, the same y (W and the experts go on learning), no losses

    stage1: share of the mixture's steps spent in stage 1; dim: width of the distilled router's embedding. Evaluation
    takes the distilled router in stage 1 too (as the authors' code and paper do). Stage 2 is really frozen: set_step
    takes requires_grad and .grad from `words` and `w_hat`. A zero gradient would not do: Adam's moments move a
    parameter on, by about ten learning rates until they have died away. The authors leave it at zero gradients; their
    experts start with a second matrix of zeros and take twice their fair share at most; their README distils with
    weight 0.3, the paper and we with 1. "agreement" is logged: how often both routers agree. In short runs
    hardly more often than by chance: what freezes is then a nearly random table (tests/RESULTS.md, "Routing that stops
    changing").

    Reads: content in stage 1, then the token id. Balanced by: the loss, of counts without gradient, in stage 1. Looks
    ahead: never.
    """

    def __init__(self, D, E, V, steps=1, stage1=0.1, dim=50, balance=0.3, distill=1.0):
        super().__init__(D, E, k=1)
        refuse_unless("stablemoe", stage1=(stage1, 0 <= stage1 <= 1, "from 0 to 1"), dim=(dim, dim > 0, "at least 1"))
        self.weight = nn.Parameter(orthogonal(E, D))
        self.words = nn.Parameter(torch.randn(V, dim))
        self.w_hat = nn.Parameter(orthogonal(E, dim))
        self.stage1_steps = round(stage1 * steps)
        self.register_buffer("stage", torch.tensor(1))
        self.loss_weights = {"balance": balance, "distill": distill}

    def phases(self):
        frozen = [("frozen", self.stage1_steps)]
        return [("learn", 0), *frozen] if self.stage1_steps > 0 else frozen

    def set_step(self, step):
        self.stage.fill_(1 if step < self.stage1_steps else 2)
        for p in (self.words, self.w_hat):
            p.requires_grad_(step < self.stage1_steps)
            p.grad = p.grad if p.requires_grad else None

    def forward(self, x, ids):
        s = linear(x, self.weight)
        distilled = linear(self.words[ids], self.w_hat)
        learned, known = s.argmax(1), distilled.argmax(1)
        stage1 = self.training and bool(self.stage == 1)
        a = learned if stage1 else known
        w = s.gather(1, a[:, None]).sigmoid()  # (N, 1)
        zero, agreement = w.new_zeros(()), self.place.mean((learned == known).to(s.dtype))
        aux = {"agreement": agreement, "balance": zero, "distill": zero}
        if stage1:
            load = self.E * self.place.mean(F.one_hot(a, self.E).to(s.dtype))
            aux["balance"] = self.place.mean((load[a] - 1) * w[:, 0])
            aux["distill"] = self.place.mean(F.cross_entropy(distilled, a, reduction="none"))
        return Routing(scatter(a[:, None], w, self.E), aux)


# ---------------------------------------------------------------------------------------------------------------------
# Balanced assignment


class BASE(Gate):
    """Tokens are dealt out so that every expert has as many (BASE layers, arXiv:2103.16716).

        s = x W^T,   a = argmax over assignments of sum_n s[n, a_n] with N / E tokens per expert      training
                     a_n = argmax_e s[n, e]                                                           evaluation
        y_n = sigmoid(s[n, a_n]) FFN_a(x_n)

    Each routing group is dealt out by itself, as the authors do on each worker, but without the shuffle of tokens
    between workers that they make before (`balanced_assignment`; their auction may hang if E does not divide N, and
    repeats tokens under ties). W, orthogonal with gain 0.1, learns only through the sigmoid. Their code mixes
    sigmoid * net(x) + (1 - sigmoid) * x, where net has its own residual: in a pre-LN block, which adds x itself, that
    is sigmoid * FFN(x). Their experts' last matrix starts at zero, ours like any other. "greedy_load" is logged in
    training: the fullest expert's load if everybody took the argmax, as a multiple of the mean.

    Reads: content. Balanced by: construction, in training. Looks ahead: in training, since who gets a seat depends on
    who else wants it, also later; hence the argmax at evaluation.
    """

    looks_ahead = "training"

    def __init__(self, D, E):
        super().__init__(D, E, k=1)
        self.weight = nn.Parameter(orthogonal(E, D))

    def forward(self, x, ids):
        s = linear(x, self.weight)
        greedy = s.argmax(1)
        a = self.place.per_group(balanced_assignment, s.detach()) if self.training else greedy
        load = self.E * self.place.mean(F.one_hot(greedy, self.E).to(s.dtype)).max()
        return Routing(scatter(a[:, None], s.gather(1, a[:, None]).sigmoid(), self.E), {"greedy_load": load})


# ---------------------------------------------------------------------------------------------------------------------
# Locality and capacity: where an expert lives, how much it takes


def block_means(x, E):
    """Grouped average pooling (LocMoE, section 3.2): (N, D) -> (N, E), the mean of each of E consecutive blocks of
    D/E features. A linear router with fixed orthogonal rows w_e, |w_e|^2 = E/D, for one addition a feature."""
    return full_precision(x).unflatten(1, (E, x.shape[1] // E)).mean(2)


def locality_loss(p, place, eps):
    """mean_v KL(Pbar_v || D_v): tokens that live on node v should choose experts that live on node v (LocMoE, eq. 6).

    p (N, E); Pbar_v is the mean of p over all tokens of node v in the global batch. D_v puts 1 - eps evenly on the
    experts of node v and eps evenly on all others: without eps the loss would be infinite. The paper writes
    KL(current || local) and leaves eps, hard or soft counts, and per node or global open: the mean probability carries
    a gradient, and only a mean per node knows who is local. 0 without node information or with a single node.
    A router that cannot see the node can only become local if the nodes see different data.
    """
    if place.node is None or place.near is None or len(place.near) < 2:
        return p.new_zeros(())
    rows = torch.cat([p, p.new_ones(len(p), 1)], 1)
    s = p.new_zeros(len(place.near), p.shape[1] + 1).index_add(0, place.node, rows)
    s = place.sum(s[None])  # (nodes, E + 1)
    P = (s[:, :-1] / s[:, -1:].detach().clamp(min=1)).clamp(min=1e-30)  # a node without tokens: no log(0)
    near = place.near.to(p.device)
    here, there = near.sum(1, keepdim=True), (~near).sum(1, keepdim=True)
    target = torch.where(near, torch.where(there > 0, 1 - eps, 1.0) / here, eps / there)
    kl = (P * (P / target).log()).sum(1)
    counted = (s[:, -1] > 0) & (here[:, 0] > 0)  # a node without tokens or without experts has no say
    return torch.where(counted, kl, 0.0).sum() / counted.sum().clamp(min=1)


class LocMoE(Gate):
    """A router without parameters, and a loss that keeps tokens on their node (LocMoE, arXiv:2401.13920).

        logit_e = mean of the e-th block of D/E features + noise      grouped average pooling; E divides D
        G = softmax(logits) at the argmax, 0 elsewhere                top-1, section 3.2

    All gradient goes into x: the layers below and the norm's gain and bias are the router. The mean of D/E features has
    a tiny variance and the paper's softmax is almost flat, which scales every expert down by about E; unit_variance
    multiplies the logits by sqrt(D/E), false is the paper. The paper wraps logits in a ReLU (relu; where all blocks are
    negative the argmax is a tie) and adds noise of an unnamed distribution (noise: std of a normal). It names neither
    the weight nor the smoothing of the locality loss. No official code is known to us; MindSpore's MoE renormalises the
    top-1 weight to 1, we do not. delta > 0: the capacity is slots * locmoe_capacity(delta), in training, whatever
    --capacity_factor says.

    Reads: content. Balanced by: `balance_loss` and `locality_loss`, 0.01 each, over the global batch: a balance loss
    per rank would fight locality. Looks ahead: never.
    """

    def __init__(self, D, E, balance=0.01, locality=0.01, eps=0.1, unit_variance=True, relu=False, noise=0.0,
                 delta=0.0, slots=1.0):  # fmt: skip
        super().__init__(D, E, k=1)
        if D % E:
            raise ValueError(f"--n_experts={E} must divide --n_embd={D}: each expert reads a block of features")
        refuse_unless(
            "locmoe",
            eps=(eps, 0 < eps < 1, "between 0 and 1"),
            noise=(noise, noise >= 0, "at least 0"),
            delta=(delta, 0 <= delta < 1, "from 0 to below 1"),
            slots=(slots, slots > 0, "above 0"),
        )
        self.scale = (D / E) ** 0.5 if unit_variance else 1.0
        self.relu, self.noise, self.eps = relu, noise, eps
        self.capacity = None
        if delta:
            self.capacity = max(1, math.ceil(min(slots * locmoe_capacity(delta, D, E)[0], 2**31)))
            self.ignores = ("capacity_factor",)
        self.loss_weights = {"balance": balance, "locality": locality}

    def forward(self, x, ids):
        logits = block_means(x, self.E)
        if self.training and self.noise:
            logits = logits + self.noise * self.place.normal(self.E, x.device, logits.dtype)
        p = (self.scale * (logits.relu() if self.relu else logits)).softmax(1)
        w, idx = p.max(1, keepdim=True)
        G = scatter(idx, w, self.E)
        aux = {"balance": balance_loss(p, G > 0, self.place), "locality": locality_loss(p, self.place, self.eps)}
        return Routing(G, aux, capacity=self.capacity if self.training else None)


class LocMoEPlus(Gate):
    """Both sides choose, and experts need ever fewer tokens (LocMoE+, or Expert-Token Resonance, arXiv:2406.00023).

        affinity[n, e] = cos(x_n, w_e)                      w_e: the pooling rows of LocMoE; no parameters
        1. each token chooses its k best experts            G = softmax(sqrt(D) * affinity) there; k > 1: over their sum
        2. each expert keeps the C_e best of its choosers   the layer drops: priority = affinity, capacity = C
        C_e = the fewest best choosers whose affinities (0 if negative) add up to C0 * a,   C0 = capacity_factor k N / E
        a   = the lowest mean affinity of a batch so far, at most that of random directions; C_e from floor * C0 to C0

    The paper sets C by a threshold on the sum of affinities and does not say which. Ours is what full experts have
    together when the features are least aligned; as features turn towards the w_e, the sum is reached sooner and C
    falls (tests/RESULTS.md: how far, and what was tried). Each routing group has its own C_e; "slots" is the mean. Also
    open in the paper: weights, temperature, k, floor, evaluation (tokens choose, nobody is dropped). Its equation 6
    keeps the "bottom C", right for angles; we keep the largest cosines.

    Reads: content. Balanced by: as LocMoE, and by capacity. Looks ahead: in training (step 2).
    """

    looks_ahead = "training"
    ignores = "capacity_factor", "drop_order"

    def __init__(self, D, E, k=1, balance=0.01, locality=0.01, eps=0.1, capacity_factor=1.1, floor=0.25):
        super().__init__(D, E, k)
        if D % E:
            raise ValueError(f"--n_experts={E} must divide --n_embd={D}: each expert reads a block of features")
        refuse_unless(
            "locmoeplus",
            eps=(eps, 0 < eps < 1, "between 0 and 1"),
            floor=(floor, 0 <= floor <= 1, "from 0 to 1"),
            capacity_factor=(capacity_factor, capacity_factor > 0, "above 0"),
        )
        self.eps, self.capacity_factor, self.floor = eps, capacity_factor, floor
        # of random directions: the mean of the k largest of E normal cosines, whose deviation is D**-0.5
        z = torch.randn(4096, E, generator=torch.Generator().manual_seed(0))
        self.register_buffer("least", z.topk(k, dim=1).values.relu().mean() * D**-0.5)
        self.loss_weights = {"balance": balance, "locality": locality}

    def slots(self, affinity, idx):
        """Slots per expert for one routing group: affinity, idx (n, k) of the chosen -> (n, E) long, equal rows."""
        most = fair_slots(self.capacity_factor, idx.numel(), self.E)
        a, expert = wide(affinity.flatten()), idx.flatten()
        expert = expert.to(a.device)
        order, _, _ = queue(expert, a, self.E)
        total = a.new_zeros(self.E).scatter_add(0, expert, a)
        before = (a[order].cumsum(0) - a[order]) - (total.cumsum(0) - total)[expert[order]]  # ahead of me in my queue
        goal = most * wide(self.least)
        need = a.new_zeros(self.E).scatter_add(0, expert[order], (before < goal).to(a.dtype))
        need = torch.where(total < goal, most, need).clamp(fair_slots(self.floor, most, 1), most)
        return need.long().to(idx.device).expand(len(idx), self.E)

    def forward(self, x, ids):
        cos = block_means(F.normalize(full_precision(x), dim=1, eps=1e-3), self.E) * (self.D / self.E) ** 0.5  # (N, E)
        p = (cos * self.D**0.5).softmax(1)
        top, idx = cos.topk(self.k, dim=1)
        w = p.gather(1, idx)
        if self.k > 1:
            w = w / w.sum(1, keepdim=True)
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, idx, True)
        aux = {"balance": balance_loss(p, chosen, self.place), "locality": locality_loss(p, self.place, self.eps)}
        if not self.training:
            return Routing(scatter(idx, w, self.E), aux)
        top = top.detach().clamp(min=0)
        mean = self.place.mean(top.mean(1))
        self.least.copy_(torch.where(mean > 0, torch.minimum(self.least, mean), self.least))  # no rows say nothing
        C = self.place.per_group(self.slots, top, idx)  # (N, E)
        aux["slots"] = self.place.mean(C.float().mean(1))
        return Routing(scatter(idx, w, self.E), aux, priority=cos.detach(), capacity=C)


# ---------------------------------------------------------------------------------------------------------------------
# Unbiased samples: experts with a capacity, drawn at random
#
# Kool, Maddison and Mnih 2021, arXiv:2109.11817.
# Datapoints i = 1..n, each with loss l_i(z) under expert z. To minimise (1/n) sum_i E_{z ~ p_i} l_i(z), sample experts
# within their capacities and use, with w_i from one of the two gates below,
#
#     gradient = (1/n) sum_i w_i (grad log p_i(z_i) (l_i(z_i) - b_i) + grad l_i(z_i))
#
# It is unbiased for every baseline b_i that depends neither on z_i nor on what else decides w_i (who survives, row i's
# noise): tests/test_router.py enumerates. As a loss, with log_prob = w_i log p_i(z_i):
#
#     (1/n) sum_i [ sum_e G[i, e] l_i(e) + log_prob[i] * (l_i(z_i) - b_i).detach() ]
#
# Inside a deep network both gates are a heuristic: w scales an expert's output instead of a loss, so activations stay
# unbiased, but what follows is not linear, and attention mixes tokens: the "loss of a datapoint" becomes the loss of
# its sequence. One number for all choices of a sequence is mostly noise, which log_prob carries into x and all layers
# below; at weight 1 it drowns the task. Hence the weight score=0.01 (tests/RESULTS.md).


def skip_weights(z, u, E, c):
    """z (n,) sampled experts, u (n,) uniform noise, c slots per expert -> (n,) weights: a uniformly random min(n_j, c)
    of the n_j tokens at expert j survive, with weight n_j / min(n_j, c); the others are skipped, 0. The sum is n."""
    order, position, load = queue(z, u, E)
    w = load.to(u.dtype) / load.clamp(min=1, max=c)  # (E,)
    return torch.zeros_like(u).index_put((order,), w[z[order]] * (position < c))


class Skip(Gate):
    """Independent samples; what overflows is skipped, survivors weigh more (Kool et al. 2021, arXiv:2109.11817).

        z_n ~ p_n = softmax(x W^T);  a full expert keeps a uniformly random c of its n_j tokens, c = ceil(factor N / E)
        G[n, z_n] = n_j / min(n_j, c) for survivors, 0 for skipped tokens

    Averaged over who survives, G is the one-hot sample: it does not feel the capacity. The gate drops by itself, per
    routing group. G carries no gradient to W (a hard mixture has weight 1); aux["log_prob"] = G * log p(z) does, times
    the advantage (`score_function_term`), with the small weight `score`. Evaluation: the argmax with weight 1, no
    capacity. The paper's body was not available to us; this is derived from its abstract and figure, and proved by
    enumeration in the tests.

    Reads: content. Balanced by: capacity. Looks ahead: in training (survivors depend on later tokens).
    """

    looks_ahead = "training"
    drops_itself = True
    ignores = "capacity_factor", "drop_order"

    def __init__(self, D, E, capacity_factor=1.0, score=0.01):
        super().__init__(D, E, k=1)
        refuse_unless("skip", capacity_factor=(capacity_factor, capacity_factor > 0, "above 0; 1 gives equal loads"))
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
        self.capacity_factor, self.loss_weights = capacity_factor, {"log_prob": score}

    def slots(self, n):
        return fair_slots(self.capacity_factor, n, self.E)

    def forward(self, x, ids):
        logp = linear(x, self.weight).log_softmax(1)
        if not self.training:
            return Routing(F.one_hot(logp.argmax(1), self.E).to(logp.dtype), {})
        z = (logp.detach() + self.place.gumbel(self.E, x.device, logp.dtype)).argmax(1)  # (N,)
        u = self.place.rand(1, x.device, logp.dtype)[:, 0]
        w = self.place.per_group(lambda z, u: skip_weights(z, u, self.E, self.slots(len(z))), z, u)
        G = scatter(z[:, None], w[:, None], self.E)
        return Routing(G, {"log_prob": (G * logp).sum(1)}, capacity=self.slots(max(self.place.sizes)))


class GumbelMatching(Gate):
    """Balanced samples with importance weights (Kool et al. 2021, arXiv:2109.11817).

        z = argmax over assignments with at most c = ceil(factor N / E) tokens per expert of sum_n log p_n(z_n) + noise
        G[n, z_n] = p_n(z_n) / q_n(z_n | noise of the others),  p = softmax(x W^T), noise ~ Gumbel

    Exact optimum (`best_assignment`), q in closed form (`matching_log_q`). With the expectation over a row's own noise
    given the others', E[G] is p. When p is skewed most weights are near 0 and a few are huge: Skip has less variance.
    clip > 0 bounds the weights (biased). Evaluation, log_prob and sources: as Skip. Sinkhorn before the matching
    changes nothing when the balance is exact. Dear by nature, since the matching runs on the CPU: 2 to 8 times a top-k
    gate at N = 2048, E = 8, by width; 15 to 30 times at N = 8192, E = 64.

    Reads: content. Balanced by: construction, in training. Looks ahead: in training (all tokens are coupled).
    """

    looks_ahead = "training"
    drops_itself = True
    ignores = "capacity_factor", "drop_order"

    def __init__(self, D, E, capacity_factor=1.0, clip=0.0, score=0.01):
        super().__init__(D, E, k=1)
        refuse_unless(
            "gumbelmatching",
            clip=(clip, clip >= 0, "at least 0; 0 means no bound"),
            capacity_factor=(capacity_factor, capacity_factor >= 1, "at least 1"),
        )
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
        self.capacity_factor, self.clip, self.loss_weights = capacity_factor, clip, {"log_prob": score}

    def slots(self, n):
        return fair_slots(self.capacity_factor, n, self.E)

    def sample(self, logp, noise):
        """One group: logp, noise (n, E) -> G (n, E)."""
        if not len(logp):
            return logp
        z, dist = best_assignment(logp + noise, self.slots(len(logp)))
        z, dist = z.to(logp.device), dist.to(logp)
        w = (logp - matching_log_q(logp, z, dist)).gather(1, z[:, None]).exp()
        return scatter(z[:, None], w.clamp(max=self.clip) if self.clip else w, self.E)

    def forward(self, x, ids):
        logp = linear(x, self.weight).log_softmax(1)
        if not self.training:
            return Routing(F.one_hot(logp.argmax(1), self.E).to(logp.dtype), {})
        noise = self.place.gumbel(self.E, x.device, logp.dtype)
        G = self.place.per_group(self.sample, logp.detach(), noise)
        return Routing(G, {"log_prob": (G * logp).sum(1)}, capacity=self.slots(max(self.place.sizes)))


def score_function_term(log_prob, nll, pick, n_global, mesh):
    """The gradient that reaches a sampling gate (REINFORCE): sum over sequences of advantage * log_prob, over n_global.

    log_prob (B,): weight times log p of the sampled choice, summed over a sequence's tokens and layers; nll (M,) and
    pick (B, T) of the targets; n_global: number of all sequences. The advantage is the sequence's mean loss minus the
    mean of the others' (leave one out). A sequence counts once, whatever its number of targets. Unbiased, in a deep
    network too, while a sequence's choices move only its own loss and each carries its full log p. A capacity makes it
    a heuristic: a choice that crowds out another token changes that token's loss, and with it the baseline; and the
    weights of Skip scale outputs instead of losses.
    """
    rows = pick.nonzero()[:, 0]
    loss = torch.zeros_like(log_prob).index_add(0, rows, nll.detach().to(log_prob.dtype))
    loss = loss / pick.sum(1).clamp(min=1)  # (B,)
    others = (mesh.all_reduce(loss.sum()) - loss) / max(1, n_global - 1)
    return ((loss - others) * log_prob).sum() / n_global


# ---------------------------------------------------------------------------------------------------------------------
# A permutation around any gate


class Permuted(nn.Module):
    """Permutation-based local search: learn which expert each output of a gate feeds (COMET, arXiv:2306.02824). Stands
    in a gate's place, with its calls, and is not one: `--gate` does not offer it.

        G' = G P,   P[i, e] = 1: output i feeds expert e
        search      P = Sinkhorn(L / tau), L (E, E) learned with everything else; evaluation uses a hard P
        after it    P a permutation, frozen; no cost but a reordering of columns

    --permute=SHARE wraps any gate in it: same k, drop order, losses, calls. `search` is the share of the mixture's
    steps; the authors search 1 to 10 of 100 epochs. During the search every expert sees every token: use no capacity.
    Afterwards L leaves training as StableMoE's table does. Extra loss "permutation" = H(P) + H(P / row sums), weight
    zeta. Like the authors one P for all trees and no Gumbel noise. Rows of G keep their sums. log10 tau falls from -1.3
    to -3, iterations grow from 20 to 150, rows are normalised last, the hard P is the best assignment of L
    (`best_permutation`). schedule="official" (from Python only) is the authors': log10 tau -3 to -7, columns last, the
    best assignment of the soft P (but they do not restore the row sums of DSelect-k). It hardly beats chance where the
    order matters; tests/RESULTS.md compares the two, and says when neither helps.

    Reads, balanced by, looks ahead: as the gate inside.
    """

    def __init__(self, gate, steps=1, search=0.05, schedule="corrected", zeta=1e-4):
        super().__init__()
        if schedule not in ("corrected", "official"):
            raise ValueError(f"Permuted: schedule={schedule} must be corrected or official")
        if not 0 < search < 1:
            raise ValueError(f"Permuted: search={search} must be between 0 and 1")
        self.gate, self.D, self.E = gate, gate.D, gate.E
        self.looks_ahead, self.drop_order, self.drops_itself = gate.looks_ahead, gate.drop_order, gate.drops_itself
        self.window = max(2, round(search * steps))  # its last update has the hard P already
        self.official, self.zeta = schedule == "official", zeta
        self.logits = nn.Parameter((torch.rand(self.E, self.E) - 0.5) / 10)
        self.register_buffer("source", torch.arange(self.E))  # the hard P: expert e is fed by output source[e]
        self.register_buffer("updates", torch.tensor(0))  # made so far
        self.register_buffer("tau", torch.tensor(1.0))
        self.register_buffer("iterations", torch.tensor(20))
        self.register_buffer("frozen", torch.tensor(False))
        self.register_buffer("seen", torch.full((self.E, self.E), torch.nan), persistent=False)  # L behind `source`

    @property
    def k(self):
        return self.gate.k

    @property
    def ignores(self):
        return self.gate.ignores

    @property
    def loss_weights(self):
        return {**self.gate.loss_weights, "permutation": self.zeta}

    def set_step(self, step):
        self.gate.set_step(step)
        search, f = step + 1 < self.window, min((step + 1) / self.window, 1)
        if not search and not self.frozen:
            self.harden()  # before tau moves: it belongs to the last soft P that was used
        self.frozen.fill_(not search)
        self.updates.fill_(step)
        self.tau.fill_(10 ** (-3 - 4 * f if self.official else -1.3 - 1.7 * f))
        self.iterations.fill_(20 + int(130 * f))
        self.logits.requires_grad_(search)
        self.logits.grad = self.logits.grad if search else None

    def update(self):
        self.updates += 1
        self.gate.update()

    def soft(self):
        """P (E, E), nearly doubly stochastic: logarithmic Sinkhorn, in which the last direction sums to 1 exactly."""
        a = self.logits / self.tau
        for _ in range(int(self.iterations)):
            for dim in (1, 0) if self.official else (0, 1):
                a = a - a.logsumexp(dim, keepdim=True)
        return a.exp()

    @torch.no_grad()
    def harden(self):
        """Make `source` the best permutation of the logits now (the identity before any training)."""
        if self.updates > 0 and not torch.equal(self.seen, self.logits):
            self.source.copy_(best_permutation(self.soft() if self.official else self.logits).argsort())
            self.seen.copy_(self.logits)

    def phases(self):
        return sorted([*self.gate.phases(), ("permuted", self.window - 1)], key=lambda phase: phase[1])

    def report(self):
        return self.gate.report()

    def of_outputs(self, place, searching):
        """place as the gate inside should see it: `near` is where its outputs lead, not where experts live. During the
        search each leads everywhere."""
        if place is None or place.near is None:
            return place
        place = copy.copy(place)
        place.near = None if searching else place.near[:, self.source.argsort()]
        return place

    def forward(self, x, ids, place=None):
        searching = bool(self.training and not self.frozen)
        if not (searching or self.frozen):
            self.harden()
        G, aux, priority, capacity = self.gate(x, ids, self.of_outputs(place, searching))
        if searching:
            P = self.soft()
            loss = entropy(P).sum() + entropy(P / P.sum(1, keepdim=True)).sum()  # of no token
            aux = {**aux, "permutation": (place or Place(len(x))).mean(loss.expand(len(x)))}
            move = lambda t: linear(t, P.t())  # t P
            mixed = move(G)
            moved = mixed * (G.sum(1, keepdim=True) / mixed.sum(1, keepdim=True).clamp(min=1e-9))
            capacity = None  # every expert sees every token: the gate's own capacity would cut most of them off
        else:
            aux = {**aux, "permutation": G.new_zeros(())}
            move = lambda t: t[..., self.source]
            moved = move(G)
            capacity = move(capacity) if isinstance(capacity, Tensor) else capacity
        return Routing(moved, aux, None if priority is None else move(priority), capacity)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix: solvers


def balanced_table(counts, E, rng=None):
    """Called by Hash. (V,) token counts -> (V,) expert numbers: tokens in order of falling count, each to the lightest
    expert so far (Hash Layers, arXiv:2106.04426, section 3.1). The heaviest expert exceeds 1/E of all tokens by at most
    the most frequent token: a Zipf head cannot be split. Tokens with count 0 (held-out text may have them) take turns.

    rng: a generator that moves tokens of about the same count (10 %) past each other and draws the experts' order.
    Without it there is one table only: two layers would send the same tokens through life together."""
    key = torch.as_tensor(counts, dtype=torch.float64).clamp(min=1e-30).log()
    if rng:
        key += 0.1 * torch.randn(len(key), generator=rng, dtype=torch.float64)
    counts, names = list(map(float, counts)), torch.randperm(E, generator=rng).tolist() if rng else range(E)
    table, heap = [0] * len(counts), [(0.0, i, e) for i, e in enumerate(names)]
    for i, token in enumerate(key.argsort(descending=True, stable=True).tolist()):
        load, tie, e = heapq.heappop(heap)
        table[token] = e if counts[token] else i % E  # what weighs nothing would all go to the lightest
        heapq.heappush(heap, (load + counts[token], tie, e))
    return torch.tensor(table)


def balanced_assignment(scores, eps=0.05, rounds=128):
    """(N, E) scores -> (N,) expert numbers with a near-maximal sum of scores, N // E or N // E + 1 tokens per expert.

    Prices at which the demand is nearly even, then an auction from there; both in units of sigma, the standard
    deviation of the scores once row and column means are taken away (those do not change the best assignment). The
    N % E additional seats go to the dearest experts. The sizes hold always: with ties, equal rows, scores that are not
    finite (taken as the lowest finite one). If nobody is left to its closing, the sum is within 2 N eps sigma of the
    optimum for these seats: eps from the auction, eps from the ripple below. Measured: 0.005 N sigma below it as a
    rule, 0.06 at worst for independent scores, 0.095 where tokens nearly repeat, 0.197 for sparse scores (0 or 1),
    which use up the rounds.
    Called by BASE; one wait for the device per round, 5 to 10 rounds, more when tokens repeat."""
    N, E = scores.shape
    if E == 1 or N == 0:
        return torch.zeros(N, dtype=torch.long, device=scores.device)
    s, experts = full_precision(scores.detach()), torch.arange(E, device=scores.device)
    finite = s.isfinite()
    s = torch.where(finite, s, torch.where(finite, s, torch.inf).amin()).nan_to_num(0, 0, 0)
    s = s / s.abs().amax().clamp(min=1e-30)
    s = s - s.mean(1, keepdim=True)
    sigma = (s - s.mean(0)).std(unbiased=False).clamp(min=1e-5)
    tokens = torch.arange(N, device=s.device)
    ripple = (tokens[:, None] * 0.6180340 + experts * 0.7548777) % 1  # evenly spread in [0, 1): breaks ties evenly
    s, price = s / sigma + eps * ripple, s.mean(0) / sigma
    price = even_prices(s, price)
    seats = torch.full_like(experts, N // E)
    seats[price.topk(N % E).indices] += 1
    return auction(s, price, seats, eps, rounds)


def even_prices(s, price):
    """(N, E) scores, (E,) prices to begin with -> (E,) what each expert must cost for the demand to be even (the dual
    of the assignment problem), by a dozen Sinkhorn passes at falling temperature: the argmax of s - price leaves about
    1 % in excess."""
    for i in range(12):
        t = 0.03 ** (i / 11)  # 1 -> 0.03
        price = price + t * (((s - price) / t).softmax(1).mean(0) * s.shape[1]).clamp(min=1e-3).log()
    return price


def auction(s, price, seats, eps, rounds):
    """(N, E) scores, (E,) prices and numbers of seats, N in all -> (N,) expert numbers (Bertsekas). A token without a
    seat offers its best expert all that it gains over its second best, plus eps; a full expert keeps the highest bids
    and its price is the lowest of them. When at most N (r + 8) / 4096 tokens are left after r rounds, full experts
    close and the rest take the best of what is free; after `rounds` they take what is free in order."""
    N, E = s.shape
    tokens, experts = torch.arange(N, device=s.device), torch.arange(E + 1, device=s.device)
    price = price.masked_fill(seats == 0, torch.inf)  # fewer tokens than experts
    owner, bid = torch.full_like(tokens, E), s.new_zeros(N)  # expert E: "no seat yet"
    full, closing, places = seats == 0, False, F.pad(seats, (0, 1))
    for r in range(rounds):
        rows = (owner == E).nonzero()[:, 0]
        if len(rows) == 0:
            break
        closing = closing or len(rows) <= N * (r + 8) // 4096
        top, best = (s[rows] - (price.masked_fill(full, torch.inf) if closing else price)).topk(2, dim=1)
        owner[rows] = best[:, 0]
        bid[rows] = price[best[:, 0]] + (top[:, 0] - top[:, 1]).clamp(max=1e3) + eps
        order = (wide(owner) * 1e6 - wide(bid)).argsort().to(s.device)  # by expert, highest bid first
        at = owner[order]
        start = torch.searchsorted(at, experts)
        last = (start[:E] + seats - 1).clamp(0, N - 1)
        full = start.diff() >= seats
        price = torch.where(full & (seats > 0), torch.maximum(price, bid[order[last]]), price)
        owner[order] = torch.where(tokens - start[at] < places[at], at, E)

    free = owner == E
    left = seats - torch.zeros_like(places).scatter_add(0, owner, torch.ones_like(owner))[:E]
    return torch.where(free, torch.searchsorted(left.cumsum(0), free.cumsum(0) - 1, right=True).clamp(max=E - 1), owner)


def best_permutation(score):
    """(n, n) -> (n,) the column of each row in the permutation with the largest sum: the Hungarian method with
    potentials, exact, O(n^3), in float64 on the CPU. Called by Permuted, rarely: 0.3 ms at n = 8, about 20 ms at n =
    64."""
    n, cost = len(score), -score.detach().cpu().double().nan_to_num().numpy()
    u, v, row_of = np.zeros(n), np.zeros(n + 1), np.full(n + 1, -1)  # potentials; column n stands for "no column yet"
    for row in range(n):
        row_of[n], col = row, n
        dist, back, done = np.full(n, np.inf), np.full(n, n), np.zeros(n + 1, bool)
        while row_of[col] >= 0:  # shortest augmenting path (Dijkstra over columns) to a free column
            done[col] = True
            reduced = cost[row_of[col]] - u[row_of[col]] - v[:n]
            nearer = ~done[:n] & (reduced < dist)
            dist[nearer], back[nearer] = reduced[nearer], col
            col = int(np.where(done[:n], np.inf, dist).argmin())
            step = dist[col]
            u[row_of[done]] += step
            v[done] -= step
            dist[~done[:n]] -= step
        while col != n:  # flip the path
            row_of[col], col = row_of[back[col]], back[col]
    return torch.as_tensor(row_of[:n].argsort(), device=score.device)


def cap_probability(delta, D):
    """P(|cos| >= delta) between a fixed direction and a uniformly random one in R^D: I_{1-delta^2}((D-1)/2, 1/2), the
    regularised incomplete beta function, by its continued fraction. A float, accurate to about 1e-10 relative for D
    up to 1e5 (1e-9 where delta is within 1e-9 of 1)."""
    if delta <= 0 or delta >= 1:
        return float(delta <= 0)

    def betainc(x, a, b):  # I_x(a, b), good for x < (a + 1) / (a + b + 2)
        t = 1.0
        for j in range(1000, 0, -1):  # from the inside out
            m = j // 2
            up = -(a + m) * (a + b + m) if j % 2 else m * (b - m)
            t = 1 + up * x / ((a + j - 1) * (a + j)) / t
        log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / (a * t)

    a, x = (D - 1) / 2, (1 - delta) * (1 + delta)
    return betainc(x, a, 0.5) if x < (a + 1) / (a + 2.5) else 1 - betainc(delta * delta, 0.5, a)


def locmoe_capacity(delta, D, E):
    """LocMoE's lower bound on the capacity: tokens an expert must take, on average, to see one that belongs to it.

    A token belongs to expert e if its cosine with w_e is at least delta. For tokens of uniform direction, E <= D
    orthogonal equal-norm rows and top-1, let q = cap_probability / 2 be the chance of belonging to e and
    p = P(belongs to e | routed to e). Then q <= p <= min(1, E q), hence

        1/p >= 1/(E q) >= (2/E) exp((D - 1) delta^2 / (2 - delta^2))

    Returns the last two (floats, unrounded; below 1 they say nothing). The paper's theorem counts both caps (half our
    bound), has D for D - 1, and a step through erfc that is an approximation, not an inequality. Both explode with
    delta: it is a threshold to choose, not the largest cosine of a batch.
    """
    p, power = cap_probability(delta, D), (D - 1) * delta**2 / (2 - delta**2)
    return 2 / (E * p) if p else math.inf, 2 / E * math.exp(power) if power < 700 else math.inf


def shortest_paths(cost):
    """Floyd and Warshall. cost (E, E) array of edges a -> b, without negative cycles -> distances (E, E), and the
    first step of a shortest path, hop[a, b]."""
    E = len(cost)
    dist, hop = cost.copy(), np.tile(np.arange(E), (E, 1))
    np.fill_diagonal(dist, 0)
    for m in range(E):
        via = dist[:, m : m + 1] + dist[m]
        better = via < dist - 1e-12  # rounding must not make a cycle look negative
        dist, hop = np.where(better, via, dist), np.where(better, hop[:, m : m + 1], hop)
    return dist, hop


def near_prices(S, c):
    """S (n, E) -> (E,) prices at which argmax(S - price) is nearly the best assignment with at most c tokens per
    expert: annealed Sinkhorn steps, O(n E) each."""
    n, E = S.shape
    v, spare, t = np.zeros(E, S.dtype), E * c - n, max(1.0, float(S.max() - S.min()) / 8)
    while t > 0.03:
        for _ in range(5):
            p, empty = S - v, np.exp((v.min() - v) / t)
            p = np.exp((p - p.max(1, keepdims=True)) / t)
            load = (p / p.sum(1, keepdims=True)).sum(0) + spare * empty / empty.sum()
            v = v + t * np.log(np.maximum(load / c, 1e-9))
        t /= 3
    return v


def move_excess(S, z, c):
    """S (E c, E), z (E c,) the best assignment for its own loads -> the best with c tokens per expert, and the
    distances (E, E) in its graph of cheapest moves. Changes z."""
    E = S.shape[1]
    load = np.bincount(z, minlength=E)
    cost, who, stale = np.full((E, E), np.inf), np.zeros((E, E), np.int64), range(E)
    while True:
        for a in stale:  # cost[a, b]: the least that moving a token from a to b loses; who[a, b]: that token
            rows = np.flatnonzero(z == a)
            cost[a] = np.inf
            if len(rows):
                loss = S[rows, a, None] - S[rows]
                cost[a], who[a] = loss.min(0), rows[loss.argmin(0)]
        dist, hop = shortest_paths(cost)
        over, under = np.flatnonzero(load > c), np.flatnonzero(load < c)
        if not len(over):
            return z, dist
        i, j = np.unravel_index(dist[np.ix_(over, under)].argmin(), (len(over), len(under)))
        goal, stale = under[j], [over[i]]
        while stale[-1] != goal:
            a, b = stale[-1], hop[stale[-1], goal]
            z[who[a, b]] = b
            stale.append(b)
        load[stale[0]] -= 1
        load[goal] += 1


def best_assignment(S, c):
    """argmax over z of sum_n S[n, z_n] with at most c tokens per expert, exactly. S (n, E), n <= E c ->
    z (n,), and dist (E, E): what it costs to squeeze one more token into a full expert a when a slot at b is free.
    Called by GumbelMatching. On the CPU, in numpy: the control flow depends on data and the arrays are small.

    For any prices v, z = argmax(S - v) is the best assignment among those with the same loads. So: (1) find prices
    with nearly the right loads; (2) move the excess, one token per edge, along shortest paths from overfull to
    underfull experts in the graph of cheapest moves: each move keeps it optimal for its loads. O(E^3 + n) per unit of
    excess, typically 1% of n. Empty slots are tokens that do not care.
    """
    S = S.detach().nan_to_num(0).clamp(-1e9, 1e9).cpu().numpy()  # what is not finite: the loop says so, with the step
    (n, E), v = S.shape, near_prices(S, c)
    spare = E * c - n
    S, v = S.astype(np.float64), (v - v.min()).astype(np.float64)
    if spare >= E:
        v[v < 0.2] = 0  # a price is exactly zero where slots stay empty: let empty slots be shared
    z = (S - v).argmax(1)
    cheap = np.flatnonzero(v == 0)
    room = np.maximum(c - np.bincount(z, minlength=E)[cheap], 0)
    z = np.concatenate([z, np.append(np.repeat(cheap, room), np.full(spare, cheap[0]))[:spare]])
    S = np.concatenate([S, np.zeros((spare, E))])
    z, dist = move_excess(S, z, c)
    return torch.from_numpy(z[:n]), torch.from_numpy(dist)


def matching_log_q(logp, z, dist):
    """log q_n(j) = log P(z_n = j | everybody else's Gumbel noise), (n, E), in closed form.

    With row n's noise integrated out, z_n = argmax_j logp[n, j] + gumbel + V_j, V_j the best the others can do when n
    takes a slot at j. If n sits at z_n, taking a slot at j instead costs the others dist[j, z_n]: somebody moves out
    of j, ..., and the last one into the slot that n left. No path to z_n uses row n itself."""
    return (logp - dist.T[z]).log_softmax(1)


# ---------------------------------------------------------------------------------------------------------------------
# python router.py


def example(name, step=0):
    """Eight tokens through the gate `name` with four experts, in training, at a step of 100 -> words (8), G (8, 4). The
    same tokens for every gate; its weights are drawn at random."""
    torch.manual_seed(2)
    words = "the cat sat and the dog sat down".split()
    known = sorted(set(words))
    ids, vectors = torch.tensor([known.index(word) for word in words]), torch.randn(len(known), 8)
    vectors[known.index("dog")] = vectors[known.index("cat")] + 0.3 * torch.randn(8)  # cats and dogs are much alike
    x = vectors[ids] + 0.2 * torch.randn(8, 8)  # a word is not quite the same twice
    gate = make_gate(name, D=8, E=4, V=len(known), counts=ids.bincount(), n_domains=2, steps=100, layer=0, seed=0)
    torch.manual_seed(1)
    for p in gate.parameters():
        p.data.normal_()  # an opinion, as after some training; the same for all gates with one (E, D) weight
    gate.set_step(step)
    return words, gate(x, ids, Place(8, domain=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))).G.detach()


def show():
    """Print G of every gate for the tokens of `example`, transposed: a column is a token, a dot is "not sent"."""
    lines = ["G^T       " + "".join(f"{word:>6}" for word in example("soft")[0])]
    for name, gate in gates().items():
        for step in (0, 4, 99) if name == "dts" else (0,):
            G = example(name, step)[1]
            idea, when = " ".join((gate.__doc__ or "").split()), f" at step {step} of 100" if name == "dts" else ""
            lines.append(f"\n{name}{when}: {re.split(r'[(.]', idea)[0].rstrip(':, ')}")
            for e, column in enumerate(G.T.tolist()):
                lines.append(f"  expert {e}" + "".join(f"{g:6.2f}" if g else "     ." for g in column))
    print("\n".join(lines))


if __name__ == "__main__":
    show()
