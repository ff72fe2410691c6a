"""
From files to batches.

A batch is a dict of (B, ...) tensors: x, and y with the targets, -1 where there is nothing to predict; every key but y
is an argument of the model's forward. An objective (data/objectives.py) makes the whole global batch of a step from
(seed, step), on every process alike, out of the parts below: that costs little, the data order does not depend on the
number of processes, a resumed run needs no state, and the number of targets is known everywhere without asking
anybody. micro_batches then takes a process's rows.

Letters: B batch, T sequence length, S source length, V vocabulary. cfg is train.Config.
"""

import functools

import numpy as np
import torch

from data.files import load_meta, load_split, load_tokenizer


class Corpus:
    """A prepared folder of data/: meta, tokenizer and memory-mapped splits."""

    def __init__(self, folder):
        self.folder, self.meta = folder, load_meta(folder)
        self.tok = load_tokenizer(folder)
        self.V = self.meta["vocab_size"]
        self.splits = {
            s: load_split(folder, self.meta, s) for s in ("train", "val", "test") if s in self.meta["splits"]
        }

    @functools.cache
    def counts(self):
        """(V,) how often each token occurs in the training text."""
        train = self.splits["train"]
        parts = [train] if self.meta["kind"] == "text" else [train.src, train.tgt]
        return sum(np.bincount(p, minlength=self.V) for p in parts)

    def domains(self, split):
        """[(name, start, end), ...]: token ranges of the labelled domains."""
        return [(name, d[0], d[1]) for name, d in self.meta["splits"][split]["domains"].items()]

    @functools.cache
    def names(self):
        """Names of all domains, those of the training text first: a domain's place here is its number everywhere."""
        splits = ["train", *(split for split in self.splits if split != "train")]
        return list(dict.fromkeys(name for split in splits for name, _, _ in self.domains(split)))

    def too_short(self, split, T):
        """Names of the domains that have no window of T + 1 tokens: nothing is ever read of them."""
        return [name for name, start, end in self.domains(split) if end - start <= T]

    def held_out(self):
        """Names of the held-out splits there are: what is watched in training comes first, what is for the end last."""
        return [split for split in ("val", "test") if split in self.splits]

    @functools.cache
    def pairs(self, split, T):
        """Numbers of the sentence pairs of a split whose sides both have at most T tokens, <|endoftext|> included: a
        longer one is left out, since a sentence cut short would teach and count as a wrong translation."""
        p = self.splits[split]
        fit = np.flatnonzero(np.maximum(np.diff(p.src_idx), np.diff(p.tgt_idx)) <= T)
        if not len(fit):
            raise ValueError(
                f"{self.folder}: every pair of the {split} split is longer than block_size={T} tokens: raise "
                "--block_size"
            )
        return fit

    @functools.cache
    def bytes_per_token(self, split, T):
        """Original UTF-8 bytes per target token: what turns nats per token into bits per byte. Of sentence pairs only
        those that are not left out count."""
        s, p = self.meta["splits"][split], self.splits[split]
        if self.meta["kind"] == "text":
            return s["bytes"] / s["tokens"]
        fit = self.pairs(split, T)
        if len(fit) == s["pairs"]:
            return s["tgt_bytes"] / s["tgt_tokens"]
        sentences = [p.target(i).tolist() for i in fit]
        return sum(len(self.tok.decode(ids[:-1]).encode()) for ids in sentences) / sum(map(len, sentences))


# ---------------------------------------------------------------------------------------------------------------------
# Text


def windows(corpus, split, starts, T):
    """Windows of T + 1 tokens: starts (B,) -> tokens (B, T + 1) and the number of their domain (B, T)."""
    tokens = corpus.splits[split]
    ends = np.array([end for _, _, end in corpus.domains(split)])
    number = np.array([corpus.names().index(name) for name, _, _ in corpus.domains(split)])
    window = torch.from_numpy(np.stack([tokens[s : s + T + 1] for s in starts]).astype(np.int64))
    domain = torch.from_numpy(number[np.searchsorted(ends, starts, side="right")])
    return window, domain[:, None].expand(-1, T)


def random_starts(corpus, cfg, rng, n_nodes):
    """(batch_size,) window starts, uniform over all windows that stay inside one domain. With shard_by_domain the rows
    of node v come from domain v % domains only, or from domains v, v + nodes, ... if there are more domains than nodes;
    a node's rows are a run of each micro-batch (see micro_batches)."""
    T, B, domains = cfg.block_size, cfg.batch_size, corpus.domains("train")
    first = np.array([start for _, start, _ in domains])
    room = np.array([max(end - start - T, 0) for _, start, end in domains])  # windows per domain
    if not room.sum():
        raise ValueError(
            f"{corpus.folder}: no domain of the train split is longer than one block of {T} tokens: lower --block_size"
        )
    which = rng.choice(len(domains), size=B, p=room / room.sum())
    if cfg.shard_by_domain:
        if n_nodes < 2 or not room.all():
            raise ValueError(
                f"--shard_by_domain gives each node a domain of its own: it needs several nodes (here "
                f"{n_nodes}; --ranks_per_node plays some) and domains longer than {T} tokens; to go on "
                "without: --shard_by_domain=false"
            )
        micro = B // cfg.grad_accum
        node = np.arange(B) % micro * n_nodes // micro
        own = room * (np.arange(len(domains)) % n_nodes == node[:, None] % len(domains))  # (B, domains)
        ends = own.cumsum(1)  # a node's windows, one domain after the other
        at = (rng.random(B) * ends[:, -1]).astype(int)
        which = (at[:, None] >= ends).sum(1)
        return first[which] + at - (ends - own)[np.arange(B), which]
    return first[which] + (rng.random(B) * room[which]).astype(int)


def eval_starts(corpus, split, T, most=0):
    """Starts of non-overlapping windows of a held-out split, never random: `most` of them, evenly spread; 0: all. What
    is left at the end of a domain, T tokens at most, is not scored."""
    starts = [s for _, start, end in corpus.domains(split) for s in range(start, end - T, T)]
    if not starts:
        raise ValueError(
            f"{corpus.folder}: no domain of the {split} split is longer than one block of {T} tokens: "
            "lower --block_size"
        )
    n = min(len(starts), most or len(starts))
    return [starts[i * len(starts) // n] for i in range(n)]


def mask_tokens(x, tok, rng, share=0.15):
    """RoBERTa's dynamic masking: of 15 % of the ordinary tokens, 80 % become <|mask|>, 10 % a random ordinary token,
    10 % stay. x (B, T) -> corrupted x, y with -1 where nothing is predicted. Special tokens are never predicted."""
    ordinary = x < tok.eot  # the special tokens are the last ids, <|endoftext|> first
    u, kind = (torch.from_numpy(rng.random(x.shape)) for _ in range(2))
    picked = ordinary & (u < share)
    if not picked.any():  # a batch without a target has no loss: predict the token that came closest
        picked.view(-1)[torch.where(ordinary, u, 2.0).argmin()] = bool(ordinary.any())
    random_token = torch.from_numpy(rng.integers(0, tok.eot, x.shape))
    corrupted = torch.where(kind < 0.8, tok.mask, torch.where(kind < 0.9, random_token, x))
    return torch.where(picked, corrupted, x), torch.where(picked, x, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Sentence pairs


def pair_batch(corpus, split, which):
    """Translation: sentence pairs `which` -> src (B, S), x (B, T) = <|bos|> + target, y (B, T) = target +
    <|endoftext|>, padded to the longest of the batch."""
    p, tok = corpus.splits[split], corpus.tok
    src = [torch.from_numpy(p.source(i).astype(np.int64)) for i in which]
    tgt = [torch.from_numpy(p.target(i).astype(np.int64)) for i in which]
    x = [torch.cat([torch.tensor([tok.bos]), t[:-1]]) for t in tgt]
    return dict(src=pad(src, tok.pad), x=pad(x, tok.pad), y=pad(tgt, -1))


def pair_counts(corpus, T):
    """How often encoder and decoder read each token, by all training pairs of up to T tokens: (V,) and (V,). What a
    target sentence ends with is never read, <|bos|> once in each."""
    p, fit, tok = corpus.splits["train"], corpus.pairs("train", T), corpus.tok
    read = lambda side: np.bincount(np.concatenate([side(i) for i in fit]), minlength=corpus.V)
    source, target = read(p.source), read(p.target)
    target[tok.eot] -= len(fit)
    target[tok.bos] += len(fit)
    return source, target


def pad(rows, value):
    """Tensors of different length -> (rows, longest), filled up with value."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@functools.lru_cache(maxsize=1)
def bucketed_pairs(corpus, batch_size, block_size, seed, epoch):
    """The pairs of an epoch as (batches, batch_size) numbers: shuffled, cut into runs of 50 batches, sorted by length
    inside a run and dealt out as batches in random order, so that a batch holds sentences of similar length."""
    p, fit = corpus.splits["train"], corpus.pairs("train", block_size)
    n = len(fit) // batch_size
    if not n:
        raise ValueError(
            f"{corpus.folder} has {len(fit)} training pairs, less than one batch of {batch_size}: lower --batch_size"
        )
    rng = np.random.default_rng([seed, epoch])
    order = fit[rng.permutation(len(fit))[: n * batch_size]]
    length = np.diff(p.src_idx)[order] + np.diff(p.tgt_idx)[order]
    run = np.arange(len(order)) // (50 * batch_size)
    return rng.permutation(order[np.lexsort((length, run))].reshape(n, batch_size))


# ---------------------------------------------------------------------------------------------------------------------
# A process's share


def check(cfg, world):
    """ValueError if a batch cannot be cut evenly into micro-batches, processes and routing groups."""
    parts = cfg.grad_accum * world * cfg.groups
    if cfg.batch_size % parts:
        raise ValueError(
            f"--batch_size={cfg.batch_size} must be divisible by grad_accum * processes * groups = "
            f"{cfg.grad_accum} * {world} * {cfg.groups} = {parts}"
        )


def micro_batches(batch, grad_accum, mesh):
    """Cut the global batch into grad_accum micro-batches; of each, this rank's rows (in rank order) on its device."""
    size = len(batch["y"]) // grad_accum
    for m in range(grad_accum):
        rows = slice(m * size + mesh.rank * size // mesh.world, m * size + (mesh.rank + 1) * size // mesh.world)
        yield {name: t[rows].to(mesh.device, non_blocking=True) for name, t in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What a model has to beat


def majority(corpus, split, T):
    """The share of the most frequent class among the passages of a split: the accuracy of always guessing that one."""
    ends = [end for _, _, end in corpus.domains(split)]
    classes = np.searchsorted(ends, eval_starts(corpus, split, T), side="right")
    return np.bincount(classes).max() / len(classes)


def unigram_loss(corpus, split, T):
    """Nats per token of a model that knows only how frequent tokens are: what any model must beat."""
    text, held = corpus.meta["kind"] == "text", corpus.splits[split]
    p = corpus.counts() if text else np.bincount(corpus.splits["train"].tgt, minlength=corpus.V)
    p = (p + 1.0) / (p + 1.0).sum()
    if not text:
        held = np.concatenate([held.target(i) for i in corpus.pairs(split, T)])
    return float(-np.log(p)[np.asarray(held)].mean())
