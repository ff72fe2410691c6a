"""
EvoMoE's curriculum: train one expert, spawn many from it, then let the gate learn how many each token needs.

    python train.py --gate=dts --diversify=0.1

    phase       experts  what happens (Nie et al. 2021, arXiv:2112.14397)
    diversify   1        each MoE layer is one FFN: exactly the dense model
    anneal      E        experts spawned from it, the gate is dense; temperature and noise fall
    tighten     E        the bar that a gate value must clear rises: each token keeps as many experts as clear it
    hard        E        the k best only

Everything is a pure function of (step, cfg): `phases` is the table, `now` reads it, set_phase tells the gates. Any
other gate can have the first phase too, then one that is called "mixture". The same file holds the other ways in:

    python train.py --gate=switch --diversify=0.1 --spawn=copy          sparse upcycling within one run
    python train.py --gate=dts --init_from=out-dense                    the first phase is a finished run, or gpt2
    python train.py --objective=roberta --n_experts=1 --moe_every=1 --out_dir=out-teacher        MoEBERT: a teacher
    python train.py --objective=roberta --init_from=out-teacher --moe_every=1 --n_experts=4 --gate=hash --distill=1 \
        --spawn=importance --expert_hidden=128 --spawn_ratio=0.67 --out_dir=out-student   the same cut; or --gate=comet

Decisions (the paper's body and code leave these open):
- The spawn happens at the beginning of a step: a checkpoint after s updates holds the model that made update s - 1.
- A new model is built and filled, nothing is patched: what does not grow is carried over with its optimizer state. An
  expert inherits the moments of the first one, zero where its mask is, and the step count; the gate starts afresh.
- A mask is applied once: a zeroed weight may grow again. It is drawn from (seed, layer, expert's global number), so
  that any number of processes spawns the same experts. Biases are copied.
- A spawn without change (ratio 0, or copies) keeps the function if the gate's weights sum to 1, which those of DTS do
  at the start; a top-1 gate multiplies by p < 1 and has to recover.

Measured (GPT of 2 layers, both mixtures, D 64, 8 experts, stdlib, 400 steps of 1024 tokens, learning rate 2e-3,
phases from 0.1, 0.25 and 0.4 of the run; validation loss of seed 1337 and, where there are two numbers, seed 2; at the hard switch the jump of
the loss on one batch and the cosine of the gradients before and after):

    dense                                             5.304  5.357
    Switch from the start                             5.621  5.546
    Switch after a diversify phase                    5.389
    DTS  softmax weights, noise, no bar (paper code)  5.365           jump +0.118   cosine 0.67
         Gumbel weights, noise, no bar (paper code)   5.359  5.373         +0.004          0.96
         Gumbel weights, annealed noise, no bar       5.273                +0.060          0.72
         Gumbel weights, annealed noise, rising bar   5.281  5.319         +0.0004         1.00     the default
         the same, copies instead of masks            5.321
         the same, tau_min 0.1 / 1.0                  5.301 / 5.279

- Noise that stays: top-1 is then a sample for good, and training and held-out loss of one batch differ by 0.01 to 0.02.
  Annealed, the two are equal (0.001 apart while noise lasts), so evaluation is the same gate without noise.
- Without noise a low temperature alone does not make the gate sparse (7 of 8 experts at tau 0.3): the bar does. It
  rises from 0.001 to 0.5, where there is room for one, and the layers adapt while experts leave one by one.
- Time follows the rows: cpu_seconds against experts_per_token in log.jsonl is a line, 94 ms + 7.8 ms * experts per token for the
  three gpt runs of `tests/claims.py gpt --methods=evomoe` (D 64, 1024 tokens, one core; r^2 0.92 to 0.97), and 174 ms + 98 ms *
  experts per token where experts weigh more (2 layers, D 256, 2048 tokens; r^2 0.994).

Letters: E experts, D width, H hidden width of the first expert, tau temperature.
"""

import os
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

import dist
from experts import Experts, MoE
from router import DTS

# ---------------------------------------------------------------------------------------------------------------------
# What changes when


class Phase(NamedTuple):
    name: str
    start: int  # first step
    end: int  # first step of the next phase
    experts: int
    tau: tuple = (1.0, 1.0)  # temperature at start and end, linear between; the noise falls with it, from 1 to 0
    tight: tuple = (0.0, 0.0)  # how far the gate's bar has risen: from 0, its threshold, to 1


def phases(cfg):
    """The table of this run, in order; phases without steps are left out."""
    at = lambda share: round(share * cfg.max_steps)
    S, D, H = at(cfg.diversify), at(cfg.tau_until), at(cfg.hard_at)
    table = [Phase("diversify", 0, S, 1)]
    if cfg.gate == "dts":
        table += [
            Phase("anneal", S, D, cfg.n_experts, (cfg.tau_max, cfg.tau_min)),
            Phase("tighten", D, H, cfg.n_experts, (cfg.tau_min, cfg.tau_min), (0.0, 1.0)),
            Phase("hard", H, cfg.max_steps, cfg.n_experts, (cfg.tau_min, cfg.tau_min), (1.0, 1.0)),
        ]
    else:
        table += [Phase("mixture", S, cfg.max_steps, cfg.n_experts)]
    return [p for p in table if p.start < p.end]


def now(step, cfg):
    """What holds at a step: {"phase", "experts", "tau", "noise", "tight", "hard"}."""
    table = phases(cfg)
    p = next((p for p in table if step < p.end), table[-1])
    t = min(1.0, (step - p.start) / (p.end - p.start))
    tau, tight = (a + (b - a) * t for a, b in (p.tau, p.tight))
    noise = (tau - cfg.tau_min) / (cfg.tau_max - cfg.tau_min) if cfg.tau_max > cfg.tau_min else 0.0
    return {"phase": p.name, "experts": p.experts, "tau": tau, "noise": noise, "tight": tight, "hard": p.name == "hard"}


def check(cfg):
    """ValueError, one line, for a curriculum that cannot be."""
    if not 0 <= cfg.diversify < 1:
        raise ValueError(f"--diversify={cfg.diversify} must be a share of the run, from 0 to below 1")
    if cfg.gate == "dts" and not cfg.diversify <= cfg.tau_until <= cfg.hard_at:
        raise ValueError(f"the phases must be in order: --diversify={cfg.diversify} <= --tau_until={cfg.tau_until} "
                         f"<= --hard_at={cfg.hard_at}")  # fmt: skip
    if not 0 < cfg.tau_min <= cfg.tau_max:
        raise ValueError(f"--tau_min={cfg.tau_min} must be above 0 and at most --tau_max={cfg.tau_max}")
    if cfg.spawn not in ("mask", "copy", "noise", "importance"):
        raise ValueError(f"--spawn={cfg.spawn} is unknown; choose from mask, copy, noise, importance")
    if not 0 <= cfg.spawn_ratio <= 1:
        raise ValueError(f"--spawn_ratio={cfg.spawn_ratio} must be from 0 to 1")
    if cfg.expert_hidden and cfg.spawn != "importance" and starts_dense(cfg):
        raise ValueError("--expert_hidden: experts narrower than the FFN they come from need --spawn=importance")
    if cfg.distill and cfg.init_from == "scratch" and not cfg.teacher:
        raise ValueError("--distill needs a teacher: --init_from=OUT_DIR of a dense run, or --teacher=OUT_DIR")
    if cfg.distill and cfg.objective == "translation":
        raise ValueError("--distill works for --objective=roberta and gpt")


def starts_trained(cfg):
    return cfg.init_from not in ("scratch", "resume") and cfg.objective != "classify"


def starts_dense(cfg):
    """Does a fresh run begin with one expert per MoE layer?"""
    return cfg.n_experts == 1 or cfg.diversify > 0 or starts_trained(cfg)


def spawn_step(cfg):
    """The step at whose beginning one expert becomes n_experts (if that has not happened yet)."""
    return round(cfg.diversify * cfg.max_steps)


def set_phase(model, step, cfg):
    """Tell the gates what holds at this step; other gates' own schedules count from the spawn."""
    state = now(step, cfg)
    for gate in model.gates():
        inner = getattr(gate, "gate", gate)  # inside a permutation search
        if isinstance(inner, DTS):
            inner.set(state["tau"], state["noise"], state["tight"], state["hard"])
        gate.set_step(max(0, step - spawn_step(cfg)))


def show(cfg):
    """The table, for the start of a run; "" if nothing ever changes."""
    table = phases(cfg)
    if len(table) == 1 and not starts_trained(cfg) or cfg.n_experts == 1:
        return ""
    lines = ["phase      first step  experts  temperature"]
    for p in table:
        tau = " -> ".join(f"{t:g}" for t in dict.fromkeys(p.tau)) if cfg.gate == "dts" and p.experts > 1 else ""
        lines.append(f"{p.name:10} {p.start:10d}  {p.experts:7d}  {tau}".rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The spawn


def spawn(old, old_optimizer, new, new_optimizer, cfg, score=None):
    """Fill `new` (E experts per MoE layer, freshly built, on any mesh) and its optimizer from `old` (one expert each).

    Gates keep their initialisation; all else is carried over with its optimizer state. score: what `importance` gave,
    for spawn=importance. No communication: every rank has the first expert and makes its own children.
    """
    ancestors = dict(old.named_parameters())
    heirs = {}  # name in new -> function from a tensor of the ancestor's to the child's
    moes = [(name, m) for name, m in new.named_modules() if isinstance(m, MoE)]
    with torch.no_grad():
        for layer, (name, moe) in enumerate(moes):
            e0, first = old.get_submodule(name), moe.experts.first
            neurons = split(score[name], cfg.n_experts, moe.experts.w1.shape[1], cfg.spawn_ratio) if score else None
            born = [offspring(e0, layer, first + i, cfg, neurons) for i in range(moe.experts.n)]
            for weight in born[0]:
                moe.experts.get_parameter(weight).copy_(torch.stack([child[weight][0] for child in born]))
                heirs[f"{name}.experts.{weight}"] = lambda t, w=weight, born=born: torch.stack([c[w][1](t) for c in born])
        for name, p in new.named_parameters():
            ancestor = ancestors.get(name.replace(".ffn.experts.", ".ffn."))
            if ancestor is None:
                continue  # a gate
            heir = heirs.get(name, torch.clone)
            if name not in heirs:
                p.copy_(ancestor)
            moments = old_optimizer.state.get(ancestor, {}) if old_optimizer else {}
            if moments:
                grow = lambda t: heir(t) if t.shape == ancestor.shape else t.clone()  # "step" has another shape
                new_optimizer.state[p] = {key: grow(t) for key, t in moments.items()}


def offspring(e0, layer, e, cfg, neurons=None):
    """Expert e (global number) of a layer, grown from e0 (Experts with n = 1): {weight name: (value, heir)}, where
    heir maps a moment of e0's weight to the child's.

    mask        each weight is zero with probability ratio, in this child only
    noise       plus normal noise, ratio times the weights' own standard deviation
    copy        nothing changes: sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055)
    importance  the child's own selection of e0's hidden neurons, see split
    """
    rng = torch.Generator().manual_seed(((cfg.seed * 1009 + layer) * 1009 + e) * 2)  # even: Experts.init takes odd seeds
    born = {}
    for name, p in e0.named_parameters():  # w1 (1, H, D), w2 (1, H, D), b1 (1, H), b2 (1, D)
        heir, noise = (lambda t: t[0].clone()), 0.0
        if cfg.spawn == "importance" and name != "b2":
            heir = lambda t: t[0].index_select(0, neurons[e])
        elif cfg.spawn == "mask" and p.dim() == 3:
            keep = (torch.rand(p.shape[1:], generator=rng) >= cfg.spawn_ratio).to(p.device)
            heir = lambda t, keep=keep: t[0] * keep
        elif cfg.spawn == "noise" and p.dim() == 3:
            noise = cfg.spawn_ratio * p.std() * torch.randn(p.shape[1:], generator=rng).to(p.device)
        born[name] = heir(p) + noise, heir
    return born


def importance(dense, losses):
    """How much each hidden neuron matters (MoEBERT, arXiv:2204.07675, section 3.1): {name of FFN: (H,)}.

        I_j = sum over samples of | <w1_j, dL/dw1_j> + <w2_j, dL/dw2_j> |

    to first order the change of a sample's loss when neuron j is removed. losses: one scalar per sample, from a forward
    of its own each (a generator does). The absolute value is per sample: in the gradient of the mean, a neuron that
    helps one sample and hurts another looks useless. In eval mode: without dropout.
    """
    dense.eval()
    ffns = {name: m for name, m in dense.named_modules() if isinstance(m, Experts)}
    score = {name: 0.0 for name in ffns}
    for loss in losses:
        grads = iter(torch.autograd.grad(loss, [w for f in ffns.values() for w in (f.w1, f.w2)]))
        for name, f in ffns.items():
            score[name] += ((f.w1 * next(grads)).sum(2) + (f.w2 * next(grads)).sum(2))[0].detach().abs()
    return score


def split(score, n_experts, width, share):
    """Cut an FFN into experts: score (H,) -> n_experts times (width,) neuron numbers. In order of falling importance the
    first share * width go to every expert, the rest is dealt out like cards, and what nobody has room for is dropped."""
    order, shared = score.argsort(descending=True, stable=True), round(share * width)
    if shared + n_experts * (width - shared) > len(score):
        raise ValueError(f"{len(score)} neurons cannot give {n_experts} experts {shared} common ones and {width - shared} of "
                         f"their own: lower --expert_hidden={width} or share more (--spawn_ratio={share})")  # fmt: skip
    return [torch.cat([order[:shared], order[shared + e :: n_experts]])[:width] for e in range(n_experts)]


# ---------------------------------------------------------------------------------------------------------------------
# Starting from trained weights


def trained(where):
    """Weights to start from: the out_dir of a dense run of this project, or GPT-2 by name (gpt2, gpt2-medium, ...) or
    folder, if the package transformers is installed. -> {Config field: value} that they need, {name: tensor}."""
    if os.path.isdir(where) and not os.path.exists(os.path.join(where, "config.json")):
        path = dist.latest(where)
        if path is None:
            raise ValueError(f"--init_from={where}: no checkpoint (ckpt_*.pt) there")
        state = dist.load(path)
        if not is_dense(state):
            raise ValueError(f"{path} holds a mixture already: --init_from takes a dense run (--n_experts=1)")
        fields = "objective dataset n_layer n_head n_embd n_hidden block_size bias activation".split()
        return {name: state["config"][name] for name in fields}, state["model"]
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise ValueError(f"--init_from={where} needs the package transformers: pip install transformers") from None
    try:
        return from_gpt2(GPT2LMHeadModel.from_pretrained(where))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--init_from={where}: {str(error).splitlines()[0]}") from None


def is_dense(state):
    """Does a checkpoint hold one expert per MoE layer?"""
    return not any(".ffn.experts." in name for name in state["model"])


def from_gpt2(gpt2):
    """A transformers GPT2LMHeadModel in our names -> {Config field: value}, {name: tensor}. Its linear layers are
    stored (in, out); its GELU is the tanh form, from which the exact one differs by up to 5e-4."""
    c, theirs = gpt2.config, gpt2.transformer.state_dict()
    fields = dict(objective="gpt", n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_hidden=c.n_inner or 0, bias=True,
                  activation="gelu_tanh")  # fmt: skip
    ours = {"wte.weight": theirs["wte.weight"], "wpe.weight": theirs["wpe.weight"]}
    ours |= {f"stack.ln.{part}": theirs[f"ln_f.{part}"] for part in ("weight", "bias")}
    for i in range(c.n_layer):
        a, b = f"h.{i}.", f"stack.blocks.{i}."
        for part in ("weight", "bias"):
            ours |= {f"{b}ln1.{part}": theirs[f"{a}ln_1.{part}"], f"{b}ln2.{part}": theirs[f"{a}ln_2.{part}"]}
            qkv = theirs[f"{a}attn.c_attn.{part}"]  # (D, 3D) or (3D,)
            ours |= {f"{b}attn.q.{part}": qkv[..., : c.n_embd].t(), f"{b}attn.kv.{part}": qkv[..., c.n_embd :].t()}
            ours[f"{b}attn.out.{part}"] = theirs[f"{a}attn.c_proj.{part}"].t()
        for n, name in (1, "c_fc"), (2, "c_proj"):
            w = theirs[f"{a}mlp.{name}.weight"]  # (D, H), then (H, D); ours are both (H, D)
            ours[f"{b}ffn.w{n}"] = (w.t() if n == 1 else w)[None]
            ours[f"{b}ffn.b{n}"] = theirs[f"{a}mlp.{name}.bias"][None]
    return fields, ours


def load_weights(model, weights, mesh):
    """Put `trained` weights into a dense model. Positions beyond block_size are left out; tokens that the weights do
    not know (special tokens of our corpora, the last ids) keep their initialisation. ValueError where it does not fit."""
    weights = dict(weights)
    V = len(weights["wte.weight"])
    if model.V < V:
        raise ValueError(f"the weights know {V} tokens, the corpus only {model.V}: prepare it with the same --tokenizer")
    weights["wte.weight"] = torch.cat([weights["wte.weight"], model.wte.weight[V:].detach().cpu()])
    weights["wpe.weight"] = weights["wpe.weight"][: model.cfg.block_size]
    dist.load_state(model, None, {"model": weights}, mesh)


# ---------------------------------------------------------------------------------------------------------------------
# Distillation from the dense teacher


@contextmanager
def watch(model):
    """with watch(model) as seen: model(...)    then seen holds the embedding output, every block's output (B, T, D) and
    last the logits. model None: nothing is watched."""
    seen = []
    if model is None:
        yield seen
        return
    hooks = [model.dropout.register_forward_hook(lambda module, args, out: seen.append(out))]
    for m in [*model.stack.blocks, model]:
        hooks.append(m.register_forward_hook(lambda module, args, out: seen.append(out[0])))
    yield seen
    for hook in hooks:
        hook.remove()


def distillation(student, teacher, live, n_positions, n_targets):
    """How far a student is from its teacher (MoEBERT, eqs. 5 to 7): (mse, kl), this rank's share of the global values.

        mse = sum over layers (embeddings included) of the mean squared difference, padding left out
        kl  = mean over targets of 1/2 [KL(p || q) + KL(q || p)] = 1/2 sum_v (p - q) (log p - log q)

    student, teacher: what `watch` saw. live (B, T) bool, False = padding, or None. n_positions, n_targets: live
    positions and predicted tokens of the global batch. The teacher runs in eval mode, without gradient."""
    mse = 0.0
    for s, t in zip(student[:-1], teacher[:-1]):
        square = (s.float() - t.float()).square().mean(-1)  # (B, T)
        mse = mse + (square if live is None else square[live]).sum() / n_positions
    p, q = student[-1].float().log_softmax(-1), teacher[-1].float().log_softmax(-1)  # (M, V)
    return torch.stack([mse, 0.5 * ((p.exp() - q.exp()) * (p - q)).sum() / n_targets])
