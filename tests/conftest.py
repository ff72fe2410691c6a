"""One thread: the models are tiny, and comparisons bit for bit between processes need the same number in each."""

import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--turns", type=int, default=1, help="how much of the product of every gate with everything else: 1 to 12 (all)"
    )
