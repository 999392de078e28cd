"""seg_paged_attention against a dense oracle: shapes, reach, hostile memory, exact repetition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_case import DTYPES, assert_close, isas, paged_rows, plan_of, use_isa, use_threads
from reference.attention import Rows, attention, rotate

from redknot import ops


def check(rows: Rows, **options: object) -> None:
    out, lse = ops.seg_paged_attention(*rows.args(), return_lse=True, **options)
    exact, exact_lse = attention(rows, torch.float64, **options)
    peer, peer_lse = attention(rows, rows.q.dtype, **options)
    assert out.dtype == rows.q.dtype and lse.dtype == torch.float32
    assert_close(out, exact, peer)
    assert_close(lse, exact_lse, peer_lse, floor=2e-5)


def ragged(dtype: torch.dtype, group: int, head_dim: int, page_size: int = 16) -> Rows:
    """Two sequences of two KV heads: a global and a local row each, prefill beside decode."""
    return paged_rows(
        [[(0, 75, 0)], [(0, 4, 0), (32, 43, 0)], [(0, 200, 0)], [(0, 8, 0), (150, 50, 0)]],
        [range(38, 75), [199]],
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        window=[-1, 20, -1, 33],
        sink=[0, 4, 0, 8],
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "head_dim"),
    [(1, 64), (4, 128), (8, 32), (4, 40), (2, 256), (3, 8), (12, 96), (71, 16)],
)
def test_ragged_rows(dtype: torch.dtype, group: int, head_dim: int) -> None:
    check(ragged(dtype, group, head_dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    with use_isa(isa):
        check(ragged(dtype, 4, 40))
        check(ragged(dtype, 8, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
def test_scores_that_rise_with_every_key(isa: str, dtype: torch.dtype) -> None:
    rows = paged_rows([[(0, 300, 0)]], [range(60, 300)], group=2)
    rows.q[:] = torch.linspace(0.2, 1.0, 32)
    steps = torch.linspace(-20, 60, 300).unsqueeze(1) + torch.randn(300, 32)
    for page, first, valid, _ in rows.page_refs.tolist():
        rows.k_cache[page, :valid] = steps[first : first + valid]
    floats = ("q", "k_cache", "v_cache")
    with use_isa(isa):
        check(replace(rows, **{name: getattr(rows, name).to(dtype) for name in floats}))


# More keys than any kernel takes at once; some fall so far behind that their weight is nothing.
@pytest.mark.parametrize("fall", [0.0, 400.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
def test_thousands_of_keys(isa: str, dtype: torch.dtype, fall: float) -> None:
    rows = paged_rows(
        [[(0, 2350, 0)], [(0, 2350, 0)]],
        [range(2313, 2350)],
        group=3,
        head_dim=64,
        page_size=48,
        window=[-1, 1200],
        sink=[0, 70],
        dtype=dtype,
    )
    for page, first, valid, _ in rows.page_refs.tolist():
        lost = (torch.arange(first, first + valid) % 7 == 3).unsqueeze(1)
        rows.k_cache[page, :valid] -= (fall / 8 * lost).to(dtype)
    rows.q.abs_()
    with use_isa(isa):
        check(rows)


@pytest.mark.parametrize("isa", isas())
def test_queries_in_a_gap_of_the_keys(isa: str) -> None:
    # Those amid see nothing; so many that a tile of queries holds all three kinds.
    queries = [*range(10, 14), *range(500, 504), *range(1000, 2016)]
    rows = paged_rows(
        [[(0, 32, 0), (1000, 32, 0)]], [queries], group=8, head_dim=64, window=[100], sink=[0],
        dtype=torch.bfloat16,
    )  # fmt: skip
    with use_isa(isa):
        check(rows)
        assert not ops.seg_paged_attention(*rows.args())[0][4:8].any()


# Caps that bend every score, some scores, and hardly any; the products here reach 30.
@pytest.mark.parametrize("softcap", [0.5, 10.0, 500.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
def test_soft_caps(isa: str, dtype: torch.dtype, softcap: float) -> None:
    with use_isa(isa):
        check(ragged(dtype, 4, 64), softcap=softcap, softmax_scale=1.0)
        check(ragged(dtype, 1, 40), softcap=softcap, softmax_scale=-0.5)


INTERLEAVED = [(0, 10, 0), (10, 70, 10), (80, 45, -80), (125, 20, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [64, 40])
def test_interleaved_pairs_that_moved(dtype: torch.dtype, rotary_dim: int) -> None:
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    rows = paged_rows(
        [INTERLEAVED] * 2, [range(125, 145), [144]], group=4, head_dim=64, dtype=dtype
    )
    check(rows, inv_freq=inv_freq, rope_interleaved=True)


@pytest.mark.parametrize("isa", isas())
def test_longest_tiles_of_queries(isa: str) -> None:
    rows = paged_rows(
        [[(0, 530, 0)]],
        [range(18, 530)],
        group=32,
        page_size=64,
        window=300,
        sink=10,
        dtype=torch.bfloat16,
    )
    with use_isa(isa):
        check(rows)
        check(replace(rows, row_window=torch.tensor([-1], dtype=torch.int32)))


# Keys of one row, query positions, window, sink.
REACH = {
    "one_token": ([(0, 1, 0)], [0], -1, 0),
    "page_border_before": ([(0, 15, 0)], range(15), -1, 0),
    "page_border_on": ([(0, 16, 0)], range(16), -1, 0),
    "page_border_behind": ([(0, 17, 0)], range(17), -1, 0),
    "window_of_one": ([(0, 50, 0)], range(50), 1, 0),
    "window_and_page_apart": ([(0, 100, 0)], range(100), 23, 0),
    "window_longer_than_text": ([(0, 40, 0)], range(40), 100, 4),
    "sink_overlaps_window": ([(0, 60, 0)], range(60), 40, 30),
    "sink_inside_page": ([(0, 90, 0)], range(90), 8, 5),
    "sink_longer_than_text": ([(0, 20, 0)], range(20), 3, 64),
    "sink_alone": ([(0, 70, 0)], range(70), 0, 4),
    "gap_behind_sink": ([(0, 5, 0), (64, 40, 0)], range(80, 104), 30, 5),
    "queries_in_the_middle": ([(0, 90, 0)], range(30, 50), 16, 2),
    "queries_with_gaps": ([(0, 90, 0)], [0, 1, 17, 40, 41, 89], -1, 0),
    "queries_before_all_keys": ([(50, 20, 0)], range(40, 60), -1, 0),
    "queries_far_apart": ([(0, 900, 0)], range(3, 900, 13), 70, 4),
    "queries_far_apart_in_page": ([(0, 333, 0)], range(5, 333, 9), 21, 0),
    "keys_behind_window": ([(0, 20, 0)], range(60, 70), 10, 0),
    "far_positions": ([(2_000_000_000, 40, 0)], range(2_000_000_020, 2_000_000_040), 9, 0),
}


@pytest.mark.parametrize("case", REACH)
@pytest.mark.parametrize("group", [1, 4])
def test_reach(case: str, group: int) -> None:
    keys, queries, window, sink = REACH[case]
    check(paged_rows([keys], [queries], group=group, window=window, sink=sink))


def test_many_tiles_of_queries_and_keys() -> None:
    rows = paged_rows(
        [[(0, 700, 0)], [(0, 700, 0)]],
        [range(300, 700)],
        group=5,
        head_dim=24,
        page_size=48,
        window=[-1, 130],
        sink=[0, 70],
        dtype=torch.bfloat16,
    )
    check(rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_over_splits(dtype: torch.dtype) -> None:
    rows = paged_rows(
        [[(0, 2500, 0)], [(0, 64, 0), (1900, 600, 0)], [(0, 1030, 0)], [(0, 1024, 0)]],
        [[2499], [1030]],
        group=4,
        head_dim=64,
        page_size=32,
        window=[-1, 500, -1, 700],
        sink=[0, 64, 0, 0],
        dtype=dtype,
    )
    check(rows)


def test_empty_rows_and_sequences() -> None:
    rows = paged_rows(
        [[], [(0, 9, 0)], [(0, 3, 0)], [], [(0, 5, 0)], [(0, 5, 0)]], [range(9), [], [4]], group=2
    )
    check(rows)
    out, lse = ops.seg_paged_attention(*rows.args(), return_lse=True)
    assert (out[:9, :2] == 0).all() and (lse[:2, :9] == -torch.inf).all()


@pytest.mark.parametrize("queries", [[[]], []])
def test_no_queries(queries: list[list[int]]) -> None:
    rows = paged_rows([[(0, 9, 0)] * len(queries)] * len(queries), queries)
    out, lse = ops.seg_paged_attention(*rows.args(), return_lse=True)
    assert out.shape == rows.q.shape and lse.shape == (rows.q.shape[1], 0)


@pytest.mark.parametrize("scale", [0.5, -0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_scale(scale: float, dtype: torch.dtype) -> None:
    check(ragged(dtype, 4, 32), softmax_scale=scale)


def test_large_scores() -> None:
    rows = ragged(torch.float32, 4, 32)
    check(replace(rows, q=rows.q * 1000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("group", [1, 16])
def test_visible_nan_and_infinity_come_out(group: int, isa: str, dtype: torch.dtype) -> None:
    rows = paged_rows([[(0, 40, 0)]], [range(40)], group=group, dtype=dtype)
    page = rows.page_refs[1, 0]
    for value in (torch.nan, torch.inf):
        rows.k_cache[page, 4] = value  # position 20
        with use_isa(isa):
            out, _ = ops.seg_paged_attention(*rows.args())
        assert out[:20].isfinite().all() and not out[20:].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
def test_infinite_value_spoils_its_dimension_alone(isa: str, dtype: torch.dtype) -> None:
    rows = paged_rows([[(0, 40, 0)]], [range(30, 32)], group=4, head_dim=64, dtype=dtype)
    rows.v_cache[rows.page_refs[1, 0], 4, [6, 9]] = torch.inf  # position 20
    with use_isa(isa):
        check(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [32, 20, 2])
def test_rotation_offsets(dtype: torch.dtype, rotary_dim: int) -> None:
    inv_freq = 1e4 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    rows = paged_rows(
        [[(0, 10, 0), (10, 40, 10), (50, 33, -7), (83, 20, 10)], [(0, 103, 0)]],
        [[3, *range(80, 103)]],
        group=4,
        dtype=dtype,
        window=[-1, 30],
        sink=[0, 2],
    )
    check(rows, inv_freq=inv_freq)
    decode = replace(
        rows,
        q=rows.q[-1:],
        q_positions=rows.q_positions[-1:],
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
    )
    check(decode, inv_freq=inv_freq)


def test_rotation_offset_equals_moved_keys() -> None:
    inv_freq = 1e4 ** (-torch.arange(0, 32, 2) / 32)
    rows = paged_rows([[(0, 10, 0), (10, 60, 3000)]], [range(40, 70)], group=2)
    out, _ = ops.seg_paged_attention(*rows.args(), inv_freq=inv_freq)
    moved = rows.k_cache.double()
    for page, _, _, offset in rows.page_refs.tolist():
        moved[page] = rotate(moved[page], offset, inv_freq)
    still = rows.page_refs.clone()
    still[:, 3] = 0
    want, _ = ops.seg_paged_attention(*replace(rows, k_cache=moved.float(), page_refs=still).args())
    torch.testing.assert_close(out, want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("isa", isas())
def test_page_numbers_do_not_matter(isa: str) -> None:
    rows = ragged(torch.bfloat16, 4, 64)
    order = torch.randperm(len(rows.k_cache))
    refs = rows.page_refs.clone()
    refs[:, 0] = torch.argsort(order)[refs[:, 0].long()]
    moved = replace(rows, k_cache=rows.k_cache[order], v_cache=rows.v_cache[order], page_refs=refs)
    with use_isa(isa):
        out, lse = ops.seg_paged_attention(*rows.args(), return_lse=True)
        again = ops.seg_paged_attention(*moved.args(), return_lse=True)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
def test_threads_plans_and_runs_agree_bitwise(isa: str, dtype: torch.dtype) -> None:
    with use_isa(isa):
        check_bitwise(dtype)


def check_bitwise(dtype: torch.dtype) -> None:
    rows = paged_rows(
        [[(0, 1500, 0)], [(0, 400, 0)], [(0, 300, 0)], [(0, 90, 0)]],
        [[1499], range(100, 300)],
        group=4,
        head_dim=64,
        dtype=dtype,
        window=[-1, 60, 64, -1],
    )
    results = []
    for threads in (1, 2, 2):
        with use_threads(threads):
            results.append(ops.seg_paged_attention(*rows.args(), return_lse=True))
    for workers in (1, 3, 64):
        results.append(
            ops.seg_paged_attention(*rows.args(), plan=plan_of(rows, workers), return_lse=True)
        )
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_plan_outlives_appended_tokens() -> None:
    rows = paged_rows([[(0, 50, 0)], [(0, 50, 0)]], [[44]], group=2)
    plan = plan_of(rows)
    for position in range(45, 50):
        step = replace(rows, q_positions=torch.tensor([position], dtype=torch.int32))
        want, _ = ops.seg_paged_attention(*step.args())
        got, _ = ops.seg_paged_attention(*step.args(), plan=plan)
        assert torch.equal(got, want)


def test_strided_views() -> None:
    rows = ragged(torch.bfloat16, 4, 64)
    want, want_lse = ops.seg_paged_attention(*rows.args(), return_lse=True)
    tokens, heads, dim = rows.q.shape
    qkv = torch.full((tokens, heads + 4, dim), torch.nan, dtype=rows.q.dtype)
    qkv[:, :heads] = rows.q
    pages, page_size, _ = rows.k_cache.shape
    kv = torch.full((pages, page_size, 2 * dim), torch.nan, dtype=rows.q.dtype)
    kv[..., :dim], kv[..., dim:] = rows.k_cache, rows.v_cache
    views = replace(rows, q=qkv[:, :heads], k_cache=kv[..., :dim], v_cache=kv[..., dim:])
    got, got_lse = ops.seg_paged_attention(*views.args(), return_lse=True)
    assert torch.equal(got, want) and torch.equal(got_lse, want_lse)
    both = torch.stack([rows.k_cache, rows.v_cache], 1)
    got, _ = ops.seg_paged_attention(*replace(rows, k_cache=both[:, 0], v_cache=both[:, 1]).args())
    assert torch.equal(got, want)


def test_out_and_lse_are_written_in_place() -> None:
    rows = ragged(torch.float32, 4, 64)
    want, want_lse = ops.seg_paged_attention(*rows.args(), return_lse=True)
    wide = torch.zeros(len(rows.q), 2 * rows.q.shape[1], 64)
    out, lse = wide[:, ::2], torch.empty_like(want_lse)
    got = ops.seg_paged_attention(*rows.args(), out=out, lse=lse)
    assert got[0] is out and got[1] is lse
    assert torch.equal(out, want) and torch.equal(lse, want_lse) and (wide[:, 1::2] == 0).all()
    _, empty = ops.seg_paged_attention(*rows.args(), out=out)
    assert empty.shape == (0,)
    with pytest.raises(ValueError, match="lse is given without out"):
        ops.seg_paged_attention(*rows.args(), lse=lse)
