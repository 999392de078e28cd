#pragma once

// One gathered_linear on the executor, launched as the host launches it, against fp64.
#include "cuda/ffn/linear_workspace.h"
#include "ffn_case.hpp"

namespace redknot::gpu {

struct LinearCase {
  std::vector<int32_t> rows = {};
  int32_t num_tokens = 20;
  int32_t in_dim = 72;
  int32_t out_dim = 104;
  bool takes_all = false;  // without indices and count
  bool has_norm = false;
  bool has_bias = false;
  int32_t workers = 3;
  int64_t chunk_rows = kMaxChunkRows;
};

template <typename T>
void gather_or_clear(const LinearChunk& chunk, int32_t workers, const simt::Schedule& schedule) {
  if (!chunk.gathers) {
    std::fill_n(chunk.product.arrivals, chunk.norm.num_arrivals, 0);
    return;
  }
  simt::launch({{static_cast<unsigned>(workers)}, {kNormThreads}, kNormThreads / 8, schedule},
               [&] { gather_norm_kernel<T, 8>(chunk.norm); });
}

template <typename T>
void run_linear(const LinearChunk& chunk, int32_t workers, const simt::Schedule& schedule) {
  gather_or_clear<T>(chunk, workers, schedule);
  simt::launch({{static_cast<unsigned>(workers)}, {kGemmThreads}, kGemmSharedBytes, schedule},
               [&] { row_gemm_kernel<T, Result::kStore>(chunk.product); });
}

template <typename T, typename Run>
void expect_right_linear(LinearCase c, Run&& run) {
  std::mt19937 random(2);
  const auto randoms = [&random](int64_t count, float mean, float deviation) {
    std::normal_distribution<float> normal(mean, deviation);
    std::vector<T> values(count);
    for (T& value : values) value = from_float<T>(normal(random));
    return values;
  };
  const float deviation = 1.0f / std::sqrt(static_cast<float>(c.in_dim));
  simt::Buffer<T> x("x", randoms(c.num_tokens * c.in_dim, 0.0f, 1.0f)),
      w("weight", randoms(c.out_dim * c.in_dim, 0.0f, deviation)),
      bias("bias", randoms(c.out_dim, 0.0f, 1.0f)), norm("norm", randoms(c.in_dim, 1.0f, 0.1f));
  if (c.takes_all) c.rows = first_rows(c.num_tokens);
  const auto num_rows = static_cast<int32_t>(c.rows.size());
  simt::Buffer<int32_t> indices("indices", c.rows), count("count", std::vector<int32_t>{num_rows});
  for (const simt::Schedule& schedule : simt::kSchedules) {
    simt::Buffer<T> out("out", num_rows * c.out_dim);
    const GatheredLinearParams params = {
        .x = x.data(),
        .w = w.data(),
        .maybe_bias = c.has_bias ? bias.data() : nullptr,
        .maybe_norm = c.has_norm ? norm.data() : nullptr,
        .indices = c.takes_all ? nullptr : indices.data(),
        .count = c.takes_all ? nullptr : count.data(),
        .out = out.data(),
        .num_tokens = c.num_tokens,
        .max_rows = num_rows,
        .in_dim = c.in_dim,
        .out_dim = c.out_dim,
        .x_stride = c.in_dim,
        .w_stride = c.in_dim,
        .eps = 1e-5f,
        .dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16,
    };
    LinearWorkspace workspace(params, {c.workers, false});
    workspace.chunk_rows = std::min(workspace.chunk_rows, c.chunk_rows);
    simt::Buffer<unsigned char> memory("workspace", workspace.num_bytes);
    for (int64_t first = 0; first < num_rows; first += workspace.chunk_rows) {
      run(linear_chunk(params, workspace, memory.data(), first), c.workers, schedule);
    }
    const double rounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    for (int32_t i = 0; i < num_rows; ++i) {
      const T* row = x.data() + int64_t{c.rows[i]} * c.in_dim;
      double squares = 0;
      for (int d = 0; d < c.in_dim; ++d) squares += value_of(row[d]) * value_of(row[d]);
      const double scale = 1 / std::sqrt(squares / c.in_dim + 1e-5);
      for (int o = 0; o < c.out_dim; ++o) {
        double want = c.has_bias ? value_of(bias[o]) : 0;
        for (int d = 0; d < c.in_dim; ++d) {
          const double factor = c.has_norm ? scale * value_of(norm[d]) : 1;
          want += value_of(row[d]) * factor * value_of(w[o * c.in_dim + d]);
        }
        const double got = value_of(out[i * c.out_dim + o]);
        CHECK(std::abs(got - want) < kFfnTolerance * rounding * (1 + std::abs(want)));
      }
    }
  }
}

}  // namespace redknot::gpu
