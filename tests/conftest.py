"""One thread: the models are tiny, and comparisons bit for bit between processes need the same number in each."""

import torch

torch.set_num_threads(1)
