"""The pictures of pictures.py: they can be read on a phone and in dark mode, and show what their captions say."""

import re
import xml.dom.minidom

import pytest
import torch
import torch.nn.functional as F

from ranks import run_ranks  # puts the repository on the path, too
import pictures
import train
from data.bpe import Tokenizer
from data.files import write_text
from router import example

NAMES = ["gates", "journey", "experts", "traffic", "heads"]


def elements(path, tag):
    return xml.dom.minidom.parse(str(path)).getElementsByTagName(tag)


def words(path):
    return [t.firstChild.data for t in elements(path, "text")]


def size(t):
    """The font size of a text: that of its class, if it names one, or else of all text."""
    rules = {kind: int(px) for kind, px in re.findall(r"^(text|\.\w+) \{[^}]*?(\d+)px", pictures.STYLE, re.M)}
    return next((rules[f".{kind}"] for kind in t.getAttribute("class").split() if f".{kind}" in rules), rules["text"])


def check_form(path):
    """Small, a title and a description, dark mode, no background, no text under 12 px or beyond the edges."""
    svg = xml.dom.minidom.parse(str(path)).documentElement
    width, height = (float(v) for v in svg.getAttribute("viewBox").split()[2:])
    assert width == 700 and path.stat().st_size < 60_000
    assert all(svg.getElementsByTagName(tag)[0].firstChild.data for tag in ("title", "desc"))
    assert "prefers-color-scheme: dark" in svg.getElementsByTagName("style")[0].firstChild.data
    assert not [r for r in svg.getElementsByTagName("rect") if float(r.getAttribute("width")) > 690]
    for t in svg.getElementsByTagName("text"):
        x, long = float(t.getAttribute("x")), 0.52 * size(t) * len(t.firstChild.data)
        kinds = t.getAttribute("class").split()
        left = x - long * (0.5 if "middle" in kinds else 1 if "end" in kinds else 0)
        assert size(t) >= 12 and left >= 0 and left + long <= width, t.firstChild.data
        assert 0 < float(t.getAttribute("y")) < height
    for r in svg.getElementsByTagName("rect"):
        x, y, w, h = (float(r.getAttribute(name)) for name in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height


@pytest.mark.parametrize("name", NAMES)
def test_the_pictures_of_the_repository_have_the_form(name):
    check_form(pictures.FIGURES / f"{name}.svg")


@pytest.mark.parametrize("name", ["gates", "journey"])
def test_the_pictures_of_the_repository_say_what_the_code_does_today(name, tmp_path):
    pictures.main([name, f"--out={tmp_path}"])
    assert words(tmp_path / f"{name}.svg") == words(pictures.FIGURES / f"{name}.svg"), f"draw {name} again"


def test_gates_shows_the_numbers_of_every_panel(tmp_path):
    pictures.main(["gates", f"--out={tmp_path}"])
    check_form(tmp_path / "gates.svg")
    shown = words(tmp_path / "gates.svg")
    for gate, step, name, idea in pictures.PANELS:
        G = example(gate, step)[1]
        at = shown.index(name)
        panel = shown[at : at + 2 + 8 + 4 + int((G != 0).sum())]  # name, idea, eight words, four labels, the cells
        weights = [word for word in panel[10:] if not word.startswith("E")]
        assert panel[1] == idea and weights == [pictures.number(g) for g in G.T.flatten().tolist() if g]


def test_what_the_caption_of_gates_says_is_so():
    G = {(gate, step): example(gate, step)[1] for gate, step, _, _ in pictures.PANELS}
    sent, words = {key: (g != 0) for key, g in G.items()}, example("hash")[0]
    for word in set(words):
        same = [n for n, other in enumerate(words) if other == word]
        assert len({tuple(G["hash", 0][n].tolist()) for n in same}) == 1
    cat, dog = words.index("cat"), words.index("dog")
    for gate in "switch", "topk":
        load = sent[gate, 0].sum(0)
        assert (sent[gate, 0][cat] == sent[gate, 0][dog]).all() and load.max() >= 3 * load.min()
    assert (sent["switch", 0].sum(1) == 1).all() and (sent["topk", 0].sum(1) == 2).all()
    assert (sent["expertchoice", 0].sum(0) == 4).all() and (sent["base", 0].sum(0) == 2).all()
    first, soon, last = (int(sent["dts", step].sum()) for step in (0, 4, 99))
    assert first > 20 and first > soon > 8 and (sent["dts", 99].sum(1) == 1).all() and last == 8


@pytest.mark.parametrize("g, shown", [(1.0, "1"), (0.996, "1"), (0.314, ".31"), (0.05, ".05"), (0.001, "<.01")])
def test_a_weight_has_three_characters(g, shown):
    assert pictures.number(g) == shown


def test_journey_draws_every_row_twice_and_a_road_for_each_leg(tmp_path):
    pictures.main(["journey", f"--out={tmp_path}"])
    check_form(tmp_path / "journey.svg")
    G, n_tokens = example("gshard")[1], 8
    n_rows, ones = int((G != 0).sum()), sum(pictures.number(g) == "1" for g in G.flatten().tolist() if g)
    roads = [p for p in elements(tmp_path / "journey.svg", "path") if "road" in p.getAttribute("class")]
    assert len(roads) == 3 * n_rows  # to the experts, back, into the sum
    shown = [word for word in words(tmp_path / "journey.svg") if word in "01234567"]
    assert len(shown) == 3 * n_rows + 2 * n_tokens + ones  # a weight of 1 looks like a token's number
    chip = pictures.CHIP
    squares = {(float(r.getAttribute("x")) + chip / 2, float(r.getAttribute("y"))) for r in
               elements(tmp_path / "journey.svg", "rect") if r.getAttribute("width") == str(chip)}  # fmt: skip
    for x0, y0, *_, x1, y1 in (map(float, re.findall(r"[\d.]+", p.getAttribute("d"))) for p in roads):
        assert (x0, y0 - chip) in squares or (x0, 500.0) in squares  # from below a square, or below its expert
        assert (x1, y1) in squares or y1 == 794  # to the top of a square, or of y


def test_what_is_on_a_rank_is_drawn_in_its_lane():
    for rect in elements(pictures.FIGURES / "journey.svg", "rect"):
        x, width = (float(rect.getAttribute(name)) for name in ("x", "width"))
        assert any(at <= x and x + width <= at + pictures.LANE for at in pictures.HOMES)


def test_the_rows_of_journey_travel_as_one_process_would_sort_them():
    """On one process all rows are sorted by expert, tokens in order; each rank gets its experts' part of that."""
    trips, G = run_ranks(2, pictures.travel), example("gshard")[1]
    expert, token = G.t().nonzero(as_tuple=True)
    for rank, trip in enumerate(trips):
        mine = expert // 2 == rank
        assert trip["got"] == token[mine].tolist()
        assert trip["arrived"] == [int((expert == e).sum()) for e in (2 * rank, 2 * rank + 1)]
        here = token // 4 == rank
        assert trip["sent"] == token[here].tolist()
        assert trip["load"] == [int((expert[here] == e).sum()) for e in range(4)]
    y = torch.cat([trip["y"] for trip in trips])[:, 0]
    assert torch.allclose(y, torch.arange(8.0) * G.sum(1))
    assert torch.equal(torch.cat([trip["G"] for trip in trips]), G)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{gate or "dense": folder of a run of a tiny, untrained model} on two domains of text, in bytes."""
    folder, tok = tmp_path_factory.mktemp("runs"), Tokenizer("bytes", [bytes([i]) for i in range(256)])
    split = {"prose": ["the cat sat on a mat\n" * 12] * 3, "code": ["DEF CAT(MAT)\n" * 12] * 5}
    write_text(str(folder / "text"), tok, {"train": split, "val": split}, "a test")
    common = dict(
        dataset=str(folder / "text"), n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=7, device="cpu"
    )
    flags = dict(hash=dict(gate="hash"), topk=dict(gate="topk"), dense=dict(n_experts=1))
    flags["roberta"] = dict(objective="roberta", gate="switch")
    for name, more in flags.items():
        (folder / name).mkdir()
        train.save(train.set_up(common | more | dict(out_dir=str(folder / name))), 0)
    return {name: str(folder / name) for name in flags}


def test_experts_counts_every_held_out_token_once_per_expert(runs):
    corpus = train.set_up(dict(out_dir=runs["hash"], eval_only=True)).objective.corpus
    windows = [
        (d, start) for d, (_, first, end) in enumerate(corpus.domains("val")) for start in range(first, end - 16, 16)
    ]
    table = pictures.take(runs["hash"])[0]
    for d in 0, 1:
        ids = torch.tensor([int(i) for of, s in windows if of == d for i in corpus.splits["val"][s : s + 16]])
        assert torch.equal(table.counts[:, d].sum(0), ids.bincount(minlength=corpus.V))
    assert ((table.counts.sum(1) > 0).sum(0) <= 1).all()  # an id has one expert
    two = pictures.take(runs["topk"])[0]
    assert two.counts.shape == (8, 2, corpus.V) and torch.equal(two.counts.sum(0), 2 * table.counts.sum(0))


def test_experts_draws_a_table_for_each_run(runs, tmp_path):
    pictures.main(["experts", f"--runs={runs['hash']},{runs['topk']}", f"--out={tmp_path}"])
    check_form(tmp_path / "experts.svg")
    shown = words(tmp_path / "experts.svg")
    assert sum(word[0] == "E" and word[1:].isdigit() for word in shown) == 16
    assert "hash, after 0 steps" in shown and "topk, after 0 steps" in shown
    assert sum("predicts 100%" in word for word in shown) == 1


def test_traffic_counts_the_rows_that_leave_their_node(runs, tmp_path):
    """By hand: of the hash table's tokens, those of prose that go to experts 4 to 7, and those of code to 0 to 3."""
    pictures.main(["traffic", f"--runs={runs['topk']},{runs['hash']}", f"--out={tmp_path}"])
    check_form(tmp_path / "traffic.svg")
    shown = words(tmp_path / "traffic.svg")
    for layer, name in (0, "first"), (-1, "last"):
        counts = pictures.take(runs["hash"])[layer].counts.sum(2).tolist()  # (E, domains)
        left = sum(row[0] for row in counts[4:]) + sum(row[1] for row in counts[:4])
        at = shown.index(f"hash, after 0 steps: {name} mixture")
        assert shown[at + 1] == f"{left / sum(map(sum, counts)):.0%} of the rows leave their node"
    assert sum(word == "node 1: code" for word in shown) == 4


def test_heads_shows_the_attention_of_masks(runs, tmp_path, monkeypatch):
    """Against the kernel itself, asked for its weights by values that are the identity, mask by mask."""
    real, seen = F.scaled_dot_product_attention, []
    eye = lambda q: torch.eye(q.shape[2]).expand(*q.shape[:2], -1, -1)
    watched = lambda q, k, v, **more: seen.append(real(q, k, eye(q), **more)) or real(q, k, v, **more)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    name, weights = pictures.look(runs["roberta"], reach=2)
    run = train.set_up(dict(out_dir=runs["roberta"], eval_only=True))
    masks = [batch["x"] == run.model.mask_id for batch in run.objective.held_out("val", 8)]
    found = [
        layer[b, :, t, t - 2 : t + 3]  # (heads, 5)
        for mask, layer in zip(masks, seen[::2])  # of two layers the first
        for b, t in mask.nonzero().tolist()
        if 2 <= t < 14
    ]
    assert name == "switch, after 0 steps" and len(found) > 20
    assert torch.allclose(weights, torch.stack(found).mean(0).T, atol=1e-6)
    monkeypatch.undo()
    pictures.main(["heads", f"--runs={runs['roberta']},{runs['roberta']}", f"--out={tmp_path}"])
    check_form(tmp_path / "heads.svg")
    with pytest.raises(SystemExit, match="hash is not a run with --objective=roberta"):
        pictures.main(["heads", f"--runs={runs['hash']}", f"--out={tmp_path}"])


def test_experts_needs_runs_with_experts(runs, tmp_path):
    with pytest.raises(SystemExit, match="dense is not a run with --objective=gpt and more than one expert"):
        pictures.main(["experts", f"--runs={runs['dense']}", f"--out={tmp_path}"])
    with pytest.raises(SystemExit, match="no checkpoint"):
        pictures.main(["experts", f"--runs={tmp_path / 'nothing'}", f"--out={tmp_path}"])
    for wrong in ["experts"], ["traffic"], ["heads"], ["gates", "--runs=out"]:
        with pytest.raises(SystemExit):
            pictures.main([*wrong, f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_characteristic_tokens_by_hand():
    """Token 0 is everywhere, 1 is only here but rare, 2 and 3 are only here, 3 more often, 4 is mostly here."""
    counts = torch.tensor([[90, 9, 60, 70, 80], [90, 0, 0, 0, 20]])
    assert pictures.characteristic(counts) == [[3, 2, 4, 0], [0]]
    assert pictures.characteristic(counts, least=5, most=3) == [[3, 2, 1], [0, 4]]


TOKENS = {" self": "·self", "\n" + 8 * " ": "↵·×8", "\n\t": "↵→", "   ": "···", "\x07": "?", "<&>": "<&>",
          "x" * 13: "x" * 11 + "…"}  # fmt: skip


@pytest.mark.parametrize("token, shown", TOKENS.items())
def test_tokens_are_shown_so_that_one_sees_their_spaces(token, shown):
    assert pictures.visible(token) == shown
