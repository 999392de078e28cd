#pragma once

#include <cstdint>

#include "redknot/types.h"

namespace redknot {

// Attention over a union of disjoint key sets from the results over each:
//   lse = log(e^lse_a + e^lse_b),  out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b
// A side with lse -inf has seen no key and does not count; with two of them out is 0, lse -inf.
struct MergeStatesParams {
  const void* out_a = nullptr;   // [num_tokens, num_q_heads, head_dim]
  const void* out_b = nullptr;   // the same
  const float* lse_a = nullptr;  // [num_q_heads, num_tokens], natural log
  const float* lse_b = nullptr;  // the same
  void* out = nullptr;           // [num_tokens, num_q_heads, head_dim], contiguous
  float* lse = nullptr;          // [num_q_heads, num_tokens], contiguous
  int64_t num_tokens = 0;
  int64_t num_q_heads = 0;
  int64_t head_dim = 0;
  int64_t a_token_stride = 0;  // strides count elements, the last dimension is contiguous
  int64_t a_head_stride = 0;
  int64_t b_token_stride = 0;
  int64_t b_head_stride = 0;
  int64_t lse_a_head_stride = 0;
  int64_t lse_b_head_stride = 0;
  DType dtype = DType::kFloat32;
};

}  // namespace redknot
