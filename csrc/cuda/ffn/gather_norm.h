#pragma once

#include <cstdint>

namespace redknot::gpu {

// Arguments of gather_norm_kernel.
struct GatherNorm {
  const void* residual = nullptr;    // [num_tokens, hidden_dim]
  const void* weight = nullptr;      // [hidden_dim], null: no norm
  const int32_t* indices = nullptr;  // [first_row + max_rows], null: row i is row i of residual
  const int32_t* count = nullptr;    // [1], null: max_rows
  void* out = nullptr;               // [max_rows, hidden_dim], contiguous
  int32_t* arrivals = nullptr;       // [num_arrivals], becomes zero
  int64_t residual_stride = 0;
  int32_t first_row = 0;
  int32_t max_rows = 0;
  int32_t num_arrivals = 0;
  int32_t num_tokens = 0;
  int32_t hidden_dim = 0;
  float eps = 0.0f;
};

}  // namespace redknot::gpu
