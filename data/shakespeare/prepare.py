"""
Tiny Shakespeare: 1.1 MB of his plays in one file. Public domain.
From https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt

Train is the first 90 % of the characters, val the rest: nanoGPT's split, so that losses compare (in bits per
byte: nats per character / ln 2, as the file is pure ASCII).

    python data/shakespeare/prepare.py                          # BPE of 1024 tokens, 2 s
    python data/shakespeare/prepare.py --data_dir=FOLDER        # FOLDER/input.txt is there already
    python data/shakespeare/prepare.py --tokenizer=bytes        # one token a character, as nanoGPT's *_char

Expect    train 1,003,854 bytes    411,599 tokens (bpe)
          val     111,540 bytes     49,448 tokens
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data.bpe import TOKENIZERS, make_tokenizer
from data.download import fetch, read_text, run
from data.files import write_text

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main(args):
    text = read_text(fetch("input.txt", URL, args, SHA256))
    cut = int(len(text) * 0.9)
    splits = {"train": {"shakespeare": [text[:cut]]}, "val": {"shakespeare": [text[cut:]]}}
    write_text(args.out_dir, make_tokenizer(args.tokenizer, args.vocab_size, [text[:cut]]), splits, URL)


if __name__ == "__main__":
    run(main, __file__, __doc__, data_dir="", tokenizer=TOKENIZERS, vocab_size=1024)
