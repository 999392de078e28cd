#pragma once

#include "cuda/attention/hopper_shared.cuh"
#include "cuda/attention/score_scale.h"
#include "cuda/attention/scores.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace redknot::gpu {

// The online softmax of a warpgroup's 64 query rows; softmax_state.cuh says what it means. Members
// are named and shaped as there, so that write_rows (result.cuh) takes both; each warp has one row
// tile. Products run beside the thread: whoever calls says when they have ended.
template <typename T, int kHeadDim>
struct HopperState {
  using Shape = HopperShape<kHeadDim>;
  static constexpr int kRowTiles = 1;
  static constexpr int kColumnTiles = kHeadDim / 8;
  static constexpr int kKeyTiles = Shape::kBlockKeys / 8;
  using Scores = float[1][kKeyTiles][4];
  using Weights = uint32_t[kKeyTiles / 2][4];  // A fragments of 16 keys each

  float sums[1][kColumnTiles][4];
  float maximum[1][2];
  float denominator[1][2];

  __device__ void clear() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[0][half] = -INFINITY;
      denominator[0][half] = 0.0f;
    }
#pragma unroll
    for (int column = 0; column < kColumnTiles; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][column][i] = 0.0f;
    }
  }

  __device__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) denominator[0][half] = row_sum(denominator[0][half]);
  }

  // Issues scores = q k^T; both are where their first panel begins.
  __device__ static void multiply_keys(uint32_t queries, uint32_t keys, Scores& scores) {
    const uint64_t a = ptx::k_major(queries, 0), b = ptx::k_major(keys, 0);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int panel = step / 4, in_panel = step % 4 * 32;
      ptx::wgmma<T, ptx::Major::kK>(scores[0],
                                    ptx::moved_by(a, panel * Shape::kQueryPanelBytes + in_panel),
                                    ptx::moved_by(b, panel * Shape::kPanelBytes + in_panel),
                                    step > 0);
    }
    ptx::wgmma_commit();
  }

  // Issues sums += weights v.
  __device__ void multiply_values(const Weights& weights, uint32_t values) {
    const uint64_t b = ptx::mn_major(values, Shape::kPanelBytes, 0);
#pragma unroll
    for (int step = 0; step < Shape::kBlockKeys / 16; ++step) {
      ptx::wgmma<T, ptx::Major::kMN>(
          sums[0], weights[step], ptx::moved_by(b, step * 2 * ptx::kSwizzlePatternBytes), true);
    }
    ptx::wgmma_commit();
  }

  // Scores become 2^(s - maximum); sums are to be scaled by `shrink` before more is added.
  __device__ void exponentiate(float scale_log2, Scores& scores, float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int key = 0; key < kKeyTiles; ++key) {
        highest = fmaxf(highest, fmaxf(scores[0][key][2 * half], scores[0][key][2 * half + 1]));
      }
      highest = fmaxf(maximum[0][half], row_maximum(highest) * scale_log2);
      // Nothing seen so far: subtract 0, for inf - inf is NaN.
      const float reference = highest == -INFINITY ? 0.0f : highest;
      shrink[half] = ptx::exp2(maximum[0][half] - reference);
      maximum[0][half] = highest;
      float sum = 0.0f;
#pragma unroll
      for (int key = 0; key < kKeyTiles; ++key) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[0][key][i] = ptx::exp2(fmaf(scores[0][key][i], scale_log2, -reference));
          sum += scores[0][key][i];
        }
      }
      denominator[0][half] = denominator[0][half] * shrink[half] + sum;
    }
  }

  __device__ void scale_sums(const float (&shrink)[2]) {
#pragma unroll
    for (int column = 0; column < kColumnTiles; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][column][i] *= shrink[i / 2];
    }
  }

  // The C fragments of two neighbouring key tiles are, rounded, the A fragment of 16 keys.
  __device__ static void round_weights(const Scores& scores, Weights& weights) {
#pragma unroll
    for (int key = 0; key < kKeyTiles; key += 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &scores[0][key + i / 2][i % 2 * 2];
        weights[key / 2][i] = ptx::pack<T>(pair[0], pair[1]);
      }
    }
  }
};

}  // namespace redknot::gpu
