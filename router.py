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
from typing import NamedTuple

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
    capacity  slots per expert, an int or an (E,) tensor, or None (the layer's capacity factor decides)
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
        not depend on the number of ranks (train.py seeds the generator per step, alike on every rank)."""
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

    def per_group(self, fn, *tensors):
        """fn on each routing group's rows, results concatenated; every tensor (n, ...)."""
        if len(self.sizes) == 1:
            return fn(*tensors)
        return torch.cat([fn(*rows) for rows in zip(*(t.split(self.sizes) for t in tensors))])


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
    the quality bound and cost bound of what follows. With E = 1 the weight is exactly 1: a dense model."""

    def __init__(self, D, E):
        super().__init__(D, E, k=E)
        self.weight = nn.Parameter(torch.randn(E, D) * D**-0.5)

    def forward(self, x, ids, batch=None):
        return Routing(linear(x, self.weight).softmax(1), {})


class TopK(Gate):
    """Top-k of the full softmax, the weights of the chosen renormalised to sum 1 for k >= 2 (Mixtral, arXiv:2401.04088;
    for k = 1 they are not: see the head of this file), with Switch's balance loss."""

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
    defaults 0.1 and 0.1 are those of the authors' code and language model.
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
            bar = torch.where(G > 0, top[:, self.k : self.k + 1], top[:, self.k - 1 : self.k])
            aux["load"] = cv_squared(batch.sum(torch.special.ndtr((clean - bar) / sigma)))
        return Routing(G, aux)


class GShard(Gate):
    """Top-2 with a random second expert (GShard, arXiv:2006.16668, algorithm 1).

    p = softmax(x W); the two largest, renormalised to g1 + g2 = 1 (before capacity); in training the second expert is
    used with probability min(1, 2 g2) only: a weak second opinion is not worth its slot. At evaluation both are used.
    Balance loss from first choices: E sum_e f_e P_e, 1e-2 as in the authors' code (the paper prints it without E^2).
    When an expert is full all first choices go before any second choice.
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
    frequent token: a Zipf head cannot be split."""
    import heapq

    table, heap = [0] * len(counts), [(0, e) for e in range(E)]
    for token in sorted(range(len(counts)), key=lambda t: -counts[t]):
        load, e = heapq.heappop(heap)
        table[token] = e
        heapq.heappush(heap, (load + counts[token], e))
    return torch.tensor(table)


class Hash(Gate):
    """Hash Layers (Roller et al. 2021, arXiv:2106.04426): a fixed table from token id to expert, weight 1. Nothing is
    learned, nothing drifts, balance is a property of the table.

    kind="balanced": frequent tokens are dealt to the lightest expert (needs token counts); "random": uniform. Each layer
    has its own table. k > 1 is MultiHash: the experts form k pools and hash j picks one expert from pool j, which is
    an FFN cut into k segments, each segment chosen by its own hash (give the experts 1/k of the width).
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
                table[j, order] = balanced_table([int(counts[t]) for t in order.tolist()], E // k)
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
    """

    def __init__(self, D, E, k=1, threshold=0.001, tighten=0.5, weights="gumbel", noise="annealed", balance=0.01):
        super().__init__(D, E, k)
        for name, value, known in ("weights", weights, ("gumbel", "softmax")), ("noise", noise, ("annealed", "constant")):
            if value not in known:
                raise ValueError(f"dts: {name}={value!r} is unknown; there are: {', '.join(known)}")
        self.weight = nn.Parameter(torch.randn(E, D) * 0.02)
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
        z = linear(x, self.weight)  # (N, E)
        noise = self.noise * batch.gumbel(self.E, x.device, z.dtype) if self.training else 0.0
        y = ((z + noise) / self.tau).softmax(1)
        top = torch.zeros_like(y, dtype=torch.bool).scatter(1, y.topk(self.least, dim=1).indices, True)
        m = top | ((y > self.bar) & ~self.hard)
        G = (y if self.gumbel else z.softmax(1)) * m
        return Routing(G, {"balance": balance_loss(y, m, batch)})
