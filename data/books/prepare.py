"""
Classic books: 59 English novels by 15 authors, most of the nineteenth century; 47 MB, 8.4 million words.
Public domain. From https://github.com/mlschmitt/classic-books-markdown, as one archive of AUTHOR/TITLE.md.

Val is four whole books (HELD_OUT), so it asks how well a model reads a book it never saw. Their authors have
other books in train.

    python data/books/prepare.py                                # 6 s with GPT-2's tokenizer, 21 s with bpe
    python data/books/prepare.py --data_dir=FOLDER              # FOLDER/classic-books.tar.gz is there already
    python data/books/prepare.py --tokenizer=bpe --vocab_size=16384

The tokenizer is GPT-2's if it can be had, otherwise BPE: a text of this size can pay for 50,000 embeddings.

Expect    train  55 books   45,017,903 bytes   10,894,919 tokens (gpt2)   11,482,732 (bpe of 8192)
          val     4          2,068,815            500,698                   533,830
"""

import os
import sys
import tarfile
import zlib

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data.bpe import make_tokenizer
from data.download import fetch, run
from data.files import write_text

URL = "https://codeload.github.com/mlschmitt/classic-books-markdown/tar.gz/refs/heads/main"
HELD_OUT = {
    "Charles Dickens/Hard Times.md",
    "Jane Austen/Persuasion.md",
    "Mark Twain/The Prince and the Pauper.md",
    "Thomas Hardy/The Mayor of Casterbridge.md",
}


def books(path):
    """{"AUTHOR/TITLE.md": text} of the archive, sorted; title, author and year, above a ruler, are cut."""
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".md"):
                    text = archive.extractfile(member).read().decode("utf-8").replace("\r\n", "\n")
                    _, ruler, text = text.partition("\n-------\n")
                    if ruler:  # else it is about the archive, not a book
                        name = "/".join(member.name.split("/")[-2:])  # GitHub puts a folder on top
                        found[name] = text.strip() + "\n"
    except (tarfile.TarError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    if missing := HELD_OUT - found.keys():
        raise ValueError(f"{path} lacks the books to hold out: {', '.join(sorted(missing))}")
    return dict(sorted(found.items()))


def main(args):
    splits = {"train": {"books": []}, "val": {"books": []}}
    for name, text in books(fetch("classic-books.tar.gz", URL, args)).items():
        splits["val" if name in HELD_OUT else "train"]["books"].append(text)
    tok = make_tokenizer(args.tokenizer, args.vocab_size, splits["train"]["books"])
    write_text(args.out_dir, tok, splits, URL)


if __name__ == "__main__":
    run(main, __file__, __doc__, data_dir="", tokenizer=("auto", "gpt2", "bpe", "bytes"), vocab_size=8192)
