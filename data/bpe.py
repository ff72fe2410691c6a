"""
Tokenizers: byte pairs learned from a text, GPT-2's, or plain bytes.

    bpe    byte pairs trained on the training split: a vocabulary that fits a small corpus, no network
    gpt2   GPT-2's 50,257 tokens: a large corpus; needs the network once, or TIKTOKEN_CACHE_DIR
    bytes  bpe without merges: 260 ids, the trivial yardstick

All of them are a tiktoken.Encoding with four special tokens as the last ids.
"""

import hashlib
import heapq
import re
from collections import Counter, defaultdict

import tiktoken

TOKENIZERS = ("bpe", "gpt2", "bytes", "auto")  # auto: gpt2 if it can be had, otherwise bpe
SPECIALS = ("<|endoftext|>", "<|mask|>", "<|pad|>", "<|bos|>")
# How text is cut into words before pairs are counted, so that no token spans two words: a contraction's tail,
# letters, up to three digits, punctuation, space. It is read by two engines, Python's re in training and
# tiktoken's in encoding, so there is no \p{L} here. They disagree on a few rare characters (combining marks);
# that may cost a merge but never a character, since each class has its complement in the pattern. Runs of
# punctuation and space are cut at 64 because the engine that encodes gives up on very long ones.
PATTERN = r"'(?:[sdmt]|ll|re|ve)| ?[^\W\d_]+| ?\d{1,3}| ?(?:[^\w\s]|_){1,64}|\s{1,64}(?!\S)|\s{1,64}"
ANYTHING = r"(?s).{1,64}"  # for single bytes, which no cut can part: tiktoken compiles it in 1 ms, the one above in 40


# ---------------------------------------------------------------------------------------------------------------------
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


def replace(words, times, where, pair, new):
    """`pair` becomes the id `new` in every word that has it, and `where` knows. -> {pair: change of its count}."""
    change = Counter()
    for i in where.pop(pair):
        old, words[i] = words[i], merge(words[i], pair, new)
        for p in zip(old, old[1:]):
            change[p] -= times[i]
        for p in zip(words[i], words[i][1:]):
            change[p] += times[i]
            where[p].add(i)
    return change


def train_bpe(texts, size):
    """Learn byte pairs: start from the 256 bytes and, again and again, make the most frequent pair of neighbours
    inside a word a token. Ties go to the pair with the smaller ids, so the result is a function of the text.

    texts: iterable of str. size: tokens to end with, bytes included; fewer if no pair occurs twice any more.
    Returns the list of tokens (bytes) in rank order.

    Recounting all pairs after each merge would be O(merges * text). Instead: count every distinct word once,
    remember which words hold which pair, and after a merge recount only those. The heap holds old counts
    too; an entry that does not match the present count is skipped, as each change pushes a fresh one.
    """
    counts = Counter(word for text in texts for word in re.findall(PATTERN, text))
    words, times = [list(word.encode("utf-8", "replace")) for word in counts], list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # pair -> its count in the text; pair -> words that had it
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
            break  # a pair seen once teaches nothing
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in ranks:  # else: two ways to the same bytes are the same token
            ranks[token] = len(tokens)
            tokens.append(token)
        change = replace(words, times, where, pair, ranks[token])
        for p, n in change.items():
            if n:
                pairs[p] += n
                heapq.heappush(heap, (-pairs[p], p))
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
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
        self.encoding = tiktoken.Encoding(
            name,
            pat_str=pattern,
            special_tokens=self.specials,
            mergeable_ranks={token: i for i, token in enumerate(tokens)},
        )

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
    except Exception as e:  # whatever tiktoken's HTTP library raises, or its check of the file's hash
        raise OSError(
            f"GPT-2's encoding is not on this machine and cannot be fetched ({type(e).__name__}): "
            "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bpe"
        ) from None
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
        return Tokenizer("bytes", [bytes([i]) for i in range(256)], ANYTHING)
    if vocab_size < 256 + len(SPECIALS):
        raise ValueError(
            f"--vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIALS)} special "
            f"tokens need at least {256 + len(SPECIALS)}"
        )
    return Tokenizer("bpe", train_bpe(texts, vocab_size - len(SPECIALS)))
