#pragma once

#include <cstdint>

#include "cuda/ffn/gather_norm.h"
#include "cuda/ffn/gemm_workspace.h"
#include "redknot/ffn.h"

// What gathered_ffn needs beside its arguments, and what of both each launch is given.
namespace redknot::gpu {

struct FfnWorkspace : GemmWorkspace {
  int64_t normed;     // [chunk_rows, hidden_dim]
  int64_t activated;  // [chunk_rows, ffn_dim]

  FfnWorkspace(const GatheredFfnParams& params, GemmDevice on_device)
      : GemmWorkspace(params.max_rows, on_device) {
    const int64_t element = size_of(params.dtype);
    WorkspaceParts parts;
    normed = parts.take(chunk_rows * params.hidden_dim * element);
    activated = parts.take(chunk_rows * params.ffn_dim * element);
    take_sums(parts, 2);
  }
};

// The launches for the rows from first_row on.
struct FfnChunk {
  GatherNorm norm;
  RowGemm gate_up;
  RowGemm down;
};

inline FfnChunk ffn_chunk(const GatheredFfnParams& params,
                          const FfnWorkspace& workspace,
                          void* memory,
                          int64_t first_row) {
  auto* base = static_cast<char*>(memory);
  auto* arrivals = reinterpret_cast<int32_t*>(base + workspace.arrivals);
  const int32_t max_rows = workspace.rows_from(first_row, params.max_rows);
  const auto hidden_dim = static_cast<int32_t>(params.hidden_dim);
  const auto ffn_dim = static_cast<int32_t>(params.ffn_dim);
  FfnChunk chunk;
  chunk.norm = {
      .residual = params.residual,
      .weight = params.norm_weight,
      .indices = params.indices,
      .count = params.count,
      .out = base + workspace.normed,
      .arrivals = arrivals,
      .residual_stride = params.residual_stride,
      .first_row = static_cast<int32_t>(first_row),
      .max_rows = max_rows,
      .num_arrivals = static_cast<int32_t>(2 * workspace.num_arrivals()),
      .num_tokens = static_cast<int32_t>(params.num_tokens),
      .hidden_dim = hidden_dim,
      .eps = params.eps,
  };
  chunk.gate_up = {
      .a = base + workspace.normed,
      .b = params.w_gate,
      .b_up = params.w_up,
      .a_stride = hidden_dim,
      .b_stride = params.gate_stride,
      .b_up_stride = params.up_stride,
      .columns = ffn_dim,
      .depth = hidden_dim,
      .count = params.count,
      .first_row = static_cast<int32_t>(first_row),
      .max_rows = max_rows,
      .most_rows = max_rows,
      .partials = reinterpret_cast<float*>(base + workspace.partials),
      .arrivals = arrivals,
      .partial_floats = workspace.partial_floats(),
      .out = base + workspace.activated,
      .out_stride = ffn_dim,
      .activation = params.activation,
  };
  chunk.down = {
      .a = base + workspace.activated,
      .b = params.w_down,
      .a_stride = ffn_dim,
      .b_stride = params.down_stride,
      .columns = hidden_dim,
      .depth = ffn_dim,
      .count = params.count,
      .first_row = static_cast<int32_t>(first_row),
      .max_rows = max_rows,
      .most_rows = max_rows,
      .partials = reinterpret_cast<float*>(base + workspace.partials),
      .arrivals = arrivals + workspace.num_arrivals(),
      .partial_floats = workspace.partial_floats(),
      .out = params.residual,
      .out_stride = params.residual_stride,
      .indices = params.indices,
      .num_tokens = static_cast<int32_t>(params.num_tokens),
  };
  return chunk;
}

}  // namespace redknot::gpu
