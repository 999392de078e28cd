"""One sample through a model, layer by layer: dense, and under any head map from any layer on.

What a map does to the answers is what RedKnot as published does: every row of a moved document
lives, global heads take its fresh K and V, local heads keep those cached with the document alone
and see sink + window. Memory: the K and V of one prompt, and a few hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redknot import ops
from redknot.eval.profiling.calibration import Sample
from redknot.eval.profiling.layout import Branches
from redknot.heads import HeadMap
from redknot.models import Decoder

__all__ = ["Answers", "LayerRules", "SampleRun"]

# Rows of logits at once: a large vocabulary makes each of them half a megabyte.
_LOGIT_ROWS = 64


@dataclass(frozen=True)
class LayerRules:
    """A head map on a model: windows and sinks of each layer, and which heads keep cached K/V."""

    windows: list[Tensor]  # int32 [num_kv_heads]
    sinks: list[Tensor]
    local: list[Tensor]  # int64 indices of local heads

    @classmethod
    def of(cls, heads: HeadMap, decoder: Decoder) -> LayerRules:
        """Rules of a map inside the model's own sliding windows."""
        windows, sinks = heads.rules(decoder.sliding_windows)
        device = decoder.device
        return cls(
            [torch.from_numpy(row).to(device) for row in windows],
            [torch.from_numpy(row).to(device) for row in sinks],
            [torch.from_numpy(np.flatnonzero(~row)).to(device) for row in heads.is_global],
        )


@dataclass(frozen=True)
class Answers:
    """Sums over the answer tokens of a sample, against the dense run."""

    kl: float
    nll: float
    correct: int


@dataclass(frozen=True)
class DenseLayer:
    """What dense prefill computes in one layer, and the same documents each on its own."""

    layer: int
    hidden: Tensor  # at the layer's input, [num_rows, hidden_dim]
    q: Tensor
    k: Tensor
    v: Tensor
    attention_out: Tensor


class SampleRun:
    """Everything about one sample and one model that several runs share."""

    def __init__(self, decoder: Decoder, sample: Sample) -> None:
        self.decoder = decoder
        self.sample = sample
        heads, device = decoder.shape.num_kv_heads, decoder.device
        prefix, documents, asks = sample.prefix, sample.documents, sample.asks
        self.context = sample.context_tokens
        # The documents as they are cached: each behind the prefix alone.
        self.offline = Branches(len(prefix), [len(d) for d in documents], heads, device)
        # What is fed behind the context: the question and all of the answer but its last token.
        fed = [np.concatenate([ask.question, ask.answer[:-1]]) for ask in asks]
        self.online = Branches(self.context, [len(ids) for ids in fed], heads, device)
        ids = np.concatenate([prefix, *documents, *fed])
        self._token_ids = torch.from_numpy(ids).to(device)
        # The first document stands where it was cached, behind the same tokens.
        self.first_moved = len(prefix) + len(documents[0])
        self._moved_by = self.online.positions[: self.context] - self.offline.positions
        rows = [
            np.arange(self.online.rows_of(i).stop - len(ask.answer), self.online.rows_of(i).stop)
            for i, ask in enumerate(asks)
        ]
        self.answer_rows = torch.from_numpy(np.concatenate(rows)).to(device)
        targets = np.concatenate([ask.answer for ask in asks])
        self._targets = torch.from_numpy(targets).to(device)
        dense = HeadMap.all_global(decoder.shape.num_layers, heads)
        self.dense_rules = LayerRules.of(dense, decoder)
        self._cached: list[tuple[Tensor, Tensor]] = []

    # --- the documents alone ----------------------------------------------------------------------

    @torch.inference_mode()
    def offline_layers(self) -> Iterator[DenseLayer]:
        """Prefill each document alone behind the prefix, layer by layer."""
        return self._layers(self.offline, self._token_ids[: self.context])

    def dense_layers(self) -> Iterator[DenseLayer]:
        """Prefill the prompt densely, layer by layer."""
        return self._layers(self.online, self._token_ids)

    @torch.inference_mode()
    def _layers(self, rows: Branches, token_ids: Tensor) -> Iterator[DenseLayer]:
        decoder, rules = self.decoder, self.dense_rules
        hidden = decoder.embed(token_ids)
        for layer in range(decoder.shape.num_layers):
            normed = decoder.attention_norm(layer, hidden)
            q = decoder.query(layer, normed, rows.positions)
            k, v = decoder.key_value(layer, normed, rows.positions)
            del normed
            out = rows.attend(
                q,
                k,
                v,
                rules.windows[layer],
                rules.sinks[layer],
                decoder.softmax_scale,
                decoder.softcap,
            )
            yield DenseLayer(layer, hidden, q, k, v, out)
            del q, k, v
            hidden = decoder.add_attention(layer, hidden, out)
            del out
            hidden = decoder.add_ffn(layer, hidden)

    @torch.inference_mode()
    def cache_documents(self) -> None:
        """Keep the K and V of the documents alone, the keys moved to their places in the prompt."""
        if not self._cached:
            for step in self.offline_layers():
                self._cached.append((self.move(step.k), step.v))

    @torch.inference_mode()
    def move(self, k: Tensor) -> Tensor:
        """Rotate keys of documents alone to where their documents stand in the prompt."""
        return ops.rope_realign(k, self._moved_by, self.decoder.inv_freq)

    # --- under a map ------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, rules: LayerRules, hidden: Tensor | None = None, begin: int = 0) -> Tensor:
        """Final hidden states [num_answer_tokens, hidden_dim] under a map, from a layer on.

        `hidden` is the input of layer `begin`; by default the embedding and layer 0. It stays as
        it is.
        """
        decoder, rows = self.decoder, self.online
        if hidden is None:
            hidden = decoder.embed(self._token_ids)
        last = decoder.shape.num_layers - 1
        for layer in range(begin, last + 1):
            normed = decoder.attention_norm(layer, hidden)
            k, v = decoder.key_value(layer, normed, rows.positions)
            self.reuse(layer, k, v, rules.local[layer])
            # Behind the last layer nobody reads the documents' rows.
            first = self.context if layer == last else 0
            out = rows.attend(
                decoder.query(layer, normed[first:], rows.positions[first:]),
                k,
                v,
                rules.windows[layer],
                rules.sinks[layer],
                decoder.softmax_scale,
                decoder.softcap,
                branches_only=layer == last,
            )
            del normed, k, v
            hidden = decoder.add_attention(layer, hidden[first:], out)
            hidden = decoder.add_ffn(layer, hidden)
        return hidden[self.answer_rows - self.context]

    def reuse(self, layer: int, k: Tensor, v: Tensor, local: Tensor) -> None:
        """Put cached K and V in place: of local heads, and of what has not moved in all heads."""
        cached_k, cached_v = self._cached[layer]
        moved = slice(self.first_moved, self.context)
        for fresh, cached in ((k, cached_k), (v, cached_v)):
            fresh[: self.first_moved] = cached[: self.first_moved]
            if len(local):
                fresh[moved, local] = cached[moved, local]

    # --- answers ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def compare(self, dense: Tensor, other: Tensor) -> Answers:
        """Compare final hidden states of answer tokens: KL(dense || other), and other's answers."""
        kl = nll = 0.0
        correct = 0
        parts = zip(
            dense.split(_LOGIT_ROWS),
            other.split(_LOGIT_ROWS),
            self._targets.split(_LOGIT_ROWS),
            strict=True,
        )
        for dense_rows, other_rows, targets in parts:
            p = self.decoder.logits(dense_rows).float().log_softmax(-1)
            q = self.decoder.logits(other_rows).float().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            nll -= float(q.gather(1, targets[:, None]).sum())
            correct += int((q.argmax(-1) == targets).sum())
        return Answers(kl, nll, correct)
