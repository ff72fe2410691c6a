"""
data/objectives.py, and what it shows of a trained model (data/samples.py): filling masks, fine-tuning, translation,
each through train.main on letters that are easy to learn.
"""

import json
import re

import pytest
import torch

import dist
import train
from data.files import write_text
from data.objectives import OBJECTIVES
from data.samples import score_translations, translate
from ranks import run_ranks
from runs import BYTES, config

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
    train.main([f"--out_dir={tuned}", "--sample=xyzzy wxyz"])
    assert re.search(r"-> right [5-9]\d %", capsys.readouterr().out)
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
