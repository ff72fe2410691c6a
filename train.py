"""
Train a mixture-of-experts Transformer: the manual.

    python train.py                                     GPT on Python's own documentation and source, no download
    python train.py --gate=hash                         another gate: every class of router.py, by its name
    python train.py --n_experts=1                       the dense model of the same active size
    python train.py --objective=roberta                 masked language modelling
    python train.py --objective=classify --init_from=out   fine-tune that RoBERTa: which package is a passage from?
    python train.py --objective=translation             encoder-decoder
    torchrun --nproc_per_node=2 train.py                the same run on two processes, experts spread over them
    python train.py --init_from=resume                  continue after Ctrl-C, a kill or a crash, bit for bit (CPU)
    python train.py --sample="def __init__"             continue a prompt with the newest checkpoint
    python train.py --eval_only                         held-out loss of the newest checkpoint

Flags are the fields of Config below, always --name=value (a bare --flag means true); --help lists them.

Read it in this order: Config, the batches of an objective, losses, evaluate, main. The whole loop is

    loss = task loss + sum of weights * auxiliary losses          the task loss is always reported alone

Decisions:
- Everything random is a function of (seed, step): data order, masks, dropout, routing noise. So a resumed run equals an
  uninterrupted one without saving any generator, and the data order does not depend on the number of processes.
- batch_size is global. Each process takes its slice; a rank's loss is its share of the global one (its sum / the global
  number of targets), so gradients are only ever added up.
- The log is out_dir/log.jsonl, one JSON object a line, beside what you see on the screen.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors on the CPU: a step is 15 % faster
import torch
import torch.nn.functional as F

import dist
import evomoe
from data.bleu import corpus_bleu
from data.common import load_meta, load_split, load_tokenizer
from model import GPT, RoBERTa, Translator
from router import gates

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Config:
    # What to learn
    objective: str = "gpt"  # gpt, roberta, classify (fine-tuning a RoBERTa) or translation
    dataset: str = ""  # a folder under data/; "" means stdlib (gpt, roberta) or grammar (translation): no download
    # The Transformer
    n_layer: int = 4  # blocks (in encoder and decoder each, for translation)
    n_head: int = 4  # attention heads, must divide n_embd
    n_embd: int = 128  # model width D
    n_hidden: int = 0  # hidden width of an FFN or expert; 0 means 4 * n_embd
    block_size: int = 128  # longest sequence, tokens
    dropout: float = 0.0  # 0 when data are plenty, 0.1 to 0.3 when the model sees them many times
    bias: bool = False  # biases in linear layers and LayerNorms, as GPT-2 has them
    # The mixture
    n_experts: int = 8  # experts per MoE layer; 1 is the dense model
    moe_every: int = 2  # every how many layers the FFN is a mixture; 1 means all
    gate: str = "switch"  # a class of router.py in lower case
    k: int = 0  # experts per token, for gates that take it; 0 means the gate's own default
    gate_args: str = ""  # the gate's own knobs, like "balance=0.02,jitter=0"; its class in router.py says which
    permute: float = 0.0  # share of the run in which a permutation of the experts is learned (COMET+), 0.01 to 0.1; 0 means none
    permute_schedule: str = "corrected"  # of that search: corrected, or official (the authors'); router.Permuted has the figures
    capacity_factor: float = 0.0  # slots per expert / fair share, in training; 0 means no limit; 1.25 is Switch's
    eval_capacity_factor: float = 0.0  # the same at evaluation; 0: nothing is dropped
    drop_order: str = ""  # who is dropped first: arrival, choice, score, random; "" means the gate's own order
    groups: int = 1  # routing groups per process; groups=W on one process drops and balances as W processes do
    activation: str = "gelu"  # gelu, or gelu_tanh (GPT-2's approximation of it)
    expert_hidden: int = 0  # hidden width of an expert if it is not an FFN's; less than that is a finer mixture
    insist: bool = False  # run a gate that looks at later tokens in a causal model all the same
    # The curriculum (evomoe.py); shares are of max_steps
    diversify: float = 0.0  # share of the run with one expert, before the spawn: 0.1 for EvoMoE; 0 means no such phase
    spawn: str = "mask"  # how experts come from the first: mask, noise, copy, importance (a split, with expert_hidden)
    spawn_ratio: float = 0.3  # share of masked weights; relative size of the noise; share of neurons common to all experts
    tau_max: float = 2.0  # dts: temperature at the spawn; 2 keeps all experts on
    tau_min: float = 0.3  # dts: final temperature; 0.1 to 0.5; lower means surer weights and fewer experts
    tau_until: float = 0.25  # dts: the temperature falls until this share of the run; all experts are on: the dear part
    hard_at: float = 0.4  # dts: then the bar rises until this share, and from there only the k best experts count
    distill: float = 0.0  # weight of the distillation from a dense teacher, 1 to 5; 0 means none
    teacher: str = ""  # out_dir of the teacher's run; "" means the one in init_from
    # Optimisation
    batch_size: int = 16  # sequences per step over all processes
    grad_accum: int = 1  # micro-batches that a step is cut into, to save memory; must divide batch_size
    max_steps: int = 600  # optimizer steps
    learning_rate: float = 2e-3  # peak; 3e-4 to 3e-3 for small models, less for large ones
    min_lr: float = 0.1  # final learning rate as a share of the peak
    schedule: str = "cosine"  # cosine, or inverse_sqrt (the original Transformer's)
    warmup: int = 50  # steps until the peak
    weight_decay: float = 0.1  # on matrices, not on biases, gains and embeddings of positions
    beta1: float = 0.9  # AdamW
    beta2: float = 0.98  # AdamW; 0.95 to 0.999
    grad_clip: float = 1.0  # global gradient norm; 0 means no clipping
    label_smoothing: float = 0.0  # 0.1 is usual for translation; the reported loss is without it
    score_weight: float = 0.01  # of the score-function term, for gates that sample; 1 is unbiased and drowns a deep network in noise
    seed: int = 1337  # of everything
    # Evaluation, output
    eval_every: int = 100  # steps; 0: only at the end
    bleu_sentences: int = 200  # translation: held-out sentences translated at the end of a run; 0 means all of them
    beams: int = 4  # translation: hypotheses of the beam search; 1 is greedy
    length_penalty: float = 0.6  # translation: 0 prefers short translations, 1 and more long ones
    eval_batches: int = 20  # batches of held-out data at each evaluation; 0 means all of it
    log_every: int = 10  # steps between lines
    save_every: int = 200  # steps between checkpoints; one is always written at the end
    out_dir: str = "out"  # checkpoints and log
    init_from: str = "scratch"  # scratch; resume (the newest checkpoint in out_dir); out_dir of a dense run, or of a RoBERTa to fine-tune; gpt2
    eval_only: bool = False  # evaluate the newest checkpoint and leave
    sample: str = ""  # a prompt for the newest checkpoint, then leave
    sample_tokens: int = 120  # how much to sample
    temperature: float = 0.8  # of sampling; 0 is greedy
    top_k: int = 50  # sample from the k likeliest tokens; 0 means all
    # The machine
    device: str = ""  # cpu, cuda, cuda:1; "" means a GPU if there is one
    dtype: str = ""  # float32 or bfloat16; "" means bfloat16 on a GPU that can
    compile: bool = False  # torch.compile everything but the dispatch
    ep: int = 0  # expert-parallel processes; 0 means as many as divide both the processes and the experts
    ranks_per_node: int = 0  # processes per node; 0 asks torchrun; smaller values play several nodes on one machine
    two_level: bool = False  # all-to-all inside nodes first, then between them
    shard_by_domain: bool = False  # each node reads its own domain of the corpus (locality-aware gates need that)
    timeout: int = 600  # seconds until a collective that hangs is given up


# Where an objective wants other defaults than the ones above. Flags on the command line win.
DEFAULTS = {
    "gpt": dict(dataset="stdlib"),
    "roberta": dict(dataset="stdlib"),
    # GLUE's place in the paper, on data that every Python has. Without --init_from it learns from scratch, to compare
    "classify": dict(dataset="stdlib/packages", max_steps=200, learning_rate=5e-4, dropout=0.1, out_dir="out-classify"),
    "translation": dict(dataset="grammar", block_size=64, batch_size=64, label_smoothing=0.1, n_layer=2),
}

# ---------------------------------------------------------------------------------------------------------------------
# The command line


def closest(word, words):
    hit = difflib.get_close_matches(word, words, 1)
    return f" (did you mean {hit[0]}?)" if hit else ""


def help_text():
    """Every field of Config with its default and the comment that stands beside it."""
    lines = [__doc__.strip(), ""]
    for line in inspect.getsource(Config).splitlines():
        if m := re.match(r"    (\w+): (\w+) = (.*?)  # (.*)", line):
            lines.append(f"  --{m[1]}={m[3]}".ljust(34) + m[4])
        elif m := re.match(r"    # (.*)", line):
            lines.append(f"\n{m[1]}")
    return "\n".join(lines)


def parse(argv):
    """["--name=value", ...] -> {name: value} with the types of Config. ValueError, one line, for anything else."""
    kinds = {f.name: f.type if isinstance(f.type, type) else eval(f.type) for f in dataclasses.fields(Config)}
    given = {}
    for arg in argv:
        name, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in kinds:
            raise ValueError(f"unknown argument {arg}{closest(name, kinds)}; flags look like --name=value, --help lists them")
        kind = kinds[name]
        if not equals and kind is not bool:
            raise ValueError(f"--{name} needs a value: --{name}=VALUE ({kind.__name__})")
        try:
            given[name] = {"": True, "true": True, "1": True, "false": False, "0": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise ValueError(f"--{name}={text} is not of type {kind.__name__}; the default is {getattr(Config, name)!r}") from None
    return given


def configure(given, base=None):
    """Config from flags, on top of `base` (a checkpoint's config, as a dict) or of the objective's defaults."""
    objective = given.get("objective", (base or {}).get("objective", Config.objective))
    one_of = dict(objective=list(DEFAULTS), schedule=["cosine", "inverse_sqrt"], activation=["gelu", "gelu_tanh"], permute_schedule=["corrected", "official"],
                  drop_order=["", "arrival", "choice", "score", "random"], dtype=["", "float32", "bfloat16"])  # fmt: skip
    for name, allowed in one_of.items():
        if given.get(name, "") not in [*allowed, ""]:
            raise ValueError(f"--{name}={given[name]} is unknown{closest(given[name], allowed)}; choose from {', '.join(filter(None, allowed))}")
    cfg = Config(**{**DEFAULTS[objective], **(base or {}), **given})
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{field.name}={value} must be a finite number")
    positive = ("n_layer n_head n_embd block_size n_experts moe_every groups batch_size grad_accum max_steps learning_rate log_every beams "
                "timeout").split()  # fmt: skip
    for name in positive:
        if not getattr(cfg, name) > 0:
            raise ValueError(f"--{name}={getattr(cfg, name)} must be greater than 0")
    not_negative = ("n_hidden expert_hidden k warmup weight_decay grad_clip score_weight distill seed eval_every eval_batches save_every "
                    "sample_tokens temperature top_k ep ranks_per_node").split()  # fmt: skip
    for name in not_negative:
        if getattr(cfg, name) < 0:
            raise ValueError(f"--{name}={getattr(cfg, name)} must not be negative")
    for name in "dropout label_smoothing beta1 beta2 min_lr permute".split():
        if not 0 <= getattr(cfg, name) < 1 and (name, cfg.min_lr) != ("min_lr", 1):
            raise ValueError(f"--{name}={getattr(cfg, name)} must be from 0 to below 1")
    if not 0 <= cfg.length_penalty <= 10 or cfg.bleu_sentences < 0:
        raise ValueError(f"--length_penalty={cfg.length_penalty} must be from 0 to 10 and --bleu_sentences={cfg.bleu_sentences} at least 0")
    for name in "capacity_factor eval_capacity_factor".split():
        if name in given and not getattr(cfg, name) > 0:
            raise ValueError(f"--{name}={getattr(cfg, name)} must be greater than 0 (leave the flag out for no limit)")
    if cfg.gate not in gates():
        raise ValueError(f"--gate={cfg.gate} is unknown{closest(cfg.gate, gates())}; choose from {', '.join(sorted(gates()))}")
    if evomoe.starts_trained(cfg) and not os.path.isdir(cfg.init_from) and not cfg.init_from.startswith("gpt2"):
        raise ValueError(f"--init_from={cfg.init_from} is unknown{closest(cfg.init_from, ['scratch', 'resume', 'gpt2'])}; choose from "
                         "scratch, resume, gpt2, or the folder of a dense run")  # fmt: skip
    evomoe.check(cfg)
    if cfg.n_embd % cfg.n_head:
        raise ValueError(f"--n_embd={cfg.n_embd} is not divisible by --n_head={cfg.n_head}")
    if cfg.k > cfg.n_experts:
        raise ValueError(f"--k={cfg.k} experts per token is impossible with --n_experts={cfg.n_experts}")
    if cfg.batch_size % (cfg.grad_accum * cfg.groups):
        raise ValueError(f"--batch_size={cfg.batch_size} is not divisible by grad_accum * groups = {cfg.grad_accum * cfg.groups}")
    return cfg


# ---------------------------------------------------------------------------------------------------------------------
# Data. A batch is a dict of (B, ...) tensors: x and y, y = -1 where there is nothing to predict; domain; src.
# The functions below make the whole global batch of a step from (seed, step), on every process alike: that costs
# little, and the number of targets is then known everywhere without asking anybody.


class Corpus:
    """A prepared folder of data/: meta, tokenizer and memory-mapped splits."""

    def __init__(self, folder, splits=("train", "val", "test")):
        self.folder, self.meta = folder, load_meta(folder)
        self.tok = load_tokenizer(folder)
        self.V = self.meta["vocab_size"]
        self.splits = {s: load_split(folder, self.meta, s) for s in splits if s in self.meta["splits"]}

    def counts(self):
        """(V,) how often each token occurs in the training text."""
        train = self.splits["train"]
        parts = [train] if self.meta["kind"] == "text" else [train.src, train.tgt]
        return sum(np.bincount(p, minlength=self.V) for p in parts)

    def domains(self, split):
        """[(name, start, end), ...]: token ranges of the labelled domains."""
        return [(name, d[0], d[1]) for name, d in self.meta["splits"][split]["domains"].items()]

    @functools.cache
    def pairs(self, split, T):
        """Numbers of the sentence pairs of a split whose sides both have at most T tokens, <|endoftext|> included: a
        longer one is left out, since a sentence cut short would teach and count as a wrong translation."""
        p = self.splits[split]
        fit = np.flatnonzero(np.maximum(np.diff(p.src_idx), np.diff(p.tgt_idx)) <= T)
        if not len(fit):
            raise ValueError(f"{self.folder}: every pair of the {split} split is longer than block_size={T} tokens")
        return fit

    def bytes_per_token(self, split):
        """Original UTF-8 bytes per target token: what turns nats per token into bits per byte."""
        s = self.meta["splits"][split]
        return s["bytes"] / s["tokens"] if "bytes" in s else s["tgt_bytes"] / s["tgt_tokens"]


def blocks(corpus, split, starts, cfg):
    """Windows of block_size + 1 tokens: starts (B,) -> tokens (B, T + 1), domain (B, T)."""
    tokens = corpus.splits[split]
    ends = np.array([end for _, _, end in corpus.domains(split)])
    window = torch.from_numpy(np.stack([tokens[s : s + cfg.block_size + 1] for s in starts]).astype(np.int64))
    domain = torch.from_numpy(np.searchsorted(ends, starts, side="right"))
    return window, domain[:, None].expand(-1, cfg.block_size)


def random_starts(corpus, cfg, rng, n_nodes):
    """(batch_size,) window starts, uniform over all windows that stay inside one domain. With shard_by_domain the rows
    of node v (in rank order) come from domain v % domains only."""
    spans = [(start, end - start - cfg.block_size) for _, start, end in corpus.domains("train")]  # (first, windows)
    windows = np.array([max(n, 0) for _, n in spans])
    if not windows.sum():
        raise ValueError(f"{corpus.folder}: no domain of the train split is longer than one block of {cfg.block_size} tokens")
    weight = windows / windows.sum()
    which = rng.choice(len(spans), size=cfg.batch_size, p=weight)
    if cfg.shard_by_domain:
        which = np.arange(cfg.batch_size) * n_nodes // cfg.batch_size % len(spans)
    return np.array([spans[d][0] + int(u * windows[d]) for d, u in zip(which, rng.random(cfg.batch_size))])


def eval_starts(corpus, split, cfg):
    """Non-overlapping windows of a held-out split, eval_batches * batch_size of them, evenly spread; never random."""
    T = cfg.block_size
    starts = [s for _, start, end in corpus.domains(split) for s in range(start, end - T, T)]
    if not starts:
        raise ValueError(f"{corpus.folder}: no domain of the {split} split is longer than one block of {T} tokens")
    n = min(len(starts), cfg.eval_batches * cfg.batch_size or len(starts))
    return [starts[i * len(starts) // n] for i in range(n)]


def mask_tokens(x, corpus, rng, share=0.15):
    """RoBERTa's dynamic masking: of 15 % of the ordinary tokens, 80 % become <|mask|>, 10 % a random ordinary token,
    10 % stay. x (B, T) -> corrupted x, y with -1 where nothing is predicted. Special tokens are never predicted."""
    ordinary, tok = x < corpus.tok.eot, corpus.tok  # the special tokens are the last ids, <|endoftext|> first
    u, kind = (torch.from_numpy(rng.random(x.shape)) for _ in range(2))
    picked = ordinary & (u < share)
    if not picked.any():  # a batch without a target has no loss: predict the token that came closest
        picked.view(-1)[torch.where(ordinary, u, 2.0).argmin()] = bool(ordinary.any())
    random_token = torch.from_numpy(rng.integers(0, tok.eot, x.shape))
    corrupted = torch.where(kind < 0.8, tok.mask, torch.where(kind < 0.9, random_token, x))
    return torch.where(picked, corrupted, x), torch.where(picked, x, -1)


def text_batch(corpus, split, starts, cfg, rng):
    """GPT: predict the next token. RoBERTa: predict masked tokens. Classification: y (B, 1) is the domain, which the
    gates then must not be told."""
    window, domain = blocks(corpus, split, starts, cfg)
    if cfg.objective == "classify":
        return dict(x=window[:, :-1], y=domain[:, :1].clone())
    if cfg.objective == "gpt":
        return dict(x=window[:, :-1], y=window[:, 1:].clone(), domain=domain)
    x, y = mask_tokens(window[:, :-1], corpus, rng)
    return dict(x=x, y=y, domain=domain)


def pair_batch(corpus, split, which):
    """Translation: sentence pairs `which` -> src (B, S), x (B, T) = <|bos|> + target, y (B, T) = target +
    <|endoftext|>, padded to the longest of the batch."""
    p, tok = corpus.splits[split], corpus.tok
    src = [torch.from_numpy(p.src[p.src_idx[i] : p.src_idx[i + 1]].astype(np.int64)) for i in which]
    tgt = [torch.from_numpy(p.tgt[p.tgt_idx[i] : p.tgt_idx[i + 1]].astype(np.int64)) for i in which]
    x = [torch.cat([torch.tensor([tok.bos]), t[:-1]]) for t in tgt]
    return dict(src=pad(src, tok.pad), x=pad(x, tok.pad), y=pad(tgt, -1))


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
        raise ValueError(f"{corpus.folder} has {len(fit)} training pairs, less than one batch of {batch_size}")
    rng = np.random.default_rng([seed, epoch])
    order = fit[rng.permutation(len(fit))[: n * batch_size]]
    length = np.diff(p.src_idx)[order] + np.diff(p.tgt_idx)[order]
    run = np.arange(len(order)) // (50 * batch_size)
    return rng.permutation(order[np.lexsort((length, run))].reshape(n, batch_size))


def train_batch(corpus, cfg, step, n_nodes=1):
    """The global batch of a step: (batch_size, ...) tensors. A function of (seed, step) alone."""
    rng = np.random.default_rng([cfg.seed, step])
    if cfg.objective == "translation":
        epoch, i = divmod(step, max(1, len(corpus.pairs("train", cfg.block_size)) // cfg.batch_size))
        pairs = bucketed_pairs(corpus, cfg.batch_size, cfg.block_size, cfg.seed, epoch)[i]
        return pair_batch(corpus, "train", rng.permutation(pairs))
    return text_batch(corpus, "train", random_starts(corpus, cfg, rng, n_nodes), cfg, rng)


def micro_batches(batch, cfg, mesh, device):
    """Cut the global batch into grad_accum micro-batches and take this rank's rows of each, in rank order."""
    size = cfg.batch_size // cfg.grad_accum
    for m in range(cfg.grad_accum):
        rows = slice(m * size + mesh.rank * size // mesh.world, m * size + (mesh.rank + 1) * size // mesh.world)
        yield {name: t[rows].to(device, non_blocking=True) for name, t in batch.items()}


def eval_batches(corpus, split, cfg):
    """Fixed held-out batches; a last partial one is filled up with rows that count for nothing (y = -1), so that every
    rank has the same number of rows."""
    if cfg.objective == "translation":
        items = corpus.pairs(split, cfg.block_size).tolist()
        items, make = items[: cfg.eval_batches * cfg.batch_size or None], lambda rows, rng: pair_batch(corpus, split, rows)
    else:
        items = eval_starts(corpus, split, cfg)
        make = lambda rows, rng: text_batch(corpus, split, rows, cfg, rng)
    for i in range(0, len(items), cfg.batch_size):
        rows = items[i : i + cfg.batch_size]
        batch = make(rows + [rows[0]] * (cfg.batch_size - len(rows)), np.random.default_rng([0, i]))
        batch["y"][len(rows) :] = -1
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Model, loss, evaluation


def build_model(cfg, corpus, mesh, n_experts, n_domains=0):
    """The model of an objective with n_experts experts per MoE layer (the curriculum changes that number). n_domains: of
    the corpus that a classifier was pre-trained on."""
    cfg = dataclasses.replace(cfg, n_experts=n_experts)
    more = dict(mesh=mesh, counts=corpus.counts() if "counts" in inspect.signature(gates()[cfg.gate]).parameters else None)
    if cfg.objective == "translation":
        model = Translator(cfg, corpus.V, n_domains=2, pad_id=corpus.tok.pad, **more)
    else:
        labels = len(corpus.domains("train"))
        more["n_domains"] = labels if cfg.objective != "classify" else n_domains or 1
        if cfg.objective != "gpt":
            more |= dict(mask_id=corpus.tok.mask, n_classes=labels if cfg.objective == "classify" else 0)
        model = (GPT if cfg.objective == "gpt" else RoBERTa)(cfg, corpus.V, **more)
    return model.to(mesh.device)


def make_optimizer(model, cfg):
    """AdamW; weight decay on matrices only, and not in gates, whose splits it would soften (COMET, DSelect-k). Frozen
    parameters stay out: Adam moves a parameter with zero gradient."""
    decay, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = p.dim() >= 2 and ".gate." not in name and not name.endswith((".b1", ".b2", "wpe.weight"))
            (decay if matrix else rest).append(p)
    groups = [dict(params=decay, weight_decay=cfg.weight_decay), dict(params=rest, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)


def sample_losses(model, corpus, cfg, device, n=256):
    """The mean loss of each of n training sequences, one graph at a time: what evomoe.importance wants."""
    for step in range(math.ceil(n / cfg.batch_size)):
        batch = train_batch(corpus, cfg, step)
        for i in range(min(n - step * cfg.batch_size, cfg.batch_size)):
            nll = forward(model, {name: t[i : i + 1].to(device) for name, t in batch.items()})[0]
            if nll.numel():  # a short sequence may have no masked token
                yield nll.mean()


def learning_rate(step, cfg):
    """Linear warmup to the peak, then cosine to min_lr * peak at max_steps, or peak * sqrt(warmup / step)."""
    if step < cfg.warmup:
        return cfg.learning_rate * (step + 1) / cfg.warmup
    if cfg.schedule == "inverse_sqrt":
        return cfg.learning_rate * (max(cfg.warmup, 1) / (step + 1)) ** 0.5
    t = min(1.0, (step - cfg.warmup) / max(1, cfg.max_steps - cfg.warmup))
    return cfg.learning_rate * (cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * t)))


def forward(model, batch, label_smoothing=0.0):
    """-> nll (M,) of each target, smoothed (M,) what is trained on, pick (B, T) bool where the targets are, aux.
    Only positions with a target (y >= 0) meet the output layer."""
    inputs = {name: t for name, t in batch.items() if name != "y"}
    pick = batch["y"] >= 0
    logits, aux = model(**inputs, pick=pick)  # (M, V)
    logits, y = logits.float(), batch["y"][pick]
    nll = F.cross_entropy(logits, y, reduction="none")
    smoothed = F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing) if label_smoothing else nll
    return nll, smoothed, pick, aux


def score_function_term(log_prob, nll, pick, n_global, mesh):
    """The gradient that reaches a sampling gate (REINFORCE): sum over sequences of advantage * log p(its choices) / all.

    log_prob (B,) summed over a sequence's tokens and layers; the advantage is the sequence's mean loss minus the mean
    of the other sequences' (leave one out). Exact for independent data points (tests/); in a deep network, where a
    token's choice also moves other tokens' losses, a heuristic.
    """
    rows = pick.nonzero()[:, 0]
    loss = torch.zeros_like(log_prob).index_add(0, rows, nll.detach().to(log_prob.dtype))
    loss = loss / pick.sum(1).clamp(min=1)  # (B,)
    others = (mesh.all_reduce(loss.sum()) - loss) / max(1, n_global - 1)
    return ((loss - others) * log_prob).sum() / n_global


def loss_weights(model):
    """{aux name: weight} of the model's gates (all layers have the same kind of gate)."""
    return {name: w for gate in model.gates() for name, w in gate.weights.items()}


@torch.no_grad()
def evaluate(model, corpus, split, cfg, mesh, autocast):
    """Held-out task loss. -> {"loss": nats per target, "accuracy", "bpb": bits per byte of the original text (GPT and
    translation), "loss_DOMAIN"}. Collective: every rank calls it and gets the same numbers."""
    model.eval()
    names = [name for name, _, _ in corpus.domains(split)] if corpus.meta["kind"] == "text" else ["all"]
    total = torch.zeros(len(names), 3, dtype=torch.float64, device=mesh.device)  # loss, correct, targets per domain
    whole = dataclasses.replace(cfg, grad_accum=1)
    for batch in eval_batches(corpus, split, cfg):
        (batch,) = micro_batches(batch, whole, mesh, mesh.device)
        with autocast:
            inputs = {name: t for name, t in batch.items() if name != "y"}
            pick = batch["y"] >= 0
            logits = model(**inputs, pick=pick)[0].float()
        y = batch["y"][pick]
        values = torch.stack([F.cross_entropy(logits, y, reduction="none"), (logits.argmax(1) == y).float(), torch.ones_like(y, dtype=torch.float)], 1)
        domain = batch["domain"][pick] if "domain" in batch else y if cfg.objective == "classify" else torch.zeros_like(y)
        total.index_add_(0, domain, values.double())
    model.train()
    total = mesh.all_reduce(total)
    loss, correct, n = total.sum(0).tolist()
    result = {"loss": loss / n, "accuracy": correct / n}
    if cfg.objective in ("gpt", "translation"):
        result["bpb"] = loss / n / math.log(2) / corpus.bytes_per_token(split)
    if len(names) > 1:
        result |= {f"loss_{name}": (l / max(c, 1)) for name, (l, _, c) in zip(names, total.tolist())}
    return result


def majority(corpus, split, cfg):
    """The share of the most frequent class among the passages of a split: the accuracy of always guessing that one."""
    ends = [end for _, _, end in corpus.domains(split)]
    classes = np.searchsorted(ends, eval_starts(corpus, split, dataclasses.replace(cfg, eval_batches=0)), side="right")
    return np.bincount(classes).max() / len(classes)


def unigram_loss(corpus, split):
    """Nats per token of a model that knows only how frequent tokens are: what any model must beat."""
    train, held = (corpus.splits[s] if corpus.meta["kind"] == "text" else corpus.splits[s].tgt for s in ("train", split))
    p = np.bincount(train, minlength=corpus.V) + 1.0
    p /= p.sum()
    return float(-np.log(p)[np.asarray(held)].mean())


def show_sample(model, corpus, cfg, mesh, prompt, autocast):
    """What the model makes of a prompt (None: of one of our own), as text that a person can judge. Collective.
    ValueError, one line, for a prompt that cannot be used."""
    model.eval()
    if cfg.objective == "translation":
        ids = corpus.tok.encode(prompt.strip())
        check_prompt(prompt, ids, cfg.block_size - 1)
        text = translate(model, corpus, [ids + [corpus.tok.eot]], cfg, mesh, autocast)[0]
    elif cfg.objective == "roberta":
        text = fill_prompt(model, corpus, cfg, mesh, prompt, autocast) if prompt is not None else fill_held_out(model, corpus, cfg, mesh, autocast)
    elif cfg.objective == "classify":
        text = show_classes(model, corpus, cfg, mesh, prompt, autocast)
    else:
        text = continue_text(model, corpus, cfg, mesh, prompt, autocast)
    model.train()
    return text


def check_prompt(prompt, ids, most):
    """ValueError for a prompt that is empty or has more than `most` tokens."""
    if not prompt.strip():
        raise ValueError('--sample="" is empty: give it a text')
    if len(ids) > most:
        raise ValueError(f"--sample has {len(ids)} tokens, the model takes {most}: shorten it")


def continue_text(model, corpus, cfg, mesh, prompt, autocast):
    """GPT: the prompt and what follows it; a prompt longer than the block is read from its end."""
    rng = torch.Generator(mesh.device).manual_seed(cfg.seed)
    ids = corpus.tok.encode(prompt or "") or [corpus.tok.eot]
    x = torch.tensor([ids], device=mesh.device)
    with autocast:
        y = model.generate(x, cfg.sample_tokens, cfg.temperature, cfg.top_k or None, corpus.tok.eot, rng)
    return corpus.tok.decode([t for t in y[0].tolist() if t < corpus.tok.eot])


def fill_masks(model, corpus, ids, mesh, autocast, truth=None):
    """RoBERTa: token ids -> the text with [1], [2], ... where the masks are, and the five likeliest tokens for each.
    truth: the ids without masks, if they are known."""
    x = torch.tensor([ids], device=mesh.device)
    with autocast:
        logits = model(x, pick=x == corpus.tok.mask)[0].float()[:, : corpus.tok.eot]  # (masks, ordinary tokens)
    p, guess = (t.tolist() for t in logits.softmax(1).topk(5))
    holes = [i for i, token in enumerate(ids) if token == corpus.tok.mask]
    text = "".join(f"{corpus.tok.decode(ids[a + 1 : b])} [{n}]" for n, (a, b) in enumerate(zip([-1, *holes], holes), 1))
    text += corpus.tok.decode(ids[holes[-1] + 1 :]) + "\n"
    for n, (i, share, tokens) in enumerate(zip(holes, p, guess), 1):
        text += f"\n[{n}]".ljust(6) + (f"{'= ' if tokens[0] == truth[i] else '  '}{corpus.tok.decode([truth[i]])!r:16} " if truth else "")
        text += "  ".join(f"{corpus.tok.decode([token])!r} {100 * q:.0f} %" for token, q in zip(tokens, share))
    return text


def fill_prompt(model, corpus, cfg, mesh, prompt, autocast):
    """A prompt with one or more <mask>; a mask takes the place of a word with the space before it, as tokens do."""
    pieces = re.split(r" ?<mask>", prompt)
    ids = [token for piece in pieces for token in [corpus.tok.mask, *corpus.tok.encode(piece)]][1:]
    check_prompt(prompt, ids, cfg.block_size)
    if len(pieces) == 1:
        raise ValueError("--sample has nothing to fill: write <mask> where a word is missing")
    return fill_masks(model, corpus, ids, mesh, autocast)


def fill_held_out(model, corpus, cfg, mesh, autocast):
    """A held-out passage of each domain with a tenth of its words masked, the masked words, and the guesses."""
    rng, texts = np.random.default_rng(cfg.seed), []
    split = "val" if "val" in corpus.splits else "test"
    for name, start, end in corpus.domains(split):
        start = (start + end) // 2
        truth = corpus.splits[split][start : min(start + cfg.block_size, end)].tolist()
        words = [i for i, token in enumerate(truth) if re.fullmatch(" [A-Za-z]{2,}", corpus.tok.decode([token]))]
        words = words or [i for i, token in enumerate(truth) if token < corpus.tok.eot]
        hidden = rng.permutation(words)[: 1 + len(words) // 10].tolist()
        ids = [corpus.tok.mask if i in hidden else token for i, token in enumerate(truth)]
        texts.append(f"({name}; masked word, = where the first guess is right, guesses)\n" + fill_masks(model, corpus, ids, mesh, autocast, truth))
    return "\n\n".join(texts)


def show_classes(model, corpus, cfg, mesh, prompt, autocast):
    """The likeliest classes of the prompt, or of a held-out passage of each class."""
    names, split = [name for name, _, _ in corpus.domains("train")], "val" if "val" in corpus.splits else "test"
    if prompt is not None:
        passages = {"": corpus.tok.encode(prompt)}
        check_prompt(prompt, passages[""], cfg.block_size)
    else:
        middle = {name: (start + end) // 2 for name, start, end in corpus.domains(split)}
        passages = {name: corpus.splits[split][i : i + cfg.block_size].tolist() for name, i in middle.items()}
    text = []
    for name, ids in passages.items():
        with autocast:
            p = model(torch.tensor([ids], device=mesh.device))[0][0, 0].float().softmax(0)
        best = p.argsort(descending=True)[:3].tolist()
        quote = f"   {corpus.tok.decode(ids)[:80]!r} ..." if name else ""
        text.append(f"{name:16}-> " + "  ".join(f"{names[i]} {100 * p[i]:.0f} %" for i in best) + quote)
    return "\n".join(text)


def translate(model, corpus, sentences, cfg, mesh, autocast):
    """Lists of source token ids, each ended by <|endoftext|> -> their translations as text, in the same order. Batches of
    similar length; each rank decodes its rows of a batch, and all get all. Collective."""
    tok, texts = corpus.tok, [""] * len(sentences)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    for i in range(0, len(order), cfg.batch_size):
        which = order[i : i + cfg.batch_size]
        rows = which + which[:1] * (-len(which) % mesh.world)  # as many for every rank
        mine = slice(mesh.rank * len(rows) // mesh.world, (mesh.rank + 1) * len(rows) // mesh.world)
        src = pad([torch.tensor(sentences[j]) for j in rows], tok.pad).to(mesh.device)
        y = src.new_zeros(len(rows), cfg.block_size)
        y[mine] = tok.eot
        with autocast:
            best, _ = model.translate(src[mine], tok.bos, tok.eot, cfg.beams, cfg.length_penalty)
        y[mine, : best.shape[1]] = best
        for j, ids in zip(which, mesh.all_reduce(y).tolist()):  # zero where another rank's rows are
            texts[j] = tok.decode(ids[: (ids + [tok.eot]).index(tok.eot)])
    return texts


def score_translations(model, corpus, split, n, cfg, mesh, autocast):
    """Translate n sentences of a split (0: all), evenly spread. -> {"bleu": 0 to 100, "exact": share of translations that
    equal the reference, "sentences"}, and some of them as text. Collective."""
    p, fit = corpus.splits[split], corpus.pairs(split, cfg.block_size)
    which = [fit[i * len(fit) // n] for i in range(n)] if 0 < n < len(fit) else fit
    sources, targets = ([side[idx[i] : idx[i + 1]].tolist() for i in which] for side, idx in (p[:2], p[2:]))
    model.eval()
    texts = translate(model, corpus, sources, cfg, mesh, autocast)
    model.train()
    references = [corpus.tok.decode(t[:-1]) for t in targets]
    right = [r == t for r, t in zip(references, texts)]
    shown = [f"    {corpus.tok.decode(sources[i][:-1])}\n{'  = ' if right[i] else '    '}{references[i]}" + f"\n -> {texts[i]}" * (not right[i])
             for i in range(0, len(texts), -(-len(texts) // 6))]  # fmt: skip
    scores = {"bleu": corpus_bleu(texts, references), "exact": sum(right) / len(texts), "sentences": len(texts)}
    return scores, "source, reference (= the translation too), -> translation\n\n" + "\n\n".join(shown)


# ---------------------------------------------------------------------------------------------------------------------
# What the log shows


def layer_stats(model, mesh):
    """Numbers about the last training call, over all layers and ranks: experts per token, share of dropped rows, load of
    each expert (first MoE layer), lightest and heaviest load relative to the mean, traffic in tokens."""
    if not model.moes():
        return {}
    loads = mesh.all_reduce(torch.stack([m.stats["asked"] for m in model.moes()]).double())  # (layers, E), before drops
    kept = mesh.all_reduce(sum(m.stats["load"].sum() for m in model.moes()).double())
    tokens = mesh.all_reduce(torch.tensor(float(sum(m.stats["tokens"] for m in model.moes())), device=mesh.device))
    relative = loads / loads.mean(1, keepdim=True).clamp(min=1e-9)
    out = {
        "experts_per_token": float(kept / tokens.clamp(min=1)),
        "dropped": float(1 - kept / loads.sum().clamp(min=1)),
        "load_min": float(relative.min()),
        "load_max": float(relative.max()),
        "load": [round(v, 3) for v in relative[0].tolist()],
    }
    if mesh.world > 1:
        width = 2 if torch.is_autocast_enabled(mesh.device.type) else 4
        traffic = [mesh.traffic(m.stats["table"], width * model.cfg.n_embd) for m in model.moes()]
        out |= {name: int(mesh.all_reduce(sum(t[name] for t in traffic))) for name in traffic[0]}
    return out


def bar(load):
    """A small picture of the experts' loads; the fair share is half height."""
    return "".join(" ▁▂▃▄▅▆▇█"[min(8, round(4 * v))] for v in load)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def on_main(mesh, action):
    """Do something on rank 0 only and give all ranks its value, or its error: they stay together either way."""
    value = error = None
    if mesh.main:
        try:
            value = action()
        except (ValueError, OSError) as e:
            error = str(e)
    value, error = mesh.from_main((value, error))
    if error:
        raise ValueError(error)
    return value


def diverged(what, step, saved):
    """The error that ends a run whose numbers are no longer finite; saved: step of its newest checkpoint, or None."""
    last = f"the last good checkpoint is step {saved} (--init_from=resume)" if saved is not None else "there is no checkpoint yet"
    return ValueError(f"{what} not finite at step {step}; {last}; try a lower --learning_rate")


def save_checkpoint(model, optimizer, cfg, step, mesh, saved=None):
    """out_dir/ckpt_STEP.pt, experts whole, written atomically; the last two are kept. Weights that are not finite are
    not saved: ValueError names the checkpoint before (step `saved`)."""
    state = dist.full_state(model, optimizer, mesh)
    if not all(t.isfinite().all() for t in state["model"].values()):  # the same on every rank
        raise diverged("the weights are", step, saved)
    state |= {"step": step, "config": dataclasses.asdict(cfg), "launch": os.getppid(), "n_domains": model.n_domains}

    def write():
        dist.save(os.path.join(cfg.out_dir, f"ckpt_{step:06d}.pt"), state)
        dist.prune(cfg.out_dir, keep=2)

    on_main(mesh, write)


def check_flags(given, fields, where):
    """ValueError if flags contradict the values that a checkpoint needs."""
    differ = [f"{n}={given[n]!r} (checkpoint: {v!r})" for n, v in fields.items() if n in given and given[n] != v]
    if differ:
        raise ValueError(f"{where} is from another config: {', '.join(differ)}; drop these flags or choose another --out_dir")


def load_checkpoint(given, mesh, out_dir):
    """The newest intact checkpoint in out_dir. Flags that would change the model must agree with it."""
    path = on_main(mesh, lambda: dist.latest(out_dir))
    if path is None:
        raise ValueError(f"no checkpoint (ckpt_*.pt) in {out_dir}: train first, or name another --out_dir")
    state = dist.load(path)
    if not isinstance(state, dict) or not {"model", "optimizer", "step", "config"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint of train.py")
    fixed = "objective dataset n_layer n_head n_embd n_hidden block_size bias n_experts moe_every gate k gate_args permute expert_hidden".split()
    check_flags(given, {name: state["config"][name] for name in fixed if name in state["config"]}, path)
    return path, state


def began_here(out_dir):
    """When a worker dies torchrun starts all of them again, with the flags of the first start. True if this is such a
    restart and the checkpoints in out_dir are those of this launch, not of a run before it: then it is resumed."""
    path = dist.latest(out_dir) if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else None
    return path is not None and dist.load(path).get("launch") == os.getppid()


def load_pretrained(given, mesh, out_dir):
    """The newest checkpoint of a RoBERTa to fine-tune -> its state, the fields of its config that the classifier takes
    over. Its curriculum is over: the gates stay as they are at its end."""
    others = {name: value for name, value in given.items() if name not in ("objective", "dataset")}
    path, state = load_checkpoint(others, mesh, out_dir)
    if state["config"]["objective"] != "roberta":
        raise ValueError(f"--init_from={out_dir}: {path} is a model for {state['config']['objective']}, fine-tuning needs --objective=roberta")
    fields = ("n_layer n_head n_embd n_hidden block_size bias activation moe_every gate k gate_args capacity_factor "
              "eval_capacity_factor drop_order expert_hidden tau_max tau_min tau_until hard_at seed").split()  # fmt: skip
    n_experts = 1 if evomoe.is_dense(state) else state["config"]["n_experts"]
    return state, {name: state["config"][name] for name in fields} | {"n_experts": n_experts}


# ---------------------------------------------------------------------------------------------------------------------
# The run


def prepare(cfg, mesh):
    """The corpus of this run; the ones that need no download are prepared on the way."""
    folder = cfg.dataset if os.path.isdir(cfg.dataset) else os.path.join(HERE, "data", cfg.dataset)
    script = cfg.dataset.split("/")[0]  # stdlib/packages is made by data/stdlib/prepare.py
    if not os.path.isdir(folder) and not os.path.isdir(os.path.join(HERE, "data", script)):
        have = sorted(d for d in os.listdir(os.path.join(HERE, "data")) if os.path.exists(os.path.join(HERE, "data", d, "prepare.py")))
        raise ValueError(f"--dataset={cfg.dataset}: no such folder; there are: {', '.join(have)}")

    def make():
        parent = os.path.join(HERE, "data", script)
        if script in ("stdlib", "grammar") and not os.path.exists(os.path.join(parent, "meta.json")):
            print(f"preparing data/{script} (a few seconds, once)", flush=True)
            if subprocess.run([sys.executable, os.path.join(parent, "prepare.py")]).returncode:
                raise ValueError(f"data/{script}/prepare.py failed: see above")

    on_main(mesh, make)
    corpus = Corpus(folder)
    kind = "translation" if cfg.objective == "translation" else "text"
    if corpus.meta["kind"] != kind:
        raise ValueError(f"--dataset={cfg.dataset} is a corpus of kind {corpus.meta['kind']}; --objective={cfg.objective} needs {kind}")
    if "train" not in corpus.splits or len(corpus.splits) < 2:
        raise ValueError(f"--dataset={cfg.dataset} has the splits {', '.join(corpus.splits)}; it needs train, and val or test")
    return corpus


def check_device(name):
    """ValueError for a device that is not there."""
    if not re.fullmatch(r"(cpu|cuda|cuda:\d+)?", name):
        raise ValueError(f"--device={name} is unknown; choose from cpu, cuda, cuda:0, cuda:1, ...")
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device={name}: there are {torch.cuda.device_count()} usable GPUs here; --device=cpu always works")


def check_causality(model, cfg, say):
    """Refuse gates that look at later tokens even at evaluation; say it in one line when training does."""
    if cfg.n_experts == 1 or cfg.objective in ("roberta", "classify"):
        return
    gate = model.gates()[0] if model.gates() else gates()[cfg.gate]  # before the spawn there are none yet
    order = cfg.drop_order or gate.drop_order
    what = f"--gate={cfg.gate} (drop order: {order})"
    if (gate.causal == "never" or cfg.eval_capacity_factor and order != "arrival") and not cfg.insist:
        raise ValueError(f"{what} looks at later tokens, even at evaluation: it cannot run in a causal model (--insist to do it all the same)")
    if gate.causal != "always" or (cfg.capacity_factor and order != "arrival"):
        say(f"note: {what} looks at later tokens in training; evaluation does not")


def main(argv):
    given = parse(argv)
    check_device(given.get("device", ""))
    resume = given.get("init_from") == "resume" or given.get("eval_only") or given.get("sample") is not None
    cfg = configure(given)  # the first errors come before anything is started
    tune = cfg.objective == "classify" and cfg.init_from != "scratch"
    sizes = (1, 0) if resume or tune else (cfg.n_experts, cfg.ep)  # a checkpoint says later how many experts there are
    mesh = dist.init(*sizes, cfg.ranks_per_node, cfg.timeout, cfg.device or None, cfg.two_level)
    say = print if mesh.main else lambda *a, **k: None
    state, pretrained, first = None, None, 0
    if not resume and on_main(mesh, lambda: began_here(cfg.out_dir)):
        given["init_from"], resume = "resume", True
    if resume:
        path, state = load_checkpoint(given, mesh, cfg.out_dir)
        of_this_start = "init_from eval_only sample device ep ranks_per_node two_level timeout".split()
        known = {f.name for f in dataclasses.fields(Config)} - set(of_this_start)
        cfg, first = configure(given, {name: v for name, v in state["config"].items() if name in known}), state["step"]
        say(f"loaded {path} (step {first})")
    elif tune:
        pretrained, fields = load_pretrained(given, mesh, cfg.init_from)
        cfg = configure(given, fields)
        say(f"fine-tuning the RoBERTa of {cfg.init_from}")
    elif evomoe.starts_trained(cfg):
        fields, start = evomoe.trained(cfg.init_from)
        check_flags(given, fields, cfg.init_from)
        cfg = configure(given, fields)
        say(f"starting from the weights of {cfg.init_from}")
    if mesh.world > 1 and (state or pretrained):
        mesh = dist.make_mesh(mesh.rank, mesh.world, cfg.n_experts, cfg.ep, mesh.local, mesh.device, cfg.two_level, cfg.timeout)
    if cfg.distill and not cfg.teacher:
        cfg.teacher = cfg.init_from
    if (cfg.batch_size // cfg.grad_accum) % mesh.world:
        raise ValueError(f"--batch_size={cfg.batch_size} / grad_accum={cfg.grad_accum} is not divisible by the {mesh.world} processes")
    corpus = prepare(cfg, mesh)
    device = mesh.device
    dtype = cfg.dtype or ("bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32")
    autocast = torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    torch.manual_seed(cfg.seed)

    dense = evomoe.is_dense(state) if state else evomoe.starts_dense(cfg)
    n_domains = (state or pretrained or {}).get("n_domains", 0)
    model = build_model(cfg, corpus, mesh, 1 if dense else cfg.n_experts, n_domains)
    check_causality(model, cfg, say)
    optimizer = make_optimizer(model, cfg)
    if state:
        dist.load_state(model, optimizer, state, mesh)
    elif pretrained:
        head = {name: t for name, t in dist.named_tensors(model).items() if name.startswith("classifier")}
        dist.load_state(model, None, {"model": pretrained["model"] | head}, mesh)
    elif evomoe.starts_trained(cfg):
        evomoe.load_weights(model, start, mesh)
    teacher = None
    if cfg.distill:
        teacher = build_model(cfg, corpus, mesh, 1).eval().requires_grad_(False)
        evomoe.load_weights(teacher, evomoe.trained(cfg.teacher)[1], mesh)
    at = lambda step: cfg.max_steps if cfg.objective == "classify" else step  # fine-tuning: the curriculum is over
    evomoe.set_phase(model, at(first), cfg)
    total, active = model.n_params()
    say(f"{cfg.objective} on {cfg.dataset}: {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active per token, "
        f"{cfg.n_experts} experts ({cfg.gate}), {mesh.world} process(es), {device.type}, {dtype}")  # fmt: skip

    if given.get("sample") is not None:
        say(show_sample(model, corpus, cfg, mesh, cfg.sample, autocast))
        return mesh.close()
    if cfg.objective == "translation":
        sizes = {split: (pairs["pairs"], len(corpus.pairs(split, cfg.block_size))) for split, pairs in corpus.meta["splits"].items()}
        if long := [f"{n - fit:,d} of {n:,d} {split} pairs" for split, (n, fit) in sizes.items() if fit < n]:
            say(f"left out, longer than block_size={cfg.block_size} tokens: {', '.join(long)}")
    if cfg.eval_only:
        for split in [s for s in ("val", "test") if s in corpus.splits]:
            result = evaluate(model, corpus, split, dataclasses.replace(cfg, eval_batches=given.get("eval_batches", 0)), mesh, autocast)
            if cfg.objective == "translation":
                result |= score_translations(model, corpus, split, given.get("bleu_sentences", 0), cfg, mesh, autocast)[0]
            say(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()))
        return mesh.close()
    if table := evomoe.show(cfg):
        say(table)
    if dense and cfg.n_experts > 1:
        build_model(cfg, corpus, mesh, cfg.n_experts)  # a wrong gate_args should stop the run now, not at the spawn

    def open_log():
        """Start the log, or cut a resumed one back to the checkpoint's step."""
        os.makedirs(cfg.out_dir, exist_ok=True)
        path = os.path.join(cfg.out_dir, "log.jsonl")
        old = dist.checkpoints(cfg.out_dir)
        if not state and old:
            raise ValueError(f"{cfg.out_dir} holds checkpoints of an earlier run ({old[-1].name}): --init_from=resume continues it, "
                             "another --out_dir starts afresh, or delete them")  # fmt: skip
        lines = []
        if state and os.path.exists(path):
            with open(path) as f:
                lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= first]
        with open(path, "w") as f:
            f.writelines(lines)
        return path

    log_path = on_main(mesh, open_log)

    def log(entry):
        if mesh.main:
            try:
                with open(log_path, "a") as f:
                    f.write(json.dumps(entry) + "\n")
            except OSError as e:
                raise OSError(f"cannot write {log_path}: {e.strerror}. Checkpoints are untouched") from None

    stop = []  # Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint; a second one at once
    if hasattr(signal, "SIGTERM"):
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))

    val = "val" if "val" in corpus.splits else "test"
    if cfg.objective == "classify":
        say(f"to beat: accuracy {majority(corpus, val, cfg):.4f}, the share of the most frequent class")
    else:
        say(f"to beat: {unigram_loss(corpus, val):.3f}, the loss of guessing tokens by frequency")
    model.train()
    compiled = lambda m: torch.compile(m) if cfg.compile and not cfg.distill else m  # a teacher watches through hooks
    net, weights = compiled(model), loss_weights(model)
    started, tick, tokens, saved = time.time(), time.time(), 0, first if state else None
    for step in range(first, cfg.max_steps):
        # 1. schedules
        if dense and cfg.n_experts > 1 and step >= evomoe.spawn_step(cfg):
            grown = build_model(cfg, corpus, mesh, cfg.n_experts)
            score = evomoe.importance(model, sample_losses(model, corpus, cfg, device)) if cfg.spawn == "importance" else None
            new = make_optimizer(grown, cfg)
            evomoe.spawn(model, optimizer, grown, new, cfg, score)
            model, optimizer, net, weights, dense = grown, new, compiled(grown), loss_weights(grown), False
            say(f"step {step:5d} | one expert per layer becomes {cfg.n_experts} ({cfg.spawn}): {model.n_params()[0] / 1e6:.2f} M parameters")
        evomoe.set_phase(model, at(step), cfg)
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # 2. gradients: this rank's share of the global loss, summed over micro-batches and ranks
        torch.manual_seed((cfg.seed * 1_000_003 + step) % 2**63)
        batch = train_batch(corpus, cfg, step, mesh.n_nodes)
        n_targets = max(1, int((batch["y"] >= 0).sum()))
        n_positions = int(batch["live"].sum()) if "live" in batch else batch["x"].numel()
        task, auxes, distilled = torch.zeros((), device=device), {}, torch.zeros(2, device=device)
        for micro in micro_batches(batch, cfg, mesh, device):
            with autocast, evomoe.watch(model if teacher else None) as seen:
                nll, smoothed, pick, aux = forward(net, micro, cfg.label_smoothing)
            loss = smoothed.sum() / n_targets
            if teacher:
                with torch.no_grad(), autocast, evomoe.watch(teacher) as target:
                    forward(teacher, micro)
                terms = evomoe.distillation(seen, target, micro.get("live"), n_positions, n_targets)
                loss = loss + cfg.distill * terms.sum()
                distilled += terms.detach()
            if "log_prob" in aux:
                term = score_function_term(aux.pop("log_prob"), nll, pick, cfg.batch_size // cfg.grad_accum, mesh)
                loss = loss + cfg.score_weight * term / cfg.grad_accum
            loss = loss + sum(weights.get(name, 0) * value for name, value in aux.items()) / cfg.grad_accum
            loss.backward()
            task += nll.detach().sum() / n_targets
            for name, value in aux.items():
                auxes[name] = auxes.get(name, 0) + value.detach() / cfg.grad_accum
        mesh.sync_grads(model)
        norm = mesh.clip_grad_norm(model, cfg.grad_clip)
        # 3. update
        if not torch.isfinite(norm):  # the same number on every rank, so all of them stop
            raise diverged("the loss or its gradient is", step + 1, saved)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for gate in model.gates():
            gate.update()
        tokens += batch["x"].numel()
        done = step + 1
        # 4. tell
        if done % cfg.log_every == 0 or done == 1:
            stats = layer_stats(model, mesh)
            loss = float(mesh.all_reduce(task))
            n = max(1, len(model.moes()))
            extra = {name: float(v) / n for name, v in auxes.items()}  # per layer
            if teacher:
                extra |= dict(zip(("mse", "kl"), mesh.all_reduce(distilled).tolist()))
            phase = evomoe.now(step, cfg)
            flops = model.flops_per_token(stats.get("experts_per_token", 1), batch["x"].shape[1], n_targets / batch["x"].numel())
            now = time.time()
            speed, left = tokens / (now - tick), (now - started) / (done - first) * (cfg.max_steps - done)
            say(f"step {done:5d}/{cfg.max_steps} | loss {loss:.4f}" + "".join(f" | {k} {v:.3f}" for k, v in extra.items() if weights.get(k) or k in ("mse", "kl"))
                + (f" | {phase['phase']} tau {phase['tau']:.2f}" if stats and cfg.gate == "dts" else "")
                + (f" | experts/token {stats['experts_per_token']:.2f} | dropped {stats['dropped']:.1%} | load {bar(stats['load'])} "
                   f"{stats['load_min']:.2f}-{stats['load_max']:.2f}" if stats else "")
                + f" | {flops / 1e6:.2f} MFLOP/token | {speed / 1e3:.1f}k tok/s | {clock(left)} left", flush=True)  # fmt: skip
            log({"step": done, "loss": loss, "lr": lr, "norm": float(norm), **extra, **stats, **phase, "flops_per_token": flops, "tokens_per_s": speed, "seconds": now - started})
            tick, tokens = time.time(), 0
        last, stopping = done == cfg.max_steps, mesh.any(bool(stop))
        if last or (cfg.eval_every and done % cfg.eval_every == 0):
            result = evaluate(model, corpus, val, cfg if not last else dataclasses.replace(cfg, eval_batches=0), mesh, autocast)
            say(f"step {done:5d} | {val} " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()), flush=True)
            log({"step": done, "seconds": time.time() - started} | {f"val_{name}": value for name, value in result.items()})
            tick, tokens = time.time(), 0
        if last or stopping or (cfg.save_every and done % cfg.save_every == 0):
            save_checkpoint(model, optimizer, cfg, done, mesh, saved)
            saved = done
        if stopping:
            say(f"stopped after step {done}; continue with --init_from=resume --out_dir={cfg.out_dir}")
            return mesh.close()

    say(f"\ntrained in {clock(time.time() - started)}; a sample:\n" + "-" * 80)
    if cfg.objective == "translation":
        test = "test" if "test" in corpus.splits else "val"
        scores, text = score_translations(model, corpus, test, cfg.bleu_sentences, cfg, mesh, autocast)
        log({"step": cfg.max_steps} | {f"{test}_{name}": value for name, value in scores.items()})
        say(text + f"\n\n{test}: BLEU {scores['bleu']:.2f}, {scores['exact']:.1%} exactly as the reference ({scores['sentences']} sentences, beam of {cfg.beams})")
    else:
        say(show_sample(model, corpus, cfg, mesh, None, autocast))
    say("-" * 80 + f"\ncheckpoint and log are in {cfg.out_dir}/. Next: --sample=\"your prompt\", --gate=hash, --n_experts=1 "
        "(the dense model), --max_steps=3000, each with its own --out_dir")  # fmt: skip
    mesh.close()


if __name__ == "__main__":
    if "--help" in sys.argv or "-h" in sys.argv:
        print(help_text())
        sys.exit(0)
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")
