"""Decoding a batch of ragged sessions: time against bytes, head-aware beside monolithic.

One layer's attention call over all sessions, as a decode step makes it; the monolithic cache is the
same call over the same lengths with every head global. Bytes are those of the pages held. If they
alone decided, the time would fall as they do: `efficiency` is the share of that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from redknot.cache import KVPool
from redknot.eval.bench.options import Options
from redknot.eval.bench.roofs import Roofs
from redknot.eval.bench.rows import Row, row_of
from redknot.eval.bench.timing import measure
from redknot.recovery import ModelShape

__all__ = ["decode_rows"]

_PAGE_SIZE, _WINDOW, _SINK, _GLOBAL_HEADS = 64, 1024, 4, 1


def decode_rows(options: Options, roofs: Roofs) -> list[Row]:
    """A row for each batch size."""
    rows = []
    for name, shape in options.shapes("Llama-3.3-70B").items():
        for batch in options.batches or ((8,) if options.quick else (8, 32)):
            longest = 16_384 if options.quick else 32_768
            rows.append(_measure(name, shape, batch, longest, options, roofs))
    return rows


def _measure(
    name: str, shape: ModelShape, batch: int, longest: int, options: Options, roofs: Roofs
) -> Row:
    options.progress(f"decode of {batch} ragged sessions, {name}")
    lengths = np.linspace(longest // 4, longest, batch).astype(int)
    mixed = np.full((1, shape.num_kv_heads), _WINDOW, dtype=np.int32)
    mixed[:, :_GLOBAL_HEADS] = -1
    ways = {
        "": _Batch(shape, lengths, mixed, options),
        "monolithic": _Batch(shape, lengths, np.full_like(mixed, -1), options),
    }
    timings = measure(
        {way: made.attend for way, made in ways.items()}, seconds=4.0 if options.quick else 12.0
    )
    head_aware, monolithic = ways[""], ways["monolithic"]
    times_faster = timings["monolithic"].median / timings[""].median
    bytes_ratio = monolithic.num_bytes / head_aware.num_bytes
    return row_of(
        timings,
        roofs,
        kind="decode",
        heads="mixed",
        shape=f"{name} x {batch} ragged to {longest}: {bytes_ratio:.2f}x fewer bytes, "
        f"{times_faster / bytes_ratio:.2f} of it in time",
        flops=4.0 * shape.num_q_heads * head_aware.num_keys / shape.num_kv_heads * shape.head_dim,
        num_bytes=head_aware.num_bytes,
        details={
            "model": name,
            "batch": batch,
            "lengths": lengths.tolist(),
            "window": _WINDOW,
            "global_fraction": _GLOBAL_HEADS / shape.num_kv_heads,
            "kv_bytes": head_aware.num_bytes,
            "kv_bytes_monolithic": monolithic.num_bytes,
            "bytes_ratio": bytes_ratio,
            "time_ratio": times_faster,
            "efficiency": times_faster / bytes_ratio,
        },
    )


class _Batch:
    """Sessions of one layer in a pool of their own."""

    def __init__(
        self, shape: ModelShape, lengths: np.ndarray, windows: np.ndarray, options: Options
    ) -> None:
        sinks = np.where(windows < 0, 0, _SINK).astype(np.int32)
        dense = int((-(-lengths // _PAGE_SIZE) + 1).sum()) * shape.num_kv_heads
        kept = (_WINDOW + _SINK) // _PAGE_SIZE + 4
        share = np.where(windows < 0, 1.0, 0.0).mean()
        num_pages = int(dense * share) + len(lengths) * kept * shape.num_kv_heads
        self.pool = KVPool(
            num_layers=1,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            num_pages=num_pages + 1,
            page_size=_PAGE_SIZE,
            dtype=options.torch_dtype,
            device=options.device,
        )
        self.pool.k_cache.fill_(0.01)
        self.pool.v_cache.fill_(0.01)
        allocator = self.pool.allocator
        self.sessions = [allocator.create_session(windows, sinks) for _ in lengths]
        for session, length in zip(self.sessions, lengths, strict=True):
            for begin in range(0, int(length), _PAGE_SIZE):
                step = min(_PAGE_SIZE, int(length) - begin)
                allocator.append_tokens([session], [step], expire_first=True)
            allocator.expire(session)
        local = np.minimum(lengths[:, None], windows + sinks)
        keys = np.where(windows < 0, lengths[:, None], local)
        self.num_keys = float(keys.sum())
        pages = sum(allocator.session_pages(session) for session in self.sessions)
        self.num_bytes = float(pages * self.pool.page_bytes)

        def tensor(array: Any) -> torch.Tensor:
            return torch.as_tensor(array, dtype=torch.int32, device=options.device)

        batch = len(lengths)
        self._q = torch.ones(
            batch, shape.num_q_heads, shape.head_dim, dtype=options.torch_dtype,
            device=options.device,
        )  # fmt: skip
        self._index: dict[str, Any] = {
            "cu_seqlens_q": tensor(np.arange(batch + 1)),
            "q_positions": tensor(lengths - 1),
            "row_window": tensor(np.tile(windows[0], batch)),
            "row_sink": tensor(np.tile(sinks[0], batch)),
        }

    def attend(self) -> torch.Tensor:
        """What a decode step asks of one layer: rows looked up, one op call."""
        return self.pool.attend(self._q, self.sessions, 0, **self._index)
