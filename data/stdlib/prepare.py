"""
The default corpus: what every Python already has, so it needs no network. Two domains that look nothing
alike:

    prose   English: the topics of Python's help() and the standard library's docstrings, paragraphs of prose
    code    Python: the standard library's source without its docstrings

About 1.3 MB of prose and 2.5 MB of code (--code_bytes). PSF licence, (c) Python Software Foundation.

    python data/stdlib/prepare.py                        # BPE of 4096 tokens; about 8 s on 2 cores
    python data/stdlib/prepare.py --tokenizer=bytes
    python data/stdlib/prepare.py --limit=80             # the first 80 files and topics only, for a quick try

Seen on CPython 3.11 (3.10 to 3.13 differ by a few per cent)
          train  prose   354 documents   1,206,556 bytes   315,723 tokens   3.82 bytes per token
                 code    154             2,265,737         644,515          3.52
          val    prose    37                77,454          20,220
                 code     20               246,349          69,933

packages/ is a second corpus, for `train.py --objective=classify`: the code of seven packages, a domain each;
from a passage its package is to be told. Train: files whose code is in the train split above. Val: all other
files, so code that neither pre-training nor fine-tuning has seen.

          train  7 packages, 59 files    625,095 bytes   168,361 tokens
          val                97        1,150,289         322,846

A tenth of all files and topics is held out, in both domains at once: no held-out module is seen in training,
as code or as docstring (but for one file that is a single comment, as others are). The standard library quotes
itself, so a paragraph met before is dropped.
"""

import ast
import hashlib
import os
import re
import sys
import sysconfig
import tokenize
import warnings

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data.bpe import TOKENIZERS, make_tokenizer
from data.download import run
from data.files import write_text

SKIP = {
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "distutils",
    "ensurepip",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
PACKAGES = "asyncio", "email", "importlib", "multiprocessing", "tkinter", "unittest", "xml"


def name_hash(name):
    return hashlib.sha256(name.encode()).digest()


def held_out(name):
    """A tenth of all files and topics, chosen by name alone: the same ones under every Python version."""
    return name_hash(name)[0] < 26


def sources():
    """{relative path with /: absolute path} of the standard library's modules, packages mixed."""
    root, found = sysconfig.get_paths()["stdlib"], {}
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIP and not f.startswith("config-")]
        for path in (os.path.join(folder, f) for f in files if f.endswith(".py")):
            found[os.path.relpath(path, root).replace(os.sep, "/")] = path
    return dict(sorted(found.items(), key=lambda item: name_hash(item[0])[1:]))


def is_prose(paragraph):
    """Sentences, not signatures, tables, doctests or lists of names."""
    words = re.findall(r"(?<!\S)[(\"']?[A-Za-z][a-z'-]*[.,;:?!)\"']*(?!\S)", paragraph)
    return (
        len(words) >= 8
        and len(words) >= 0.75 * len(paragraph.split())
        and paragraph.rstrip()[-1] in ".:?!)"
        and ">>>" not in paragraph
    )


def prose(text, seen):
    """The prose paragraphs of a text, one a line with an empty line between, without those in `seen`."""
    found = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if is_prose(p)]
    new = [p for p in dict.fromkeys(found) if p not in seen]
    seen.update(new)
    return "\n\n".join(new)


def statements(node):
    """All statements below a node. Unlike ast.walk it stays out of expressions, which saves half the time."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield child
            yield from statements(child)


def split_source(text):
    """Python source -> (its docstrings as one text, the source without them)."""
    docs, lines, tree = [], text.encode().splitlines(keepends=True), ast.parse(text)
    for node in (tree, *statements(tree)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if (doc := ast.get_docstring(node)) is None:
            continue
        docs.append(doc)
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno - 1
        head, tail = lines[first][: node.body[0].col_offset], lines[last][node.body[0].end_col_offset :]
        alone = len(node.body) == 1 and node is not tree
        rest = head + b"pass" * alone + tail
        lines[first : last + 1] = [rest if rest.strip() else b""] + [b""] * (last - first)  # keeps numbers
    code = re.sub(r"[ \t\f]+\n", "\n", b"".join(lines).decode())
    code = re.sub(r":\n\n+", ":\n", re.sub(r"\n{4,}", "\n\n\n", code))  # the holes where docstrings were
    return "\n\n".join(docs), code.strip() + "\n"


def help_topics():
    """{name: text} of help("name"). Some distributions leave them out; the docstrings remain."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


def main(args):
    topics, files = help_topics(), sources()
    if not files:
        raise FileNotFoundError(
            f"no source code in {sysconfig.get_paths()['stdlib']}: this Python comes "
            "without it, so prepare another corpus, say data/shakespeare"
        )
    if args.limit:
        topics, files = ({name: d[name] for name in list(d)[: args.limit]} for d in (topics, files))

    splits = {split: {"prose": [], "code": []} for split in ("train", "val")}
    packages = {split: {package: [] for package in PACKAGES} for split in ("train", "val")}
    seen = set()  # topics quote each other, modules their cousins: a paragraph stays where it is first met
    for name, text in sorted(topics.items()):
        if text := prose(text, seen):
            splits["val" if held_out(name) else "train"]["prose"].append(text)
    left = args.code_bytes
    for name, path in files.items():
        try:
            with tokenize.open(path) as f, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                docs, code = split_source(f.read())
        except (SyntaxError, UnicodeDecodeError):
            continue
        split = splits["val" if held_out(name) else "train"]
        if docs := prose(docs, seen):
            split["prose"].append(docs)
        package = name.split("/")[0]
        if package in PACKAGES and code.strip():
            packages["train" if left > 0 and not held_out(name) else "val"][package].append(code)
        if left > 0 and code.strip():
            split["code"].append(code)
            left -= len(code)
    tok = make_tokenizer(args.tokenizer, args.vocab_size, sum(splits["train"].values(), []))
    source = f"Python {sys.version.split()[0]} standard library and help topics"
    both = [name for name in PACKAGES if packages["train"][name] and packages["val"][name]]
    second = os.path.join(args.out_dir, "packages")  # first, so that a corpus cut off in between counts as missing
    if len(both) > 1:
        packages = {split: {name: found[name] for name in both} for split, found in packages.items()}
        write_text(second, tok, packages, source)
    elif os.path.exists(os.path.join(second, "meta.json")):
        os.remove(os.path.join(second, "meta.json"))  # an older one has another tokenizer
    write_text(args.out_dir, tok, splits, source)


if __name__ == "__main__":
    run(main, __file__, __doc__, tokenizer=TOKENIZERS, vocab_size=4096, code_bytes=2_500_000, limit=0)
