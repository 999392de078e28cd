"""Sparse FFN as a drop-in: in deep layers the FFN of a prompt runs only for tokens that matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from redknot import ops
from redknot.checks import check_count, check_share
from redknot.errors import InputError

__all__ = ["SparseFFN", "SparseMLP", "sparsify_layer"]


@dataclass(frozen=True)
class SparseFFN:
    """For which tokens of a prompt the FFN runs; decoded tokens always run.

    A token matters by the norm of its attention output over all heads, before the output
    projection. From layer `dense_until` on, the FFN runs for the smallest set of tokens that holds
    `mass` of the sum, plus the last `recent_n` of each sequence; the others pass unchanged.

    Parameters
    ----------
    dense_until : int
        Layers below it run the FFN for every token.
    mass : float
        Share of the importance, in (0, 1]; 1 runs every token.
    deep_start, mass_deep : int, float, optional
        From layer `deep_start` on, `mass_deep` takes the place of `mass`.
    recent_n : int
        Last tokens of each sequence (of each chunk, in chunked prefill) whose FFN always runs.
    min_keep : int
        The least number of tokens per sequence.
    """

    dense_until: int = 0
    mass: float = 1.0
    deep_start: int | None = None
    mass_deep: float | None = None
    recent_n: int = 128
    min_keep: int = 1

    def __post_init__(self) -> None:
        for option in ("mass", "mass_deep"):
            value = getattr(self, option)
            if value is not None or option == "mass":
                check_share(f"SparseFFN: {option}", value)
        for option in ("dense_until", "deep_start", "recent_n", "min_keep"):
            value = getattr(self, option)
            if value is not None or option != "deep_start":
                check_count(f"SparseFFN: {option}", value, least=0)
        if (self.deep_start is None) != (self.mass_deep is None):
            raise InputError("SparseFFN: deep_start and mass_deep belong together; give both")

    def mass_of_layer(self, layer: int) -> float:
        """Share of the importance that the FFN of `layer` must hold."""
        if layer < self.dense_until:
            return 1.0
        if self.deep_start is not None and self.mass_deep is not None and layer >= self.deep_start:
            return self.mass_deep
        return self.mass


class SparseMLP(nn.Module):
    """Stands for a layer's FFN and runs it for selected tokens; zero for the others.

    It has the FFN's children under their own names, so that parameters and state dict are the same;
    they may be quantised or carry adapters, because the FFN itself is called.
    """

    def __init__(self, mlp: nn.Module, options: SparseFFN, mass: float) -> None:
        super().__init__()
        # Called, but not registered: its children are, under the names that they always had.
        self._run: Callable[[Tensor], Tensor] = mlp.__call__
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.train(mlp.training)
        self._options, self._mass = options, mass
        self._importance: Tensor | None = None
        self._is_token: Tensor | None = None
        self.last_counts: tuple[int, int] | None = None  # tokens that ran, tokens there were

    def observe(self, attention_out: Tensor, is_token: Tensor | None) -> None:
        """Take note of the attention output [batch, length, num_q_heads, head_dim] of this layer.

        `is_token` [batch, length] is False for pads; None: there are none.
        """
        self._importance = ops.token_importance(attention_out.flatten(0, 1))
        self._is_token = is_token

    def forward(self, hidden: Tensor) -> Tensor:
        """FFN [batch, length, hidden_dim] of selected tokens; of all in a decoding step."""
        importance, is_token = self._importance, self._is_token
        self._importance = self._is_token = None
        batch, length = hidden.shape[:2]
        if importance is None or length == 1:
            return self._run(hidden)
        tokens = None
        if is_token is None:
            counts = torch.full((batch,), length, device=hidden.device)
        else:
            counts = is_token.sum(1)
            tokens = is_token.reshape(-1).nonzero().squeeze(1)
            importance = importance[tokens]
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=hidden.device)
        cu_seqlens[1:] = counts.cumsum(0)
        chosen, count = ops.select_tokens(
            importance,
            cu_seqlens,
            mass=self._mass,
            recent_n=self._options.recent_n,
            min_keep=self._options.min_keep,
        )
        rows = chosen[: int(count)].long()
        self.last_counts = (len(rows), len(importance))
        rows = rows if tokens is None else tokens[rows]
        out = torch.zeros_like(hidden)
        flat = out.view(-1, hidden.shape[-1])
        flat[rows] = self._run(hidden.reshape(-1, hidden.shape[-1])[rows][None])[0]
        return out


def sparsify_layer(block: Any, layer: int, options: SparseFFN) -> Callable[[], None] | None:
    """Put a `SparseMLP` in place of `block.mlp`, unless this layer's FFN runs for every token.

    Returns
    -------
    callable or None
        Undoes it.
    """
    mass = options.mass_of_layer(layer)
    if mass >= 1.0:
        return None
    mlp, attention = block.mlp, block.self_attn
    sparse = SparseMLP(mlp, options, mass)
    masks: list[Tensor | None] = [None]

    def before_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        masks[0] = None if mask is None else mask.is_query_token

    def before_output_projection(_: nn.Module, args: tuple[Any, ...]) -> None:
        (attention_out,) = args
        heads = attention_out.unflatten(-1, (-1, attention.head_dim))
        sparse.observe(heads, masks[0])

    hooks = [
        block.register_forward_pre_hook(before_block, with_kwargs=True),
        attention.o_proj.register_forward_pre_hook(before_output_projection),
    ]
    block.mlp = sparse

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        block.mlp = mlp

    return undo
