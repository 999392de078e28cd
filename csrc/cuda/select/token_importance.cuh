#pragma once

// token_importance: the Euclidean norm of a token's attention output over all heads, in fp32.
//
// A warp owns a token; its lanes walk the token's vectors, so that 32 lanes read 512 neighbouring
// bytes of a head of contiguous heads. Eight warps make a block, blocks stride over the tokens. The
// sum is folded in a fixed order: two runs agree bit by bit.
#include "cuda/common/element.cuh"
#include "cuda/ptx/simt.cuh"
#include "redknot/select.h"

namespace redknot::gpu {

template <typename T, int kSize>
__global__ void token_importance_kernel(TokenImportanceParams params) {
  const int lane = threadIdx.x % 32;
  const int64_t vectors_per_head = params.head_dim / kSize;
  const int64_t num_vectors = params.num_q_heads * vectors_per_head;
  const int64_t warps_per_block = blockDim.x / 32;
  for (int64_t token = blockIdx.x * warps_per_block + threadIdx.x / 32; token < params.num_tokens;
       token += gridDim.x * warps_per_block) {
    const T* row = static_cast<const T*>(params.attn_out) + token * params.token_stride;
    float sum = 0.0f;
    int64_t head = lane / vectors_per_head, vector = lane % vectors_per_head;
    for (int64_t i = lane; i < num_vectors; i += 32) {
      const auto x = *reinterpret_cast<const Vector<T, kSize>*>(row + head * params.head_stride +
                                                                vector * kSize);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sum += to_float(x.element[e]) * to_float(x.element[e]);
      for (vector += 32; vector >= vectors_per_head; vector -= vectors_per_head) ++head;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) params.importance[token] = sqrtf(sum);
  }
}

}  // namespace redknot::gpu
