"""
Three pictures, drawn by the code that they are about:

    python tests/pictures.py gates              G of six gates for the same eight tokens
    python tests/pictures.py journey            the rows of two processes on their way to the experts and back
    python tests/pictures.py experts --runs=out-switch,out-hash      who gets what in two trained models

Each is an SVG file in tests/figures/ (--out=FOLDER: elsewhere), 700 wide, in light and dark mode, without a plotting
package. A picture is a list of SVG elements, strings; y grows downwards.
"""

import argparse
from pathlib import Path
from xml.sax.saxutils import escape

import torch

import ranks  # noqa: F401  puts the repository on the path
from router import example

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
.heat { fill: #1f6feb }
.on { fill: #ffffff }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.soft { fill: #9aa4ae }
.frame { stroke: #4a525b }
.heat { fill: #58a6ff }
.on { fill: #0d1117 }
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
    ("dts", 0, "dts, at the start", "dense: every expert, and noise"),
    ("dts", 25, "dts, after a quarter", "only weights above a rising bar"),
    ("dts", 99, "dts, at the end", "sparse: one expert per token"),
)


def draw_gates(path):
    """One panel per gate, in the order of PANELS: a column is a token, a row is an expert."""
    parts = []
    for i, (gate, step, name, idea) in enumerate(PANELS):
        words, G = example(gate, step)
        parts += heat_map(10 + 350 * (i % 2), 158 + 194 * (i // 2), name, idea, words, G)
    caption = (
        "A column is a token, a row is an expert (E0 to E3), a cell is the weight G. Empty: not sent.",
        "See: hash knows only the word; switch and topk send cat and dog, much alike, the same way,",
        "but some experts idle and some are crowded; expertchoice and base give each expert as",
        "many; dts goes from all experts to one.",
    )
    save_svg(path, 158 + 194 * 4, "G of six gates for the same eight tokens", caption, parts)


def heat_map(x, y, name, idea, words, G):
    """G (N, E) with tokens from left to right, its name on the base line y; 330 wide, 160 high."""
    left, top, width, height = x + 28, y + 50, 37, 27
    parts = [text(x, y, name, "name"), text(x, y + 20, idea, "soft")]
    parts += [text(left + width * (n + 0.5), top - 8, word, "middle") for n, word in enumerate(words)]
    lines = [f"M{left} {top + height * e}h{width * len(G)}" for e in range(G.shape[1] + 1)]
    lines += [f"M{left + width * n} {top}v{height * G.shape[1]}" for n in range(len(G) + 1)]
    for e, row in enumerate(G.T.tolist()):
        parts.append(text(x, top + height * (e + 0.5) + 5, f"E{e}", "soft"))
        for n, g in enumerate(row):
            if g:
                at = left + width * n, top + height * e
                parts.append(box(*at, width, height, "heat", f' fill-opacity="{0.12 + 0.88 * min(g, 1):.2f}"'))
                kind = "middle on" if g > 0.7 else "middle"
                parts.append(text(at[0] + width / 2, at[1] + 19, number(g), kind))
    return parts + [f'<path d="{"".join(lines)}" class="frame"/>']


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=["gates"])
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder to draw into")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = a.out / f"{a.picture}.svg"
    if a.picture == "gates":
        draw_gates(path)
    print(f"drew {path}")


if __name__ == "__main__":
    main()
