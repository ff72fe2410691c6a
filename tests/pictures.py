"""
Five pictures, drawn by the code that they are about:

    python tests/pictures.py gates              G of six gates for the same eight tokens
    python tests/pictures.py journey            the rows of two processes on their way to the experts and back
    python tests/pictures.py experts --runs=out-switch,out-hash      who gets what in two trained models
    python tests/pictures.py traffic --runs=out-near,out-far         from which node to which expert, in two others
    python tests/pictures.py heads --runs=out-a,out-b                where the masks of RoBERTas look

The last three read the newest checkpoint of runs of train.py and train nothing. Those in tests/figures/ were drawn from

    python train.py --max_steps=300 --gate=switch --out_dir=out-switch
    python train.py --max_steps=300 --gate=hash --out_dir=out-hash

and, for traffic, with --gate=switch --out_dir=out-far and --gate=locmoe --out_dir=out-near, from

    torchrun --nproc_per_node=2 train.py --max_steps=300 --ranks_per_node=1 --shard_by_domain

and, for heads, two runs of `python tests/claims.py heads`, seed 1337: switch and dense.

Each is an SVG file in tests/figures/ (--out=FOLDER: elsewhere), 700 wide, in light and dark mode, without a plotting
package. A picture is a list of SVG elements, strings; y grows downwards.
"""

import argparse
import math
import re
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import torch

from ranks import run_ranks  # puts the repository on the path, too
import dist
import train
from data import batches
from dist import make_mesh
from experts import MoE
from router import example, make_gate

FIGURES = Path(__file__).parent / "figures"
WIDTH = 700
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 18px; font-weight: 600 }
.name { font-size: 16px; font-weight: 600 }
.soft { fill: #59636e }
.middle { text-anchor: middle }
.end { text-anchor: end }
.frame { fill: none; stroke: #c5ccd3 }
.mark { stroke: #1f2328; stroke-width: 2; stroke-dasharray: 3 2 }
.heat { fill: #1f6feb }
.on { fill: #ffffff }
.small { font-size: 12px }
.code { font: 14px ui-monospace, monospace }
.digit { font-size: 17px; font-weight: 600 }
.t0 { fill: #e5534b; stroke: #e5534b }
.t1 { fill: #e0823d; stroke: #e0823d }
.t2 { fill: #c9a227; stroke: #c9a227 }
.t3 { fill: #57a64a; stroke: #57a64a }
.t4 { fill: #2fa8a0; stroke: #2fa8a0 }
.t5 { fill: #3b82d6; stroke: #3b82d6 }
.t6 { fill: #8a63d2; stroke: #8a63d2 }
.t7 { fill: #d063a5; stroke: #d063a5 }
.road { fill: none; stroke-width: 2.5 }
.over { paint-order: stroke; stroke: #ffffff; stroke-width: 6; stroke-linejoin: round }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.soft { fill: #9aa4ae }
.frame { stroke: #4a525b }
.mark { stroke: #e6edf3 }
.heat { fill: #58a6ff }
.on { fill: #0d1117 }
.over { stroke: #0d1117 }
}
"""


# ---------------------------------------------------------------------------------------------------------------------
# What the pictures are made of


def text(x, y, words, kind=""):
    """Words on the base line y; kind: classes of STYLE."""
    return f'<text x="{x:g}" y="{y:g}"' + (f' class="{kind}">' if kind else ">") + f"{escape(words)}</text>"


def box(x, y, width, height, kind, more=""):
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"{more}/>'


def number(g):
    """A weight in three characters or less: ".31", "1"."""
    return f"{g:.0f}" if g > 0.995 else "<.01" if g < 0.005 else f"{g:.2f}"[1:]


def save_svg(path, height, title, caption, parts, style=STYLE):
    """Write a picture: the title and the lines of the caption stand above its parts, which begin at 60 + 20 * lines."""
    head = [text(10, 28, title, "title")] + [text(10, 52 + 20 * i, line, "soft") for i, line in enumerate(caption)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img">\n<title>{escape(title)}</title>\n<desc>{escape(" ".join(caption))}</desc>\n'
        f"<style>{style}</style>\n" + "\n".join(head + parts) + "\n</svg>\n",
        encoding="utf-8",
    )


# ---------------------------------------------------------------------------------------------------------------------
# G of six gates

PANELS = (
    ("hash", 0, "hash", "a fixed table: a word, an expert"),
    ("switch", 0, "switch", "the likeliest expert, by content"),
    ("topk", 0, "topk", "the two likeliest, summing to 1"),
    ("expertchoice", 0, "expertchoice", "each expert takes its best four"),
    ("base", 0, "base", "two tokens for each expert"),
    ("dts", 0, "dts, at the start", "dense: nearly every expert"),
    ("dts", 4, "dts, soon after", "only weights above a rising bar"),
    ("dts", 99, "dts, at the end", "sparse: one expert per token"),
)


def draw_gates(path):
    """One panel per gate, in the order of PANELS: a column is a token, a row is an expert."""
    parts = []
    for i, (gate, step, name, idea) in enumerate(PANELS):
        words, G = example(gate, step)
        parts += heat_map(10 + 350 * (i % 2), 138 + 194 * (i // 2), name, idea, words, G)
    caption = (
        "A column is a token, a row is an expert (E0 to E3), a cell is the weight G. Empty: not sent.",
        "See: hash knows only the word; switch and topk send cat and dog, much alike, the same way,",
        "but load experts unevenly; expertchoice and base load them alike; dts goes from many to one.",
    )
    save_svg(path, 138 + 194 * 4, "G of six gates for the same eight tokens", caption, parts)


def heat_map(x, y, name, idea, words, G, width=37, letter="E"):
    """G (N, E) with tokens from left to right, its name on the base line y; 28 + N * width wide, 50 + 27 * E high.
    letter: what a row is."""
    left, top, height = x + 28, y + 50, 27
    parts = [text(x, y, name, "name"), text(x, y + 20, idea, "soft")]
    parts += [text(left + width * (n + 0.5), top - 8, word, "middle") for n, word in enumerate(words)]
    lines = [f"M{left} {top + height * e}h{width * len(G)}" for e in range(G.shape[1] + 1)]
    lines += [f"M{left + width * n} {top}v{height * G.shape[1]}" for n in range(len(G) + 1)]
    for e, row in enumerate(G.T.tolist()):
        parts.append(text(x, top + height * (e + 0.5) + 5, f"{letter}{e}", "soft"))
        for n, g in enumerate(row):
            if g:
                at = left + width * n, top + height * e
                parts.append(box(*at, width, height, "heat", f' fill-opacity="{0.12 + 0.88 * min(g, 1):.2f}"'))
                kind = "middle on" if g > 0.7 else "middle"
                parts.append(text(at[0] + width / 2, at[1] + 19, number(g), kind))
    return parts + [f'<path d="{"".join(lines)}" class="frame"/>']


# ---------------------------------------------------------------------------------------------------------------------
# The journey of the rows on two ranks

CHIP, PITCH, GAP = 34, 35, 6  # a row's square, from one to the next, between experts
LANE, HOMES = 336, (6, 358)  # width of a rank's frames, where they begin


class Watched(torch.nn.Module):
    """Experts that hand their rows back as they are, and remember them."""

    def forward(self, rows, counts):
        self.rows, self.counts = rows, counts
        return rows


def travel(rank, world):
    """One rank's part of a layer, by MoE.dispatch and the Mesh themselves; a row holds nothing but its token's number.

    -> G (4, 4) of this rank's tokens; sent: numbers of the tokens whose rows leave, expert by expert, and how many for
    each expert; got: numbers of those that arrive, and how many for each expert that lives here; y (4, 1).
    """
    G = example("gshard")[1].tensor_split(world)[rank]  # (N, E): a token's noise is the same on any number of ranks
    tokens = torch.arange(8.0)[:, None].tensor_split(world)[rank]  # (N, 1)
    moe = MoE(make_gate("gshard", D=1, E=4), Watched(), make_mesh(rank, world, n_experts=4))
    y, sent = moe.dispatch(tokens, G)
    token = G.t().nonzero(as_tuple=True)[1]  # as in dispatch
    numbers = lambda rows: rows.flatten().int().tolist()
    return dict(G=G, y=y, sent=numbers(tokens[token]), load=sent["kept"].tolist(),
                got=numbers(moe.experts.rows), arrived=moe.experts.counts.tolist())  # fmt: skip


def draw_journey(path):
    """From top to bottom: tokens and G, rows by expert, (all-to-all), experts, (back), rows times G, y."""
    words, trips = example("gshard")[0], run_ranks(2, travel)
    parts, stays = [], 0
    leave, arrive = {}, {}  # (token, expert) -> x of its square at home and at its expert
    for rank, trip in enumerate(trips):
        x = HOMES[rank]
        stays += sum(trip["load"][2 * rank : 2 * rank + 2])
        at_home = lay_out(x + 5, trip["sent"], trip["load"], 0)
        at_expert = lay_out(x + 5, trip["got"], trip["arrived"], 2 * rank)
        leave, arrive = leave | at_home, arrive | at_expert
        parts += home(x, rank, trip["G"], words) + rows(at_home, 314, words)
        parts += hosts(x, rank, at_expert, words)
        parts += arrivals_home(x, trip["G"], at_home, words)
    roads = [road(n, leave[n, e], 314 + CHIP, arrive[n, e], 500) for n, e in leave]
    roads += [road(n, arrive[n, e], 578, leave[n, e], 704) for n, e in leave]
    moved = len(leave) - stays
    caption = (
        "Follow a colour. Four tokens and two experts live on each rank; the gate (here gshard) gives a",
        f"token one expert or two. See: only the non-zeros of G travel, {len(leave)} rows; {moved} change rank.",
    )
    save_svg(path, 912, "A mixture layer on two ranks, there and back", caption, roads + parts)


def lay_out(x, numbers, counts, first):
    """{(token, expert): x of its square}: squares from left to right, a gap between experts; first: number of the
    first expert."""
    experts = [first + e for e, n in enumerate(counts) for _ in range(n)]
    asked = sorted(set(experts))
    return {(n, e): x + PITCH * i + GAP * asked.index(e) for i, (n, e) in enumerate(zip(numbers, experts))}


def chip(x, y, n, words, round=4, width=CHIP):
    """A square in the colour of token n, with its number and its word."""
    middle = x + width / 2
    return [box(x, y, width, CHIP, f"t{n}", f' rx="{round}" fill-opacity="0.3"'),
            text(middle, y + 17, str(n), "middle digit"), text(middle, y + 31, words[n], "middle small")]  # fmt: skip


def rows(places, y, words, round=4):
    """The squares of `lay_out` at height y."""
    return [part for (n, _), x in places.items() for part in chip(x, y, n, words, round)]


def road(n, x0, y0, x1, y1):
    """A curve from below one square of token n to above another."""
    x0, x1, middle = x0 + CHIP / 2, x1 + CHIP / 2, (y0 + y1) / 2
    return f'<path d="M{x0:g} {y0:g}C{x0:g} {middle:g} {x1:g} {middle:g} {x1:g} {y1:g}" class="t{n} road"/>'


def frame(x, y, height, name, what):
    return [box(x, y, LANE, height, "frame", ' rx="8"'), text(x + 8, y + 20, name, "name over"),
            text(x + LANE - 8, y + 20, what, "soft end over")]  # fmt: skip


def home(x, rank, G, words):
    """A rank's tokens and, beneath them, its part of G (4, 4)."""
    parts, first = frame(x, 104, 254, f"rank {rank}", "1 tokens x, and their G"), 4 * rank
    for i in range(4):
        parts += chip(x + 34 + 74 * i, 134, first + i, words, width=70)
    for e, row in enumerate(G.T.tolist()):
        y = 174 + 28 * e
        parts.append(text(x + 8, y + 18, f"E{e}", "soft"))
        for i, g in enumerate(row):
            where = x + 34 + 74 * i
            parts.append(box(where, y, 70, 26, "frame"))
            if g:
                parts.append(box(where, y, 70, 26, f"t{first + i}", f' fill-opacity="{0.15 + 0.5 * g:.2f}"'))
                parts.append(text(where + 35, y + 18, number(g), "middle"))
    return parts + [text(x + LANE / 2, 306, "2 G read line by line: rows, expert by expert", "middle soft")]


def hosts(x, rank, places, words):
    """The rows that arrived at a rank, and the experts that live there beneath them."""
    parts = frame(x, 470, 114, f"rank {rank}", "3 all-to-all: by expert, then by rank") + rows(places, 500, words)
    for e in sorted({e for _, e in places}):
        xs = [at for (_, expert), at in places.items() if expert == e]
        width = max(xs) + CHIP - min(xs)
        parts += [box(min(xs), 544, width, 32, "heat", ' rx="4"'),
                  text(min(xs) + width / 2, 566, f"E{e}", "middle name on")]  # fmt: skip
    return parts


def arrivals_home(x, G, places, words):
    """The rows that came back, in the order in which they left, and y, their sum weighted by G."""
    first = min(n for n, _ in places)
    parts = frame(x, 674, 230, f"rank {first // 4}", "4 back as E(x), in the order of 2")
    parts += rows(places, 704, words, round=18)
    for (n, e), at in places.items():
        parts.append(road(n, at, 704 + CHIP, x + 34 + 74 * (n - first) + 35 - CHIP / 2, 794))
    parts.append(text(x + LANE / 2, 896, "5 each times its G, added up: y", "middle soft"))
    for i, row in enumerate(G.tolist()):
        where = x + 34 + 74 * i
        parts += chip(where, 794, first + i, words, 18, width=70)
        terms = [f"{number(g)} E{e}" for e, g in enumerate(row) if g]
        for line, term in enumerate(terms):
            parts.append(text(where + 35, 848 + 17 * line, ("+ " if line else "") + term, "middle"))
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Which expert takes which domain and which words


class Taken(NamedTuple):
    """What the experts of one mixture layer of a trained model took of the held-out text."""

    name: str  # gate and steps
    counts: torch.Tensor  # (E, number of domains, V): tokens that went to an expert, by domain and token id
    domains: list  # names
    decode: object  # token id -> text


def take(folder):
    """Run the held-out text through the newest checkpoint of a run. -> [Taken of each mixture layer]. ValueError if it
    is no GPT with a mixture."""
    run = train.set_up(dict(out_dir=folder, eval_only=True))
    if run.cfg.objective != "gpt" or not run.model.gates():
        raise ValueError(f"{folder} is not a run with --objective=gpt and more than one expert")
    gates, corpus, seen = run.model.gates(), run.objective.corpus, []
    names = corpus.names()
    counts = torch.zeros(len(gates), gates[0].E * len(names) * corpus.V, dtype=torch.long)
    hooks = [g.register_forward_hook(lambda gate, inputs, routing: seen.append(routing.G.cpu())) for g in gates]
    for batch in read_held_out(run):
        filler = (batch["y"] < 0).flatten()  # rows that make the last batch whole
        ids, domain = batch["x"].flatten(), batch["domain"].flatten()
        for layer, G in zip(counts, seen):
            token, expert = G.masked_fill(filler[:, None], 0).nonzero(as_tuple=True)
            where = (expert * len(names) + domain[token]) * corpus.V + ids[token]
            layer += torch.bincount(where, minlength=len(layer))
        seen.clear()
    for hook in hooks:
        hook.remove()
    name, decode = f"{run.cfg.gate}, after {run.first} steps", lambda i: corpus.tok.decode([i])
    return [Taken(name, layer.view(gates[0].E, len(names), corpus.V), names, decode) for layer in counts]


def read_held_out(run, most=0):
    """The batches of the first held-out split (at most `most` of them, if given), each after the model has read it: by
    then hooks have seen it. No gradients until the last one is taken."""
    with train.evaluating(run.model):
        for batch in run.objective.held_out(run.objective.corpus.held_out()[0], most):
            (on_device,) = batches.micro_batches(batch, 1, run.mesh)
            train.task_loss(run.model, on_device)
            yield batch


def characteristic(counts, least=50, most=5):
    """counts (E, V) -> for each expert the ids with the largest share here to share overall, the more frequent first
    where that is equal (to one hundredth). Only ids that came `least` times.

    Within an expert this is the order of counts[e, i] / counts[:, i].sum(): the other factors are the same for all.
    """
    share = (counts / counts.sum(0).clamp(min=1)).mul(100).round()
    best = []
    for e, row in enumerate(counts):
        ids = (row >= least).nonzero()[:, 0].tolist()
        best.append(sorted(ids, key=lambda i: (-share[e, i], -row[i]))[:most])
    return best


def visible(token):
    """A token as it is shown: spaces as dots, many as a number, line ends as arrows, at most twelve characters."""
    shown = re.sub(" {4,}", lambda run: f"·×{len(run[0])}", token)
    shown = shown.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    shown = "".join(c if c.isprintable() else "?" for c in shown)
    return shown if len(shown) <= 12 else shown[:11] + "…"


def draw_experts(path, folders):
    """A table for each run: its experts, those with the most of the first domain on top."""
    parts, y = [], 158
    for folder in folders:
        taken = take(folder)[0]
        parts += table(y, taken)
        y += 110 + 28 * len(taken.counts)
    caption = (
        "Held-out text in the first mixture layer. A bar: what an expert's tokens are (line: of all),",
        "then its share of tokens, and what it gets far more of than others (· space, ↵ line end).",
        "See: a learned gate collects what belongs together; a table by token id deals out blindly.",
    )
    save_svg(path, y - 20, "Which expert takes what", caption, parts)


def table(y, taken):
    """The experts of one run, beginning with the base line y."""
    counts = taken.counts
    load, by_domain, by_id = counts.sum((1, 2)), counts.sum(2), counts.sum(1)
    share = by_domain / load.clamp(min=1)[:, None]  # (E, domains)
    low, high = share[load > 0, 0].min(), share[:, 0].max()
    alone = by_id.max(0).values.sum() / load.sum()  # right, if every token went where most of its id go
    found = f"{taken.domains[0]} is {low:.0%} to {high:.0%} of an expert's tokens; the word alone predicts {alone:.0%} "
    parts = [text(10, y, taken.name, "name"), text(10, y + 22, found + "of the choices", "soft")]
    x = 44
    for d, name in enumerate(taken.domains):
        parts += [box(x, y + 36, 12, 12, paint(d)), text(x + 17, y + 47, name)]
        x += 29 + 8.4 * len(name)
    order, words = share[:, 0].argsort(descending=True).tolist(), characteristic(by_id)
    for i, e in enumerate(order):
        top = y + 56 + 28 * i
        parts.append(text(10, top + 17, f"E{e}", "soft"))
        parts += bar(44, top, share[e].tolist(), 170)
        parts.append(text(262, top + 17, f"{load[e] / load.sum():.0%}", "end"))
        parts += tokens(276, top, [visible(taken.decode(i)) for i in words[e]])
    mark = 44 + 170 * by_domain[:, 0].sum() / load.sum()
    return parts + [f'<path d="M{mark:.1f} {y + 54}v{28 * len(order)}" class="mark"/>']


def paint(d):
    """The colour of domain d."""
    return f"t{(1 + 3 * d) % 8}"


def bar(x, y, shares, width):
    """Shares of the domains, one after the other."""
    parts = []
    for d, share in enumerate(shares):
        parts.append(box(x, y, round(width * share, 1), 24, paint(d), ' stroke-width="0" fill-opacity="0.75"'))
        x += round(width * share, 1)
    return parts


def tokens(x, y, words):
    """Tokens in frames from left to right, as many as there is room for."""
    parts = []
    for word in words:
        width = 8.6 * len(word) + 12
        if x + width > WIDTH - 6:
            break
        parts += [box(x, y, width, 24, "frame", ' rx="4"'), text(x + width / 2, y + 17, word, "middle code")]
        x += width + 6
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Rows between two nodes, with and without locality


def draw_traffic(path, folders):
    """A column for each run: for its first and its last mixture layer, which experts the text of each node goes to."""
    parts = []
    for i, folder in enumerate(folders):
        layers = take(folder)
        parts += matrix(10 + 350 * i, 138, layers[0], "first") + matrix(10 + 350 * i, 438, layers[-1], "last")
    caption = (
        "Two nodes, each with a text of its own and half of the experts. A column: a node's tokens and",
        "the share of them that each expert gets; framed: the experts on the node itself.",
        "See: a locality loss (locmoe) moves the weight into the frame, so that few rows travel.",
    )
    save_svg(path, 138 + 600, "Which rows leave their node", caption, parts)


def matrix(x, y, taken, layer):
    """One layer of one run, its name on the base line y: node n reads domain n and has the n-th half of the experts."""
    if len(taken.domains) != 2:
        raise ValueError(f"traffic is drawn for texts with two domains, a node for each; here: {taken.domains}")
    rows = taken.counts.sum(2).T.float()  # (2, E): from a node to an expert
    half, wide, high = rows.shape[1] // 2, 120, 27
    stays = (rows[0, :half].sum() + rows[1, half:].sum()) / rows.sum()
    words = [f"node {n}: {name}" for n, name in enumerate(taken.domains)]
    name, found = f"{taken.name}: {layer} mixture", f"{1 - stays:.0%} of the rows leave their node"
    own = [f"M{x + 28 + wide * n} {y + 50 + high * half * n}h{wide}v{high * half}h-{wide}z" for n in (0, 1)]
    return heat_map(x, y, name, found, words, rows / rows.sum(1, keepdim=True), wide) + [
        f'<path d="{"".join(own)}" class="mark" fill="none"/>'
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Where masks look


def draw_heads(path, folders):
    """A column for each run: the heads of its first layer."""
    words, parts = ["-4", "-3", "-2", "-1", "0", "+1", "+2", "+3", "+4"], []
    for i, folder in enumerate(folders):
        name, weights = look(folder)
        apart = (weights[words.index("+1")] - weights[words.index("-1")]).abs().max()
        found = f"left and right neighbour: at most {apart:.2f} apart"
        shown = weights.where(weights > 0.005, 0)
        parts += heat_map(10 + 350 * i, 138, name, found, words, shown, 34, letter="H")
    caption = (
        "The first layer of RoBERTas: a row is a head, a column is how far to the left or right of a",
        "masked position, a cell is the head's weight there, mean over the masks of held-out text.",
        "See: a head that looks both ways cannot tell before from after; one head for each side can.",
    )
    save_svg(path, 138 + 60 + 27 * weights.shape[1], "Where a mask looks", caption, parts)


def look(folder, reach=4):
    """The newest checkpoint of a run -> its name; the attention weight (2 * reach + 1, heads) of its first layer by
    offset, from -reach to reach, mean over the masks of held-out text. ValueError if it is no RoBERTa."""
    run = train.set_up(dict(out_dir=folder, eval_only=True))
    if run.cfg.objective != "roberta":
        raise ValueError(f"{folder} is not a run with --objective=roberta")
    attn, seen, offsets = run.model.stack.blocks[0].attn, [], torch.arange(-reach, reach + 1)
    hook = attn.register_forward_pre_hook(lambda attn, inputs: seen.append(inputs[0]))
    split = lambda t: t.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, heads, T, D / heads)
    total, n = torch.zeros(2 * reach + 1, attn.heads), 0
    for batch in read_held_out(run, most=8):
        x = seen.pop()  # (B, T, D)
        q, k = split(attn.q(x)), split(attn.kv(x).chunk(2, dim=-1)[0])
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).cpu()  # (B, heads, T, T)
        b, t = (batch["x"] == run.model.mask_id)[:, reach:-reach].nonzero(as_tuple=True)
        b, t = b[:, None], t[:, None] + reach
        total += weights[b, :, t, t + offsets].sum(0)  # (2 * reach + 1, heads)
        n += len(b)
    hook.remove()
    gate = run.cfg.gate if run.model.gates() else "dense"
    return f"{gate}, after {run.first} steps", total / n


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=["gates", "journey", "experts", "traffic", "heads"])
    parser.add_argument(
        "--runs", default="", help="experts, traffic, heads: out_dirs of train.py, with commas between them"
    )
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder to draw into")
    a = parser.parse_args(argv)
    of_runs = {"experts": draw_experts, "traffic": draw_traffic, "heads": draw_heads}
    if (a.picture in of_runs) != bool(a.runs):
        parser.error(f"{', '.join(of_runs)}, and only they, need --runs=DIR1,DIR2")
    torch.set_num_threads(1)
    path = a.out / f"{a.picture}.svg"
    try:
        if a.picture == "gates":
            draw_gates(path)
        elif a.picture == "journey":
            draw_journey(path)
        else:
            of_runs[a.picture](path, a.runs.split(","))
    except (ValueError, OSError) as error:
        raise SystemExit(f"pictures: {dist.one_line(error)}") from None
    print(f"drew {path}")


if __name__ == "__main__":
    main()
