"""Fixtures of several files. One thread: the models are tiny, and comparisons bit for bit between processes need the
same number in each."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: tests import its files by name
pytest.register_assert_rewrite("layers", "runs")  # their asserts, too, say what was compared
import train
from data.files import write_pairs, write_text
from data.objectives import OBJECTIVES
from runs import BYTES, flags, write_corpora

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--turns", type=int, default=1, help="how much of the product of every gate with everything else: 1 to 12 (all)"
    )
    parser.addoption("--seed", type=int, default=0, help="of the random numbers that a test does not seed itself")


@pytest.fixture(autouse=True)
def seeded(request):
    """What a test draws, it draws again in the next call, whatever ran before; --seed shows it other numbers."""
    torch.manual_seed(request.config.getoption("seed"))


@pytest.fixture(autouse=True)
def handlers():
    """A run in this process leaves its signal handlers behind; under nohup, the tests' own, too, it ignores SIGHUP."""
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for s, handler in old.items():
        signal.signal(s, handler)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """{objective: folder}: two domains of text, and sentence pairs, in bytes."""
    folder = tmp_path_factory.mktemp("data")
    write_corpora(folder)
    kinds = {name: "pairs" if one.kind == "translation" else "text" for name, one in OBJECTIVES.items()}
    return {name: folder / kind for name, kind in kinds.items()}


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """{kind: folder}, easy to learn, in bytes: two domains of text; sentence pairs, some longer than a block of 24."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    texts = lambda n, alphabet: ["".join(rng.choice(list(alphabet), 40)) for _ in range(n)]
    split = lambda n: {"left": texts(n, "abcd "), "right": texts(n, "wxyz ")}
    write_text(str(folder / "text"), BYTES, {"train": split(20), "val": split(6)}, "a test")
    pairs = lambda n: [(t[: 5 + i % 8], t[: 5 + i % 8].upper()) for i, t in enumerate(texts(n, "abcd"))]
    long = [("a" * 24, "b"), ("a", "b" * 30)]
    write_pairs(str(folder / "pairs"), BYTES, ("lower", "upper"),
                {"train": pairs(40) + long, "val": pairs(8), "test": long[:1] + pairs(7)}, "a test")  # fmt: skip
    return {"text": folder / "text", "pairs": folder / "pairs"}


@pytest.fixture(scope="session")
def trained(corpora, tmp_path_factory):
    """An out_dir after 6 steps, with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train.main(flags(corpora, out, "--save_every=3"))
    return out
