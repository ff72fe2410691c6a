"""
Corpus BLEU (Papineni et al. 2002, https://aclanthology.org/P02-1040), the number that sacrebleu prints by
default: one reference, case matters, tokenisation "13a", exponential smoothing.

    BLEU = 100 * min(1, exp(1 - r / c)) * (p_1 p_2 p_3 p_4)^(1/4)

p_n = matched n-grams / n-grams of the translations; an n-gram matches at most as often as the
sentence's reference has it; c, r the lengths of all translations and references in words. Every count is a sum
over sentences: corpora are joined by adding counts, and BLEU is not a mean over sentences.

    python data/bleu.py REFERENCES TRANSLATIONS         # two files, line i belongs to line i
"""

import math
import re
import sys
from collections import Counter

import numpy as np

ORDER = 4


def words(text):
    """
    The 13a tokenisation, NIST's script mteval-v13a: every ASCII symbol is a word of its own, except the
    apostrophe, a hyphen that no digit precedes, and the comma or full stop inside a number. Other characters
    stay as they are.
    """
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for name, character in ("quot", '"'), ("amp", "&"), ("lt", "<"), ("gt", ">"):
        text = text.replace(f"&{name};", character)
    text = re.sub(r"([!-&(-+/:-@\[-`{-~])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def counts(translation, reference):
    """Two sentences -> (2 + 2 * ORDER,) integers: c, r, matched 1- to 4-grams, all 1- to 4-grams."""
    hyp, ref = words(translation), words(reference)
    matched, total = [], []
    for n in range(1, ORDER + 1):
        grams, goal = (Counter(zip(*(side[i:] for i in range(n)))) for side in (hyp, ref))
        matched.append((grams & goal).total())
        total.append(grams.total())
    return np.array([len(hyp), len(ref), *matched, *total])


def bleu(counts):
    """
    Summed counts -> BLEU, 0 to 100. The first n without a match counts as half a match, the next as a
    quarter, and so on; no match at all is 0, and so are translations that are all too short to have a 4-gram.
    """
    c, r, matched, total = counts[0], counts[1], counts[2 : 2 + ORDER], counts[2 + ORDER :]
    if not all(total) or not any(matched):
        return 0.0
    log_p, share = 0.0, 1.0
    for m, n in zip(matched, total):
        share = share if m else share / 2
        log_p += math.log((m or share) / n)
    return 100 * min(1.0, math.exp(1 - r / c)) * math.exp(log_p / ORDER)


def corpus_bleu(translations, references):
    """Two lists of sentences -> BLEU, 0 to 100."""
    if len(translations) != len(references):
        raise ValueError(f"{len(translations):,d} translations but {len(references):,d} references")
    return bleu(sum((counts(h, r) for h, r in zip(translations, references)), np.zeros(2 + 2 * ORDER, int)))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("error: python data/bleu.py REFERENCES TRANSLATIONS")
    try:
        refs, hyps = (open(path, encoding="utf-8").read() for path in sys.argv[1:])
        lines = [text.removesuffix("\n").split("\n") for text in (hyps, refs)]
        print(f"BLEU = {corpus_bleu(*lines):.2f}")
    except OSError as e:
        sys.exit(f"error: cannot use {e.filename or 'stdout'} ({e.strerror}): name two text files")
    except ValueError as e:
        sys.exit(f"error: {e}")
