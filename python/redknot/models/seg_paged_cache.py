"""`SegPagedCache`: a Hugging Face cache in which every head keeps only what its class sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redknot.cache.paged_batch import PagedBatch
from redknot.cache.pool import KVPool
from redknot.cache.pool_options import PoolOptions
from redknot.errors import InputError
from redknot.heads import HeadMap
from redknot.models.families import family_of
from redknot.models.hf_compat import Cache, LayerView

__all__ = ["SegPagedCache"]


class SegPagedCache(Cache):
    """Keys and values in pages per KV head, for `attn_implementation="redknot"`.

    Batch row b is a session of a `KVPool`. Global heads keep every page; local heads keep their
    sink and window, and pages that leave the window are freed while decoding. Padding takes no
    slot. `get_seq_length()` counts logical tokens, pads and expired ones included.

    A first prompt goes through the layers one after the other: the local heads of one layer alone
    hold all of it at once. In later passes of many tokens, and in a shared pool, those of all
    layers do until the pass is over; `generate(..., prefill_chunk_size=)` bounds that.

    Parameters
    ----------
    config : PreTrainedConfig
        Of a supported family; tells the native sliding windows.
    heads : HeadMap
        Made for this model.
    page_size : int, optional
        Token slots per page.
    budget_bytes, num_pages : int, optional
        Fixed size of the pool, K and V of all layers and rows together. Without either it grows.
    max_tokens : int, optional
        Most tokens per row, pads included; the first allocation is made for them.
    dtype, device : optional
        Of the pages; by default those of the first keys.
    pool : KVPool, optional
        A pool shared with other caches, instead of one of its own.

    Raises
    ------
    HeadMapError, ModelError, InputError
        Here, when map, model or options do not fit.
    BudgetError
        In a forward pass whose tokens do not fit; the cache is as before then.
    """

    def __init__(
        self,
        config: Any,
        heads: HeadMap,
        *,
        page_size: int = 64,
        budget_bytes: int | None = None,
        num_pages: int | None = None,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        pool: KVPool | None = None,
    ) -> None:
        family = family_of(config)
        HeadMap.checked(heads).check_model(config.num_hidden_layers, config.num_key_value_heads)
        self._sliding_windows = family.sliding_windows(config)
        windows, sinks = heads.rules(self._sliding_windows)
        options = PoolOptions(
            page_size=page_size,
            num_pages=num_pages,
            budget_bytes=budget_bytes,
            max_tokens=max_tokens,
            dtype=dtype,
            device=device,
        )
        self.heads = heads
        self._batch = PagedBatch(windows, sinks, options, pool)
        super().__init__(layers=[LayerView(self._batch, i) for i in range(len(windows))])

    @property
    def pool(self) -> KVPool | None:
        """The page pool; None before the first tokens."""
        return self._batch.pool

    @property
    def sessions(self) -> tuple[int, ...]:
        """Ids of the batch rows' sessions in the pool's allocator."""
        return tuple(self._batch.sessions)

    @property
    def is_croppable(self) -> bool:
        """Whether any crop is possible: no head ever frees a page."""
        return all(layer.is_croppable for layer in self.layers)

    # --- what transformers calls ----------------------------------------------------------------

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return the most tokens per row, -1 without a limit."""
        return self._batch.options.max_tokens or -1

    def reset(self) -> None:
        """Forget all tokens and free their pages."""
        self._batch.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with these rows (beam search); rows taken twice share their pages."""
        self._batch.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self._batch.select(torch.arange(len(self._batch.sessions))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, next to itself; copies share their pages."""
        rows = range(len(self._batch.sessions))
        self._batch.select([row for row in rows for _ in range(repeats)])

    def activate_past_recording(self) -> None:
        """Keep expired pages until the next `crop`, so that it can take tokens back."""
        self._batch.keep_expired = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of every row.

        The tokens of the last forward pass can always be taken back; older ones as far as local
        heads still hold what the shorter sequence would see.

        Raises
        ------
        InputError
            When that is not so, nothing has changed then; or for a positive number, which older
            versions of transformers read as a length.
        """
        tokens_to_remove = int(tokens_to_remove)  # 5.16 passes a tensor
        if tokens_to_remove > 0:
            raise InputError(
                f"crop takes a negative number of tokens to remove, got {tokens_to_remove}"
            )
        self._batch.crop(-tokens_to_remove)
        if self._batch.keep_expired:
            self._batch.expire()

    # --- compression ----------------------------------------------------------------------------

    def compress(self, heads: HeadMap) -> int:
        """Follow another head map from now on and free what it no longer sees, for good.

        Parameters
        ----------
        heads : HeadMap
            Such as `HeadMap.prefix_compression`. It holds for `reset` and what comes after it too.

        Returns
        -------
        int
            Bytes of the pages that became free.

        Raises
        ------
        HeadMapError
            When the map does not fit, or a head has already dropped tokens that it would see under
            this map; nothing has changed then.
        """
        windows = self._batch.windows
        heads.check_model(*windows.shape)
        freed = self._batch.compress(*heads.rules(self._sliding_windows))
        self.heads = heads
        return freed * (self.pool.page_bytes if self.pool is not None else 0)

    # --- figures --------------------------------------------------------------------------------

    def kv_bytes(self) -> int:
        """Bytes of the pages that this cache holds; pages that rows share count once."""
        return int(self.stats()["kv_bytes"])

    def stats(self) -> dict[str, int]:
        """Return pages and bytes held, by head class, and the size of the pool."""
        pages = self._batch.pages_per_class()
        pool = self._batch.pool
        totals = pool.allocator.stats() if pool is not None else None
        page_bytes = totals["bytes_per_page"] if totals else 0
        return {
            "tokens": self._batch.num_slots(),
            "sequences": len(self._batch.sessions),
            "global_pages": pages["global"],
            "local_pages": pages["local"],
            "bytes_per_page": page_bytes,
            "kv_bytes": (pages["global"] + pages["local"]) * page_bytes,
            "pool_pages": totals["num_pages"] if totals else 0,
            "pool_free_pages": totals["num_free_pages"] if totals else 0,
        }
