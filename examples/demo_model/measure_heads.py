"""Measure which KV heads of the demo model must be global, and write its head map.

    python examples/demo_model/measure_heads.py --model DIR [--out DIR/head_map.json]

For every KV head alone: that head sees sink + window and keeps its reused K/V, all others are
global and recomputed; the score is the KL divergence of the answer's distribution from dense
prefill. The calibration prompts are those of seeds 100,000 and up, disjoint from training and from
the evaluation (200,000 and up). The heads with the largest divergence become global.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from redknot import Dense, Engine, HeadMap, RedKnot
from redknot.eval.arrivals import Prompt, make_prompt
from redknot.models import load_model, load_tokenizer
from redknot.store import model_fingerprint

FIRST_CALIBRATION_SEED = 100_000


@dataclass(frozen=True)
class RedKnotOn(RedKnot):
    """RedKnot under a head map of its own, so that one engine measures many maps."""

    heads: HeadMap | None = None

    def effective_heads(self, heads: HeadMap) -> HeadMap:
        return self.heads or heads


def log_probabilities(engine: Engine, prompts: list[Prompt], policy) -> torch.Tensor:
    """Of the answer token, [num_questions, vocab_size]."""
    rows = []
    for prompt in prompts:
        documents = [engine.add(text) for text in prompt.documents]
        rows += [
            engine.prefill(documents, question.text, policy=policy).logits
            for question in prompt.questions
        ]
    return torch.stack(rows).float().log_softmax(-1)


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence of rows of log probabilities."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def single_head_map(shape: tuple[int, int], layer: int, head: int, window: int, sink: int):
    classes = [["global"] * shape[1] for _ in range(shape[0])]
    classes[layer][head] = "local"
    return HeadMap(classes, window=window, sink=sink)


def measure(engine: Engine, prompts: list[Prompt], window: int, sink: int) -> np.ndarray:
    """KL of each head made local alone, [num_layers, num_kv_heads]."""
    shape = (engine.decoder.shape.num_layers, engine.decoder.shape.num_kv_heads)
    dense = log_probabilities(engine, prompts, Dense())
    scores = np.zeros(shape)
    for layer, head in tqdm(list(np.ndindex(*shape)), desc="heads", unit="head"):
        heads = single_head_map(shape, layer, head, window, sink)
        scores[layer, head] = divergence(
            dense, log_probabilities(engine, prompts, RedKnotOn(heads=heads))
        )
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="default: head_map.json beside the model")
    parser.add_argument("--global-fraction", type=float, default=0.15, help="at most (default .15)")
    parser.add_argument("--min-kl", type=float, default=0.002, help="least KL of a global head")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sink", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--questions", type=int, default=8, help="per prompt")
    parser.add_argument("--context", type=int, default=1000)
    args = parser.parse_args()

    model = load_model(args.model, dtype="float32")
    engine = Engine(model, tokenizer=load_tokenizer(args.model), kv_budget="256MiB", page_size=16)
    seeds = list(range(FIRST_CALIBRATION_SEED, FIRST_CALIBRATION_SEED + args.prompts))
    prompts = [make_prompt(seed, args.context, args.questions) for seed in seeds]
    scores = measure(engine, prompts, args.window, args.sink)

    num_global = min(int(args.global_fraction * scores.size), int((scores > args.min_kl).sum()))
    best = np.argsort(-scores, axis=None, kind="stable")[:num_global]
    classes = np.full(scores.size, "local", dtype=object)
    classes[best] = "global"
    heads = HeadMap(
        classes.reshape(scores.shape).tolist(),
        window=args.window,
        sink=args.sink,
        metadata={
            "model_fingerprint": model_fingerprint(model.config.to_dict(), model.state_dict()),
            "method": "KL of the answer to dense, one KV head made local at a time",
            "kv_head_kl": np.round(scores, 6).tolist(),
            "calibration_seeds": seeds,
            "calibration_context_tokens": args.context,
            "calibration_questions": sum(len(prompt.questions) for prompt in prompts),
        },
    )
    out = args.out or args.model / "head_map.json"
    heads.to_json(out)
    print(heads)
    print(np.array2string(scores, precision=3, suppress_small=True))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
