"""What makes a row important, by hand."""

from __future__ import annotations

import pytest
import torch

from redknot.engine import signals
from redknot.engine.signals import weight_read


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [-1, 40])
def test_weight_read_adds_up_the_softmax_of_all_rows_and_heads(window, softcap, monkeypatch):
    """Over keys of which some are not asked about, and more weights than are had at once."""
    monkeypatch.setattr(signals, "_CACHED_WEIGHTS", 1 << 16)
    torch.manual_seed(0)
    length, kv_heads, group, dim, scale = 700, 2, 3, 8, 0.4
    q = torch.randn(length, kv_heads * group, dim)
    k = torch.randn(length, kv_heads, dim)
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = (j <= i) & ((j > i - window) | (window < 0))
    scores = scores.masked_fill(~seen, -torch.inf)
    rows, keys = torch.arange(100, 680, 2), torch.arange(50, 650)
    expected = scores.softmax(-1)[:, rows][:, :, keys].sum((0, 1))
    read = weight_read(
        q[rows], scores.logsumexp(-1)[:, rows], k[keys], rows, keys, window, scale, softcap
    )
    assert (read - expected).abs().max() < 1e-4 * expected.max()
