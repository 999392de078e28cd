"""What seg_paged_attention refuses, and in which words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_case import paged_rows, plan_of, raises
from test_op_attention import ragged
from torch import Tensor

from redknot import ops

# Argument, what it is replaced by, message.
ERRORS = {
    "q_dtype": ({"q": lambda t: t.half()}, "q must be float32 (like k_cache) [num_tokens, "
                "num_q_heads, head_dim = 32], got float16 [38, 8, 32]"),
    "q_stride": ({"q": lambda t: t.mT.contiguous().mT}, "q must have a contiguous last dimension"),
    "k_cache_dtype": ({"k_cache": lambda t: t.long()}, "k_cache must be float32, bfloat16 or "
                      "float16 [num_pages, page_size, head_dim], got int64"),
    "head_dim": ({"k_cache": lambda t: t[..., :20], "v_cache": lambda t: t[..., :20]},
                 "head_dim must be a positive multiple of 8, got k_cache float32"),
    "v_cache": ({"v_cache": lambda t: t[1:]}, "v_cache must be float32 (like k_cache) "
                "[num_pages = 30, page_size = 16, head_dim = 32], got float32 [29, 16, 32]"),
    "page_refs": ({"page_refs": lambda t: t.long()},
                  "page_refs must be int32 [num_refs, 4], got int64 [27, 4]"),
    "page_refs_view": ({"page_refs": lambda t: torch.cat([t, t], 1)[:, :4]},
                       "page_refs must be contiguous"),
    "row_indptr": ({"row_indptr": lambda t: t[1:]},
                   "row_indptr must be int32 [num_rows + 1 = 5], got int32 [4]"),
    "row_indptr_start": ({"row_indptr": lambda t: t + 1}, "row_indptr must start with 0"),
    "row_indptr_order": ({"row_indptr": lambda t: t[[0, 2, 1, 3, 4]]},
                         "row_indptr must not decrease, got 9 before 5 at 2"),
    "row_indptr_end": ({"page_refs": lambda t: t[:-1]},
                       "row_indptr must end with num_refs = 26, got 27"),
    "cu_seqlens_end": ({"cu_seqlens_q": lambda t: t - (t == 38).int()},
                       "cu_seqlens_q must end with num_tokens = 38, got 37"),
    "q_positions": ({"q_positions": lambda t: t[1:]},
                    "q_positions must be int32 [num_tokens = 38], got int32 [37]"),
    "q_order": ({"q_positions": lambda t: t.flip(0)},
                "q_positions must ascend from 0 within a sequence, got 74 at token 1"),
    "row_sink": ({"row_sink": lambda t: t - 1}, "row_sink must not be negative, got -1 at row 0"),
    "rows": ({"cu_seqlens_q": lambda t: torch.tensor([0, 1, 2, 38], dtype=torch.int32)},
             "row_window must hold num_kv_heads rows per sequence, got 4 rows for 3 sequences"),
    "heads": ({"q": lambda t: t[:, :3]},
              "num_q_heads must be a positive multiple of num_kv_heads = 2, got 3"),
    "page": ({"page_refs": lambda t: t + torch.tensor([[100, 0, 0, 0]], dtype=torch.int32)},
             "page_refs[0] must name a page below num_pages = 30, got 114"),
    "valid": ({"page_refs": lambda t: t + torch.tensor([[0, 0, 1, 0]], dtype=torch.int32)},
              "page_refs[0] must have 0 to page_size = 16 valid slots, got 17"),
    "overlap": ({"page_refs": lambda t: t * torch.tensor([[1, 0, 1, 1]], dtype=torch.int32)},
                "page_refs of a row must be ordered by position without overlap, got position 0 "
                "at 1 in row 0"),
    "inv_freq": ({"page_refs": lambda t: t + torch.tensor([[0, 0, 0, 5]], dtype=torch.int32)},
                 "inv_freq is needed since page_refs[0] has rotation offset 5"),
}  # fmt: skip
OPTION_ERRORS = {
    "inv_freq_dtype": ({"inv_freq": torch.ones(4).double()},
                       "inv_freq must be float32 [rotary_dim / 2], got float64 [4]"),
    "inv_freq_size": ({"inv_freq": torch.ones(17)},
                      "inv_freq must have at most head_dim / 2 = 16 elements"),
    "softcap": ({"softcap": -30.0}, "softcap must be positive, or 0 for none, got -30"),
    "softcap_nan": ({"softcap": float("nan")}, "softcap must be positive, or 0 for none, got nan"),
    "scale": ({"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
    "plan": ({"plan": torch.zeros(9, dtype=torch.int32)},
             "plan does not fit this call: it is no work list of seg_paged_plan"),
    "out": ({"out": torch.empty(38, 8, 16)}, "out must be float32 (like k_cache) [num_tokens = "
            "38, num_q_heads = 8, head_dim = 32], got float32 [38, 8, 16]"),
    "out_view": ({"out": torch.empty(1, 8, 32).expand(38, 8, 32)},
                 "out is written to, so it must not be an expanded view: stride 0 is 0"),
    "lse": ({"out": torch.empty(38, 8, 32), "lse": torch.empty(38, 8)},
            "lse must be float32 [num_q_heads = 8, num_tokens = 38], got float32 [38, 8]"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_argument_errors(case: str) -> None:
    changes, message = ERRORS[case]
    rows = ragged(torch.float32, 4, 32)
    bad = replace(rows, **{name: change(getattr(rows, name)) for name, change in changes.items()})
    with raises("seg_paged_attention: " + message):
        ops.seg_paged_attention(*bad.args())


# Values of index tensors, which CUDA trusts unless it is told to look.
VALUE_ERRORS = [
    "row_indptr", "row_indptr_start", "row_indptr_order", "row_indptr_end", "cu_seqlens_end",
    "q_order", "row_sink", "rows", "page", "valid", "overlap", "inv_freq",
]  # fmt: skip


class TrustingOps:
    """The operators of a device where nobody reads the values of index tensors."""

    _check_paged_rows = torch.ops.redknot._check_paged_rows

    @staticmethod
    def seg_paged_attention(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return q, q

    @staticmethod
    def seg_paged_attention_out(*_: object, **__: object) -> None: ...


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_validate_finds_bad_values_on_any_device(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redknot.ops.attention.torch_ops", TrustingOps)
    changes, message = ERRORS[case]
    rows = ragged(torch.float32, 4, 32)
    bad = replace(rows, **{name: change(getattr(rows, name)) for name, change in changes.items()})
    ops.seg_paged_attention(*bad.args())  # nobody looked
    for given in ({}, {"out": torch.empty_like(rows.q)}):
        with raises("seg_paged_attention: " + message):
            ops.seg_paged_attention(*bad.args(), validate=True, **given)


def test_validate_changes_no_result() -> None:
    rows = ragged(torch.float32, 4, 32)
    expected, _ = ops.seg_paged_attention(*rows.args())
    out, _ = ops.seg_paged_attention(*rows.args(), validate=True)
    assert torch.equal(out, expected)
    moved = replace(rows, page_refs=ERRORS["inv_freq"][0]["page_refs"](rows.page_refs))
    inv_freq = 1e4 ** (-torch.arange(0, 32, 2) / 32)
    ops.seg_paged_attention(*moved.args(), inv_freq=inv_freq, validate=True)


@pytest.mark.parametrize("case", OPTION_ERRORS)
def test_option_errors(case: str) -> None:
    options, message = OPTION_ERRORS[case]
    with raises("seg_paged_attention: " + message):
        ops.seg_paged_attention(*ragged(torch.float32, 4, 32).args(), **options)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_out_may_not_overlap_what_is_read(name: str) -> None:
    rows = ragged(torch.float32, 4, 32)
    out = getattr(rows, name).view(-1)[: rows.q.numel()].view(rows.q.shape)
    with raises(f"seg_paged_attention: out must not overlap {name}"):
        ops.seg_paged_attention(*rows.args(), out=out)


def test_plan_of_another_call_is_refused() -> None:
    rows = ragged(torch.float32, 4, 32)
    plan = plan_of(rows)
    other_rows = plan_of(paged_rows([[(0, 9, 0)]] * 4, [range(37), [9]], group=4))
    tampered = plan.clone()
    tampered[-4] += 1000  # the last item's ref_end
    for message, bad in {
        "it was made for another row_indptr or cu_seqlens_q": other_rows,
        "it was made for another num_q_heads": plan_of(ragged(torch.float32, 2, 32)),
        "it was made for another page_size": plan_of(ragged(torch.float32, 4, 32, page_size=8)),
        "its length does not fit its header": plan[:-8],
        "an item is out of range": tampered,
    }.items():
        with raises("seg_paged_attention: plan does not fit this call: " + message):
            ops.seg_paged_attention(*rows.args(), plan=bad)
    with raises("seg_paged_plan: num_workers must be positive, got 0"):
        plan_of(rows, 0)
