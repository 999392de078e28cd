#pragma once

#include "cuda/attention/shared_tile.cuh"
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
        if (row >= rows.num_rows) continue;
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

// The states of kWarps warps that shared the keys of the same rows become that of warp 0, in the
// order of the warps. They go through kSlots places in shared memory, as many at a time.
template <typename Threads, int kWarps, int kSlots, typename State>
__device__ void merge_warps(State& state, WarpState<State::kColumnTiles> (&slots)[kSlots]) {
  const int warp = Threads::index() / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int first = 1; first < kWarps; first += kSlots) {
    const int end = first + kSlots < kWarps ? first + kSlots : kWarps;
    if (warp >= first && warp < end) state.save(&slots[warp - first], lane);
    Threads::sync();
    if (warp == 0) {
#pragma unroll
      for (int from = first; from < end; ++from) state.merge(slots[from - first], lane);
    }
    if (end < kWarps) Threads::sync();
  }
}

}  // namespace redknot::gpu
