"""
From a trained model to text that a person can judge: continue a prompt, fill masks, name a class, translate.

All of it is collective: with expert parallelism every process calls it, with the same arguments. cfg is train.Config,
corpus data.batches.Corpus, autocast the precision to run in.
"""

import re

import numpy as np
import torch

from data.bleu import corpus_bleu
from data.batches import pad


def show_sample(model, corpus, cfg, mesh, prompt, autocast):
    """What the model makes of a prompt (None: of one of our own), as text that a person can judge. Collective.
    ValueError, one line, for a prompt that cannot be used."""
    model.eval()
    if cfg.objective == "translation":
        ids = corpus.tok.encode(prompt.strip())
        check_prompt(prompt, ids, cfg.block_size - 1)
        text = translate(model, corpus, [ids + [corpus.tok.eot]], cfg, mesh, autocast)[0]
    elif cfg.objective == "roberta":
        text = fill_prompt(model, corpus, cfg, mesh, prompt, autocast) if prompt is not None else fill_held_out(model, corpus, cfg, mesh, autocast)
    elif cfg.objective == "classify":
        text = show_classes(model, corpus, cfg, mesh, prompt, autocast)
    else:
        text = continue_text(model, corpus, cfg, mesh, prompt, autocast)
    model.train()
    return text


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


def fill_masks(model, corpus, ids, mesh, autocast, truth=None, domain=0):
    """RoBERTa: token ids -> the text with [1], [2], ... where the masks are, and the five likeliest tokens for each.
    truth: the ids without masks, if they are known; domain: its number, for gates that route by it."""
    x = torch.tensor([ids], device=mesh.device)
    with autocast:
        logits = model(x, domain=torch.full_like(x, domain), pick=x == corpus.tok.mask)[0].float()[:, : corpus.tok.eot]  # (masks, ordinary tokens)
    p, guess = (t.tolist() for t in logits.softmax(1).topk(5))
    holes = [i for i, token in enumerate(ids) if token == corpus.tok.mask]
    text = "".join(f"{corpus.tok.decode(ids[a + 1 : b])} [{n}]" for n, (a, b) in enumerate(zip([-1, *holes], holes), 1))
    text += corpus.tok.decode(ids[holes[-1] + 1 :]) + "\n"
    for n, (i, share, tokens) in enumerate(zip(holes, p, guess), 1):
        text += f"\n[{n}]".ljust(6) + (f"{'= ' if tokens[0] == truth[i] else '  '}{corpus.tok.decode([truth[i]])!r:16} " if truth else "")
        text += "  ".join(f"{corpus.tok.decode([token])!r} {100 * q:.0f} %" for token, q in zip(tokens, share))
    return text


def fill_prompt(model, corpus, cfg, mesh, prompt, autocast):
    """A prompt with one or more <mask>; a mask takes the place of a word with the space before it, as tokens do."""
    pieces = re.split(r" ?<mask>", prompt)
    ids = [token for piece in pieces for token in [corpus.tok.mask, *corpus.tok.encode(piece)]][1:]
    check_prompt(prompt, ids, cfg.block_size)
    if len(pieces) == 1:
        raise ValueError("--sample has nothing to fill: write <mask> where a word is missing")
    return fill_masks(model, corpus, ids, mesh, autocast)


def fill_held_out(model, corpus, cfg, mesh, autocast):
    """Of each domain the wordiest of 16 held-out passages, an eighth of its words masked, and the guesses for them."""
    rng, texts = np.random.default_rng(cfg.seed), []
    split = "val" if "val" in corpus.splits else "test"
    is_word = lambda token: re.fullmatch(" [A-Za-z]{2,}", corpus.tok.decode([token])) is not None
    for domain, (name, start, end) in enumerate(corpus.domains(split)):
        passages = [corpus.splits[split][i : min(i + cfg.block_size, end)].tolist() for i in range(start, end, -(-(end - start) // 16))]
        truth = max(passages, key=lambda passage: sum(map(is_word, passage)))
        words = [i for i, token in enumerate(truth) if is_word(token)] or [i for i, token in enumerate(truth) if token < corpus.tok.eot]
        hidden = rng.permutation(words)[: 1 + len(words) // 8].tolist()
        ids = [corpus.tok.mask if i in hidden else token for i, token in enumerate(truth)]
        texts.append(f"({name}; masked word, = where the first guess is right, guesses)\n" + fill_masks(model, corpus, ids, mesh, autocast, truth, domain))
    return "\n\n".join(texts)


def show_classes(model, corpus, cfg, mesh, prompt, autocast):
    """The likeliest classes of the prompt, or of a held-out passage of each class."""
    names, split = [name for name, _, _ in corpus.domains("train")], "val" if "val" in corpus.splits else "test"
    if prompt is not None:
        passages = {"": corpus.tok.encode(prompt)}
        check_prompt(prompt, passages[""], cfg.block_size)
    else:
        middle = {name: (start + end) // 2 for name, start, end in corpus.domains(split)}
        passages = {name: corpus.splits[split][i : i + cfg.block_size].tolist() for name, i in middle.items()}
    text = []
    for name, ids in passages.items():
        with autocast:
            p = model(torch.tensor([ids], device=mesh.device))[0][0, 0].float().softmax(0)
        best = p.argsort(descending=True)[:3].tolist()
        quote = f"   {corpus.tok.decode(ids)[:80]!r} ..." if name else ""
        text.append(f"{name:16}-> " + "  ".join(f"{names[i]} {100 * p[i]:.0f} %" for i in best) + quote)
    return "\n".join(text)


def translate(model, corpus, sentences, cfg, mesh, autocast):
    """Lists of source token ids, each ended by <|endoftext|> -> their translations as text, in the same order. Batches of
    similar length; each rank decodes its rows of a batch, and all get all. Collective."""
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
            best, _ = model.translate(src[mine], tok.bos, tok.eot, cfg.beams, cfg.length_penalty)
        y[mine, : best.shape[1]] = best
        for j, ids in zip(which, mesh.all_reduce(y).tolist()):  # zero where another rank's rows are
            texts[j] = tok.decode(ids[: (ids + [tok.eot]).index(tok.eot)])
    return texts


def score_translations(model, corpus, split, n, cfg, mesh, autocast):
    """Translate n sentences of a split (0: all), evenly spread. -> {"bleu": 0 to 100, "exact": share of translations that
    equal the reference, "sentences"}, and some of them as text. Collective."""
    p, fit = corpus.splits[split], corpus.pairs(split, cfg.block_size)
    which = [fit[i * len(fit) // n] for i in range(n)] if 0 < n < len(fit) else fit
    sources, targets = ([side[idx[i] : idx[i + 1]].tolist() for i in which] for side, idx in (p[:2], p[2:]))
    model.eval()
    texts = translate(model, corpus, sources, cfg, mesh, autocast)
    model.train()
    references = [corpus.tok.decode(t[:-1]) for t in targets]
    right = [r == t for r, t in zip(references, texts)]
    shown = [f"    {corpus.tok.decode(sources[i][:-1])}\n{'  = ' if right[i] else '    '}{references[i]}" + f"\n -> {texts[i]}" * (not right[i])
             for i in range(0, len(texts), -(-len(texts) // 6))]  # fmt: skip
    scores = {"bleu": corpus_bleu(texts, references), "exact": sum(right) / len(texts), "sentences": len(texts)}
    return scores, "source, reference (= the translation too), -> translation\n\n" + "\n\n".join(shown)
