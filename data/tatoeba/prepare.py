"""
Tatoeba, English-German: short sentences of everyday life, translated by volunteers. 12 MB, 170,000 pairs in
the edition of 2018, more in later ones. CC BY 2.0 (https://tatoeba.org).
From http://www.manythings.org/anki/deu-eng.zip, which is renewed now and then: no checksum.

An English sentence may have several translations, so the split is by English sentence: shuffled with a fixed
seed, 1000 for val and 1000 for test, each with its first translation only,
the rest with all of them for train.

    python data/tatoeba/prepare.py                              # BPE of 8192 for both languages; 15 s
    python data/tatoeba/prepare.py --data_dir=FOLDER            # FOLDER/deu-eng.zip is there already

Expect    train  167,303 pairs   en  1,610,638 tokens   de  1,710,060 tokens     (the edition of 2018-05-13)
          val      1,000                 9,764               10,352
          test     1,000                 9,739               10,198
"""

import os
import random
import sys
import zipfile
import zlib

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data.bpe import TOKENIZERS, make_tokenizer
from data.download import fetch, run
from data.files import write_pairs

URL = "http://www.manythings.org/anki/deu-eng.zip"


def read_pairs(path):
    """[(English, German), ...]: the first two columns of deu.txt; newer editions have a third, authors."""
    try:
        with zipfile.ZipFile(path) as archive:
            lines = archive.read("deu.txt").decode("utf-8").rstrip("\n").split("\n")
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, UnicodeDecodeError, RuntimeError) as e:  # or encrypted
        raise ValueError(f"{path} is damaged: {e}") from None
    rows = [[cell.strip() for cell in line.split("\t")[:2]] for line in lines]
    pairs = list(dict.fromkeys(tuple(row) for row in rows if len(row) == 2 and all(row)))
    if len(pairs) < len(rows):
        print(f"dropped {len(rows) - len(pairs):,d} lines that were empty on a side or repeated")
    return pairs


def split_by_source(pairs, held_out):
    """{"train": ..., "val": ..., "test": ...}, no English sentence in two of them."""
    sources = list(dict.fromkeys(en for en, _ in pairs))
    random.Random(1337).shuffle(sources)
    first, splits = {}, {}
    for en, de in pairs:
        first.setdefault(en, de)
    for i, split in enumerate(("val", "test")):
        splits[split] = [(en, first.pop(en)) for en in sources[i * held_out : (i + 1) * held_out]]
    return {"train": [pair for pair in pairs if pair[0] in first], **splits}


def main(args):
    splits = split_by_source(read_pairs(fetch("deu-eng.zip", URL, args)), args.held_out)
    tok = make_tokenizer(args.tokenizer, args.vocab_size, (text for pair in splits["train"] for text in pair))
    write_pairs(args.out_dir, tok, ("en", "de"), splits, URL)


if __name__ == "__main__":
    run(main, __file__, __doc__, data_dir="", tokenizer=TOKENIZERS, vocab_size=8192, held_out=1000)
