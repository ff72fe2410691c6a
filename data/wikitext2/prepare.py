"""
WikiText-2 (Merity et al. 2016, https://arxiv.org/abs/1609.07843): 720 good and featured Wikipedia articles,
13 MB, split by article. The word-level edition: rare words are "<unk>", kept here as text, and punctuation
stands between spaces. CC BY-SA. From PyTorch's word_language_model example.

Each article is a document. Perplexity per word, as in papers, is exp(nats per token * tokens / words), where
words = 2,088,628 / 217,646 / 245,569, line ends included.

    python data/wikitext2/prepare.py                            # BPE of 8192 tokens, 8 s
    python data/wikitext2/prepare.py --data_dir=FOLDER          # FOLDER holds train.txt, valid.txt, test.txt

Expect    train  600 articles   10,797,148 bytes   2,687,419 tokens (bpe)
          val     60             1,121,681           283,201
          test    60             1,256,449           323,009
"""

import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data.bpe import TOKENIZERS, make_tokenizer
from data.download import fetch, read_text, run
from data.files import write_text

URL = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"
FILES = {
    "train": ("train.txt", "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f"),
    "val": ("valid.txt", "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
    "test": ("test.txt", "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"),
}


def articles(text):
    """Cut before each " = Title = " between empty lines (" = = Section = = " is none). Loses no character."""
    starts = [m.start(1) for m in re.finditer(r"(?:^|\n) \n( = [^=\n]+ = \n) \n", text)]
    cuts = [0] + starts[1:] + [len(text)]
    return [text[a:b] for a, b in zip(cuts, cuts[1:])]


def main(args):
    splits = {
        split: {"wikitext2": articles(read_text(fetch(name, URL + name, args, sha256)))}
        for split, (name, sha256) in FILES.items()
    }
    tok = make_tokenizer(args.tokenizer, args.vocab_size, splits["train"]["wikitext2"])
    write_text(args.out_dir, tok, splits, URL)


if __name__ == "__main__":
    run(main, __file__, __doc__, data_dir="", tokenizer=TOKENIZERS, vocab_size=8192)
