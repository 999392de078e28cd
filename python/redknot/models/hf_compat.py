"""Everything that depends on the version of Hugging Face transformers (5.16.1 to 5.23.0).

The attention and mask functions behind `attn_implementation="redknot"`, the base classes of the
cache, and the hooks that give an attached model its cache. Registered by `register_attention`,
never on import.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from redknot.cache.paged_batch import PagedBatch
from redknot.errors import InputError, ModelError
from redknot.models.contiguous import attend_contiguous

__all__ = [
    "ATTENTION_NAME",
    "Cache",
    "HeadRules",
    "LayerHandle",
    "LayerView",
    "TokenMask",
    "attention_rules",
    "backbone_of",
    "hook_cache_creation",
    "register_attention",
]

ATTENTION_NAME = "redknot"


# --- the mask: which slots are tokens ---------------------------------------------------------


class TokenMask:
    """What the model hands to each layer instead of a [batch, 1, queries, keys] mask.

    Attributes
    ----------
    is_token : bool Tensor [batch, key_offset + key_length] or None
        False where a slot is padding; None: no padding anywhere.
    query_offset, query_length, key_offset, key_length : int
        Slots of the queries and of the keys that a layer's cache returns.
    """

    def __init__(
        self,
        is_token: Tensor | None,
        query_offset: int,
        query_length: int,
        key_offset: int,
        key_length: int,
    ) -> None:
        self.is_token = is_token
        self.query_offset, self.query_length = query_offset, query_length
        self.key_offset, self.key_length = key_offset, key_length

    @property
    def is_query_token(self) -> Tensor | None:
        """Of the queries' slots alone: bool [batch, query_length], None without padding."""
        if self.is_token is None:
            return None
        return self.is_token[:, self.query_offset : self.query_offset + self.query_length]


def _token_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **_: Any,
) -> TokenMask:
    """Mask function of the AttentionMaskInterface."""
    # A static cache returns keys that are not there yet.
    if isinstance(q_offset, Tensor) or kv_offset + kv_length > q_offset + q_length:
        raise ModelError(
            f'attn_implementation="{ATTENTION_NAME}" does not work with a static cache; '
            "use a SegPagedCache or a DynamicCache"
        )
    if use_vmap or (not allow_is_causal_skip and q_length > 1):
        raise ModelError(
            f'attn_implementation="{ATTENTION_NAME}" is causal attention with padding; packed '
            "sequences and other changes to the mask are not supported"
        )
    is_token = attention_mask
    if is_token is not None:
        missing = kv_length + kv_offset - is_token.shape[-1]
        if missing > 0:  # as Hugging Face does: what the mask does not cover is padding
            is_token = torch.nn.functional.pad(is_token, (0, missing))
        is_token = None if bool(is_token.all()) else is_token
    return TokenMask(is_token, q_offset, q_length, kv_offset, kv_length)


# --- attention ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadRules:
    """Windows and sinks [num_kv_heads] int32 of an attached layer."""

    windows: Tensor
    sinks: Tensor


# Attention modules of attached models. They apply where keys arrive without a SegPagedCache.
attention_rules: weakref.WeakKeyDictionary[nn.Module, HeadRules] = weakref.WeakKeyDictionary()


class LayerHandle:
    """What `SegPagedCache.update` returns in place of keys and values: they stay in pages."""

    __slots__ = ("batch", "k", "layer", "v")

    def __init__(self, batch: PagedBatch, layer: int, k: Tensor, v: Tensor) -> None:
        self.batch, self.layer, self.k, self.v = batch, layer, k, v

    def __getattr__(self, name: str) -> Any:
        raise ModelError(
            "a SegPagedCache works with redknot's attention only; call "
            "redknot.register_attention() and "
            f'model.set_attn_implementation("{ATTENTION_NAME}"), or use redknot.attach'
        )


def _refuse_unsupported(
    module: nn.Module, query: Tensor, attention_mask: Any, dropout: float, options: dict[str, Any]
) -> None:
    what = None
    if dropout:
        what = "dropout (the model is in training mode; call model.eval())"
    elif module.training and torch.is_grad_enabled() and query.requires_grad:
        what = "training (it has no backward pass; call model.eval())"
    elif options.get("output_attentions"):
        what = "output_attentions (weights are never formed)"
    elif options.get("position_bias") is not None or options.get("s_aux") is not None:
        what = "position biases or learned attention sinks"
    elif not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        what = "attention that is not causal"
    elif isinstance(attention_mask, Tensor):
        what = (
            f"a custom attention mask of shape {list(attention_mask.shape)}; give [batch, length]"
        )
    if what is not None:
        raise ModelError(f'attn_implementation="{ATTENTION_NAME}" does not support {what}')


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | LayerHandle,
    value: Tensor | LayerHandle,
    attention_mask: TokenMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function of the AttentionInterface; query [batch, num_q_heads, length, dim]."""
    _refuse_unsupported(module, query, attention_mask, dropout, options)
    q = query.transpose(1, 2)
    if isinstance(key, LayerHandle):
        is_token = None if attention_mask is None else attention_mask.is_query_token
        out = key.batch.attend(
            key.layer,
            q,
            key.k.transpose(1, 2),
            key.v.transpose(1, 2),
            is_token=is_token,
            softmax_scale=scaling,
            softcap=softcap or 0.0,
        )
        return out, None
    assert isinstance(value, Tensor)
    num_keys, num_queries = key.shape[2], query.shape[2]
    mask = attention_mask or TokenMask(None, num_keys - num_queries, num_queries, 0, num_keys)
    rules = attention_rules.get(module)
    if rules is None:
        window = -1 if sliding_window is None else sliding_window
        windows = torch.full((key.shape[1],), window, dtype=torch.int32, device=key.device)
        rules = HeadRules(windows, torch.zeros_like(windows))
    elif mask.key_offset and bool((rules.sinks > 0).any()):
        raise InputError(
            "this cache has dropped the first tokens, which the head map's sinks still see; "
            "pass a SegPagedCache, or no cache"
        )
    out = attend_contiguous(
        q,
        key,
        value,
        is_token=mask.is_token,
        query_offset=mask.query_offset,
        key_offset=mask.key_offset,
        windows=rules.windows.to(key.device),
        sinks=rules.sinks.to(key.device),
        softmax_scale=scaling,
        softcap=softcap or 0.0,
    )
    return out, None


def register_attention() -> None:
    """Make `attn_implementation="redknot"` known to transformers; may be called again."""
    # Both, or padding would be ignored without a word.
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _token_mask)


# --- the cache's layers -------------------------------------------------------------------------


class LayerView(CacheLayerMixin):
    """One layer of a SegPagedCache, as transformers asks for it; holds nothing itself."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, batch: PagedBatch, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._batch, self._layer = batch, layer

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether any crop is possible: no head ever frees a page."""
        return bool((self._batch.windows < 0).all())

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first tokens."""
        return len(self._batch.sessions) or -1

    @property
    def record_past(self) -> bool:
        """Whether pages are kept until the next crop, so that it can take tokens back."""
        return self._batch.keep_expired

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._batch.keep_expired = value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: pages are made with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Count the new slots and hand keys and values to the attention function."""
        self._batch.announce(self._layer, key_states.shape[2])
        handle = LayerHandle(self._batch, self._layer, key_states, value_states)
        return handle, handle

    def get_seq_length(self) -> int:
        """Slots seen, pads and expired tokens included."""
        return self._batch.num_slots()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (slots after the next pass, 0)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Most slots, -1 without a limit."""
        return self._batch.options.max_tokens or -1

    def get_max_cache_shape(self) -> int:
        """Return `get_max_length()`, by its older name."""
        return self.get_max_length()

    def reset(self) -> None:
        """Do nothing: the cache resets all layers at once (so with the batch operations)."""


# --- hooks into a model -------------------------------------------------------------------------


def backbone_of(model: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the module that generates and the decoder in it, through wrappers such as LoRA's."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    for generator in modules:
        if isinstance(generator, PreTrainedModel) and isinstance(generator, GenerationMixin):
            for decoder in generator.modules():
                if isinstance(decoder, PreTrainedModel) and hasattr(decoder, "layers"):
                    return generator, decoder
    raise ModelError(
        f"{type(model).__name__} is no causal language model of transformers; "
        "load it with AutoModelForCausalLM"
    )


def hook_cache_creation(
    generator: PreTrainedModel,
    decoder: PreTrainedModel,
    make_cache: Callable[[int | None], Cache],
    prefill_chunk_size: int | None,
) -> Callable[[], None]:
    """Use `make_cache(max_tokens)` wherever transformers would make a DynamicCache of its own.

    Returns
    -------
    callable
        Undoes it.
    """
    name = "_prepare_cache_for_generation"
    original = getattr(generator, name, None)
    if original is None:
        raise ModelError("this version of transformers is not supported; use 5.16.1 to 5.23.0")

    def prepare_cache(
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        is_default = generation_config.cache_implementation in (None, "dynamic")
        if is_default and generation_config.use_cache is not False:
            if model_kwargs.get("past_key_values") is None:
                # Assisted decoding overshoots; one page is plenty.
                model_kwargs["past_key_values"] = make_cache(max_cache_length)
                generation_config.cache_implementation = None
            if generation_config.prefill_chunk_size is None:
                generation_config.prefill_chunk_size = prefill_chunk_size
        return original(
            generation_config,
            model_kwargs,
            generation_mode,
            batch_size,
            max_cache_length,
            *args,
            **kwargs,
        )

    def before_forward(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        use_cache = kwargs.get("use_cache")
        use_cache = decoder.config.use_cache if use_cache is None else use_cache
        given = kwargs.get("past_key_values") if len(args) < 4 else args[3]
        if not use_cache or given is not None or module.training:
            return None
        if len(args) >= 4:
            return (*args[:3], make_cache(None), *args[4:]), kwargs
        return args, {**kwargs, "past_key_values": make_cache(None)}

    setattr(generator, name, prepare_cache)
    hook = decoder.register_forward_pre_hook(before_forward, with_kwargs=True)

    def undo() -> None:
        hook.remove()
        delattr(generator, name)

    return undo
