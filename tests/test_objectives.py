"""
data/objectives.py, and what it shows of a trained model (data/samples.py): filling masks, fine-tuning, translation,
each through train.main on letters that are easy to learn.
"""

import json
import math
import random
import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch

import dist
import train
from data.batches import random_starts
from data.files import write_pairs, write_text
from data.objectives import OBJECTIVES
from data.samples import score_translations, translate
from ranks import run_ranks
from runs import BYTES, config, same

SMALL = ("--n_layer=2 --n_head=2 --n_embd=16 --block_size=24 --batch_size=4 --max_steps=4 --warmup=2 --eval_every=0 "
        "--eval_batches=2 --log_every=2 --save_every=0 --n_experts=4 --device=cpu").split()  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# RoBERTa


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
    before, after = (dist.find(folder)[1] for folder in (first, tuned))
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
    assert dist.find(tuned)[1]["config"]["init_from"] == str(first)  # also after a resume
    train.main([f"--out_dir={tuned}", f"--init_from={first}", "--eval_only"])  # of its training's flags
    for look in ("--eval_only", "--sample=x"):  # not the run that was meant
        with pytest.raises(
            ValueError, match=r"init_from='elsewhere' \(there: '.*first'\); .* choose another --out_dir$"
        ):
            train.main([f"--out_dir={tuned}", "--init_from=elsewhere", look])
    train.main([f"--out_dir={tuned}", "--sample=xyzzy wxyz"])
    assert re.search(r"-> right [5-9]\d %", capsys.readouterr().out)
    swapped = shutil.copytree(letters["text"], tmp_path / "swapped")
    meta = json.loads((swapped / "meta.json").read_text())
    for split in meta["splits"].values():
        split["domains"] = {"right": split["domains"]["left"], "left": split["domains"]["right"]}
    (swapped / "meta.json").write_text(json.dumps(meta))
    for look in ("--eval_only", "--sample=x", "--init_from=resume"):
        with pytest.raises(ValueError, match="has the domains right, left; the checkpoint knows .* as left, right"):
            train.main([f"--out_dir={tuned}", look, f"--dataset={swapped}"])
    train.main([*SMALL, "--objective=classify", text, f"--out_dir={tmp_path / 'scratch'}"])
    cfg = train.configure(
        train.parse(["--objective=classify", "--block_size=24", "--batch_size=4", text], train.Config)
    )
    objective = train.open_objective(cfg)
    assert objective.schedule_step(3) == 3  # from scratch the gate has its phases; fine-tuning begins after the last
    objective.cfg.init_from = str(first)
    assert objective.schedule_step(3) == cfg.max_steps
    batch = objective.train_batch(0)
    assert batch.keys() == {"x", "y"} and batch["y"].shape == (4, 1)


def test_a_class_without_a_passage_is_refused_and_passages_end_with_their_class(letters, tmp_path, capsys):
    splits = {"train": {"a": ["a" * 50], "b": ["b" * 30]}, "val": {"a": ["a" * 40], "b": ["B" * 60]}}
    write_text(str(tmp_path / "corpus"), BYTES, splits, "test")
    flags = [*SMALL, "--objective=classify", f"--dataset={tmp_path / 'corpus'}", f"--out_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match="no passage of 31 tokens to learn b from: lower --block_size"):
        train.main([*flags, "--block_size=31"])
    capsys.readouterr()
    train.main([*flags, "--block_size=30"])
    assert re.search(r"\na +->.*'a{20}<\|endoftext\|>' \.\.\.", capsys.readouterr().out)


def test_fine_tuning_begins_after_the_last_phase(letters, tmp_path, monkeypatch):
    text, gate = f"--dataset={letters['text']}", ["--gate=dts", "--diversify=0", "--gate_args=dense=0.5,hard=0.8"]
    train.main([*SMALL, "--objective=roberta", text, f"--out_dir={tmp_path / 'first'}", *gate])
    seen, real = [], train.train_step
    hard = lambda run: bool(run.model.gates()[0].hard)
    monkeypatch.setattr(train, "train_step", lambda run, *more: (seen.append(hard(run)), real(run, *more))[1])
    first = f"--init_from={tmp_path / 'first'}"
    train.main([*SMALL, "--objective=classify", text, first, f"--out_dir={tmp_path / 'tuned'}"])
    assert seen == [True] * 4


def test_a_classifier_learns_from_a_classifier(letters, tmp_path):
    """A teacher brings its head; without one it has nothing to say."""
    text, flags = f"--dataset={letters['text']}", [*SMALL, "--n_experts=1"]
    train.main([*flags, "--objective=roberta", text, f"--out_dir={tmp_path / 'roberta'}"])
    train.main([*flags, "--objective=classify", text, f"--out_dir={tmp_path / 'teacher'}"])
    pupil = [*SMALL, "--objective=classify", text, f"--out_dir={tmp_path / 'pupil'}", "--distill=1", "--n_experts=1"]
    with pytest.raises(ValueError, match="roberta has no classifier to learn from"):
        train.set_up(train.parse([*pupil, f"--teacher={tmp_path / 'roberta'}"], train.Config))
    run = train.set_up(train.parse([*pupil, f"--teacher={tmp_path / 'teacher'}", "--seed=9"], train.Config))
    known = dist.find(tmp_path / "teacher")[1]["model"]
    heads = [name for name in known if name.startswith("classifier.")]
    assert heads and all(torch.equal(run.teacher.state_dict()[name], known[name]) for name in heads)


def test_a_mistake_of_an_objective_shows_before_the_first_step(letters, tmp_path, monkeypatch):
    """Also one in what only the evaluation asks for; after the last step it would cost the run."""
    monkeypatch.setattr(OBJECTIVES["gpt"], "more_metrics", lambda self, split, loss: {"loss": 1 // 0})
    with pytest.raises(ZeroDivisionError):
        train.main([*SMALL, "--objective=gpt", f"--dataset={letters['text']}", f"--out_dir={tmp_path / 'out'}"])
    assert not list(tmp_path.glob("out/*"))


def test_a_mixture_of_narrow_experts_is_fine_tuned_as_it_is(letters, tmp_path, capsys):
    """The experts came from a wider FFN; nothing is spawned any more, and no phase is announced."""
    text, first = f"--dataset={letters['text']}", tmp_path / "first"
    narrow = "--n_experts=2 --spawn=importance --expert_hidden=32 --diversify=0.4".split()
    train.main([*SMALL, "--objective=roberta", text, *narrow, f"--out_dir={first}"])
    assert "diversify           0" in capsys.readouterr().out
    train.main(["--objective=classify", text, f"--init_from={first}", f"--out_dir={tmp_path / 'new'}", "--max_steps=2"])
    assert dist.find(tmp_path / "new")[1]["config"]["expert_hidden"] == 32
    assert "diversify" not in capsys.readouterr().out


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
    with pytest.raises(ValueError, match="model for translation; fine-tuning needs a run of --objective=roberta"):
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
# Translation


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
    with pytest.raises(ValueError, match="--shard_by_domain=true is for corpora of several domains"):
        train.main([*start, f"--out_dir={tmp_path}/sharded", "--shard_by_domain"])


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
# Batches, metrics and samples, on corpora small enough to know them by heart


def opened(folder, name, learnt, held_out, **more):
    """An objective on a corpus in bytes: {domain: [document, ...]}, or a list of pairs, for train and for val."""
    write, langs = (write_text, []) if isinstance(learnt, dict) else (write_pairs, [("en", "de")])
    write(str(folder), BYTES, *langs, {"train": learnt, "val": held_out}, "a test")
    more = dict(objective=name, dataset=str(folder), block_size=4, batch_size=2) | more
    return train.open_objective(config(**more))


def run(objective, model, **more):
    cfg = Namespace(**vars(objective.cfg) | more)
    return Namespace(model=model, cfg=cfg, mesh=dist.Mesh(), autocast=train.nullcontext())


def test_held_out_windows_and_what_is_said_of_them(tmp_path):
    """Windows side by side within their domains, or some of them, evenly spread; bits per byte; the loss to beat."""
    held_out = {"low": ["abcdefghijklmnopqrs"], "high": ["ABCDEFGHIJKL"]}  # 20 and 13 tokens
    objective = opened(tmp_path, "gpt", {"low": ["x" * 30], "high": ["y" * 30]}, held_out)
    rows = lambda n: [(BYTES.decode(x), BYTES.decode(y), int(domain[0])) for batch in objective.held_out("val", n)
                      for x, y, domain in zip(batch["x"], batch["y"], batch["domain"]) if (y >= 0).all()]  # fmt: skip
    x, y = "abcd efgh ijkl mnop ABCD EFGH IJKL", "bcde fghi jklm nopq BCDE FGHI JKL<|endoftext|>"
    every = list(zip(x.split(), y.split(), [0] * 4 + [1] * 3))
    assert rows(0) == every and rows(2) == [every[i] for i in (0, 1, 3, 5)] and rows(1) == [every[0], every[3]]
    assert math.isclose(objective.more_metrics("val", 1.5)["bpb"], 1.5 / math.log(2) * 33 / 31)
    unigram = (31 * math.log(322) + 2 * math.log(322 / 3)) / 33  # 62 tokens, 2 ends of text, each of 260 once more
    assert f"to beat: {unigram:.3f}," in objective.to_beat("val")


@pytest.mark.parametrize("name", ["gpt", "roberta"])
def test_training_batches_are_a_function_of_seed_and_step(name, tmp_path):
    objective = opened(tmp_path, name, {"a": ["abcdefgh" * 50]}, {"a": ["abcdefgh" * 9]}, block_size=16)
    batch, other = objective.train_batch(3), objective.train_batch(4)
    assert same(batch, objective.train_batch(3)) and not same(batch["x"], other["x"])
    assert same(batch["y"] >= 0, other["y"] >= 0) == (name == "gpt"), "another step, other masks"
    assert all(map(same, objective.held_out("val"), objective.held_out("val")))
    objective.cfg.seed += 1
    assert not same(batch, objective.train_batch(3))


def test_every_held_out_batch_has_masks_of_its_own(tmp_path):
    objective = opened(tmp_path, "roberta", {"a": ["ab" * 200]}, {"a": ["ab" * 200]}, block_size=16)
    a, b = [batch["y"] >= 0 for batch in objective.held_out("val", 2)]
    assert not torch.equal(a, b)


def test_windows_are_drawn_evenly(tmp_path):
    """From each domain by the number of its windows, wherever they begin; none from one that is too short."""
    spans = [("a", 0, 1016), ("b", 1016, 1116), ("c", 1116, 1120), ("d", 1120, 4136)]
    corpus = Namespace(folder="here", domains=lambda split: spans)
    starts = random_starts(corpus, config(batch_size=20_000), np.random.default_rng(0), 1)  # of 16 tokens
    which = np.searchsorted([end for _, _, end in spans], starts, side="right")
    assert np.allclose(np.bincount(which, minlength=4) / 20_000, np.array([1000, 84, 0, 3000]) / 4084, atol=0.02)
    for i, room in ((0, 1000), (1, 84), (3, 3000)):
        at = starts[which == i] - spans[i][1]
        assert at.min() < 0.02 * room and 0.98 * room - 1 <= at.max() < room and abs(at.mean() / room - 0.5) < 0.05


def test_pairs(tmp_path):
    """All but those too long come once, in an order of seed and epoch, not of length; then what is said of them."""
    pairs, long = [(chr(97 + i % 20) * (1 + i // 2), "b") for i in range(40)], [("q" * 24, "b"), ("q", "b" * 24)]
    objective = opened(tmp_path, "translation", long + pairs, pairs, block_size=23, batch_size=4)
    texts = lambda batch: [BYTES.decode(ids[ids < BYTES.eot]) for ids in batch["src"]]
    epoch = lambda n: [texts(objective.train_batch(step)) for step in range(10 * n, 10 * n + 10)]
    first, order = epoch(0), lambda batches: [sorted(batch) for batch in batches]
    assert order(first) != order(epoch(1)) and first == epoch(0) and sorted(sum(first, [])) == sorted(dict(pairs))
    assert first != sorted(first, key=lambda b: len(b[0])) and any(b != sorted(b, key=len) for b in first)
    objective.cfg.seed += 1
    assert order(first) != order(epoch(0))
    objective = opened(
        tmp_path / "few", "translation", [("aab", "bcc"), ("a", "c")], [("a", "bc"), ("b", "c"), ("a", "b" * 9)]
    )  # fmt: skip
    assert [int(objective.counts[i]) for i in (*b"abc", BYTES.eot)] == [3, 2, 3, 4]
    assert math.isclose(objective.more_metrics("val", 1.5)["bpb"], 1.5 / math.log(2) * 5 / 3)
    unigram = (2 * math.log(266 / 4) + math.log(266 / 2) + 2 * math.log(266 / 3)) / 5  # targets: c, c, b, two ends
    assert f"to beat: {unigram:.3f}," in objective.to_beat("val")


def test_tables_of_a_translator_are_balanced_by_what_their_stack_reads(tmp_path):
    """Letters that are frequent on one side only, and <|bos|>, which no file holds: counted from the batches of an
    epoch, no expert has more than its share and the most frequent token."""
    rng = random.Random(0)
    write = lambda letters: "".join(rng.choice(letters) for _ in range(6))
    pairs = [(write("aaabbccdefgh"), write("hhhijklmnop")) for _ in range(64)] + [("a" * 40, "b")]
    objective = opened(tmp_path, "translation", pairs, pairs, block_size=12, batch_size=8, gate="hash", n_experts=4,
                       moe_every=1)  # fmt: skip
    model, epoch = train.build_model(objective.cfg, objective, dist.Mesh(), 2, 4), map(objective.train_batch, range(8))
    read = [(batch["src"], batch["x"]) for batch in epoch]
    for stack, side in zip((model.encoder, model.decoder), zip(*read)):
        ids = torch.cat([x[x != objective.corpus.tok.pad] for x in side])
        for block in stack.blocks:
            assert block.ffn.gate.table[0, ids].bincount(minlength=4).max() <= len(ids) / 4 + ids.bincount().max()


def test_classes(tmp_path):
    """Three windows of a, one of b; each class shows a passage of its own; one that no training has is refused."""
    learnt = {"a": ["a" * 20], "b": ["b" * 20]}
    objective = opened(tmp_path, "classify", learnt, {"a": ["a" * 13], "b": ["b" * 5]})
    assert "to beat: accuracy 0.7500" in objective.to_beat("val")
    lines = objective.sample(run(objective, lambda x: (torch.tensor([[[0.0, 1.0]]]), {})), None)
    assert re.findall(r"^(\w) +-> b 73 %  a 27 %   '(\w)", lines, re.M) == [("a", "a"), ("b", "b")]
    with pytest.raises(ValueError, match="classify"):
        opened(tmp_path, "classify", learnt, {"a": ["a" * 13], "c": ["c" * 5]})


def test_guesses_are_ordinary_tokens_and_the_first_is_what_counts(tmp_path):
    logits = torch.zeros(BYTES.vocab_size)
    logits[ord("q")], logits[ord("a")], logits[BYTES.eot :] = 3, 2, 9
    model = lambda x, domain, pick: (logits.expand(int(pick.sum()), -1), {})
    objective = opened(tmp_path, "roberta", {"a": ["a" * 9]}, {"a": ["a" * 99], "q": ["q" * 99]})
    assert "'q' 7 %  'a' 3 %  " in objective.sample(run(objective, model), "b<mask>c")  # e^3 / (e^3 + e^2 + 254)
    assert re.findall(r"\] +(=?) +'(\w)'  ", objective.sample(run(objective, model), None)) == [("", "a"), ("=", "q")]


def test_a_text_follows_seed_temperature_and_top_k(tmp_path):
    objective = opened(tmp_path, "gpt", {"a": ["a" * 9]}, {"a": ["a" * 9]}, sample_tokens=20)
    model = train.build_model(objective.cfg, objective, dist.Mesh(), 1, 1).eval()
    text = lambda **more: objective.sample(run(objective, model, **more), "ab")
    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(temperature=0.0) == text(top_k=1) == text(top_k=1, seed=2) == text(temperature=0.0, seed=2) != text()


def test_translations_are_scored_against_their_references(tmp_path):
    """By a model that, with the beams asked for, copies the source, five words: every other of six pairs that fit."""
    text = [f"a b c d {i}" for i in range(6)]
    pairs = [("x" * 40, "z"), *zip(text, [text[0], "z", text[2], "z", text[4] + " e f", "z"])]
    objective = opened(tmp_path, "translation", pairs, pairs, block_size=20, beams=3)
    model = Namespace(translate=lambda src, bos, eot, beams: (src.clamp(max=eot * (beams == 3)), None))
    scores, shown = objective.scores(run(objective, model), "val", 3)
    assert re.findall(r"^    a b c d (\d)$", shown, re.M) == ["0", "2", "4"] and shown.count("\n -> ") == 1
    assert math.isclose(scores.pop("bleu"), 100 * math.exp(1 - 17 / 15)) and scores == dict(exact=2 / 3, sentences=3)


def test_domains_without_a_word_are_left_out(tmp_path, capsys):
    """An empty document is one <|endoftext|>: there is nothing to mask in it."""
    texts = {"a": ["the cat sat on the mat " * 4] * 3}
    write_text(str(tmp_path / "text"), BYTES, {"train": texts, "val": texts | {"b": [""]}}, "a test")
    train.main([*SMALL, "--objective=roberta", f"--dataset={tmp_path / 'text'}", f"--out_dir={tmp_path / 'out'}"])
    said = capsys.readouterr().out
    assert "(a; masked word" in said and "(b; masked word" not in said
