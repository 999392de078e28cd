#pragma once

#include <cmath>

#include "cuda/attention/score_scale.h"
#include "cuda/attention/scores.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/matrix.cuh"

// One warp's part of the online softmax: 16 kTiles query rows against its kKeys keys of every
// block. Matrices in shared memory say where a 16-byte vector of a row lies (byte_offset).
//
// Scores count in units of log2: s = q . k * softmax_scale * log2(e), the scale > 0, or with a soft
// cap c, s = c * tanh(q . k * softmax_scale / c) * log2(e). After a block, for each row, maximum =
// max s, denominator = sum 2^(s - maximum), sums = sum 2^(s - maximum) v. A lane holds what the C
// fragment of mma.m16n8k16 gives it (ptx/matrix.cuh): of rows lane / 4 and lane / 4 + 8 of each row
// tile, two columns in eight. Its denominator is of its own columns alone until the end.
namespace redknot::gpu {

// The state of a warp of one row tile in shared memory, what a lane holds at its number.
template <int kColumnTiles>
struct WarpState {
  float4 sums[kColumnTiles][kWarpSize];
  float4 rest[kWarpSize];  // maximum and denominator of both rows
};

template <typename T, int kHeadDim, int kTiles, int kKeys>
struct SoftmaxState {
  static constexpr int kRowTiles = kTiles;
  static constexpr int kColumnTiles = kHeadDim / 8;
  static constexpr int kKeyTiles = kKeys / 8;

  float sums[kRowTiles][kColumnTiles][4];
  float maximum[kRowTiles][2];
  float denominator[kRowTiles][2];

  __device__ void clear() {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[tile][half] = -INFINITY;
        denominator[tile][half] = 0.0f;
      }
#pragma unroll
      for (int column = 0; column < kColumnTiles; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][column][i] = 0.0f;
      }
    }
  }

  // Rows of this warp start at first_row, its keys at first_key of the block.
  template <typename Queries, typename Keys, int kChunks>
  __device__ void add_block(const Queries& queries,
                            const Keys& keys,
                            const Keys& values,
                            const KeyBlock<kChunks>& block,
                            const int32_t* positions,
                            const Reach& reach,
                            const ScoreScale& scale,
                            int first_row,
                            int first_key) {
    float scores[kRowTiles][kKeyTiles][4];
    multiply_keys(queries, keys, first_row, first_key, scores);
    if (scale.inside_tanh != 0.0f) cap_scores(scale.inside_tanh, scores);
    if (block.is_partial) mask_scores(block, positions + first_row, reach, first_key, scores);
    exponentiate(scale.log2, scores);
    multiply_values(values, first_key, scores);
  }

  // Adds what another warp found of the same rows.
  __device__ void merge(const WarpState<kColumnTiles>& other, int lane) {
    const float4 rest = other.rest[lane];
    const float their_maximum[2] = {rest.x, rest.y}, their_denominator[2] = {rest.z, rest.w};
    float mine[2], theirs[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float highest = fmaxf(maximum[0][half], their_maximum[half]);
      const float reference = highest == -INFINITY ? 0.0f : highest;
      mine[half] = ptx::exp2(maximum[0][half] - reference);
      theirs[half] = ptx::exp2(their_maximum[half] - reference);
      maximum[0][half] = highest;
      denominator[0][half] =
          denominator[0][half] * mine[half] + their_denominator[half] * theirs[half];
    }
#pragma unroll
    for (int column = 0; column < kColumnTiles; ++column) {
      if (column % 16 == 0) __syncwarp();  // else all are read at once, into more registers
      const float4 sum = other.sums[column][lane];
      float (&own)[4] = sums[0][column];
      own[0] = own[0] * mine[0] + sum.x * theirs[0];
      own[1] = own[1] * mine[0] + sum.y * theirs[0];
      own[2] = own[2] * mine[1] + sum.z * theirs[1];
      own[3] = own[3] * mine[1] + sum.w * theirs[1];
    }
  }

  // For merge() of another warp.
  __device__ void save(WarpState<kColumnTiles>* to, int lane) const {
    to->rest[lane] = {maximum[0][0], maximum[0][1], denominator[0][0], denominator[0][1]};
#pragma unroll
    for (int column = 0; column < kColumnTiles; ++column) {
      const float (&own)[4] = sums[0][column];
      to->sums[column][lane] = {own[0], own[1], own[2], own[3]};
    }
  }

  // Denominators of whole rows, in every lane that holds a part of them.
  __device__ void finish() {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        denominator[tile][half] = row_sum(denominator[tile][half]);
      }
    }
  }

 private:
  using Scores = float[kRowTiles][kKeyTiles][4];

  template <typename Queries, typename Keys>
  __device__ static void multiply_keys(
      const Queries& queries, const Keys& keys, int first_row, int first_key, Scores& scores) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int key = 0; key < kKeyTiles; ++key) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[tile][key][i] = 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        const int row = first_row + tile * kMmaRows + lane % 16;
        ptx::load_matrix_x4(a[tile], queries.base, Queries::byte_offset(row, k * 2 + lane / 16));
      }
#pragma unroll
      for (int key = 0; key < kKeyTiles; key += 2) {
        const int row = first_key + key * 8 + lane / 16 * 8 + lane % 8;
        uint32_t b[4];
        ptx::load_matrix_x4(b, keys.base, Keys::byte_offset(row, k * 2 + lane / 8 % 2));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          ptx::mma_16816<T>(scores[tile][key], a[tile], first);
          ptx::mma_16816<T>(scores[tile][key + 1], a[tile], second);
        }
      }
    }
  }

  // Scores become 2^(s - maximum); what was summed before is scaled to the new maximum.
  __device__ void exponentiate(float scale_log2, Scores& scores) {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = -INFINITY;
#pragma unroll
        for (int key = 0; key < kKeyTiles; ++key) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            highest = fmaxf(highest, scores[tile][key][i]);
          }
        }
        highest = fmaxf(maximum[tile][half], row_maximum(highest) * scale_log2);
        // Nothing seen so far: subtract 0, for inf - inf is NaN.
        const float reference = highest == -INFINITY ? 0.0f : highest;
        const float shrink = ptx::exp2(maximum[tile][half] - reference);
        maximum[tile][half] = highest;
        float sum = 0.0f;
#pragma unroll
        for (int key = 0; key < kKeyTiles; ++key) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[tile][key][i] = ptx::exp2(fmaf(scores[tile][key][i], scale_log2, -reference));
            sum += scores[tile][key][i];
          }
        }
        denominator[tile][half] = denominator[tile][half] * shrink + sum;
#pragma unroll
        for (int column = 0; column < kColumnTiles; ++column) {
          sums[tile][column][2 * half] *= shrink;
          sums[tile][column][2 * half + 1] *= shrink;
        }
      }
    }
  }

  // The C fragments of two neighbouring key tiles are, rounded, the A fragment of 16 keys.
  template <typename Values>
  __device__ void multiply_values(const Values& values, int first_key, const Scores& scores) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int key = 0; key < kKeyTiles; key += 2) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &scores[tile][key + i / 2][i % 2 * 2];
          a[tile][i] = ptx::pack<T>(pair[0], pair[1]);
        }
      }
      const int row = first_key + key * 8 + lane % 16;
#pragma unroll
      for (int column = 0; column < kColumnTiles; column += 2) {
        uint32_t b[4];
        ptx::load_matrix_x4_transposed(
            b, values.base, Values::byte_offset(row, column + lane / 16));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          ptx::mma_16816<T>(sums[tile][column], a[tile], first);
          ptx::mma_16816<T>(sums[tile][column + 1], a[tile], second);
        }
      }
    }
  }
};

}  // namespace redknot::gpu
