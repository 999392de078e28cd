#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/ffn/ffn_workspace.h"

// What gathered_linear needs beside its arguments, and what of both each launch is given.
namespace redknot::gpu {

struct LinearWorkspace {
  GemmDevice device;
  int64_t chunk_rows = 0;
  // Offsets in bytes.
  int64_t gathered = 0;  // [chunk_rows, in_dim] where rows are gathered or normed
  int64_t partials = 0;  // float
  int64_t arrivals = 0;  // int32
  int64_t num_bytes = 0;

  LinearWorkspace(const GatheredLinearParams& params, GemmDevice on_device) : device(on_device) {
    chunk_rows = std::min(params.max_rows, kMaxChunkRows);
    WorkspaceParts parts;
    if (gathers(params)) gathered = parts.take(chunk_rows * params.in_dim * size_of(params.dtype));
    partials = parts.take(partial_floats() * static_cast<int64_t>(sizeof(float)));
    arrivals = parts.take(num_arrivals() * static_cast<int64_t>(sizeof(int32_t)));
    num_bytes = parts.num_bytes;
  }

  static bool gathers(const GatheredLinearParams& params) {
    return params.indices != nullptr || params.maybe_norm != nullptr;
  }
  int64_t partial_floats() const { return device.workers * kPartialFloatsPerWorker; }
  int64_t num_arrivals() const { return device.workers * kArrivalsPerWorker; }
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
  const auto max_rows =
      static_cast<int32_t>(std::min(workspace.chunk_rows, params.max_rows - first_row));
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
