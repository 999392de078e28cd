#pragma once

#include <cstdint>

#include "redknot/types.h"

namespace redknot {

// importance[t] = |attn_out[t]|_2 over all heads, before the output projection.
struct TokenImportanceParams {
  const void* attn_out = nullptr;  // [num_tokens, num_q_heads, head_dim]
  float* importance = nullptr;     // [num_tokens]
  int64_t num_tokens = 0;
  int64_t num_q_heads = 0;
  int64_t head_dim = 0;
  int64_t token_stride = 0;  // strides count elements, the last dimension is contiguous
  int64_t head_stride = 0;
  DType dtype = DType::kFloat32;
};

// Per sequence the smallest set of tokens that holds `mass` of its importance (the token that
// crosses included, ties to the lower index, mass >= 1: all), its last recent_n tokens, and more by
// importance until min_keep are kept. Ascending global token indices, then -1.
struct SelectTokensParams {
  const float* importance = nullptr;    // [num_tokens], finite, not negative
  const int32_t* cu_seqlens = nullptr;  // [num_seqs + 1]
  int32_t* indices = nullptr;           // [num_tokens]
  int32_t* count = nullptr;             // [1]
  int64_t num_tokens = 0;
  int64_t num_seqs = 0;
  int64_t recent_n = 0;
  int64_t min_keep = 0;
  double mass = 1.0;
};

}  // namespace redknot
