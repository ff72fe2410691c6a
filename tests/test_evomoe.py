"""
The curriculum: phases and the gates' schedules, the spawn on any number of processes, resuming at every border,
upcycling, MoEBERT's split and distillation. Runs go through train.main on a corpus of a few thousand bytes.
"""

import copy
import dataclasses
import functools
import math
import os
import shutil
import types

import pytest
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ranks import run_ranks
import dist
import evomoe
import runs
import train
from data.bpe import make_tokenizer
from data.files import write_text
from data.objectives import LanguageModelling
from experts import Experts, feed_forward
from model import GPT, RoBERTa, Translator

E, V = 4, 50
SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, n_experts=E, batch_size=4, gate="dts")


def config(**more):
    return train.configure({**SIZES, **more})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("corpus"))
    text = "".join(chr(97 + i * i % 23) + " " * (i % 3 == 0) for i in range(3000))
    write_text(folder, make_tokenizer("bytes", 0, ()), {"train": {"x": [text]}, "val": {"x": [text[:70]]}}, "made up")
    return folder


def train_on(corpus, out, **flags):
    """train.main on the tiny corpus -> its log."""
    flags = {**SIZES, "dataset": corpus, "out_dir": str(out), "max_steps": 8, "warmup": 2, "log_every": 1,
             "save_every": 1,
             "eval_every": 0, "sample_tokens": 1, "device": "cpu", **flags}  # fmt: skip
    train.main([f"--{name}={value}" for name, value in flags.items()])
    return runs.log(out)


def small_gpt(cfg, mesh=None, n_experts=0):
    cfg = dataclasses.replace(cfg, n_experts=n_experts or cfg.n_experts)
    return GPT(cfg, V, functools.partial(feed_forward, cfg, mesh=mesh, V=V, steps=evomoe.mixture_steps(cfg)))


def start_without_a_folder(rank, world, folder):
    """Process 1 sees no out_dir called dense."""
    os.chdir(folder if rank == 0 else folder / "elsewhere")
    with pytest.raises(ValueError, match=r"--init_from=dense is unknown.* \(process 1\)"):
        evomoe.trained("dense", dist.make_mesh(rank, world, E))


def test_a_folder_that_one_process_does_not_see_is_everybodys_error(tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "elsewhere").mkdir()
    run_ranks(2, start_without_a_folder, tmp_path)


def losses(log):
    return [entry["loss"] for entry in log if "loss" in entry]


# -- phases ----------------------------------------------------------------------------------------------------------


def test_phases():
    """A run of 100 steps with the spawn after 10: the gate's shares are of the 90 that follow."""
    cfg = config(
        diversify=0.1, gate_args="tau_max=2,tau_min=0.4,noise=annealed,dense=0.3333,hard=0.5556", max_steps=100
    )
    model = small_gpt(cfg)
    (gate,) = model.gates()
    assert evomoe.phases(cfg, gate) == [("diversify", 0, 1), ("dense", 10, E), ("tighten", 40, E), ("hard", 60, E)]

    def at(step):
        evomoe.set_step(model, step, cfg)
        return float(gate.tau), float(gate.noise), float(gate.bar), bool(gate.hard), gate.k, gate.report()["phase"]

    assert at(10) == pytest.approx((2.0, 1.0, 0.001, False, E, "dense"))
    assert at(25)[:3] == pytest.approx((1.2, 0.5, 0.001))
    assert at(39)[2] == pytest.approx(0.001) and at(40)[:3] == pytest.approx((0.4, 0.0, 0.001))
    assert at(50)[:3] == pytest.approx((0.4, 0.0, 0.0005**0.5)) and at(50)[5] == "tighten"
    assert at(59)[3:] == (False, E, "tighten") and at(60)[3:] == at(1000)[3:] == (True, 1, "hard")
    assert at(60)[2] == pytest.approx(0.5)
    cfg = dataclasses.replace(cfg, gate_args="noise=constant,dense=0.3333,hard=0.5556")
    model = small_gpt(cfg)
    (gate,) = model.gates()
    assert at(25)[1] == at(50)[1] == at(1000)[1] == 1

    def shown(**more):
        return evomoe.show(config(**more), small_gpt(config(**more)))

    assert shown(gate="switch", diversify=0.1).split() == "phase after step experts diversify 0 1 mixture 60 4".split()
    assert shown(gate="switch") == shown(n_experts=1) == ""
    assert "permuted            4" in shown(gate="switch", permute=0.05, max_steps=100)
    assert "frozen             10" in shown(gate="stablemoe", max_steps=100)
    assert "tighten            40        4" in evomoe.show(cfg, model)
    for steps, share, spawn in ((6, 0.95, 5), (1, 0.6, 0), (100, 0.29, 29)):  # a run ends as what it is called
        assert evomoe.spawn_step(config(max_steps=steps, diversify=share)) == spawn


@pytest.mark.parametrize("wrong", [
    dict(diversify=1.0), dict(gate_args="dense=0.7,hard=0.6"), dict(gate_args="tau_min=0"),
    dict(gate_args="tau_min=3"),
    dict(spawn="clone"), dict(spawn_ratio=1.5), dict(distill=1.0), dict(diversify=0.1, expert_hidden=8),
    dict(init_from="gtp2"), dict(diversify=0.1, spawn="importance", expert_hidden=64, spawn_ratio=0.1),
])  # fmt: skip
def test_wrong_flags_are_one_line(wrong, corpus, tmp_path):
    """Refused at the start: nothing is written."""
    with pytest.raises(ValueError) as error:
        train_on(corpus, tmp_path / "out", **wrong)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# -- the gates' schedules ----------------------------------------------------------------------------------------------


def test_the_gradient_does_not_jump_at_the_hard_switch():
    """From the last soft step to the first hard one, same weights and batch: the gradient moves by less than 5 % of its
    norm and keeps its direction. A switch from the paper's bar of 0.001, without tightening, moves it by 30 %."""
    cfg = config(max_steps=600, n_experts=8, diversify=0.0)
    x = torch.randint(V, (16, 17), generator=torch.Generator().manual_seed(0))

    def gradient(step, cfg):
        model = small_gpt(cfg)
        evomoe.set_step(model, step, cfg)
        loss = nn.functional.cross_entropy(model(x[:, :-1])[0].flatten(0, 1), x[:, 1:].flatten())
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, [p for m in model.moes() for p in m.parameters()])]
        )

    def jump(dense):
        here = dataclasses.replace(cfg, gate_args=f"tau_max=2,tau_min=0.3,noise=annealed,init=1,dense={dense},hard=0.4")
        soft, hard = gradient(239, here), gradient(240, here)
        return float((soft - hard).norm() / hard.norm()), float(torch.cosine_similarity(soft, hard, 0))

    moved, cosine = jump(0.25)
    assert moved < 0.05 and cosine > 0.998
    assert jump(0.4)[0] > 0.2


def test_schedules_of_a_gate_are_shares_of_what_follows_the_spawn():
    cfg = config(gate="deepseekv3", diversify=0.5, max_steps=100)
    model = small_gpt(cfg)
    moving = []
    for step in range(100):
        evomoe.set_step(model, step, cfg)
        moving.append(bool(model.gates()[0].gamma > 0))
    assert moving == [True] * 99 + [False]  # anneal = 0.966 of the 50 steps from 50 on


# -- the spawn ---------------------------------------------------------------------------------------------------------


def dense_and_grown(mesh=None, **flags):
    """A dense GPT with some optimizer state, and the mixture spawned from it: old, its optimizer, new, its optimizer,
    cfg. The state is drawn, not trained: the last bits of a gradient depend on where in memory its tensors lie."""
    cfg, mesh = config(diversify=0.1, bias=True, **flags), mesh or dist.Mesh()
    old = small_gpt(cfg, mesh, 1)
    old_optimizer = train.make_optimizer(old, cfg)
    rng = torch.Generator().manual_seed(1)
    for name, p in old.named_parameters():
        if name.endswith((".b1", ".b2")):
            p.data.normal_(0, 0.02, generator=rng)  # zero by default: a lost one would not show
    for p in old.parameters():
        moments = {name: torch.rand(p.shape, generator=rng) for name in ("exp_avg", "exp_avg_sq")}
        old_optimizer.state[p] = {"step": torch.tensor(7.0), **moments}
    new = small_gpt(cfg, mesh)
    new_optimizer = train.make_optimizer(new, cfg)
    evomoe.grow(old, old_optimizer, new, new_optimizer, cfg)
    evomoe.set_step(new, evomoe.spawn_step(cfg), cfg)
    return old, old_optimizer, new, new_optimizer, cfg


def outputs_and_state(rank, world, ratio):
    mesh = dist.make_mesh(rank, world, E) if world > 1 else dist.Mesh()
    old, _, new, optimizer, _ = dense_and_grown(mesh, spawn_ratio=ratio)
    x = torch.randint(V, (4, 16), generator=torch.Generator().manual_seed(2))[
        rank * 4 // world : (rank + 1) * 4 // world
    ]
    return old(x)[0], new(x)[0], dist.full_state(new, optimizer, mesh)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_without_a_mask_the_function_is_kept_on_any_number_of_ranks(world):
    ranks = run_ranks(world, outputs_and_state, 0.0) if world > 1 else [outputs_and_state(0, 1, 0.0)]
    for before, after, _ in ranks:
        assert (before - after).abs().max() < 1e-5


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_spawns_the_same_experts(world):
    _, _, one = outputs_and_state(0, 1, 0.3)
    _, _, many = run_ranks(world, outputs_and_state, 0.3)[-1]
    flat = lambda s: {**s["model"], **{f"{n} {k}": t for n, m in s["optimizer"].items() for k, t in m.items()}}
    assert flat(one).keys() == flat(many).keys()
    for name, t in flat(one).items():
        assert torch.equal(t, flat(many)[name]), name


def test_layers_of_a_grown_model_and_other_seeds_have_masks_of_their_own():
    masks = []
    for seed in (1, 2):
        cfg = config(diversify=0.1, moe_every=1, seed=seed)
        new = small_gpt(cfg)
        evomoe.grow(small_gpt(cfg, n_experts=1), None, new, None, cfg)
        masks += [block.ffn.experts.w1 != 0 for block in new.stack.blocks]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_each_layer_has_its_own_masks():
    e0 = Experts(1, 8, 16)
    e0.init(0, 0, 0.5, 0.5)
    masks = [evomoe.offspring(e0, layer, e, config())["w1"].value != 0 for layer in (0, 1) for e in (0, 1)]
    assert all(0.4 < m.float().mean() < 1 and not torch.equal(m, n) for i, m in enumerate(masks) for n in masks[:i])


def test_masks_moments_and_what_must_not_change():
    old, old_optimizer, new, new_optimizer, cfg = dense_and_grown(spawn_ratio=0.3)
    e0, experts = old.stack.blocks[1].ffn, new.stack.blocks[1].ffn.experts
    for name in "w1", "w2":
        p, children = e0.get_parameter(name)[0], experts.get_parameter(name)
        keep = children != 0
        assert torch.equal(children, p * keep)
        n = keep.numel()
        assert abs((~keep).sum() - 0.3 * n) < 3 * math.sqrt(n * 0.3 * 0.7)
        assert all(not torch.equal(keep[a], keep[b]) for a in range(E) for b in range(a))
        before, after = old_optimizer.state[e0.get_parameter(name)], new_optimizer.state[children]
        assert torch.equal(after["step"], before["step"]) and after["step"] == 7
        for moment in "exp_avg", "exp_avg_sq":
            assert torch.equal(after[moment], before[moment] * keep) and after[moment].abs().sum() > 0
    assert not torch.equal(experts.w1 != 0, experts.w2 != 0)  # both (E, H, D), with masks of their own
    for name in "b1", "b2":
        p, children = e0.get_parameter(name), experts.get_parameter(name)
        before, after = old_optimizer.state[p], new_optimizer.state[children]
        assert p.any() and torch.equal(children, p.expand(E, -1))
        assert all(torch.equal(after[moment], before[moment].expand(E, -1)) for moment in ("exp_avg", "exp_avg_sq"))
    others = dict(new.named_parameters())
    for name, p in old.named_parameters():
        if name in others:
            assert torch.equal(p, others[name])
            assert torch.equal(old_optimizer.state[p]["exp_avg"], new_optimizer.state[others[name]]["exp_avg"])
    fresh = small_gpt(cfg)
    assert (
        torch.equal(new.gates()[0].weight, fresh.gates()[0].weight) and new.gates()[0].weight not in new_optimizer.state
    )


@pytest.mark.parametrize("how", ["copy", "noise"])
def test_other_spawns(how):
    old, _, new, _, _ = dense_and_grown(spawn=how, spawn_ratio=0.1)
    e0, experts = old.stack.blocks[1].ffn, new.stack.blocks[1].ffn.experts
    for name in "w1", "w2":
        mother, children = e0.get_parameter(name), experts.get_parameter(name)
        relative = ((children - mother).std((1, 2)) / mother.std()).tolist()
        assert relative == pytest.approx([0.1 if how == "noise" else 0.0] * E, rel=0.1)
        assert all(torch.equal(children[a], children[b]) == (how == "copy") for a in range(E) for b in range(a))
    assert e0.b1.any() and torch.equal(experts.b1, e0.b1.expand(E, -1))
    assert e0.b2.any() and torch.equal(experts.b2, e0.b2.expand(E, -1))


def test_a_shared_expert_is_silent_at_the_spawn():
    """Copies under weights that sum to 1 and a shared expert of 24: the function of the dense model; what it counts."""
    old, _, new, optimizer, cfg = dense_and_grown(spawn="copy", shared_hidden=24)
    x = torch.arange(8)[None]
    assert (old.eval()(x)[0] - new.eval()(x)[0]).abs().max() < 1e-5
    shared = new.stack.blocks[1].ffn.shared
    assert not shared.w2.any() and shared.w1.any() and shared.w1 not in optimizer.state
    new(x)[0].square().sum().backward()
    assert shared.w2.grad.any()
    assert id(shared.w2) in [id(p) for p in train.make_optimizer(new, cfg).param_groups[0]["params"]]  # decays


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_before_the_spawn_it_is_the_dense_run(corpus, tmp_path):
    evo = train_on(corpus, tmp_path / "evo", diversify=0.5, gate_args="dense=0.4,hard=0.6")
    dense = train_on(corpus, tmp_path / "dense", n_experts=1)
    assert losses(evo)[:4] == losses(dense)[:4] and losses(evo)[4:] != losses(dense)[4:]
    k = [entry.get("experts_per_token", 1) for entry in evo if "loss" in entry]
    assert k[:5] == [1, 1, 1, 1, E] and k[-1] == 1
    flops = [entry["flops_per_token"] for entry in evo if "loss" in entry]
    assert flops[4] - flops[7] == pytest.approx((E - 1) * 4 * 16 * 64)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("flags", [
    dict(diversify=0.25, gate_args="dense=0.333,hard=0.667"),
    dict(gate="switch", diversify=0.25, capacity_factor=1.0),
    dict(diversify=0.25, gate_args="dense=0.333,hard=0.667", spawn="importance", expert_hidden=16, bias=True,
         dropout=0.1),
])  # fmt: skip
def test_resuming_at_every_border_equals_the_uninterrupted_run(corpus, tmp_path, monkeypatch, flags):
    """Interrupted before each of the steps 1 to 7, and continued by a new process's worth of state each time."""
    monkeypatch.setattr(evomoe, "sample_losses", functools.partial(evomoe.sample_losses, n=6))
    whole = train_on(corpus, tmp_path / "whole", **flags)
    make = LanguageModelling.train_batch
    for step in range(1, 9):

        def stop(self, s, *more, until=step):
            if s == until and len(more):  # not where the importance is measured
                raise Interrupted
            return make(self, s, *more)

        monkeypatch.setattr(LanguageModelling, "train_batch", stop)
        resume = dict(init_from="resume") if step > 1 else {}
        try:
            parts = train_on(corpus, tmp_path / "parts", **flags, **resume)
        except Interrupted:
            assert step < 8
    assert losses(parts) == losses(whole) and parts[-1]["val_loss"] == whole[-1]["val_loss"]
    a, b = (dist.load(tmp_path / name / "ckpt_000008.pt") for name in ("whole", "parts"))
    assert all(torch.equal(t, b["model"][name]) for name, t in a["model"].items())
    assert all(torch.equal(t, b["optimizer"][name][key]) for name, m in a["optimizer"].items() for key, t in m.items())


def test_a_spawn_that_lies_in_the_past_is_refused(corpus, tmp_path):
    """A resumed run whose new length would have had its experts earlier: its gate would begin in its last phase."""
    train_on(corpus, tmp_path / "out", diversify=0.75, save_every=4, gate_args="dense=0.5,hard=0.75")
    (tmp_path / "out" / "ckpt_000008.pt").unlink()
    with pytest.raises(ValueError, match="experts were due after step 2, but step 4 still has one per layer"):
        train_on(corpus, tmp_path / "out", init_from="resume", diversify=0.25)
    on = train_on(corpus, tmp_path / "out", init_from="resume", diversify=0.5, save_every=4)
    assert [entry["experts_per_token"] > 1 for entry in on if entry.get("step") == 5 and "loss" in entry] == [True]


def test_the_table_of_a_resumed_mixture_has_no_phase_of_one_expert(corpus, tmp_path, capsys):
    train_on(corpus, tmp_path / "out", diversify=0.25)
    assert "diversify" in capsys.readouterr().out
    train_on(corpus, tmp_path / "out", init_from="resume", max_steps=100)
    assert "diversify" not in capsys.readouterr().out.split("step     9")[0]


def test_upcycling_a_dense_run(corpus, tmp_path, capsys):
    train_on(corpus, tmp_path / "dense", n_experts=1)
    held = train_on(
        corpus, tmp_path / "none", init_from=tmp_path / "dense", n_experts=1, learning_rate=1e-9, weight_decay=0
    )
    grown = train_on(
        corpus,
        tmp_path / "moe",
        init_from=tmp_path / "dense",
        gate_args="dense=0.5,hard=0.8",
        spawn="copy",
        learning_rate=1e-9,
        weight_decay=0,
    )
    assert losses(grown)[0] == pytest.approx(losses(held)[0], abs=1e-5)
    with pytest.raises(ValueError, match="holds a mixture"):
        train_on(corpus, tmp_path / "again", init_from=tmp_path / "moe")
    with pytest.raises(ValueError, match="n_embd"):
        train_on(corpus, tmp_path / "wrong", init_from=tmp_path / "dense", n_embd=32)


def test_weights_of_a_longer_context_lose_its_end():
    long, short = (small_gpt(config(block_size=n), n_experts=1) for n in (16, 6))
    evomoe.load_weights(short, long.state_dict(), dist.Mesh())
    assert torch.equal(short.wpe.weight, long.wpe.weight[:6]) and torch.equal(short.wte.weight, long.wte.weight)


def test_gpt2_weights(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config2 = transformers.GPT2Config(vocab_size=V - 3, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config2).eval()
    for p in theirs.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    fields, state = evomoe.trained(str(tmp_path), dist.Mesh())
    ours = GPT(config(n_experts=1, **fields), V).eval()
    evomoe.load_weights(ours, state["model"], dist.Mesh())
    x = torch.randint(V - 3, (3, 16))
    assert (ours(x)[0][..., : V - 3] - theirs(x).logits).abs().max() < 1e-4
    for name, value in dict(activation_function="relu", scale_attn_by_inverse_layer_idx=True, layer_norm_epsilon=1e-3,
                            tie_word_embeddings=False).items():  # fmt: skip
        other = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config2.to_dict(), name: value}))
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            evomoe.from_gpt2(other)


@pytest.mark.parametrize(
    "setting",
    [
        dict(activation_function="relu"),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True),
        dict(layer_norm_epsilon=1e-3),
        dict(tie_word_embeddings=False),
        dict(add_cross_attention=True),
    ],
)
def test_a_gpt2_of_another_kind_is_refused_by_name(setting):
    """Its logits would differ in silence. The model is made up here: transformers need not be installed."""
    c = types.SimpleNamespace(n_layer=0, n_head=2, n_embd=4, n_inner=None, **setting)
    theirs = types.SimpleNamespace(config=c, transformer=types.SimpleNamespace(state_dict=dict))
    (name, value), *_ = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        evomoe.from_gpt2(theirs)


@pytest.mark.parametrize("bias, activation", [(False, "gelu"), (True, "gelu_tanh")])
def test_to_gpt2_is_the_inverse(bias, activation):
    """There and back, and, where transformers is installed, the same logits from the real class."""
    cfg = config(n_experts=1, n_layer=3, bias=bias, activation=activation)
    ours = GPT(cfg, V).eval()
    for p in ours.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    settings, weights = evomoe.to_gpt2({"config": dataclasses.asdict(cfg), "model": ours.state_dict()})
    names = {name.removeprefix("transformer."): t for name, t in weights.items()}
    c = types.SimpleNamespace(**settings | {"activation_function": "gelu_new"})
    _, back = evomoe.from_gpt2(
        types.SimpleNamespace(config=c, transformer=types.SimpleNamespace(state_dict=lambda: names))
    )
    for name, p in ours.named_parameters():
        assert torch.equal(back.pop(name), p), name
    assert all(name.endswith(("bias", "b1", "b2")) and not t.any() for name, t in back.items())  # what we do not have
    with pytest.raises(ValueError, match="dense run of --objective=gpt"):
        evomoe.to_gpt2({"config": dataclasses.asdict(config()), "model": GPT(config(), V).state_dict()})
    with pytest.raises(ValueError, match="with 1 experts and swiglu"):
        evomoe.to_gpt2({"config": dataclasses.asdict(cfg) | {"activation": "swiglu"}, "model": ours.state_dict()})
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    theirs.load_state_dict(weights)
    x = torch.randint(V, (3, 16))
    assert (ours(x)[0] - theirs(x).logits).abs().max() < 1e-4


def test_tokens_that_trained_weights_do_not_know_keep_their_start():
    old, new = GPT(config(n_experts=1), 40), GPT(config(n_experts=1, seed=7), 43)
    fresh = new.wte.weight[40:].clone()
    evomoe.load_weights(new, old.state_dict(), dist.Mesh())
    assert torch.equal(new.wte.weight[:40], old.wte.weight) and torch.equal(new.wte.weight[40:], fresh) and fresh.all()


def test_gpt2_without_transformers_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        evomoe.trained("gpt2", dist.Mesh())


@pytest.mark.parametrize("V, known", [(50257, True), (300, False)])
def test_gpt2s_weights_say_which_vocabulary_is_theirs(monkeypatch, V, known):
    """Ids of a corpus with another tokenizer mean something else, however many there are. (Somebody's own GPT-2 has a
    vocabulary of its own.)"""
    theirs = types.SimpleNamespace(GPT2LMHeadModel=types.SimpleNamespace(from_pretrained=lambda name: name))
    monkeypatch.setitem(__import__("sys").modules, "transformers", theirs)
    monkeypatch.setattr(evomoe, "from_gpt2", lambda model: ({"bias": True}, {"wte.weight": torch.zeros(V, 2)}))
    monkeypatch.setattr(evomoe, "gpt2_tokenizer", lambda: make_tokenizer("bytes", 0, ()))
    fields, state = evomoe.trained("gpt2", dist.Mesh())
    assert fields == {"bias": True}
    assert state.get("vocabulary") == (make_tokenizer("bytes", 0, ()).fingerprint() if known else None)


# -- floating-point operations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau,reads,n", [
    (2.0, "content", E), (0.1, "content", E), (0.1, "id", E), (0.1, "content", V + 1)])  # fmt: skip
def test_flops_per_token_are_the_non_zeros(tau, reads, n):
    """Against a counter of every matrix product that really ran, in float64, where experts run one by one."""
    model = GPT(config(gate_args=f"reads={reads}", shared_hidden=8 * (reads == "id"), n_experts=n), V).double()
    model.gates()[0].weight.data.normal_()
    model.gates()[0].set("dense", tau, 0.0)
    seen = []
    model.gates()[0].register_forward_hook(lambda module, args, routing: seen.append(routing.G))
    x = torch.randint(V, (4, 16))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x)
    k = (seen[0] != 0).sum().item() / x.numel()
    assert model.stack.blocks[1].ffn.stats["kept"].sum().item() == k * x.numel()
    assert 1 < k <= n and (tau == 0.1 or k > 3)
    assert model.flops_per_token(k, 16) * x.numel() == pytest.approx(counter.get_total_flops())


def test_flops_of_a_classifier():
    """It has a head of its own, met once a sequence, and neither RoBERTa's nor the token embedding in its place."""
    model, x = RoBERTa(config(n_experts=1), V, n_classes=3).double(), torch.randint(V, (4, 16))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x)
    assert model.flops_per_token(1, 16, targets=1 / 16) * x.numel() == pytest.approx(counter.get_total_flops())


def test_flops_of_a_translator():
    model, x = Translator(config(n_experts=1), V, pad_id=V - 1).double(), torch.randint(V - 1, (4, 12))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x, x)
    assert model.flops_per_token(1, 12) * x.numel() == pytest.approx(counter.get_total_flops())


# -- MoEBERT ----------------------------------------------------------------------------------------------------------


def test_importance_is_taken_per_sample():
    """And without dropout, whatever mode the model is in."""
    torch.manual_seed(0)
    net = nn.Sequential(Experts(1, 4, 8), nn.Dropout(0.5))
    net[0].init(0, 0, 0.5, 0.5)
    x, target = torch.randn(6, 4), torch.randn(6, 4)
    sample = lambda i: (net(x[i]) - target[i]).square().sum()
    (got,) = evomoe.importance(net.train(), (sample(i) for i in range(6))).values()
    net.eval()
    expected = torch.zeros(8)
    for i in range(6):
        g1, g2 = torch.autograd.grad(sample(i), [net[0].w1, net[0].w2])
        for j in range(8):
            expected[j] += (torch.dot(net[0].w1[0, j], g1[0, j]) + torch.dot(net[0].w2[0, j], g2[0, j])).abs().detach()
    assert torch.allclose(got, expected)
    with pytest.raises(ValueError, match="nothing to predict"):
        evomoe.importance(net, [])
    (mean,) = evomoe.importance(net, [sum(sample(i) for i in range(6))]).values()
    assert (mean <= got + 1e-6).all() and (got > 2 * mean).any()


def test_importance_looks_at_the_first_sequences_of_the_run(corpus, tmp_path):
    """Six of them, four in a step: of each the mean loss."""
    run = train.set_up({**SIZES, "dataset": corpus, "out_dir": str(tmp_path), "n_experts": 1, "device": "cpu"})
    batches = [run.objective.train_batch(step) for step in (0, 1)]
    x, y = (torch.cat([batch[name] for batch in batches])[:6] for name in "xy")
    want = [nn.functional.cross_entropy(*row).item() for row in zip(run.model(x)[0], y)]
    assert [loss.item() for loss in evomoe.sample_losses(run, train.task_loss, n=6)] == pytest.approx(want)


def test_split_facts():
    score = torch.rand(48)
    order = score.argsort(descending=True)
    cut = evomoe.split(score, n_experts=4, width=12, share=0.5)
    shared, own = [set(c[:6].tolist()) for c in cut], [set(c[6:].tolist()) for c in cut]
    assert all(s == set(order[:6].tolist()) for s in shared)
    assert all(not own[a] & own[b] for a in range(4) for b in range(a)) and all(len(c) == 12 for c in cut)
    assert set().union(*shared, *own) == set(order[: 6 + 4 * 6].tolist())  # the most important ones survive
    assert cut[1][6] == order[7] and cut[1][7] == order[11]
    with pytest.raises(ValueError, match="cannot give"):
        evomoe.split(score, 4, 24, 0.5)


def test_a_split_that_shares_everything_keeps_the_function():
    cfg = config(gate="hash", bias=True, spawn="importance", spawn_ratio=1.0, diversify=0.1)
    old, new = small_gpt(cfg, n_experts=1), small_gpt(cfg)
    old.stack.blocks[1].ffn.b1.data.normal_()
    old.stack.blocks[1].ffn.b2.data.normal_()
    x = torch.randint(V, (2, 16))
    score = evomoe.importance(old, [old(x)[0].square().mean()])
    evomoe.grow(old, None, new, None, cfg, score)
    assert (old(x)[0] - new(x)[0]).abs().max() < 1e-5
    assert not torch.equal(new.stack.blocks[1].ffn.experts.w1[0], old.stack.blocks[1].ffn.w1[0])  # reordered


def test_every_expert_is_cut_from_its_own_neurons():
    """Weights, biases and AdamW's moments of all four: the common neurons first, then each expert's own."""
    flags = dict(gate="hash", bias=True, n_hidden=32, spawn="importance", spawn_ratio=0.5, diversify=0.1)
    old, new = small_gpt(config(**flags), n_experts=1), small_gpt(config(**flags, expert_hidden=8))
    e0, children = old.stack.blocks[1].ffn, new.stack.blocks[1].ffn.experts
    before = train.make_optimizer(old, config(**flags))
    old(torch.randint(V, (2, 16)))[0].square().mean().backward()
    before.step()
    after = train.make_optimizer(new, config(**flags))
    score = {name: torch.rand(32) for name in ("stack.blocks.0.ffn", "stack.blocks.1.ffn")}
    evomoe.grow(old, before, new, after, config(**flags, expert_hidden=8), score)
    order = score["stack.blocks.1.ffn"].argsort(descending=True)
    for e in range(4):
        mine = torch.cat([order[:4], order[4:][e::4][:4]])
        for name in ("w1", "w2", "b1"):
            child, mother = getattr(children, name), getattr(e0, name)
            assert torch.equal(child[e], mother[0, mine]), (name, e)
            for key in ("exp_avg", "exp_avg_sq"):
                moment, hers = after.state[child][key], before.state[mother][key]
                assert hers.abs().sum() > 0 and torch.equal(moment[e], hers[0, mine]), (name, e, key)
        assert torch.equal(children.b2[e], e0.b2[0])


def roberta(**flags):
    return RoBERTa(config(objective="roberta", n_experts=1, **flags), V, mask_id=V - 1)


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient():
    teacher, x = roberta().eval().requires_grad_(False), torch.randint(V, (2, 16))
    student = copy.deepcopy(teacher).requires_grad_(True)
    pick = torch.rand(x.shape) < 0.3
    with evomoe.watch(student) as s, evomoe.watch(teacher) as t:
        student(x, pick=pick), teacher(x, pick=pick)
    assert len(s) == 1 + 2 + 1 and s[-1].shape == (pick.sum(), V)
    terms = evomoe.distillation(s, t, x.numel(), int(pick.sum()))
    sum(terms.values()).backward()
    assert terms == {"mse": 0, "kl": 0}
    assert all(p.grad is None or p.grad.abs().max() < 1e-12 for p in student.parameters())


def test_distillation_by_hand_and_symmetric():
    torch.manual_seed(0)
    a, b = ([torch.randn(2, 4, 8), torch.randn(2, 4, 8), torch.randn(5, V)] for _ in range(2))
    ab, ba = evomoe.distillation(a, b, 8, 5), evomoe.distillation(b, a, 8, 5)
    assert all(torch.allclose(ab[name], ba[name]) for name in ("mse", "kl"))
    mse = sum((s - t).square().mean() for s, t in zip(a[:2], b[:2]))
    kl = lambda p, q: nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="batchmean")
    assert torch.allclose(ab["mse"], mse) and torch.allclose(ab["kl"], 0.5 * (kl(a[2], b[2]) + kl(b[2], a[2])))


@pytest.mark.parametrize("gate", ["hash", "comet"])
def test_the_documented_distillation_runs(gate, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(evomoe, "sample_losses", functools.partial(evomoe.sample_losses, n=6))
    small = dict(objective="roberta", moe_every=1, max_steps=20, learning_rate=0.01, save_every=20)
    train_on(corpus, tmp_path / "teacher", n_experts=1, **small)
    student = dict(distill=1.0, gate=gate, spawn="importance", spawn_ratio=0.5, expert_hidden=16)
    log = train_on(corpus, tmp_path / "student", init_from=tmp_path / "teacher", **{**small, **student})
    told = [entry for entry in log if "mse" in entry]
    assert told[-1]["mse"] < 0.7 * told[0]["mse"] and told[0]["kl"] > 0
    resumed = train_on(corpus, tmp_path / "student", init_from="resume", **{**small, **student, "max_steps": 22})
    assert "mse" in [entry for entry in resumed if "loss" in entry][-1]


def test_a_teacher_of_another_kind_is_refused(corpus, tmp_path):
    """Another shape, head count, activation or vocabulary would give another function, or none."""
    small = dict(objective="roberta", max_steps=2)
    train_on(corpus, tmp_path / "teacher", n_experts=1, **small)
    student = dict(distill=1.0, gate="hash", teacher=tmp_path / "teacher", n_experts=2, **small)
    for more in (dict(n_embd=32), dict(n_head=4), dict(activation="gelu_tanh")):
        with pytest.raises(ValueError, match=f"{next(iter(more))}=.*choose another --teacher"):
            train_on(corpus, tmp_path / "student", **{**student, **more})
    log = train_on(corpus, tmp_path / "student", **student)
    assert "mse" in [e for e in log if "loss" in e][-1]
    assert not train.set_up({"out_dir": str(tmp_path / "student"), "init_from": "resume"}).teacher.training
    run = dist.find(tmp_path / "student")[1]
    cfg = train.configure({}, run["config"])
    with pytest.raises(ValueError, match="has another vocabulary than"):
        evomoe.load_teacher(cfg, lambda n: types.SimpleNamespace(eval=lambda: Teacher()), dist.Mesh(), "another", {})
    train.main([f"--out_dir={tmp_path / 'student'}", "--init_from=resume", "--distill=0", "--max_steps=3"])
    assert "mse" not in [e for e in runs.log(tmp_path / "student") if "loss" in e][-1]  # goes on without the teacher


def test_a_resumed_student_has_the_teacher_it_had(corpus, tmp_path):
    """A teacher that was trained on, or whose newest checkpoint went bad, would go on as another one in silence."""
    small, out = dict(objective="roberta", max_steps=2), tmp_path / "student"
    train_on(corpus, tmp_path / "teacher", n_experts=1, **small)
    train_on(corpus, out, distill=1.0, gate="hash", teacher=tmp_path / "teacher", n_experts=2, **small)
    again = dict(out_dir=str(out), init_from="resume")
    assert train.set_up(dict(again)).teacher
    train_on(corpus, tmp_path / "teacher", n_experts=1, **{**small, "max_steps": 3}, init_from="resume")
    with pytest.raises(ValueError, match="teacher has other weights than .*--distill=0"):
        train.set_up(dict(again))
    shutil.copytree(tmp_path / "teacher", tmp_path / "newer")
    assert train.set_up(dict(again, teacher=str(tmp_path / "newer"))).teacher
    os.remove(tmp_path / "teacher" / "ckpt_000003.pt")
    assert train.set_up(dict(again)).teacher


class Teacher:
    """As much of a model as it takes to be refused."""

    stack = classifier = None

    def requires_grad_(self, value):
        return self
