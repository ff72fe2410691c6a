"""
Objectives: what differs between language modelling, mask filling, classification and translation.

An objective is a class: its defaults, its model, its batches, what is reported beside the loss, what to beat, and how a
trained model shows what it can do. train.py does the same for all of them. To add one, write a class like those below
and name it in OBJECTIVES, the last line; its parts (windows, masks, pairs) are in data/batches.py. The one rule:

    a batch is a dict of (B, ...) tensors: x, and y with the targets, -1 where nothing is predicted. Every key but y is
    an argument of the model's forward, which also takes pick (B, T), True where there is a target, and returns the
    logits (M, V) of those positions, and aux

Targets are numbers of classes (tokens, as a rule): the loss is the cross-entropy of train.task_loss. rng is numpy's
generator of the step (or of the held-out batch): everything random comes from it. cfg is train.Config.
"""

import math

import numpy as np
import torch

import model as models
from data import batches, samples
from data.files import corpus_folder


class Objective:
    """What all share, and what language modelling, mask filling and classification have: windows of block_size tokens
    of a corpus of text, cut within its domains (prose, code, ...).

    defaults   other defaults than Config's
    kind       of the corpus: "text" or "translation"
    causal     may a token not see later ones? Then gates that do are refused
    continues  name of the objective that this one fine-tunes, when --init_from names a run; None: it takes dense runs
    in_bytes   report bits per byte of the original text, too?
    prompt     what --sample takes
    """

    defaults = {}
    kind = "text"
    causal = False
    continues = None
    in_bytes = False
    prompt = "your prompt"

    def __init__(self, corpus, cfg):
        self.corpus, self.cfg, self.n_domains = corpus, cfg, len(corpus.domains("train"))
        self.n_ids, self.counts = corpus.V, corpus.counts()  # what gates route by: token ids, how often each occurs

    def model(self, cfg, ffn):
        """A fresh model. ffn(layer, is_moe, std) makes the feed-forward part of a layer (model.Model)."""
        raise NotImplementedError

    def batch(self, split, rows, rng):
        """rows: where windows begin, or numbers of pairs, from `train_batch` or `rows` -> the batch, see above."""
        raise NotImplementedError

    def sample(self, run, prompt):
        """A text that shows what the model can do with a prompt (None: one from the corpus). Collective."""
        raise NotImplementedError

    def schedule_step(self, step):
        """The step as gates and curriculum count it."""
        return step

    def train_batch(self, step, n_nodes=1):
        """The global batch of a step, a function of (seed, step) alone. n_nodes: for --shard_by_domain."""
        rng = np.random.default_rng([self.cfg.seed, step])
        return self.batch("train", batches.random_starts(self.corpus, self.cfg, rng, n_nodes), rng)

    def rows(self, split, most=0):
        """What a held-out split consists of (`most` rows of it; 0: all), a list; `batch` takes such rows."""
        return batches.eval_starts(self.corpus, split, self.cfg.block_size, most)

    def held_out(self, split, n=0):
        """Fixed batches of a held-out split, n of them (0: all). The last is filled up with rows that count for nothing
        (y = -1), so that every process has the same number. Which tokens are masked depends on batch_size."""
        B = self.cfg.batch_size
        rows = self.rows(split, n * B)
        for i in range(0, len(rows), B):
            some = rows[i : i + B]
            batch = self.batch(split, some + some[:1] * (B - len(some)), np.random.default_rng([0, i]))
            batch["y"][len(some) :] = -1
            yield batch

    def parts(self, split):
        """Names of the parts whose losses are reported one by one, if the split has any of them."""
        return self.corpus.names()

    def part(self, batch):
        """Like y, the number of the part that each target belongs to."""
        return batch["domain"]

    def more_metrics(self, split, loss):
        """{name: value} that follow from the loss, in nats per target."""
        if not self.in_bytes:
            return {}
        return {"bpb": loss / math.log(2) / self.corpus.bytes_per_token(split, self.cfg.block_size)}

    def left_out(self):
        """A note on what is never read, or ""."""
        T = self.cfg.block_size
        short = [f"{name} ({split})" for split in self.corpus.splits for name in self.corpus.too_short(split, T)]
        return f"left out, no longer than block_size={T} tokens: {', '.join(short)}\n" if short else ""

    def to_beat(self, split):
        loss = batches.unigram_loss(self.corpus, split, self.cfg.block_size)
        return f"{self.left_out()}to beat: {loss:.3f}, the loss of guessing tokens by frequency"

    def scores(self, run, split, n):
        """What is measured at the end of a run only, on n rows (0: all): {name: value} and a text that shows it."""
        return {}, ""

    def finish(self, run):
        """The last words of a run: entries for its log, a text."""
        return {}, self.sample(run, None)


class LanguageModelling(Objective):
    """GPT: predict the next token."""

    defaults, causal, in_bytes = dict(dataset="stdlib"), True, True

    def model(self, cfg, ffn):
        return models.GPT(cfg, self.corpus.V, ffn)

    def batch(self, split, rows, rng):
        window, domain = batches.windows(self.corpus, split, rows, self.cfg.block_size)
        return dict(x=window[:, :-1], y=window[:, 1:].clone(), domain=domain)

    def sample(self, run, prompt):
        return samples.continue_text(run.model, self.corpus, run.cfg, run.mesh, prompt, run.autocast)


class MaskFilling(Objective):
    """RoBERTa: predict masked tokens from both sides."""

    defaults = dict(dataset="stdlib", gate="switch", n_layer=2, block_size=64, batch_size=64, max_steps=1000)
    prompt = "your text with a <mask>"

    def __init__(self, corpus, cfg):
        super().__init__(corpus, cfg)
        self.n_ids += cfg.block_size  # masks count as ids of their own, see model.RoBERTa.route_ids
        self.counts = models.RoBERTa.route_counts(self.counts, cfg.block_size)

    def model(self, cfg, ffn):
        return models.RoBERTa(cfg, self.corpus.V, ffn, self.corpus.tok.mask)

    def batch(self, split, rows, rng):
        window, domain = batches.windows(self.corpus, split, rows, self.cfg.block_size)
        x, y = batches.mask_tokens(window[:, :-1], self.corpus.tok, rng)
        return dict(x=x, y=y, domain=domain)

    def sample(self, run, prompt):
        return samples.fill_text(run.model, self.corpus, run.cfg, run.mesh, prompt, run.autocast)


class Classification(MaskFilling):
    """Which domain is a passage from? A RoBERTa of its own, or, with --init_from, a trained one. It stands where GLUE
    stands in the paper, on data that every Python has. Pre-training of 1000 steps does not pay here, not even with
    50 labelled passages; 5000 do with 200 and more (tests/RESULTS.md, "Pre-training with few labels")."""

    continues, prompt = "roberta", "your text"
    defaults = dict(dataset="stdlib/packages", gate="switch", n_layer=2, block_size=64, batch_size=64, dropout=0.1,
                    learning_rate=2e-3, warmup=50, max_steps=300, out_dir="out-classify")  # fmt: skip

    def __init__(self, corpus, cfg):
        super().__init__(corpus, cfg)
        self.n_domains = 1  # the domain is the label, so gates must not be told
        classes = {split: [name for name, _, _ in corpus.domains(split)] for split in corpus.splits}
        if len(classes["train"]) < 2 or any(names != classes["train"] for names in classes.values()):
            raise ValueError(
                f"--dataset={cfg.dataset}: --objective=classify needs two domains or more, the same in "
                f"each split; there are {classes}"
            )
        if short := corpus.too_short("train", cfg.block_size):
            raise ValueError(
                f"--dataset={cfg.dataset}: no passage of {cfg.block_size} tokens to learn {short[0]} "
                "from: lower --block_size"
            )

    def model(self, cfg, ffn):
        return models.RoBERTa(cfg, self.corpus.V, ffn, self.corpus.tok.mask, len(self.parts("train")))

    def batch(self, split, rows, rng):
        window, domain = batches.windows(self.corpus, split, rows, self.cfg.block_size)
        return dict(x=window[:, :-1], y=domain[:, :1].clone())

    def schedule_step(self, step):
        """Fine-tuning uses what curriculum and schedules led to: they are over; a run from scratch has its own."""
        return step if self.cfg.init_from == "scratch" else self.cfg.max_steps

    def part(self, batch):
        return batch["y"]

    def to_beat(self, split):
        share = batches.majority(self.corpus, split, self.cfg.block_size)
        return f"{self.left_out()}to beat: accuracy {share:.4f}, the share of the most frequent class"

    def sample(self, run, prompt):
        return samples.name_classes(run.model, self.corpus, run.cfg, run.mesh, prompt, run.autocast)


class Translation(Objective):
    """Encoder-decoder translation of sentence pairs."""

    kind, causal, in_bytes, prompt = "translation", True, True, "your sentence"
    defaults = dict(dataset="grammar", gate="switch", n_layer=2, block_size=64, batch_size=64, learning_rate=2e-3,
                    label_smoothing=0.1, max_steps=1200)  # fmt: skip

    def __init__(self, corpus, cfg):
        if cfg.shard_by_domain:
            raise ValueError(
                "--shard_by_domain=true is for corpora of several domains; --objective=translation has none: "
                "--shard_by_domain=false"
            )
        self.corpus, self.cfg, self.n_domains = corpus, cfg, 2  # the source's language and the target's
        self.n_ids, self.counts = corpus.V, corpus.counts()  # of both sides; a table's are its own stack's: model

    def model(self, cfg, ffn):
        source, target = batches.pair_counts(self.corpus, cfg.block_size)

        def balanced(layer, **rest):  # a table deals out the tokens that its own stack reads
            return ffn(layer=layer, counts=source if layer < cfg.n_layer else target, **rest)

        return models.Translator(cfg, self.corpus.V, balanced, self.corpus.tok.pad)

    def batch(self, split, rows, rng):
        return batches.pair_batch(self.corpus, split, rows)

    def train_batch(self, step, n_nodes=1):
        cfg, rng = self.cfg, np.random.default_rng([self.cfg.seed, step])
        epoch, i = divmod(step, max(1, len(self.corpus.pairs("train", cfg.block_size)) // cfg.batch_size))
        pairs = batches.bucketed_pairs(self.corpus, cfg.batch_size, cfg.block_size, cfg.seed, epoch)[i]
        return self.batch("train", rng.permutation(pairs), rng)

    def rows(self, split, most=0):
        return self.corpus.pairs(split, self.cfg.block_size).tolist()[: most or None]

    def parts(self, split):
        return ["all"]

    def part(self, batch):
        return torch.zeros_like(batch["y"])

    def left_out(self):
        sizes = {s: (pairs["pairs"], len(self.rows(s))) for s, pairs in self.corpus.meta["splits"].items()}
        long = [f"{n - fit:,d} of {n:,d} {s} pairs" for s, (n, fit) in sizes.items() if fit < n]
        return f"left out, longer than block_size={self.cfg.block_size} tokens: {', '.join(long)}\n" if long else ""

    def scores(self, run, split, n):
        return samples.score_translations(run.model, self.corpus, split, n, run.cfg, run.mesh, run.autocast)

    def finish(self, run):
        split = self.corpus.held_out()[-1]
        scores, text = self.scores(run, split, run.cfg.bleu_sentences)
        text += (
            f"\n\n{split}: BLEU {scores['bleu']:.2f}, {scores['exact']:.1%} exactly as the reference "
            f"({scores['sentences']} sentences, beam of {run.cfg.beams})"
        )
        return {f"{split}_{name}": value for name, value in scores.items()}, text

    def sample(self, run, prompt):
        return samples.translate_text(run.model, self.corpus, run.cfg, run.mesh, prompt, run.autocast)


def open_objective(cfg):
    """The objective, with its corpus."""
    make = OBJECTIVES[cfg.objective]
    corpus = batches.Corpus(corpus_folder(cfg.dataset))
    if corpus.meta["kind"] != make.kind:
        raise ValueError(
            f"--dataset={cfg.dataset} is a corpus of kind {corpus.meta['kind']}; "
            f"--objective={cfg.objective} needs {make.kind}"
        )
    if "train" not in corpus.splits or len(corpus.splits) < 2:
        have = ", ".join(corpus.splits)
        raise ValueError(f"--dataset={cfg.dataset} has the splits {have}; it needs train, and val or test")
    return make(corpus, cfg)


OBJECTIVES = dict(gpt=LanguageModelling, roberta=MaskFilling, classify=Classification, translation=Translation)
