#pragma once

// rope_realign: out = R(offset) k, of tokens [num_tokens, num_heads, head_dim] or inside pages.
//
//   out[a] = k[a] cos(offset f) - k[b] sin(offset f),  out[b] = k[b] cos(offset f) + k[a]
//   sin(offset f) with (a, b) = (d, d + rotary_dim / 2), or (2 d, 2 d + 1) when interleaved, and f
//   = inv_freq[d]
//
// A lane owns kSize neighbouring pairs, two vectors of a row, and keeps their sines and cosines in
// registers while it walks a run of rows that share one offset (key_rows.h); lanes beyond the pairs
// copy the dimensions that do not turn. A block is as wide as a row has pairs of vectors and 256 /
// lanes groups high; runs are blockIdx.y, so that no index needs a division. Angles, sines and
// products are fp32, rounded once. kSize is 1 without 16-byte alignment, and for interleaved pairs:
// no family of models that redknot attaches to has those.
#include "cuda/common/element.cuh"
#include "cuda/common/launch_shape.h"
#include "cuda/ptx/simt.cuh"
#include "cuda/rope/angles.cuh"
#include "cuda/rope/key_rows.h"

namespace redknot::gpu {

// Rows whose loads are issued before the first store: k and out may be one tensor, which keeps the
// compiler from moving a load over a store. Two vectors of two rows for 768 threads are 48 KiB in
// flight per SM, twice what hides the latency of HBM.
constexpr int kRowsInFlight = 2;

// The two vectors of a row that a lane owns.
template <typename T, int kSize>
struct Columns {
  Vector<T, kSize> first;
  Vector<T, kSize> second;
};

template <typename T, int kSize>
__device__ void rotate(Columns<T, kSize>& columns, const Angles<kSize>& angles) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float a = to_float(columns.first.element[i]);
    const float b = to_float(columns.second.element[i]);
    columns.first.element[i] = from_float<T>(a * angles.cosine[i] - b * angles.sine[i]);
    columns.second.element[i] = from_float<T>(b * angles.cosine[i] + a * angles.sine[i]);
  }
}

template <typename T, int kSize, typename Keys>
__global__ void __launch_bounds__(kThreadsPerBlock) realign_keys_kernel(Keys keys) {
  using Access = Vector<T, kSize>;
  const auto& params = keys.params;
  const int64_t num_pairs = params.rotary_dim / 2 / kSize;
  const int64_t num_columns = num_pairs + (params.head_dim - params.rotary_dim) / kSize;
  const int64_t group_step = int64_t{gridDim.x} * blockDim.y;

  for (int64_t group = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; group < keys.num_groups();
       group += group_step) {
    const KeyRows rows = keys(group, blockIdx.y);
    const T* k = static_cast<const T*>(keys.k()) + rows.k_begin;
    T* out = static_cast<T*>(keys.out()) + rows.out_begin;
    if (rows.num_rows <= 0) continue;

    for (int64_t column = threadIdx.x; column < num_columns; column += blockDim.x) {
      if (column >= num_pairs) {
        const int64_t at = params.rotary_dim + (column - num_pairs) * kSize;
        for (int64_t row = 0; row < rows.num_rows && k != out; ++row) {
          *reinterpret_cast<Access*>(out + row * rows.out_stride + at) =
              *reinterpret_cast<const Access*>(k + row * rows.k_stride + at);
        }
        continue;
      }
      const Angles<kSize> angles(params.inv_freq + column * kSize, rows.offset);
      const int64_t first = (params.interleaved ? 2 : 1) * column * kSize;
      const int64_t second = first + (params.interleaved ? 1 : params.rotary_dim / 2);
      for (int64_t row = 0; row < rows.num_rows; row += kRowsInFlight) {
        Columns<T, kSize> columns[kRowsInFlight];
#pragma unroll
        for (int i = 0; i < kRowsInFlight; ++i) {
          if (row + i >= rows.num_rows) break;
          const T* from = k + (row + i) * rows.k_stride;
          columns[i].first = *reinterpret_cast<const Access*>(from + first);
          columns[i].second = *reinterpret_cast<const Access*>(from + second);
        }
#pragma unroll
        for (int i = 0; i < kRowsInFlight; ++i) {
          if (row + i >= rows.num_rows) break;
          rotate(columns[i], angles);
          T* to = out + (row + i) * rows.out_stride;
          *reinterpret_cast<Access*>(to + first) = columns[i].first;
          *reinterpret_cast<Access*>(to + second) = columns[i].second;
        }
      }
    }
  }
}

}  // namespace redknot::gpu
