"""Norms, linear layers and FFNs of selected tokens."""

from __future__ import annotations

from torch import Tensor

from redknot.ops.library import fake_of, register_writers, torch_ops

__all__ = ["gathered_ffn", "gathered_linear", "rms_norm"]


def gathered_ffn(
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    w_gate_up: Tensor,
    w_down: Tensor,
    indices: Tensor,
    count: Tensor,
    activation: str = "silu",
    *,
    w_up: Tensor | None = None,
) -> None:
    """Gated FFN of selected tokens, added to the residual stream in place.

    ``residual[i] += w_down @ (activation(gate(x)) * up(x))`` with ``x = rmsnorm(residual[i])`` for
    the `count` listed tokens; all others keep their bits.

    Parameters
    ----------
    residual : Tensor [num_tokens, hidden_dim]
        Read and written to.
    norm_weight : Tensor [hidden_dim]
        Of the RMS norm (fp32 variance, rounded to the dtype before the product).
    eps : float
        Of the RMS norm.
    w_gate_up : Tensor [2 * ffn_dim, hidden_dim]
        Gate above up; or the gate alone [ffn_dim, hidden_dim] beside `w_up`.
    w_down : Tensor [hidden_dim, ffn_dim]
    indices : Tensor [max_rows], int32
        The first `count` entries are distinct token rows.
    count : Tensor [1], int32
    activation : str
        ``"silu"``, or ``"gelu_tanh"`` (GELU by tanh).
    w_up : Tensor [ffn_dim, hidden_dim], optional
        The up projection, when it is not packed behind the gate.

    Notes
    -----
    On CUDA `count` is only read by the kernels, so that a captured graph follows it. There the
    dtype is bfloat16 or float16, dimensions and strides are multiples of 8; indices that are no
    rows are skipped, and of one that occurs twice the result is undefined. Sums are in a fixed
    order.
    """
    torch_ops.gathered_ffn(
        residual, norm_weight, eps, w_gate_up, w_down, indices, count, activation, w_up=w_up
    )


def gathered_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    indices: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Linear layer of selected rows, normed on the way if wanted.

    ``out[i] = weight @ x[indices[i]] + bias`` for ``i < count``. Up to 64 rows cost no more than
    reading the weights once.

    Parameters
    ----------
    x : Tensor [num_tokens, in_dim]
        Only the last dimension must be contiguous.
    weight : Tensor [out_dim, in_dim]
        Of a ``torch.nn.Linear``, or some rows of it.
    bias : Tensor [out_dim], optional
    norm_weight : Tensor [in_dim], optional
        The rows are RMS-normed first, as `rms_norm` does.
    eps : float
        Of the norm.
    indices : Tensor [max_rows], int32, optional
        The first `count` entries are rows of `x`; None: all rows in order.
    count : Tensor [1], int32
        With `indices`.

    Returns
    -------
    Tensor [max_rows, out_dim]
        What is behind the first `count` rows means nothing.

    Notes
    -----
    On CUDA as for `gathered_ffn`: `count` stays there, the dtype is bfloat16 or float16, dimensions
    and strides are multiples of 8, and the values of `indices` are trusted.
    """
    return torch_ops.gathered_linear(
        x, weight, bias, norm_weight=norm_weight, eps=eps, indices=indices, count=count
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of every row, rounded as Hugging Face's modules round.

    Parameters
    ----------
    x : Tensor [num_rows, hidden_dim]
        Only the last dimension must be contiguous.
    weight : Tensor [hidden_dim]
    eps : float

    Returns
    -------
    Tensor [num_rows, hidden_dim]
        ``round(x / rms) * weight`` with an fp32 variance; contiguous.
    """
    return torch_ops.rms_norm(x, weight, eps)


@fake_of("gathered_linear")
def _fake_gathered_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    indices: Tensor | None = None,
    **kwargs: object,
) -> Tensor:
    return x.new_empty(len(x if indices is None else indices), len(weight))


@fake_of("rms_norm")
def _fake_rms_norm(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(x.shape)


register_writers("gathered_ffn")
