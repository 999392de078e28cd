#pragma once

#include <cmath>

#include "cuda/attention/key_walker.cuh"
#include "cuda/ptx/math.cuh"

// What the attention kernels do to a tile of scores. A lane holds of rows lane / 4 and lane / 4 + 8
// of each row tile of 16 two columns in eight, as the C fragments of mma.m16n8k16 and of wgmma have
// them: scores[row tile][key / 8][2 * (row / 8) + column].
namespace redknot::gpu {

template <int kRowTiles, int kKeyTiles>
using Scores = float[kRowTiles][kKeyTiles][4];

// Products q . k become tanh(inside_tanh * q . k).
template <int kRowTiles, int kKeyTiles>
__device__ void cap_scores(float inside_tanh, float (&scores)[kRowTiles][kKeyTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int key = 0; key < kKeyTiles; ++key) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[tile][key][i] = ptx::tanh(scores[tile][key][i] * inside_tanh);
      }
    }
  }
}

// -inf where the query of a row does not see the key of a column; rows have `positions`, columns
// begin at first_key of the block.
template <int kRowTiles, int kKeyTiles, int kChunks>
__device__ void mask_scores(const KeyBlock<kChunks>& block,
                            const int32_t* positions,
                            const Reach& reach,
                            int first_key,
                            float (&scores)[kRowTiles][kKeyTiles][4]) {
  const int lane = ptx::recomputed(threadIdx.x % kWarpSize);
  int32_t queries[kRowTiles][2], unseen[kRowTiles][2];
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t query = positions[tile * kMmaRows + lane / 4 + half * 8];
      const int64_t behind = int64_t{query} - reach.window;
      queries[tile][half] = query;
      // The last position that has left the window.
      unseen[tile][half] = reach.window < 0 || behind < 0 ? -1 : static_cast<int32_t>(behind);
    }
  }
#pragma unroll
  for (int key = 0; key < kKeyTiles; ++key) {
    const int chunk = (first_key + key * 8) / kChunkKeys;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int in_chunk = key % 2 * 8 + lane % 4 * 2 + i;
      // A slot without a token lies behind every query.
      const int32_t position =
          in_chunk < block.num_valid[chunk] ? block.position[chunk] + in_chunk : INT32_MAX;
      const bool is_sink = position < reach.sink;
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Without short cuts: selections instead of branches.
          const bool in_reach = (position > unseen[tile][half]) | is_sink;
          float& score = scores[tile][key][2 * half + i];
          score = (position <= queries[tile][half]) & in_reach ? score : -INFINITY;
        }
      }
    }
  }
}

// Over the four lanes that share a row.
__device__ inline float row_maximum(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}
__device__ inline float row_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

}  // namespace redknot::gpu
