"""Measure which KV heads of the demo model must be global, and write its head map.

    python examples/demo_model/measure_heads.py --model DIR [--out DIR/head_map.json]

`redknot.profile_heads` on the task's own prompts, those of seeds 100,000 and up, disjoint from
training and from the evaluation (200,000 and up). Every head is measured alone, and all local heads
get the same window; `--coverage .95` gives each its own, from where its attention goes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redknot import profile_heads
from redknot.cli.output import PhaseBars, quiet_libraries
from redknot.eval.arrivals import make_prompt
from redknot.models import load_model, load_tokenizer

FIRST_CALIBRATION_SEED = 100_000


def calibration(seeds: list[int], context: int, questions: int) -> Iterator[dict[str, Any]]:
    """The prompts of some seeds, as `profile_heads` takes them."""
    for seed in seeds:
        prompt = make_prompt(seed, context, questions)
        for question in prompt.questions:
            yield {
                "documents": list(prompt.documents),
                "question": question.text,
                "answer": question.answer,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="default: head_map.json beside the model")
    parser.add_argument("--global-fraction", type=float, default=0.15, help="at most (default .15)")
    parser.add_argument("--min-kl", type=float, default=1e-4, help="least KL of a global head")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sink", type=int, default=4)
    parser.add_argument("--coverage", type=float, default=1.0, help="of each head's mass, 1: equal")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--questions", type=int, default=24, help="per prompt")
    parser.add_argument("--context", type=int, default=1000)
    args = parser.parse_args()

    torch.set_num_threads(1)
    quiet_libraries()
    seeds = list(range(FIRST_CALIBRATION_SEED, FIRST_CALIBRATION_SEED + args.prompts))
    bars = PhaseBars()
    profile = profile_heads(
        load_model(args.model, dtype="float32"),
        load_tokenizer(args.model),
        calibration(seeds, args.context, args.questions),
        method="alone",
        max_samples=None,
        window=args.window,
        sink=args.sink,
        coverage=args.coverage,
        min_kl=args.min_kl,
        progress=bars,
    )
    bars.close()
    heads = profile.classify(global_fraction=args.global_fraction)
    content = {"calibration_seeds": seeds, **heads.to_json()}
    content["model"] = "redknot demo model"
    out = args.out or args.model / "head_map.json"
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(heads)
    print(np.array2string(profile.score("kl"), precision=3, suppress_small=True))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
