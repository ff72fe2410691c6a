"""
Train a mixture-of-experts Transformer: the manual.

    python train.py                                     GPT on Python's own documentation and source, no download
    python train.py --gate=switch --out_dir=out-switch  another gate: every class of router.py, by its name
    python train.py --n_experts=1 --out_dir=out-dense   the dense model of the same active size
    python train.py --objective=roberta --out_dir=out-roberta               masked language modelling
    python train.py --objective=classify --init_from=out-roberta            fine-tune it: which package is a passage from?
    python train.py --objective=translation --out_dir=out-translation       encoder-decoder
    torchrun --nproc_per_node=2 train.py --out_dir=out-2                    the first run on two processes
    python train.py --init_from=resume                  continue after Ctrl-C, a kill or a crash, bit for bit (CPU)
    python train.py --sample="def __init__"             continue a prompt with the newest checkpoint
    python train.py --eval_only                         held-out loss of the newest checkpoint

Flags are the fields of Config below, always --name=value (a bare --flag means true); --help lists them.

Read it in this order: Config, forward, gradients, train, evaluate; the batches are made in data/batches.py. The whole loop is

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

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are then not told apart
    fcntl = None

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors on the CPU: a step is 15 % faster
import torch
import torch.nn.functional as F

import dist
import evomoe
from data.batches import Corpus, eval_batches, eval_starts, majority, micro_batches, train_batch, unigram_loss
from data.samples import score_translations, show_sample
from model import GPT, RoBERTa, Translator
from router import gates

HERE = os.path.dirname(os.path.realpath(__file__))


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
    gate: str = "hash"  # a class of router.py in lower case; hash learns most in a few minutes (other objectives: switch), see the README
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
    learning_rate: float = 4e-3  # peak; 2e-3 to 4e-3 for models as small as this one, 1e-4 to 1e-3 for large ones
    min_lr: float = 0.1  # final learning rate as a share of the peak
    schedule: str = "cosine"  # cosine, or inverse_sqrt (the original Transformer's)
    warmup: int = 200  # steps until the peak, at most half the run; with 50 or 100 the early loss is a matter of luck at this rate
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
    "roberta": dict(dataset="stdlib", n_layer=2, block_size=64, batch_size=64, max_steps=1000, gate="switch"),
    # GLUE's place in the paper, on data that every Python has. Without --init_from it learns from scratch, to compare
    "classify": dict(dataset="stdlib/packages", n_layer=2, block_size=64, batch_size=64, learning_rate=2e-3, warmup=50, dropout=0.1,
                     max_steps=300, gate="switch", out_dir="out-classify"),  # fmt: skip
    "translation": dict(dataset="grammar", block_size=64, batch_size=64, learning_rate=2e-3, label_smoothing=0.1, n_layer=2, max_steps=1200,
                        gate="switch"),  # fmt: skip
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
    lines.append("\nOther defaults by objective")
    lines += [f"  {name}: " + " ".join(f"--{k}={v}" for k, v in more.items()) for name, more in DEFAULTS.items()]
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


def configure(given, base=None, whole=True):
    """Config from flags, on top of `base` (a checkpoint's config, as a dict) or of the objective's defaults. whole=False:
    the rest comes from a checkpoint, so don't check yet whether the fields fit together."""
    objective = given.get("objective", (base or {}).get("objective", Config.objective))
    one_of = dict(objective=list(DEFAULTS), schedule=["cosine", "inverse_sqrt"], activation=["gelu", "gelu_tanh"], permute_schedule=["corrected", "official"],
                  drop_order=["", "arrival", "choice", "score", "random"], dtype=["", "float32", "bfloat16"])  # fmt: skip
    for name, allowed in one_of.items():
        if name in given and given[name] not in allowed:
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
    if cfg.seed >= 2**40:
        raise ValueError(f"--seed={cfg.seed} must be below 2**40")
    if not cfg.out_dir:
        raise ValueError("--out_dir= is empty: name a folder")
    if cfg.gate not in gates():
        raise ValueError(f"--gate={cfg.gate} is unknown{closest(cfg.gate, gates())}; choose from {', '.join(sorted(gates()))}")
    if evomoe.starts_trained(cfg) and not os.path.isdir(cfg.init_from) and not cfg.init_from.startswith("gpt2"):
        raise ValueError(f"--init_from={cfg.init_from} is unknown{closest(cfg.init_from, ['scratch', 'resume', 'gpt2'])}; choose from "
                         "scratch, resume, gpt2, or the folder of a dense run")  # fmt: skip
    if not whole or base is None and evomoe.starts_trained(cfg):
        return cfg
    evomoe.check(cfg)
    if cfg.n_embd % cfg.n_head:
        raise ValueError(f"--n_embd={cfg.n_embd} is not divisible by --n_head={cfg.n_head}")
    if cfg.n_experts > 1 and cfg.moe_every > cfg.n_layer:
        raise ValueError(f"--moe_every={cfg.moe_every} with --n_layer={cfg.n_layer} leaves no layer for a mixture: lower it, or take --n_experts=1")
    if cfg.k and "k" not in inspect.signature(gates()[cfg.gate]).parameters:
        raise ValueError(f"--k={cfg.k}: --gate={cfg.gate} sets the number of experts per token itself; leave --k out")
    if cfg.k > cfg.n_experts:
        raise ValueError(f"--k={cfg.k} experts per token is impossible with --n_experts={cfg.n_experts}")
    if cfg.batch_size % (cfg.grad_accum * cfg.groups):
        raise ValueError(f"--batch_size={cfg.batch_size} is not divisible by grad_accum * groups = {cfg.grad_accum * cfg.groups}")
    return cfg


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
    warmup = min(cfg.warmup, cfg.max_steps // 2)  # a short run should reach its peak, and come down again
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    if cfg.schedule == "inverse_sqrt":
        return cfg.learning_rate * (max(warmup, 1) / (step + 1)) ** 0.5
    t = min(1.0, (step - warmup) / max(1, cfg.max_steps - warmup))
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
    of the other sequences' (leave one out). A sequence counts once, whatever its number of targets. Unbiased, in a deep
    network too, while a sequence's choices move only its own loss and each carries its full log p. With a capacity it is
    a heuristic: whom a choice crowds out has another loss, which moves the baseline, and the weights of router.Skip scale
    outputs instead of losses. tests/test_gates_basic.py enumerates both.
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


def on_all(mesh, action):
    """Do something on every rank; the error of any of them is everybody's: nobody waits for one who has left."""
    value = error = None
    try:
        value = action()
    except (ValueError, OSError) as e:
        error = str(e)
    for rank, error in enumerate(mesh.from_all(error)):
        if error:
            raise ValueError(error if rank == 0 else f"{error} (process {rank})")
    return value


def on_main(mesh, action):
    """Do something on rank 0 only and give all ranks its value, or its error: they stay together either way."""
    return mesh.from_main(on_all(mesh, lambda: action() if mesh.main else None))


def diverged(what, step, saved):
    """The error that ends a run whose numbers are no longer finite; saved: step of its newest checkpoint, or None."""
    last = f"the last good checkpoint is step {saved} (--init_from=resume)" if saved is not None else "there is no checkpoint yet"
    return ValueError(f"{what} not finite at step {step}; {last}; try a lower --learning_rate")


def launch():
    """Which start of torchrun this is: its agent's pid and, where the system tells, when it began, since pids repeat."""
    try:
        with open(f"/proc/{os.getppid()}/stat") as f:
            return [os.getppid(), f.read().rpartition(")")[2].split()[19]]
    except OSError:
        return [os.getppid(), ""]


def save_checkpoint(model, optimizer, cfg, step, mesh, vocabulary, saved=None):
    """out_dir/ckpt_STEP.pt, experts whole, written atomically; the last two are kept. Weights or moments that are not
    finite are not saved: ValueError names the checkpoint before (step `saved`)."""
    state = dist.full_state(model, optimizer, mesh)
    if not all(t.isfinite().all() for t in state["model"].values()):  # the same on every rank
        raise diverged("the weights are", step, saved)
    if not all(t.isfinite().all() for moments in state["optimizer"].values() for t in moments.values()):
        raise diverged("the optimizer's moments are", step, saved)
    state |= {"step": step, "config": dataclasses.asdict(cfg), "launch": launch(), "n_domains": model.n_domains, "vocabulary": vocabulary}

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
    state = on_all(mesh, lambda: dist.load(path))
    if not isinstance(state, dict) or not {"model", "optimizer", "step", "config"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint of train.py")
    fixed = ("objective n_layer n_head n_embd n_hidden block_size bias activation n_experts moe_every gate k gate_args permute "
             "expert_hidden").split()  # fmt: skip
    check_flags(given, {name: state["config"][name] for name in fixed if name in state["config"]}, path)
    return path, state


def began_here(out_dir):
    """When a worker dies torchrun starts all of them again, with the flags of the first start. True if this is such a
    restart and the checkpoints in out_dir are those of this launch, not of a run before it: then it is resumed."""
    path = dist.latest(out_dir) if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else None
    return path is not None and dist.load(path).get("launch") == launch()


def load_pretrained(given, mesh, out_dir):
    """The newest checkpoint of a RoBERTa to fine-tune -> its state, the fields of its config that the classifier takes
    over. Its curriculum is over: the gates stay as they are at its end."""
    others = {name: value for name, value in given.items() if name not in ("objective", "dataset")}
    path, state = load_checkpoint(others, mesh, out_dir)
    if state["config"]["objective"] != "roberta":
        raise ValueError(f"--init_from={out_dir}: {path} is a model for {state['config']['objective']}, fine-tuning needs --objective=roberta")
    fields = ("n_layer n_head n_embd n_hidden block_size bias activation moe_every gate k gate_args capacity_factor "
              "eval_capacity_factor drop_order expert_hidden permute permute_schedule tau_max tau_min tau_until hard_at seed").split()  # fmt: skip
    n_experts = 1 if evomoe.is_dense(state) else state["config"]["n_experts"]
    return state, {name: state["config"][name] for name in fields} | {"n_experts": n_experts}


# ---------------------------------------------------------------------------------------------------------------------
# The run


def prepare(cfg, mesh):
    """The corpus of this run; the ones that need no download are prepared on the way."""
    folder = os.path.join(HERE, "data", cfg.dataset)  # a name; or any folder, wherever it is
    if os.path.exists(os.path.join(cfg.dataset, "meta.json")) or not os.path.isdir(folder) and os.path.isdir(cfg.dataset):
        folder = cfg.dataset
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
    corpus = on_all(mesh, lambda: Corpus(folder))
    kind = "translation" if cfg.objective == "translation" else "text"
    if corpus.meta["kind"] != kind:
        raise ValueError(f"--dataset={cfg.dataset} is a corpus of kind {corpus.meta['kind']}; --objective={cfg.objective} needs {kind}")
    if "train" not in corpus.splits or len(corpus.splits) < 2:
        raise ValueError(f"--dataset={cfg.dataset} has the splits {', '.join(corpus.splits)}; it needs train, and val or test")
    if cfg.objective == "classify":  # domains are the classes
        classes = {split: [name for name, _, _ in corpus.domains(split)] for split in corpus.splits}
        if len(classes["train"]) < 2 or any(names != classes["train"] for names in classes.values()):
            raise ValueError(f"--dataset={cfg.dataset}: --objective=classify needs two domains or more, the same in each split; there are {classes}")
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


@dataclass
class Run:
    """Everything a run consists of; what `start` makes and the functions below use."""

    cfg: Config
    mesh: dist.Mesh
    corpus: Corpus
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    teacher: torch.nn.Module | None  # the dense model that a distilled one follows
    first: int  # step to begin with
    resumed: bool
    dense: bool  # still one expert per MoE layer
    autocast: object
    lock: int = -1  # the open out_dir, locked while it is written to

    def say(self, *text):
        """Print, on rank 0."""
        if self.mesh.main:
            print(*text, flush=True)

    def schedule_step(self, step):
        """The step as the curriculum counts it: in fine-tuning it is over."""
        return self.cfg.max_steps if self.cfg.objective == "classify" else step

    def compiled(self):
        """The model as the training loop calls it; a teacher watches through hooks, which compilation would miss."""
        return torch.compile(self.model) if self.cfg.compile and not self.cfg.distill else self.model


def start(given):
    """Flags -> Run: processes, checkpoint or fresh weights, corpus, model, optimizer."""
    check_device(given.get("device", ""))
    resume = given.get("init_from") == "resume" or given.get("eval_only") or given.get("sample") is not None
    cfg = configure(given, whole=not resume)  # the first errors come before anything is started
    tune = cfg.objective == "classify" and cfg.init_from != "scratch"
    sizes = (1, 0) if resume or tune else (cfg.n_experts, cfg.ep)  # a checkpoint says later how many experts there are
    mesh = dist.init(*sizes, cfg.ranks_per_node, cfg.timeout, cfg.device or None, cfg.two_level)
    say = print if mesh.main else lambda text: None

    # 1. what the run begins with: a checkpoint, a RoBERTa to fine-tune, trained dense weights, or nothing
    state, pretrained, weights, first = None, None, None, 0
    if not resume and on_main(mesh, lambda: began_here(cfg.out_dir)):
        given["init_from"], resume = "resume", True
    if resume:
        path, state = load_checkpoint(given, mesh, cfg.out_dir)
        of_this_start = "init_from eval_only sample device ep ranks_per_node two_level timeout".split()
        known = {f.name for f in dataclasses.fields(Config)} - set(of_this_start)
        given["out_dir"] = cfg.out_dir  # where it was found, not where it was written
        cfg, first = configure(given, {name: v for name, v in state["config"].items() if name in known}), state["step"]
        say(f"loaded {path} (step {first})")
        if given.get("init_from") == "resume" and cfg.max_steps < first:
            raise ValueError(f"--max_steps={cfg.max_steps}: {path} is already at step {first}; give at least that many steps")
    elif tune:
        pretrained, fields = load_pretrained(given, mesh, cfg.init_from)
        cfg = configure(given, fields)
        say(f"fine-tuning the RoBERTa of {cfg.init_from}")
    elif evomoe.starts_trained(cfg):
        fields, weights = evomoe.trained(cfg.init_from)
        check_flags(given, fields, cfg.init_from)
        cfg = configure(given, fields)
        say(f"starting from the weights of {cfg.init_from}")
    if mesh.world > 1 and (state or pretrained):
        mesh = dist.make_mesh(mesh.rank, mesh.world, cfg.n_experts, cfg.ep, mesh.local, mesh.device, cfg.two_level, cfg.timeout)
    if cfg.distill and not cfg.teacher:
        cfg.teacher = cfg.init_from
    if (cfg.batch_size // cfg.grad_accum) % mesh.world:
        raise ValueError(f"--batch_size={cfg.batch_size} / grad_accum={cfg.grad_accum} is not divisible by the {mesh.world} processes")

    # 2. corpus, model, optimizer
    corpus = prepare(cfg, mesh)
    dtype = cfg.dtype or ("bfloat16" if mesh.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32")
    torch.manual_seed(cfg.seed)
    dense = evomoe.is_dense(state) if state else evomoe.starts_dense(cfg)
    model = build_model(cfg, corpus, mesh, 1 if dense else cfg.n_experts, (state or pretrained or {}).get("n_domains", 0))
    check_causality(model, cfg, say)
    optimizer = make_optimizer(model, cfg)
    if state:
        dist.load_state(model, optimizer, state, mesh)
    elif pretrained:
        head = {name: t for name, t in dist.named_tensors(model).items() if name.startswith("classifier")}
        dist.load_state(model, None, {"model": pretrained["model"] | head}, mesh)
    elif weights:
        evomoe.load_weights(model, weights, mesh)
    if (state or pretrained or {}).get("vocabulary") not in (None, corpus.tok.fingerprint()):
        raise ValueError(f"--dataset={cfg.dataset} has another vocabulary than the one the checkpoint was trained with: prepare it as it was then")
    teacher = None
    if cfg.distill and not given.get("eval_only") and given.get("sample") is None:
        teacher = build_model(cfg, corpus, mesh, 1).eval().requires_grad_(False)
        evomoe.load_weights(teacher, evomoe.trained(cfg.teacher)[1], mesh)
    if dense and cfg.n_experts > 1:
        build_model(cfg, corpus, mesh, cfg.n_experts)  # a wrong gate_args should stop the run now, not at the spawn
    autocast = torch.autocast(mesh.device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    run = Run(cfg, mesh, corpus, model, optimizer, teacher, first, bool(state), dense, autocast)
    evomoe.set_phase(model, run.schedule_step(first), cfg)

    total, active = model.n_params()
    say(f"{cfg.objective} on {cfg.dataset}: {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active per token, "
        f"{cfg.n_experts} experts ({cfg.gate}), {mesh.world} process(es), {mesh.device.type}, {dtype}")  # fmt: skip
    if cfg.objective == "translation":
        sizes = {split: (pairs["pairs"], len(corpus.pairs(split, cfg.block_size))) for split, pairs in corpus.meta["splits"].items()}
        if long := [f"{n - fit:,d} of {n:,d} {split} pairs" for split, (n, fit) in sizes.items() if fit < n]:
            say(f"left out, longer than block_size={cfg.block_size} tokens: {', '.join(long)}")
    return run


def parsed(line):
    """A line of log.jsonl -> its dict, or None for one that a crash or a full disk has torn."""
    try:
        entry = json.loads(line)
        return entry if line.endswith("\n") and isinstance(entry["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def open_log(run):
    """Start out_dir/log.jsonl, or cut a resumed one back to the checkpoint's step. -> log(entry), which appends a line."""

    def begin():
        out_dir = run.cfg.out_dir
        os.makedirs(out_dir, exist_ok=True)
        if fcntl:
            run.lock = os.open(out_dir, os.O_RDONLY)
            try:
                fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
            except BlockingIOError:
                raise ValueError(f"another run is writing to {out_dir}: choose another --out_dir") from None
            except OSError:
                pass  # a file system without locks
        path, old, lines = os.path.join(out_dir, "log.jsonl"), dist.checkpoints(out_dir), []
        if not run.resumed and old:
            raise ValueError(f"{out_dir} holds checkpoints of an earlier run ({old[-1].name}): --init_from=resume continues it, "
                             "another --out_dir starts afresh, or delete them")  # fmt: skip
        if run.resumed and os.path.exists(path):
            with open(path, errors="replace") as f:
                lines = [line for line in f if (entry := parsed(line)) and entry["step"] <= run.first]
        with open(path + ".tmp", "w") as f:
            f.writelines(lines)
        os.replace(path + ".tmp", path)
        return path

    path = on_main(run.mesh, begin)

    def log(entry):
        if run.mesh.main:
            try:
                with open(path, "a") as f:
                    f.write(json.dumps(entry) + "\n")
            except OSError as e:
                raise OSError(f"cannot write {path}: {e.strerror}. Checkpoints are untouched") from None

    return log


def spawn(run):
    """One expert per MoE layer becomes n_experts: a new model and optimizer, filled from the old ones."""
    cfg, corpus, mesh, old = run.cfg, run.corpus, run.mesh, run.model
    score = evomoe.importance(old, sample_losses(old, corpus, cfg, mesh.device)) if cfg.spawn == "importance" else None
    model = build_model(cfg, corpus, mesh, cfg.n_experts)
    optimizer = make_optimizer(model, cfg)
    evomoe.spawn(old, run.optimizer, model, optimizer, cfg, score)
    run.model, run.optimizer, run.dense = model, optimizer, False


def gradients(run, net, batch):
    """Backward through one global batch: this rank's share of the loss, in micro-batches, then summed over ranks.

    -> task: this rank's share of the task loss (nats per target); aux: {name: value}, summed over the MoE layers;
    norm: the global gradient norm before clipping. All detached.
    """
    cfg, mesh, device = run.cfg, run.mesh, run.mesh.device
    n_targets = max(1, int((batch["y"] >= 0).sum()))  # of the global batch
    n_positions = int(batch["live"].sum()) if "live" in batch else batch["x"].numel()
    weights, task, total = loss_weights(run.model), torch.zeros((), device=device), {}
    for micro in micro_batches(batch, cfg, mesh, device):
        with run.autocast, evomoe.watch(run.model if run.teacher else None) as seen:
            nll, smoothed, pick, aux = forward(net, micro, cfg.label_smoothing)
        loss = smoothed.sum() / n_targets
        if run.teacher:
            with torch.no_grad(), run.autocast, evomoe.watch(run.teacher) as target:
                forward(run.teacher, micro)
            terms = evomoe.distillation(seen, target, micro.get("live"), n_positions, n_targets)
            loss = loss + cfg.distill * terms.sum()
            for name, value in zip(("mse", "kl"), terms.detach()):
                total[name] = total.get(name, 0) + value
        if "log_prob" in aux:
            term = score_function_term(aux.pop("log_prob"), nll, pick, cfg.batch_size // cfg.grad_accum, mesh)
            loss = loss + cfg.score_weight * term / cfg.grad_accum
        loss = loss + sum(weights.get(name, 0) * value for name, value in aux.items()) / cfg.grad_accum
        loss.backward()
        task += nll.detach().sum() / n_targets
        for name, value in aux.items():
            total[name] = total.get(name, 0) + value.detach() / cfg.grad_accum
    mesh.sync_grads(run.model)
    return task, total, mesh.clip_grad_norm(run.model, cfg.grad_clip)


def describe(run, step, batch, task, aux):
    """What the log says about a step. -> (dict for log.jsonl, line for the screen). Collective."""
    cfg, mesh, layers = run.cfg, run.mesh, max(1, len(run.model.moes()))
    weights, stats, phase = loss_weights(run.model), layer_stats(run.model, mesh), evomoe.now(step, cfg)
    values = {"loss": float(mesh.all_reduce(task))}
    for name, value in aux.items():  # per layer; the distillation terms are shares of ranks
        values[name] = float(mesh.all_reduce(value)) if name in ("mse", "kl") else float(value) / layers
    targets = int((batch["y"] >= 0).sum()) / batch["x"].numel()
    flops = run.model.flops_per_token(stats.get("experts_per_token", 1), batch["x"].shape[1], targets)
    parts = [f"step {step + 1:5d}/{cfg.max_steps}", f"loss {values['loss']:.4f}"]
    parts += [f"{name} {values[name]:.3f}" for name in aux if weights.get(name) or name in ("mse", "kl")]
    if stats:
        parts += [f"{phase['phase']} tau {phase['tau']:.2f}"] if cfg.gate == "dts" else []
        parts += [f"experts/token {stats['experts_per_token']:.2f}", f"dropped {stats['dropped']:.1%}",
                  f"load {bar(stats['load'])} {stats['load_min']:.2f}-{stats['load_max']:.2f}"]  # fmt: skip
    parts += [f"{flops / 1e6:.2f} MFLOP/token"]
    return values | stats | phase | {"flops_per_token": flops}, " | ".join(parts)


def stop_on_signals():
    """Ctrl-C, SIGTERM and SIGHUP end the run after the step at hand, with a checkpoint: -> a list that is then not empty.
    Sent again after two seconds it ends at once; before that it is torchrun forwarding what the worker got itself."""
    asked = []

    def handle(number, frame):
        if asked and time.monotonic() - asked[0] > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked.append(time.monotonic())

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), handle)
    return asked


def train(run):
    """The loop."""
    cfg, mesh, corpus, say = run.cfg, run.mesh, run.corpus, run.say
    if table := evomoe.show(cfg):
        say(table)
    val = "val" if "val" in corpus.splits else "test"
    train_batch(corpus, cfg, run.first, mesh.n_nodes)  # data that cannot be used shows now, before anything is written
    corpus.pairs(val, cfg.block_size) if cfg.objective == "translation" else eval_starts(corpus, val, cfg)
    log = open_log(run)
    stop = stop_on_signals()
    if cfg.objective == "classify":
        say(f"to beat: accuracy {majority(corpus, val, cfg):.4f}, the share of the most frequent class")
    else:
        say(f"to beat: {unigram_loss(corpus, val):.3f}, the loss of guessing tokens by frequency")

    run.model.train()
    net, saved = run.compiled(), run.first if run.resumed else None
    started, tick, tokens = time.time(), time.time(), 0
    for step in range(run.first, cfg.max_steps):
        # 1. schedules: experts, gates, learning rate, random numbers
        if run.dense and cfg.n_experts > 1 and step >= evomoe.spawn_step(cfg):
            spawn(run)
            net = run.compiled()
            say(f"step {step:5d} | one expert per layer becomes {cfg.n_experts} ({cfg.spawn}): {run.model.n_params()[0] / 1e6:.2f} M parameters")
        evomoe.set_phase(run.model, run.schedule_step(step), cfg)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        torch.manual_seed((cfg.seed * 1_000_003 + step) % 2**63)
        # 2. gradients
        batch = train_batch(corpus, cfg, step, mesh.n_nodes)
        task, aux, norm = gradients(run, net, batch)
        if not torch.isfinite(norm):  # the same number on every rank, so all of them stop
            raise diverged("the loss or its gradient is", step + 1, saved)
        # 3. update
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        for gate in run.model.gates():
            gate.update()
        # 4. tell, evaluate, save
        done, tokens = step + 1, tokens + batch["x"].numel()
        last, stopping = done == cfg.max_steps, mesh.any(bool(stop))
        if done % cfg.log_every == 0 or done == 1:
            entry, line = describe(run, step, batch, task, aux)
            now = time.time()
            speed, left = tokens / (now - tick), (now - started) / (done - run.first) * (cfg.max_steps - done)
            say(f"{line} | {speed / 1e3:.1f}k tok/s | {clock(left)} left")
            log({"step": done, **entry, "lr": learning_rate(step, cfg), "norm": float(norm), "tokens_per_s": speed,
                 "seconds": now - started, "cpu_seconds": time.process_time()})  # fmt: skip
            tick, tokens = time.time(), 0
        if last or (cfg.eval_every and done % cfg.eval_every == 0):
            whole = dataclasses.replace(cfg, eval_batches=0) if last else cfg
            result = evaluate(run.model, corpus, val, whole, mesh, run.autocast)
            say(f"step {done:5d} | {val} " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()))
            if not math.isfinite(result["loss"]):
                raise diverged("the held-out loss is", done, saved)
            log({"step": done, "seconds": time.time() - started} | {f"val_{name}": value for name, value in result.items()})
            tick, tokens = time.time(), 0
        if last or stopping or (cfg.save_every and done % cfg.save_every == 0):
            save_checkpoint(run.model, run.optimizer, cfg, done, mesh, corpus.tok.fingerprint(), saved)
            saved = done
        if stopping:
            return say(f"stopped after step {done}; continue with --init_from=resume --out_dir={cfg.out_dir}")

    say(f"\ntrained in {clock(time.time() - started)}; a sample:\n" + "-" * 80)
    if cfg.objective == "translation":
        test = "test" if "test" in corpus.splits else "val"
        scores, text = score_translations(run.model, corpus, test, cfg.bleu_sentences, cfg, mesh, run.autocast)
        log({"step": cfg.max_steps} | {f"{test}_{name}": value for name, value in scores.items()})
        say(text + f"\n\n{test}: BLEU {scores['bleu']:.2f}, {scores['exact']:.1%} exactly as the reference ({scores['sentences']} sentences, beam of {cfg.beams})")
    else:
        say(show_sample(run.model, corpus, cfg, mesh, None, run.autocast))
    say("-" * 80 + f"\ncheckpoint and log are in {cfg.out_dir}/. Next: --sample=\"your prompt\"; or, with an "
        f"--out_dir of its own, another --gate, --n_experts=1 (the dense model), --max_steps={5 * cfg.max_steps}")  # fmt: skip


def score(run, given):
    """--eval_only: all held-out splits of the corpus, whole unless eval_batches or bleu_sentences is given."""
    cfg = dataclasses.replace(run.cfg, eval_batches=given.get("eval_batches", 0))
    for split in [s for s in ("val", "test") if s in run.corpus.splits]:
        result = evaluate(run.model, run.corpus, split, cfg, run.mesh, run.autocast)
        if cfg.objective == "translation":
            result |= score_translations(run.model, run.corpus, split, given.get("bleu_sentences", 0), cfg, run.mesh, run.autocast)[0]
        run.say(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()))


def main(argv):
    given = parse(argv)
    run = start(given)
    if given.get("sample") is not None:
        run.say(show_sample(run.model, run.corpus, run.cfg, run.mesh, run.cfg.sample, run.autocast))
    elif run.cfg.eval_only:
        score(run, given)
    else:
        try:
            train(run)
        finally:
            if run.lock >= 0:
                os.close(run.lock)
    run.mesh.close()


if __name__ == "__main__":
    if "--help" in sys.argv or "-h" in sys.argv:
        print(help_text())
        sys.exit(0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")
