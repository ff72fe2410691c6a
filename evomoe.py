"""
EvoMoE's curriculum: train one expert, spawn many from it, then let the gate learn how many each token needs.

    python train.py --gate=dts                         the default; --diversify=SHARE is the first phase's length

    phase       experts  what happens (after Nie et al. 2021, arXiv:2112.14397; the rising bar is ours)
    diversify   1        each MoE layer is one FFN: exactly the dense model (the paper's name; experts differ later)
    dense       E        experts spawned from it; the gate, not the model, is dense: it asks all (and may cool)
    tighten     E        the bar that a gate value must clear rises: each token keeps as many experts as clear it
    hard        E        the k best only

The spawn is the business of this file; the three phases after it are the schedule of one gate (router.DTS), which like
every gate's is a pure function of the step, counted from the spawn. Any other gate can have the first phase too; then
one phase follows, "mixture". The same file holds the other ways in:

    python train.py --gate=switch --diversify=0.05 --spawn=copy         sparse upcycling within one run
    python train.py --gate=dts --init_from=out-dense                    the first phase is a finished run, or gpt2
    python train.py --objective=roberta --n_experts=1 --out_dir=out-teacher                      MoEBERT: a teacher
    python train.py --objective=roberta --init_from=out-teacher --moe_every=1 --n_experts=4 --gate=hash --distill=1 \
        --spawn=importance --expert_hidden=128 --spawn_ratio=0.67 --out_dir=out-student      a student; or --gate=comet

and one way out, to_gpt2: a dense run becomes a GPT-2 of the package transformers.

Decisions (the paper's abstract and code leave these open; its body was not available to us):
- The spawn happens at the beginning of a step: the checkpoint after spawn_step updates still holds one expert.
- A new model is built and filled, nothing is patched: what does not grow is carried over with its optimizer state. An
  expert inherits the moments of the first one, zero where its mask is, and the step count; the gate starts afresh.
- A mask is applied once: a zeroed weight may grow again. It is drawn from (seed, mixture, expert's global number), so
  that any number of processes spawns the same experts. Biases are copied.
- A spawn without change (ratio 0, or copies) keeps the function if the gate's weights sum to 1, which those of DTS do
  at the start; a top-1 gate multiplies by p < 1 and has to recover. Copies under equal weights never part: they get the
  same gradient at every step. Masks part them at once.
- Without noise a low temperature (0.3) does not make a gate sparse, a rising bar does; noise that stays makes top-1 a
  sample.
- Asking all E for a short time is enough: it is what EvoMoE costs, and longer bought nothing here (tests/RESULTS.md).

Letters: E experts, D width, H hidden width of the first expert, tau temperature.
"""

import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch

import dist
from data.bpe import gpt2_tokenizer
from data.flags import closest
from experts import Experts, MoE, expert_seed
from model import make_optimizer

SPAWNS = ("mask", "noise", "copy", "importance")  # see offspring

# ---------------------------------------------------------------------------------------------------------------------
# What changes when


def spawn_step(cfg):
    """The step at whose beginning one expert becomes n_experts (if that has not happened yet); the last at the
    latest."""
    return min(round(max(0.0, cfg.diversify) * cfg.max_steps), cfg.max_steps - 1)


def mixture_steps(cfg):
    """Steps from the spawn to the end: the run as the gates count it."""
    return cfg.max_steps - spawn_step(cfg)


def phases(cfg, gate):
    """The table of a run with such gates: [(name, updates made before it, experts)], in order; phases without steps are
    left out."""
    S = spawn_step(cfg)
    table = [("diversify", 0, 1)] if S > 0 else []
    return table + [(name, S + first, cfg.n_experts) for name, first in gate.phases()]


def set_step(model, step, cfg):
    """Tell the gates which step begins; their schedules count from the spawn."""
    for gate in model.gates():
        gate.set_step(max(0, step - spawn_step(cfg)))


def show(cfg, mixture, dense_first=True):
    """The table, for the start of a run that will train the model `mixture`; "" if nothing ever changes. dense_first:
    is its spawn still to come?"""
    gates = mixture.gates()
    table = [row for row in (phases(cfg, gates[0]) if gates else []) if dense_first or row[0] != "diversify"]
    if len(table) < 2:
        return ""
    rows = [f"{name:10} {first:10d}  {experts:7d}" for name, first, experts in table]
    return "\n".join(["phase      after step  experts", *rows])


def check(cfg, state):
    """ValueError, one line, for a curriculum that cannot be, from the state (of a checkpoint; or {}) it begins with."""
    width = cfg.n_hidden or 4 * cfg.n_embd
    if cfg.spawn == "importance" and starts_dense(cfg, state):
        split(torch.zeros(width), cfg.n_experts, cfg.expert_hidden or width, cfg.spawn_ratio)
    elif cfg.expert_hidden not in (0, width) and starts_dense(cfg, state) and cfg.n_experts > 1:
        raise ValueError(
            f"--expert_hidden={cfg.expert_hidden}: experts of another width than the FFN they come from "
            f"({width}) need --spawn=importance, or --diversify=0"
        )
    overdue = "optimizer" in state and spawn_step(cfg) < state["step"] < cfg.max_steps and not cfg.eval_only
    if overdue and is_dense(state) and cfg.n_experts > 1:
        raise ValueError(
            f"--diversify={cfg.diversify} of --max_steps={cfg.max_steps}: experts were due after step "
            f"{spawn_step(cfg)}, but step {state['step']} still has one per layer, and the gate's phases would be cut "
            "short: raise either"
        )
    if cfg.teacher and not cfg.distill:
        raise ValueError(f"--teacher={cfg.teacher} teaches nothing without --distill=WEIGHT, 1 to 5")
    if cfg.distill and not starts_trained(cfg) and not cfg.teacher:
        raise ValueError(
            f"--distill={cfg.distill} needs a teacher: --init_from=OUT_DIR of a dense run, or --teacher=OUT_DIR"
        )


def starts_trained(cfg):
    """Does a fresh run begin with the weights of a dense one?"""
    return cfg.init_from not in ("scratch", "resume")


def starts_dense(cfg, state):
    """Is there one expert per MoE layer at the start: in the weights it begins with, or, if there are none, by plan?"""
    return is_dense(state) if state else cfg.n_experts == 1 or cfg.diversify > 0


# ---------------------------------------------------------------------------------------------------------------------
# The spawn


def spawn_if_due(run, step, task_loss):
    """One expert per MoE layer becomes n_experts when the first phase is over: a new model and optimizer, filled from
    the old ones. True if that happened now."""
    cfg, old = run.cfg, run.model
    if cfg.n_experts == 1 or old.moes() or step < spawn_step(cfg):
        return False
    scores = None
    if cfg.spawn == "importance":
        mine = importance(old, sample_losses(run, task_loss))
        scores = run.mesh.from_main({name: s.cpu() for name, s in mine.items()})  # ranks may differ in the last digit
        scores = {name: s.to(run.mesh.device) for name, s in scores.items()}
    model = run.build(cfg.n_experts)
    optimizer = make_optimizer(model, cfg)
    grow(old, run.optimizer, model, optimizer, cfg, scores)
    run.model, run.optimizer = model.train(), optimizer
    run.say(
        f"step {step:5d} | one expert per layer becomes {cfg.n_experts} ({cfg.spawn}): "
        f"{model.n_params()[0] / 1e6:.2f} M parameters"
    )
    return True


def sample_losses(run, task_loss, n=256):
    """The mean loss of each of n training sequences, one graph at a time: what importance wants."""
    for step in range(math.ceil(n / run.cfg.batch_size)):
        batch = run.objective.train_batch(step, run.mesh.n_nodes)
        for i in range(min(n - step * run.cfg.batch_size, run.cfg.batch_size)):
            nll = task_loss(run.model, {name: t[i : i + 1].to(run.mesh.device) for name, t in batch.items()}).nll
            if nll.numel():  # a short sequence may have no masked token
                yield nll.mean()


def grow(old, old_optimizer, new, new_optimizer, cfg, scores=None):
    """Fill `new` (E experts per MoE layer, freshly built, on any mesh) and its optimizer from `old` (one expert each).

    Gates keep their initialisation; all else is carried over with its optimizer state. scores: what `importance` gave,
    for --spawn=importance. No communication: every rank has the first expert and makes its own children.
    """
    ancestors = dict(old.named_parameters())
    of_moments = {}  # name in new -> for each child: a moment of the ancestor's weight (1, ...) -> the child's (...)
    moes = [(name, m) for name, m in new.named_modules() if isinstance(m, MoE)]
    with torch.no_grad():
        for nth, (name, moe) in enumerate(moes):
            e0, first = old.get_submodule(name), moe.experts.first
            width = moe.experts.w1.shape[1]
            neurons = split(scores[name], cfg.n_experts, width, cfg.spawn_ratio) if scores else None
            born = [offspring(e0, nth, first + i, cfg, neurons) for i in range(moe.experts.n)]
            if moe.shared:
                moe.shared.w2.zero_()  # it has no ancestor: silent at first, so that the function is the one before
            for weight in born[0]:
                moe.experts.get_parameter(weight).copy_(torch.stack([child[weight].value for child in born]))
                of_moments[f"{name}.experts.{weight}"] = [child[weight].of_moment for child in born]
        for name, p in new.named_parameters():
            ancestor = ancestors.get(name.replace(".ffn.experts.", ".ffn."))
            if ancestor is None:
                continue  # a gate, or a shared expert
            if name not in of_moments:
                p.copy_(ancestor)
            moments = old_optimizer.state.get(ancestor, {}) if old_optimizer else {}
            if moments:
                new_optimizer.state[p] = {key: inherit(t, ancestor, of_moments.get(name)) for key, t in moments.items()}


def inherit(moment, ancestor, of_moments=None):
    """An optimizer's tensor of the ancestor's -> the descendant's; of_moments: one function per child, or None."""
    if of_moments is None or moment.shape != ancestor.shape:  # the step count has another shape
        return moment.clone()
    return torch.stack([of_moment(moment) for of_moment in of_moments])


class Child(NamedTuple):
    """One weight of a new expert, and how a moment of the ancestor's weight becomes the child's."""

    value: torch.Tensor
    of_moment: Callable[[torch.Tensor], torch.Tensor]


def offspring(e0, nth, e, cfg, neurons=None):
    """Expert e (global number) of the model's nth mixture, grown from e0 (Experts with n = 1): {weight name: Child}.

    mask        each weight is zero with probability ratio, in this child only
    noise       plus normal noise, ratio times the weights' own standard deviation
    copy        nothing changes: sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055)
    importance  the child's own selection of e0's hidden neurons, see split
    """
    rng = torch.Generator().manual_seed(expert_seed(cfg.seed, nth, e))
    born = {}
    for name, p in e0.named_parameters():  # w1 (1, H, D), w2 (1, H, D), b1 (1, H), b2 (1, D)
        of_moment, noise = (lambda t: t[0].clone()), 0.0
        if cfg.spawn == "importance" and name != "b2":
            of_moment = lambda t: t[0].index_select(0, neurons[e])
        elif cfg.spawn == "mask" and p.dim() == 3:
            keep = (torch.rand(p.shape[1:], generator=rng) >= cfg.spawn_ratio).to(p.device)
            of_moment = lambda t, keep=keep: t[0] * keep
        elif cfg.spawn == "noise" and p.dim() == 3:
            noise = cfg.spawn_ratio * p.std() * torch.randn(p.shape[1:], generator=rng).to(p.device)
        born[name] = Child(of_moment(p) + noise, of_moment)
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
    matrices = {name: [p for p in f.parameters() if p.dim() == 3] for name, f in ffns.items()}  # (1, H, D) each
    loss = None
    for loss in losses:
        grads = iter(torch.autograd.grad(loss, [p for ps in matrices.values() for p in ps]))
        for name, ps in matrices.items():
            score[name] += sum((p * next(grads)).sum(2) for p in ps)[0].detach().abs()
    if loss is None:
        raise ValueError("--spawn=importance found nothing to predict in the first training batches: use more text")
    return score


def split(score, n_experts, width, share):
    """Cut an FFN into experts: score (H,) -> n_experts times (width,) neuron numbers. In order of falling importance
    the first share * width go to every expert, the rest is dealt out like cards, and what nobody has room for is
    dropped. ValueError if there are too few neurons."""
    order, shared = score.argsort(descending=True, stable=True), round(share * width)
    if shared + n_experts * (width - shared) > len(score):
        raise ValueError(
            f"{len(score)} neurons cannot give {n_experts} experts {shared} common ones and "
            f"{width - shared} of their own: lower --expert_hidden={width} or share more "
            f"(--spawn_ratio={share})"
        )
    return [torch.cat([order[:shared], order[shared + e :: n_experts]])[:width] for e in range(n_experts)]


# ---------------------------------------------------------------------------------------------------------------------
# Starting from trained weights


DENSE_FIELDS = "objective n_layer n_head n_embd n_hidden block_size bias activation".split()
MODEL_FIELDS = DENSE_FIELDS + "n_experts moe_every gate k gate_args permute expert_hidden shared_hidden".split()


def agree(given, fields, where, flag, also=()):
    """ValueError if flags contradict what trained weights need, a config or a part of it; flag: which one named them;
    also: more of its fields."""
    differ = [
        f"{n}={given[n]!r} (there: {fields[n]!r})"
        for n in (*MODEL_FIELDS, *also)
        if n in given and n in fields and given[n] != fields[n]
    ]
    if differ:
        raise ValueError(
            f"{where} is from another config: {', '.join(differ)}; drop these flags, or choose another {flag}"
        )


def whole(where, objective, mesh):
    """A model to fine-tune, trained for `objective`: like `trained`, but all of it, a mixture with its gates."""
    path, state = dist.newest(where, mesh)
    config = state["config"]
    if config.get("objective") != objective:
        raise ValueError(
            f"--init_from={where}: {path} is a model for {config.get('objective', 'no known objective')}; "
            f"fine-tuning needs a run of --objective={objective}"
        )
    names = {*MODEL_FIELDS, "capacity_factor", "drop_order", "seed"} - {"objective"}
    fields = {name: value for name, value in config.items() if name in names}
    if is_dense(state):
        fields["n_experts"] = 1
    return fields, {name: state[name] for name in ("model", "n_domains", "vocabulary") if name in state}


def trained(where, mesh, flag="init_from"):
    """Weights to start from: the out_dir of a dense run of this project, or GPT-2 by name (gpt2, gpt2-medium, ...) or
    folder, if the package transformers is installed. -> {Config field: value} that they need, {"model": {name: tensor},
    ...}. ValueError, the same on every rank, if there are none; flag: how the user named them."""

    def is_ours():
        if not os.path.isdir(where) and not where.startswith("gpt2"):
            known = ["scratch", "resume", "gpt2"] if flag == "init_from" else ["gpt2"]
            raise ValueError(
                f"--{flag}={where} is unknown{closest(where, known)}; choose from {', '.join(known)}, or "
                "the folder of a dense run"
            )
        return os.path.isdir(where) and not os.path.exists(os.path.join(where, "config.json"))

    if mesh.on_all(is_ours):
        path, state = dist.newest(where, mesh)
        if not is_dense(state):
            raise ValueError(f"{path} holds a mixture already: --{flag} takes a dense run (--n_experts=1)")
        fields = {n: state["config"][n] for n in ("dataset", *DENSE_FIELDS) if n in state["config"]}
        return fields, {n: state[n] for n in ("model", "vocabulary") if n in state}
    return mesh.on_all(lambda: load_gpt2(where, flag))


def load_gpt2(where, flag):
    """`trained` for GPT-2's published weights, an option that needs one more package."""
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise ValueError(f"--{flag}={where} needs the package transformers: pip install transformers") from None
    try:
        fields, weights = from_gpt2(GPT2LMHeadModel.from_pretrained(where))
        state = {"model": weights}
        if len(weights["wte.weight"]) == 50257:  # the published vocabulary; any other is its owner's affair
            state["vocabulary"] = gpt2_tokenizer().fingerprint()
        return fields, state
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--{flag}={where}: {str(error).splitlines()[0]}") from None


def is_dense(state):
    """Does a checkpoint hold one expert per MoE layer?"""
    return not any(".ffn.experts." in name for name in state["model"])


def from_gpt2(gpt2):
    """A transformers GPT2LMHeadModel in our names -> {Config field: value}, {name: tensor}. Its linear layers are
    stored (in, out); its GELU is the tanh form, from which the exact one differs by up to 5e-4. ValueError names a
    setting of theirs that our model does not have."""
    c, theirs = gpt2.config, gpt2.transformer.state_dict()
    only = dict(
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        add_cross_attention=False,
    )
    for name, value in only.items():
        if getattr(c, name, value) != value:
            raise ValueError(
                f"this GPT-2 has {name}={getattr(c, name)!r}, our GPT only {value!r}: its logits would differ"
            )
    fields = dict(objective="gpt", n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_hidden=c.n_inner or 0,
                  bias=True, activation="gelu_tanh")  # fmt: skip
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


def to_gpt2(state):
    """The inverse, for a dense checkpoint (dist.find's state) of --objective=gpt: -> {GPT2Config setting: value},
    {name: tensor}, exact. Biases that our model does not have are zeros there. ValueError for any other checkpoint."""
    c, ours = state["config"], state["model"]
    activations = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
    if not is_dense(state) or c["objective"] != "gpt" or c["activation"] not in activations:
        raise ValueError(
            f"a GPT-2 is a dense run of --objective=gpt with GELU, this is one of {c['objective']} with "
            f"{c['n_experts']} experts and {c['activation']}"
        )
    V, D = ours["wte.weight"].shape
    H = ours["stack.blocks.0.ffn.w1"].shape[1]
    shape = dict(vocab_size=V, n_positions=len(ours["wpe.weight"]), n_embd=D, n_inner=H)
    how = dict(n_layer=c["n_layer"], n_head=c["n_head"], bos_token_id=None, eos_token_id=None,
               activation_function=activations[c["activation"]])  # fmt: skip

    def get(name, zeros):
        return ours.get(name, torch.zeros(zeros))

    theirs = {name: ours[name] for name in ("wte.weight", "wpe.weight")}
    theirs |= {"ln_f.weight": ours["stack.ln.weight"], "ln_f.bias": get("stack.ln.bias", D)}
    for i in range(c["n_layer"]):
        a, b = f"h.{i}.", f"stack.blocks.{i}."
        for part in ("weight", "bias"):
            theirs |= {f"{a}ln_{n}.{part}": get(f"{b}ln{n}.{part}", D) for n in (1, 2)}
        q, kv, out = (ours[f"{b}attn.{name}.weight"] for name in ("q", "kv", "out"))  # (out, in); theirs: (in, out)
        theirs |= {f"{a}attn.c_attn.weight": torch.cat([q, kv]).t(), f"{a}attn.c_proj.weight": out.t()}
        biases = get(f"{b}attn.q.bias", D), get(f"{b}attn.kv.bias", 2 * D)
        theirs |= {f"{a}attn.c_attn.bias": torch.cat(biases), f"{a}attn.c_proj.bias": get(f"{b}attn.out.bias", D)}
        theirs |= {f"{a}mlp.c_fc.weight": ours[f"{b}ffn.w1"][0].t(), f"{a}mlp.c_proj.weight": ours[f"{b}ffn.w2"][0]}
        theirs |= {
            f"{a}mlp.c_fc.bias": get(f"{b}ffn.b1", (1, H))[0],
            f"{a}mlp.c_proj.bias": get(f"{b}ffn.b2", (1, D))[0],
        }
    theirs = {f"transformer.{name}": t.contiguous() for name, t in theirs.items()}
    return shape | how, theirs | {"lm_head.weight": ours["wte.weight"]}


def load_weights(model, weights, mesh):
    """Put the weights of another run into a model. Positions beyond block_size are left out; tokens that the weights do
    not know (special tokens of our corpora, the last ids) and a classifier's head that they lack keep their
    initialisation. ValueError if it does not fit."""
    weights = dict(weights)
    V = len(weights["wte.weight"])
    if model.V < V:
        raise ValueError(
            f"the weights know {V} tokens, the corpus only {model.V}: prepare it with the same --tokenizer"
        )
    weights["wte.weight"] = torch.cat([weights["wte.weight"], model.wte.weight[V:].detach().cpu()])
    weights["wpe.weight"] = weights["wpe.weight"][: model.cfg.block_size]
    fresh = {name: t for name, t in dist.named_tensors(model).items() if name.startswith("classifier.")}
    dist.load_state(model, None, {"model": fresh | weights}, mesh)


# ---------------------------------------------------------------------------------------------------------------------
# Distillation from the dense teacher


def load_teacher(cfg, build, mesh, vocabulary, before):
    """The dense model that a distilled one follows, from the run that the config names, and {its folder: checksum of
    its weights}. build: train.build_model for a number of experts; vocabulary: the corpus's fingerprint; before: that
    dict of a resumed run, or {}. ValueError if the two cannot be compared, or if the folder holds other weights now."""
    cfg.teacher = cfg.teacher or cfg.init_from  # the config goes into the checkpoints: a resumed run finds it there
    fields, state = trained(cfg.teacher, mesh, "teacher")
    teacher = build(1).eval().requires_grad_(False)
    if not hasattr(teacher, "stack"):
        raise ValueError(f"--distill={cfg.distill} works for one stack of blocks, not for an encoder and a decoder")
    if getattr(teacher, "classifier", None) and not any(name.startswith("classifier.") for name in state["model"]):
        raise ValueError(f"{cfg.teacher} has no classifier to learn from: name a run of --objective=classify")
    agree(vars(cfg), {n: v for n, v in fields.items() if n != "block_size"}, cfg.teacher, "--teacher")
    if state.get("vocabulary") not in (None, vocabulary):
        raise ValueError(f"--teacher={cfg.teacher} has another vocabulary than --dataset={cfg.dataset}")
    load_weights(teacher, state["model"], mesh)
    sums = mesh.from_all(dist.checksum(teacher.parameters()))
    if len(set(sums)) > 1:
        raise ValueError(f"--teacher={cfg.teacher} has other weights for some processes: copy it to all nodes")
    folder = os.path.normpath(cfg.teacher)
    if before.get(folder, sums[0]) != sums[0]:
        raise ValueError(
            f"{cfg.teacher} has other weights than the teacher that this run has followed so far: put those back, or "
            "go on with another --teacher (a copy of the folder will do) or without one, --distill=0"
        )
    return teacher, {folder: sums[0]}


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
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def distillation(student, teacher, n_positions, n_targets):
    """How far a student is from its teacher (MoEBERT, eqs. 5 to 7), this rank's share of the global values:

        mse = sum over layers (embeddings included) of the mean squared difference
        kl  = mean over targets of 1/2 [KL(p || q) + KL(q || p)] = 1/2 sum_v (p - q) (log p - log q)

    student, teacher: what `watch` saw. n_positions, n_targets: all and predicted tokens of the global batch. The
    teacher runs in eval mode, without gradient."""
    mse = 0.0
    for s, t in zip(student[:-1], teacher[:-1]):
        mse = mse + (s.float() - t.float()).square().mean(-1).sum() / n_positions  # of (B, T)
    p, q = student[-1].float().log_softmax(-1), teacher[-1].float().log_softmax(-1)  # (M, V)
    return {"mse": mse, "kl": 0.5 * ((p.exp() - q.exp()) * (p - q)).sum() / n_targets}
