"""Engine, profiling and the drop-in on a GPU; without one on tensors that only say so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pretend_cuda import FREE_BYTES, move, pretend_cuda
from test_cuda_ops import pytestmark as needs_gpu
from tiny_models import GEMMA2, random_tokens, tiny_model
from torch import Tensor

from redknot import Engine, HeadMap, InputError, ModelError, attach, ops, profile_heads
from redknot.recovery import CacheBlend, Dense, DuoAttention, Epic, LiveSpan, Naive, RedKnot

pytestmark = pytest.mark.transformers

NUM_LAYERS, NUM_KV_HEADS = 3, 2


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=needs_gpu)])
def to_gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Moves a model."""
    if request.param == "cuda":
        yield lambda model: model.to("cuda")
    else:
        with pretend_cuda():
            yield move


def half_model(family: str = "llama", **options: Any) -> Any:
    return tiny_model(family, 4, NUM_KV_HEADS, dtype=torch.float16, **options)


def hugging_face_logits(token_ids: list[int], family: str, **options: Any) -> Tensor:
    """Of the same weights, in fp32 on the CPU, at every position."""
    model = half_model(family, **options).float()
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]


def assert_close(logits: Tensor, expected: Tensor, tolerance: float = 2e-2) -> None:
    logits = logits.float().cpu()
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


def mixed_heads(local: str = "local") -> HeadMap:
    classes = [["global", local], [local, "global"], [local, local]]
    return HeadMap(classes, window=24, sink=4)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 24}),
        ("gemma2", GEMMA2),
    ],
)
def test_exact_mode_is_hugging_face(to_gpu: Any, family: str, options: dict[str, Any]) -> None:
    expected_of = lambda ids: hugging_face_logits(ids, family, **options)  # noqa: E731
    engine = Engine(to_gpu(half_model(family, **options)), kv_budget="32MiB")
    assert engine.pool.k_cache.device.type == "cuda"
    rng = np.random.default_rng(1)
    documents = [engine.add(random_tokens(rng, n)) for n in (37, 130, 61)]
    answer = engine.generate(documents[::-1], random_tokens(rng, 7), max_new_tokens=12)
    expected = expected_of(answer.prompt_token_ids + answer.token_ids)[-13:-1]
    assert_close(answer.first_logits, expected[0])
    # Every token chosen is the best of fp32, or as good.
    best = expected.max(-1).values
    chosen = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    assert (best - chosen <= 4e-2 * expected.abs().max()).all()


# Picks follow from values that differ in the last bits between devices: those keep every row.
POLICIES = {
    "dense": Dense(),
    "naive": Naive(),
    "epic": Epic(first_rows=4),
    "cacheblend": CacheBlend(ratio=1.0),
    "duo": DuoAttention(),
    "redknot": RedKnot(boundary_rows=3),
    "sparse ffn": RedKnot(dense_until=1, ffn_mass=1.0, recent_n=2),
    "live span": LiveSpan(row_fraction=1.0, edge_rows=2),
    "live span, foreign": LiveSpan(row_fraction=1.0, ffn_mass=1.0),
}
PICKING = {
    "cacheblend": CacheBlend(ratio=0.3),
    "sparse ffn": RedKnot(dense_until=1, ffn_mass=0.3, recent_n=2),
    "live span": LiveSpan(row_fraction=0.2, edge_rows=3),
    "live span, sparse ffn": LiveSpan(row_fraction=0.4, ffn_mass=0.6, boundary_rows=2),
}


def prefill(model: Any, policy: Any) -> Any:
    with Engine(model, mixed_heads(), policy=policy, kv_budget="32MiB", page_size=16) as engine:
        rng = np.random.default_rng(3)
        documents = [engine.add(random_tokens(rng, n)) for n in (23, 70, 41)]
        return engine.prefill(documents[::-1], random_tokens(rng, 6))


@pytest.mark.parametrize("name", POLICIES)
def test_policies_agree_with_the_cpu(to_gpu: Any, name: str) -> None:
    ours = prefill(to_gpu(half_model()), POLICIES[name])
    expected = prefill(half_model(), POLICIES[name])
    assert_close(ours.logits, expected.logits.float())
    assert ours.ledger.parts == expected.ledger.parts


@pytest.mark.parametrize("name", PICKING)
def test_policies_that_pick_rows_do_as_much_as_on_the_cpu(to_gpu: Any, name: str) -> None:
    ours = prefill(to_gpu(half_model()), PICKING[name])
    expected = prefill(half_model(), PICKING[name])
    assert torch.isfinite(ours.logits.cpu()).all()
    saved, saved_there = ours.ledger.saved, expected.ledger.saved
    assert abs(saved - saved_there) < 0.05


def test_requests_in_one_batch_stream_and_sample(to_gpu: Any) -> None:
    engine = Engine(to_gpu(half_model()), mixed_heads("retrieval"), kv_budget="32MiB")
    rng = np.random.default_rng(4)
    documents = [engine.add(random_tokens(rng, n)) for n in (90, 30)]
    questions = [random_tokens(rng, n) for n in (5, 9)]
    alone = [engine.generate(documents, q, max_new_tokens=8).token_ids for q in questions]
    together = engine.generate_shared(documents, questions, max_new_tokens=8)
    assert [len(answer.token_ids) for answer in together] == [len(ids) for ids in alone]
    sampled = engine.generate(
        documents, questions[0], max_new_tokens=8, temperature=0.8, top_p=0.9, seed=1
    )
    assert len(sampled.token_ids) == 8


def test_sessions_swap_and_segments_move_through_a_store(to_gpu: Any, tmp_path: Any) -> None:
    rng = np.random.default_rng(5)
    text, question = random_tokens(rng, 100), random_tokens(rng, 5)
    store = f"lmdb://{tmp_path}/segments"
    model = to_gpu(half_model())
    logits = []
    for _ in range(2):  # the second engine reads what the first one wrote
        with Engine(model, mixed_heads(), kv_budget="32MiB", store=["mem:", store]) as engine:
            document = engine.add(text)
            logits.append(engine.prefill([document], question).logits.cpu())
            engine.flush()
    assert torch.equal(*logits)
    pool = engine.pool
    session = pool.allocator.create_session(
        np.full((3, 2), -1, np.int32), np.zeros((3, 2), np.int32)
    )
    pool.allocator.append_tokens([session], [40], expire_first=False)
    slots = torch.from_numpy(pool.allocator.tail_slots(session, 0, 40)).to(pool.device)
    pool.write(*(torch.randn(40, 2, 32, device=pool.device).half() for _ in "kv"), slots)
    before = pool.read(slots)[0].cpu()
    assert pool.swap_out([session]) > 0 and pool.swap_in(session) > 0
    after = torch.from_numpy(pool.allocator.tail_slots(session, 0, 40)).to(pool.device)
    assert torch.equal(pool.read(after)[0].cpu(), before)


def test_heads_are_profiled(to_gpu: Any) -> None:
    rng = np.random.default_rng(6)
    rows = [
        {"documents": [random_tokens(rng, 40) for _ in range(3)], "question": random_tokens(rng, 4),
         "answer": random_tokens(rng, 3)}
        for _ in range(2)
    ]  # fmt: skip
    options = {"window": 16, "mass_rows": 16}
    ours = profile_heads(to_gpu(half_model()), None, rows, **options)
    there = profile_heads(half_model(), None, rows, **options)
    np.testing.assert_allclose(ours.edge_mass(), there.edge_mass(), atol=2e-2)
    np.testing.assert_allclose(ours.kl, there.kl, rtol=0.2, atol=2e-2)
    ours.classify(global_fraction=0.3)


def test_the_drop_in_generates(to_gpu: Any) -> None:
    ids = random_tokens(np.random.default_rng(7), 60)
    model = to_gpu(half_model())
    with attach(model, HeadMap.all_global(NUM_LAYERS, NUM_KV_HEADS)), torch.no_grad():
        logits = model(torch.tensor([ids], device=model.device)).logits[0]
    assert_close(logits, hugging_face_logits(ids, "llama"))


def test_the_default_budget_is_of_the_gpus_memory() -> None:
    with pretend_cuda():
        engine = Engine(move(half_model()))
    assert engine.pool.k_cache.nbytes + engine.pool.v_cache.nbytes == FREE_BYTES // 4


def test_a_pretended_gpu_refuses_what_a_gpu_does() -> None:
    with pretend_cuda():
        there, here = torch.ones(3, 2, device="cuda:0"), torch.ones(3, 2)
        row = torch.tensor([1])
        for wrong in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: here[row.to("cuda:0")],
            lambda: there.index_copy_(0, row, there[:1]),
            lambda: there.__setitem__(row, here[:1]),
            lambda: ops.token_importance(there[None]) + torch.ones(1),
            lambda: ops.merge_states(there[None], here, there[None], here),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        there[row] += 1  # an index of the host is fine, and so is a number
        assert (there[1] + torch.tensor(1.0)).tolist() == [3.0, 3.0]
        assert there.cpu().device.type == "cpu" and there.device.type == "cuda"


def test_what_has_no_kernel_is_refused_by_name(to_gpu: Any) -> None:
    with pytest.raises(ModelError, match=r"computes in bfloat16 and float16.*float32"):
        Engine(to_gpu(tiny_model("llama", 4, 2)), kv_budget="32MiB")


def test_a_build_without_cuda_says_so() -> None:
    with pretend_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "has_cuda_kernels", lambda: False)
        with pytest.raises(ModelError, match=r"on cuda:0, but redknot was built without CUDA"):
            Engine(move(half_model()), kv_budget="32MiB")


@needs_gpu[0]
@needs_gpu[1]
@needs_gpu[2]
def test_page_sizes_that_have_no_kernel_are_refused() -> None:
    with pytest.raises(InputError, match="page_size must be a multiple of 8 up to 256 on CUDA"):
        Engine(half_model().to("cuda"), kv_budget="32MiB", page_size=20)
