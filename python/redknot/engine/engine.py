"""`Engine`: documents cached once, reused anywhere in a prompt, recovered per head, answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from redknot.cache import KVPool, bytes_per_page
from redknot.checks import check_count
from redknot.engine.admission import Admission
from redknot.engine.answers import Answers
from redknot.engine.budget import num_pages_of, parse_bytes
from redknot.engine.documents import DocumentCache
from redknot.engine.prompt import PromptFormat, TextOrIds
from redknot.engine.runner import Runner
from redknot.engine.segment_tiers import SegmentTiers
from redknot.errors import InputError
from redknot.heads import HeadMap
from redknot.models import Decoder, checkpoint_fingerprint, load_model, load_tokenizer
from redknot.recovery import Policy, RedKnot
from redknot.store import MemoryStore, TieredStore, model_fingerprint, open_tiers, parse_url

__all__ = ["Engine"]


class Engine(Answers):
    """Head-aware KV reuse for one Hugging Face model.

    Parameters
    ----------
    model : PreTrainedModel, str or Path
        A Llama, Mistral, Qwen2, Qwen3 or Gemma 2 causal language model, or where to load one
        from. It is not changed. On CUDA it must be in bfloat16 or float16; the page pool lies
        beside it.
    heads : HeadMap, str or Path, optional
        Which KV heads are global; default: all of them, which is exact.
    policy : Policy, optional
        How reused documents are recovered; default `RedKnot()`.
    prefix : str or token ids, optional
        System prompt in front of the documents; default: the model's BOS alone.
    tokenizer : PreTrainedTokenizerBase, optional
        Default: the one saved beside the model, when text is first used.
    kv_budget : int or str, optional
        Bytes of the page pool ("8GiB"); default: a quarter of what is free where the model is.
    store : str or sequence of str
        Where segments are kept besides the page pool, nearest first: "mem:?capacity=4GiB" (host
        memory), "lmdb:///path" (this machine's processes), "redis://host:6379/0" (machines). Each
        takes `?capacity=`, `policy=`, `ttl=` and `timeout=` (`redknot.store.parse_url`). "mem:"
        alone: nowhere else.
    salt : str
        Segments are found only by engines with the same salt: one for each tenant of a store.
    page_size : int
        Token slots per page, of one KV head of one layer.
    chat : bool, optional
        Use the tokenizer's chat template; default: where there is one.
    separator : str, optional
        Text between documents; default: a blank line in a chat prompt, nothing otherwise.
    behind_prefix : bool
        Compute documents behind the prefix (default), or alone from position 0 as published.
    poison_freed_pages : bool, optional
        Fill freed pages with NaN, to prove that nothing reads them.

    Raises
    ------
    ModelError, HeadMapError, InputError, BudgetError
        Before anything is computed.
    """

    def __init__(
        self,
        model: Any,
        heads: HeadMap | str | Path | None = None,
        *,
        policy: Policy | None = None,
        prefix: TextOrIds | None = None,
        tokenizer: Any = None,
        kv_budget: int | str | None = None,
        store: str | Sequence[str] = "mem:",
        salt: str = "",
        page_size: int = 64,
        chat: bool | None = None,
        separator: str | None = None,
        behind_prefix: bool = True,
        poison_freed_pages: bool | None = None,
    ) -> None:
        urls = [store] if isinstance(store, str) or not isinstance(store, Sequence) else store
        for url in urls:
            parse_url(url)
        check_count("page_size", page_size)
        for name, text in (("salt", salt), ("separator", separator)):
            if not isinstance(text, str) and not (name == "separator" and text is None):
                raise InputError(f"{name} must be text, got {text!r}")
        if isinstance(model, (str, Path)):
            tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
            model = load_model(model)
        decoder = Decoder(model)
        shape = decoder.shape
        if heads is None:
            heads = HeadMap.all_global(shape.num_layers, shape.num_kv_heads)
        elif not isinstance(heads, HeadMap):
            heads = HeadMap.from_json(heads)
        fingerprint = model_fingerprint(model.config.to_dict(), model.state_dict())
        heads.check_model(shape.num_layers, shape.num_kv_heads, checkpoint_fingerprint(model))
        self.heads = heads
        if tokenizer is None and getattr(model, "name_or_path", None):
            tokenizer = load_tokenizer(model.name_or_path, missing_ok=True)
        prompt_format = PromptFormat(
            tokenizer, model.config, prefix=prefix, chat=chat, separator=separator
        )
        page_bytes = bytes_per_page(page_size, shape.head_dim, decoder.dtype)
        pool = KVPool(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            num_pages=num_pages_of(
                parse_bytes(kv_budget, decoder.device),
                page_bytes,
                shape.num_layers * shape.num_kv_heads,
            ),
            page_size=page_size,
            dtype=decoder.dtype,
            device=decoder.device,
            poison_freed_pages=poison_freed_pages,
        )
        runner = Runner(decoder, pool)
        self.store = TieredStore(open_tiers(store))
        self.documents = DocumentCache(
            runner,
            MemoryStore(pool),
            SegmentTiers(runner, self.store, fingerprint=fingerprint, heads=heads),
            fingerprint=fingerprint,
            salt=salt,
            prefix_ids=prompt_format.prefix_ids,
            behind_prefix=behind_prefix,
        )
        super().__init__(
            runner,
            Admission(runner, self.documents, heads),
            prompt_format,
            tokenizer,
            RedKnot() if policy is None else Policy.checked(policy),
        )

    # --- offline ---------------------------------------------------------------------------------

    def add(self, document: TextOrIds, *, progress: Callable[[], None] | None = None) -> str:
        """Compute and cache a document's K/V once; idempotent.

        What a tier of the store has is not computed, and not read before a request needs it.

        Parameters
        ----------
        document : str or token ids
            Text is tokenised without special tokens.
        progress : callable, optional
            Called after each layer.

        Returns
        -------
        str
            The document's id, the same for the same tokens.

        Raises
        ------
        InputError
            For an empty document, or one longer than the model's context.
        BudgetError
            When the pool cannot hold it; nothing was changed.
        """
        token_ids = self.format.document_ids(document)
        self._admission.check_length(
            len(self.format.prefix_ids) + len(token_ids), "prefix and document"
        )
        with self._lock:
            document_id = self.documents.register(token_ids)
            layer = self.policy.entry_layer(self.heads)
            if not self.documents.is_stored(document_id, hidden_layer=layer):
                self.documents.find(document_id, progress=progress, hidden_layer=layer)
            return document_id

    def prefetch(self, documents: Sequence[str]) -> None:
        """Begin to read documents from the store on threads; the next request finds them there.

        Those that are in the page pool, or in no tier, are left as they are.
        """
        with self._lock:
            layer = self.policy.entry_layer(self.heads)
            for document in dict.fromkeys(documents):
                self.documents.prefetch(document, hidden_layer=layer)

    def offline_seconds(self, documents: Sequence[str]) -> float:
        """Time that caching these documents took, each counted once; missing ones are computed."""
        with self._lock:
            return sum(self.documents.offline_seconds(d) for d in dict.fromkeys(documents))

    def clear(self) -> None:
        """Forget every document and give back its pages; the store's other tiers keep theirs."""
        with self._lock:
            self._admission.chains.clear()
            self.documents.clear()

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until every document computed so far is written to the store; whether it is."""
        return self.store.flush(timeout)

    def close(self) -> None:
        """Write what waits and close the store; at exit this happens by itself."""
        self.store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
