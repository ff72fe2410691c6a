"""
From a trained model to text that a person can judge: continue a prompt, fill masks, name a class, translate.

All of it is collective: with expert parallelism every process calls it, with the same arguments, in eval mode and
without gradients. cfg is train.Config, corpus data.batches.Corpus, autocast the precision to run in; a prompt of None
asks for a text of our own. ValueError, one line, for a prompt that cannot be used.
"""

import re

import numpy as np
import torch

from data.bleu import corpus_bleu
from data.batches import pad
from model import refuse_unless_finite


def check_prompt(prompt, ids, most):
    """ValueError for a prompt that is empty or has more than `most` tokens."""
    if not prompt.strip():
        raise ValueError('--sample="" is empty: give it a text')
    if len(ids) > most:
        raise ValueError(f"--sample has {len(ids)} tokens, the model takes {most}: shorten it")


def continue_text(model, corpus, cfg, mesh, prompt, autocast):
    """GPT: the prompt and what follows it; a prompt longer than the block is read from its end."""
    rng = torch.Generator(mesh.device).manual_seed(cfg.seed)
    ids = corpus.tok.encode(prompt or "") or [corpus.tok.eot]
    x = torch.tensor([ids], device=mesh.device)
    with autocast:
        y = model.generate(x, cfg.sample_tokens, cfg.temperature, cfg.top_k or None, corpus.tok.eot, rng)
    return corpus.tok.decode([t for t in y[0].tolist() if t < corpus.tok.eot])


def fill_text(model, corpus, cfg, mesh, prompt, autocast):
    """RoBERTa: a prompt with one or more <mask>, or held-out passages, with guesses for each mask."""
    if prompt is None:
        return fill_held_out(model, corpus, cfg, mesh, autocast)
    pieces = re.split(r" ?<mask>", prompt)  # a mask takes the place of a word with the space before it, as tokens do
    ids = [token for piece in pieces for token in [corpus.tok.mask, *corpus.tok.encode(piece)]][1:]
    check_prompt(prompt, ids, cfg.block_size)
    if len(pieces) == 1:
        raise ValueError("--sample has nothing to fill: write <mask> where a word is missing")
    return fill_masks(model, corpus, ids, mesh, autocast)


def fill_held_out(model, corpus, cfg, mesh, autocast):
    """Of each domain the wordiest of 16 held-out passages, an eighth of its words masked, and the guesses for them."""
    rng, texts, split = np.random.default_rng(cfg.seed), [], corpus.held_out()[0]
    is_word = lambda token: re.fullmatch(" [A-Za-z]{2,}", corpus.tok.decode([token])) is not None
    for name, start, end in corpus.domains(split):
        starts = range(start, end, max(1, -(-(end - start) // 16)))
        passages = [corpus.splits[split][i : min(i + cfg.block_size, end)].tolist() for i in starts]
        truth = max(passages, key=lambda passage: sum(map(is_word, passage)), default=[])
        words = [i for i, token in enumerate(truth) if is_word(token)]
        words = words or [i for i, token in enumerate(truth) if token < corpus.tok.eot]
        if not words:
            continue  # no text in it
        hidden = rng.permutation(words)[: 1 + len(words) // 8].tolist()
        ids = [corpus.tok.mask if i in hidden else token for i, token in enumerate(truth)]
        texts.append(f"({name}; masked word, = where the first guess is right, guesses)\n"
                     + fill_masks(model, corpus, ids, mesh, autocast, truth, corpus.names().index(name)))  # fmt: skip
    return "\n\n".join(texts)


def fill_masks(model, corpus, ids, mesh, autocast, truth=None, domain=0):
    """Token ids -> the text with [1], [2], ... where the masks are, and the five likeliest tokens for each. truth: the
    ids without masks, if they are known; domain: its number, for gates that route by it."""
    tok, x = corpus.tok, torch.tensor([ids], device=mesh.device)
    with autocast:
        logits = model(x, domain=torch.full_like(x, domain), pick=x == tok.mask)[0]
    refuse_unless_finite(logits)
    p, guesses = logits.float()[:, : tok.eot].softmax(1).topk(5)  # (masks, 5), of the ordinary tokens
    holes = [i for i, token in enumerate(ids) if token == tok.mask]
    text, table = "", ""
    for n, hole in enumerate(holes):
        text += f"{tok.decode(ids[holes[n - 1] + 1 if n else 0 : hole])} [{n + 1}]"
        best = guesses[n].tolist()
        table += f"\n[{n + 1}]".ljust(6)
        if truth:
            right = "= " if best[0] == truth[hole] else "  "
            table += right + repr(tok.decode([truth[hole]])).ljust(16) + " "
        table += "  ".join(f"{tok.decode([t])!r} {100 * q:.0f} %" for t, q in zip(best, p[n].tolist()))
    return text + tok.decode(ids[holes[-1] + 1 :]) + "\n" + table


def name_classes(model, corpus, cfg, mesh, prompt, autocast):
    """A classifier: the likeliest classes of the prompt, or of a held-out passage of each class."""
    names, split = [name for name, _, _ in corpus.domains("train")], corpus.held_out()[0]
    if prompt is not None:
        passages = {"": corpus.tok.encode(prompt)}
        check_prompt(prompt, passages[""], cfg.block_size)
    else:
        T, held = cfg.block_size, corpus.splits[split]
        middle = {name: ((start + end) // 2, end) for name, start, end in corpus.domains(split)}
        passages = {name: held[i : min(i + T, end)].tolist() for name, (i, end) in middle.items() if i < end}
    lines = []
    for name, ids in passages.items():
        with autocast:
            logits = model(torch.tensor([ids], device=mesh.device))[0][0, 0].float()
        refuse_unless_finite(logits)
        p = logits.softmax(0)
        best = p.argsort(descending=True)[:3].tolist()
        line = f"{name:16}-> " + "  ".join(f"{names[i]} {100 * p[i]:.0f} %" for i in best)
        lines.append(line + (f"   {corpus.tok.decode(ids)[:80]!r} ..." if name else ""))
    return "\n".join(lines)


def translate_text(model, corpus, cfg, mesh, prompt, autocast):
    """The translation of a prompt, one sentence."""
    ids = corpus.tok.encode(prompt.strip())
    check_prompt(prompt, ids, cfg.block_size - 1)
    return translate(model, corpus, [ids + [corpus.tok.eot]], cfg, mesh, autocast)[0]


def translate(model, corpus, sentences, cfg, mesh, autocast):
    """Lists of source token ids, each ended by <|endoftext|> -> their translations as text, in the same order. Batches
    of similar length; each rank decodes its rows of a batch, and all get all. Collective."""
    tok, texts = corpus.tok, [""] * len(sentences)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    for i in range(0, len(order), cfg.batch_size):
        which = order[i : i + cfg.batch_size]
        rows = which + which[:1] * (-len(which) % mesh.world)  # as many for every rank
        mine = slice(mesh.rank * len(rows) // mesh.world, (mesh.rank + 1) * len(rows) // mesh.world)
        src = pad([torch.tensor(sentences[j]) for j in rows], tok.pad).to(mesh.device)
        y = src.new_zeros(len(rows), cfg.block_size)
        y[mine] = tok.eot
        with autocast:
            best, _ = model.translate(src[mine], tok.bos, tok.eot, cfg.beams)
        y[mine, : best.shape[1]] = best
        for j, ids in zip(which, mesh.all_reduce(y).tolist()):  # zero where another rank's rows are
            texts[j] = tok.decode(ids[: (ids + [tok.eot]).index(tok.eot)])
    return texts


def score_translations(model, corpus, split, n, cfg, mesh, autocast):
    """Translate n sentences of a split (0: all), evenly spread. -> {"bleu": 0 to 100, "exact": share of translations
    that equal the reference, "sentences"}, and some of them as text."""
    p, fit = corpus.splits[split], corpus.pairs(split, cfg.block_size)
    which = [fit[i * len(fit) // n] for i in range(n)] if 0 < n < len(fit) else fit
    sources = [p.source(i).tolist() for i in which]
    references = [corpus.tok.decode(p.target(i)[:-1]) for i in which]
    texts = translate(model, corpus, sources, cfg, mesh, autocast)
    shown = ["source, reference (= the translation too), -> translation"]
    for i in range(0, len(texts), -(-len(texts) // 6)):
        right = references[i] == texts[i]
        shown.append(f"    {corpus.tok.decode(sources[i][:-1])}\n{'  = ' if right else '    '}{references[i]}")
        shown[-1] += "" if right else f"\n -> {texts[i]}"
    exact = sum(a == b for a, b in zip(references, texts)) / len(texts)
    scores = {"bleu": corpus_bleu(texts, references), "exact": exact, "sentences": len(texts)}
    return scores, "\n\n".join(shown)
