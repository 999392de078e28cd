"""Peak memory of profiling a random model of 1B shape, above its weights.

    python benchmarks/profile_memory.py [--layers 8] [--context 8192] [--json FILE]

Hidden 2,048, FFN 8,192, 32 query and 8 KV heads of 64 dimensions, a vocabulary of 128,256, bf16:
the layers of Llama-3.2-1B. `--min-kl` decides how many groups are run; the peak is that of one run,
whatever their number.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from redknot import profile_heads
from redknot.cli.output import PhaseBars
from redknot.eval.memory import peak_memory


def random_model(num_layers: int, context: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2 * context,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def resident_bytes() -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--min-kl", type=float, default=0.002)
    parser.add_argument("--no-maps", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = random_model(args.layers, args.context)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rng = np.random.default_rng(0)
    lengths = [512] * (args.context // 512)
    row = {
        "documents": [rng.integers(3, 128_256, n).tolist() for n in lengths],
        "question": rng.integers(3, 128_256, 32).tolist(),
        "answer": rng.integers(3, 128_256, args.answer_tokens).tolist(),
    }
    before = resident_bytes()
    bars = PhaseBars()
    started = time.perf_counter()
    with peak_memory(torch.device("cpu")) as peak:
        profile = profile_heads(
            model, None, [row], min_kl=args.min_kl, run_maps=not args.no_maps, progress=bars
        )
    bars.close()
    assert peak.bytes is not None
    result = {
        "layers": args.layers,
        "context_tokens": profile.calibration["context_tokens"],
        "weight_bytes": weights,
        "peak_bytes_above_weights": peak.bytes - before,
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "heads_measured_alone": int(profile.measured_alone.sum()),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
