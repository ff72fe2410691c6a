"""
Train a mixture-of-experts Transformer: the manual.

    python train.py                                     GPT on Python's own documentation and source, no download
    python train.py --gate=switch --out_dir=out-switch  another gate: every class of router.py, by its name
    python train.py --n_experts=1 --out_dir=out-dense   the dense model of the same active size
    python train.py --objective=roberta --out_dir=out-roberta               masked language modelling
    python train.py --objective=classify --init_from=out-roberta            fine-tune it: which package is it from?
    python train.py --objective=translation --out_dir=out-translation       encoder-decoder
    torchrun --nproc_per_node=2 train.py --out_dir=out-2                    the first run on two processes
    python train.py --init_from=resume                  continue after Ctrl-C, a kill or a crash, bit for bit (CPU)
    python train.py --sample="def __init__"             continue a prompt with the newest checkpoint in out/ (--out_dir)
    python train.py --eval_only                         held-out loss of the newest checkpoint in out/

Flags are the fields of Config below, always --name=value (a bare --flag means true); --help lists them.

Read from the top: Config; the loss; one training step; evaluation; the loop. The last third sets a run up: skip it
at first. What differs between objectives is in data/objectives.py, what a run tells in data/log.py, the spawn in
evomoe.py.

    loss = task loss + sum of weights * auxiliary losses          the task loss is always reported alone

Decisions:
- Everything random is a function of (seed, step): data order, masks, routing noise. (With dropout, the units that are
  dropped and the routing noise depend on the rank, too: step_seed.) So a resumed run equals an uninterrupted one
  without saving any generator, and the data order does not depend on the number of processes.
- batch_size is global. Each process takes its slice; a rank's loss is its share of the global one (its sum / the global
  number of targets), so gradients are only ever added up.
- The log is out_dir/log.jsonl, one JSON object a line, beside what you see on the screen. Steps are counted in updates
  made: "step 10" is the state after the tenth.
"""

import dataclasses
import functools
import math
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors on the CPU: a step is 15 % faster
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # errors come as exceptions anyway; INFO shows C++'s own
import torch
import torch.nn.functional as F

import dist
import evomoe
from data import batches
from data.files import prepare_missing
from data.flags import check, flag, help_text, parse
from data.log import Clock, Log, describe, minutes
from data.objectives import OBJECTIVES, Objective, open_objective
from experts import ORDERS, check_causality, feed_forward
from model import make_optimizer
from router import gates, score_function_term


@dataclass
class Config:
    objective: str = flag(
        "gpt", "gpt, roberta, classify (fine-tuning a RoBERTa), translation", one_of=OBJECTIVES, heading="What to learn"
    )
    dataset: str = flag("", 'a folder under data/; "": stdlib, or grammar for translation, no download')

    n_layer: int = flag(4, "blocks (in encoder and decoder each, for translation)", 1, 1000, heading="The Transformer")
    n_head: int = flag(4, "attention heads, must divide n_embd", 1)
    n_embd: int = flag(128, "model width D", 1, 2**16)
    n_hidden: int = flag(0, "hidden width of an FFN or expert; 0: 4 * n_embd", 0, 2**18)
    block_size: int = flag(128, "longest sequence, tokens", 1, 2**20)
    dropout: float = flag(0.0, "0 when data are plenty, 0.1 to 0.3 when the model sees them many times", 0, 0.99)
    bias: bool = flag(False, "biases in linear layers and LayerNorms, as GPT-2 has them")
    activation: str = flag("gelu", "gelu, or gelu_tanh (GPT-2's approximation)", one_of=("gelu", "gelu_tanh"))

    n_experts: int = flag(8, "experts per MoE layer; 1 is the dense model", 1, 2**14, heading="The mixture")
    moe_every: int = flag(2, "every how many layers the FFN is a mixture; 1: all", 1)
    gate: str = flag("dts", "a class of router.py in lower case; dts is EvoMoE's", one_of=gates())
    k: int = flag(0, "experts per token, for gates that take it; 0: the gate's own default", 0)
    gate_args: str = flag("", 'the gate\'s own knobs, like "balance=0.02,jitter=0"; its class in router.py says which')
    permute: float = flag(0.0, "share of the mixture's steps that learn a permutation (COMET+); 0: none", 0, 0.99)
    capacity_factor: float = flag(0.0, "slots of an expert = this * its fair share, in training; 0: no limit", 0)
    drop_order: str = flag("", 'who keeps a slot: arrival, choice, score, random; "": the gate\'s', one_of=ORDERS)
    groups: int = flag(1, "routing groups per process; groups=W on one process routes as W processes do", 1)
    expert_hidden: int = flag(0, "hidden width of an expert; 0: an FFN's; less is a finer mixture", 0, 2**18)
    shared_hidden: int = flag(0, "hidden width of one expert more, which all tokens visit; 0: none", 0, 2**18)
    insist: bool = flag(False, "run a gate that looks at later tokens in a causal model all the same")

    diversify: float = flag(-1.0, "share of the run with one expert; -1: the gate's own", -1, 0.99, heading="EvoMoE")
    spawn: str = flag("mask", "how experts come from the first: mask, noise, copy, importance", one_of=evomoe.SPAWNS)
    spawn_ratio: float = flag(0.3, "mask: share of zeros; noise: relative std; importance: share common to all", 0, 1)
    distill: float = flag(0.0, "weight of the distillation from a dense teacher, 1 to 5; 0: none", 0)
    teacher: str = flag("", 'out_dir of the teacher\'s run; "": the one in init_from')

    batch_size: int = flag(16, "sequences per step over all processes", 1, 2**20, heading="Optimisation")
    grad_accum: int = flag(1, "micro-batches of a step; must divide batch_size; the log has the last one's loads", 1)
    max_steps: int = flag(600, "optimizer steps", 1, 10**9)
    learning_rate: float = flag(4e-3, "peak; 2e-3 to 4e-3 for models as small as this, 1e-4 to 1e-3 for large", 1e-12)
    min_lr: float = flag(0.1, "final learning rate, as a share of the peak (nanoGPT's is absolute)", 0, 1)
    schedule: str = flag("cosine", "cosine or inverse_sqrt (Vaswani's)", one_of=("cosine", "inverse_sqrt"))
    warmup: int = flag(200, "steps to the peak, at most half the run; with 50 or 100 the early loss varies by seed", 0)
    weight_decay: float = flag(0.1, "on matrices outside the gates; not on biases, gains, embeddings of positions", 0)
    beta2: float = flag(0.98, "AdamW's; 0.95 to 0.999", 0, 0.999999)
    grad_clip: float = flag(1.0, "global gradient norm; 0: no clipping", 0)
    label_smoothing: float = flag(0.0, "0.1 is usual for translation; the reported loss is without it", 0, 0.99)
    seed: int = flag(1337, "of everything", 0, 2**40 - 1)

    eval_every: int = flag(100, "steps; 0: only at the end", 0, heading="Evaluation, output")
    eval_batches: int = flag(20, "held-out batches at each evaluation; 0: all of them, as at the end", 0)
    bleu_sentences: int = flag(200, "translation: held-out sentences translated at the end of a run; 0: all", 0)
    beams: int = flag(4, "translation: hypotheses of the beam search; 1 is greedy", 1, 1000)
    log_every: int = flag(10, "steps between lines", 1)
    save_every: int = flag(200, "steps between checkpoints; one is always written at the end", 0)
    out_dir: str = flag("out", "checkpoints and log")
    init_from: str = flag("scratch", "scratch; resume; out_dir of a dense run, or of a RoBERTa to tune; gpt2")
    eval_only: bool = flag(False, "evaluate the newest checkpoint of out_dir and leave")
    sample: str = flag("", "a prompt for the newest checkpoint of out_dir, then leave")
    sample_tokens: int = flag(120, "how much to sample", 0)
    temperature: float = flag(0.8, "of sampling; 0 is greedy", 0)
    top_k: int = flag(50, "sample from so many likeliest tokens; 0: all (experts per token: --k)", 0)

    device: str = flag("", 'cpu; not tried: cuda, cuda:1, mps; "": a GPU if there is one', heading="The machine")
    dtype: str = flag("", 'float32, bfloat16; "": bfloat16 on a GPU that can', one_of=("", "float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile everything but the dispatch")
    ep: int = flag(0, "expert-parallel processes; 0: as many as divide both the processes and the experts", 0)
    ranks_per_node: int = flag(0, "processes per node; 0: torchrun's; fewer play several nodes on one machine", 0)
    two_level: bool = flag(False, "all-to-all inside nodes first, then between them")
    shard_by_domain: bool = flag(False, "each node reads domains of its own (locality-aware gates need that)")
    timeout: int = flag(600, "seconds until a collective that hangs is given up", 1, 10**6)


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate, the loss


def learning_rate(step, cfg):
    """Linear warmup to the peak, then cosine to min_lr * peak at max_steps, or peak * sqrt(warmup / step)."""
    warmup = min(cfg.warmup, cfg.max_steps // 2)  # a short run should reach its peak, and come down again
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    if cfg.schedule == "inverse_sqrt":
        return cfg.learning_rate * (max(warmup, 1) / (step + 1)) ** 0.5
    t = min(1.0, (step - warmup) / max(1, cfg.max_steps - warmup))
    return cfg.learning_rate * (cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * t)))


def step_seed(step, cfg, mesh):
    """Of all that is random inside a step. Alike on every rank, so that a gate's noise does not depend on their number;
    with dropout each rank has its own, or all would drop the same units, and the noise differs, too."""
    seed = cfg.seed * 1_000_003 + step
    return (seed * mesh.world + mesh.rank if cfg.dropout else seed) % 2**63


class Scored(NamedTuple):
    """What the model makes of a batch with M targets."""

    nll: torch.Tensor  # (M,) nats: what is reported
    smoothed: torch.Tensor  # (M,) what is trained on; the same without label smoothing
    logits: torch.Tensor  # (M, V)
    pick: torch.Tensor  # (B, T) bool, where the targets are
    aux: dict  # {name: auxiliary loss, summed over the MoE layers}


def task_loss(model, batch, label_smoothing=0.0):
    """One forward pass -> Scored. Only positions with a target (y >= 0) meet the output layer."""
    inputs = {name: t for name, t in batch.items() if name != "y"}
    pick = batch["y"] >= 0
    logits, aux = model(**inputs, pick=pick)  # (M, V)
    logits, y = logits.float(), batch["y"][pick]
    nll = smoothed = F.cross_entropy(logits, y, reduction="none")
    if label_smoothing:
        smoothed = F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)
    return Scored(nll, smoothed, logits, pick, aux)


# ---------------------------------------------------------------------------------------------------------------------
# One training step, evaluation


def train_step(run, net, batch):
    """One update from one global batch. This rank takes its rows of it, in micro-batches; gradients are then summed
    over the ranks. net: run.model, or its compiled form.

    -> task: this rank's share of the task loss (nats per target); logged: {name: value}, the auxiliary losses summed
    over the MoE layers, and mse and kl of a distillation, this rank's share; norm: the global gradient norm before
    clipping. All detached. Nothing is updated if the norm is not finite.
    """
    cfg, mesh = run.cfg, run.mesh
    n_targets = max(1, int((batch["y"] >= 0).sum()))  # of the global batch
    task, logged = torch.zeros((), device=mesh.device), {}
    for micro in batches.micro_batches(batch, cfg.grad_accum, mesh):
        with run.autocast, evomoe.watch(run.model if run.teacher else None) as seen:  # seen: for distill alone
            out = task_loss(net, micro, cfg.label_smoothing)
        extra, values = auxiliary_losses(run, out, seen, micro, n_targets)
        loss = out.smoothed.sum() / n_targets + extra
        loss.backward()
        task += out.nll.detach().sum() / n_targets
        logged = {name: logged.get(name, 0) + value.detach() for name, value in values.items()}
    mesh.sync_grads(run.model)
    norm = mesh.clip_grad_norm(run.model, cfg.grad_clip)
    if torch.isfinite(norm):  # the same number on every rank
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        for gate in run.model.gates():
            gate.update()
    return task, logged, norm


def auxiliary_losses(run, out, seen, micro, n_targets):
    """What one micro-batch adds to its task loss: a distillation, and what the gates ask for. -> their weighted sum;
    {name: value}. A gate's value is that of all ranks' tokens; its gradient is this rank's share."""
    cfg, weights, extra, values = run.cfg, run.model.loss_weights(), 0.0, {}
    if run.teacher:
        values |= distill(run, seen, micro, n_targets)
        extra = cfg.distill * sum(values.values())
    for name, value in out.aux.items():
        if name == "log_prob":  # of a gate that samples: a loss only when multiplied by how good the choice was
            value = score_function_term(value, out.nll, out.pick, cfg.batch_size // cfg.grad_accum, run.mesh)
        else:
            values[name] = value / cfg.grad_accum
        extra = extra + weights.get(name, 0) * value / cfg.grad_accum
    return extra, values


def distill(run, seen, micro, n_targets):
    """What the student (`seen`: its hidden states and logits) still lacks of the teacher. -> {"mse", "kl"}, this rank's
    share of the global means (evomoe.distillation)."""
    n_positions = run.cfg.batch_size * micro["x"].shape[1]
    with torch.no_grad(), run.autocast, evomoe.watch(run.teacher) as target:
        task_loss(run.teacher, micro)
    return evomoe.distillation(seen, target, n_positions, n_targets)


@contextmanager
def evaluating(model):
    """with evaluating(model): no dropout, no noise, no gradients."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def evaluate(run, split, eval_batches=0):
    """Held-out task loss over eval_batches batches (0: all). -> {"loss": nats per target, "accuracy", what the
    objective adds, "loss_PART" by domain or class}. Collective: every rank calls it and gets the same numbers."""
    mesh, objective = run.mesh, run.objective
    parts = objective.parts(split)
    total = torch.zeros(len(parts), 3, dtype=torch.float64)  # loss, correct, targets of each part; not on the device
    with evaluating(run.model):
        for batch in objective.held_out(split, eval_batches):
            (mine,) = batches.micro_batches(batch, 1, mesh)
            with run.autocast:
                out = task_loss(run.model, mine)
            right = (out.logits.argmax(1) == mine["y"][out.pick]).float()
            values = torch.stack([out.nll, right, torch.ones_like(right)], 1).cpu().double()
            total.index_add_(0, objective.part(mine)[out.pick].cpu(), values)
    total = mesh.all_reduce(total.to(mesh.device, torch.float32 if mesh.device.type == "mps" else torch.float64))
    loss, correct, n = total.sum(0).tolist()
    if not n:
        raise dist.EverybodysError(f"the {split} split has nothing to predict: special tokens only")
    result = {"loss": loss / n, "accuracy": correct / n} | objective.more_metrics(split, loss / n)
    if len(parts) > 1:
        result |= {f"loss_{name}": part / c for name, (part, _, c) in zip(parts, total.tolist()) if c}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Run:
    """Everything a run consists of; the set-up below makes it."""

    cfg: Config
    objective: Objective
    mesh: dist.Mesh
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    autocast: object
    build: object  # n_experts -> a fresh model
    n_domains: int  # labelled domains that gates may know
    phases: str  # the table of what changes when; "" if nothing does
    teacher: torch.nn.Module | None = None  # the dense model that a distilled one follows
    followed: dict = dataclasses.field(default_factory=dict)  # {folder: checksum} of the teacher
    first: int = 0  # step to begin with
    resumed: bool = False
    unheard: str = ""  # why stdout takes no more: a closed terminal, the end of a pipe, a full disk

    def say(self, *text):
        """Print, on rank 0. Where nobody can hear it the run does not break off: it saves and ends, see `loop`."""
        if self.mesh.main and not self.unheard:
            try:
                print(*text, flush=True)
            except OSError as error:
                self.unheard = error.strerror
                dist.silence(sys.stdout)

    def compiled(self):
        """The model as the loop calls it. Distillation watches through hooks, which compilation would miss; dispatch
        has another number of rows at each call (as a decorator there, disable would load the compiler always, 2 s)."""
        if not self.cfg.compile or self.cfg.distill:
            return self.model
        for moe in self.model.moes():
            moe.dispatch = torch.compiler.disable(moe.dispatch)
        return torch.compile(self.model)


def train(run):
    """A whole run: what to expect, the loop, the last words."""
    say_what_to_expect(run)
    clock = Clock(run.first, run.cfg.max_steps)
    with Log(run.cfg.out_dir, run.mesh, run.first if run.resumed else None, possible) as log:
        if loop(run, log, clock):
            finish(run, log, clock)


def loop(run, log, clock):
    """-> True at the end, False if somebody stopped it before."""
    cfg, mesh, objective = run.cfg, run.mesh, run.objective
    stop = dist.stop_on_signals()  # a list, empty until somebody asks the run to stop
    val = objective.corpus.held_out()[0]
    run.model.train()
    net = run.compiled()
    for step in range(run.first, cfg.max_steps):
        # 1. schedules: experts, gates, learning rate, random numbers
        if evomoe.spawn_if_due(run, step, task_loss):
            net = run.compiled()
        evomoe.set_step(run.model, objective.schedule_step(step), cfg)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        torch.manual_seed(step_seed(step, cfg, mesh))
        # 2. gradients and update
        batch = objective.train_batch(step, mesh.n_nodes)
        task, logged, norm = train_step(run, net, batch)
        if not torch.isfinite(norm):
            raise dist.diverged("the loss or its gradient is", step + 1, cfg.out_dir, possible)
        # 3. tell, evaluate, save
        done, last = step + 1, step + 1 == cfg.max_steps
        stopping = mesh.any(bool(stop or run.unheard))  # on any rank
        clock.tokens += batch["x"].numel()
        if done % cfg.log_every == 0 or done == 1:
            entry, line = describe(run, done, batch, task, logged)
            times, speed = clock.read(done)
            run.say(f"{line} | {speed}")
            log({"step": done, **entry, "lr": learning_rate(step, cfg), "norm": float(norm), **times})
        if last or (cfg.eval_every and done % cfg.eval_every == 0):
            evomoe.set_step(run.model, objective.schedule_step(done), cfg)  # as --eval_only of this step's checkpoint
            result = evaluate(run, val, 0 if last else cfg.eval_batches)
            clock.start_lap()
            run.say(f"step {done:5d} | {val} " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()))
            if not math.isfinite(result["loss"]):
                raise dist.diverged("the held-out loss is", done, cfg.out_dir, possible)
            log({"step": done, "seconds": clock.seconds()} | {f"{val}_{name}": v for name, v in result.items()})
        if last or stopping or (cfg.save_every and done % cfg.save_every == 0):
            save(run, done)
            clock.start_lap()
        if stopping:
            run.say(f"stopped after step {done}; continue with --init_from=resume --out_dir={cfg.out_dir}")
            return False
    return True


def say_what_to_expect(run):
    """The phases and what to beat; data or an objective that cannot be used show now, before anything is written."""
    val = run.objective.corpus.held_out()[0]
    if run.phases:
        run.say(run.phases)
    batch = run.objective.train_batch(run.first, run.mesh.n_nodes)
    if len(set(run.mesh.from_all(dist.checksum(batch.values())))) > 1:
        raise dist.EverybodysError(
            f"--dataset={run.cfg.dataset} holds other data for some processes: prepare it once and copy it to all nodes"
        )
    evaluate(run, val, 1)  # a mistake of an objective should not show after the last step
    run.say(run.objective.to_beat(val))
    if run.first == run.cfg.max_steps:
        run.say(f"nothing is left to train at step {run.first}: --max_steps=MORE goes on")


def finish(run, log, clock):
    """The end of a whole run: a sample, scores that are too slow to take on the way, and what one could do next."""
    cfg, objective = run.cfg, run.objective
    other = "1 (the dense model)" if cfg.n_experts > 1 else "8 (a mixture)"
    run.say(f"\ntrained in {minutes(clock.seconds())}; a sample:\n" + "-" * 80)
    with evaluating(run.model):
        scores, text = objective.finish(run)
    if scores:
        log({"step": cfg.max_steps, "final": True} | scores)
    run.say(
        text + "\n" + "-" * 80 + f"\ncheckpoint and log are in {cfg.out_dir}/. Next: --out_dir={cfg.out_dir} "
        f'--sample="{objective.prompt}"; or, with --objective={cfg.objective} and an --out_dir of its own, '
        f"another --gate, --n_experts={other}, --max_steps={5 * cfg.max_steps}"
    )


def save(run, step):
    """out_dir/ckpt_STEP.pt; the last two are kept."""
    corpus = run.objective.corpus
    more = dict(config=dataclasses.asdict(run.cfg), vocabulary=corpus.tok.fingerprint(), n_domains=run.n_domains,
                parts=run.objective.parts("train"), teacher=run.followed)  # fmt: skip
    dist.save_checkpoint(run.cfg.out_dir, step, run.model, run.optimizer, run.mesh, possible, **more)


# ---------------------------------------------------------------------------------------------------------------------
# Setting up: what a run begins with is a config and a state, the dict of a checkpoint or the part of it that there is


def resumed(given, mesh):
    """-> (Config, state) of the newest checkpoint in out_dir. Flags win over its config, but not where they would
    change the model."""
    out_dir = configure(given).out_dir
    path, state = dist.newest(out_dir, mesh, possible)
    resumes = given.get("init_from") == "resume"  # or --eval_only, --sample, with the run's own flags
    evomoe.agree(given, state["config"], path, "--out_dir", () if resumes else ("init_from",))
    of_this_start = "eval_only sample device timeout".split()
    old = {name: value for name, value in state["config"].items() if name not in of_this_start}
    layout = {name: given.get(name, old.get(name, 0)) for name in ("ep", "ranks_per_node", "two_level")}
    base = old
    try:
        dist.check_layout(mesh.world, configure({}, old).n_experts, **layout)
    except ValueError:  # made for another number of processes
        base = {name: value for name, value in old.items() if name not in layout}
    # init_from goes on telling what the whole run began with; out_dir is where it was found, not where it was written
    given = {name: value for name, value in given.items() if name != "init_from"} | {"out_dir": out_dir}
    if given.get("distill") == 0:
        base["teacher"] = old["teacher"] = ""
    cfg = configure(given, base)
    if resumes and cfg.max_steps < state["step"]:
        raise ValueError(
            f"--max_steps={cfg.max_steps}: {path} is already at step {state['step']}; give at least that many"
        )
    if mesh.main:
        print(f"loaded {path} (step {state['step']}){changes(old, cfg) if resumes else ''}", flush=True)
    return cfg, state


def changes(old, cfg):
    """What a resumed run does otherwise than before, for the screen."""
    differ = [
        f"--{n}={now} (before: {old[n]})" for n, now in vars(cfg).items() if n != "out_dir" and old.get(n, now) != now
    ]
    longer = old.get("max_steps", cfg.max_steps) != cfg.max_steps
    follow = "; learning rate and phases follow the new length" if longer else ""
    return f"; from here on {', '.join(differ)}{follow}" if differ else ""


def from_trained(given, mesh):
    """-> (Config, state with weights alone) of another run: a dense one, from which experts are spawned, or all of the
    model that this objective fine-tunes."""
    cfg = configure(given)
    continues = OBJECTIVES[cfg.objective].continues
    fields, state = evomoe.whole(cfg.init_from, continues, mesh) if continues else evomoe.trained(cfg.init_from, mesh)
    evomoe.agree(given, fields, cfg.init_from, "--init_from", () if continues else ("dataset",))
    if mesh.main:
        print(f"{'fine-tuning the model' if continues else 'starting from the weights'} of {cfg.init_from}", flush=True)
    return configure(given, fields), state


def set_up(given):
    """Flags -> Run: the processes, what it begins with, then corpus, model and optimizer."""
    cfg = configure(given)  # the first errors come before anything is started
    dist.check_device(cfg.device)
    mesh = dist.init(cfg.ranks_per_node, cfg.timeout, cfg.device or None)
    refuse_unless_alike(given, mesh)
    only_looks = cfg.eval_only or "sample" in given
    if not only_looks and mesh.on_main(lambda: dist.restarted(cfg.out_dir, possible)):
        given["init_from"] = "resume"
    if only_looks or given.get("init_from") == "resume":
        cfg, state = resumed(given, mesh)
    elif evomoe.starts_trained(cfg):
        cfg, state = from_trained(given, mesh)
    else:
        state = {}
    evomoe.check(cfg, state)
    batches.check(cfg, mesh.world)
    mesh = dist.spread_experts(mesh, cfg.n_experts, cfg.ep, cfg.two_level, cfg.timeout, cfg.ranks_per_node)
    mesh.on_main(lambda: prepare_missing(cfg.dataset))
    run = mesh.on_all(lambda: assemble(cfg, state, mesh))
    if cfg.distill and not only_looks:
        vocabulary, before = run.objective.corpus.tok.fingerprint(), state.get("teacher", {})
        run.teacher, run.followed = evomoe.load_teacher(cfg, run.build, mesh, vocabulary, before)
    return run


def refuse_unless_alike(given, mesh):
    """ValueError on every rank if the ranks were not given the same flags. (Each may name a GPU of its own.)"""
    first, *others = mesh.from_all({name: value for name, value in given.items() if name != "device"})
    for rank, flags in enumerate(others, 1):
        for name in sorted(first.keys() | flags.keys()):
            a, b = (f"--{name}={f[name]}" if name in f else f"no --{name}" for f in (first, flags))
            if a != b:
                raise dist.EverybodysError(f"process 0 has {a}, process {rank} has {b}: give all the same flags")


def assemble(cfg, state, mesh):
    """Corpus, model and optimizer, alike on every rank, filled from the state."""
    objective = open_objective(cfg)
    n_domains = state.get("n_domains", objective.n_domains)
    if n_domains < objective.n_domains or state.get("vocabulary") not in (None, objective.corpus.tok.fingerprint()):
        raise ValueError(
            f"--dataset={cfg.dataset} has another vocabulary or other domains than the one that the "
            "checkpoint was trained with: prepare it as it was then"
        )
    parts, before = objective.parts("train"), state.get("parts") if "optimizer" in state else None
    by_number = cfg.objective == "classify" or cfg.gate == "randomrouted"
    if by_number and before not in (None, parts):
        raise ValueError(
            f"--dataset={cfg.dataset} has the domains {', '.join(parts)}; the checkpoint knows them by number, as "
            f"{', '.join(before)}: prepare it as it was then"
        )
    torch.manual_seed(cfg.seed)
    build = functools.partial(build_model, cfg, objective, mesh, n_domains)
    mixture = build(cfg.n_experts)  # also before a spawn: wrong knobs of a gate should stop the run now
    dense_first = cfg.n_experts > 1 and evomoe.starts_dense(cfg, state)
    model = build(1) if dense_first else mixture
    note = check_causality(mixture.moes(), objective.causal, cfg) + without_effect(cfg, mixture.gates())
    optimizer = make_optimizer(model, cfg)
    if "optimizer" in state:
        dist.load_state(model, optimizer, state, mesh)
    elif state:
        evomoe.load_weights(model, state["model"], mesh)
    in_bf16 = mesh.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = cfg.dtype or ("bfloat16" if in_bf16 else "float32")
    autocast = torch.autocast(mesh.device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    over = objective.schedule_step(0) > 0  # fine-tuning
    phases = "" if over else evomoe.show(cfg, mixture, dense_first)
    first, again = state.get("step", 0), "optimizer" in state
    run = Run(cfg, objective, mesh, model, optimizer, autocast, build, n_domains, phases, first=first, resumed=again)
    evomoe.set_step(mixture, cfg.max_steps, cfg)
    total, active = mixture.n_params()  # as the run will end
    experts = "dense" if cfg.n_experts == 1 else f"{cfg.n_experts} experts ({cfg.gate})"
    where = f", experts spread over {mesh.ep}" if cfg.n_experts > 1 and mesh.world > 1 else ""
    evomoe.set_step(model, objective.schedule_step(run.first), cfg)
    run.say(
        note + f"{cfg.objective} on {cfg.dataset}: {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active per "
        f"token, {experts}, {mesh.world} process(es){where}, {mesh.device.type}, {dtype}"
    )
    return run


def without_effect(cfg, its_gates):
    """A note on flags of a mixture that the dense model, or this gate, has no use for, or ""."""
    with_what = f"--gate={cfg.gate}"
    names = its_gates[0].ignores if its_gates else ()
    if cfg.n_experts == 1:
        with_what = "--n_experts=1, the dense model"
        names = "k gate_args permute expert_hidden shared_hidden capacity_factor drop_order".split()
    idle = [f"--{name}" for name in names if getattr(cfg, name) != getattr(Config, name)]
    return f"note: without effect with {with_what}: {', '.join(idle)}\n" if idle else ""


def build_model(cfg, objective, mesh, n_domains, n_experts):
    """A fresh model with n_experts experts per MoE layer (the curriculum changes that number)."""
    cfg = dataclasses.replace(cfg, n_experts=n_experts)
    facts = dict(V=objective.n_ids, counts=objective.counts, n_domains=n_domains, steps=evomoe.mixture_steps(cfg))
    ffn = functools.partial(feed_forward, cfg, mesh=mesh, **facts)
    return objective.model(cfg, ffn).to(mesh.device)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def configure(given, base=None):
    """Config from flags, on top of `base` (a checkpoint's config or a part of it) or else of the objective's defaults.
    ValueError, one line, for a value that no run can have; what fits together is checked by those who use it."""
    fields = {f.name for f in dataclasses.fields(Config)}
    values = {name: value for name, value in (base or {}).items() if name in fields}  # a file may hold more
    values |= {name: value for name, value in given.items() if (name, value) != ("dataset", "")}
    check(values, Config)
    cfg = Config(**{**OBJECTIVES[values.get("objective", Config.objective)].defaults, **values})
    if cfg.diversify < 0:
        cfg.diversify = 0.0 if evomoe.starts_trained(cfg) else gates()[cfg.gate].diversify
    return cfg


def possible(config):
    """ValueError for a checkpoint's config that no run can have."""
    configure({}, config)


def score(run, given):
    """--eval_only: all held-out splits of the corpus, whole unless eval_batches or bleu_sentences is given."""
    for split in run.objective.corpus.held_out():
        result = evaluate(run, split, given.get("eval_batches", 0))
        with evaluating(run.model):
            result |= run.objective.scores(run, split, given.get("bleu_sentences", 0))[0]
        if not math.isfinite(result["loss"]):
            raise dist.EverybodysError(
                f"the loss on {split} is not finite: take an earlier checkpoint of "
                f"{run.cfg.out_dir}, or train again with a lower --learning_rate"
            )
        run.say(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()))


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(help_text(__doc__, Config, {name: objective.defaults for name, objective in OBJECTIVES.items()}))
        return
    given = parse(argv, Config)
    dist.keep_memory()
    run = dist.alike(lambda: set_up(given))
    if "sample" in given:
        with evaluating(run.model):
            run.say(dist.alike(lambda: run.objective.sample(run, given["sample"])))
    elif run.cfg.eval_only:
        score(run, given)
    else:
        train(run)
    run.mesh.close()
    if run.unheard:
        trained = not run.cfg.eval_only and "sample" not in given
        again = f"; go on with --init_from=resume --out_dir={run.cfg.out_dir}" if trained else ""
        raise OSError(f"cannot write to stdout ({run.unheard}){again}")


if __name__ == "__main__":
    dist.program(main, sys.argv[1:])
