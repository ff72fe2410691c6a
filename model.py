"""
Transformers whose every other feed-forward layer is a mixture of experts: GPT, RoBERTa, Translator.

One attention, one block, one stack; the three models differ in who may look at whom:

    GPT         decoder, causal                      next token
    RoBERTa     encoder, everybody sees everybody    masked token
    Translator  encoder + causal decoder with cross-attention    next target token

Decisions:
- Blocks are pre-LN in all three (GPT-2's order; RoBERTa and the original Transformer are post-LN, which needs more care
  to train). Learned positions, tied input and output embeddings, GELU.
- Layer i is MoE if (i + 1) % moe_every == 0, counted in encoder and decoder separately: every other layer by default.
- A dense model is the case of one expert: Experts with n = 1 stands where MoE would, and weights are drawn from
  generators keyed by layer and expert, so a dense model and a mixture with the same seed share all that they can.
- Weights start as GPT-2's, normal(0, 0.02). RoBERTa and both halves of the Translator have attention and FFNs with std
  1 / sqrt(D) instead: a decoder finds its source, and a mask its neighbours, by position alone at first, and from 0.02
  that takes long (Translator, D 128, loss after 300 steps: 3.2 from 0.02, 2.1 from 1 / sqrt(D)). Not so GPT (after 100
  steps: 5.66 from 0.02, 5.90 from 1 / sqrt(D)). RoBERTa's first two heads start at the neighbours: RoBERTa.look_around.
- Where the ids of masked tokens meet a gate that routes by token id, see RoBERTa.route_ids.

Letters: B batch, T sequence length, S source length, N = B * T tokens, D width, V vocabulary, E experts.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from dist import Mesh
from experts import MoE, feed_forward


class Attention(nn.Module):
    """Multi-head attention; keys and values from x itself, or from `memory` (cross-attention)."""

    def __init__(self, D, heads, bias, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(D, D, bias=bias)
        self.kv = nn.Linear(D, 2 * D, bias=bias)
        self.out = nn.Linear(D, D, bias=bias)

    def forward(self, x, memory=None, mask=None, causal=False, cache=None):
        """x (B, T, D), memory (B, S, D), mask (B, S) bool, True = may be attended to. cache: a dict that keeps keys and
        values between calls while decoding: self-attention appends to it, cross-attention fills it once."""
        B, T, D = x.shape
        assert T == 1 or not (causal and cache), "is_causal lines up the first positions: one new token at a time"
        split = lambda t: t.view(B, -1, self.heads, D // self.heads).transpose(1, 2)  # (B, heads, T or S, D / heads)
        q = split(self.q(x))
        if memory is not None and cache:
            k, v = cache["kv"]
        else:
            k, v = map(split, self.kv(x if memory is None else memory).chunk(2, dim=-1))
            if memory is None and cache:
                k, v = torch.cat([cache["kv"][0], k], 2), torch.cat([cache["kv"][1], v], 2)
            if cache is not None:
                cache["kv"] = k, v
        mask = None if mask is None else mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and T > 1)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """x + attention, (x + cross-attention), x + feed-forward, each behind a LayerNorm."""

    def __init__(self, cfg, ffn, cross=False):
        super().__init__()
        D, norm = cfg.n_embd, lambda: nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self.ln1, self.attn = norm(), Attention(D, cfg.n_head, cfg.bias, cfg.dropout)
        if cross:
            self.ln_cross, self.cross = norm(), Attention(D, cfg.n_head, cfg.bias, cfg.dropout)
        self.ln2, self.ffn = norm(), ffn
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, ids, live=None, domain=None, causal=False, memory=None, memory_mask=None, cache=None):
        """x (B, T, D), ids (B, T), live (B, T) bool or None (no padding) -> x, aux."""
        mine, theirs = (None, None) if cache is None else cache
        mask = None if causal else live  # causal: padding comes last and nobody looks that far
        x = x + self.dropout(self.attn(self.ln1(x), mask=mask, causal=causal, cache=mine))
        if memory is not None:
            x = x + self.dropout(self.cross(self.ln_cross(x), memory, mask=memory_mask, cache=theirs))
        h = self.ln2(x)
        y, aux = self.ffn(h, ids, live, domain) if isinstance(self.ffn, MoE) else (self.ffn(h), {})
        return x + self.dropout(y), aux


class Stack(nn.Module):
    """Blocks and a final LayerNorm."""

    def __init__(self, cfg, ffn, causal, cross=False, first_layer=0, std=0.02):
        super().__init__()
        self.causal = causal
        is_moe = [(i + 1) % cfg.moe_every == 0 for i in range(cfg.n_layer)]
        self.blocks = nn.ModuleList(
            Block(cfg, ffn(layer=first_layer + i, is_moe=is_moe[i], std=std), cross) for i in range(cfg.n_layer)
        )
        self.ln = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)

    def forward(self, x, ids, live=None, domain=None, memory=None, memory_mask=None, cache=None):
        """x (B, T, D) -> x (B, T, D), aux summed over the layers ("log_prob" is (B,), summed over positions too)."""
        total = {}
        for i, block in enumerate(self.blocks):
            x, aux = block(x, ids, live, domain, self.causal, memory, memory_mask, None if cache is None else cache[i])
            for name, value in aux.items():
                value = value.sum(1) if name == "log_prob" else value
                total[name] = total.get(name, 0) + value
        return self.ln(x), total


class Model(nn.Module):
    """What the three models share: embeddings, initialisation, the output head, what the log wants to know.

    V: vocabulary size. Each model also takes ffn(layer, is_moe, std), which makes the feed-forward part of a layer: see
    experts.feed_forward, which is also the default (one process).
    """

    def __init__(self, cfg, V):
        super().__init__()
        if cfg.n_embd % cfg.n_head:
            raise ValueError(f"--n_embd={cfg.n_embd} is not divisible by --n_head={cfg.n_head}")
        if cfg.n_experts > 1 and cfg.moe_every > cfg.n_layer:
            raise ValueError(
                f"--moe_every={cfg.moe_every} with --n_layer={cfg.n_layer} leaves no layer for a mixture: "
                "lower it, or take --n_experts=1"
            )
        self.cfg, self.V = cfg, V
        self.wte = nn.Embedding(V, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)

    @torch.no_grad()
    def init_weights(self, std=0.02):
        """GPT-2's: normal(0, 0.02), projections into the residual stream scaled by 1 / sqrt(2 layers), biases 0.
        std: of the attention's matrices. Gates and experts have initialised themselves."""
        rng = torch.Generator().manual_seed(self.cfg.seed)
        for name, p in self.named_parameters():
            if p.dim() >= 2 and ".ffn." not in name:
                scale = 1 / math.sqrt(2 * self.cfg.n_layer) if name.endswith("out.weight") else 1
                p.normal_(0, scale * (std if ".attn." in name or ".cross." in name else 0.02), generator=rng)
            elif name.endswith(".bias") and ".ffn." not in name:
                p.zero_()

    def embed(self, x, start=0):
        """x (B, T) token ids at positions start to start + T -> (B, T, D)."""
        if start + x.shape[1] > self.cfg.block_size:
            raise ValueError(
                f"a sequence of {start + x.shape[1]} tokens is longer than --block_size={self.cfg.block_size}"
            )
        return self.dropout(self.wte(x) + self.wpe.weight[start : start + x.shape[1]])

    def head(self, h, pick=None):
        """h (B, T, D) -> logits (B, T, V), or (M, V) at the positions where pick (B, T) is True."""
        return F.linear(h if pick is None else h[pick], self.wte.weight)

    def moes(self):
        """The MoE layers, in order."""
        return [m for m in self.modules() if isinstance(m, MoE)]

    def gates(self):
        return [m.gate for m in self.moes()]

    def loss_weights(self):
        """{name of an auxiliary loss: its weight}; all layers have the same kind of gate."""
        return {name: w for gate in self.gates() for name, w in gate.loss_weights.items()}

    @property
    def mesh(self):
        """The ranks that its MoE layers are spread over; a dense model has none to wait for."""
        moes = self.moes()
        return moes[0].mesh if moes else Mesh()

    def n_params(self):
        """(total, active) parameters over all ranks; active: with the gate's k experts a token in each
        MoE layer (the most for topp, the goal for remoe)."""
        total = active = 0
        for name, p in self.named_parameters():
            total += p.numel() * (self.mesh.ep if ".ffn.experts." in name else 1)
            active += 0 if ".ffn.experts." in name else p.numel()
        for m in self.moes():
            active += sum(p[0].numel() for p in m.experts.parameters()) * m.gate.k
        return total, active

    def flops_per_token(self, experts_per_token, T, targets=1.0):
        """Forward floating-point operations per token, a multiply and an add counting 2.

        experts_per_token: non-zeros of a row of G, mean over the MoE layers. T: sequence length; attention is counted
        without regard to masks. targets: share of the positions that meet the output layer. A gate counts as its
        matrices, but not as its tables by token id, which are looked up. A Translator's token is a source-target pair.
        """
        ids = self.V, self.V + self.cfg.block_size  # RoBERTa's masks have ids of their own
        multiplied = lambda name, p: p.dim() >= 2 and not (".gate." in name and len(p) in ids)
        others = [(name, p) for name, p in self.named_parameters() if ".ffn.experts." not in name]
        matrices = {name: p.numel() for name, p in others if multiplied(name, p)}
        heads = ("wte.weight", "dense.weight") if getattr(self, "classifier", None) is None else ("classifier.",)
        head = sum(n for name, n in matrices.items() if name.startswith(heads))
        blocks = sum(n for name, n in matrices.items() if name.startswith(("stack.", "encoder.", "decoder.")))
        per_row = sum(p[0].numel() for m in self.moes() for p in m.experts.parameters() if p.dim() == 3)
        scores = sum(2 * T * self.cfg.n_embd for m in self.modules() if isinstance(m, Attention))
        return 2 * (blocks + experts_per_token * per_row + scores + targets * head)


class GPT(Model):
    """Decoder-only language model."""

    def __init__(self, cfg, V, ffn=None):
        super().__init__(cfg, V)
        self.stack = Stack(cfg, ffn or partial(feed_forward, cfg, V=V), causal=True)
        self.init_weights()

    def forward(self, x, domain=None, pick=None):
        """x (B, T) token ids, domain (B, T) or None -> logits (B, T, V), or (M, V) where pick (B, T) is True; aux."""
        h, aux = self.stack(self.embed(x), x, domain=domain)
        return self.head(h, pick), aux

    @torch.no_grad()
    def generate(self, x, max_new_tokens, temperature=1.0, top_k=None, stop=None, generator=None):
        """Continue x (B, T) token by token; a temperature of 0 (below 1e-4) is greedy; ends early when every row has
        produced `stop`. There is no cache: each token is a pass over the whole window. ValueError if the logits are not
        finite. Collective under expert parallelism: every rank calls it with the same x and generator state."""
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(max_new_tokens):
            logits = self(x[:, -self.cfg.block_size :])[0][:, -1].float()  # (B, V)
            refuse_unless_finite(logits)
            if temperature < 1e-4:
                token = logits.argmax(1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k:
                    logits[logits < logits.topk(min(top_k, self.V), dim=1).values[:, -1:]] = -math.inf
                token = torch.multinomial(logits.softmax(1), 1, generator=generator)
            x = torch.cat([x, token], 1)
            done |= token[:, 0] == stop if stop is not None else False
            if done.all():
                break
        return x


def refuse_unless_finite(logits):
    """ValueError for a model that has nothing to say: rather than a text made of NaN."""
    if not logits.isfinite().all():
        raise ValueError(
            "the model's output is not finite: its weights are damaged, or were trained at too high a --learning_rate"
        )


class RoBERTa(Model):
    """Encoder for masked language modelling (Liu et al. 2019, arXiv:1907.11692). With n_classes it has a classifier in
    place of the language modelling head: y = f(mean over live positions)."""

    def __init__(self, cfg, V, ffn=None, mask_id=None, n_classes=0):
        super().__init__(cfg, V)
        D, std, self.mask_id = cfg.n_embd, cfg.n_embd**-0.5, mask_id
        ffn = ffn or partial(feed_forward, cfg, V=V + cfg.block_size)  # more ids than tokens: see route_ids
        self.stack = Stack(cfg, ffn, causal=False, std=std)
        self.dense, self.ln = nn.Linear(D, D), nn.LayerNorm(D, bias=cfg.bias)  # the LM head of the paper
        self.classifier = None
        if n_classes:
            drop, last = nn.Dropout(cfg.dropout), nn.Linear(D, n_classes)
            self.classifier = nn.Sequential(nn.Linear(D, D), nn.Tanh(), drop, last)
            for unused in (self.dense, self.ln):
                unused.requires_grad_(False)
        self.init_weights(std)
        self.look_around()

    @torch.no_grad()
    def look_around(self):
        """Positions start as waves, and two heads of the first layer where a mask's neighbours are: the first looks at
        the token to the left, the second, if there is one, at the one to the right.

            p_i = 0.02 sqrt(2) (cos w i, sin w i), a frequency w for each pair of dimensions (Vaswani et al. 2017,
                  section 3.5; here multiples of the golden ratio, which cover 0 to pi evenly in any stretch of them)
            k_j = strength * p_j,  q_i = strength * p_{i + offset}, both in the head's own D / heads dimensions
            q_i k_j ~ sum over w of cos w (i + offset - j), which is largest at j = i + offset

        The strength grows with the log of T and falls with the head's width: a neighbour gets half of the attention at
        the default size, a quarter with twice the heads or four times the length. From random weights this takes a
        third of a run of 1000 steps, and often yields heads that look both ways and cannot tell before from after:
        tests/RESULTS.md."""
        (T, D), heads = self.wpe.weight.shape, self.cfg.n_head
        w = math.pi * (0.618034 * torch.arange((D + 1) // 2) % 1)
        angle = torch.arange(T)[:, None] * w
        self.wpe.weight.copy_(0.02 * math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 2).flatten(1)[:, :D])
        attn, width = self.stack.blocks[0].attn, D // heads
        strength = 1.5 * math.sqrt(math.log(T) / math.log(64)) * (32 / width) ** 0.25
        for head, offset in [(0, -1), (1, 1)][:heads]:
            cos, sin = (offset * w).cos(), (offset * w).sin()
            turn = torch.block_diag(*torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2))  # turn p_i = p_{i + offset}
            rows = slice(head * width, (head + 1) * width)
            attn.q.weight[rows] = strength * turn[rows, :D]
            attn.kv.weight[rows] = strength * torch.eye(D)[rows]

    @staticmethod
    def route_counts(counts, block_size):
        """Token counts (V,) -> counts (V + block_size,) of the ids that `route_ids` makes: 15 % * 80 % of the tokens
        are masks, spread over the positions."""
        counts = torch.as_tensor(counts, dtype=torch.float64)
        masks = counts.new_full((block_size,), 0.12 * counts.sum().item() / block_size)
        return torch.cat([0.88 * counts, masks])

    def route_ids(self, x):
        """Ids for gates that route by token id. Every mask has the same id, so one expert would get 12 % of all tokens
        and 80 % of the predicted ones; hashing the hidden original id would leak the label. So a mask counts as one of
        block_size extra ids, V + its position: spread evenly, and known without looking at the answer."""
        position = torch.arange(x.shape[1], device=x.device)
        return x if self.mask_id is None else torch.where(x == self.mask_id, self.V + position, x)

    def encode(self, x, live=None, domain=None):
        """x (B, T) ids, live (B, T) bool or None -> (B, T, D), aux."""
        return self.stack(self.embed(x), self.route_ids(x), live, domain)

    def forward(self, x, live=None, domain=None, pick=None):
        """Logits (B, T, V), or (M, V) where pick (B, T) is True (only the masked positions are worth the head), aux.
        A classifier's are (B, 1, n_classes), or (M, n_classes) with pick (B, 1)."""
        h, aux = self.encode(x, live, domain)
        if self.classifier is not None:
            live = torch.ones_like(x, dtype=torch.bool) if live is None else live
            h = ((h * live[..., None]).sum(1) / live.sum(1, keepdim=True).clamp(min=1))[:, None]  # (B, 1, D)
            return self.classifier(h if pick is None else h[pick]), aux
        h = h if pick is None else h[pick]
        return self.head(self.ln(F.gelu(self.dense(h)))), aux


class Translator(Model):
    """Encoder-decoder Transformer (Vaswani et al. 2017, arXiv:1706.03762) over one joint vocabulary."""

    def __init__(self, cfg, V, ffn=None, pad_id=None):
        super().__init__(cfg, V)
        ffn, std, self.pad_id = ffn or partial(feed_forward, cfg, V=V), cfg.n_embd**-0.5, pad_id
        self.encoder = Stack(cfg, ffn, causal=False, std=std)
        self.decoder = Stack(cfg, ffn, causal=True, cross=True, first_layer=cfg.n_layer, std=std)
        self.init_weights(std)

    def encode(self, src):
        """src (B, S) ids, padded with pad_id -> memory (B, S, D), live (B, S) bool, aux."""
        live = src != self.pad_id
        domain = torch.zeros_like(src)  # a language is a domain: 0 the source's, 1 the target's
        memory, aux = self.encoder(self.embed(src), src, live, domain)
        return memory, live, aux

    def decode(self, x, memory, memory_mask, start=0, cache=None):
        """x (B, T) target ids at positions start to start + T -> h (B, T, D), aux. cache: see Attention."""
        domain = torch.ones_like(x)
        return self.decoder(self.embed(x, start), x, x != self.pad_id, domain, memory, memory_mask, cache)

    def forward(self, x, src, pick=None):
        """x (B, T) decoder input (the target shifted right), src (B, S) -> logits (B, T, V) or (M, V), aux."""
        memory, live, aux = self.encode(src)
        h, more = self.decode(x, memory, live)
        return self.head(h, pick), {name: aux.get(name, 0) + more.get(name, 0) for name in aux | more}

    @torch.no_grad()
    def translate(self, src, bos, eot, beams=1, length_penalty=0.6, max_tokens=0):
        """src (B, S), padded with pad_id -> the best translation y (B, T), everything from the first `eot` on filled
        with eot, and its score (B,): sum of log p / ((5 + length) / 6)^length_penalty (Wu et al. 2016,
        arXiv:1609.08144, eq. 14). T is at most max_tokens (0: block_size); what is not finished by then is cut.

        Beam search with K = beams; 1 is greedy. A finished hypothesis keeps its place in the beam with a frozen score,
        so that short and long ones compete; a sentence is done when its best one is finished and no other can overtake
        it. Ids above eot (mask, pad, bos) are never written. Collective: every rank has the same number of rows, and
        all stop together."""
        B, K, V, limit = len(src), beams, eot + 1, max_tokens or self.cfg.block_size
        scale = lambda length: ((5 + length) / 6) ** length_penalty
        memory, live, _ = self.encode(src)
        memory, live = memory.repeat_interleave(K, 0), live.repeat_interleave(K, 0)  # (B * K, S, D), (B * K, S)
        cache = [({}, {}) for _ in self.decoder.blocks]
        first = torch.arange(B, device=src.device)[:, None] * K  # (B, 1) the first row of each sentence
        y, length = src.new_full((B * K, 1), bos), src.new_zeros(B, K)
        done = torch.zeros_like(length, dtype=torch.bool)
        total = torch.zeros_like(length, dtype=torch.float)
        total[:, 1:] = -math.inf  # all hypotheses begin alike: only the first may grow
        for t in range(limit):
            h, _ = self.decode(y[:, -1:], memory, live, t, cache)
            logits = self.head(h[:, 0]).float()
            refuse_unless_finite(logits)
            log_p = logits.log_softmax(1)[:, :V].view(B, K, V).masked_fill(done[..., None], -math.inf)
            log_p[..., eot].masked_fill_(done, 0.0)  # a finished hypothesis goes on in one way, at no cost
            grown = total[..., None] + log_p  # (B, K, V)
            length = length + ~done
            score, best = (grown / scale(length)[..., None]).flatten(1).topk(K)  # (B, K)
            parent, token = best // V, best % V
            rows = (first + parent).flatten()
            y = torch.cat([y[rows], token.view(-1, 1)], 1)
            total, length = grown.flatten(1).gather(1, best), length.gather(1, parent)
            done = done.gather(1, parent) | (token == eot)
            hope = (total.masked_fill(done, -math.inf) / scale(limit)).max(1).values  # if all that follows is certain
            if not self.mesh.any(~done[:, 0] | (hope > score[:, 0])):
                break
            if K > 1:
                for mine, _ in cache:  # the cross-attention's keys are the same for all hypotheses of a sentence
                    mine["kv"] = tuple(c[rows] for c in mine["kv"])
        return y.view(B, K, -1)[:, 0, 1:], score[:, 0]


def make_optimizer(model, cfg):
    """AdamW; weight decay on matrices only, and not in gates, whose splits it would soften (COMET, DSelect-k). What is
    frozen stays out: Adam moves a parameter with zero gradient. What freezes later has no .grad then, and is skipped
    (router.StableMoE)."""
    decay, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = p.dim() >= 2 and ".gate." not in name and not name.endswith((".b1", ".b2", "wpe.weight"))
            (decay if matrix else rest).append(p)
    groups = [dict(params=decay, weight_decay=cfg.weight_decay), dict(params=rest, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)
