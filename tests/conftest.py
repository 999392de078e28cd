"""The same random numbers in every run, and one thread.

The tensors of tests are small, and a busy machine makes more threads slow; tests of other thread
counts set and restore their own.
"""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
