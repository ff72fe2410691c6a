"""
Gates: every way to decide which experts a token goes to.

    y_n = sum_e G[n, e] * E_e(x_n)

A gate maps tokens to G, an (N, E) matrix of combine weights in which an exact zero means "not sent". Nothing else
tells one method from another: top-k, hashing, balanced assignment, trees, thresholded Gumbel-softmax are all ways to
fill G. The number of experts a token uses is the number of non-zeros in its row. experts.py turns G into work.

To add a gate, write one class here:

    class MyGate(Gate):
        def __init__(self, D, E, k=1, sharpness=1.0): ...     # names what it needs (see make_gate); the rest are its knobs
        def forward(self, x, ids, batch=None):                # x (N, D), ids (N,), batch: see Batch
            return Routing(G, {"balance": ...})

and run `python train.py --gate=mygate --gate_args="sharpness=2"`; the parametrised tests find it by themselves.

Decisions, each learned the hard way by somebody:
- Routing is float32 (the matrix product too) even when the model runs in bf16: the softmax of a bf16 logit is noise.
- Weights come from the full softmax. A top-1 weight renormalised to 1 would leave the router without a gradient.
- Counts (who was chosen) carry no gradient, probabilities do. Counts are taken before capacity drops anybody.
- Padding never reaches a gate, and capacity is not a gate's business: experts.py takes care of both.

Letters: N tokens, D model width, E experts, k experts per token, V vocabulary. Every tensor says its shape.
"""

import inspect
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# The interface


class Routing(NamedTuple):
    """What a gate returns. G is all that most methods need.

    G         (N, E) float, combine weights; exactly 0 where token n is not sent to expert e
    aux       {name: scalar}, raw losses of this layer; Gate.weights says which of them are added to the task loss.
              One name is special: "log_prob" (N,), the log probability of each token's sampled choice, which
              train.py multiplies by the advantage (the score-function gradient)
    priority  (N, E) or None: who keeps a slot when an expert is full, higher first (None: the gate's drop_order)
    capacity  slots per expert: an int, an (E,) tensor, an (N, E) tensor with equal rows in each routing group, or None
              (the layer's capacity factor decides)
    """

    G: Tensor
    aux: dict
    priority: Tensor | None = None
    capacity: Tensor | int | None = None


class Batch:
    """Where the N rows of a call stand in the global batch; all that a gate may know beyond x and ids.

    On one process a gate sees the whole batch and all of this is trivial. With several, each rank routes its own rows:
    statistics that a paper takes over "the batch" go through mean(), noise through rand(), and assignments that couple
    tokens (balanced assignment, expert choice, capacity) through per_group(): one group per rank, as in GShard.

    n        rows of this call; rows (n,) their global numbers (None: 0..n-1); total: rows in the global batch
    sizes    lengths of the routing groups, consecutive runs of rows; sum(sizes) == n
    domain   (n,) long, the document's domain (or language), or None
    node     (n,) long, the node a row lives on; local (nodes, E) bool, the experts that live on each node
    mesh     dist.Mesh, or None for one process
    """

    def __init__(self, n, rows=None, total=None, sizes=None, domain=None, node=None, local=None, mesh=None):
        self.n, self.rows, self.total = n, rows, total or n
        self.sizes, self.domain, self.node, self.local, self.mesh = sizes or [n], domain, node, local, mesh

    def rand(self, cols, device=None, dtype=torch.float32):
        """(n, cols) uniform in [0, 1). Drawn for the whole global batch and then sliced, so that a token's noise does
        not depend on the number of ranks (train.py seeds the generator per step, alike on every rank; with dropout the
        ranks draw different amounts and their streams part)."""
        u = torch.rand(self.total, cols, device=device, dtype=dtype)
        return u if self.rows is None else u[self.rows]

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
        """fn on each routing group's rows, results concatenated; tensors (n, ...) are split, all else is passed on."""
        if len(self.sizes) == 1:
            return fn(*args)
        parts = [t.split(self.sizes) if isinstance(t, Tensor) else [t] * len(self.sizes) for t in args]
        return torch.cat([fn(*rows) for rows in zip(*parts)])


class Gate(nn.Module):
    """Base of all gates.

    causal      "always": a row of G never depends on later tokens. "eval": only at evaluation (balanced assignment).
                "never": not even then (expert choice). train.py warns or refuses accordingly
    drop_order  who is dropped first when an expert is full: "arrival", "choice" (all first choices before any second),
                "score" or "random"; experts.drop explains
    k           experts per token on which capacity is based: C = ceil(factor * k * N / E)
    weights     {aux name: weight in the loss}; an entry of aux without a weight is only logged
    """

    causal = "always"
    drop_order = "arrival"

    def __init__(self, D, E, k=1):
        super().__init__()
        if not 1 <= k <= E:
            raise ValueError(f"k={k} experts per token is impossible with {E} experts: choose k from 1 to {E}")
        self.D, self.E, self.k = D, E, k
        self.weights = {}

    def forward(self, x, ids, batch=None):
        raise NotImplementedError

    def set_step(self, step):
        """Fill the gate's schedule buffers for this step: a pure function of the step, called before it."""

    def update(self):
        """Called once after each optimizer step, for state that no gradient reaches (a balancing bias)."""


def gates():
    """{name: class} of every gate in this file; the name is the class name in lower case."""
    classes = [c for c in globals().values() if isinstance(c, type) and issubclass(c, Gate) and c is not Gate]
    return {c.__name__.lower(): c for c in classes}


def make_gate(name, args="", **offered):
    """Build the gate called `name`. Its constructor receives those of `offered` (D, E, k, V, layer, seed, counts,
    n_domains, steps) that it names, and the knobs in `args`, a string like "gamma=0.1,entropy=0.05".
    Raises ValueError with one line for an unknown gate or knob, or a value of the wrong type."""
    import difflib

    def closest(word, words):
        hit = difflib.get_close_matches(word, words, 1)
        return f" (did you mean {hit[0]}?)" if hit else ""

    if name not in gates():
        raise ValueError(f"gate={name!r} is unknown{closest(name, gates())}; there are: {', '.join(sorted(gates()))}")
    parameters = inspect.signature(gates()[name]).parameters
    knobs = {p: v.default for p, v in parameters.items() if p not in offered}
    kwargs = {p: v for p, v in offered.items() if p in parameters}
    for pair in filter(None, args.replace(" ", "").split(",")):
        key, _, text = pair.partition("=")
        if key not in knobs:
            raise ValueError(f"gate_args: {name} has no knob {key!r}{closest(key, knobs)}; it has: {', '.join(knobs) or 'none'}")
        kind = type(knobs[key])
        try:
            kwargs[key] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise ValueError(f"gate_args: {key}={text} should be of type {kind.__name__}, like {key}={knobs[key]}") from None
    return gates()[name](**kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# What several gates share


def full_precision(x):
    """x in float32 (float64 stays): routing decisions do not survive bf16."""
    return x if x.dtype == torch.float64 else x.float()


def linear(x, weight, bias=None):
    """Router logits (N, E) = x weight^T in float32, the product too (autocast would quietly run it in bf16)."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(full_precision(x), weight, bias)


def scatter(idx, w, E):
    """(N, k) expert numbers and weights -> G (N, E)."""
    return w.new_zeros(w.shape[0], E).scatter(1, idx, w)


def balance_loss(p, chosen, batch):
    """E * sum_e f_e P_e, the load balance loss of Switch (arXiv:2101.03961, eq. 4) and GShard.

    p (N, E) probabilities, P_e their mean: it carries the gradient, which lowers the logits of crowded experts.
    chosen (N, E) bool, before any drop; f_e is expert e's share of all choices: a count, divided by k, no gradient.
    1 at perfect balance, E when everything goes to one expert with certainty. 1 is not the minimum: f and P can be
    anti-aligned. Both means run over the global batch.
    """
    f, P = batch.mean(torch.stack([chosen.to(p.dtype), p], 1))
    f = f.detach() / f.detach().sum().clamp(min=1e-9)
    return p.shape[1] * (f * P).sum()


def z_loss(logits, batch):
    """mean_n (logsumexp_e logits)^2, keeps router logits small (ST-MoE, arXiv:2202.08906, eq. 5; weight 1e-3).
    Not invariant to a shift of the logits, and it does not balance anything."""
    return batch.mean(logits.logsumexp(1).square())


def cv_squared(t):
    """Squared coefficient of variation of t (E,), population variance / mean^2: 0 when all entries are equal."""
    return t.var(unbiased=False) / t.mean().square().clamp(min=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Dense and top-k gates: content decides


class Soft(Gate):
    """Dense softmax mixture, the oldest gate (Jacobs et al. 1991): G = softmax(x W). Every token visits every expert:
    the quality bound and cost bound of what follows. With E = 1 the weight is exactly 1: a dense model.
    Uses content. Causal."""

    def __init__(self, D, E):
        super().__init__(D, E, k=E)
        self.weight = nn.Parameter(torch.randn(E, D) * D**-0.5)

    def forward(self, x, ids, batch=None):
        return Routing(linear(x, self.weight).softmax(1), {})


class TopK(Gate):
    """Top-k of the full softmax, the weights of the chosen renormalised to sum 1 for k >= 2 (Mixtral, arXiv:2401.04088;
    for k = 1 they are not: see the head of this file), with Switch's balance loss. Uses content. Causal."""

    def __init__(self, D, E, k=2, balance=0.01, z=0.0):
        super().__init__(D, E, k)
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
        self.weights = {"balance": balance, "z": z}

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        logits = linear(x, self.weight)
        p = logits.softmax(1)
        w, idx = p.topk(self.k, dim=1)
        if self.k > 1:
            w = w / w.sum(1, keepdim=True)
        G = scatter(idx, w, self.E)
        return Routing(G, {"balance": balance_loss(p, G > 0, batch), "z": z_loss(logits, batch)})


class NoisyTopK(Gate):
    """The sparsely-gated layer of Shazeer et al. 2017 (arXiv:1701.06538).

        H = x W + N(0, 1) * (softplus(x W_noise) + 1e-2)        eq. 4, noise in training only
        G = softmax over the k largest of H, 0 elsewhere        eq. 3, 5
        importance loss = CV(sum_n G)^2                         eq. 6
        load loss = CV(sum_n P(expert e would be in the top k if its own noise were drawn again))^2    eq. 8 to 10

    W and W_noise start at zero, so that the start is balanced by noise alone. The softmax runs after the selection;
    for k = 1 that weight would be a constant 1, so there we take the full softmax of H instead. The 1e-2 and the
    defaults 0.1 and 0.1 are those of the authors' code and language model. Uses content. Causal.
    """

    def __init__(self, D, E, k=2, importance=0.1, load=0.1):
        super().__init__(D, E, k)
        self.weight = nn.Parameter(torch.zeros(E, D))
        self.noise = nn.Parameter(torch.zeros(E, D))
        self.weights = {"importance": importance, "load": load}

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        clean = linear(x, self.weight)  # (N, E)
        sigma = F.softplus(linear(x, self.noise)) + 1e-2
        h = clean + batch.normal(self.E, x.device, clean.dtype) * sigma if self.training else clean
        top, idx = h.topk(min(self.k + 1, self.E), dim=1)
        w = top[:, : self.k].softmax(1) if self.k > 1 else h.softmax(1).gather(1, idx[:, :1])
        G = scatter(idx[:, : self.k], w, self.E)
        aux = {"importance": cv_squared(batch.sum(G))}
        if self.training and self.k < self.E:
            # the bar that expert e has to clear: the k-th largest of the *other* noisy logits
            chosen = scatter(idx[:, : self.k], torch.ones_like(w), self.E) > 0
            bar = torch.where(chosen, top[:, self.k : self.k + 1], top[:, self.k - 1 : self.k])
            aux["load"] = cv_squared(batch.sum(torch.special.ndtr((clean - bar) / sigma)))
        return Routing(G, aux)


class GShard(Gate):
    """Top-2 with a random second expert (GShard, arXiv:2006.16668, algorithm 1).

    p = softmax(x W); the two largest, renormalised to g1 + g2 = 1 (before capacity); in training the second expert is
    used with probability min(1, 2 g2) only: a weak second opinion is not worth its slot. At evaluation both are used.
    Balance loss from first choices: E sum_e f_e P_e, 1e-2 as in the authors' code (the paper prints it without E^2).
    When an expert is full all first choices go before any second choice. Uses content. The gate is causal; this order
    of dropping is not (training with a capacity).
    """

    drop_order = "choice"

    def __init__(self, D, E, balance=0.01):
        super().__init__(D, E, k=2)
        self.weight = nn.Parameter(torch.randn(E, D) * D**-0.5)
        self.weights = {"balance": balance}

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        p = linear(x, self.weight).softmax(1)
        g, idx = p.topk(2, dim=1)
        g = g / (g.sum(1, keepdim=True) + 1e-9)  # (N, 2)
        if self.training:
            keep = batch.rand(1, x.device)[:, 0] < 2 * g[:, 1].detach()
            g = torch.stack([g[:, 0], g[:, 1] * keep], 1)
        first = F.one_hot(idx[:, 0], self.E).bool()
        return Routing(scatter(idx, g, self.E), {"balance": balance_loss(p, first, batch)})


class Switch(Gate):
    """Top-1 (Switch Transformer, arXiv:2101.03961, section 2).

        x' = x * U(1 - jitter, 1 + jitter)      training only; the experts see x, not x'
        p = softmax(x' W),  e = argmax p,  y = p_e E_e(x)

    The weight p_e is what teaches the router. Init: truncated normal, std sqrt(0.1 / D). Balance loss eq. 4 with
    alpha = 0.01. The paper's text multiplies the input by the jitter, its pseudo-code adds it to the logits (nearly
    a no-op under softmax); the authors' code multiplies, and so do we. z: ST-MoE's z-loss, off by default.
    Uses content. Causal.
    """

    def __init__(self, D, E, balance=0.01, jitter=0.01, z=0.0):
        super().__init__(D, E, k=1)
        self.weight = nn.Parameter(torch.empty(E, D))
        std = (0.1 / D) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        self.jitter = jitter
        self.weights = {"balance": balance, "z": z}

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        if self.training and self.jitter:
            x = full_precision(x)
            x = x * (1 + self.jitter * (2 * batch.rand(self.D, x.device, x.dtype) - 1))
        logits = linear(x, self.weight)
        p = logits.softmax(1)
        w, idx = p.max(1, keepdim=True)
        G = scatter(idx, w, self.E)
        return Routing(G, {"balance": balance_loss(p, G > 0, batch), "z": z_loss(logits, batch)})


# ---------------------------------------------------------------------------------------------------------------------
# Hash gates: the token's id decides, nothing is learned


def balanced_table(counts, E):
    """(V,) token counts -> (V,) expert numbers: tokens in order of falling count, each to the lightest expert so far
    (Hash Layers, arXiv:2106.04426, section 3.1). The heaviest expert exceeds 1/E of all tokens by at most the most
    frequent token: a Zipf head cannot be split. Tokens with count 0 (held-out text may have them) take turns."""
    import heapq

    table, heap = [0] * len(counts), [(0, e) for e in range(E)]
    for i, token in enumerate(sorted(range(len(counts)), key=lambda t: -counts[t])):
        load, e = heapq.heappop(heap)
        table[token] = e if counts[token] else i % E  # what weighs nothing would all go to the lightest
        heapq.heappush(heap, (load + counts[token], e))
    return torch.tensor(table)


class Hash(Gate):
    """Hash Layers (Roller et al. 2021, arXiv:2106.04426): a fixed table from token id to expert, weight 1. Nothing is
    learned, nothing drifts, balance is a property of the table.

    kind="balanced": frequent tokens are dealt to the lightest expert (needs token counts); "random": uniform. Each layer
    has its own table. k > 1 is MultiHash: the experts form k pools and hash j picks one expert from pool j, which is
    an FFN cut into k segments, each segment chosen by its own hash (give the experts 1/k of the width).
    Uses the token id, never content. Causal.
    """

    def __init__(self, D, E, V, k=1, kind="balanced", counts=None, layer=0, seed=0):
        super().__init__(D, E, k)
        if E % k:
            raise ValueError(f"hash: k={k} pools need a number of experts divisible by k, not E={E}")
        if kind not in ("balanced", "random"):
            raise ValueError(f"hash: kind={kind!r} is unknown; there are: balanced, random")
        rng = torch.Generator().manual_seed(seed * 1000 + layer)
        table = torch.empty(k, V, dtype=torch.long)
        for j in range(k):
            if kind == "random" or counts is None:
                table[j] = torch.randint(E // k, (V,), generator=rng)
            else:  # layers and pools differ by a random relabelling of ties: shuffle before the stable sort
                order = torch.randperm(V, generator=rng)
                table[j, order] = balanced_table([float(counts[t]) for t in order.tolist()], E // k)
            table[j] += j * (E // k)
        self.register_buffer("table", table)

    def forward(self, x, ids, batch=None):
        idx = self.table[:, ids].t()  # (N, k)
        return Routing(scatter(idx, full_precision(x).new_ones(idx.shape), self.E), {})


# ---------------------------------------------------------------------------------------------------------------------
# Dense to sparse: the gate learns how many


class DTS(Gate):
    """EvoMoE's dense-to-sparse gate (Nie et al. 2021, arXiv:2112.14397): starts dense, ends sparse, and on the way each
    token has as many experts as its own scores ask for.

        y = softmax((x W + s g) / tau),  g ~ Gumbel(0, 1)      no noise at evaluation
        m = y > bar, and always the k largest;  in the hard phase only these
        G = m * y   (weights=gumbel)   or   m * softmax(x W)   (weights=softmax)

    tau, s, bar and hard are 0-dim buffers that the curriculum (evomoe.py) fills: tau falls, the noise scale s with it,
    then the bar rises from `threshold` to `tighten`; the paper has s = 1 (noise=constant) and bar = 0.001
    (tighten=0.001) throughout. evomoe.py says what was measured. In short: with s = 1 the choice stays a sample of
    softmax(x W) at any tau, so training and evaluation differ for good; above a bar of 0.5 only one can be, so nothing
    jumps at the hard switch; softmax weights shrink the layer's output there. G is not renormalised: with k = 1 that
    would leave the router without a gradient.

    A dropped expert gets no gradient, but comes back when its score does: the others' softmax share it. The balance
    loss is that of y and m, divided by the mean number of experts, and has no gradient while all experts are on.
    reads=id (not in the paper) takes the logits from a learned table by token id instead of from x W: what Hash reads,
    with what DTS learns. The README says what difference that makes. Uses content, or with reads=id the token id. Causal.
    """

    def __init__(self, D, E, k=1, threshold=0.001, tighten=0.5, weights="gumbel", noise="annealed", balance=0.01, reads="content", V=0):
        super().__init__(D, E, k)
        for name, value, known in (("weights", weights, ("gumbel", "softmax")), ("noise", noise, ("annealed", "constant")),
                                   ("reads", reads, ("content", "id"))):  # fmt: skip
            if value not in known:
                raise ValueError(f"dts: {name}={value!r} is unknown; there are: {', '.join(known)}")
        self.by_id = reads == "id"
        self.weight = nn.Parameter(torch.randn(V, E) if self.by_id else torch.randn(E, D) * D**-0.5)  # unit logits: experts differ at once
        if not 0 < threshold <= tighten <= 1:
            raise ValueError(f"dts: threshold={threshold} must be above 0 and at most tighten={tighten}, that at most 1")
        self.least, self.bars, self.gumbel, self.anneal = k, (threshold, tighten), weights == "gumbel", noise == "annealed"
        self.register_buffer("tau", torch.tensor(0.0))
        self.register_buffer("noise", torch.tensor(0.0))
        self.register_buffer("bar", torch.tensor(0.0))
        self.register_buffer("hard", torch.tensor(False))
        self.weights = {"balance": balance}
        self.set(2.0)

    def set(self, tau, noise=1.0, tight=0.0, hard=False):
        """What holds from the next call on: the temperature, the scale of annealed noise (1 to 0), how far the bar has
        risen (0 to 1, geometrically) and whether only the k largest count."""
        low, high = self.bars
        self.tau.fill_(tau)
        self.noise.fill_(noise if self.anneal else 1.0)
        self.bar.fill_(low * (high / low) ** tight)
        self.hard.fill_(hard)
        self.k = self.least if hard else self.E  # capacity is for the hard mode: a dense gate asks every expert

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        z = self.weight[ids] if self.by_id else linear(x, self.weight)  # (N, E)
        noise = self.noise * batch.gumbel(self.E, x.device, z.dtype) if self.training else 0.0
        y = ((z + noise) / self.tau).softmax(1)
        top = torch.zeros_like(y, dtype=torch.bool).scatter(1, y.topk(self.least, dim=1).indices, True)
        m = top | ((y > self.bar) & ~self.hard)
        G = (y if self.gumbel else z.softmax(1)) * m
        return Routing(G, {"balance": balance_loss(y, m, batch)})


# ---------------------------------------------------------------------------------------------------------------------
# Learned gates beyond top-k: balanced assignment, a distilled router, binary codes, trees, permutations


def balanced_assignment(scores, eps=0.05, rounds=128):
    """(N, E) scores -> (N,) expert numbers with a near-maximal sum of scores, N // E or N // E + 1 tokens per expert.

    Two steps, both in units of sigma, the standard deviation of the scores once row and column means are taken away
    (those do not change the best assignment):
    1. Prices. A dozen Sinkhorn passes at falling temperature find what each expert must cost for the demand to be
       even (the dual of the assignment problem): the argmax of score - price leaves about 1 % in excess.
       The N % E additional seats go to the dearest experts.
    2. Auction (Bertsekas) from these prices. A token without a seat offers its best expert all that it gains over its
       second best, plus eps; a full expert keeps the highest bids and its price is the lowest of them.
    When at most N (r + 8) / 4096 tokens are left after r rounds, full experts close and the rest take the best of what
    is free; after `rounds` they take what is free in order. So the sizes hold always: with ties, equal rows, scores
    that are not finite (taken as the lowest finite one). If nobody is left to the closing, the sum is within
    2 N eps sigma of the optimum for these seats: eps from the auction, eps from the ripple below. Measured in all
    cases: 0.005 N sigma as a rule, 0.06 at worst. One wait for the device per round; 5 to 10 rounds, more when tokens
    repeat. At N = 8192, E = 64 on one core 50 ms (repeated tokens 130), where a whole TopK gate takes 28."""
    N, E = scores.shape
    if E == 1 or N == 0:
        return torch.zeros(N, dtype=torch.long, device=scores.device)
    s, experts = full_precision(scores.detach()), torch.arange(E + 1, device=scores.device)
    finite = s.isfinite()
    s = torch.where(finite, s, torch.where(finite, s, torch.inf).amin()).nan_to_num(0, 0, 0)
    s = s / s.abs().amax().clamp(min=1e-30)
    s = s - s.mean(1, keepdim=True)
    sigma = (s - s.mean(0)).std(unbiased=False).clamp(min=1e-5)
    tokens = torch.arange(N, device=s.device)
    ripple = (tokens[:, None] * 0.6180340 + experts[:E] * 0.7548777) % 1  # evenly spread in [0, 1): breaks ties evenly
    s, price = s / sigma + eps * ripple, s.mean(0) / sigma
    for i in range(12):
        t = 0.03 ** (i / 11)  # 1 -> 0.03
        price = price + t * (((s - price) / t).softmax(1).mean(0) * E).clamp(min=1e-3).log()

    seats = torch.full((E + 1,), N // E, device=s.device)  # row E: "no seat yet"
    seats[price.topk(N % E).indices] += 1
    seats[E] = 0
    price = price.masked_fill(seats[:E] == 0, torch.inf)  # fewer tokens than experts
    owner, bid = torch.full_like(tokens, E), s.new_zeros(N)
    full, closing = seats[:E] == 0, False
    for r in range(rounds):
        rows = (owner == E).nonzero()[:, 0]
        if len(rows) == 0:
            break
        closing = closing or len(rows) <= N * (r + 8) // 4096
        top, best = (s[rows] - (price.masked_fill(full, torch.inf) if closing else price)).topk(2, dim=1)
        owner[rows] = best[:, 0]
        bid[rows] = price[best[:, 0]] + (top[:, 0] - top[:, 1]).clamp(max=1e3) + eps
        order = (owner * 1e6 - bid.double()).argsort()  # by expert, highest bid first
        at = owner[order]
        start = torch.searchsorted(at, experts)
        last = (start + seats - 1).clamp(0, N - 1)[:E]
        full = start.diff() >= seats[:E]
        price = torch.where(full & (seats[:E] > 0), torch.maximum(price, bid[order[last]]), price)
        owner[order] = torch.where(tokens - start[at] < seats[at], at, E)

    free = owner == E
    left = seats[:E] - torch.zeros_like(seats).scatter_add(0, owner, torch.ones_like(owner))[:E]
    return torch.where(free, torch.searchsorted(left.cumsum(0), free.cumsum(0) - 1, right=True).clamp(max=E - 1), owner)


def orthogonal(E, D):
    """(E, D) orthogonal rows of length 0.1 (columns where E > D): the centroids of BASE and StableMoE."""
    return nn.init.orthogonal_(torch.empty(E, D), gain=0.1)


class BASE(Gate):
    """BASE layers (arXiv:2103.16716): tokens are dealt out, no expert can be crowded, no auxiliary loss.

        s = x W^T,   a = argmax over assignments of sum_n s[n, a_n] with N / E tokens per expert      training
                     a_n = argmax_e s[n, e]                                                           evaluation
        y_n = sigmoid(s[n, a_n]) FFN_a(x_n)

    Uses content. Not causal in training: who gets a seat depends on later tokens (hence greedy at evaluation). Each
    routing group is dealt out by itself, as the authors do on each worker. W, orthogonal with gain 0.1, learns only
    through the sigmoid. Their code mixes sigmoid * net(x) + (1 - sigmoid) * x where net has its own residual; inside
    a pre-LN block that adds x itself the same thing is sigmoid * FFN(x). They detect training by requires_grad, we by
    the module's mode. Their auction may hang if N % E, and repeats tokens under ties: see balanced_assignment for ours.
    "greedy_load" is logged: the fullest expert's load if everybody took the argmax, as a multiple of the mean.
    """

    causal = "eval"

    def __init__(self, D, E):
        super().__init__(D, E, k=1)
        self.weight = nn.Parameter(orthogonal(E, D))

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        s = linear(x, self.weight)
        greedy = s.argmax(1)
        a = batch.per_group(balanced_assignment, s.detach()) if self.training else greedy
        load = self.E * batch.mean(F.one_hot(greedy, self.E).to(s.dtype)).max()
        return Routing(scatter(a[:, None], s.gather(1, a[:, None]).sigmoid(), self.E), {"greedy_load": load})


class StableMoE(Gate):
    """StableMoE (arXiv:2204.08396): learn a routing, distil it into the token ids, then never change it.

        s = x W^T
        stage 1   a_n = argmax_e s[n, e],              y_n = sigmoid(s[n, a_n]) FFN_a(x_n)
                  balance = mean_n (load_a / mean load - 1) sigmoid(s[n, a_n])                       weight 0.3
                  distill = mean_n -log softmax(words[id_n] What^T)[a_n]                             weight 1
        stage 2   a_n = argmax_e (words[id_n] What^T)_e, the same y (W and the experts go on learning), no losses

    Stage 1 uses content, stage 2 and every evaluation only the token id, also evaluation in stage 1 (the authors' code;
    the paper infers with the distilled router). Causal. The loads are counts; an expert without tokens gets no
    gradient from the balance loss. In masked language modelling a mask's id is its position (RoBERTa.route_ids), so from
    stage 2 on masks spread over the experts instead of sharing one.
    stage1: share of the run (`steps`) spent in stage 1; dim: width of the distilled router's embedding.
    Stage 2 is really frozen: set_step takes requires_grad and .grad from `words` and `What`, and AdamW leaves a
    parameter whose grad is None alone, decay and momentum included. (The authors leave zero gradients, with which Adam
    drifts on.) Their README distils with weight 0.3; we follow the paper. "agreement" is logged: the share of
    tokens on which both routers agree.
    """

    def __init__(self, D, E, V, steps=1, stage1=0.1, dim=50, balance=0.3, distill=1.0):
        super().__init__(D, E, k=1)
        self.weight = nn.Parameter(orthogonal(E, D))
        self.words = nn.Parameter(torch.randn(V, dim))
        self.what = nn.Parameter(orthogonal(E, dim))
        self.stage1_steps = stage1 * steps
        self.register_buffer("stage", torch.tensor(1))
        self.weights = {"balance": balance, "distill": distill}

    def set_step(self, step):
        self.stage.fill_(1 if step < self.stage1_steps else 2)
        for p in (self.words, self.what):
            p.requires_grad_(step < self.stage1_steps)
            p.grad = p.grad if p.requires_grad else None

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        s = linear(x, self.weight)
        distilled = linear(self.words[ids], self.what)
        learned, known = s.argmax(1), distilled.argmax(1)
        stage1 = self.training and bool(self.stage == 1)
        a = learned if stage1 else known
        w = s.gather(1, a[:, None]).sigmoid()  # (N, 1)
        zero, agreement = w.new_zeros(()), batch.mean((learned == known).to(s.dtype))
        aux = {"agreement": agreement, "balance": zero, "distill": zero}
        if stage1:
            load = self.E * batch.mean(F.one_hot(a, self.E).to(s.dtype))
            aux["balance"] = batch.mean((load[a] - 1) * w[:, 0])
            aux["distill"] = batch.mean(F.cross_entropy(distilled, a, reduction="none"))
        return Routing(scatter(a[:, None], w, self.E), aux)


def smooth_step(t, gamma):
    """S(t): 0 below -gamma/2, 1 above gamma/2, in between the cubic that joins them with a continuous slope
    (arXiv:2106.03760). gamma is the width of the soft band. Outside it value and gradient are exact: 0 or 1, and 0."""
    t = (t / gamma).clamp(-0.5, 0.5)
    return (t * (1.5 - 2 * t * t) + 0.5).clamp(0, 1)  # the second clamp: a fused multiply-add may round below 0


def entropy(p):
    """Entropy of the rows of p (..., n) -> (...), with the 1e-6 inside the logarithm of DSelect-k and COMET."""
    return -(p * (p + 1e-6).log()).sum(-1)


class DSelectK(Gate):
    """DSelect-k (arXiv:2106.03760): k selectors, each spells an expert number in m = ceil(log2 E) bits.

        z = x W^T + b  (k, m),   s = S(z)                                   S: smooth_step, soft while |z| < gamma / 2
        r_j(e) = product over bits t of s_jt if bit t of e is set, else 1 - s_jt      most significant bit first
        G(e) = sum_j softmax(x A^T + c)_j r_j(e)

    Starts dense and ends with at most k experts per token once all bits are saturated: use it without capacity.
    Uses content; static=True drops x, then all tokens share one row of G. Causal. Codes above E - 1 hold mass when E
    is no power of two, so rows of G sum to 1 or less; they are not renormalised.
        entropy     mean_n sum_j H(r_j), hardens the bits. Authors' code: 1e-6 times the sum over the batch; we take
                    the mean, as COMET does, with 0.01 (the same at 10k tokens)
        reciprocal  mean_n sum_j 1 / (1e-6 + sum_e r_j(e)), weight 1, pulls mass off unused codes, if any; k at best.
                    The authors' code has a sum and no 1e-6: infinite for a selector wholly on an unused code
    z starts in U(+-gamma/100), weights and bias, so that no bit is saturated; weight decay on W softens the gate.
    """

    def __init__(self, D, E, k=2, gamma=1.0, static=False, entropy=0.01, reciprocal=1.0):
        super().__init__(D, E, k)
        self.bits, self.gamma, self.static = (E - 1).bit_length(), gamma, static
        self.bias = nn.Parameter((torch.rand(k * self.bits) - 0.5) * gamma / 50)
        self.mix_bias = nn.Parameter((torch.rand(k) - 0.5) / 10)
        if not static:
            self.weight = nn.Parameter((torch.rand(k * self.bits, D) - 0.5) * gamma / 50)
            self.mix = nn.Parameter((torch.rand(k, D) - 0.5) / 10)
        self.weights = {"entropy": entropy, "reciprocal": reciprocal}

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        z = self.bias.expand(len(x), -1) if self.static else linear(x, self.weight, self.bias)
        mix = self.mix_bias.expand(len(x), -1) if self.static else linear(x, self.mix, self.mix_bias)
        s = smooth_step(z.unflatten(1, (self.k, self.bits)), self.gamma)  # (N, k, bits)
        r = s.new_ones(len(x), self.k, 1)
        for t in range(self.bits):
            r = torch.stack([r * (1 - s[..., t, None]), r * s[..., t, None]], -1).flatten(2)
        r = r[..., : self.E]
        aux = {"entropy": batch.mean(entropy(r).sum(1))}
        if self.E < 2**self.bits:
            aux["reciprocal"] = batch.mean((1 / (1e-6 + r.sum(2))).sum(1))
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
    """COMET (arXiv:2306.02824): k trees whose leaves are the experts; works for any E, no code is wasted.

        h = S(x W^T + b)                   (k, E - 1) probability of going left at every node; S: smooth_step
        p = tree_leaves(h)                 (k, E) each tree sums to 1
        q = p exp(alpha) / sum over all k E pairs,   alpha = x V^T + c  (k, E)      one joint softmax, not one per tree
        G(e) = sum_j q_j(e)                rows sum to 1

    Starts dense; once a token's paths are saturated G has at most k non-zeros (trees may agree) and they are exact
    zeros, which the dispatch skips: use it without capacity. Nothing enforces k before that: gamma and the entropy
    weight do. Uses content. Causal. A token whose whole path is saturated sends no gradient to W, and with k = 1 none
    to V: its choice is final.
        entropy   mean_n sum_j H(p_j), on p and not on q, weight 0.1 (the authors search 1e-4 to 100; the weight is
                  constant in their code). k log E when undecided, 0 when decided
    The authors' code adds 1e-8 to p inside a logarithm; we multiply by p, which needs no logarithm and keeps zeros
    exact. It is otherwise the per-example gate of their code (its last release does not run: its leaf scores read a
    missing attribute). W, b start in U(+-gamma/100), V, c in U(+-0.05); weight decay on W softens the gate.
    (2E - 1) k logits per token instead of E: at E = 64, k = 2 the gate costs 4.7 times a TopK gate.
    """

    def __init__(self, D, E, k=2, gamma=1.0, entropy=0.1):
        super().__init__(D, E, k)
        self.gamma = gamma
        self.split = nn.Parameter((torch.rand(k * (E - 1), D) - 0.5) * gamma / 50)
        self.split_bias = nn.Parameter((torch.rand(k * (E - 1)) - 0.5) * gamma / 50)
        self.leaf = nn.Parameter((torch.rand(k * E, D) - 0.5) / 10)
        self.leaf_bias = nn.Parameter((torch.rand(k * E) - 0.5) / 10)
        self.weights = {"entropy": entropy}

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        h = smooth_step(linear(x, self.split, self.split_bias).unflatten(1, (self.k, self.E - 1)), self.gamma)
        p = tree_leaves(h)  # (N, k, E)
        alpha = linear(x, self.leaf, self.leaf_bias).unflatten(1, (self.k, self.E))
        alpha = alpha.masked_fill(p == 0, -torch.inf)
        q = p * (alpha - alpha.amax((1, 2), keepdim=True)).exp()
        return Routing(q.sum(1) / q.sum((1, 2))[:, None], {"entropy": batch.mean(entropy(p).sum(1))})


def best_permutation(score):
    """(n, n) -> (n,) the column of each row in the permutation with the largest sum: the Hungarian method with
    potentials, exact, O(n^3), in float64 on the CPU. Meant for rare calls: 0.3 ms at n = 8, about 20 ms at n = 64."""
    import numpy as np

    n, cost = len(score), -score.detach().double().nan_to_num().cpu().numpy()
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


class Permuted(nn.Module):
    """Permutation-based local search (COMET, arXiv:2306.02824): learn which expert each output of a gate feeds.

        G' = G P,   P[i, e] = 1: output i feeds expert e
        search, it < T     P = Sinkhorn(L / tau), L (E, E) learned with everything else; evaluation uses a hard P
        from it = T on     P a permutation, frozen; no cost but a reordering of columns

    Wraps any gate and stands in its place: same k, causal, drop_order, weights, aux, calls. It uses what that gate
    uses. it = step + 1; T is the share `search` of the run (`steps`); the authors search 1 to 10 of 100 epochs. During
    the search every expert sees every token: use no capacity. Evaluation before the first step uses the identity.
    After T, L leaves training as in StableMoE. Extra loss "permutation" = H(P) + H(P / row sums), weight 1e-4. One P
    for all trees, as in all the authors' configurations, and like them no Gumbel noise. Rows of G keep their sums.

    schedule="official": log10 tau -3 -> -7, 20 -> 150 iterations, columns last, hard P = best assignment of the soft P;
    "corrected" (default): log10 tau -1.3 -> -3, 20 -> 150, rows last, hard P = best assignment of L itself. Measured:
                                                                             official            corrected
        error of the free sums of soft P, median of 200 fresh L, E = 4       .04 -> .005         1e-7 -> .004
        (start -> end of the search)                          E = 8, 16      .12 -> 1            1e-7 -> .008
        hard P is the best assignment of L at the end, E = 4, 8, 16          67, 21, 1 %         100 % (by definition)
        fixed gate, fixed experts in an unknown order: matched, E = 4, 8     35, 21 %            100, 100 %
        COMET and linear experts both learning: error (.044 without P)       .045 +- .005        .047 +- .006
    So the corrected search finds an order that matters, the official one hardly beats chance (25, 13 %); where experts
    are still free to adapt to the gate, as from scratch, neither beats no search at all.
    The last iterations take 80 ms per layer and step on one CPU core (E = 64), the first 5 to 15.
    """

    def __init__(self, gate, steps=1, search=0.05, schedule="corrected", zeta=1e-4):
        super().__init__()
        if schedule not in ("corrected", "official"):
            raise ValueError(f"permuted: schedule={schedule!r} is unknown; there are: corrected, official")
        self.gate, self.D, self.E = gate, gate.D, gate.E
        self.causal, self.drop_order = gate.causal, gate.drop_order
        self.window, self.official, self.zeta = max(1, round(search * steps)), schedule == "official", zeta
        self.logits = nn.Parameter((torch.rand(self.E, self.E) - 0.5) / 10)
        self.register_buffer("source", torch.arange(self.E))  # the hard P: expert e is fed by output source[e]
        self.register_buffer("it", torch.tensor(0))
        self.register_buffer("tau", torch.tensor(1.0))
        self.register_buffer("iterations", torch.tensor(20))
        self.register_buffer("frozen", torch.tensor(False))
        self.register_buffer("seen", torch.full((self.E, self.E), torch.nan), persistent=False)  # L behind `source`

    @property
    def k(self):
        return self.gate.k

    @property
    def weights(self):
        return {**self.gate.weights, "permutation": self.zeta}

    def set_step(self, step):
        self.gate.set_step(step)
        search, f = step + 1 < self.window, min((step + 1) / self.window, 1)
        if not search and not self.frozen:
            self.harden()  # before tau moves: the authors harden the last soft P that was used
        self.frozen.fill_(not search)
        self.it.fill_(step + 1)
        self.tau.fill_(10 ** (-3 - 4 * f if self.official else -1.3 - 1.7 * f))
        self.iterations.fill_(20 + int(130 * f))
        self.logits.requires_grad_(search)
        self.logits.grad = self.logits.grad if search else None

    def update(self):
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
        if self.it > 1 and not torch.equal(self.seen, self.logits):
            self.source.copy_(best_permutation(self.soft() if self.official else self.logits).argsort())
            self.seen.copy_(self.logits)

    def forward(self, x, ids, batch=None):
        G, aux, priority, capacity = self.gate(x, ids, batch)
        if self.training and not self.frozen:
            P = self.soft()
            loss = entropy(P).sum() + entropy(P / P.sum(1, keepdim=True)).sum()  # of no token: each rank adds its share
            aux = {**aux, "permutation": (batch or Batch(len(x))).mean(loss.expand(len(x)))}
            move = lambda t: linear(t, P.t())  # t P
            mixed = move(G)
            moved = mixed * (G.sum(1, keepdim=True) / mixed.sum(1, keepdim=True).clamp(min=1e-9))
            capacity = None  # every expert sees every token: the gate's own capacity would cut most of them off
        else:
            if not self.frozen:
                self.harden()
            aux = {**aux, "permutation": G.new_zeros(())}
            move = lambda t: t[..., self.source]
            moved = move(G)
            capacity = move(capacity) if isinstance(capacity, Tensor) else capacity
        return Routing(moved, aux, None if priority is None else move(priority), capacity)


# ---------------------------------------------------------------------------------------------------------------------
# Gates that care where an expert lives, or how much it can take


def block_means(x, E):
    """Grouped average pooling (LocMoE, section 3.2): (N, D) -> (N, E), the mean of each of E consecutive blocks of
    D/E features. A linear router with fixed orthogonal rows w_e, |w_e|^2 = E/D, for one addition a feature."""
    return full_precision(x).unflatten(1, (E, x.shape[1] // E)).mean(2)


def locality_loss(p, batch, eps):
    """mean_v KL(Pbar_v || D_v): tokens that live on node v should choose experts that live on node v (LocMoE, eq. 9).

    p (N, E); Pbar_v is the mean of p over all tokens of node v in the global batch. D_v puts 1 - eps evenly on the
    experts of node v and eps evenly on all others: without eps the loss would be infinite. The paper writes
    KL(current || local) and leaves eps, hard or soft counts, and per node or global open: the mean probability carries
    a gradient, and only a mean per node knows who is local. 0 without node information or with a single node.
    A router that cannot see the node can only become local if the nodes see different data.
    """
    if batch.node is None or batch.local is None or len(batch.local) < 2:
        return p.new_zeros(())
    rows = torch.cat([p, p.new_ones(len(p), 1)], 1)
    s = p.new_zeros(len(batch.local), p.shape[1] + 1).index_add(0, batch.node, rows)
    s = batch.sum(s[None])  # (nodes, E + 1)
    P = (s[:, :-1] / s[:, -1:].detach().clamp(min=1)).clamp(min=1e-30)  # a node without tokens: no log(0)
    local = batch.local.to(p.device)
    here, there = local.sum(1, keepdim=True), (~local).sum(1, keepdim=True)
    target = torch.where(local, torch.where(there > 0, 1 - eps, 1.0) / here, eps / there)
    kl = (P * (P / target).log()).sum(1)
    counted = (s[:, -1] > 0) & (here[:, 0] > 0)  # a node without tokens or without experts has no say
    return torch.where(counted, kl, 0.0).sum() / counted.sum().clamp(min=1)


def cap_probability(delta, D):
    """P(|cos| >= delta) between a fixed direction and a uniformly random one in R^D: I_{1-delta^2}((D-1)/2, 1/2), the
    regularised incomplete beta function, by its continued fraction. A float, accurate to about 1e-12 relative."""
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

    a, x = (D - 1) / 2, 1 - delta * delta
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


class LocMoE(Gate):
    """LocMoE (arXiv:2401.13920): a router without parameters, and a loss that keeps tokens on their node.

        logit_e = mean of the e-th block of D/E features + noise      grouped average pooling; D % E == 0
        G = softmax(logits) at the argmax, 0 elsewhere                top-1, section 3.1
        losses: balance E sum f P (0.01), locality mean_v KL(Pbar_v || D_v) (0.01), both over the global batch: a
        balance loss per rank would fight locality

    Uses content only; causal. All gradient goes into x: the layers below and the norm's gain and bias are the router.
    The mean of D/E features of unit variance has a tiny variance and the softmax of the paper is almost flat, which
    scales every expert down by about E: unit_variance multiplies the logits by sqrt(D/E); false is the paper. The
    paper also wraps logits in a ReLU (relu; where all blocks are negative the argmax is a tie) and adds a noise of
    unnamed distribution (noise: std of a normal, training only). It never gives the weight mu or the smoothing eps of
    the locality loss. No official code is known to us; MindSpore's MoE renormalises the top-1 weight to 1, we do not.
    delta > 0 sets the capacity in training to slots * locmoe_capacity(delta), instead of the layer's factor.
    """

    def __init__(self, D, E, balance=0.01, locality=0.01, eps=0.1, unit_variance=True, relu=False, noise=0.0,
                 delta=0.0, slots=1.0):
        super().__init__(D, E, k=1)
        if D % E:
            raise ValueError(f"locmoe: E={E} must divide the width D={D}: each expert reads a block of features")
        self.scale = (D / E) ** 0.5 if unit_variance else 1.0
        self.relu, self.noise, self.eps = relu, noise, eps
        self.capacity = None
        if delta:
            self.capacity = max(1, math.ceil(min(slots * locmoe_capacity(delta, D, E)[0], 2**31)))
        self.weights = {"balance": balance, "locality": locality}

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        logits = block_means(x, self.E)
        if self.training and self.noise:
            logits = logits + self.noise * batch.normal(self.E, x.device, logits.dtype)
        p = (self.scale * (logits.relu() if self.relu else logits)).softmax(1)
        w, idx = p.max(1, keepdim=True)
        G = scatter(idx, w, self.E)
        aux = {"balance": balance_loss(p, G > 0, batch), "locality": locality_loss(p, batch, self.eps)}
        return Routing(G, aux, capacity=self.capacity if self.training else None)


def queue(expert, key, E):
    """The queue in front of each expert, highest key first. expert (M,) numbers, key (M,) ->
    order (M,), rows expert by expert; place (M,) of those rows in their expert's queue, from 0; load (E,) lengths."""
    order = key.argsort(descending=True)
    order = order[expert[order].argsort(stable=True)]
    load = expert.new_zeros(E).scatter_add(0, expert, torch.ones_like(expert))
    place = torch.arange(len(expert), device=expert.device) - (load.cumsum(0) - load)[expert[order]]
    return order, place, load


class LocMoEPlus(Gate):
    """LocMoE+, later called Expert-Token Resonance (arXiv:2406.00023): both sides choose, and experts need ever less.

        affinity[n, e] = cos(x_n, w_e)                      w_e: the pooling rows of LocMoE; no parameters
        1. each token chooses its k best experts            G = softmax(sqrt(D) * affinity) over the chosen
        2. each expert keeps the C_e best of its choosers   the layer drops: priority = affinity, capacity = C
        C_e: the fewest best choosers whose affinities add up to C0 * a;   C0 = capacity_factor * k N / E full slots,
             a the lowest mean affinity of a batch so far; clipped to [floor * C0, C0]

    A threshold on the sum of affinities sets C, as the paper says; which one it does not. Ours is what full experts
    had together when the features were least aligned. From then on, as features turn towards the w_e, each token
    brings more, the sum is reached sooner and C falls. (a starts at the value for random directions. A share of the
    current sum would not do: it stays put when all affinities grow alike.) The paper supports a falling C by the ever
    fewer irrelevant tokens that outscore a relevant one (theorem 5), while its closed form *rises* with the cosine.
    Each routing group estimates its own C_e; "slots" in aux is the mean, to be watched next to the share of dropped
    pairs, which is what the speed is bought with.
    Also open in the paper and chosen here: weights (for k = 1 the full softmax), the temperature sqrt(D), k, the floor,
    and evaluation: there tokens choose and nobody is dropped. Equation 6 keeps the "bottom C", which is right for
    angles; we keep the largest cosines. Losses as in LocMoE, 0.01 each. Uses content. In training stage 2 sees later
    tokens; at evaluation causal.

    Measured (python train.py --gate=locmoeplus, one seed; 256 choosers an expert, C0 = 282): the first 25 steps lead the
    affinities down, in the upper layer from 0.13 (random) to 0.035, in the lower to 0.075, and set the bar; from there
    they recover to 0.08 to 0.09. "slots", mean of both layers, is 261 at the start, 149 at step 100, 194 at 200, 165 at
    400, 152 at 590 (upper layer: 257, 113, 152, 135, 90); an expert keeps 203 tokens at the start, then 99, 133, 129,
    136. Held-out loss 4.432, and 4.433 with C0 throughout (floor=1, which keeps 248 at the end): 55 % of the rows, the
    same loss. Tried and removed: theorem 5 with the choosers as the relevant ones, C_e = 2 n q: 0.5 to 0.7 C0, no fall.
    """

    causal = "eval"
    drop_order = "score"

    def __init__(self, D, E, k=1, balance=0.01, locality=0.01, eps=0.1, capacity_factor=1.1, floor=0.25):
        super().__init__(D, E, k)
        if D % E:
            raise ValueError(f"locmoeplus: E={E} must divide the width D={D}: each expert reads a block of features")
        if capacity_factor <= 0 or not 0 <= floor <= 1:
            raise ValueError(f"locmoeplus: capacity_factor={capacity_factor} must be positive, and floor={floor} from 0 to 1")
        self.eps, self.capacity_factor, self.floor = eps, capacity_factor, floor
        z = torch.randn(4096, E, generator=torch.Generator().manual_seed(0))
        self.register_buffer("least", z.topk(k, dim=1).values.relu().mean() * D**-0.5)
        self.weights = {"balance": balance, "locality": locality}

    def slots(self, affinity, idx):
        """Slots per expert for one routing group: affinity, idx (n, k) of the chosen -> (n, E) long, equal rows."""
        most = math.ceil(self.capacity_factor * idx.numel() / self.E)
        expert, a = idx.flatten(), affinity.flatten().double()
        order, _, _ = queue(expert, a, self.E)
        total = a.new_zeros(self.E).scatter_add(0, expert, a)
        before = (a[order].cumsum(0) - a[order]) - (total.cumsum(0) - total)[expert[order]]  # ahead of me in my queue
        goal = most * self.least.double()
        need = a.new_zeros(self.E).scatter_add(0, expert[order], (before < goal).double())
        need = torch.where(total < goal, most, need).clamp(math.ceil(self.floor * most), most)
        return need.long().expand(len(idx), self.E)

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        cos = block_means(F.normalize(full_precision(x), dim=1), self.E) * (self.D / self.E) ** 0.5  # (N, E)
        p = (cos * self.D**0.5).softmax(1)
        top, idx = cos.topk(self.k, dim=1)
        w = p.gather(1, idx)
        if self.k > 1:
            w = w / w.sum(1, keepdim=True)
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, idx, True)
        aux = {"balance": balance_loss(p, chosen, batch), "locality": locality_loss(p, batch, self.eps)}
        if not self.training:
            return Routing(scatter(idx, w, self.E), aux)
        top = top.detach().clamp(min=0)
        mean = batch.mean(top.mean(1))
        self.least.copy_(torch.where(mean > 0, torch.minimum(self.least, mean), self.least))  # an empty batch says nothing
        C = batch.per_group(self.slots, top, idx)  # (N, E)
        aux["slots"] = batch.mean(C.float().mean(1))
        return Routing(scatter(idx, w, self.E), aux, priority=cos.detach(), capacity=C)


class RandomRouted(Gate):
    """Random routed experts of PanGu-Sigma (arXiv:2303.10845): domain -> group of experts -> one of them by token id.

        e = table[group of the domain, id],  table[g, :] uniform over the experts of group g;  weight 1

    Each layer draws its own table, once, from the seed: the same on all ranks and in every checkpoint. Nothing is
    learned, no losses, causal. Uses domain and token id, never content: the traffic is known before the model runs,
    and the experts of one domain can be cut out as a smaller model. Groups are consecutive experts and differ in size
    by at most one; with more domains than experts, domain d shares expert d % E. Uniform over ids is not uniform over
    tokens (Zipf): Hash balances by counts, this does not. In a masked language model the corrupted ids decide, and a
    mask's id is its position (RoBERTa.route_ids): masks, 12% of the tokens, spread over their domain's experts. A prompt
    (--sample) counts as the first domain.
    We follow the description in LocMoE (section 3.1); weight 1 is our reading.
    """

    def __init__(self, D, E, V, n_domains=1, layer=0, seed=0):
        super().__init__(D, E, k=1)
        rng = torch.Generator().manual_seed(seed * 1000 + layer)
        groups = min(n_domains, E)
        start = torch.arange(groups + 1) * E // groups  # group g: experts start[g] to start[g + 1] - 1
        u = torch.rand(groups, V, generator=rng, dtype=torch.float64)
        self.register_buffer("table", (start[:-1, None] + u * start.diff()[:, None]).long())

    def forward(self, x, ids, batch=None):
        domain = torch.zeros_like(ids) if batch is None or batch.domain is None else batch.domain
        idx = self.table[domain % len(self.table), ids][:, None]  # (N, 1)
        return Routing(scatter(idx, full_precision(x).new_ones(idx.shape), self.E), {})


# ---------------------------------------------------------------------------------------------------------------------
# Sampled experts with a capacity: unbiased estimators (Kool, Maddison and Mnih 2021, arXiv:2109.11817)
#
# Datapoints i = 1..n, each with loss l_i(z) under expert z. To minimise (1/n) sum_i E_{z ~ p_i} l_i(z), sample experts
# within their capacities and use, with w_i from one of the two gates below,
#
#     gradient = (1/n) sum_i w_i (grad log p_i(z_i) (l_i(z_i) - b_i) + grad l_i(z_i))
#
# It is unbiased for every baseline b_i that does not depend on z_i: tests/test_gates_neighbours.py enumerates. As a
# loss: (1/n) sum_i [ sum_e G[i, e] l_i(e) + log_prob[i] * (l_i(z_i) - b_i).detach() ], log_prob = w_i log p_i(z_i).
#
# Inside a deep network both gates are a heuristic: w scales an expert's output instead of a loss, so activations stay
# unbiased, but what follows is not linear, and attention mixes tokens: the "loss of a datapoint" becomes the loss of
# its sequence. One number for all choices of a sequence is mostly noise, and log_prob carries it into x and all layers
# below: at weight 1 it drowns the task (2-layer GPT, 250 steps, one seed: validation loss 5.61 with --score_weight=1,
# 4.87 with 0.1, 4.82 with 0.01 and with 0, that is with random routing; Switch 4.76). Use 0.01.


def skip_weights(z, u, E, c):
    """z (n,) sampled experts, u (n,) uniform noise, c slots per expert -> (n,) weights: a uniformly random min(n_j, c)
    of the n_j tokens at expert j survive, with weight n_j / min(n_j, c); the others are skipped, 0. The sum is n."""
    order, place, load = queue(z, u, E)
    w = load.to(u.dtype) / load.clamp(min=1, max=c)  # (E,)
    return torch.zeros_like(u).index_put((order,), w[z[order]] * (place < c))


class Skip(Gate):
    """Independent samples, overflow skipped, survivors reweighted (Kool et al., arXiv:2109.11817).

        z_n ~ p_n = softmax(x W);  a full expert keeps a uniformly random c of its n_j tokens, c = ceil(factor N / E)
        G[n, z_n] = n_j / min(n_j, c) for survivors, 0 for skipped tokens

    E[G] over the survivors is the one-hot sample: the expectation does not feel the capacity. The gate drops, per
    routing group, and leaves nothing for the layer to drop. G carries no gradient to W (a hard mixture has weight 1);
    aux["log_prob"] = G * log p(z) does, times the advantage: the weight belongs to the score term too. Exact for
    independent datapoints, a heuristic in deep nets, see above. Evaluation: the argmax with weight 1, no capacity.
    Uses content. In training the survivors depend on later tokens; at evaluation causal. No other losses. The paper's
    body was not available to us; this is derived from its abstract and figure, and proved by enumeration.
    """

    causal = "eval"
    drop_order = "random"

    def __init__(self, D, E, capacity_factor=1.0):
        super().__init__(D, E, k=1)
        if capacity_factor <= 0:
            raise ValueError(f"skip: capacity_factor={capacity_factor} leaves no slots: use a positive one, 1 for equal loads")
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
        self.capacity_factor = capacity_factor

    def slots(self, n):
        return math.ceil(self.capacity_factor * n / self.E)

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        logp = linear(x, self.weight).log_softmax(1)
        if not self.training:
            return Routing(F.one_hot(logp.argmax(1), self.E).to(logp.dtype), {})
        z = (logp.detach() + batch.gumbel(self.E, x.device, logp.dtype)).argmax(1)  # (N,)
        u = batch.rand(1, x.device, logp.dtype)[:, 0]
        w = batch.per_group(lambda z, u: skip_weights(z, u, self.E, self.slots(len(z))), z, u)
        G = scatter(z[:, None], w[:, None], self.E)
        return Routing(G, {"log_prob": (G * logp).sum(1)}, capacity=self.slots(max(batch.sizes)))


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


def best_assignment(S, c):
    """argmax over z of sum_n S[n, z_n] with at most c tokens per expert, exactly. S (n, E), n <= E c ->
    z (n,), and dist (E, E): what it costs to squeeze one more token into a full expert a when a slot at b is free.
    On the CPU, in numpy: the control flow depends on data and the arrays are small.

    For any prices v, z = argmax(S - v) is the best assignment among those with the same loads. So: (1) find prices
    with nearly the right loads by annealed Sinkhorn steps, O(n E) each; (2) move the excess, one token per edge, along
    shortest paths from overfull to underfull experts in the graph of cheapest moves: each move keeps it optimal for
    its loads. O(E^3 + n) per unit of excess, typically 1% of n. Empty slots are tokens that do not care.
    """
    S = S.detach().nan_to_num(0, math.inf, -math.inf).cpu().numpy()  # NaN: the loop says so, with the step
    n, E = S.shape
    v, spare, t = np.zeros(E, S.dtype), E * c - n, max(1.0, float(S.max() - S.min()) / 8)
    while t > 0.03:
        for _ in range(5):
            p, empty = S - v, np.exp((v.min() - v) / t)
            p = np.exp((p - p.max(1, keepdims=True)) / t)
            load = (p / p.sum(1, keepdims=True)).sum(0) + spare * empty / empty.sum()
            v = v + t * np.log(np.maximum(load / c, 1e-9))
        t /= 3
    S, v = S.astype(np.float64), (v - v.min()).astype(np.float64)
    if spare >= E:
        v[v < 0.2] = 0  # a price is exactly zero where slots stay empty: let empty slots be shared
    z = (S - v).argmax(1)
    cheap = np.flatnonzero(v == 0)
    room = np.maximum(c - np.bincount(z, minlength=E)[cheap], 0)
    z = np.concatenate([z, np.append(np.repeat(cheap, room), np.full(spare, cheap[0]))[:spare]])
    S = np.concatenate([S, np.zeros((spare, E))])

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
            return torch.from_numpy(z[:n]), torch.from_numpy(dist)
        i, j = np.unravel_index(dist[np.ix_(over, under)].argmin(), (len(over), len(under)))
        goal, stale = under[j], [over[i]]
        while stale[-1] != goal:
            a, b = stale[-1], hop[stale[-1], goal]
            z[who[a, b]] = b
            stale.append(b)
        load[stale[0]] -= 1
        load[goal] += 1


def matching_log_q(logp, z, dist):
    """log q_n(j) = log P(z_n = j | everybody else's Gumbel noise), (n, E), in closed form.

    With row n's noise integrated out, z_n = argmax_j logp[n, j] + gumbel + V_j, V_j the best the others can do when n
    takes a slot at j. If n sits at z_n, taking a slot at j instead costs the others dist[j, z_n]: somebody moves out
    of j, ..., and the last one into the slot that n left. No path to z_n uses row n itself."""
    return (logp - dist.T[z].to(logp)).log_softmax(1)


class GumbelMatching(Gate):
    """Balanced samples with importance weights (Kool et al., arXiv:2109.11817).

        z = argmax over assignments with at most c = ceil(factor N / E) tokens per expert of sum_n log p_n(z_n) + noise
        G[n, z_n] = p_n(z_n) / q_n(z_n | noise of the others),  p = softmax(x W), noise ~ Gumbel

    Exact optimum (best_assignment), q in closed form (matching_log_q), O(N E^2 + E^3) beyond the matching. E[G] is p:
    with E[.] over a row's own noise given the others'. Every expert gets the same number of tokens, but when p is
    skewed most of their weights are near 0 and a few are huge; Skip has less variance. clip > 0 bounds the weights
    (biased). aux["log_prob"], exactness, evaluation and sources: as Skip. Sinkhorn before the matching changes nothing
    when the balance is exact. Inherently dearer than top-k, as the matching runs on the CPU: 4 times at N = 2048, E = 8,
    15 to 30 times at N = 8192, E = 64.
    Uses content. In training all tokens are coupled; at evaluation causal. No other losses.
    """

    causal = "eval"

    def __init__(self, D, E, capacity_factor=1.0, clip=0.0):
        super().__init__(D, E, k=1)
        if capacity_factor < 1:
            raise ValueError(f"gumbelmatching: capacity_factor={capacity_factor} leaves tokens without a slot: use >= 1")
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
        self.capacity_factor, self.clip = capacity_factor, clip

    def slots(self, n):
        return math.ceil(self.capacity_factor * n / self.E)

    def sample(self, logp, noise):
        """One group: logp, noise (n, E) -> G (n, E)."""
        if not len(logp):
            return logp
        z, dist = best_assignment(logp + noise, self.slots(len(logp)))
        z, dist = z.to(logp.device), dist.to(logp.device)
        w = (logp - matching_log_q(logp, z, dist)).gather(1, z[:, None]).exp()
        return scatter(z[:, None], w.clamp(max=self.clip) if self.clip else w, self.E)

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        logp = linear(x, self.weight).log_softmax(1)
        if not self.training:
            return Routing(F.one_hot(logp.argmax(1), self.E).to(logp.dtype), {})
        noise = batch.gumbel(self.E, x.device, logp.dtype)
        G = batch.per_group(self.sample, logp.detach(), noise)
        return Routing(G, {"log_prob": (G * logp).sum(1)}, capacity=self.slots(max(batch.sizes)))


# ---------------------------------------------------------------------------------------------------------------------
# Balance without a loss


class ExpertChoice(Gate):
    """Experts choose tokens (Zhou et al. 2022, arXiv:2202.09368).

        S = softmax(x W) over experts;  each expert takes the C = k N / E tokens with the largest S;  G = S at those

    Perfectly balanced by construction, no losses, weights not renormalised (section 3.2). k is the paper's capacity
    factor c, the average number of experts per token: a token gets anything from 0 to E. Uses content. Never causal:
    whether a token is taken depends on all others of its routing group, also at evaluation. Use it in encoders and
    masked language models; a decoder trained with it looks into the future. The paper's variant with a cap on the
    experts per token is not built.
    """

    causal = "never"

    def __init__(self, D, E, k=2):
        super().__init__(D, E, k)
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)

    def slots(self, n):
        return math.ceil(self.k * n / self.E)

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        p = linear(x, self.weight).softmax(1)
        taken = batch.per_group(
            lambda p: torch.zeros_like(p).scatter(0, p.topk(self.slots(len(p)), dim=0).indices, 1), p.detach())
        return Routing(p * taken, {}, capacity=self.slots(max(batch.sizes)))


class DeepSeekV3(Gate):
    """Sigmoid scores and a bias that balances without a loss (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

        s = sigmoid(x W);  chosen = the k largest of s + b;  G = route_scale * s / sum of the chosen s
        after each step b_e += gamma * sign(mean load - load_e), loads of the global batch since the last step

    b takes part in the choice only: no gradient reaches it and it never enters a weight. groups > 1 limits where a
    token may go: experts form `groups` equal groups (nodes), a group's score is the sum of its two largest s + b, and
    only the best `keep` groups compete. gamma is 0 after the share `anneal` of the run (14.3T of 14.8T tokens).
    For k = 1 the weight is s itself: the authors' code would normalise it to 1 and leave W without a gradient.
    balance: their complementary loss E sum_e f_e P_e with P from s / sum s, alpha = 1e-4; they take it per sequence,
    a gate does not see sequences and takes the global batch. Paper: k = 8 of 256, 4 of 8 groups, route_scale 2.5, and
    one shared expert that every token visits: that would be a dense FFN next to the gate, not part of it. Defaults
    of groups and route_scale are those of their code. Uses content; causal.
    """

    def __init__(self, D, E, k=2, gamma=0.001, anneal=0.966, balance=1e-4, route_scale=1.0, groups=1, keep=1,
                 steps=0):
        super().__init__(D, E, k)
        if E % groups or not 1 <= keep <= groups or keep * E // groups < k:
            raise ValueError(f"deepseekv3: groups={groups} must divide E={E}, and keep={keep} of them must hold k={k}")
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
        self.start_gamma, self.last_step = gamma, anneal * steps if steps else math.inf
        self.route_scale, self.groups, self.keep = route_scale, groups, keep
        self.register_buffer("bias", torch.zeros(E))
        self.register_buffer("load", torch.zeros(E), persistent=False)  # choices since the last update
        self.register_buffer("gamma", torch.tensor(gamma))
        self.weights = {"balance": balance}

    def set_step(self, step):
        self.gamma.fill_(self.start_gamma if step < self.last_step else 0.0)

    def forward(self, x, ids, batch=None):
        batch = batch or Batch(len(x))
        s = linear(x, self.weight).sigmoid()
        key = s.detach() + self.bias  # (N, E)
        if self.keep < self.groups:
            parts = key.unflatten(1, (self.groups, self.E // self.groups))  # (N, groups, E / groups)
            score = parts.topk(min(2, parts.shape[2]), dim=2).values.sum(2)
            best = score.topk(self.keep, dim=1).indices
            closed = torch.ones_like(score, dtype=torch.bool).scatter(1, best, False)
            key = parts.masked_fill(closed[:, :, None], -math.inf).flatten(1)
        idx = key.topk(self.k, dim=1).indices
        w = s.gather(1, idx)
        if self.k > 1:
            w = w / w.sum(1, keepdim=True).clamp(min=1e-20)
        chosen = torch.zeros_like(s, dtype=torch.bool).scatter(1, idx, True)
        if self.training:
            with torch.no_grad():
                self.load += batch.sum(chosen.to(self.load.dtype))
        aux = {"balance": balance_loss(s / s.sum(1, keepdim=True).clamp(min=1e-20), chosen, batch)}
        return Routing(scatter(idx, self.route_scale * w, self.E), aux)

    @torch.no_grad()
    def update(self):
        self.bias += self.gamma * (self.load.mean() - self.load).sign()
        self.load.zero_()
