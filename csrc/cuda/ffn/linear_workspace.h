#pragma once

#include <cstdint>

#include "cuda/ffn/gather_norm.h"
#include "cuda/ffn/gemm_workspace.h"

// What gathered_linear needs beside its arguments, and what of both each launch is given.
namespace redknot::gpu {

struct LinearWorkspace : GemmWorkspace {
  int64_t gathered = 0;  // [chunk_rows, in_dim] where rows are gathered or normed

  LinearWorkspace(const GatheredLinearParams& params, GemmDevice on_device)
      : GemmWorkspace(params.max_rows, on_device) {
    WorkspaceParts parts;
    if (gathers(params)) gathered = parts.take(chunk_rows * params.in_dim * size_of(params.dtype));
    take_sums(parts, 1);
  }

  static bool gathers(const GatheredLinearParams& params) {
    return params.indices != nullptr || params.maybe_norm != nullptr;
  }
};

// The launches for the rows from first_row on.
struct LinearChunk {
  bool gathers;  // else the rows are read where they are, and nobody has cleared the arrivals
  GatherNorm norm;
  RowGemm product;
};

inline LinearChunk linear_chunk(const GatheredLinearParams& params,
                                const LinearWorkspace& workspace,
                                void* memory,
                                int64_t first_row) {
  auto* base = static_cast<char*>(memory);
  const int64_t element = size_of(params.dtype);
  const int32_t max_rows = workspace.rows_from(first_row, params.max_rows);
  const auto in_dim = static_cast<int32_t>(params.in_dim);
  LinearChunk chunk;
  chunk.gathers = LinearWorkspace::gathers(params);
  chunk.norm = {
      .residual = params.x,
      .weight = params.maybe_norm,
      .indices = params.indices,
      .count = params.count,
      .out = base + workspace.gathered,
      .arrivals = reinterpret_cast<int32_t*>(base + workspace.arrivals),
      .residual_stride = params.x_stride,
      .first_row = static_cast<int32_t>(first_row),
      .max_rows = max_rows,
      .num_arrivals = static_cast<int32_t>(workspace.num_arrivals()),
      .num_tokens = static_cast<int32_t>(params.num_tokens),
      .hidden_dim = in_dim,
      .eps = params.eps,
  };
  const void* rows = static_cast<const char*>(params.x) + first_row * params.x_stride * element;
  chunk.product = {
      .a = chunk.gathers ? chunk.norm.out : rows,
      .b = params.w,
      .a_stride = chunk.gathers ? params.in_dim : params.x_stride,
      .b_stride = params.w_stride,
      .columns = static_cast<int32_t>(params.out_dim),
      .depth = in_dim,
      .count = params.count,
      .first_row = static_cast<int32_t>(first_row),
      .max_rows = max_rows,
      .most_rows = max_rows,
      .partials = reinterpret_cast<float*>(base + workspace.partials),
      .arrivals = chunk.norm.arrivals,
      .partial_floats = workspace.partial_floats(),
      .out = static_cast<char*>(params.out) + first_row * params.out_dim * element,
      .bias = params.maybe_bias,
      .out_stride = params.out_dim,
  };
  return chunk;
}

}  // namespace redknot::gpu
