"""
The files of a prepared corpus: written by the prepare.py scripts, read by train.py.

    train.bin  val.bin  (test.bin)   text: token ids, uint16 (uint32 if V > 65536); every document ends with
                                     <|endoftext|>; a domain (prose, code, ...) is one range of tokens
    train.src.bin  train.src.idx     translation instead: sentences, each ended by <|endoftext|>, and their
    train.tgt.bin  train.tgt.idx     (pairs + 1) starts, int64; the same for val and test
    vocab.txt                        tokenizer=bpe: the tokens in rank order, base64, one a line
    meta.json                        sizes, domains, tokenizer; written last, so a folder that has it is whole

What goes wrong raises an OSError or ValueError whose message is one line: the file, the value, the way out.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from data.bpe import TOKENIZERS, Tokenizer, gpt2_tokenizer, make_tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))

# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def staging(folder):
    """
    A temporary folder inside `folder`. If the block ends well its files move up, meta.json last; if it does
    not, they vanish and what was prepared before stays as it was.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise OSError(f"cannot write to {folder} ({e.strerror}): name another folder with --out_dir=FOLDER") from None
    for left in Path(folder).glob(".partial-*"):  # of a killed prepare, or of one at work
        with contextlib.suppress(OSError):  # it has just ended
            age = time.time() - max(path.stat().st_mtime for path in (left, *left.iterdir()))
            with at_work(left) as mine:
                if age > 600 or mine and age > 1:  # younger ones may be about to be locked
                    shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as tmp, at_work(tmp):
        yield tmp
        with contextlib.suppress(FileNotFoundError):  # from here to the last line the folder counts as not prepared
            os.remove(os.path.join(folder, "meta.json"))
        for name in sorted(os.listdir(tmp), key=lambda name: name == "meta.json"):
            os.replace(os.path.join(tmp, name), os.path.join(folder, name))


def try_lock(folder):
    """
    Lock a folder until the descriptor is closed, or until this process ends, however it ends. -> (descriptor, True);
    (None, False) if another process has it, (None, None) if this system or its file system has no locks.
    """
    if fcntl is None:
        return None, None
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file, True
    except OSError as error:
        os.close(file)
        return None, False if isinstance(error, BlockingIOError) else None


@contextlib.contextmanager
def at_work(folder):
    """with at_work(folder) as mine: it is locked until the end of the block, unless mine is not True: see try_lock."""
    file, mine = try_lock(folder)
    try:
        yield mine
    finally:
        if mine:
            os.close(file)


def utf8_len(text):
    return len(text.encode("utf-8", "replace"))


def token_type(vocab_size):
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_tokens(path, tok, texts):
    """Append each text and an <|endoftext|> to a file. Returns ([tokens of each text], bytes of all)."""
    lengths, size = [], 0
    with open(path, "ab") as f:
        for text in texts:
            ids = tok.encode(text) + [tok.eot]
            f.write(np.array(ids, token_type(tok.vocab_size)).tobytes())
            lengths.append(len(ids))
            size += utf8_len(text)
    return lengths, size


def write_meta(tmp, tok, **facts):
    if tok.name == "bpe":
        with open(os.path.join(tmp, "vocab.txt"), "w") as f:
            f.writelines(base64.b64encode(token).decode() + "\n" for token in tok.tokens)
    meta = {
        "tokenizer": tok.name,
        "vocab_size": tok.vocab_size,
        "dtype": token_type(tok.vocab_size),
        "specials": tok.specials,
        **facts,
    }
    with open(os.path.join(tmp, "meta.json"), "w") as f:
        json.dump(meta, f, indent=1)


def write_text(folder, tok, splits, source):
    """
    Write a text corpus and print its size. splits: {"train": {domain: [document, ...]}, "val": {...}}.
    source: where the text is from, for meta.json.
    """
    with staging(folder) as tmp:
        meta = {}
        for split, domains in splits.items():
            meta[split] = {"tokens": 0, "bytes": 0, "domains": {}}
            for domain, documents in domains.items():
                lengths, size = write_tokens(os.path.join(tmp, f"{split}.bin"), tok, documents)
                if not lengths:
                    raise ValueError(
                        f"the {split} split of domain '{domain}' has no document: "
                        "the corpus is too small to hold out a part of it"
                    )
                start, end = meta[split]["tokens"], meta[split]["tokens"] + sum(lengths)
                meta[split]["domains"][domain] = [start, end, size]
                meta[split]["tokens"] = end
                meta[split]["bytes"] += size
                print(
                    f"{split:5s} {domain:12s} {len(lengths):7,d} documents {size:12,d} bytes "
                    f"{sum(lengths):11,d} tokens {size / sum(lengths):5.2f} bytes per token"
                )
        write_meta(tmp, tok, kind="text", splits=meta, source=source)
    print(f"wrote {folder}: tokenizer {tok.name}, vocabulary {tok.vocab_size:,d}")


def write_pairs(folder, tok, langs, splits, source):
    """
    Write a translation corpus and print its size. langs: ("en", "de"), source language first.
    splits: {"train": [(source sentence, target sentence), ...], "val": ..., "test": ...}.
    """
    with staging(folder) as tmp:
        meta = {}
        for split, pairs in splits.items():
            if not pairs:
                raise ValueError(f"the {split} split has no sentence pair: the corpus is too small")
            meta[split] = {"pairs": len(pairs)}
            for side, texts in zip(("src", "tgt"), zip(*pairs)):
                path = os.path.join(tmp, f"{split}.{side}")
                lengths, size = write_tokens(path + ".bin", tok, texts)
                with open(path + ".idx", "wb") as f:
                    f.write(np.cumsum([0] + lengths, dtype=np.int64).tobytes())
                meta[split] |= {f"{side}_tokens": sum(lengths), f"{side}_bytes": size}
            print(
                f"{split:5s} {len(pairs):7,d} pairs   "
                + "   ".join(
                    f"{lang} {meta[split][side + '_bytes']:10,d} bytes {meta[split][side + '_tokens']:9,d} tokens"
                    for lang, side in zip(langs, ("src", "tgt"))
                )
            )
        write_meta(tmp, tok, kind="translation", langs=list(langs), splits=meta, source=source)
    print(f"wrote {folder}: tokenizer {tok.name}, vocabulary {tok.vocab_size:,d}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def corpus_folder(dataset):
    """The folder that --dataset=NAME means: one under data/, or any other. ValueError, with the names there are."""
    folder = os.path.join(HERE, dataset)
    if os.path.exists(os.path.join(dataset, "meta.json")) or not os.path.isdir(folder) and os.path.isdir(dataset):
        return dataset
    made_by = os.path.join(HERE, dataset.split("/")[0])  # stdlib's script makes stdlib/packages, too
    if not os.path.isdir(folder) and (os.path.isabs(dataset) or not os.path.isdir(made_by)):
        have = sorted(d for d in os.listdir(HERE) if os.path.exists(os.path.join(HERE, d, "prepare.py")))
        raise ValueError(f"--dataset={dataset}: no such folder; there are: {', '.join(have)}")
    return folder


def prepare_missing(dataset):
    """Make the corpora that need no download, when they are missing: stdlib with stdlib/packages, and grammar."""
    folder, script = corpus_folder(dataset), os.path.join(HERE, dataset.split("/")[0], "prepare.py")
    free = dataset in ("stdlib", "stdlib/packages", "grammar")
    if free and folder.startswith(HERE) and not os.path.exists(os.path.join(folder, "meta.json")):
        if os.path.exists(os.path.join(os.path.dirname(script), "meta.json")):
            raise ValueError(
                f"--dataset={dataset}: data/stdlib was prepared with too few files (--limit) to have it; checkpoints "
                "may depend on that corpus, so prepare it anew yourself: python data/stdlib/prepare.py"
            )
        print(f"preparing data/{dataset} (a few seconds, once)", flush=True)
        if subprocess.run([sys.executable, script]).returncode:
            raise ValueError(
                f"{script} failed: see above. If this folder cannot be written to: python {script} --out_dir=FOLDER, "
                "then --dataset=FOLDER"
            )


def prepare_hint(folder):
    """What to do about a folder that is not prepared, or damaged."""
    folder = os.path.abspath(folder)
    parent = os.path.dirname(folder)
    if os.path.exists(os.path.join(parent, "prepare.py")):
        folder = parent  # a script's second corpus lies in its folder
    name = os.path.basename(folder)
    if os.path.exists(os.path.join(HERE, name, "prepare.py")):
        return f"run python data/{name}/prepare.py"
    return f"prepare it again (data/NAME/prepare.py --out_dir={folder})"


def load_meta(folder):
    """The dict of folder/meta.json; a missing or damaged one raises an error of one line."""
    path = os.path.join(folder, "meta.json")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is missing, so this corpus is not prepared: {prepare_hint(folder)}")
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        check_meta(meta)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        reason = str(e) if type(e) is ValueError else f"{type(e).__name__}: {str(e)[:80]}"
        raise ValueError(f"{path} is damaged ({reason}): {prepare_hint(folder)}") from None
    except OSError as e:
        raise OSError(f"cannot read {path} ({e.strerror}): {prepare_hint(folder)}") from None
    return meta


def check_meta(meta):
    """ValueError, or whatever Python raises on the way, if a field is missing or cannot be."""

    def number(value, name, least=1):
        if type(value) is not int or not least <= value < 2**63:  # a bool is an int, too
            raise ValueError(f"{name} is {repr(value)[:80]}, not a number from {least}")

    one_of = dict(tokenizer=TOKENIZERS[:3], dtype=("uint16", "uint32"), kind=("text", "translation"))
    for name, known in one_of.items():
        if meta[name] not in known:
            raise ValueError(f"{name} is {meta[name]!r}, not one of {', '.join(known)}")
    number(meta["vocab_size"], "vocab_size")
    if not meta["splits"]:
        raise ValueError("splits is empty")
    for split, sizes in meta["splits"].items():
        if meta["kind"] == "translation":
            for name in ("pairs", "src_tokens", "tgt_tokens", "tgt_bytes"):
                number(sizes[name], f"{name} of {split}")
            continue
        end = 0
        for domain, span in sizes["domains"].items():
            number(span[0], f"the start of {domain} in {split}", end)
            number(span[1], f"the end of {domain} in {split}", span[0])
            end = span[1]
        number(sizes["bytes"], f"bytes of {split}")
        number(sizes["tokens"], f"tokens of {split}", max(1, end))
        if not sizes["domains"]:
            raise ValueError(f"{split} has no domain")


def open_array(path, dtype, length):
    """Memory-map `length` items of a file, after checking that it is there and has just that size."""
    hint = prepare_hint(os.path.dirname(os.path.abspath(path)))
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is missing: {hint}")
    size, expected = os.path.getsize(path), length * np.dtype(dtype).itemsize
    if size == 0:
        raise ValueError(f"{path} is empty: {hint}")
    if size != expected:
        raise ValueError(f"{path} has {size:,d} bytes where meta.json says {expected:,d}: {hint}")
    try:
        return np.memmap(path, dtype, mode="r")
    except OSError as e:
        raise OSError(f"cannot read {path} ({e.strerror}): {hint}") from None


def open_tokens(path, meta, length):
    tokens = open_array(path, meta["dtype"], length)
    step = 1 << 22  # a few MB at a time: the file may exceed the memory
    top = max(int(tokens[i : i + step].max()) for i in range(0, length, step))
    if top >= meta["vocab_size"]:
        raise ValueError(
            f"{path} holds token id {top:,d}, beyond the vocabulary of {meta['vocab_size']:,d}: "
            + prepare_hint(os.path.dirname(os.path.abspath(path)))
        )
    return tokens


class Pairs(NamedTuple):
    """A translation split: all sentences' tokens, each sentence with its <|endoftext|>, and where they start."""

    src: np.ndarray
    src_idx: np.ndarray
    tgt: np.ndarray
    tgt_idx: np.ndarray

    def source(self, i):
        return self.src[self.src_idx[i] : self.src_idx[i + 1]]

    def target(self, i):
        return self.tgt[self.tgt_idx[i] : self.tgt_idx[i + 1]]


def load_split(folder, meta, split):
    """
    A prepared split, memory-mapped and checked: the (tokens,) array of a text, or Pairs for translation.
    Raises FileNotFoundError or ValueError, one line, if a file is missing, empty, truncated or unlike meta.
    """
    if split not in meta["splits"]:
        raise ValueError(f"{folder} has no split '{split}', only {', '.join(meta['splits'])}")
    sizes, path = meta["splits"][split], os.path.join(folder, split)
    if meta["kind"] == "text":
        return open_tokens(path + ".bin", meta, sizes["tokens"])
    sides = []
    for side in ("src", "tgt"):
        tokens = open_tokens(f"{path}.{side}.bin", meta, sizes[f"{side}_tokens"])
        starts = open_array(f"{path}.{side}.idx", np.int64, sizes["pairs"] + 1)
        if starts[0] != 0 or starts[-1] != len(tokens) or (np.diff(starts) < 1).any():
            raise ValueError(f"{path}.{side}.idx does not fit {split}.{side}.bin: {prepare_hint(folder)}")
        sides += [tokens, starts]
    return Pairs(*sides)


def load_tokenizer(folder):
    """The Tokenizer a corpus was prepared with."""
    meta = load_meta(folder)
    if meta["tokenizer"] == "gpt2":
        tok = gpt2_tokenizer()
    elif meta["tokenizer"] == "bytes":
        tok = make_tokenizer("bytes", 0, ())
    else:
        path = os.path.join(folder, "vocab.txt")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} is missing: {prepare_hint(folder)}")
        try:
            with open(path, encoding="ascii") as f:
                lines = f.read().splitlines()
            tokens = [base64.b64decode(line, validate=True) for line in lines]
            if len(set(tokens)) < len(tokens):
                raise ValueError("a token is there twice")
            if missing := {bytes([i]) for i in range(256)} - set(tokens):
                raise ValueError(f"the byte {min(missing)!r} has no token")
            tok = Tokenizer("bpe", tokens)
        except (ValueError, KeyError) as e:
            reason = str(e) if type(e) is ValueError else type(e).__name__
            raise ValueError(f"{path} is damaged ({reason}): {prepare_hint(folder)}") from None
        except OSError as e:
            raise OSError(f"cannot read {path} ({e.strerror}): {prepare_hint(folder)}") from None
    if tok.vocab_size != meta["vocab_size"]:
        raise ValueError(
            f"the tokenizer of {folder} has {tok.vocab_size:,d} tokens where meta.json says "
            f"{meta['vocab_size']:,d}: {prepare_hint(folder)}"
        )
    return tok
