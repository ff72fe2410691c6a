"""The pictures of pictures.py: they can be read on a phone and in dark mode, and show what their captions say."""

import re
import xml.dom.minidom

import pytest
import torch

from ranks import run_ranks  # puts the repository on the path, too
import pictures
from router import example

NAMES = ["gates", "journey"]


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
    assert sent["dts", 0].all() and (sent["dts", 99].sum(1) == 1).all() and 8 < sent["dts", 25].sum() < 32


@pytest.mark.parametrize("g, shown", [(1.0, "1"), (0.996, "1"), (0.314, ".31"), (0.05, ".05"), (0.001, "<.01")])
def test_a_weight_has_three_characters(g, shown):
    assert pictures.number(g) == shown


def test_journey_draws_every_row_twice_and_a_road_for_each_leg(tmp_path):
    pictures.main(["journey", f"--out={tmp_path}"])
    check_form(tmp_path / "journey.svg")
    n_rows, n_tokens = int((example("gshard")[1] != 0).sum()), 8
    roads = [p for p in elements(tmp_path / "journey.svg", "path") if "road" in p.getAttribute("class")]
    assert len(roads) == 3 * n_rows  # to the experts, back, into the sum
    shown = [word for word in words(tmp_path / "journey.svg") if word in "01234567"]
    assert len(shown) == 3 * n_rows + 2 * n_tokens
    squares = {(float(r.getAttribute("x")) + 18, float(r.getAttribute("y"))) for r in
               elements(tmp_path / "journey.svg", "rect") if r.getAttribute("width") == "36"}  # fmt: skip
    for x0, y0, *_, x1, y1 in (map(float, re.findall(r"[\d.]+", p.getAttribute("d"))) for p in roads):
        assert (x0, y0 - 36) in squares or (x0, 500.0) in squares  # from below a square, or below its expert
        assert (x1, y1) in squares or y1 == 794  # to the top of a square, or of y


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
