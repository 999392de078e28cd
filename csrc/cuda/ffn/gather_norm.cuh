#pragma once

#include <cmath>

#include "cuda/common/element.cuh"
#include "cuda/ffn/gather_norm.h"
#include "cuda/ffn/row_gemm.h"
#include "cuda/ptx/simt.cuh"

// out[i] = rmsnorm(residual[indices[i]]): the selected rows, dense and ready for the product; what
// the norm reads is written once. Without a weight, the rows as they are. A block takes a row at a
// time.
namespace redknot::gpu {

constexpr int kNormThreads = 256;

// Sum over the threads of a block, the same bits for all; `scratch` holds a float per warp.
__device__ inline float sum_of_block(float value, float* scratch) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kNormThreads / 32; ++warp) sum += scratch[warp];
  return sum;
}

// kSize elements at once, which every row is a multiple of.
template <typename T, int kSize>
__global__ void __launch_bounds__(kNormThreads, 5) gather_norm_kernel(GatherNorm params) {
  using Access = Vector<T, kSize>;
  RK_DYNAMIC_SMEM(smem);
  auto* scratch = reinterpret_cast<float*>(smem);
  const int32_t num_threads = gridDim.x * kNormThreads;
  for (int32_t i = blockIdx.x * kNormThreads + threadIdx.x; i < params.num_arrivals;
       i += num_threads) {
    params.arrivals[i] = 0;
  }
  const int32_t rows = rows_of_call(params.count, params.first_row, params.max_rows);
  const int32_t num_vectors = params.hidden_dim / kSize;
  const auto* weight = static_cast<const Access*>(params.weight);
  for (int32_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int32_t at = params.first_row + i;
    const int32_t token = params.indices == nullptr ? at : params.indices[at];
    // Rows that the caller does not have are zeros here, and skipped when results are added.
    const bool exists = token >= 0 && token < params.num_tokens;
    const auto* x = reinterpret_cast<const Access*>(static_cast<const T*>(params.residual) +
                                                    (exists ? token : 0) * params.residual_stride);
    auto* out =
        reinterpret_cast<Access*>(static_cast<T*>(params.out) + int64_t{i} * params.hidden_dim);
    if (weight == nullptr) {
#pragma unroll 1
      for (int32_t v = threadIdx.x; v < num_vectors; v += kNormThreads) {
        out[v] = exists ? x[v] : Access{};
      }
      continue;
    }
    float squares = 0.0f;
    for (int32_t v = threadIdx.x; v < num_vectors; v += kNormThreads) {
      const Access values = x[v];
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const float value = to_float(values.element[e]);
        squares += value * value;
      }
    }
    const float mean = sum_of_block(squares, scratch) / static_cast<float>(params.hidden_dim);
    const float scale = exists ? 1.0f / sqrtf(mean + params.eps) : 0.0f;
    for (int32_t v = threadIdx.x; v < num_vectors; v += kNormThreads) {
      const Access values = x[v], weights = weight[v];
      Access normed;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const T rounded = from_float<T>(to_float(values.element[e]) * scale);
        normed.element[e] = from_float<T>(to_float(rounded) * to_float(weights.element[e]));
      }
      out[v] = normed;
    }
  }
}

}  // namespace redknot::gpu
