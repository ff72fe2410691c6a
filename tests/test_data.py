"""
data/: the byte-pair trainer against the textbook's quadratic one, what damaged files, broken downloads and crashes
leave behind, splits that share nothing, the grammar's German, batches, BLEU. No network.

In the order bpe.py, files.py, download.py, the corpora, batches.py, bleu.py. (Objectives: test_objectives.py.)
"""

import ast
import gzip
import http.server
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch

import train
from data import bpe, download, files
from data.batches import mask_tokens, micro_batches, random_starts
from data.bleu import bleu, corpus_bleu, counts, words
from runs import BYTES, config

DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")
sys.path[:0] = [DATA, os.path.join(DATA, "grammar")]
import grammar

TEXT = (
    "the cat sat on the mat, the other cats sat there; don't they? aaaa aaa aaaaaaa 1234 1999\n"
    "x_y __init__\n    indented\n\n\nStraße, naïve café über 北京 🙂🙂 the the the\n"
) * 2


def script(name):
    """data/NAME/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", os.path.join(DATA, name, "prepare.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(out_dir, **more):
    return Namespace(**dict(out_dir=str(out_dir), data_dir="", tokenizer="bpe", vocab_size=400) | more)


def documents(folder, split):
    """[decoded document, ...] of a prepared text corpus."""
    meta, tok = files.load_meta(folder), files.load_tokenizer(folder)
    return tok.decode(files.load_split(folder, meta, split)).split("<|endoftext|>")[:-1]


def sentences(folder, split):
    """[(source, target), ...] of a prepared translation corpus."""
    tok, pairs = files.load_tokenizer(folder), files.load_split(folder, files.load_meta(folder), split)
    sides = []
    for ids, idx in ((pairs.src, pairs.src_idx), (pairs.tgt, pairs.tgt_idx)):
        assert all(ids[end - 1] == tok.eot for end in idx[1:])
        sides.append([tok.decode(ids[a : b - 1]) for a, b in zip(idx, idx[1:])])
    return list(zip(*sides))


# ---------------------------------------------------------------------------------------------------------------------
# bpe.py


def naive_bpe(text, size):
    """Count all pairs of the whole text anew for every merge."""
    words = [[bytes([b]) for b in word.encode()] for word in re.findall(bpe.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        n, pair = min(((-n, tuple(map(tokens.index, pair))) for pair, n in counts.items()), default=(0, None))
        if n > -2:
            break
        pair = tokens[pair[0]], tokens[pair[1]]
        if b"".join(pair) not in tokens:
            tokens.append(b"".join(pair))
        words = [naive_merge(word, pair) for word in words]
    return tokens


def naive_merge(word, pair):
    out = []
    for token in word:
        out.append(token)
        if tuple(out[-2:]) == pair:
            out[-2:] = [b"".join(pair)]
    return out


@pytest.mark.parametrize("size", [256, 257, 300, 5000])
def test_trainer_equals_recounting_everything(size):
    tokens = bpe.train_bpe([TEXT], size)
    assert tokens == naive_bpe(TEXT, size)
    assert len(set(tokens)) == len(tokens) <= size


def test_trainer_learns_the_textbook_example():
    """Sennrich et al. 2016, section 3.2: low, lower, newest, widest. Ties go to the smaller bytes."""
    texts = ["low\n" * 5, "lower\n" * 2, "newest\n" * 6, "widest\n" * 3]
    tokens = bpe.train_bpe(texts, 256 + 4)
    assert tokens[256:] == [b"es", b"est", b"lo", b"low"]
    assert tokens == bpe.train_bpe(texts[::-1], 256 + 4), "the order of the texts does not matter"


def test_encoding_merges_by_rank():
    tok = bpe.make_tokenizer("bpe", 320, [TEXT])
    ranks = {token: i for i, token in enumerate(tok.tokens)}
    expected = []
    for word in re.findall(bpe.PATTERN, TEXT):
        word = [bytes([b]) for b in word.encode()]
        while pairs := [p for p in zip(word, word[1:]) if p[0] + p[1] in ranks]:
            word = naive_merge(word, min(pairs, key=lambda p: ranks[p[0] + p[1]]))
        expected += [ranks[token] for token in word]
    assert tok.encode(TEXT) == expected
    assert len(expected) < len(TEXT.encode()) / 1.5


@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_round_trip(name):
    tok, rng = bpe.make_tokenizer(name, 400, [TEXT]), random.Random(0)
    noise = bytes(rng.randrange(256) for _ in range(3000))
    any_character = [chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))) for _ in noise]
    texts = [
        "",
        " ",
        TEXT,
        "\r\n\t\x00\x1c\u2028\u0301e\u0301 ½ Ⅷ ١٢ नमस्ते",
        " " * 5000,
        "!" * 5000,
        "_1_a" * 999,
        noise.decode("latin-1"),
        noise.decode("utf-8", "replace"),
        "".join(any_character),
    ]
    for text in texts:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and all(0 <= i < tok.eot for i in ids)
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb", "half a surrogate pair is no character"


def test_specials_are_the_last_ids_and_never_come_from_text():
    tok = bpe.make_tokenizer("bytes", 0, ())
    assert (tok.eot, tok.mask, tok.pad, tok.bos, tok.vocab_size) == (256, 257, 258, 259, 260)
    assert tok.encode("<|endoftext|><|mask|>") == list(b"<|endoftext|><|mask|>")
    assert tok.decode([104, 105, tok.eot]) == "hi<|endoftext|>"


def test_gpt2_out_of_reach_is_one_line(monkeypatch):
    def offline(name):
        raise RuntimeError("a long story\nof several lines")

    monkeypatch.setattr(bpe.tiktoken, "get_encoding", offline)
    with pytest.raises(OSError, match="TIKTOKEN_CACHE_DIR.*--tokenizer=bpe") as e:
        bpe.make_tokenizer("gpt2", 0, ())
    assert "\n" not in str(e.value)
    assert bpe.make_tokenizer("auto", 300, [TEXT]).name == "bpe"


def test_gpt2s_ids_are_tiktokens(monkeypatch):
    """Not the order of the bytes: published weights go by these ids."""
    ranks = {bytes([255 - i]): i for i in range(256)}
    gpt2 = types.SimpleNamespace(_mergeable_ranks=ranks, _pat_str=bpe.ANYTHING)
    monkeypatch.setattr(bpe.tiktoken, "get_encoding", lambda name: gpt2)
    tok = bpe.make_tokenizer("gpt2", 0, ())
    assert tok.encode("ab") == [255 - ord("a"), 255 - ord("b")] and tok.eot == 256


# ---------------------------------------------------------------------------------------------------------------------
# files.py


@pytest.fixture
def prepared(tmp_path):
    tok = bpe.make_tokenizer("bpe", 300, [TEXT])
    splits = {"train": {"a": [TEXT, "x"], "b": [TEXT]}, "val": {"a": ["y"], "b": ["z"]}}
    files.write_text(tmp_path, tok, splits, "test")
    return tmp_path


def everything(folder):
    meta = files.load_meta(folder)
    return files.load_tokenizer(folder), [files.load_split(folder, meta, split) for split in meta["splits"]]


def test_large_vocabularies_take_four_bytes():
    assert [files.token_type(v) for v in (65536, 65537)] == ["uint16", "uint32"]


def crash():
    yield TEXT
    raise RuntimeError("the power fails")


def test_crash_while_writing_leaves_nothing_new(tmp_path, prepared):
    tok = bpe.make_tokenizer("bytes", 0, ())
    before = {path.name: path.read_bytes() for path in prepared.iterdir()}
    for folder in (tmp_path / "new", prepared):
        with pytest.raises(RuntimeError):
            files.write_text(folder, tok, {"train": {"a": ["x"]}, "val": {"a": crash()}}, "test")
    assert not list((tmp_path / "new").iterdir())
    assert {path.name: path.read_bytes() for path in prepared.iterdir() if path.is_file()} == before


def test_crash_while_renaming_leaves_no_meta(prepared, monkeypatch):
    rename, calls = os.replace, []

    def replace(a, b):
        calls.append(b)
        if len(calls) == 2:
            raise RuntimeError("the power fails")
        rename(a, b)

    monkeypatch.setattr(files.os, "replace", replace)
    tok = bpe.make_tokenizer("bytes", 0, ())
    with pytest.raises(RuntimeError):
        files.write_text(prepared, tok, {"train": {"a": ["x"]}, "val": {"a": ["y"]}}, "test")
    with pytest.raises(FileNotFoundError, match="meta.json is missing"):
        everything(prepared)


def test_the_next_prepare_removes_what_a_killed_one_left(prepared):
    now = time.time()
    for name, age in {".partial-old": 1e4, ".partial-killed": 60, ".partial-writing": 60}.items():
        (prepared / name).mkdir()
        (prepared / name / "train.bin").write_bytes(b"x")
        os.utime(prepared / name / "train.bin", (now - age, now - age))
        os.utime(prepared / name, (0, 0))  # what grows in a folder does not touch the folder's own time
    with files.at_work(prepared / ".partial-writing") as mine:
        assert mine
        files.write_text(prepared, bpe.make_tokenizer("bytes", 0, ()), {"train": {"a": ["x"]}}, "test")
    assert [name for name in os.listdir(prepared) if name.startswith(".")] == [".partial-writing"], "it is at work"


def test_a_corpus_that_checkpoints_depend_on_is_not_prepared_anew(tmp_path, monkeypatch):
    """stdlib/packages is written before stdlib: where only stdlib is, its owner wanted a small one."""
    calls = []
    monkeypatch.setattr(files, "HERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files.subprocess, "run", lambda command: calls.append(command[2:]) or Namespace(returncode=0))
    (tmp_path / "stdlib").mkdir()
    files.prepare_missing("stdlib")
    files.prepare_missing("stdlib/packages")
    splits = {"train": {"a": [TEXT]}, "val": {"a": [TEXT]}}
    files.write_text(tmp_path / "stdlib", bpe.make_tokenizer("bpe", 300, [TEXT]), splits, "test")
    files.prepare_missing("stdlib")
    with pytest.raises(ValueError, match="--limit"):
        files.prepare_missing("stdlib/packages")
    assert calls == [[], []]


def edit(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def fact(value, *keys):
    """Damage that sets one value of meta.json, named by the keys that lead to it."""

    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        inner = meta
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = ast.literal_eval(value)
        (folder / "meta.json").write_text(json.dumps(meta))

    return damage


def folder_instead(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "meta.json").unlink(), "meta.json is missing"),
        (edit("meta.json", lambda b: b[:50]), "meta.json is damaged"),
        (edit("meta.json", lambda b: b"[]"), "meta.json is damaged"),
        (edit("meta.json", lambda b: b.replace(b'"dtype"', b'"type"')), "meta.json is damaged"),
        (edit("meta.json", lambda b: b"[" * 200_000), "meta.json is damaged .RecursionError"),
        (fact("'foo'", "tokenizer"), "tokenizer is 'foo', not one of bpe, gpt2, bytes"),
        (fact("'300'", "vocab_size"), "vocab_size is '300'"),
        (fact("True", "vocab_size"), "vocab_size is True"),
        (fact("{}", "splits"), "splits is empty"),
        (fact("0", "splits", "train", "bytes"), "bytes of train is 0"),
        (fact("'many'", "splits", "train", "bytes"), "bytes of train is 'many'"),
        (fact("5.5", "splits", "train", "domains", "a", 1), "the end of a in train is 5.5"),
        (fact("[0]", "splits", "train", "domains", "a"), "meta.json is damaged .IndexError"),
        (fact("1" + 400 * "0", "splits", "train", "bytes"), "bytes of train is 10000"),
        (lambda folder: folder_instead(folder / "meta.json"), "cannot read .*meta.json"),
        (lambda folder: folder_instead(folder / "vocab.txt"), "cannot read .*vocab.txt"),
        (edit("vocab.txt", lambda b: b.replace(b"QQ==\n", b"AAAAAAAA\n", 1)), "the byte b'A' has no token"),
        (lambda folder: (folder / "train.bin").unlink(), "train.bin is missing"),
        (edit("train.bin", lambda b: b""), "train.bin is empty"),
        (edit("train.bin", lambda b: b[:-1]), "train.bin has [0-9,]+ bytes where meta.json says"),
        (edit("val.bin", lambda b: b + b[:2]), "val.bin has [0-9,]+ bytes where meta.json says"),
        (edit("train.bin", lambda b: b[:-2] + b"\x2c\x01"), "token id 300, beyond the vocabulary of 300"),
        (lambda folder: (folder / "vocab.txt").unlink(), "vocab.txt is missing"),
        (edit("vocab.txt", lambda b: b[:-9]), "has [0-9,]+ tokens|vocab.txt is damaged"),
        (edit("vocab.txt", lambda b: b"\xff" + b), "vocab.txt is damaged"),
        (edit("vocab.txt", lambda b: b.replace(b"\n", b"?\n", 1)), "vocab.txt is damaged"),
        (edit("vocab.txt", lambda b: b"\n".join(b.split(b"\n")[:-2])), "has 299 tokens where meta.json says 300"),
        (edit("vocab.txt", lambda b: b"AA==\n" + b[: b[:-1].rindex(b"\n") + 1]), "vocab.txt is damaged"),
    ],
)
def test_damaged_corpus_is_one_line(prepared, damage, message):
    everything(prepared)
    damage(prepared)
    with pytest.raises((OSError, ValueError), match=message) as e:
        everything(prepared)
    assert "\n" not in str(e.value) and "prepare.py" in str(e.value)


def test_unknown_split_is_named(prepared):
    with pytest.raises(ValueError, match="no split 'test', only train, val"):
        files.load_split(prepared, files.load_meta(prepared), "test")


def test_translation_index_is_checked(tmp_path):
    tok = bpe.make_tokenizer("bytes", 0, ())
    files.write_pairs(tmp_path, tok, ("en", "de"), {"train": [("a", "bb"), ("ccc", "")]}, "test")
    assert sentences(tmp_path, "train") == [("a", "bb"), ("ccc", "")]
    np.array([0, 4, 6], np.int64).tofile(tmp_path / "train.src.idx")  # other starts, same end
    everything(tmp_path)
    for starts in ([0, 6, 6], [0, 2, 5], [1, 2, 6]):
        np.array(starts, np.int64).tofile(tmp_path / "train.src.idx")
        with pytest.raises(ValueError, match="train.src.idx does not fit"):
            everything(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# download.py, and the command line of every prepare.py


@pytest.fixture
def server(monkeypatch):
    """A local web server: /whole is five bytes, /short promises ten and sends five."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.agent = self.headers["User-Agent"]
            self.send_response(404 if self.path == "/none" else 200)
            self.send_header("Content-Length", "10" if self.path == "/short" else "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield httpd
        httpd.shutdown()


def test_download(server, tmp_path):
    url, args = f"http://127.0.0.1:{server.server_port}", options(tmp_path)
    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    path = download.fetch("a.txt", url + "/whole", args, digest)
    assert path == os.path.join(tmp_path, "download", "a.txt") and open(path, "rb").read() == b"hello"
    assert "Mozilla" in server.agent
    assert download.fetch("a.txt", "http://127.0.0.1:1/gone", args, digest) == path, "fetched once"
    for name, digest, why in (
        ("short", None, "ended after 5 of 10 bytes"),
        ("whole", "0" * 64, "sha256"),
        ("none", None, "404"),
    ):
        with pytest.raises(OSError, match=why) as e:
            download.fetch("b.txt", f"{url}/{name}", args, digest)
        message = str(e.value)
        assert f"{url}/{name}" in message and os.path.join("download", "b.txt") in message
        assert "--data_dir" in message and "\n" not in message
    assert os.listdir(tmp_path / "download") == ["a.txt"]


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    url = "http://127.0.0.1:1/x"
    with pytest.raises(OSError, match=f"cannot download {url} to .*input.txt .*--data_dir=FOLDER"):
        download.fetch("input.txt", url, options(tmp_path))
    with pytest.raises(FileNotFoundError, match="input.txt is missing: --data_dir needs a folder with"):
        download.fetch("input.txt", url, options(tmp_path, data_dir=str(tmp_path)))


def prepare(folder, name, *arguments):
    command = [sys.executable, os.path.join(DATA, name, "prepare.py"), f"--out_dir={folder}/out", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("multi30k", ["--pair=en-es"], "en-es.*en-de.*fr-en"),
        ("stdlib", ["--tokeniser=bpe"], "--tokeniser=bpe"),
        ("grammar", ["--vocab_size=12", "--pairs=5", "--held_out=5"], "--vocab_size=12 is too small"),
        ("grammar", ["--pairs=-5"], "--pairs=-5"),
        ("stdlib", ["--limit=-3"], "--limit=-3 must be at least 0"),
        (
            "grammar",
            ["--out_dir=/dev/null/x", "--pairs=5", "--held_out=5", "--tokenizer=bytes"],
            "cannot write to /dev/null/x .*--out_dir=",
        ),
        ("shakespeare", ["--data_dir=nowhere"], "input.txt is missing"),
    ],
)
def test_user_errors_are_one_line(tmp_path, name, arguments, message):
    done = prepare(tmp_path, name, *arguments)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and re.search(message, done.stderr)
    assert not (tmp_path / "out").exists()


def test_script_runs_from_any_folder(tmp_path):
    done = prepare(tmp_path, "grammar", "--pairs=200", "--held_out=20", "--tokenizer=bytes")
    assert done.returncode == 0 and done.stderr == ""
    files = {
        f"{split}.{rest}" for split in ("train", "val", "test") for rest in ("src.bin", "src.idx", "tgt.bin", "tgt.idx")
    }
    assert set(os.listdir(tmp_path / "out")) == files | {"meta.json"}


# ---------------------------------------------------------------------------------------------------------------------
# stdlib


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stdlib")
    script("stdlib").main(options(folder, vocab_size=300, code_bytes=800_000, limit=70))
    return str(folder)


def test_stdlib_domains_and_sizes(stdlib):
    meta, tok = files.load_meta(stdlib), files.load_tokenizer(stdlib)
    for split, sizes in meta["splits"].items():
        ids = files.load_split(stdlib, meta, split)
        assert list(sizes["domains"]) == ["prose", "code"] and ids[-1] == tok.eot
        end = 0
        for start, stop, size in sizes["domains"].values():
            assert start == end and ids[stop - 1] == tok.eot
            texts = tok.decode(ids[start:stop]).split("<|endoftext|>")[:-1]
            assert size == len("".join(texts).encode())
            end = stop
        assert end == sizes["tokens"] == len(ids)
    start, stop, _ = meta["splits"]["train"]["domains"]["code"]
    assert "import " in tok.decode(files.load_split(stdlib, meta, "train")[start:stop])


def test_packages_have_the_tokenizer_of_stdlib_or_are_not_there(tmp_path, monkeypatch):
    prepare, written = script("stdlib"), []
    monkeypatch.setattr(prepare, "write_text", lambda folder, tok, *a: written.append(folder) or real(folder, tok, *a))
    real, second = files.write_text, os.path.join(tmp_path, "packages")
    prepare.main(options(tmp_path, vocab_size=300, code_bytes=300_000, limit=60))
    assert written == [second, str(tmp_path)]  # cut off in between, stdlib counts as missing
    assert files.load_tokenizer(second).fingerprint() == files.load_tokenizer(tmp_path).fingerprint()
    monkeypatch.setattr(prepare, "PACKAGES", ("email",))
    prepare.main(options(tmp_path, tokenizer="bytes", code_bytes=300_000, limit=60))
    with pytest.raises(FileNotFoundError, match="not prepared"):
        files.load_meta(second)


def test_stdlib_holds_out_whole_documents(stdlib):
    """No held-out source file and no paragraph of held-out prose is in training."""
    train, val = documents(stdlib, "train"), documents(stdlib, "val")
    assert len(train) > len(val) > 0 and not set(train) & set(val)
    seen = set("\n\n".join(train).split("\n\n"))
    meta, tok = files.load_meta(stdlib), files.load_tokenizer(stdlib)
    start, stop, _ = meta["splits"]["val"]["domains"]["prose"]
    prose = tok.decode(files.load_split(stdlib, meta, "val")[start:stop]).replace("<|endoftext|>", "\n\n")
    held_out = {p for p in prose.split("\n\n") if p}
    assert len(held_out) > 10 and not seen & held_out


def test_docstrings_leave_the_code():
    source = '''"""Module: ünicode."""
import os
class A:
    """Only this."""
class B:
    """Two
    lines."""
    x = "a string stays"
    async def f(self):
        r"""Raw."""
        return """this
        stays"""
if os:
    def g(): "one line"
'''
    docs, code = script("stdlib").split_source(source)
    tree = ast.parse(code)
    assert docs.split("\n\n") == ["Module: ünicode.", "Only this.", "Two\nlines.", "Raw.", "one line"]
    assert not any(doc in code for doc in ("Module", "Only", "lines.", "one line", "Raw"))
    assert "a string stays" in code and '"""this\n        stays"""' in code and code.count("pass") == 2
    assert [node.name for node in tree.body[1:3]] == ["A", "B"]


# ---------------------------------------------------------------------------------------------------------------------
# The other corpora of text


def test_shakespeare_is_cut_where_nanogpt_cuts(tmp_path):
    text = TEXT * 3 + "x"
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    script("shakespeare").main(options(tmp_path / "out", data_dir=str(tmp_path)))
    cut = int(len(text) * 0.9)
    assert documents(tmp_path / "out", "train") == [text[:cut]]
    assert documents(tmp_path / "out", "val") == [text[cut:]]


def test_wikitext_is_cut_into_articles_without_loss():
    articles = [
        " \n = One = \n \n text = 1 \n \n = = Part = = \n \n more \n \n",
        " = Two = \n \n Key : \n W = Wins = \n \n end \n \n",
        " = Three = \n \n x \n",
    ]
    assert script("wikitext2").articles("".join(articles)) == articles


@pytest.mark.parametrize("top", ["", "classic-books-markdown-main/"])
def test_books_hold_out_whole_books(tmp_path, top):
    books = script("books")
    names = sorted(books.HELD_OUT) + ["Herman Melville/Moby-Dick.md", "README.md"]
    with tarfile.open(tmp_path / "classic-books.tar.gz", "w:gz") as archive:
        for i, name in enumerate(names):
            text = f"# Title: {name}\n\n## Year: 1851\n\n-------\n\nChapter {i}" if "/" in name else "about"
            member = tarfile.TarInfo(top + name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    books.main(options(tmp_path / "out", data_dir=str(tmp_path)))
    assert documents(tmp_path / "out", "train") == ["Chapter 4\n"]
    assert sorted(documents(tmp_path / "out", "val")) == [f"Chapter {i}\n" for i in range(4)]
    whole = (tmp_path / "classic-books.tar.gz").read_bytes()
    for damaged in (whole[:100], b"no archive", whole[:-30]):
        (tmp_path / "classic-books.tar.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="classic-books.tar.gz"):
            books.main(options(tmp_path / "out", data_dir=str(tmp_path)))


# ---------------------------------------------------------------------------------------------------------------------
# The corpora of sentence pairs


def test_multi30k_pairs_lines_and_drops_empty_ones(tmp_path, capsys):
    texts = {"en": "A dog.\n\nA cat.\r\nTwo\u2028men.\n", "de": "Ein Hund.\nLeer.\nEine Katze.\nZwei Männer.\n"}
    for name in ("train", "val", "test_2016_flickr"):
        for lang, text in texts.items():
            (tmp_path / f"{name}.{lang}.gz").write_bytes(gzip.compress(text.encode()))
    expected = [("A dog.", "Ein Hund."), ("A cat.", "Eine Katze."), ("Two\u2028men.", "Zwei Männer.")]
    main = script("multi30k").main
    main(options(tmp_path / "out", data_dir=str(tmp_path), pair="en-de"))
    assert sentences(tmp_path / "out", "test") == expected
    assert "dropped 1 pair" in capsys.readouterr().out
    main(options(tmp_path / "out", data_dir=str(tmp_path), pair="de-en"))
    assert sentences(tmp_path / "out", "val") == [(de, en) for en, de in expected]
    assert files.load_meta(tmp_path / "out")["langs"] == ["de", "en"]
    (tmp_path / "val.de.gz").write_bytes(gzip.compress(b"Ein Hund.\n"))
    with pytest.raises(ValueError, match=r"val.en.gz has 4 lines but .*val.de.gz has 1"):
        main(options(tmp_path / "out", data_dir=str(tmp_path), pair="en-de"))
    (tmp_path / "val.de.gz").write_bytes(gzip.compress(b"Ein Hund.\n" * 500)[:-9])
    with pytest.raises(ValueError, match="val.de.gz is damaged"):
        main(options(tmp_path / "out", data_dir=str(tmp_path), pair="en-de"))
    assert sentences(tmp_path / "out", "val") == [(de, en) for en, de in expected], "the old files stay whole"


def test_tatoeba_has_no_source_in_two_splits(tmp_path):
    lines = [f"Go {i // 3}.\tGeh {i}.\tCC-BY 2.0" for i in range(90)]
    lines += ["Only English\t", "Go 0.\tGeh 0.\tagain"]
    with zipfile.ZipFile(tmp_path / "deu-eng.zip", "w") as archive:
        archive.writestr("deu.txt", "\n".join(lines) + "\n")
    script("tatoeba").main(options(tmp_path / "out", data_dir=str(tmp_path), held_out=5))
    train, val, test = (sentences(tmp_path / "out", split) for split in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [60, 5, 5]
    assert len({s for s, _ in train} | {s for s, _ in val} | {s for s, _ in test}) == 30
    assert all(int(de[4:-1]) // 3 == int(en[3:-1]) for en, de in train + val + test)


# ---------------------------------------------------------------------------------------------------------------------
# The grammar


def noun(word, kinds=("person", "animal", "thing", "food", "place")):
    return next(row for kind in kinds for row in grammar.NOUNS[kind] if row[0] == word)


def verb(word, *kinds):
    return next(row for kind in kinds or grammar.VERBS for row in grammar.VERBS[kind] if row[0] == word)


PERSONS = ("I", "you", "he", "we", "they")


def adjective(word):
    return next(row for rows in grammar.ADJECTIVES.values() for row in rows if row[0] == word)


@pytest.mark.parametrize(
    "n, english, german",
    [
        (2, "two", "zwei"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (76, "seventy-six", "sechsundsiebzig"),
        (100, "one hundred", "einhundert"),
        (342, "three hundred and forty-two", "dreihundertzweiundvierzig"),
        (1000, "one thousand", "eintausend"),
        (12005, "twelve thousand and five", "zwölftausendfünf"),
        (21600, "twenty-one thousand six hundred", "einundzwanzigtausendsechshundert"),
        (
            999999,
            "nine hundred and ninety-nine thousand nine hundred and ninety-nine",
            "neunhundertneunundneunzigtausendneunhundertneunundneunzig",
        ),
    ],
)
def test_numerals(n, english, german):
    assert grammar.numeral(n) == (english, german)


def test_numerals_differ():
    assert len({grammar.numeral(n)[1] for n in range(1, 20_000)}) == 19_999


@pytest.mark.parametrize(
    "det, word, plural, nom, acc, dat",
    [
        ("the", "man", False, "der alte Mann", "den alten Mann", "dem alten Mann"),
        ("the", "woman", False, "die alte Frau", "die alte Frau", "der alten Frau"),
        ("the", "child", False, "das alte Kind", "das alte Kind", "dem alten Kind"),
        ("the", "child", True, "die alten Kinder", "die alten Kinder", "den alten Kindern"),
        ("a", "man", False, "ein alter Mann", "einen alten Mann", "einem alten Mann"),
        ("a", "woman", False, "eine alte Frau", "eine alte Frau", "einer alten Frau"),
        ("a", "child", False, "ein altes Kind", "ein altes Kind", "einem alten Kind"),
        ("this", "horse", False, "dieses alte Pferd", "dieses alte Pferd", "diesem alten Pferd"),
        ("these", "car", True, "diese alten Autos", "diese alten Autos", "diesen alten Autos"),
        ("our", "king", False, "unser alter König", "unseren alten König", "unserem alten König"),
        ("their", "woman", True, "ihre alten Frauen", "ihre alten Frauen", "ihren alten Frauen"),
        (("two", "zwei"), "apple", True, "zwei alte Äpfel", "zwei alte Äpfel", "zwei alten Äpfeln"),
    ],
)
def test_articles_adjectives_and_nouns_agree(det, word, plural, nom, acc, dat):
    phrase = grammar.noun_phrase(det, adjective("old"), noun(word), plural)
    assert phrase.de == dict(nom=nom, acc=acc, dat=dat)


def test_stems_that_change():
    phrase = lambda word: grammar.noun_phrase("a", adjective(word), noun("car")).de["nom"]
    assert [phrase(word) for word in ("expensive", "dark", "clean")] == [
        "ein teures Auto",
        "ein dunkles Auto",
        "ein sauberes Auto",
    ]
    assert grammar.noun_phrase("a", adjective("tired"), noun("uncle")).de["nom"] == "ein müder Onkel"
    assert grammar.noun_phrase("a", None, noun("uncle")).en == "an uncle"


@pytest.mark.parametrize(
    "word, german",
    [
        ("see", "sehe siehst sieht sehen sehen"),
        ("find", "finde findest findet finden finden"),
        ("eat", "esse isst isst essen essen"),
        ("dance", "tanze tanzt tanzt tanzen tanzen"),
        ("admire", "bewundere bewunderst bewundert bewundern bewundern"),
        ("wash", "wasche wäschst wäscht waschen waschen"),
        ("smile", "lächle lächelst lächelt lächeln lächeln"),
        ("greet", "grüße grüßt grüßt grüßen grüßen"),
    ],
)
def test_conjugation(word, german):
    assert " ".join(grammar.conjugate(*verb(word)[2:4], who) for who in PERSONS) == german


def test_knowing():
    forms = [grammar.conjugate(*verb("know", "that")[2:4], who) for who in PERSONS]
    assert forms == ["weiß", "weißt", "weiß", "wissen", "wissen"]


def test_word_order():
    king = grammar.noun_phrase("the", None, noun("king"))
    window = grammar.noun_phrase("a", None, noun("window"))
    clause = grammar.Clause(king, verb("open"), accusative=window, time=("in May", "im Mai"))
    assert grammar.english(clause) == "the king opens a window in May"
    assert grammar.german(clause) == "der König macht im Mai ein Fenster auf"
    front = grammar.german(clause._replace(time=None), front="im Mai")
    assert front == "im Mai macht der König ein Fenster auf"
    assert grammar.german(clause, "last") == "der König im Mai ein Fenster aufmacht"
    assert grammar.english(clause, question=True) == "does the king open a window in May"
    assert grammar.german(clause, "first") == "macht der König im Mai ein Fenster auf"
    past, modal = clause._replace(tense="past"), clause._replace(tense="must")
    assert grammar.english(past) == "the king opened a window in May"
    assert grammar.german(past) == "der König hat im Mai ein Fenster aufgemacht"
    assert grammar.german(past, "last") == "der König im Mai ein Fenster aufgemacht hat"
    assert grammar.german(modal) == "der König muss im Mai ein Fenster aufmachen"
    assert grammar.german(modal, "last") == "der König im Mai ein Fenster aufmachen muss"


def test_cases_auxiliaries_and_negation():
    she, them = grammar.pronoun("she"), grammar.pronoun("they")
    follow = grammar.Clause(she, verb("follow"), "past", dative=them, negated=True)
    assert grammar.english(follow) == "she did not follow them"
    assert grammar.german(follow) == "sie ist ihnen nicht gefolgt"
    none = grammar.noun_phrase("not a", adjective("red"), noun("apple"))
    give = grammar.Clause(
        grammar.pronoun("I"),
        verb("give"),
        "want to",
        dative=grammar.pronoun("he"),
        accusative=none,
        negated=True,
        kein=True,
    )
    assert grammar.english(give) == "I do not want to give him a red apple"
    assert grammar.german(give) == "ich will ihm keinen roten Apfel geben"


def test_german_is_a_function_of_english():
    pairs = grammar.corpus(2000)
    assert pairs == grammar.corpus(2000) and pairs[:500] == grammar.corpus(500)
    assert len({en for en, _ in pairs}) == 2000  # corpus raises if one source has two translations
    assert all(de[0].isupper() and de[-1] == en[-1] and "  " not in en + de for en, de in pairs)
    assert all(row[0] != row[1] for rows in grammar.VERBS.values() for row in rows)  # the past shows


def test_grammar_holds_out_sources(tmp_path):
    script("grammar").main(options(tmp_path, pairs=1000, held_out=100))
    train, val, test = (sentences(tmp_path, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (1000, 100, 100)
    assert len({en for en, _ in train + val + test}) == 1200
    assert val + test == grammar.corpus(200)


# ---------------------------------------------------------------------------------------------------------------------
# batches.py


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
    sizes = corpus.meta["splits"]["test"]
    assert n == sizes["tgt_tokens"] - 2  # less the pair that is too long, "b" and <|endoftext|>
    assert corpus.bytes_per_token("test", 24) == pytest.approx((sizes["tgt_bytes"] - 1) / n)
    assert corpus.bytes_per_token("test", 99) == pytest.approx(sizes["tgt_bytes"] / sizes["tgt_tokens"])
    logits = torch.randn(2, 3, 260)
    toy = lambda x, pick: (logits[pick], {})
    out = train.task_loss(toy, dict(x=None, y=torch.tensor([[1, 2, -1], [3, -1, -1]])), label_smoothing=0.1)
    nll = out.nll
    log_p = logits.log_softmax(2)[[0, 0, 1], [0, 1, 0]]
    assert torch.allclose(nll, -log_p[range(3), [1, 2, 3]])
    assert torch.allclose(out.smoothed, 0.9 * nll - 0.1 * log_p.mean(1))


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


def test_nodes_share_out_the_domains_when_there_are_more(tmp_path):
    """Two nodes, five domains, of which node 0 reads the first, third and fifth, each in proportion to its windows."""
    spans = [("a", 0, 1016), ("b", 1016, 1116), ("c", 1116, 4132), ("d", 4132, 4182), ("e", 4182, 4218)]
    corpus = types.SimpleNamespace(folder="here", domains=lambda split: spans)
    cfg = config(batch_size=20_000, shard_by_domain=True)  # block_size=16
    starts = random_starts(corpus, cfg, np.random.default_rng(0), 2)
    room, node = np.array([1000, 84, 3000, 34, 20]), np.arange(20_000) // 10_000
    which = np.searchsorted([end for _, _, end in spans], starts, side="right")
    assert (which % 2 == node).all()
    assert all(start <= s < end - 16 for s, (_, start, end) in zip(starts, (spans[d] for d in which)))
    for v in range(2):
        seen = np.bincount(which[node == v], minlength=5) / 10_000
        assert np.allclose(seen, room * (np.arange(5) % 2 == v) / room[v::2].sum(), atol=0.02), v
    assert len(set(starts[which == 4])) > 10 and starts[which == 2].max() > 4000  # all over the domain


def test_a_domain_has_one_number_in_every_split(tmp_path):
    """That of its name, whatever the order; a part that a split lacks, or that has no window, reports no loss."""
    text = {name: [name * 60] for name in "abc"}
    of = lambda names: {name: text[name] for name in names}
    splits = {"train": of("ab"), "val": of("cba"), "test": of("b") | {"a": ["a" * 9]}}
    files.write_text(tmp_path / "corpus", BYTES, splits, "test")
    cfg = dict(dataset=str(tmp_path / "corpus"), out_dir=str(tmp_path / "out"), device="cpu", n_layer=2, n_head=2,
               n_embd=16, block_size=16, batch_size=4, n_experts=2, gate="randomrouted")  # fmt: skip
    run = train.set_up(cfg)
    assert run.objective.parts("val") == ["a", "b", "c"] and run.n_domains == 2
    for split in ("train", "val", "test"):
        batches = [run.objective.train_batch(0)] if split == "train" else run.objective.held_out(split)
        for batch in batches:
            assert torch.equal(batch["domain"][:, 0], batch["x"][:, 0] - ord("a")), split
    val, test = train.evaluate(run, "val"), train.evaluate(run, "test")
    assert val["loss_b"] == pytest.approx(test["loss_b"])
    assert {name for name in test if name.startswith("loss_")} == {"loss_b"} and "loss_c" in val
    assert "left out, no longer than block_size=16 tokens: a (test)\nto beat" in run.objective.to_beat("test")


# ---------------------------------------------------------------------------------------------------------------------
# bleu.py


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


def test_bleu_of_marked_up_lines_and_of_files(tmp_path):
    assert words("so-\nme <skipped>text\nin &lt;b&gt; &amp;gt; &quot;1") == 'some text in < b > > " 1'.split()
    (tmp_path / "references").write_text("the cat is on the mat\n")
    (tmp_path / "translations").write_text("the cat is on\n")
    command = [sys.executable, os.path.join(DATA, "bleu.py"), "references", "translations"]
    assert subprocess.check_output(command, cwd=tmp_path, text=True) == f"BLEU = {100 * np.exp(1 - 6 / 4):.2f}\n"


# ---------------------------------------------------------------------------------------------------------------------
# What a slip in the files above would spoil without a word


def test_a_pair_seen_once_is_no_token():
    assert len(bpe.train_bpe(["ab cd"], 300)) == 256 and bpe.train_bpe(["ab", "ab cd"], 300)[256:] == [b"ab"]
    with pytest.raises(ValueError, match="--vocab_size=259 is too small"):
        bpe.make_tokenizer("bpe", 259, ["abab"])


def test_token_ids_are_checked_to_the_end_of_a_large_file(tmp_path):
    (np.arange((1 << 22) + 1) >> 22 << 8).astype(np.uint16).tofile(tmp_path / "train.bin")
    meta = dict(kind="text", dtype="uint16", vocab_size=256, splits=dict(train=dict(tokens=(1 << 22) + 1)))
    with pytest.raises(ValueError, match="token id 256, beyond the vocabulary of 256"):
        files.load_split(str(tmp_path), meta, "train")


@pytest.mark.parametrize("name", ["shakespeare", "wikitext2"])
def test_a_tokenizer_knows_the_train_split_only(tmp_path, name):
    """And each split is the file, or the part of one, that bears its name."""
    out, texts = tmp_path / "out", {"train": "ab " * 90, "val": "zq " * 10, "test": "xj " * 10}
    for file, text in zip("train valid test input".split(), [*texts.values(), texts["train"] + texts["val"]]):
        (tmp_path / f"{file}.txt").write_text(text)
    script(name).main(options(out, data_dir=str(tmp_path)))
    assert all(documents(out, split) == [texts[split]] for split in files.load_meta(out)["splits"])
    assert files.load_tokenizer(out).tokens == bpe.train_bpe([texts["train"]], 396)


def test_stdlib_and_its_packages_hold_out_the_same_files(tmp_path, monkeypatch):
    """Packages train on files of the train split and are tested on all others; tokenizers have seen that split only."""
    stdlib, out, names = script("stdlib"), tmp_path / "out", [a + b for a in "abcdefgh" for b in "abcdefghij"]
    codes = {f'{word} = "{word * 10}"\n' for word in names}
    for word in names:
        path = tmp_path / "lib" / ("email" if word < "e" else "xml") / f"{word}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""The file {word} says {word} to all who read {word} only."""\n{word} = "{word * 10}"')
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    monkeypatch.setattr(stdlib, "help_topics", dict)
    stdlib.main(options(out, code_bytes=40 * 28, limit=0))  # half of the files
    train, val, learnt, unseen = (documents(f, split) for f in (out, out / "packages") for split in ("train", "val"))
    assert set(learnt) == codes & set(train) and set(unseen) == codes - set(train) > codes & set(val)
    assert all(files.load_tokenizer(f).tokens == bpe.train_bpe(train, 396) for f in (out, out / "packages"))


def test_tatoeba_holds_out_any_sources_with_their_first_translations():
    splits = script("tatoeba").split_by_source([(f"Go {i // 3}.", f"Geh {i}.") for i in range(90)], 5)
    held_out = [int(de[4:-1]) for split in ("val", "test") for _, de in splits[split]]
    assert all(i % 3 == 0 for i in held_out) and not set(held_out) <= set(range(30)), "not the first lines: shuffled"
