#pragma once

#include "cuda/common/element.cuh"
#include "cuda/ffn/row_gemm.h"
#include "cuda/ptx/math.cuh"

// What becomes of the sums, and how they get from fragments into rows of memory.
namespace redknot::gpu {

// x / (1 + e^-y), where y = x (silu) or sqrt(8 / pi) (x + 0.044715 x^3) (gelu with tanh, for
// 1 + tanh(y / 2) = 2 / (1 + e^-y)). The bound keeps the inverse from being a denormal.
__device__ __forceinline__ float activated(Activation activation, float x) {
  constexpr float kLog2e = 1.4426950408889634f, kSqrt8OverPi = 1.5957691216057308f;
  const float y = activation == Activation::kSilu ? x : kSqrt8OverPi * (x + 0.044715f * x * x * x);
  return x * ptx::reciprocal(1.0f + ptx::exp2(fminf(-kLog2e * y, 125.0f)));
}

// Where the results of one tile go. Called with `kSize` neighbouring columns of a row; columns and
// strides are multiples of 8.
template <typename T, Result kResult>
struct RowSink {
  const RowGemm& gemm;
  int32_t rows;

  template <int kSize>
  __device__ void operator()(int32_t row, int32_t column, const float (&values)[kSize]) const {
    using Access = Vector<T, kSize>;
    if (row >= rows || column >= gemm.columns) return;
    int64_t out_row = row;
    if constexpr (kResult == Result::kScatterAdd) {
      out_row = __ldg(gemm.indices + gemm.first_row + row);
      if (out_row < 0 || out_row >= gemm.num_tokens) return;  // not the caller's memory
    }
    auto* to =
        reinterpret_cast<Access*>(static_cast<T*>(gemm.out) + out_row * gemm.out_stride + column);
    Access stored;
    if constexpr (kResult == Result::kScatterAdd) stored = *to;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float before = kResult == Result::kScatterAdd ? to_float(stored.element[i]) : 0.0f;
      stored.element[i] = from_float<T>(before + values[i]);
    }
    *to = stored;
  }
};

// The four lanes that share a row hold two columns each of four column tiles; afterwards each holds
// all eight of its own tile, lane % 4: values[tile][half] becomes values[part][half].
__device__ __forceinline__ void exchange_in_row(float (&values)[4][2]) {
  const int member = threadIdx.x % 4;
#pragma unroll
  for (int bit = 2; bit > 0; bit /= 2) {
    const bool is_high = (member & bit) != 0;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      if ((tile & bit) != 0) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = values[tile][half], high = values[tile | bit][half];
        const float got = __shfl_xor_sync(0xffffffffu, is_high ? low : high, bit);
        values[tile][half] = is_high ? got : low;
        values[tile | bit][half] = is_high ? high : got;
      }
    }
  }
}

// Hands the sums of one warp, whose first row and column are given, to the sink; 16 bytes of a row
// at once where a warp has four column tiles.
template <int kRowTiles, int kColumnTiles, int kHeldTiles, typename Sink>
__device__ void write_tile(float (&sums)[kRowTiles][kHeldTiles][4],
                           int32_t first_row,
                           int32_t first_column,
                           const Sink& sink) {
  static_assert(kColumnTiles <= kHeldTiles);
  const int lane = threadIdx.x % 32, member = lane % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int32_t row = first_row + m * 16 + below * 8 + lane / 4;
      if constexpr (kColumnTiles % 4 == 0) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; n += 4) {
          float parts[4][2];
#pragma unroll
          for (int tile = 0; tile < 4; ++tile) {
            parts[tile][0] = sums[m][n + tile][below * 2];
            parts[tile][1] = sums[m][n + tile][below * 2 + 1];
          }
          exchange_in_row(parts);
          const float values[8] = {parts[0][0],
                                   parts[0][1],
                                   parts[1][0],
                                   parts[1][1],
                                   parts[2][0],
                                   parts[2][1],
                                   parts[3][0],
                                   parts[3][1]};
          sink(row, first_column + (n + member) * 8, values);
        }
      } else {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          const float values[2] = {sums[m][n][below * 2], sums[m][n][below * 2 + 1]};
          sink(row, first_column + n * 8 + member * 2, values);
        }
      }
    }
  }
}

// The bias of a warp's columns, the first of which is given.
template <typename T, int kRowTiles, int kColumnTiles>
__device__ void add_bias(const RowGemm& gemm,
                         int32_t first_column,
                         float (&sums)[kRowTiles][kColumnTiles][4]) {
  const T* bias = static_cast<const T*>(gemm.bias);
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    const int32_t column = first_column + n * 8 + static_cast<int32_t>(threadIdx.x) % 4 * 2;
    if (column >= gemm.columns) continue;
    const auto pair = *reinterpret_cast<const Vector<T, 2>*>(bias + column);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] += to_float(pair.element[i % 2]);
    }
  }
}

// The first half of the columns are gates, the second their ups; the first become the results.
template <int kRowTiles, int kColumnTiles>
__device__ void activate(float (&sums)[kRowTiles][kColumnTiles][4], Activation activation) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumnTiles / 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[m][n][i] = activated(activation, sums[m][n][i]) * sums[m][n + kColumnTiles / 2][i];
      }
    }
  }
}

}  // namespace redknot::gpu
