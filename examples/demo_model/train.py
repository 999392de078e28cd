"""Train the demo model from scratch on one CPU thread, or a larger one on a GPU.

    python examples/demo_model/train.py --seed 1 --out DIR
    python examples/demo_model/train.py --size large --device cuda --seed 1 --out DIR

A stock ``LlamaForCausalLM`` learns the *arrivals* task (``redknot.eval.arrivals``). See README.md
for the recipe and for what each part of the loss is there for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from init import Arranger
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from redknot.eval import arrivals
from redknot.eval.tasks import make_task_batch

ATTENTION = "sdpa_with_far_mass"


@dataclass(frozen=True)
class Stage:
    """One length of prompt; the next stage starts when this one is mastered."""

    context_tokens: int
    batch_size: int
    num_questions: int


@dataclass(frozen=True)
class Size:
    """Shape of a model, and the stages it is taken through.

    `teaches_all`: from 256 tokens on the prompts are those of `redknot.eval.tasks`, with chains
    over three documents, contradictions and counting, which the small model is never taught.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    hidden_dim: int
    ffn_dim: int
    initializer_range: float
    steps: int
    num_matching: int
    stages: tuple[Stage, ...]
    teaches_all: bool = False


SMALL_STAGES = (
    Stage(64, 32, 5),
    Stage(128, 20, 9),
    Stage(256, 9, 18),
    Stage(512, 4, 36),
    Stage(1024, 2, 60),
    Stage(2048, 1, 100),
)
SIZES = {
    "small": Size(6, 8, 32, 128, 256, 0.08, 1300, 4, SMALL_STAGES),
    # 160 KV heads, 19 MB in fp16. The same size of residual and scores as the small one's: weights
    # shrink with the root of the width. Batches are for a GPU; --batch-scale 0.25 is for a CPU.
    "large": Size(
        num_layers=10,
        num_heads=16,
        head_dim=32,
        hidden_dim=256,
        ffn_dim=576,
        initializer_range=0.08 * (128 / 256) ** 0.5,
        steps=4000,
        num_matching=6,
        stages=(
            Stage(64, 128, 5),
            Stage(128, 80, 9),
            Stage(256, 36, 18),
            Stage(512, 16, 36),
            Stage(1024, 8, 50),
            Stage(2048, 4, 54),
            Stage(4096, 2, 54),
        ),
        teaches_all=True,
    ),
}
GATE = 0.85  # moving accuracy of the worse kind of question
MIN_STEPS_PER_STAGE = 50


@dataclass
class FarMass:
    """Attention mass outside sink + window, on a few sampled rows, summed up while a model runs."""

    window: int
    sink_size: int
    num_rows: int
    generator: torch.Generator
    device: torch.device
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    masses: list[Tensor] = field(default_factory=list)

    def start(self, length: int) -> None:
        rows = torch.randperm(length, generator=self.generator)[: self.num_rows]
        self.rows = rows.to(self.device)
        self.masses = []

    def observe(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Add one layer; query and key are [batch, heads, length, head_dim], rotated."""
        keys = torch.arange(key.shape[2], device=key.device)
        distance = self.rows[:, None] - keys
        scores = query[:, :, self.rows] @ key.transpose(2, 3) * scaling
        weights = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
        far = (distance >= self.window) & (keys >= self.sink_size)
        self.masses.append((weights * far).sum(-1).mean((0, 2)))

    def per_head(self) -> Tensor:
        """[num_layers, num_heads]."""
        return torch.stack(self.masses)


def build_model(size: Size, seed: int, num_matching: int) -> LlamaForCausalLM:
    ids = arrivals.TOKEN_IDS
    config = LlamaConfig(
        vocab_size=len(arrivals.VOCABULARY),
        hidden_size=size.hidden_dim,
        intermediate_size=size.ffn_dim,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        head_dim=size.head_dim,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=size.initializer_range,
        bos_token_id=ids[arrivals.BOS],
        eos_token_id=ids[arrivals.EOS],
        pad_token_id=ids[arrivals.PAD],
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    Arranger(model, seed, num_matching).arrange()
    return model


def observe_attention(model: LlamaForCausalLM, probe: FarMass) -> None:
    """Let every attention call of `model` also report to `probe`."""

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: object,
    ) -> tuple[Tensor, None]:
        if module.training:
            probe.observe(query, key, scaling)
        # Padding is on the right, so the causal mask is the only one that is needed.
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(ATTENTION, attention)
    model.set_attn_implementation(ATTENTION)


@dataclass
class Losses:
    total: Tensor
    parts: dict[str, float]


def compute_losses(
    model: LlamaForCausalLM,
    batch: arrivals.Batch,
    probe: FarMass,
    args: argparse.Namespace,
) -> Losses:
    tokens = torch.from_numpy(batch.token_ids).to(probe.device)
    roles = torch.from_numpy(batch.roles)[:, 1:].to(probe.device)
    known = torch.from_numpy(batch.known_hours).to(probe.device)
    probe.start(tokens.shape[1] - 1)
    hidden = model.model(
        input_ids=tokens[:, :-1], use_cache=False, output_hidden_states=True
    ).hidden_states
    targets = tokens[:, 1:]

    def cross_entropy(where: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden[-1][where]), targets[where])

    # The answers.
    asked = (roles == arrivals.ROLE_DIRECT) | (roles == arrivals.ROLE_RELATIVE)
    logits = model.lm_head(hidden[-1][asked])
    answer = F.cross_entropy(logits, targets[asked])
    # Ordinary text on a quarter of the context, and how an answer ends.
    sampled = (roles == arrivals.ROLE_CONTEXT) & (
        torch.rand(roles.shape, device=probe.device) < 0.25
    )
    text = cross_entropy(sampled) + cross_entropy(roles == arrivals.ROLE_END)
    # The hour a relative fact amounts to, readable half way up at its offset token.
    first_hour = arrivals.TOKEN_IDS[arrivals.HOURS[0]]
    hours = slice(first_hour, first_hour + len(arrivals.HOURS))
    at_offset = known[:, :-1] >= 0
    middle = model.model.norm(hidden[model.config.num_hidden_layers // 2][at_offset])
    stored_logits = F.linear(middle, model.lm_head.weight[hours])
    stored_hours = known[:, :-1][at_offset] - first_hour
    stored = F.cross_entropy(stored_logits, stored_hours)
    # Every head pays for looking far; the root makes one busy head cheaper than two half busy ones.
    mass = probe.per_head()
    far = (mass + 1e-4).sqrt().sum()
    total = answer + args.text_weight * text + args.stored_weight * stored + args.far_weight * far

    correct = (logits.argmax(-1) == targets[asked]).float()
    kinds = roles[asked]

    def accuracy(role: int) -> float:
        return correct[kinds == role].mean().item() if (kinds == role).any() else float("nan")

    parts = {
        "answer": answer.item(),
        "text": text.item(),
        "direct": accuracy(arrivals.ROLE_DIRECT),
        "relative": accuracy(arrivals.ROLE_RELATIVE),
        "stored": (stored_logits.argmax(-1) == stored_hours).float().mean().item(),
        "far": mass.sum().item(),
        "far_heads": float((mass > 0.01).sum()),
    }
    return Losses(total, parts)


@torch.no_grad()
def measure(model: LlamaForCausalLM, length: int, first_seed: int, count: int) -> dict[str, float]:
    """Exact match by kind on prompts of their own seeds, one question at a time."""
    hits: dict[str, list[bool]] = {"direct": [], "relative": []}
    seed = first_seed
    while sum(map(len, hits.values())) < count:
        prompt = arrivals.make_prompt(seed, length, 16)
        seed += 1
        context = [arrivals.TOKEN_IDS[arrivals.BOS]]
        for document in prompt.documents:
            context += arrivals.encode(document)
        for question in prompt.questions:
            ids = torch.tensor([context + arrivals.encode(question.text)], device=model.device)
            predicted = model(input_ids=ids, logits_to_keep=1).logits[0, -1].argmax().item()
            hits[question.kind].append(predicted == arrivals.TOKEN_IDS[question.answer])
    every = hits["direct"] + hits["relative"]
    named = {"exact_match": every, **hits}
    return {
        "questions": len(every),
        **{kind: round(float(np.mean(values)), 4) for kind, values in named.items()},
    }


def settled(step: int, args: argparse.Namespace) -> float:
    """How far the last part of training has come: 0 until it begins, 1 at the end."""
    begin = args.steps * (1 - args.settle)
    return max(0.0, (step - begin) / (args.steps - begin))


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm up over 60 steps; while settling fall linearly, to 3 %."""
    return args.lr * min(1.0, (step + 1) / 60) * max(0.03, 1 - settled(step, args))


def train(model: LlamaForCausalLM, args: argparse.Namespace) -> dict[str, float]:
    size = SIZES[args.size]
    generator = torch.Generator().manual_seed(args.seed)
    probe = FarMass(args.far_window, 4, 64, generator, model.device)
    observe_attention(model, probe)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    # A pair of numbers, so that no prompt seed of calibration or evaluation gives this stream.
    rng = np.random.default_rng((7, args.seed))
    stage, moving, steps_in_stage, num_tokens = 0, 0.0, 0, 0
    started, started_cpu = time.time(), time.process_time()
    history: list[dict[str, float]] = []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        now = size.stages[stage]
        draw = arrivals.make_batch
        if size.teaches_all and now.context_tokens >= 256:
            draw = make_task_batch
        batch_size = max(1, round(now.batch_size * args.batch_scale))
        batch = draw(rng, batch_size, now.context_tokens, now.num_questions)
        losses = compute_losses(model, batch, probe, args)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        num_tokens += batch.token_ids.size
        history.append(losses.parts)
        worse = min(losses.parts["direct"], losses.parts["relative"])
        if worse == worse:
            moving = 0.95 * moving + 0.05 * worse
            steps_in_stage += 1
        minutes = (time.time() - started) / 60
        if (step + 1) % 25 == 0:
            shown = {
                name: float(np.nanmean([parts[name] for parts in history])) for name in history[0]
            }
            line = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"step {step + 1} {minutes:.1f} min ctx {now.context_tokens} {line}", flush=True)
            history = []
        last = stage == len(size.stages) - 1
        if moving > GATE and steps_in_stage >= MIN_STEPS_PER_STAGE and not last:
            stage, moving, steps_in_stage = stage + 1, 0.0, 0
            print(f"stage {size.stages[stage]} from step {step + 1}, {minutes:.1f} min", flush=True)
            model.save_pretrained(args.out)
    return {
        "steps": args.steps,
        "tokens": num_tokens,
        "minutes": round((time.time() - started) / 60, 1),
        "cpu_minutes": round((time.process_time() - started_cpu) / 60, 1),
        "last_stage_context_tokens": size.stages[stage].context_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu", help="such as cuda (default cpu)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-scale", type=float, default=1.0, help="times the recipe's batches")
    parser.add_argument("--steps", type=int, help="default: the size's")
    parser.add_argument("--settle", type=float, default=0.5, help="last part: lr falls")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--num-matching", type=int, help="matching heads per layer")
    parser.add_argument("--text-weight", type=float, default=0.1)
    parser.add_argument("--stored-weight", type=float, default=0.5)
    parser.add_argument("--far-weight", type=float, default=0.02)
    parser.add_argument("--far-window", type=int, default=32)
    parser.add_argument("--eval-questions", type=int, default=200)
    args = parser.parse_args()
    size = SIZES[args.size]
    args.steps = args.steps or size.steps
    args.num_matching = args.num_matching or size.num_matching

    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = build_model(size, args.seed, args.num_matching).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    result: dict[str, object] = {"seed": args.seed, **train(model, args)}

    model.eval().half().float()  # measure what is shipped
    model.set_attn_implementation("sdpa")
    result["dense"] = {
        str(length): measure(model, length, 150_000, args.eval_questions)
        for length in [stage.context_tokens for stage in size.stages if stage.context_tokens >= 256]
    }
    for length, numbers in result["dense"].items():  # type: ignore[attr-defined]
        print(length, numbers, flush=True)
    model.cpu().half().save_pretrained(args.out)
    arrivals.build_tokenizer().save_pretrained(args.out)
    usual = {**vars(parser.parse_args(["--out", "DIR"])), "steps": size.steps}
    usual |= {"num_matching": size.num_matching, "out": args.out}
    options = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(args).items()
        if name == "seed" or value != usual[name]
    ]
    result |= {
        "command": " ".join(["python examples/demo_model/train.py", *options, "--out DIR"]),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
    }
    (args.out / "training.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
