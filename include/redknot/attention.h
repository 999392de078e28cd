#pragma once

#include <cstdint>

#include "redknot/paged_kv.h"
#include "redknot/pages.h"

namespace redknot {

// Attention of ragged rows. Row r = seq * num_kv_heads + kv_head owns
// page_refs[row_indptr[r] .. row_indptr[r + 1]), ordered by position, gaps allowed; the queries of
// a sequence are tokens cu_seqlens_q[seq] .. cu_seqlens_q[seq + 1], positions ascending. What a
// query sees is is_visible() of paged_kv.h. One online softmax per query, fp32, fixed summation
// order. A score is softmax_scale * (q . k), or with a softcap softcap * tanh(that / softcap).
struct SegPagedAttentionParams {
  PagePool pool;                          // read only here
  const void* q = nullptr;                // [num_tokens, num_q_heads, head_dim]
  void* out = nullptr;                    // [num_tokens, num_q_heads, head_dim]
  float* maybe_lse = nullptr;             // [num_q_heads, num_tokens], natural log
  const int32_t* row_indptr = nullptr;    // [num_rows + 1]
  const PageRef* page_refs = nullptr;     // [num_refs]
  const int32_t* cu_seqlens_q = nullptr;  // [num_seqs + 1]
  const int32_t* q_positions = nullptr;   // [num_tokens]
  const int32_t* row_window = nullptr;    // [num_rows], kGlobalWindow: no limit
  const int32_t* row_sink = nullptr;      // [num_rows]
  const float* maybe_inv_freq = nullptr;  // [rotary_dim / 2], null: every rotation offset is 0
  const int32_t* plan = nullptr;          // a work list of planner.h that fits this call
  float* maybe_workspace = nullptr;       // [plan_workspace_floats()], null if that is 0
  int64_t num_tokens = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t num_seqs = 0;
  int64_t num_refs = 0;
  int64_t rotary_dim = 0;
  int64_t q_token_stride = 0;  // strides count elements, the last dimension is contiguous
  int64_t q_head_stride = 0;
  int64_t out_token_stride = 0;
  int64_t out_head_stride = 0;
  float softmax_scale = 0.0f;
  float softcap = 0.0f;           // 0: none
  bool rope_interleaved = false;  // pairs (2 d, 2 d + 1) instead of (d, d + rotary_dim / 2)

  constexpr int64_t group_size() const { return num_q_heads / num_kv_heads; }
};

}  // namespace redknot
