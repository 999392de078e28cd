#pragma once

#include <cstdint>

#include "redknot/types.h"

namespace redknot {

enum class Activation {
  kSilu,      // x / (1 + e^-x)
  kGeluTanh,  // GELU by tanh
};

// residual[indices[i]] += w_down (activation(w_gate x) * (w_up x)), x =
// rmsnorm(residual[indices[i]]), for i < *count. Arguments are those of the operator; where its
// values are read is the device's.
struct GatheredFfnParams {
  void* residual = nullptr;           // [num_tokens, hidden_dim]
  const void* norm_weight = nullptr;  // [hidden_dim]
  const void* w_gate = nullptr;       // [ffn_dim, hidden_dim]
  const void* w_up = nullptr;         // [ffn_dim, hidden_dim]
  const void* w_down = nullptr;       // [hidden_dim, ffn_dim]
  const int32_t* indices = nullptr;   // [max_rows], the first *count are distinct rows of residual
  const int32_t* count = nullptr;     // [1]
  int64_t num_tokens = 0;
  int64_t max_rows = 0;
  int64_t hidden_dim = 0;
  int64_t ffn_dim = 0;
  int64_t residual_stride = 0;
  int64_t gate_stride = 0;
  int64_t up_stride = 0;
  int64_t down_stride = 0;
  float eps = 0.0f;
  Activation activation = Activation::kSilu;
  DType dtype = DType::kFloat32;
};

// out[i] = w x[indices[i]] + bias for i < *count, of the norm of x where there is a norm_weight.
// Rows of out from *count on are not written.
struct GatheredLinearParams {
  const void* x = nullptr;           // [num_tokens, in_dim]
  const void* w = nullptr;           // [out_dim, in_dim]
  const void* maybe_bias = nullptr;  // [out_dim]
  const void* maybe_norm = nullptr;  // [in_dim]
  const int32_t* indices = nullptr;  // [max_rows], null: row i is row i
  const int32_t* count = nullptr;    // [1], null: max_rows
  void* out = nullptr;               // [max_rows, out_dim], contiguous
  int64_t num_tokens = 0;
  int64_t max_rows = 0;
  int64_t in_dim = 0;
  int64_t out_dim = 0;
  int64_t x_stride = 0;
  int64_t w_stride = 0;
  float eps = 0.0f;
  DType dtype = DType::kFloat32;
};

// The parts of gathered_ffn around its two GEMMs. `indices` are the token rows of one chunk.

// out[i] = round(x[indices[i]] / rms) * weight, rms over hidden_dim in fp32, rounded to the dtype
// before the product as Hugging Face's RMSNorm does.
struct GatherNormParams {
  const void* residual = nullptr;    // [num_tokens, hidden_dim]
  const void* weight = nullptr;      // [hidden_dim]
  const int32_t* indices = nullptr;  // [num_rows], null: row i of the residual
  void* out = nullptr;               // [num_rows, hidden_dim], contiguous
  int64_t num_rows = 0;
  int64_t hidden_dim = 0;
  int64_t residual_stride = 0;
  float eps = 0.0f;
  DType dtype = DType::kFloat32;
};

// out = x w^T; where there is an `up`, activation(x w^T) * (x up^T), both products rounded first.
struct LinearParams {
  const void* x = nullptr;         // [num_rows, in_dim], contiguous
  const void* w = nullptr;         // [out_dim, in_dim]
  const void* maybe_up = nullptr;  // [out_dim, in_dim]
  void* out = nullptr;             // [num_rows, out_dim]
  int64_t num_rows = 0;
  int64_t in_dim = 0;
  int64_t out_dim = 0;
  int64_t w_stride = 0;
  int64_t up_stride = 0;
  int64_t out_stride = 0;
  Activation activation = Activation::kSilu;
  DType dtype = DType::kFloat32;
};

// out = activation(gate) * up.
struct GatedActivationParams {
  const void* gate = nullptr;  // [num_rows, ffn_dim]
  const void* up = nullptr;    // [num_rows, ffn_dim]
  void* out = nullptr;         // [num_rows, ffn_dim], contiguous; may be a contiguous `up`
  int64_t num_rows = 0;
  int64_t ffn_dim = 0;
  int64_t in_stride = 0;  // of gate's and of up's rows
  Activation activation = Activation::kSilu;
  DType dtype = DType::kFloat32;
};

// out[i] += bias.
struct AddBiasParams {
  void* out = nullptr;         // [num_rows, dim], contiguous
  const void* bias = nullptr;  // [dim]
  int64_t num_rows = 0;
  int64_t dim = 0;
  DType dtype = DType::kFloat32;
};

// residual[indices[i]] += z[i]; no index occurs twice.
struct ScatterAddParams {
  const void* z = nullptr;           // [num_rows, hidden_dim], contiguous
  void* residual = nullptr;          // [num_tokens, hidden_dim]
  const int32_t* indices = nullptr;  // [num_rows]
  int64_t num_rows = 0;
  int64_t hidden_dim = 0;
  int64_t residual_stride = 0;
  DType dtype = DType::kFloat32;
};

}  // namespace redknot
