#pragma once

// merge_states, as redknot/merge.h defines it.
//
// A thread owns a vector of one (token, head): two loads, one store. The two weights come from four
// bytes each that the threads of a head read together. Threads stride over all vectors.
#include "cuda/common/divide.h"
#include "cuda/common/element.cuh"
#include "cuda/ptx/math.cuh"
#include "redknot/merge.h"

namespace redknot::gpu {

template <typename T, int kSize>
__global__ void merge_states_kernel(MergeStatesParams params) {
  constexpr float kLog2e = 1.44269504f;
  using Access = Vector<T, kSize>;
  const int64_t vectors = params.head_dim / kSize;
  const int64_t num_vectors = params.num_tokens * params.num_q_heads * vectors;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < num_vectors;
       i += int64_t{gridDim.x} * blockDim.x) {
    const auto [row, vector] = divide(i, vectors);
    const auto [token, head] = divide(row, params.num_q_heads);
    const float lse_a = params.lse_a[head * params.lse_a_head_stride + token];
    const float lse_b = params.lse_b[head * params.lse_b_head_stride + token];
    const float top = lse_a > lse_b ? lse_a : lse_b;
    const bool sees_nothing = top == -INFINITY;
    const float weight_a = sees_nothing ? 0.0f : ptx::exp2((lse_a - top) * kLog2e);
    const float weight_b = sees_nothing ? 0.0f : ptx::exp2((lse_b - top) * kLog2e);
    const float scale = sees_nothing ? 0.0f : 1.0f / (weight_a + weight_b);

    const auto* from_a = static_cast<const T*>(params.out_a) + token * params.a_token_stride +
                         head * params.a_head_stride + vector * kSize;
    const auto* from_b = static_cast<const T*>(params.out_b) + token * params.b_token_stride +
                         head * params.b_head_stride + vector * kSize;
    const Access a = *reinterpret_cast<const Access*>(from_a);
    const Access b = *reinterpret_cast<const Access*>(from_b);
    Access merged;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      // What saw no key may hold anything.
      const float part_a = weight_a == 0.0f ? 0.0f : weight_a * to_float(a.element[e]);
      const float part_b = weight_b == 0.0f ? 0.0f : weight_b * to_float(b.element[e]);
      merged.element[e] = from_float<T>((part_a + part_b) * scale);
    }
    *reinterpret_cast<Access*>(static_cast<T*>(params.out) + row * params.head_dim +
                               vector * kSize) = merged;
    if (vector == 0) {
      params.lse[head * params.num_tokens + token] =
          sees_nothing ? -INFINITY : top + logf(weight_a + weight_b);
    }
  }
}

}  // namespace redknot::gpu
