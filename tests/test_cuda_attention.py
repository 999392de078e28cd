"""SegPagedAttention on a GPU against the CPU tests' oracle; `-k small`: for compute-sanitizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from paged_case import Run, assert_close, paged_rows, raises
from reference.attention import Rows, attention
from test_cuda_ops import pytestmark  # noqa: F401  (the same conditions)
from test_op_attention import INTERLEAVED, REACH, ragged
from torch import Tensor

from redknot import ops
from redknot.eval.bench.options import cuda_arch, is_hopper

DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16]


def moved(rows: Rows) -> Rows:
    return Rows(*(tensor.to(DEVICE) for tensor in rows.args()))


def run(rows: Rows, **options: object) -> tuple[Tensor, Tensor]:
    """Results on the CPU, of a call on the GPU."""
    on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    out, lse = ops.seg_paged_attention(*moved(rows).args(), return_lse=True, **on_device)
    return out.cpu(), lse.cpu()


def check(rows: Rows, **options: object) -> None:
    out, lse = run(rows, **options)
    exact, exact_lse = attention(rows, torch.float64, **options)
    peer, peer_lse = attention(rows, rows.q.dtype, **options)
    assert_close(out, exact, peer)
    assert_close(lse, exact_lse, peer_lse, floor=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "head_dim", "page_size"),
    [
        pytest.param(1, 64, 16, id="small"),
        (4, 128, 64),
        (8, 32, 48),
        (2, 256, 256),
        (5, 128, 128),
        (71, 64, 32),
        (4, 128, 8),
        (2, 64, 24),
    ],
)
def test_ragged_rows(dtype: torch.dtype, group: int, head_dim: int, page_size: int) -> None:
    check(ragged(dtype, group, head_dim, page_size))


@pytest.mark.parametrize("case", REACH)
@pytest.mark.parametrize("group", [1, 4])
def test_small_reach(case: str, group: int) -> None:
    keys, queries, window, sink = REACH[case]
    check(
        paged_rows([keys], [queries], group=group, window=window, sink=sink, dtype=torch.bfloat16)
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles_and_splits(dtype: torch.dtype, head_dim: int) -> None:
    rows = paged_rows(
        [[(0, 5000, 0)], [(0, 64, 0), (4000, 1000, 0)], [(0, 1030, 0)], [(0, 1024, 0)]],
        [[4999], range(700, 1030)],
        group=4,
        head_dim=head_dim,
        page_size=32,
        window=[-1, 500, -1, 130],
        sink=[0, 64, 0, 70],
        dtype=dtype,
    )
    check(rows)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [8, 16, 24, 128])
@pytest.mark.parametrize(
    "queries", [range(380, 510), range(506, 510), [509]], ids=["prefill", "verify", "decode"]
)
def test_small_kernels_of_both_architectures_agree(
    dtype: torch.dtype, head_dim: int, page_size: int, queries: Sequence[int]
) -> None:
    if not is_hopper(DEVICE):
        pytest.skip("this GPU has only one of them")
    document: list[Run] = [(0, 300, 0), (300, 170, 300), (470, 40, 0)]
    inv_freq = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    rows = paged_rows(
        [document, [(0, 64, 0), (400, 110, 0)]],
        [queries],
        group=4,
        head_dim=head_dim,
        page_size=page_size,
        window=[-1, 100],
        sink=[0, 60],
        dtype=dtype,
    )
    outs = []
    for arch in ("sm_90a", "sm_80"):
        with cuda_arch(arch):
            check(rows, inv_freq=inv_freq)
            outs.append(run(rows, inv_freq=inv_freq)[0])
    torch.testing.assert_close(*outs, rtol=2e-2, atol=2e-2)


def test_pages_that_the_copy_engine_cannot_describe() -> None:
    rows = moved(ragged(torch.bfloat16, 4, 128, 32))
    expected, _ = ops.seg_paged_attention(*rows.args())
    # Slots outside, pages inside: no tensor map has such strides.
    caches = [cache.transpose(0, 1).contiguous().transpose(0, 1) for cache in
              (rows.k_cache, rows.v_cache)]  # fmt: skip
    out, _ = ops.seg_paged_attention(*replace(rows, k_cache=caches[0], v_cache=caches[1]).args())
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_a_question_over_a_long_context_is_split() -> None:
    check(
        paged_rows(
            [[(0, 9000, 0)]],
            [range(8960, 9000)],
            group=2,
            head_dim=128,
            page_size=64,
            dtype=torch.bfloat16,
        )
    )


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 96), (256, 256)])
def test_small_segments_that_moved(head_dim: int, rotary_dim: int) -> None:
    document: list[Run] = [(0, 10, 0), (10, 170, 10), (180, 145, 180), (325, 20, 0)]
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    rows = paged_rows(
        [document, document],
        [range(325, 345), [344]],
        group=4,
        head_dim=head_dim,
        dtype=torch.bfloat16,
    )
    check(rows, inv_freq=inv_freq)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 40), (128, 128)])
def test_small_interleaved_pairs_that_moved(head_dim: int, rotary_dim: int) -> None:
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    rows = paged_rows(
        [INTERLEAVED] * 2,
        [range(125, 145), [144]],
        group=4,
        head_dim=head_dim,
        dtype=torch.bfloat16,
    )
    check(rows, inv_freq=inv_freq, rope_interleaved=True)


@pytest.mark.parametrize("softcap", [0.5, 10.0, 500.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_soft_caps(dtype: torch.dtype, softcap: float) -> None:
    check(ragged(dtype, 4, 64), softcap=softcap, softmax_scale=1.0)
    check(ragged(dtype, 1, 128), softcap=softcap)


def test_small_empty_rows_and_sequences() -> None:
    rows = paged_rows(
        [[], [(0, 9, 0)], [(0, 3, 0)], [], [(0, 5, 0)], [(0, 5, 0)]],
        [range(9), [], [4]],
        group=2,
        dtype=torch.bfloat16,
    )
    check(rows)
    out, lse = run(paged_rows([], [], dtype=torch.bfloat16))
    assert out.numel() == 0 and lse.numel() == 0


def test_small_views_are_used_in_place() -> None:
    rows = moved(ragged(torch.bfloat16, 4, 64))
    expected, _ = ops.seg_paged_attention(*rows.args())
    fused = torch.cat([rows.k_cache, rows.v_cache], -1)
    qkv = torch.randn(rows.q.shape[0], 3 * rows.q.shape[1], 64, device=DEVICE).to(torch.bfloat16)
    qkv[:, : rows.q.shape[1]] = rows.q
    views = replace(
        rows, q=qkv[:, : rows.q.shape[1]], k_cache=fused[..., :64], v_cache=fused[..., 64:]
    )
    out = torch.empty(rows.q.shape[0], 2 * rows.q.shape[1], 64, device=DEVICE, dtype=torch.bfloat16)
    result, _ = ops.seg_paged_attention(*views.args(), out=out[:, ::2])
    assert torch.equal(result, expected)


def plan_of(rows: Rows) -> Tensor:
    return ops.seg_paged_plan(
        rows.row_indptr,
        rows.cu_seqlens_q,
        rows.q_positions,
        rows.row_window,
        rows.row_sink,
        rows.q.shape[1],
        rows.k_cache.shape[1],
    )


def test_small_a_plan_and_repetition_change_no_bit() -> None:
    rows = moved(ragged(torch.bfloat16, 4, 128))
    first = ops.seg_paged_attention(*rows.args(), return_lse=True)
    for plan in (None, plan_of(rows), None):
        again = ops.seg_paged_attention(*rows.args(), plan=plan, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_small_plans_of_all_layers_come_from_one_launch() -> None:
    layers = [moved(ragged(torch.bfloat16, 4, 64, page)) for page in (16, 32)]
    lists = [
        torch.stack([getattr(rows, name) for rows in layers])
        for name in ("row_indptr", "row_window", "row_sink")
    ]
    rows = layers[0]
    plans = ops.seg_paged_plan(
        lists[0], rows.cu_seqlens_q, rows.q_positions, lists[1], lists[2], rows.q.shape[1], 16
    )
    expected, _ = ops.seg_paged_attention(*rows.args())
    out, _ = ops.seg_paged_attention(*rows.args(), plan=plans[0])
    assert torch.equal(out, expected)


def growing(length: int, capacity: int) -> Rows:
    """One decoding sequence of a global and a local row; shapes do not depend on `length`."""
    rows = paged_rows(
        [[(0, capacity, 0)], [(0, capacity, 0)]],
        [[length - 1]],
        group=4,
        head_dim=128,
        page_size=64,
        window=[-1, 100],
        sink=[0, 4],
        dtype=torch.bfloat16,
    )
    refs = rows.page_refs.view(2, -1, 4)
    refs[..., 2] = (length - refs[..., 1]).clamp(0, 64)
    return rows


def test_small_a_captured_graph_follows_the_lengths() -> None:
    rows = moved(growing(100, 4096))
    inputs = rows.args()

    def step() -> tuple[Tensor, Tensor]:
        return ops.seg_paged_attention(*inputs, plan=plan_of(rows), return_lse=True)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # kernels are loaded before the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for length in (1, 100, 1500, 4096):
        now = growing(length, 4096)
        for held, value in zip(inputs, now.args(), strict=True):
            held.copy_(value)
        graph.replay()
        eager = step()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))
        exact, _ = attention(now)
        peer, _ = attention(now, torch.bfloat16)
        assert_close(replayed[0].cpu(), exact, peer)


def dense(rows: Rows, row: int, head_dim: int) -> Tensor:
    """fp32 attention of one row with one query, on the GPU."""
    begin, end = rows.row_indptr[row : row + 2].tolist()
    refs = rows.page_refs[begin:end].long()
    slots = torch.arange(rows.k_cache.shape[1], device=DEVICE)
    valid = slots < refs[:, 2, None]
    k, v = (cache[refs[:, 0]][valid].float() for cache in (rows.k_cache, rows.v_cache))
    num_kv_heads = rows.row_window.numel() // rows.q.shape[0]
    seq, kv_head = divmod(row, num_kv_heads)
    group = rows.q.shape[1] // num_kv_heads
    q = rows.q[seq, kv_head * group : (kv_head + 1) * group].float()
    return torch.softmax(q @ k.T * head_dim**-0.5, -1) @ v


def decode_rows(lengths: Sequence[int], num_kv_heads: int, num_pages: int, first_page: int) -> Rows:
    """Global rows of one query each; pages are taken from `first_page` on."""
    group, head_dim, page_size = 4, 128, 64
    num_seqs = len(lengths) // num_kv_heads
    pages_of = [-(-length // page_size) for length in lengths]
    refs = torch.zeros(sum(pages_of), 4, dtype=torch.int32)
    refs[:, 0] = torch.arange(len(refs)) + first_page
    at = 0
    for length, count in zip(lengths, pages_of, strict=True):
        first = torch.arange(count) * page_size
        refs[at : at + count, 1] = first
        refs[at : at + count, 2] = (length - first).clamp(max=page_size)
        at += count
    shape = (num_pages, page_size, head_dim)
    caches = [torch.empty(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for cache in caches:
        cache[first_page:].normal_()
    per_row = torch.zeros(len(lengths), dtype=torch.int32)
    positions = torch.tensor(lengths).view(num_seqs, num_kv_heads).amax(1).int() - 1
    q = torch.randn(num_seqs, num_kv_heads * group, head_dim, device=DEVICE).to(torch.bfloat16)
    return moved(
        Rows(
            q=q,
            k_cache=caches[0],
            v_cache=caches[1],
            row_indptr=torch.tensor([0, *pages_of]).cumsum(0).int(),
            page_refs=refs,
            cu_seqlens_q=torch.arange(num_seqs + 1).int(),
            q_positions=positions,
            row_window=per_row - 1,
            row_sink=per_row,
        )
    )


def assert_rows_match(rows: Rows, picked: Sequence[int]) -> None:
    out, _ = ops.seg_paged_attention(*rows.args())
    num_kv_heads = rows.row_window.numel() // rows.q.shape[0]
    group = rows.q.shape[1] // num_kv_heads
    for row in picked:
        seq, kv_head = divmod(row, num_kv_heads)
        got = out[seq, kv_head * group : (kv_head + 1) * group].float()
        torch.testing.assert_close(got, dense(rows, row, 128), rtol=2e-2, atol=2e-3)


def test_a_thousand_rows_of_lengths_to_128k() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 400, (1200,), generator=generator).tolist()
    lengths[5], lengths[700], lengths[1199] = 131072, 70001, 20000
    num_pages = sum(-(-length // 64) for length in lengths)
    rows = decode_rows(lengths, 8, num_pages, 0)
    assert_rows_match(rows, [0, 5, 6, 699, 700, 1198, 1199])


def test_addresses_above_2_to_the_31_elements() -> None:
    num_pages = 2**31 // (64 * 128) + 100
    if torch.cuda.mem_get_info()[0] < 2.2 * num_pages * 64 * 128 * 2:
        pytest.skip("not enough free GPU memory")
    rows = decode_rows([3000, 500], 2, num_pages, num_pages - 60)
    assert_rows_match(rows, [0, 1])


def test_small_what_has_no_kernel_is_refused_by_name() -> None:
    def refused(message: str, rows: Rows, **options: object) -> None:
        with raises(f"seg_paged_attention: {message}"):
            run(rows, **options)

    def rows_of(head_dim: int, page_size: int, dtype: torch.dtype) -> Rows:
        return ragged(dtype, 2, head_dim, page_size)

    refused("k_cache must be bfloat16 or float16 on CUDA", rows_of(64, 16, torch.float32))
    refused("head_dim must be 32, 64, 128 or 256", rows_of(96, 16, torch.bfloat16))
    refused("page_size must be a multiple of 8", rows_of(64, 12, torch.bfloat16))
    good = rows_of(64, 16, torch.bfloat16)
    refused("softcap must be positive, or 0 for none, got -30", good, softcap=-30.0)
    refused("softmax_scale must be positive on CUDA", good, softmax_scale=-1.0)
    refused("plan does not fit this call", good, plan=torch.zeros(9, dtype=torch.int32))
    odd = torch.zeros(*good.k_cache.shape[:2], 65, dtype=torch.bfloat16, device=DEVICE)
    with raises("seg_paged_attention: k_cache must start at a multiple of 16 bytes"):
        ops.seg_paged_attention(*replace(moved(good), k_cache=odd[..., 1:]).args())


def test_small_validate_finds_bad_values() -> None:
    rows = moved(ragged(torch.bfloat16, 2, 64))
    rows.page_refs[0, 0] = rows.k_cache.shape[0]
    with raises("seg_paged_attention: page_refs[0] must name a page below num_pages"):
        ops.seg_paged_attention(*rows.args(), validate=True)
