"""What all prepare.py scripts share: a byte-pair trainer, tokenizers, and the files that train.py reads.

A prepared corpus is a folder:

    train.bin  val.bin  (test.bin)   text: token ids, uint16 (uint32 if V > 65536); every document ends with
                                     <|endoftext|>; a domain (prose, code, ...) is one range of tokens
    train.src.bin  train.src.idx     translation instead: sentences, each ended by <|endoftext|>, and their
    train.tgt.bin  train.tgt.idx     (pairs + 1) starts, int64; the same for val and test
    vocab.txt                        tokenizer=bpe: the tokens in rank order, base64, one a line
    meta.json                        sizes, domains, tokenizer; written last, so a folder that has it is whole

Three tokenizers, all of them a tiktoken.Encoding with four special tokens as the last ids:

    bpe    byte pairs trained on the training split: a vocabulary that fits a small corpus, no network
    gpt2   GPT-2's 50,257 tokens: a large corpus; needs the network once, or TIKTOKEN_CACHE_DIR
    bytes  bpe without merges: 260 ids, the trivial yardstick

What goes wrong raises an OSError or ValueError whose message is one line: the file, the value, the way out.
"""
import argparse
import base64
import contextlib
import gzip
import hashlib
import heapq
import http.client
import json
import os
import re
import sys
import tempfile
import urllib.request
import zlib
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import tiktoken

TOKENIZERS = ("bpe", "gpt2", "bytes", "auto")      # auto: gpt2 if it can be had, otherwise bpe
SPECIALS = ("<|endoftext|>", "<|mask|>", "<|pad|>", "<|bos|>")
# How text is cut into words before pairs are counted, so that no token spans two words: a contraction's tail,
# letters, up to three digits, punctuation, space. It is read by two engines, Python's re in training and
# tiktoken's in encoding, so there is no \p{L} here. They disagree on a few rare characters (combining marks);
# that may cost a merge but never a character, since each class has its complement in the pattern. Runs of
# punctuation and space are cut at 64 because the engine that encodes gives up on very long ones.
PATTERN = r"'(?:[sdmt]|ll|re|ve)| ?[^\W\d_]+| ?\d{1,3}| ?(?:[^\w\s]|_){1,64}|\s{1,64}(?!\S)|\s{1,64}"


# --------------------------------------------------------------------------------------------------
# Byte-pair encoding (Gage 1994; Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, algorithm 1)

def merge(word, pair, new):
    """The ids of `word` with every `pair`, from the left and without overlap, replaced by the id `new`."""
    out, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def train_bpe(texts, size):
    """
    Learn byte pairs: start from the 256 bytes and, again and again, make the most frequent pair of neighbours
    inside a word a token. Ties go to the pair with the smaller ids, so the result is a function of the text.

    texts: iterable of str. size: tokens to end with, bytes included; fewer if no pair occurs twice any more.
    Returns the list of tokens (bytes) in rank order.

    Recounting all pairs after each merge would be O(merges * text). Instead: count every distinct word once,
    remember which words hold which pair, and after a merge recount only those words. The heap holds old
    counts too; an entry that does not match the present count is skipped, as each change pushes a fresh one.
    """
    counts = Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, text))
    words = [list(word.encode("utf-8", "replace")) for word in counts]
    times = list(counts.values())

    pairs, where = Counter(), defaultdict(set)      # pair -> its count in the text; pair -> words that had it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += times[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)

    tokens = [bytes([i]) for i in range(256)]
    ranks = {token: i for i, token in enumerate(tokens)}
    while len(tokens) < size and heap:
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair]:
            continue
        if -n < 2:
            break                                   # a pair seen once teaches nothing
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in ranks:                      # else: two ways to the same bytes are the same token
            ranks[token] = len(tokens)
            tokens.append(token)
        change = Counter()
        for i in where.pop(pair):
            old, words[i] = words[i], merge(words[i], pair, ranks[token])
            for p in zip(old, old[1:]):
                change[p] -= times[i]
            for p in zip(words[i], words[i][1:]):
                change[p] += times[i]
                where[p].add(i)
        for p, n in change.items():
            if n:
                pairs[p] += n
                heapq.heappush(heap, (-pairs[p], p))
    return tokens


# --------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer:
    """
    A tiktoken.Encoding whose last four ids are the special tokens.

    name: "bpe", "gpt2" or "bytes". tokens: the ordinary tokens (bytes), by rank. pattern: cuts the words.
    Attributes: vocab_size (specials included) and the ids eot, mask, pad, bos.
    """
    def __init__(self, name, tokens, pattern=PATTERN):
        self.name, self.tokens = name, tokens
        self.vocab_size = len(tokens) + len(SPECIALS)
        self.specials = {special: len(tokens) + i for i, special in enumerate(SPECIALS)}
        self.eot, self.mask, self.pad, self.bos = self.specials.values()
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, special_tokens=self.specials,
                                          mergeable_ranks={token: i for i, token in enumerate(tokens)})

    def fingerprint(self):
        """A hash of all tokens: ids of another vocabulary of the same size mean something else."""
        return hashlib.sha256(b"\n".join(self.tokens)).hexdigest()

    def encode(self, text):
        """str -> list of ids. "<|endoftext|>" in a text is thirteen characters, never the special token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Iterable of ids -> str. A character cut in two becomes U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])


def gpt2_tokenizer():
    """GPT-2's encoding, with <|endoftext|> at its usual 50256 and the other specials behind it."""
    try:
        base = tiktoken.get_encoding("gpt2")
    except Exception as e:   # whatever tiktoken's HTTP library raises, or its check of the file's hash
        raise OSError(f"GPT-2's encoding is not on this machine and cannot be fetched ({type(e).__name__}): "
                      "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bpe") from None
    return Tokenizer("gpt2", sorted(base._mergeable_ranks, key=base._mergeable_ranks.get), base._pat_str)


def make_tokenizer(name, vocab_size, texts):
    """
    name: "bpe", "gpt2", "bytes", or "auto" = gpt2 if it can be had, otherwise bpe.
    vocab_size (specials included) and texts (iterable of str: the training split, nothing else) are for bpe.
    """
    if name == "auto":
        try:
            return gpt2_tokenizer()
        except OSError as e:
            print(f"tokenizer: bpe, because {e}")
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "bytes":
        return Tokenizer("bytes", [bytes([i]) for i in range(256)])
    if vocab_size < 256 + len(SPECIALS):
        raise ValueError(f"--vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIALS)} special "
                         f"tokens need at least {256 + len(SPECIALS)}")
    return Tokenizer("bpe", train_bpe(texts, vocab_size - len(SPECIALS)))


# --------------------------------------------------------------------------------------------------
# Writing

@contextlib.contextmanager
def staging(folder):
    """
    A temporary folder inside `folder`. If the block ends well its files move up, meta.json last; if it does
    not, they vanish and what was prepared before stays as it was.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as tmp:
        yield tmp
        meta = os.path.join(folder, "meta.json")
        if os.path.exists(meta):
            os.remove(meta)        # from here to the last line the folder counts as not prepared
        for name in sorted(os.listdir(tmp), key=lambda name: name == "meta.json"):
            os.replace(os.path.join(tmp, name), os.path.join(folder, name))


def utf8_len(text):
    return len(text.encode("utf-8", "replace"))


def token_type(vocab_size):
    return "uint16" if vocab_size <= 2 ** 16 else "uint32"


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
    meta = {"tokenizer": tok.name, "vocab_size": tok.vocab_size, "dtype": token_type(tok.vocab_size),
            "specials": tok.specials, **facts}
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
                    raise ValueError(f"the {split} split of domain '{domain}' has no document: "
                                     "the corpus is too small to hold out a part of it")
                start, end = meta[split]["tokens"], meta[split]["tokens"] + sum(lengths)
                meta[split]["domains"][domain] = [start, end, size]
                meta[split]["tokens"] = end
                meta[split]["bytes"] += size
                print(f"{split:5s} {domain:12s} {len(lengths):7,d} documents {size:12,d} bytes "
                      f"{sum(lengths):11,d} tokens {size / sum(lengths):5.2f} bytes per token")
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
            print(f"{split:5s} {len(pairs):7,d} pairs   " + "   ".join(
                f"{lang} {meta[split][side + '_bytes']:10,d} bytes {meta[split][side + '_tokens']:9,d} tokens"
                for lang, side in zip(langs, ("src", "tgt"))))
        write_meta(tmp, tok, kind="translation", langs=list(langs), splits=meta, source=source)
    print(f"wrote {folder}: tokenizer {tok.name}, vocabulary {tok.vocab_size:,d}")


# --------------------------------------------------------------------------------------------------
# Reading

def prepare_hint(folder):
    folder = os.path.abspath(folder)
    parent = os.path.dirname(folder)
    if os.path.exists(os.path.join(parent, "prepare.py")):
        folder = parent                             # a script's second corpus lies in its folder
    name = os.path.basename(folder)
    if os.path.exists(os.path.join(os.path.dirname(os.path.abspath(__file__)), name, "prepare.py")):
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
        meta["tokenizer"]
        if meta["dtype"] not in ("uint16", "uint32") or not isinstance(meta["vocab_size"], int):
            raise ValueError
        for split in meta["splits"].values():
            if meta["kind"] == "text":
                ends = [0] + [end for span in split["domains"].values() for end in (span[0], span[1])]
                if ends != sorted(ends) or ends[-1] > split["tokens"] or not split["domains"] or split["bytes"] < 0:
                    raise ValueError
            else:
                split["pairs"], split["src_tokens"], split["tgt_tokens"], split["tgt_bytes"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged ({type(e).__name__}): {prepare_hint(folder)}") from None
    return meta


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
    return np.memmap(path, dtype, mode="r")


def open_tokens(path, meta, length):
    tokens = open_array(path, meta["dtype"], length)
    step = 1 << 22                                  # a few MB at a time: the file may exceed the memory
    top = max(int(tokens[i:i + step].max()) for i in range(0, length, step))
    if top >= meta["vocab_size"]:
        raise ValueError(f"{path} holds token id {top:,d}, beyond the vocabulary of {meta['vocab_size']:,d}: "
                         + prepare_hint(os.path.dirname(os.path.abspath(path))))
    return tokens


class Pairs(NamedTuple):
    """Sentence i of a translation split: src[src_idx[i]:src_idx[i + 1]] with its <|endoftext|>; tgt alike."""
    src: np.ndarray
    src_idx: np.ndarray
    tgt: np.ndarray
    tgt_idx: np.ndarray


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
            tok = Tokenizer("bpe", tokens)
        except (ValueError, KeyError) as e:
            raise ValueError(f"{path} is damaged ({type(e).__name__}): {prepare_hint(folder)}") from None
    if tok.vocab_size != meta["vocab_size"]:
        raise ValueError(f"the tokenizer of {folder} has {tok.vocab_size:,d} tokens where meta.json says "
                         f"{meta['vocab_size']:,d}: {prepare_hint(folder)}")
    return tok


# --------------------------------------------------------------------------------------------------
# Where the raw files come from, and the command line

def fetch(name, url, args, sha256=None):
    """
    The path of the raw file `name`: in args.data_dir if that is given, otherwise downloaded once to
    args.out_dir/download. sha256 (hex) is checked on downloads, for files that never change.
    """
    if args.data_dir:
        path = os.path.join(args.data_dir, name)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} is missing: --data_dir needs a folder with {name}, from {url}")
        return path
    path = os.path.join(args.out_dir, "download", name)
    if not os.path.exists(path):
        print(f"downloading {url}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{os.getpid()}.partial"
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (prepare.py)"})
            digest = hashlib.sha256()
            with urllib.request.urlopen(request, timeout=30) as response, open(partial, "wb") as f:
                while block := response.read(1 << 20):
                    digest.update(block)
                    f.write(block)
                whole = response.headers.get("Content-Length")
            size = os.path.getsize(partial)
            if whole and int(whole) != size:
                raise OSError(f"the connection ended after {size:,d} of {int(whole):,d} bytes")
            if sha256 and digest.hexdigest() != sha256:
                raise OSError(f"its sha256 is {digest.hexdigest()}, not {sha256}")
            os.replace(partial, path)       # the final name appears only when the file is whole
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise OSError(f"cannot download {url} to {path} ({e}): put the file there, or name a folder that "
                          f"holds {name} with --data_dir=FOLDER") from None
        finally:
            if os.path.exists(partial):
                os.remove(partial)
    return path


def read_text(path):
    """The text of a UTF-8 file, gunzipped if its name ends in .gz. Line ends become \\n."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            text = f.read().decode("utf-8").replace("\r\n", "\n")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def parallel(src_path, tgt_path):
    """
    Two files whose lines i translate each other -> [(source, target), ...]. Pairs with an empty side are
    dropped and counted; files of different length cannot be aligned and raise a ValueError.
    """
    src, tgt = (read_text(path).rstrip("\n").split("\n") for path in (src_path, tgt_path))
    if len(src) != len(tgt):
        raise ValueError(f"{src_path} has {len(src):,d} lines but {tgt_path} has {len(tgt):,d}: "
                         "line i of one must translate line i of the other")
    pairs = [(s.strip(), t.strip()) for s, t in zip(src, tgt)]
    kept = [(s, t) for s, t in pairs if s and t]
    if len(kept) < len(pairs):
        print(f"dropped {len(pairs) - len(kept):,d} pairs with an empty side: {src_path}, {tgt_path}")
    return kept


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(f"error: {message}")


def run(main, file, doc, **flags):
    """
    Run main(args) as the script `file`. Its flags are --out_dir (default: the script's folder) and `flags`,
    {name: default}; a tuple lists the choices, default first. A user's error ends as one line on stderr and
    exit status 1.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags = {"out_dir": os.path.dirname(os.path.abspath(file)), **flags}
    for name, default in flags.items():
        choices = default if isinstance(default, tuple) else None
        default = choices[0] if choices else default
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices,
                            help=f"default: {default}" if default != "" else None)
    try:
        main(parser.parse_args())
    except (OSError, ValueError) as e:
        sys.exit(f"error: {' '.join(str(e).split())}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run it again")
