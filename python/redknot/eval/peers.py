"""What redknot is measured against: Hugging Face's own dense prefill and decode."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["HuggingFaceRun", "hugging_face_dense"]


@dataclass(frozen=True)
class HuggingFaceRun:
    """One greedy generation by the model itself, with its own attention and cache."""

    token_ids: list[int]
    ttft_seconds: float
    seconds_per_token: float


@torch.inference_mode()
def hugging_face_dense(
    model: Any, token_ids: Sequence[int], max_new_tokens: int, eos: Sequence[int] = ()
) -> HuggingFaceRun:
    """Prefill and greedily decode `token_ids` with stock transformers.

    Like every run here it computes the lm_head for the last row only.
    """
    ids = torch.tensor([list(token_ids)], device=model.device)
    started = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = int(out.logits[0, -1].argmax())
    ttft = time.perf_counter() - started
    generated = [token]
    started = time.perf_counter()
    while len(generated) < max_new_tokens and generated[-1] not in eos:
        out = model(
            input_ids=torch.tensor([[generated[-1]]], device=model.device),
            past_key_values=out.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
        generated.append(int(out.logits[0, -1].argmax()))
    elapsed = time.perf_counter() - started
    return HuggingFaceRun(generated, ttft, elapsed / max(len(generated) - 1, 1))
