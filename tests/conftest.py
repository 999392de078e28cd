"""One thread: the tensors of tests are small, and a busy machine makes more of them slow.

Tests of other thread counts set and restore their own.
"""

import torch

torch.set_num_threads(1)
