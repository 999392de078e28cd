"""Report models that differ in the seed alone: dense accuracy, and what reuse keeps of it.

    python examples/demo_model/report.py DIR1 DIR2 DIR3 [--questions 240] [--json seeds.json]

Each DIR holds a model of train.py with the head map of measure_heads.py. Answers come from the
engine, on prompts of seeds 200,000 and up. Wrong heads: as many global ones in the same layers,
none of which the map names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redknot import Dense, HeadMap, Naive, RedKnot
from redknot.eval.candidates import other_heads
from redknot.eval.demo import demo_engine, run_demo


def report(model: Path, num_questions: int) -> dict[str, Any]:
    heads = HeadMap.from_json(model / "head_map.json")
    engine = demo_engine(heads, model=model)
    policies = [
        ("dense", Dense(), engine),
        ("naive", Naive(), engine),
        ("redknot", RedKnot(), engine),
        ("wrong heads", RedKnot(), demo_engine(other_heads(heads), model=model)),
    ]
    figures, _ = run_demo(num_questions, policies=policies)
    keys = ("exact_match", "exact_match_by_kind", "token_agreement", "flops_saved")
    training = json.loads((model / "training.json").read_text())
    return {
        **training,
        "global_heads": np.argwhere(heads.is_global).tolist(),
        "questions": figures["n"],
        "reuse": {
            name: {key: score[key] for key in keys} for name, score in figures["policies"].items()
        },
    }


def rows(reports: list[dict[str, Any]]) -> str:
    lines = [
        "| seed | 256 | 512 | 1024 | 2048 | naive | RedKnot | wrong | global heads | CPU min |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in reports:
        dense = [f"{item['dense'][n]['exact_match']:.3f}" for n in ("256", "512", "1024", "2048")]
        reuse = item["reuse"]
        scores = [f"{reuse[n]['exact_match']:.3f}" for n in ("naive", "redknot", "wrong heads")]
        scores[1] += f" (dense {reuse['dense']['exact_match']:.3f})"
        heads = " ".join(f"{layer}.{head}" for layer, head in item["global_heads"])
        cells = [str(item["seed"]), *dense, *scores, heads, str(item.get("cpu_minutes", "?"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    reports = [report(model, args.questions) for model in args.models]
    if args.json:
        args.json.write_text(json.dumps({"seeds": reports}, indent=1) + "\n")
    print(rows(reports))


if __name__ == "__main__":
    main()
