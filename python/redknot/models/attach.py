"""Drop-in use of a Hugging Face model: head-segmented attention and cache, and sparse FFN."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn

from redknot.checks import check_count
from redknot.errors import InputError, ModelError
from redknot.heads import HeadMap
from redknot.models import hf_compat
from redknot.models.families import family_of
from redknot.models.fingerprint import checkpoint_fingerprint
from redknot.models.seg_paged_cache import SegPagedCache
from redknot.models.sparse_ffn import SparseFFN, sparsify_layer

__all__ = ["Attachment", "attach", "detach"]

_attachments: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


class Attachment:
    """What `attach` did to a model; a context manager that undoes it on exit."""

    def __init__(self, model: Any, undo: ExitStack) -> None:
        self._model = weakref.ref(model)
        self._undo = undo

    def detach(self) -> None:
        """Restore the model; once is enough."""
        model = self._model()
        if model is not None and _attachments.get(model) is self:
            del _attachments[model]
        self._undo.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()


def attach(
    model: Any,
    heads: HeadMap,
    *,
    sparse_ffn: SparseFFN | None = None,
    page_size: int = 64,
    budget_bytes: int | None = None,
    prefill_chunk_size: int | None = None,
) -> Attachment:
    """Let a model run under a head map, until `detach` or the end of a `with` block.

    Its attention implementation becomes "redknot"; `generate` and plain calls with a cache make a
    `SegPagedCache` where they would make a `DynamicCache`. Calls without a cache, or with a
    `DynamicCache` of the caller, see the same heads under the same rules, but keep all keys.

    Parameters
    ----------
    model : PreTrainedModel
        A Llama, Mistral, Qwen2, Qwen3 or Gemma 2 causal language model, possibly wrapped (LoRA);
        its own modules go on doing the work.
    heads : HeadMap
        Made for this model.
    sparse_ffn : SparseFFN, optional
        Run the FFN of a prompt for selected tokens only.
    page_size, budget_bytes : int, optional
        Of each cache made, see `SegPagedCache`.
    prefill_chunk_size : int, optional
        Default of `generate`'s own: prompts pass in chunks of so many tokens, which bounds the
        pages that local heads hold meanwhile.

    Returns
    -------
    Attachment
        A context manager; without `with`, call `detach(model)` later.

    Raises
    ------
    ModelError, HeadMapError, InputError
        The model is unchanged then.

    Examples
    --------
    >>> with redknot.attach(model, heads):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    generator, decoder = hf_compat.backbone_of(model)
    config: Any = decoder.config
    layers: Any = decoder.layers
    family = family_of(config)
    if model in _attachments:
        raise ModelError("this model is attached already; call redknot.detach(model) first")
    if sparse_ffn is not None and not isinstance(sparse_ffn, SparseFFN):
        raise InputError(f"sparse_ffn must be a SparseFFN, got {type(sparse_ffn).__name__}")
    HeadMap.checked(heads).check_model(
        config.num_hidden_layers, config.num_key_value_heads, checkpoint_fingerprint(model)
    )
    windows, sinks = heads.rules(family.sliding_windows(config))
    if prefill_chunk_size is not None:
        check_count("prefill_chunk_size", prefill_chunk_size)

    def make_cache(max_tokens: int | None) -> SegPagedCache:
        return SegPagedCache(
            config, heads, page_size=page_size, budget_bytes=budget_bytes, max_tokens=max_tokens
        )

    make_cache(None)  # a bad option is told now, not in the middle of a call
    hf_compat.register_attention()
    with ExitStack() as undo:
        before = generator.config._attn_implementation
        undo.callback(generator.set_attn_implementation, before)
        generator.set_attn_implementation(hf_compat.ATTENTION_NAME)
        for layer, block in enumerate(layers):
            hf_compat.attention_rules[block.self_attn] = hf_compat.HeadRules(
                torch.from_numpy(windows[layer]), torch.from_numpy(sinks[layer])
            )
            undo.callback(hf_compat.attention_rules.pop, block.self_attn, None)
            undo_layer = sparsify_layer(block, layer, sparse_ffn) if sparse_ffn else None
            if undo_layer is not None:
                undo.callback(undo_layer)
        undo.callback(
            hf_compat.hook_cache_creation(generator, decoder, make_cache, prefill_chunk_size)
        )
        attachment = Attachment(model, undo.pop_all())
    _attachments[model] = attachment
    return attachment


def detach(model: Any) -> None:
    """Undo `attach`; a model that is not attached is left alone."""
    attachment = _attachments.get(model) if isinstance(model, nn.Module) else None
    if attachment is not None:
        attachment.detach()
