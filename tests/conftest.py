"""One thread: the models are tiny, and comparisons bit for bit between processes need the same number in each."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: tests import its files by name
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--turns", type=int, default=1, help="how much of the product of every gate with everything else: 1 to 12 (all)"
    )
