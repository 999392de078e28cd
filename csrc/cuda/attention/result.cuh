#pragma once

#include "cuda/attention/softmax_state.cuh"
#include "redknot/planner.h"

// From the softmax states of a work item's warps to its result: rows of `out` and `lse`, or partial
// rows of the workspace when the tile is split. A partial row is head_dim sums, the maximum (in
// log2) and the denominator.
namespace redknot::gpu {

constexpr float kLn2 = 0.69314718055994531f;

__device__ inline float* partial_row(const SegPagedAttentionParams& params, int head_dim, int row) {
  return params.maybe_workspace + int64_t{row} * (head_dim + 2);
}

// Where result row m of a work item goes.
struct ResultRows {
  int32_t q_begin;
  int32_t first_head;
  int32_t group_size;
  int32_t num_rows;
  int32_t first_partial;  // -1: out and lse

  __device__ int32_t token(int row) const { return q_begin + row / group_size; }
  __device__ int32_t head(int row) const { return first_head + row % group_size; }
};

template <typename T>
__device__ T* out_row(const SegPagedAttentionParams& params, const ResultRows& rows, int row) {
  return static_cast<T*>(params.out) + rows.token(row) * params.out_token_stride +
         rows.head(row) * params.out_head_stride;
}

// A row that saw no key has zeros and -inf.
__device__ inline float inverse(float denominator) {
  return denominator > 0.0f ? ptx::reciprocal(denominator) : 0.0f;
}
__device__ inline void write_lse(const SegPagedAttentionParams& params,
                                 const ResultRows& rows,
                                 int row,
                                 float maximum,
                                 float denominator) {
  if (params.maybe_lse == nullptr) return;
  params.maybe_lse[rows.head(row) * params.num_tokens + rows.token(row)] =
      denominator > 0.0f ? maximum * kLn2 + logf(denominator) : -INFINITY;
}

// Every warp has rows of its own. It puts them where its queries were, which nobody else reads, and
// from there into global memory in whole vectors.
template <typename T, int kHeadDim, typename State, typename Matrix>
__device__ void write_rows(const SegPagedAttentionParams& params,
                           const ResultRows& rows,
                           State& state,
                           const Matrix& queries,
                           int first_row) {
  const int lane = ptx::recomputed(threadIdx.x % kWarpSize), member = lane % 4;
  state.finish();
#pragma unroll
  for (int tile = 0; tile < State::kRowTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + tile * kMmaRows + lane / 4 + half * 8;
      const float maximum = state.maximum[tile][half], denominator = state.denominator[tile][half];
      if (rows.first_partial >= 0) {
        float* partial = partial_row(params, kHeadDim, rows.first_partial + row);
#pragma unroll
        for (int column = 0; column < State::kColumnTiles; ++column) {
          *reinterpret_cast<float2*>(partial + column * 8 + member * 2) = {
              state.sums[tile][column][2 * half], state.sums[tile][column][2 * half + 1]};
        }
        if (member == 0) {
          *reinterpret_cast<float2*>(partial + kHeadDim) = {maximum, denominator};
        }
        continue;
      }
      const float scale = inverse(denominator);
#pragma unroll
      for (int column = 0; column < State::kColumnTiles; ++column) {
        *reinterpret_cast<uint32_t*>(queries.vector_at(row, column) + member * 2) =
            ptx::pack<T>(state.sums[tile][column][2 * half] * scale,
                         state.sums[tile][column][2 * half + 1] * scale);
      }
      if (member == 0 && row < rows.num_rows) {
        write_lse(params, rows, row, maximum, denominator);
      }
    }
  }
  if (rows.first_partial >= 0) return;

  __syncwarp();
  constexpr int kVectors = kHeadDim / kVectorElements;
  using Access = Vector<T, kVectorElements>;
  for (int i = lane; i < State::kRowTiles * kMmaRows * kVectors; i += kWarpSize) {
    const int row = first_row + i / kVectors, vector = i % kVectors;
    if (row >= rows.num_rows) continue;
    *reinterpret_cast<Access*>(out_row<T>(params, rows, row) + vector * kVectorElements) =
        *reinterpret_cast<const Access*>(queries.vector_at(row, vector));
  }
}

// The states of warps that shared the keys, in shared memory where the stages were.
template <int kHeadDim, int kWarps>
struct WarpStates {
  // Padded: the eight rows that a warp writes at once lie in different banks.
  float sums[kWarps][kMmaRows][kHeadDim + 8];
  float maximum[kWarps][kMmaRows];
  float denominator[kWarps][kMmaRows];
};

// All warps have the same rows: their states are merged in the order of the warps.
template <typename T, int kHeadDim>
__device__ void merge_warps(const SegPagedAttentionParams& params,
                            const ResultRows& rows,
                            SoftmaxState<T, kHeadDim, false>& state,
                            void* shared) {
  using State = SoftmaxState<T, kHeadDim, false>;
  using Shape = typename State::Shape;
  constexpr int kWarps = Shape::kWarpsOverKeys;
  using States = WarpStates<kHeadDim, kWarps>;
  static_assert(sizeof(States) <= sizeof(SharedMemory<T, kHeadDim, false>::stages));
  States& states = *static_cast<States*>(shared);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, member = lane % 4;
  state.finish();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
#pragma unroll
    for (int column = 0; column < State::kColumnTiles; ++column) {
      *reinterpret_cast<float2*>(&states.sums[warp][row][column * 8 + member * 2]) = {
          state.sums[0][column][2 * half], state.sums[0][column][2 * half + 1]};
    }
    if (member == 0) {
      states.maximum[warp][row] = state.maximum[0][half];
      states.denominator[warp][row] = state.denominator[0][half];
    }
  }
  __syncthreads();

  constexpr int kPairs = kHeadDim / 2;
  for (int i = threadIdx.x; i < rows.num_rows * kPairs; i += Shape::kThreads) {
    const int row = i / kPairs, column = i % kPairs * 2;
    float maximum = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, states.maximum[w][row]);
    const float reference = maximum == -INFINITY ? 0.0f : maximum;
    float denominator = 0.0f, first = 0.0f, second = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = ptx::exp2(states.maximum[w][row] - reference);
      denominator += states.denominator[w][row] * weight;
      first += states.sums[w][row][column] * weight;
      second += states.sums[w][row][column + 1] * weight;
    }
    if (rows.first_partial >= 0) {
      float* partial = partial_row(params, kHeadDim, rows.first_partial + row);
      *reinterpret_cast<float2*>(partial + column) = {first, second};
      if (column == 0) *reinterpret_cast<float2*>(partial + kHeadDim) = {maximum, denominator};
    } else {
      const float scale = inverse(denominator);
      *reinterpret_cast<uint32_t*>(out_row<T>(params, rows, row) + column) =
          ptx::pack<T>(first * scale, second * scale);
      if (column == 0) write_lse(params, rows, row, maximum, denominator);
    }
  }
}

}  // namespace redknot::gpu
