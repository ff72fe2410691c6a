"""
model.py: a dense model is the case of one expert, nobody sees the future, sampling and beam search against trying all
sentences, and weights that depend on the seed and on nothing else. What holds for every gate is asked of every gate.
"""

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import dist
import evomoe
import runs
import train
from data.objectives import OBJECTIVES
from experts import Experts, MoE, check_causality, feed_forward
from model import GPT, Attention, RoBERTa, Translator
from ranks import run_ranks
from router import Soft, gates, make_gate

V = 40
CFG = train.Config(n_layer=4, n_head=2, n_embd=16, block_size=12, n_experts=4, batch_size=4, max_steps=8, seed=3)
GATES = sorted(gates())
CAUSAL = [name for name in GATES if gates()[name].looks_ahead != "always"]
EOT, MASK, PAD, BOS, FEW = 5, 6, 7, 8, 9  # a vocabulary of five ordinary tokens and four special ones: FEW ids


def config(**more):
    return dataclasses.replace(CFG, **more)


def build(kind="gpt", mesh=None, **more):
    cfg = config(**more)
    counts, n_ids = torch.arange(V, 0, -1).numpy(), V
    if kind == "roberta":
        counts, n_ids = RoBERTa.route_counts(counts, cfg.block_size), V + cfg.block_size
    ffn = functools.partial(feed_forward, cfg, mesh=mesh, V=n_ids, counts=counts, n_domains=2, steps=cfg.max_steps)
    if kind == "translation":
        return Translator(cfg, V, ffn, pad_id=V - 1)
    return GPT(cfg, V, ffn) if kind == "gpt" else RoBERTa(cfg, V, ffn, mask_id=V - 2)


def tokens(rows=4, length=12, seed=0):
    return torch.randint(0, V - 4, (rows, length), generator=torch.Generator().manual_seed(seed))


def opinionated(kind, gate="switch", mesh=None, V=FEW, std=0.25, **more):
    """A model with weights that are large enough to have an opinion, as at the end of its curriculum."""
    cfg = runs.config(gate, **more)
    special = dict(pad_id=PAD) if kind is Translator else dict(mask_id=MASK) if kind is RoBERTa else {}
    n_ids = V + cfg.block_size * (kind is RoBERTa)
    ffn = functools.partial(
        feed_forward, cfg, mesh=mesh, V=n_ids, counts=torch.ones(n_ids), n_domains=2, steps=cfg.max_steps
    )
    model = kind(cfg, V, ffn, **special).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 and ".gate." not in name:
            p.data.mul_(std / p.data.std())
    evomoe.set_step(model, cfg.max_steps, cfg)
    return model


def ids(*shape, seed=0):
    return torch.randint(0, EOT, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Dense is one expert


def one_expert_mixture(**more):
    """A dense GPT in which every FFN that would be a mixture is an MoE with a single expert (the soft gate: weight
    1)."""
    model = build(n_experts=1, **more)
    for i, block in enumerate(model.stack.blocks):
        if (i + 1) % model.cfg.moe_every == 0:
            block.ffn = MoE(Soft(model.cfg.n_embd, 1), block.ffn, model.mesh)
    return model


@pytest.mark.parametrize("moe_every", [1, 2])
def test_dense_equals_one_expert_step_for_step(moe_every):
    losses = []
    for model in (build(n_experts=1, moe_every=moe_every), one_expert_mixture(moe_every=moe_every)):
        assert len(model.moes()) == (0 if not losses else 4 // moe_every)
        optimizer = train.make_optimizer(model, model.cfg)
        losses.append([])
        for step in range(8):
            x = tokens(seed=step % 2)
            logits, aux = model(x)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            assert not aux
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0] - 0.05


def test_expert_0_is_the_dense_ffn_and_the_rest_is_shared():
    dense, moe = build(n_experts=1), build()
    ours = dict(moe.named_parameters())
    for name, p in dense.named_parameters():
        if ".ffn." in name and name not in ours:  # an MoE layer: the dense FFN is its first expert
            name = name.replace(".ffn.", ".ffn.experts.")
            assert torch.equal(ours[name][:1], p), name
            assert not torch.equal(ours[name][1], p[0]), name
        else:
            assert torch.equal(ours[name], p), name


@pytest.mark.parametrize("kind", ["gpt", "roberta", "translation"])
def test_every_other_layer_is_a_mixture(kind):
    for moe_every, layers in ((1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3])):
        model = build(kind, moe_every=moe_every)
        stacks = [model.encoder, model.decoder] if kind == "translation" else [model.stack]
        for stack in stacks:
            assert [i + 1 for i, b in enumerate(stack.blocks) if isinstance(b.ffn, MoE)] == layers
            assert all(isinstance(b.ffn, (MoE, Experts)) for b in stack.blocks)
        assert len(model.gates()) == len(layers) * len(stacks)


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def attention(a, x, memory, causal):
    width = x.shape[-1] // a.heads
    q, (k, v) = x @ a.q.weight.T, (memory @ a.kv.weight.T).chunk(2, -1)
    y = torch.zeros_like(x)
    for h in range(a.heads):
        mine = slice(h * width, (h + 1) * width)
        scores = q[..., mine] @ k[..., mine].transpose(1, 2) / math.sqrt(width)
        if causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[1:]).tril().bool(), -math.inf)
        y[..., mine] = scores.softmax(-1) @ v[..., mine]
    return y @ a.out.weight.T


def layers(blocks, h, causal, memory=None):
    for b in blocks:
        h = h + attention(b.attn, norm(h), norm(h), causal)
        h = h if memory is None else h + attention(b.cross, norm(h), memory, False)
        h = h + F.gelu(norm(h) @ b.ffn.w1[0].T) @ b.ffn.w2[0]
    return norm(h)


@pytest.mark.parametrize("kind", ["gpt", "roberta", "translation"])
def test_a_dense_model_by_hand(kind):
    """Pre-LN blocks written out, in float64, with weights large enough that no part is negligible."""
    model, x, src = build(kind, n_experts=1).double().eval(), tokens(), tokens(seed=1)
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    embed = lambda ids: model.wte.weight[ids] + model.wpe.weight[: ids.shape[1]]
    if kind == "translation":
        memory = layers(model.encoder.blocks, embed(src), False)
        want, got = layers(model.decoder.blocks, embed(x), True, memory), model(x, src)[0]
    else:
        want, got = layers(model.stack.blocks, embed(x), kind == "gpt"), model(x)[0]
    if kind == "roberta":
        want = norm(F.gelu(want @ model.dense.weight.T))
    assert torch.allclose(got, want @ model.wte.weight.T, atol=1e-9)


@pytest.mark.parametrize("kind", ["gpt", "translation"])
@pytest.mark.parametrize("gate, name", [("switch", "balance"), ("skip", "log_prob")])
def test_auxiliary_losses_are_summed_over_all_layers_and_positions(kind, gate, name):
    model, x, seen = build(kind, gate=gate, moe_every=1).train(), tokens(), []
    for moe in model.moes():
        moe.register_forward_hook(lambda module, args, out: seen.append(out[1][name]))
    _, aux = model(x, src=x) if kind == "translation" else model(x)
    assert len(seen) == (8 if kind == "translation" else 4) and aux[name].any()
    assert torch.allclose(aux[name], sum(a.sum(1) if name == "log_prob" else a for a in seen))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def test_parameter_counts():
    D, H, E = 16, 64, 4
    attention, norms, ffn = 4 * D * D, 2 * D, 2 * D * H
    dense = V * D + 12 * D + 4 * (attention + norms + ffn) + D
    assert build(n_experts=1).n_params() == (dense, dense)
    gate = D * E
    assert build(gate="switch").n_params() == (dense + 2 * ((E - 1) * ffn + gate), dense + 2 * gate)
    assert build(gate="topk", k=2).n_params() == (dense + 2 * ((E - 1) * ffn + gate), dense + 2 * (ffn + gate))
    assert build(gate="hash").n_params()[1] == dense
    assert build(gate="hash", shared_hidden=24).n_params()[1] == dense + 2 * (2 * 24 * 16)  # in two layers
    for kind, head in (("gpt", V * D), ("roberta", V * D + D * D)):  # the output layer counts where there is a target
        saved = build(kind).flops_per_token(1, 12) - build(kind).flops_per_token(1, 12, targets=0.25)
        assert saved == pytest.approx(2 * 0.75 * head)


def test_the_optimizer_has_the_settings_of_the_config():
    model = build()
    optimizer = train.make_optimizer(model, dataclasses.replace(model.cfg, beta2=0.7, weight_decay=0.3))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.7)] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def whole_state(rank, world, ep):
    model = build(mesh=dist.make_mesh(rank, world, 4, ep))
    return (
        dist.full_state(model, None, model.mesh)["model"],
        model.n_params(),
        sum(p.numel() for p in model.parameters()),
    )


@pytest.mark.parametrize("ep", [1, 2])
def test_init_does_not_depend_on_the_number_of_ranks(ep):
    one = build()
    for state, counts, held in run_ranks(2, whole_state, ep):
        assert state.keys() == one.state_dict().keys()
        assert all(torch.equal(t, state[name]) for name, t in one.state_dict().items())
        assert counts == one.n_params()
        assert (held < counts[0]) == (ep > 1)


def test_init_depends_on_the_seed_and_not_on_the_default_generator():
    torch.manual_seed(1)
    a = build().state_dict()
    torch.manual_seed(2)
    assert all(torch.equal(t, a[name]) for name, t in build().state_dict().items())
    b = build(seed=4).state_dict()
    assert not torch.equal(a["wte.weight"], b["wte.weight"])
    layers = [build().stack.blocks[i].ffn.experts.w1 for i in (1, 3)]
    assert not torch.equal(*layers) and not torch.equal(layers[0][0], layers[0][1])


def test_init_is_gpt2s():
    model = build(n_embd=64, n_head=4, shared_hidden=256)
    assert abs(model.wte.weight.std() - 0.02) < 0.002
    assert abs(model.stack.blocks[0].attn.out.weight.std() - 0.02 / math.sqrt(8)) < 0.001
    experts, shared = model.stack.blocks[1].ffn.experts, model.stack.blocks[1].ffn.shared
    assert abs(experts.w2.std() - 0.02 / math.sqrt(8)) < 0.001 and abs(shared.w2.std() - 0.02 / math.sqrt(8)) < 0.001
    assert not any(torch.equal(shared.w1[0], w) for w in experts.w1)  # it is one expert more
    x = tokens()
    loss = torch.nn.functional.cross_entropy(model(x)[0][:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert abs(float(loss.detach()) - math.log(V)) < 0.1  # knows nothing yet
    biases = [p for name, p in build(bias=True).named_parameters() if name.endswith((".bias", ".b1", ".b2"))]
    assert len(biases) == 4 * (2 + 3 + 2) + 1 and not any(p.any() for p in biases)


@pytest.mark.parametrize("kind", ["roberta", "translation"])
def test_init_of_models_with_an_encoder(kind):
    """Attention and experts with std 1 / sqrt(D), less for what adds to the residual stream; a decoder's layers are not
    the encoder's again."""
    model = build(kind, n_embd=64, n_head=4)
    modules = list(model.modules())
    ffns = [m.w1 for m in modules if isinstance(m, Experts)]
    queries = [m.q.weight for m in modules if isinstance(m, Attention)]
    for w in ffns + queries[kind == "roberta" :]:  # see the next test
        assert abs(w.std() - 1 / 8) < 0.01
    assert not any(torch.equal(a[0], b[0]) for a, b in itertools.combinations(ffns, 2))
    for name, p in model.named_parameters():
        if name.endswith((".w2", "out.weight")):
            assert abs(p.std() * 8 * math.sqrt(2 * 4) - 1) < 0.1, name


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_roberta_starts_with_a_head_for_each_neighbour(heads, monkeypatch):
    """By position alone the first head's largest weight is on the left neighbour, the second's on the right one, nearly
    always (the norm bends the first position); with tokens most often, where chance is 1 in 64. The rest of the model
    is as drawn."""
    sizes = dict(n_embd=32 * heads, n_head=heads, block_size=64)
    model = build("roberta", **sizes)
    attn, place = model.stack.blocks[0].attn, torch.arange(64)

    def right(x):
        """x (B, T, D) -> (heads, B, T - 2) bool: is the largest weight where it should be, between the ends?"""
        q, k = (
            w(model.stack.blocks[0].ln1(x))[..., : 32 * heads].unflatten(-1, (heads, 32)) for w in (attn.q, attn.kv)
        )
        most = torch.einsum("bihd,bjhd->hbij", q, k).argmax(-1)[:, :, 1:-1]
        return torch.stack([most[h] == place[1:-1] + offset for h, offset in [(0, -1), (1, 1)][:heads]])

    assert right(model.wpe.weight[None]).float().mean() > 0.98
    assert right(model.embed(tokens(8, 64))).float().mean() > 0.6
    monkeypatch.setattr(RoBERTa, "look_around", lambda model: None)
    drawn = dict(build("roberta", **sizes).named_parameters())
    attn.q.weight.data[:64] = drawn["stack.blocks.0.attn.q.weight"][:64]
    attn.kv.weight.data[: min(64, 32 * heads)] = drawn["stack.blocks.0.attn.kv.weight"][: min(64, 32 * heads)]
    model.wpe.weight.data.copy_(drawn["wpe.weight"])
    assert all(torch.equal(p, drawn[name]) for name, p in model.named_parameters())


def test_only_matrices_decay():
    model = build("translation", bias=True)
    groups = train.make_optimizer(model, model.cfg).param_groups
    decay = {id(p) for p in groups[0]["params"]}
    names = {".".join(name.split(".")[-2:]) for name, p in model.named_parameters() if id(p) in decay}
    matrices = {"wte.weight", "q.weight", "kv.weight", "out.weight", "ffn.w1", "ffn.w2", "experts.w1", "experts.w2"}
    assert names == matrices and groups[1]["weight_decay"] == 0


@pytest.mark.parametrize("gate", sorted(gates()))
def test_a_gate_in_a_model_is_as_it_made_itself(gate):
    """The model's initialisation leaves it alone, and weight decay too."""
    model = build(gate=gate)
    for i in (1, 3):
        with torch.random.fork_rng():
            torch.manual_seed(model.cfg.seed * 1000 + i)
            counts = torch.arange(V, 0, -1).numpy()
            fresh = make_gate(
                gate,
                D=16,
                E=4,
                V=V,
                layer=i,
                seed=model.cfg.seed,
                counts=counts,
                n_domains=2,
                steps=model.cfg.max_steps,
            )
        mine = model.stack.blocks[i].ffn.gate
        assert mine.state_dict().keys() == fresh.state_dict().keys()
        assert all(torch.equal(t, fresh.state_dict()[name]) for name, t in mine.state_dict().items())
        decayed, rest = (
            [id(p) for p in group["params"]] for group in train.make_optimizer(model, model.cfg).param_groups
        )
        assert not any(id(p) in decayed for p in mine.parameters()) and all(
            id(p) in rest for p in mine.parameters() if p.requires_grad
        )
    assert (
        id(model.wte.weight) in decayed
        and id(model.stack.blocks[1].ffn.experts.w1) in decayed
        and id(model.wpe.weight) in rest
    )


def test_models_can_be_copied():
    model = build().eval()
    assert torch.equal(copy.deepcopy(model)(tokens())[0], model(tokens())[0])


# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom


@pytest.mark.parametrize("gate", sorted(name for name, g in gates().items() if g.looks_ahead != "always"))
def test_logits_do_not_see_later_tokens(gate):
    """At evaluation for every gate that promises it; in training for those that promise that too. Within a sequence and
    also across: other rows of the batch change nothing at evaluation."""
    model = build(gate=gate)
    for training in (False, True):
        if training and gates()[gate].looks_ahead != "never":
            continue
        model.train(training)
        for t in (1, 5, 11):
            x, other = tokens(1), tokens(1, seed=1)
            changed = torch.cat([x[:, :t], other[:, t:]], 1)
            torch.manual_seed(0)
            a = model(x)[0]
            torch.manual_seed(0)
            b = model(changed)[0]
            assert torch.allclose(a[:, :t], b[:, :t], atol=1e-5), (training, t)
            assert not torch.allclose(a[:, t:], b[:, t:], atol=1e-5)
    model.eval()
    x = tokens(3)
    assert torch.allclose(model(x)[0][1:2], model(x[1:2])[0], atol=1e-5)


@pytest.mark.parametrize("gate", CAUSAL)
def test_the_decoder_does_not_see_the_future(gate):
    """Evaluation: later target tokens change nothing before them. Gates that promise it keep it in training too."""
    model, src, x = opinionated(Translator, gate), ids(2, 6), ids(2, 8, seed=1)
    changed = x.clone()
    changed[:, 5:] = (x[:, 5:] + 1) % EOT
    for training in [False] + [True] * (gates()[gate].looks_ahead == "never"):
        model.train(training)
        logits = []
        for y in (x, changed):
            torch.manual_seed(3)
            logits.append(model(y, src)[0])
        assert torch.allclose(logits[0][:, :5], logits[1][:, :5], atol=1e-5)
        assert not torch.allclose(logits[0][:, 5:], logits[1][:, 5:], atol=1e-2)


def test_an_encoder_sees_both_ways_and_not_the_padding():
    model = build("roberta", gate="topk").eval()
    x, live = tokens(2), torch.ones(2, 12, dtype=torch.bool)
    live[1, 7:] = False
    a = model(x, live)[0]
    changed = x.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 30
    assert not torch.allclose(model(changed, live)[0][0, 0], a[0, 0])
    changed = x.clone()
    changed[1, 7:] = 5
    assert torch.allclose(model(changed, live)[0][1, :7], a[1, :7], atol=1e-6)
    assert torch.allclose(model(x[1:, :7], live[1:, :7])[0], a[1:, :7], atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_encoders_look_both_ways(gate):
    """Changing the last token reaches the first position of RoBERTa, and through the encoder every target position."""
    x = ids(2, 6)
    changed = x.clone()
    changed[:, -1] = (x[:, -1] + 1) % EOT
    model = opinionated(RoBERTa, gate)
    assert ((model(x)[0] - model(changed)[0])[:, 0].abs().amax(1) > 1e-3).all()
    model, y = opinionated(Translator, gate), ids(2, 4, seed=2)
    assert ((model(y, x)[0] - model(y, changed)[0]).abs().amax(2) > 1e-3).all()


@pytest.mark.parametrize("gate", GATES)
def test_padding_changes_nothing(gate):
    """More columns of padding, on either side, leave every logit as it was; so does what RoBERTa has in dead places."""
    model, src, x = opinionated(Translator, gate), ids(3, 6), ids(3, 5, seed=1)
    src[0, 4:], x[1, 3:] = PAD, PAD
    more = lambda t: torch.cat([t, torch.full((3, 2), PAD)], 1)
    logits, padded = model(x, src)[0], model(more(x), more(src))[0][:, :5]
    assert torch.allclose(logits[x != PAD], padded[x != PAD], atol=1e-5)

    model, live = opinionated(RoBERTa, gate), ids(3, 8) > 0
    live[:, 0] = True
    a, b = (model(torch.where(live, ids(3, 8), other), live)[0] for other in (0, 3))
    assert torch.allclose(a[live], b[live], atol=1e-5)


@pytest.mark.parametrize("gate", ["switch", "expertchoice", "base", "hash"])
def test_all_padding_is_not_nan(gate):
    """A row, or a batch, of nothing but padding."""
    for rows in (slice(0, 1), slice(None)):
        src, x = ids(3, 6), ids(3, 5)
        src[rows], x[rows] = PAD, PAD
        model = opinionated(Translator, gate)
        logits, aux = model(x, src)
        assert logits.isfinite().all() and all(torch.as_tensor(v).isfinite().all() for v in aux.values())
        model.train()
        logits, aux = model(x, src)
        sum(t.sum() for t in [logits, *aux.values()] if torch.is_tensor(t)).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        live = torch.ones(3, 6, dtype=torch.bool)
        live[rows] = False
        assert opinionated(RoBERTa, gate)(src, live)[0].isfinite().all()


def test_mixtures_are_told_the_domain():
    """That of the corpus; in a Translator the language, 0 for the source and 1 for the target."""
    x, domain, told = tokens(2), torch.arange(24).view(2, 12) % 3, []
    for kind in ("gpt", "roberta", "translation"):
        model = build(kind)
        for moe in model.moes():
            moe.register_forward_pre_hook(lambda m, args: told.append(args[3]))
        model(x, src=x) if kind == "translation" else model(x, domain=domain)
    assert len(told) == 2 + 2 + 4
    for got, want in zip(told, [domain] * 4 + [0 * domain] * 2 + [0 * domain + 1] * 2):
        assert torch.equal(got, want)


def test_a_classifier_reads_the_mean_of_what_is_live():
    model, x = RoBERTa(config(gate="hash"), V, n_classes=3).eval(), tokens(2)
    model.classifier[0].weight.data.normal_()
    model.classifier[3].weight.data.normal_()
    live = torch.arange(12) < torch.tensor([12, 5])[:, None]
    h, _ = model.encode(x, live)
    mean = torch.stack([h[0].mean(0), h[1, :5].mean(0)])
    want = (mean @ model.classifier[0].weight.T).tanh() @ model.classifier[3].weight.T
    assert torch.allclose(model(x, live)[0][:, 0], want, atol=1e-5)


def test_where_units_are_dropped(monkeypatch):
    """In embeddings, attention's weights, what a block adds, hidden neurons, what a classifier reads; in training."""
    torch.manual_seed(0)
    seen, real = [], F.scaled_dot_product_attention
    watched = lambda *args, **more: (seen.append(more["dropout_p"]), real(*args, **more))[1]
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    cfg, x = config(gate="hash", dropout=0.5), tokens()
    encoder, decoder = 4 * (1 + 3), 4 * (2 + 4)  # four blocks: attentions' weights, all the rest
    one, two = RoBERTa(cfg, V, n_classes=3), Translator(cfg, V, pad_id=V - 1)
    for model, inputs, places in ((one, (x,), 1 + encoder + 1), (two, (x, x), 1 + encoder + 1 + decoder)):
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout):
                m.register_forward_hook(lambda m, args, out: seen.append((out == 0).float().mean().item()))
        for share in (0.5, 0.0):
            seen.clear()
            model.train(share > 0)(*inputs)
            assert len(seen) == places and all(abs(zeros - share) < 0.2 for zeros in seen), seen


def test_a_cache_takes_one_new_token_at_a_time():
    attention, x = Attention(8, 2, False, 0.0), torch.randn(1, 3, 8)
    cache = {}
    attention(x, causal=True, cache=cache)
    attention(x[:, :1], causal=True, cache=cache)
    with pytest.raises(AssertionError, match="one new token"):
        attention(x[:, :2], causal=True, cache=cache)


def test_gates_that_look_ahead_are_refused():
    """Expert choice in a causal model; an encoder may have it."""
    never = [name for name in GATES if gates()[name].looks_ahead == "always"]
    assert never
    check = lambda kind, objective, gate, **more: check_causality(
        opinionated(kind, gate, **more).moes(), OBJECTIVES[objective].causal, runs.config(gate, **more)
    )
    for gate in never:
        for kind, objective in ((GPT, "gpt"), (Translator, "translation")):
            with pytest.raises(ValueError, match=f"gate={gate} .*later tokens.*insist"):
                check(kind, objective, gate)
            assert "at evaluation too" in check(kind, objective, gate, insist=True)
        assert check(RoBERTa, "roberta", gate) == ""
    assert "base" in (note := check(GPT, "gpt", "base")) and "evaluation does not" in note
    assert check(GPT, "gpt", "switch") == ""
    assert "score" in check(GPT, "gpt", "topk", capacity_factor=1.0, drop_order="score")
    own = dict(gate_args="delta=0.2", drop_order="score")  # a capacity of the gate's own
    assert "score" in check(GPT, "gpt", "locmoe", **own) and "score" in check(GPT, "gpt", "locmoe", permute=0.1, **own)


def test_block_size_is_checked():
    for kind in ("gpt", "roberta"):
        with pytest.raises(ValueError, match="a sequence of 13 tokens is longer than --block_size=12"):
            build(kind)(tokens(1, 13))
    with pytest.raises(ValueError, match="--n_embd=16 is not divisible by --n_head=3"):
        build(n_head=3)


# ---------------------------------------------------------------------------------------------------------------------
# What gates that route by id see of a mask


def test_masks_are_spread_over_a_table_without_telling_the_answer():
    """Gates that route by id see a mask as one of block_size extra ids, by position: evenly spread, whatever is under
    it."""
    model = opinionated(RoBERTa, "hash", block_size=16)
    x = ids(4, 16)
    assert torch.equal(model.route_ids(x), x)
    x[:, 3:] = MASK
    routed = model.route_ids(x)
    assert torch.equal(routed[:, :3], x[:, :3]) and routed[0, 3:].tolist() == list(range(FEW + 3, FEW + 16))
    assert RoBERTa.route_counts([50, 30, 20], 4).tolist() == pytest.approx([44, 26.4, 17.6, 3, 3, 3, 3])
    counts = RoBERTa.route_counts(torch.tensor([100.0] * 8 + [0]), 16)
    cfg = runs.config("hash", block_size=16)
    model = RoBERTa(cfg, FEW, functools.partial(feed_forward, cfg, V=FEW + 16, counts=counts), mask_id=MASK)
    for gate in model.gates():
        assert gate.table.shape[1] == FEW + 16
        assert gate.table[0, FEW:].bincount().tolist() == [4, 4, 4, 4]  # every expert works on masks


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_greedy_generation_is_the_argmax_token_by_token():
    model = build(gate="switch").eval()
    x = tokens(2, 3)
    y = model.generate(x, 15, temperature=0)
    assert y.shape == (2, 18) and torch.equal(y[:, :3], x)
    for t in range(3, 18):  # also beyond block_size: the window slides
        logits = model(y[:, max(0, t - 12) : t])[0][:, -1]
        assert torch.equal(y[:, t], logits.argmax(1))


def test_sampling():
    model = build(gate="switch").eval()
    for p in model.parameters():
        p.data.mul_(20)  # logits that differ
    x = tokens(1, 4)
    rng = lambda: torch.Generator().manual_seed(5)
    assert torch.equal(model.generate(x, 8, generator=rng()), model.generate(x, 8, generator=rng()))
    assert torch.equal(model.generate(x, 8, top_k=1, generator=rng()), model.generate(x, 8, temperature=0))
    assert model.generate(x, 8, top_k=V + 5, generator=rng()).shape == (1, 12)
    rows = x.expand(400, -1)
    for top_k in (3, 7):
        allowed = set(model(x)[0][0, -1].topk(top_k).indices.tolist())
        drawn = set(model.generate(rows, 1, top_k=top_k, generator=rng())[:, -1].tolist())
        assert drawn <= allowed
    for temperature in (1.0, 10.0):
        p = (model(x)[0][0, -1] / temperature).softmax(0)
        drawn = model.generate(x.expand(4000, -1), 1, temperature, generator=rng())[:, -1]
        assert (torch.bincount(drawn, minlength=V) / 4000 - p).abs().max() < 0.03


def test_stop_ends_when_every_row_has_stopped():
    model = build(gate="switch").eval()
    x = tokens(1, 3)
    y = model.generate(x, 10, temperature=0)
    stop = int(y[0, 5])
    first = (y[0, 3:] == stop).nonzero()[0, 0] + 3
    assert torch.equal(model.generate(x, 10, temperature=0, stop=stop), y[:, : first + 1])
    two = torch.cat([x, tokens(1, 3, seed=8)])
    both = model.generate(two, 10, temperature=0, stop=stop)
    assert both.shape[1] == 13 or (both[:, 3:] == stop).any(1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Translation: beams


def log_p(model, src, y):
    """log p of each of y's tokens, without a cache: src (1, S), y (n, T) -> (n, T)."""
    x = torch.cat([torch.full((len(y), 1), BOS), y[:, :-1]], 1)
    return model(x, src.expand(len(y), -1))[0].log_softmax(2).gather(2, y[..., None])[..., 0]


def test_the_translator_decodes_with_a_cache_as_without():
    model = build("translation", gate="topk").eval()
    src, x = tokens(2, 7), tokens(2, 9, seed=1)
    src[1, 5:] = model.pad_id
    memory, live, _ = model.encode(src)
    whole = model.head(model.decode(x, memory, live)[0])
    cache = [({}, {}) for _ in range(model.cfg.n_layer)]
    for t in range(9):
        h, _ = model.decode(x[:, t : t + 1], memory, live, t, cache)
        assert torch.allclose(model.head(h)[:, 0], whole[:, t], atol=1e-5)
    other = src.clone()
    assert torch.allclose(model(x, other)[0], whole, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
def test_beam_search_against_all_sentences(length_penalty):
    """A beam that never drops anything finds the best of all sentences of up to three tokens, padding or not."""
    model, src, T = opinionated(Translator, std=0.5), ids(4, 6), 3
    src[1, 4:], src[2, 2:] = PAD, PAD
    y, score = model.translate(src, BOS, EOT, beams=300, length_penalty=length_penalty, max_tokens=T)
    lengths = set()
    for i in range(len(src)):
        best = (-1e9, None)
        for n in range(1, T + 1):
            ends = [(EOT,)] if n < T else [(t,) for t in range(EOT + 1)]  # the last one may be cut
            all_of_n = torch.tensor([s + e for s in itertools.product(range(EOT), repeat=n - 1) for e in ends])
            scores = log_p(model, src[i : i + 1], all_of_n).sum(1) / ((5 + n) / 6) ** length_penalty
            best = max(best, (scores.max().item(), all_of_n[scores.argmax()].tolist()))
        found = y[i].tolist() + [EOT]
        assert found[: len(best[1])] == best[1] and abs(score[i] - best[0]) < 1e-4
        lengths.add(len(best[1]))
    assert length_penalty or 1 in lengths  # short ones win without a penalty


@torch.no_grad()
@pytest.mark.parametrize("gate", CAUSAL)
def test_one_beam_is_greedy_and_the_cache_changes_nothing(gate):
    """beams=1 writes what an argmax over the whole, uncached model writes; any beam's score is that of its sentence."""
    model, src = opinionated(Translator, gate, std=0.5), ids(5, 6)
    src[0, 3:] = PAD
    y, _ = model.translate(src, BOS, EOT, beams=1, max_tokens=6)
    x, done = torch.full((5, 1), BOS), torch.zeros(5, dtype=torch.bool)
    for _ in range(y.shape[1]):
        token = model(x, src)[0][:, -1, : EOT + 1].argmax(1)
        token = torch.where(done, EOT, token)
        done |= token == EOT
        x = torch.cat([x, token[:, None]], 1)
    assert torch.equal(x[:, 1:], y) and (done.all() or y.shape[1] == 6)

    y, score = model.translate(src, BOS, EOT, beams=3, length_penalty=0.6, max_tokens=6)
    for i in range(5):
        n = (y[i].tolist() + [EOT]).index(EOT) + 1
        n = min(n, y.shape[1])
        value = log_p(model, src[i : i + 1], y[i : i + 1, :n]).sum() / ((5 + n) / 6) ** 0.6
        assert abs(value - score[i]) < 1e-4
        alone = model.translate(src[i : i + 1], BOS, EOT, beams=3, length_penalty=0.6, max_tokens=6)
        assert abs(alone[1] - score[i]) < 1e-4 and torch.equal(alone[0][0, :n], y[i, :n])  # the batch does not matter
    assert not ((y == MASK) | (y == PAD) | (y == BOS)).any()


def test_wider_beams_score_no_less_on_average():
    model, src = opinionated(Translator, std=0.5), ids(30, 6)
    score = [model.translate(src, BOS, EOT, beams, 0.0, max_tokens=6)[1].mean() for beams in (1, 4)]
    assert score[1] > score[0]


@torch.no_grad()
def test_a_hypothesis_that_can_still_overtake_is_waited_for():
    """First eot with 0.55 or a with 0.45, after a only eot: log 0.45 / (7 / 6)^2 = -0.587 is more than log 0.55."""
    model = opinionated(Translator)
    first, then = torch.full((2, FEW), -30.0)
    first[EOT], first[0], then[EOT] = math.log(0.55), math.log(0.45), 0.0
    model.decode = lambda x, memory, live, t, cache: (x[..., None], [mine.update(kv=(x, x)) for mine, _ in cache])
    model.head = lambda h: torch.where(h == BOS, first, then)
    y, score = model.translate(ids(1, 3), BOS, EOT, beams=2, length_penalty=2.0, max_tokens=4)
    assert y.tolist() == [[0, EOT]] and abs(score + 0.5867) < 1e-4
