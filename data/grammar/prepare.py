"""
English-German sentence pairs written by a grammar (grammar.py), for a machine without a network: a toy with
real German in it, not a corpus. It is made here, so it has the licence of this repository.

Drawn with one seed: the same --pairs gives the same files everywhere. All sources differ, so no test sentence
was seen in training, and each has one right translation, so exact match is a fair score next to BLEU.

    python data/grammar/prepare.py                      # 50,000 pairs, 1000 + 1000 held out: 10 s
    python data/grammar/prepare.py --pairs=200000

Expect    train  50,000 pairs   en  698,785 tokens   de  732,398 tokens
          val     1,000               14,195               14,808
          test    1,000               14,016               14,676
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data.bpe import TOKENIZERS, make_tokenizer
from data.download import run
from data.files import write_pairs
from grammar import corpus


def main(args):
    if min(args.pairs, args.held_out) < 1:
        raise ValueError(f"--pairs={args.pairs} and --held_out={args.held_out} must be at least 1")
    n, pairs = args.held_out, corpus(args.pairs + 2 * args.held_out)
    # the held-out pairs are drawn first, so they are the same for any --pairs
    splits = {"train": pairs[2 * n :], "val": pairs[:n], "test": pairs[n : 2 * n]}
    tok = make_tokenizer(args.tokenizer, args.vocab_size, (text for pair in splits["train"] for text in pair))
    write_pairs(args.out_dir, tok, ("en", "de"), splits, "data/grammar/grammar.py")


if __name__ == "__main__":
    run(main, __file__, __doc__, tokenizer=TOKENIZERS, vocab_size=2048, pairs=50_000, held_out=1000)
