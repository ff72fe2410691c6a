"""
The three objectives beside GPT: masks and their statistics, who may look at whom, decoding, BLEU, fine-tuning.

What holds for every gate is asked of every gate, found by gates(). Decoding is compared with trying all sentences.
"""

import itertools
import json
import re
import types
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from ranks import run_ranks
import dist
import evomoe
import train
from data.batches import mask_tokens, micro_batches, random_starts
from data.objectives import OBJECTIVES
from data.samples import score_translations, translate
from data.bleu import bleu, corpus_bleu, counts, words
from data.bpe import Tokenizer
from data.files import write_pairs, write_text
from experts import feed_forward
from model import GPT, RoBERTa, Translator
from router import gates
from runs import config

GATES = sorted(gates())
CAUSAL = [name for name in GATES if gates()[name].looks_ahead != "always"]
EOT, MASK, PAD, BOS, V = 5, 6, 7, 8, 9  # a vocabulary of five ordinary tokens, specials last
BYTES = Tokenizer("bytes", [bytes([i]) for i in range(256)])
SMALL = ("--n_layer=2 --n_head=2 --n_embd=16 --block_size=24 --batch_size=4 --max_steps=4 --warmup=2 --eval_every=0 "
        "--eval_batches=2 --log_every=2 --save_every=0 --n_experts=4 --device=cpu").split()  # fmt: skip


def build(kind, gate="switch", mesh=None, V=V, std=0.25, **more):
    """A model with weights that are large enough to have an opinion, as at the end of its curriculum."""
    cfg = config(gate, **more)
    special = dict(pad_id=PAD) if kind is Translator else dict(mask_id=MASK) if kind is RoBERTa else {}
    n_ids = V + cfg.block_size * (kind is RoBERTa)
    ffn = partial(feed_forward, cfg, mesh=mesh, V=n_ids, counts=torch.ones(n_ids), n_domains=2, steps=cfg.max_steps)
    model = kind(cfg, V, ffn, **special).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 and ".gate." not in name:
            p.data.mul_(std / p.data.std())
    evomoe.set_step(model, cfg.max_steps, cfg)
    return model


def ids(*shape, seed=0):
    return torch.randint(0, EOT, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """{kind: folder}, in bytes: two domains of text; sentence pairs, some longer than a block of 24."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    texts = lambda n, alphabet: ["".join(rng.choice(list(alphabet), 40)) for _ in range(n)]
    split = lambda n: {"left": texts(n, "abcd "), "right": texts(n, "wxyz ")}
    write_text(str(folder / "text"), BYTES, {"train": split(20), "val": split(6)}, "a test")
    pairs = lambda n: [(t[: 5 + i % 8], t[: 5 + i % 8].upper()) for i, t in enumerate(texts(n, "abcd"))]
    long = [("a" * 24, "b"), ("a", "b" * 30)]
    write_pairs(str(folder / "pairs"), BYTES, ("lower", "upper"),
                {"train": pairs(40) + long, "val": pairs(8), "test": long[:1] + pairs(7)}, "a test")  # fmt: skip
    return {"text": folder / "text", "pairs": folder / "pairs"}


# ---------------------------------------------------------------------------------------------------------------------
# Who may look at whom


@pytest.mark.parametrize("gate", CAUSAL)
def test_the_decoder_does_not_see_the_future(gate):
    """Evaluation: later target tokens change nothing before them. Gates that promise it keep it in training too."""
    model, src, x = build(Translator, gate), ids(2, 6), ids(2, 8, seed=1)
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


@pytest.mark.parametrize("gate", GATES)
def test_encoders_look_both_ways(gate):
    """Changing the last token reaches the first position of RoBERTa, and through the encoder every target position."""
    x = ids(2, 6)
    changed = x.clone()
    changed[:, -1] = (x[:, -1] + 1) % EOT
    model = build(RoBERTa, gate)
    assert ((model(x)[0] - model(changed)[0])[:, 0].abs().amax(1) > 1e-3).all()
    model, y = build(Translator, gate), ids(2, 4, seed=2)
    assert ((model(y, x)[0] - model(y, changed)[0]).abs().amax(2) > 1e-3).all()


@pytest.mark.parametrize("gate", GATES)
def test_padding_changes_nothing(gate):
    """More columns of padding, on either side, leave every logit as it was; so does what RoBERTa has in dead places."""
    model, src, x = build(Translator, gate), ids(3, 6), ids(3, 5, seed=1)
    src[0, 4:], x[1, 3:] = PAD, PAD
    more = lambda t: torch.cat([t, torch.full((3, 2), PAD)], 1)
    logits, padded = model(x, src)[0], model(more(x), more(src))[0][:, :5]
    assert torch.allclose(logits[x != PAD], padded[x != PAD], atol=1e-5)

    model, live = build(RoBERTa, gate), ids(3, 8) > 0
    live[:, 0] = True
    a, b = (model(torch.where(live, ids(3, 8), other), live)[0] for other in (0, 3))
    assert torch.allclose(a[live], b[live], atol=1e-5)


@pytest.mark.parametrize("gate", ["switch", "expertchoice", "base", "hash"])
def test_all_padding_is_not_nan(gate):
    """A row, or a batch, of nothing but padding."""
    for rows in (slice(0, 1), slice(None)):
        src, x = ids(3, 6), ids(3, 5)
        src[rows], x[rows] = PAD, PAD
        model = build(Translator, gate)
        logits, aux = model(x, src)
        assert logits.isfinite().all() and all(torch.as_tensor(v).isfinite().all() for v in aux.values())
        model.train()
        logits, aux = model(x, src)
        sum(t.sum() for t in [logits, *aux.values()] if torch.is_tensor(t)).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        live = torch.ones(3, 6, dtype=torch.bool)
        live[rows] = False
        assert build(RoBERTa, gate)(src, live)[0].isfinite().all()


def test_gates_that_look_ahead_are_refused():
    """Expert choice in a causal model; an encoder may have it."""
    never = [name for name in GATES if gates()[name].looks_ahead == "always"]
    assert never
    check = lambda kind, objective, gate, **more: train.check_causality(
        config(gate, objective=objective, **more), OBJECTIVES[objective], build(kind, gate, **more)
    )
    for gate in never:
        for kind, objective in ((GPT, "gpt"), (Translator, "translation")):
            with pytest.raises(ValueError, match=f"gate={gate} .*later tokens.*insist"):
                check(kind, objective, gate)
            assert "in training" in check(kind, objective, gate, insist=True)
        assert check(RoBERTa, "roberta", gate) == ""
    assert "base" in (note := check(GPT, "gpt", "base")) and "evaluation does not" in note
    assert check(GPT, "gpt", "switch") == ""
    assert "score" in check(GPT, "gpt", "topk", capacity_factor=1.0, drop_order="score")


# ---------------------------------------------------------------------------------------------------------------------
# RoBERTa


def test_masking_statistics():
    """15 % of the ordinary tokens; of those 80 % masks, 10 % random over all ordinary tokens, 10 % unchanged."""
    corpus = types.SimpleNamespace(tok=BYTES)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(0, BYTES.vocab_size, (1000, 1500)))
    corrupted, y = mask_tokens(x, corpus.tok, rng)
    ordinary, picked = x < BYTES.eot, y >= 0
    assert (
        not (picked & ~ordinary).any()
        and torch.equal(y[picked], x[picked])
        and torch.equal(corrupted[~picked], x[~picked])
    )
    share = lambda hit, of: float(hit.sum() / of.sum())
    assert abs(share(picked, ordinary) - 0.15) < 0.005
    assert abs(share(picked & (corrupted == BYTES.mask), picked) - 0.8) < 0.01
    assert abs(share(picked & (corrupted == x), picked) - (0.1 + 0.1 / 256)) < 0.01
    random = corrupted[picked & (corrupted != BYTES.mask) & (corrupted != x)]
    frequency = torch.bincount(random, minlength=256).double() / len(random)
    assert len(frequency) == 256 and frequency.min() > 0.5 / 256 and frequency.max() < 1.6 / 256
    again, other = (
        mask_tokens(x, corpus.tok, np.random.default_rng(1))[1],
        mask_tokens(x, corpus.tok, np.random.default_rng(2))[1],
    )
    assert not torch.equal(again, other)  # dynamic: another step, other masks


def test_masking_always_leaves_a_target_but_not_a_special_one():
    corpus = types.SimpleNamespace(tok=BYTES)
    for seed in range(20):
        x = torch.full((1, 3), BYTES.eot)
        assert (mask_tokens(x, corpus.tok, np.random.default_rng(seed))[1] == -1).all()
        x[0, 1] = 65
        assert mask_tokens(x, corpus.tok, np.random.default_rng(seed))[1].tolist() == [[-1, 65, -1]]


def test_masks_are_spread_over_a_table_without_telling_the_answer():
    """Gates that route by id see a mask as one of block_size extra ids, by position: evenly spread, whatever is under
    it."""
    model = build(RoBERTa, "hash", block_size=16)
    x = ids(4, 16)
    assert torch.equal(model.route_ids(x), x)
    x[:, 3:] = MASK
    routed = model.route_ids(x)
    assert torch.equal(routed[:, :3], x[:, :3]) and routed[0, 3:].tolist() == list(range(V + 3, V + 16))
    counts = RoBERTa.route_counts(torch.tensor([100.0] * 8 + [0]), 16)
    cfg = config("hash", block_size=16)
    model = RoBERTa(cfg, V, partial(feed_forward, cfg, V=V + 16, counts=counts), mask_id=MASK)
    for gate in model.gates():
        assert gate.table.shape[1] == V + 16
        assert gate.table[0, V:].bincount().tolist() == [4, 4, 4, 4]  # every expert works on masks


def test_fill_masks(letters, tmp_path, capsys):
    """--sample fills masks; probabilities are the model's; unusable prompts are one line each."""
    out = f"--out_dir={tmp_path}"
    train.main([*SMALL, "--objective=roberta", f"--dataset={letters['text']}", out])
    shown = capsys.readouterr().out
    assert (
        re.search(r"val loss \d+\.\d+  accuracy 0\.\d+  loss_left \d", shown)
        and "(left;" in shown
        and "(right;" in shown
    )
    assert re.search(r"\n\[1\] +[= ] '.'", shown)
    train.main([out, "--sample=ab<mask>d <mask>"])
    shown = capsys.readouterr().out
    assert "\nab [1]d [2]\n" in shown and shown.count(" %") == 10
    for prompt, says in (
        ("", "empty"),
        (" ", "empty"),
        ("abc", "<mask>"),
        ("<mask>" + "a" * 24, "25 tokens, the model takes 24"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            train.main([out, f"--sample={prompt}"])
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning


def test_classify(letters, tmp_path, capsys):
    """From a trained RoBERTa and from scratch: the labels are learnt, the gates are not told them, resume continues."""
    text, first, tuned = f"--dataset={letters['text']}", tmp_path / "first", tmp_path / "tuned"
    train.main([*SMALL, "--objective=roberta", text, f"--out_dir={first}", "--n_experts=2", "--gate=hash", "--seed=5"])
    flags = [f for f in SMALL if not re.match("--(n_|block|max)", f)] + [
        "--objective=classify",
        text,
        "--learning_rate=0.01",
    ]
    train.main([*flags, f"--init_from={first}", f"--out_dir={tuned}", "--max_steps=1", "--learning_rate=1e-9"])
    before, after = (dist.load(dist.latest(folder)) for folder in (first, tuned))
    assert (
        after["config"]["n_experts"] == 2 and after["config"]["gate"] == "hash" and after["config"]["block_size"] == 24
    )
    for name, t in before["model"].items():  # the very weights and tables
        assert torch.allclose(t, after["model"][name], atol=1e-6), name
    capsys.readouterr()
    train.main([*flags, "--init_from=resume", f"--out_dir={tuned}", "--max_steps=40", "--warmup=1"])
    shown = capsys.readouterr().out
    assert "to beat: accuracy 0.5000" in shown and "left" in shown
    assert float(re.search(r"step +40 \| val loss \S+ +accuracy (\S+)", shown)[1]) > 0.9
    train.main([f"--out_dir={tuned}", "--sample=xyzzy wxyz"])
    assert re.search(r"-> right [5-9]\d %", capsys.readouterr().out)
    train.main([*SMALL, "--objective=classify", text, f"--out_dir={tmp_path / 'scratch'}"])
    cfg = train.configure(train.parse(["--objective=classify", "--block_size=24", "--batch_size=4", text]))
    batch = train.open_objective(cfg).train_batch(0)
    assert batch.keys() == {"x", "y"} and batch["y"].shape == (4, 1)


def test_classify_starts_from_a_roberta_only(letters, tmp_path):
    train.main(
        [
            *SMALL,
            "--objective=translation",
            f"--dataset={letters['pairs']}",
            f"--out_dir={tmp_path}",
            "--bleu_sentences=1",
        ]
    )
    with pytest.raises(ValueError, match="model for translation, fine-tuning needs --objective=roberta"):
        train.main(
            [
                "--objective=classify",
                f"--dataset={letters['text']}",
                f"--init_from={tmp_path}",
                f"--out_dir={tmp_path}/new",
            ]
        )
    with pytest.raises(ValueError, match="no checkpoint"):
        train.main(
            ["--objective=classify", f"--dataset={letters['text']}", "--init_from=nowhere", f"--out_dir={tmp_path}/new"]
        )


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def log_p(model, src, y):
    """log p of each of y's tokens, without a cache: src (1, S), y (n, T) -> (n, T)."""
    x = torch.cat([torch.full((len(y), 1), BOS), y[:, :-1]], 1)
    return model(x, src.expand(len(y), -1))[0].log_softmax(2).gather(2, y[..., None])[..., 0]


@torch.no_grad()
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
def test_beam_search_against_all_sentences(length_penalty):
    """A beam that never drops anything finds the best of all sentences of up to three tokens, padding or not."""
    model, src, T = build(Translator, std=0.5), ids(4, 6), 3
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
    model, src = build(Translator, gate, std=0.5), ids(5, 6)
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
    model, src = build(Translator, std=0.5), ids(30, 6)
    score = [model.translate(src, BOS, EOT, beams, 0.0, max_tokens=6)[1].mean() for beams in (1, 4)]
    assert score[1] > score[0]


def translations(mesh, folder, n):
    """Texts and scores of n held-out sentences by an untrained model."""
    cfg = config(objective="translation", dataset=folder, block_size=24, batch_size=4, beams=2)
    objective = train.open_objective(cfg)
    model, corpus = train.build_model(cfg, objective, mesh, 2, cfg.n_experts).eval(), objective.corpus
    p = corpus.splits["val"]
    sources = [p.src[p.src_idx[i] : p.src_idx[i + 1]].tolist() for i in range(n)]
    torch.manual_seed(0)
    texts = translate(model, corpus, sources, cfg, mesh, train.nullcontext())
    return texts, score_translations(model, corpus, "val", n, cfg, mesh, train.nullcontext())


def ranks_translate(rank, world, folder, n):
    return translations(dist.make_mesh(rank, world, 4), folder, n)


def test_ranks_translate_like_one_process(letters):
    """Five sentences on two ranks that share the experts: all ranks have all translations, those of one process."""
    one = translations(dist.Mesh(), str(letters["pairs"]), 5)
    assert len(one[0]) == 5
    for result in run_ranks(2, ranks_translate, str(letters["pairs"]), 5):
        assert result == one


# ---------------------------------------------------------------------------------------------------------------------
# BLEU


@pytest.mark.parametrize("translations, references, expected", [  # expected: sacrebleu 2.6.0, corpus_bleu's default
    (["The cat sat on the mat."], ["The cat is sitting on the mat."], 42.3837),
    (["Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.", "Mehrere Männer mit Schutzhelmen "
                                                                           "bedienen ein Antriebsradsystem."],
     ["Zwei junge Männer sind draußen bei vielen Büschen.", "Mehrere Männer mit Schutzhelmen bedienen ein "
                                                            "Rad."], 31.5491),
    (["It's 3.5% (or 1,000.25) - isn't it? &quot;Yes&quot;, he said; A-1 and 1-A."],
     ["It's 3.5 % (or 1,000.25) - is it not? \"Yes\", he said: A-1 and 1-A."], 69.7431),
    (["a b c d e"], ["v w x y a"], 10.6822),
    (["a b c"], ["a b c"], 0.0),
    (["x y z w"], ["a b c d"], 0.0),
    (["Siebenhundertdrei Katzen sehen mich.", "", "Der Hund schläft nicht , weil er Hunger hat ."],
     ["Siebenhundertdrei Katzen sehen mich nicht.", "Ja.", "Der Hund schläft nicht, weil er Hunger hat."], 76.0877),
])  # fmt: skip
def test_bleu_is_sacrebleus(translations, references, expected):
    assert abs(corpus_bleu(translations, references) - expected) < 1e-3


def test_bleu_by_hand():
    """the cat the cat on the mat / the cat is on the mat: 5 of 7 words, 3 of 6 pairs, 1 of 5 triples, 0 of 4."""
    c = counts("the cat the cat on the mat", "the cat is on the mat")
    assert c.tolist() == [7, 6, 5, 3, 1, 0, 7, 6, 5, 4]
    by_hand = 100 * (5 / 7 * 3 / 6 * 1 / 5 * 0.5 / 4) ** 0.25  # no penalty: longer than the reference
    assert abs(bleu(c) - by_hand) < 1e-9
    short = counts("the cat is on", "the cat is on the mat")
    assert abs(bleu(short) - 100 * np.exp(1 - 6 / 4)) < 1e-9
    assert bleu(c + short) == corpus_bleu(
        ["the cat the cat on the mat", "the cat is on"], ["the cat is on the mat"] * 2
    )
    assert words('Ja, 3,5 km/h! A-b 1-2 "x" l\'été.') == 'Ja , 3,5 km / h ! A-b 1 - 2 " x " l\'été .'.split()
    with pytest.raises(ValueError, match="2 translations but 1 references"):
        corpus_bleu(["a", "b"], ["a"])


# ---------------------------------------------------------------------------------------------------------------------
# Translation, end to end


def test_translation_end_to_end(letters, tmp_path, capsys):
    """Train, translate, resume, evaluate; pairs that are too long are counted and left out."""
    out, start = f"--out_dir={tmp_path}", [*SMALL, "--objective=translation", f"--dataset={letters['pairs']}"]
    train.main([*start, out, "--bleu_sentences=5", "--label_smoothing=0.1", "--schedule=inverse_sqrt"])
    shown = capsys.readouterr().out
    assert "left out, longer than block_size=24 tokens: 2 of 42 train pairs, 1 of 8 test pairs" in shown
    found = re.search(r"test: BLEU (\S+), (\S+)% exactly as the reference \(5 sentences, beam of 4\)", shown)
    assert found and shown.count("\n -> ") + shown.count("\n  = ") == 5
    last = [json.loads(line) for line in open(tmp_path / "log.jsonl")][-1]
    assert last["test_sentences"] == 5 and abs(last["test_bleu"] - float(found[1])) < 0.01
    train.main([out, "--eval_only", "--beams=1"])
    shown = capsys.readouterr().out
    assert re.search(r"val: loss .* bleu .* sentences 8", shown) and re.search(r"test: loss .* sentences 7", shown)
    train.main([out, "--sample=abc"])
    assert capsys.readouterr().out.count("\n") >= 3
    for prompt, says in (("", "empty"), ("a" * 24, "24 tokens, the model takes 23")):
        with pytest.raises(ValueError, match=says):
            train.main([out, f"--sample={prompt}"])
    with pytest.raises(ValueError, match="every pair of the train split is longer than block_size=2"):
        train.main([*start, f"--out_dir={tmp_path}/short", "--block_size=2"])
    with pytest.raises(ValueError, match="40 training pairs, less than one batch of 64"):
        train.main([*start, f"--out_dir={tmp_path}/few", "--batch_size=64"])


def test_batches_of_pairs(letters):
    """An epoch has every pair that fits once, in batches of similar length; the loss counts every target token once."""
    cfg = config(objective="translation", dataset=str(letters["pairs"]), block_size=24, batch_size=4)
    objective = train.open_objective(cfg)
    corpus = objective.corpus
    seen, spread = Counter(), []
    for step in range(10):
        batch = objective.train_batch(step)
        length = (batch["src"] != corpus.tok.pad).sum(1)
        spread.append(int(length.max() - length.min()))
        for src, x, y in zip(batch["src"].tolist(), batch["x"].tolist(), batch["y"].tolist()):
            y = [t for t in y if t >= 0]
            assert (
                x[: len(y)] == [corpus.tok.bos] + y[:-1]
                and y[-1] == corpus.tok.eot
                and set(x[len(y) :]) <= {corpus.tok.pad}
            )
            text = corpus.tok.decode([t for t in src if t < corpus.tok.eot])
            assert corpus.tok.decode(y[:-1]) == text.upper()
            seen[text] += 1
    assert sum(seen.values()) == 40 and np.mean(spread) <= 2
    n = sum(int((b["y"] >= 0).sum()) for b in objective.held_out("test"))
    assert n == corpus.meta["splits"]["test"]["tgt_tokens"] - 2  # less the pair that is too long
    logits = torch.randn(2, 3, 260)
    toy = lambda x, pick: (logits[pick], {})
    nll, smooth, _, _, _ = train.task_loss(
        toy, dict(x=None, y=torch.tensor([[1, 2, -1], [3, -1, -1]])), label_smoothing=0.1
    )
    log_p = logits.log_softmax(2)[[0, 0, 1], [0, 1, 0]]
    assert torch.allclose(nll, -log_p[range(3), [1, 2, 3]]) and torch.allclose(smooth, 0.9 * nll - 0.1 * log_p.mean(1))


@pytest.mark.parametrize("grad_accum", [1, 2, 4])
def test_each_node_reads_its_own_domain_in_every_micro_batch(grad_accum):
    """Two nodes of two ranks, 16 rows: the rows that a rank gets come from the domain of its node only."""
    spans = [("prose", 0, 1000), ("code", 1000, 2000)]
    corpus = types.SimpleNamespace(folder="here", domains=lambda split: spans)
    cfg = config(batch_size=16, grad_accum=grad_accum, shard_by_domain=True)
    starts = torch.as_tensor(random_starts(corpus, cfg, np.random.default_rng(0), 2))
    for rank in range(4):
        mesh = types.SimpleNamespace(rank=rank, world=4, device="cpu")
        rows = torch.cat([part["y"] for part in micro_batches(dict(y=starts), grad_accum, mesh)])
        assert len(rows) == 4 and ((rows >= 1000) == (rank >= 2)).all(), rank
