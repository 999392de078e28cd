"""A Hugging Face decoder taken apart: the steps of a layer, for any set of rows.

Rows are tokens in any number, [num_rows, hidden_dim]; there is no batch dimension. The model's own
Linear and norm modules do the work, so that whatever they were replaced by (quantised, LoRA) is
used; where they are plain, single heads' columns and the fused sparse FFN are taken instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redknot import ops
from redknot.errors import ModelError
from redknot.models.families import FAMILIES, family_of, shape_of
from redknot.models.hf_compat import backbone_of

__all__ = ["Decoder"]

# Rows that pass an FFN at once: bounds the [rows, ffn_dim] workspace, large enough for the GEMMs.
_FFN_CHUNK_ROWS = 4096
# The rows that `gathered_linear` is made for on CUDA; on the CPU it takes any number.
_FEW_ROWS = 64
# Classes whose modules the fused operators stand for, as torch and transformers name them.
_SILU = {"SiLU", "SiLUActivation"}
_RMS_NORMS = {
    f"{family.model_type.capitalize()}RMSNorm"
    for family in FAMILIES.values()
    if not family.sandwich_norms
}


class Decoder:
    """The parts of a Llama, Mistral, Qwen2, Qwen3 or Gemma 2 causal language model.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model in evaluation mode; it is not changed.

    Raises
    ------
    ModelError
        For a family, rope type or module layout that is not supported.
    """

    def __init__(self, model: Any) -> None:
        self.family = family_of(getattr(model, "config", None))
        # Through wrappers such as LoRA's: the modules inside are those that the wrapper put there.
        parts: tuple[Any, Any] = backbone_of(model)
        self.model, self._backbone = parts
        config = self._backbone.config
        if model.training:
            raise ModelError("the model is in training mode; call model.eval() first")
        self._layers = list(self._backbone.layers)
        self.shape = shape_of(config)
        weight = self._backbone.embed_tokens.weight
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        if self.device.type not in ("cpu", "cuda"):
            raise ModelError(
                f"the model is on {self.device}, but attention runs on the CPU and on CUDA; "
                "call model.to('cpu') or model.to('cuda') first"
            )
        if self.device.type == "cuda" and not ops.has_cuda_kernels():
            raise ModelError(
                f"the model is on {self.device}, but redknot was built without CUDA; install it "
                "again where nvcc is on PATH, or call model.to('cpu') first"
            )
        if self.device.type == "cuda" and self.dtype == torch.float32:
            raise ModelError(
                "attention on CUDA computes in bfloat16 and float16, but the model is in float32; "
                "call model.to(torch.bfloat16) first, or load it so"
            )
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(
                f"the model's dtype must be float32, bfloat16 or float16, got {self.dtype}"
            )
        self.max_context: int = config.max_position_embeddings
        self.sliding_windows = self.family.sliding_windows(config)

        rotary = self._backbone.rotary_emb
        self.inv_freq: Tensor = rotary.inv_freq.detach().float().to(self.device)
        if 2 * len(self.inv_freq) != self.shape.head_dim:
            raise ModelError(
                f"rotary dimensions must be head_dim = {self.shape.head_dim}, "
                f"got {2 * len(self.inv_freq)}"
            )
        # Hugging Face scales cos and sin of queries and keys (yarn); scaling the scores by its
        # square is the same, and keeps cached keys free of it.
        self.softmax_scale = float(self._layers[0].self_attn.scaling) * float(
            rotary.attention_scaling**2
        )
        self.softcap = float(getattr(config, "attn_logit_softcapping", None) or 0.0)
        self._logit_softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        self._head_columns: dict[
            tuple[int, tuple[str, ...], tuple[int, ...]], tuple[Tensor, Tensor]
        ] = {}
        self._every_row = torch.empty(0, dtype=torch.int32, device=self.device)

    # --- a layer, step by step -------------------------------------------------------------------

    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states [num_rows, hidden_dim] of token ids [num_rows]."""
        return self._backbone.embed_tokens(token_ids)

    def attention_norm(self, layer: int, hidden: Tensor) -> Tensor:
        """The norm in front of a layer's projections."""
        return _normed(self._layers[layer].input_layernorm, hidden)

    def query(
        self, layer: int, normed: Tensor, positions: Tensor, heads: tuple[int, ...] | None = None
    ) -> Tensor:
        """Queries [num_rows, num_q_heads, head_dim], rotated at `positions` [num_rows] int32.

        With `heads`, KV heads, only of the query heads that share them.
        """
        attention = self._layers[layer].self_attn
        if heads is not None and len(heads) < self.shape.num_kv_heads:
            (q,) = self._some_heads(layer, normed, self._query_heads(heads), ("q_proj",))
        else:
            q = _linear(attention.q_proj, normed).view(len(normed), self.shape.num_q_heads, -1)
        if self.family.qk_norm:
            q = _normed(attention.q_norm, q)
        return self._rotated(q, positions, attention.q_proj)

    def key_value(
        self, layer: int, normed: Tensor, positions: Tensor, heads: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys (rotated at `positions`) and values [num_rows, len(heads), head_dim].

        `heads` are KV heads; None: all of them. Only their columns are computed where the
        projections are plain Linear modules.
        """
        attention = self._layers[layer].self_attn
        if heads is not None and len(heads) < self.shape.num_kv_heads:
            k, v = self._some_heads(layer, normed, heads, ("k_proj", "v_proj"))
        else:
            k, v = (
                _linear(projection, normed).view(len(normed), self.shape.num_kv_heads, -1)
                for projection in (attention.k_proj, attention.v_proj)
            )
        if self.family.qk_norm:
            k = _normed(attention.k_norm, k)
        return self._rotated(k, positions, attention.k_proj), v

    def _rotated(self, projected: Tensor, positions: Tensor, projection: nn.Module) -> Tensor:
        """A projection's heads, rotated: in place, unless a hook may have kept what it saw."""
        out = projected if _is_plain_linear(projection) else None
        return ops.rope_realign(projected, positions, self.inv_freq, out=out)

    def _query_heads(self, heads: tuple[int, ...]) -> tuple[int, ...]:
        """Query heads of some KV heads."""
        group = self.shape.group_size
        return tuple(q for head in heads for q in range(head * group, (head + 1) * group))

    def _some_heads(
        self, layer: int, normed: Tensor, heads: tuple[int, ...], names: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        """Some heads' columns [num_rows, len(heads), head_dim] of each of some projections."""
        attention = self._layers[layer].self_attn
        projections = [getattr(attention, name) for name in names]
        if not all(_is_plain_linear(projection) for projection in projections):
            index = torch.tensor(heads, device=self.device)
            return tuple(
                projection(normed).view(len(normed), -1, self.shape.head_dim)[:, index]
                for projection in projections
            )
        key = (layer, names, heads)
        if key not in self._head_columns:
            self._head_columns[key] = self._columns_of(projections, heads)
        weight, bias = self._head_columns[key]
        out = F.linear(normed, weight, bias if len(bias) else None)
        return out.view(len(normed), len(names), len(heads), self.shape.head_dim).unbind(1)

    def _columns_of(
        self, projections: Sequence[Any], heads: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias of the heads' columns of each projection, one behind the other."""
        dim = self.shape.head_dim
        rows = torch.cat([torch.arange(h * dim, (h + 1) * dim) for h in heads]).to(self.device)
        weight = torch.cat([p.weight.detach()[rows] for p in projections])
        biases = [p.bias.detach()[rows] for p in projections if p.bias is not None]
        return weight, torch.cat(biases) if biases else weight.new_empty(0)

    def computes_columns(self, layer: int, *projections: str) -> bool:
        """Whether single heads of these projections cost only their columns (for the ledger)."""
        attention = self._layers[layer].self_attn
        return all(_is_plain_linear(getattr(attention, name)) for name in projections)

    def add_attention(
        self, layer: int, hidden: Tensor, attention_out: Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        """Hidden + O(attention_out), with attention_out [num_rows, num_q_heads, head_dim].

        A new tensor, so that whoever keeps `hidden` still has what came into the layer; or `out`,
        which may be `hidden` itself.
        """
        block = self._layers[layer]
        added = _linear(block.self_attn.o_proj, attention_out.flatten(1))
        if self.family.sandwich_norms:
            added = _normed(block.post_attention_layernorm, added)
        return torch.add(hidden, added, out=added if out is None else out)

    def add_ffn(self, layer: int, hidden: Tensor) -> Tensor:
        """Add the FFN of every row to `hidden`, in place."""
        if self._fuses_ffn(layer):
            num_rows = len(hidden)
            if len(self._every_row) < num_rows:
                self._every_row = torch.arange(num_rows, dtype=torch.int32, device=self.device)
            count = torch.tensor([num_rows], dtype=torch.int32, device=self.device)
            return self._fused_ffn(layer, hidden, self._every_row[:num_rows], count)
        for chunk in _even_split(hidden):
            chunk += self._ffn(layer, chunk)
        return hidden

    def add_sparse_ffn(self, layer: int, hidden: Tensor, indices: Tensor, count: Tensor) -> Tensor:
        """Add the FFN of the rows indices[:count] to `hidden`, in place; others pass through.

        `indices` [num_rows] int32 (padded), `count` [1] int32, both on the model's device.
        """
        if self._fuses_ffn(layer):
            return self._fused_ffn(layer, hidden, indices, count)
        for chunk in _even_split(indices[: int(count)].long()):
            hidden[chunk] += self._ffn(layer, hidden[chunk])
        return hidden

    def _ffn(self, layer: int, hidden: Tensor) -> Tensor:
        """What a layer's FFN adds to some rows, by the model's modules."""
        block = self._layers[layer]
        if not self.family.sandwich_norms:
            return block.mlp(block.post_attention_layernorm(hidden))
        added = block.mlp(block.pre_feedforward_layernorm(hidden))
        return block.post_feedforward_layernorm(added)

    def _fuses_ffn(self, layer: int) -> bool:
        """Whether a layer's norm and FFN are what `gathered_ffn` computes."""
        block = self._layers[layer]
        mlp = block.mlp
        plain = all(_is_plain_linear(m) and m.bias is None for m in _ffn_projections(mlp))
        return (
            plain
            and type(mlp.act_fn).__name__ in _SILU
            and _is_plain_norm(block.post_attention_layernorm)
        )

    def _fused_ffn(self, layer: int, hidden: Tensor, indices: Tensor, count: Tensor) -> Tensor:
        block = self._layers[layer]
        norm, mlp = block.post_attention_layernorm, block.mlp
        ops.gathered_ffn(
            hidden,
            norm.weight,
            norm.variance_epsilon,
            mlp.gate_proj.weight,
            mlp.down_proj.weight,
            indices,
            count,
            w_up=mlp.up_proj.weight,
        )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [num_rows, vocab_size] of hidden states after the last layer."""
        logits = _linear(self.model.lm_head, _normed(self._backbone.norm, hidden))
        if self._logit_softcap:
            logits = self._logit_softcap * (logits / self._logit_softcap).tanh()
        return logits

    # --- what the store and the ledger ask -------------------------------------------------------

    def native_windows(self) -> np.ndarray:
        """The model's own windows [num_layers, num_kv_heads] int32, -1 where it sees everything."""
        per_layer = [-1 if window is None else window for window in self.sliding_windows]
        return np.repeat(np.array(per_layer, np.int32)[:, None], self.shape.num_kv_heads, axis=1)


def _ffn_projections(mlp: nn.Module) -> tuple[Any, Any, Any]:
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is nothing but x W^T + b, so that its weight may be used directly."""
    return type(module) is nn.Linear and not _has_hooks(module)


def _linear(module: Any, x: Tensor) -> Tensor:
    """A projection of rows [num_rows, in_dim]; in bf16 by the operator made for such rows."""
    if (
        x.dtype is torch.bfloat16
        and _is_plain_linear(module)
        and (len(x) <= _FEW_ROWS or x.device.type == "cpu")
        and module.in_features % 32 == module.out_features % 16 == 0
    ):
        return ops.gathered_linear(x, module.weight, module.bias)
    return module(x)


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a family's own RMS norm, which `rms_norm` computes."""
    return type(module).__name__ in _RMS_NORMS and not _has_hooks(module)


def _normed(norm: Any, x: Tensor) -> Tensor:
    """A norm of the last dimension, fused where it is plain."""
    if not _is_plain_norm(norm):
        return norm(x)
    return ops.rms_norm(x.reshape(-1, x.shape[-1]), norm.weight, norm.variance_epsilon).view(
        x.shape
    )


def _even_split(rows: Tensor) -> tuple[Tensor, ...]:
    """Chunks of at most `_FFN_CHUNK_ROWS`, equally long: a GEMM of few rows is slow."""
    return rows.tensor_split(max(1, -(-len(rows) // _FFN_CHUNK_ROWS)))
