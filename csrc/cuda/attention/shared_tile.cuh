#pragma once

#include <cmath>

#include "cuda/attention/key_walker.cuh"
#include "cuda/attention/tile_shape.h"
#include "cuda/common/element.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/rope/angles.cuh"
#include "redknot/attention.h"

// How queries, keys and values lie in shared memory, and how they get there.
namespace redknot::gpu {

constexpr int kVectorElements = 8;  // 16 bytes

// A matrix of kHeadDim columns whose 16-byte vectors are exchanged within a row, so that the eight
// rows which ldmatrix reads at once lie in different banks.
template <typename T, int kHeadDim>
struct SharedMatrix {
  T* base;

  __device__ static int offset(int row, int vector) {
    // A row of 32 elements is half a line of the banks: two rows share a line.
    const int turn = kHeadDim >= 64 ? row % 8 : row / 2 % 4;
    return row * kHeadDim + (vector ^ turn) * kVectorElements;
  }
  __device__ static int byte_offset(int row, int vector) {
    return offset(row, vector) * static_cast<int>(sizeof(T));
  }
  __device__ T* vector_at(int row, int vector) const { return base + offset(row, vector); }
  __device__ T& at(int row, int column) const {
    return vector_at(row, column / kVectorElements)[column % kVectorElements];
  }
};

template <typename T, int kHeadDim, bool kIsPrefill, bool kIsCompact = false>
struct SharedMemory {
  using Shape = TileShape<kHeadDim, kIsPrefill, kIsCompact>;
  static constexpr int kQueryElements = Shape::kRows * kHeadDim;
  static constexpr int kBlockElements = Shape::kBlockKeys * kHeadDim;
  // Blocks that are described: those in stages, and the one whose loads come next.
  static constexpr int kDescribed = Shape::kStages + 1;

  alignas(128) T queries[kQueryElements];
  T stages[Shape::kStages][2][kBlockElements];  // K, V
  KeyBlock<Shape::kChunks> blocks[kDescribed];
  int32_t positions[Shape::kRows];  // of the queries; -1 behind the last one
  Reach reach;
  // Each lane of warp 0 has its own. They are here because the sums need every register.
  KeyWalker<Shape::kChunks> walkers[kWarpSize];
};

// Where the query rows of a work item are in global memory: row m is query head m % group_size of
// token q_begin + m / group_size.
template <typename T>
struct QueryRows {
  const T* q;
  int64_t token_stride;
  int64_t head_stride;
  int32_t group_size;
  int32_t num_rows;
  int32_t first_row = 0;  // row 0 is this one of the work item's

  __device__ const T* operator()(int row) const {
    row += first_row;
    const int token = row / group_size;
    return q + token * token_stride + (row - token * group_size) * head_stride;
  }
};

// All threads of a block, as those that do something together.
template <int kThreads>
struct BlockThreads {
  static constexpr int kCount = kThreads;
  __device__ static int index() { return threadIdx.x; }
  __device__ static void sync() { __syncthreads(); }
};

// Queries into shared memory, turned by -offset: (R(p) q) . (R(o) k) = (R(p - o) q) . k, so that
// the keys stay as they are. Rows that do not exist are zeros.
template <typename T, int kHeadDim, int kRows, typename Threads, typename Matrix>
__device__ void load_queries(const QueryRows<T>& rows,
                             const Matrix& queries,
                             const float* inv_freq,
                             int32_t rotary_dim,
                             bool is_interleaved,
                             int32_t offset) {
  constexpr int kVectors = kHeadDim / kVectorElements;
  using Access = Vector<T, kVectorElements>;
  constexpr int kThreads = Threads::kCount;
  const int thread = ptx::recomputed(Threads::index());
  for (int i = thread; i < kRows * kVectors; i += kThreads) {
    const int row = i / kVectors, vector = i % kVectors;
    auto* to = reinterpret_cast<Access*>(queries.vector_at(row, vector));
    if (row < rows.num_rows) {
      *to = *reinterpret_cast<const Access*>(rows(row) + vector * kVectorElements);
    } else {
      *to = Access{};
    }
  }
  if (offset == 0) return;

  Threads::sync();
  const int num_pairs = rotary_dim / 2;
  if (num_pairs == 0) {  // an offset but no frequencies: no number is right
    for (int i = thread; i < rows.num_rows; i += kThreads) queries.at(i, 0) = from_float<T>(NAN);
    return;
  }
  const int rows_at_once = num_pairs < kThreads ? kThreads / num_pairs : 1;
  const int first_row = thread / num_pairs;
  if (first_row >= rows_at_once) return;
  for (int pair = thread % num_pairs; pair < num_pairs; pair += kThreads) {
    const Angles<1> angle(inv_freq + pair, -offset);
    const int left = is_interleaved ? 2 * pair : pair;
    const int right = is_interleaved ? left + 1 : left + num_pairs;
    for (int row = first_row; row < rows.num_rows; row += rows_at_once) {
      T& first = queries.at(row, left);
      T& second = queries.at(row, right);
      const float a = to_float(first), b = to_float(second);
      first = from_float<T>(a * angle.cosine[0] - b * angle.sine[0]);
      second = from_float<T>(b * angle.cosine[0] + a * angle.sine[0]);
    }
  }
}

// Issues the copies of a block's keys and values; slots without a token become zeros, for 0 * NaN
// would poison every sum.
template <typename T, int kHeadDim, typename Shape>
__device__ void load_block(const PagePool& pool,
                           const KeyBlock<Shape::kChunks>& block,
                           const SharedMatrix<T, kHeadDim>& keys,
                           const SharedMatrix<T, kHeadDim>& values) {
  constexpr int kVectors = kHeadDim / kVectorElements;
  static_assert(Shape::kThreads % kVectors == 0, "a thread keeps its column");
  constexpr int kSlotStep = Shape::kThreads / kVectors;
  const int thread = ptx::recomputed(threadIdx.x);
  const int vector = thread % kVectors;
  const T* k = static_cast<const T*>(pool.k) + vector * kVectorElements;
  const T* v = static_cast<const T*>(pool.v) + vector * kVectorElements;
#pragma unroll
  for (int step = 0; step < Shape::kBlockKeys / kSlotStep; ++step) {
    const int row = thread / kVectors + step * kSlotStep;
    const int chunk = row / kChunkKeys, in_chunk = row % kChunkKeys;
    const bool is_valid = in_chunk < block.num_valid[chunk];
    const int64_t page = block.page[chunk];
    const int64_t slot = block.slot[chunk] + in_chunk;
    ptx::copy_async_16(keys.vector_at(row, vector), k + pool.k_offset(page, slot), is_valid);
    ptx::copy_async_16(values.vector_at(row, vector), v + pool.v_offset(page, slot), is_valid);
  }
}

}  // namespace redknot::gpu
