"""
Multi30k, task 1 (Elliott et al. 2016, https://arxiv.org/abs/1605.00459; French: Elliott et al. 2017): English
captions of 31,014 photographs and their German and French translations, raw and cased; 2 MB a language. Its
repository names no licence: for research and education; cite the papers.
From https://github.com/multi30k/dataset, data/task1/raw. Test is test_2016_flickr, as in most published BLEU.

    python data/multi30k/prepare.py                             # English to German, BPE of 8192 for both; 6 s
    python data/multi30k/prepare.py --pair=en-fr                # also de-en, fr-en
    python data/multi30k/prepare.py --data_dir=FOLDER           # FOLDER holds train.en.gz, train.de.gz, ...

A later --pair replaces the one before, unless --out_dir names another folder.

Expect    train  29,000 pairs   en  443,430 tokens   de  458,517 tokens
          val     1,014               15,667               16,583
          test    1,000               15,198               15,346
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data.bpe import TOKENIZERS, make_tokenizer
from data.download import fetch, parallel, run
from data.files import write_pairs

URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
FILES = {"train": "train", "val": "val", "test": "test_2016_flickr"}
SHA256 = {
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.fr.gz": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.fr.gz": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.fr.gz": "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90",
}


def main(args):
    langs, splits = args.pair.split("-"), {}
    for split, name in FILES.items():
        files = [f"{name}.{lang}.gz" for lang in langs]
        splits[split] = parallel(*(fetch(file, URL + file, args, SHA256[file]) for file in files))
    tok = make_tokenizer(args.tokenizer, args.vocab_size, (text for pair in splits["train"] for text in pair))
    write_pairs(args.out_dir, tok, langs, splits, URL)


if __name__ == "__main__":
    run(
        main,
        __file__,
        __doc__,
        data_dir="",
        pair=("en-de", "en-fr", "de-en", "fr-en"),
        tokenizer=TOKENIZERS,
        vocab_size=8192,
    )
