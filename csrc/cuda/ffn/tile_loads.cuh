#pragma once

#include "cuda/ffn/row_gemm.h"
#include "cuda/ptx/copy.cuh"

// How tiles of A and B get into shared memory (cp.async), and how they lie there.
namespace redknot::gpu {

// Walks through the items of a block ahead of the products, a stage per step; it does not stop
// between items, so that memory is kept busy during an epilogue.
template <typename T, typename Tile, bool kIsGated>
struct TileLoads {
  static constexpr TileSize kSize = Tile::kSize;
  static constexpr int kVectors = kSize.depth / kVector;                // of a row
  static constexpr int kRowsAtOnce = kGemmThreads / kVectors;           // that all threads load
  static constexpr int kWarpPart = kSize.columns / Tile::kWarpColumns;  // rows of B
  static_assert(kRowsAtOnce % 8 == 0, "a thread's vectors have one swizzle");
  static_assert(kSize.columns % kRowsAtOnce == 0);
  static_assert(!kIsGated || kRowsAtOnce % kWarpPart == 0,
                "a thread's rows of B are all up or not");
  static constexpr int kColumnsAtOnce = kIsGated ? kRowsAtOnce / 2 : kRowsAtOnce;
  static constexpr int kTileColumns = kIsGated ? kSize.columns / 2 : kSize.columns;

  const RowGemm& gemm;
  const GemmPlan& plan;
  T* stages;
  int32_t rows;  // of this call
  int32_t item;  // which is loaded next
  int32_t step;  // of it
  int32_t step_end;
  int32_t stage;
  int32_t row;     // of A, this thread's first
  int32_t column;  // of C, this thread's first
  const T* a;      // this thread's vector of the first row, at depth 0
  const T* b;

  __device__ TileLoads(const RowGemm& gemm, const GemmPlan& plan, T* stages, int32_t rows)
      : gemm(gemm), plan(plan), stages(stages), rows(rows), item(blockIdx.x), stage(0) {
    begin_item();
  }

  __device__ void begin_item() {
    if (item >= plan.num_items()) return;
    const WorkItem2d at = item_at(plan, item);
    const int thread_row = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
    const WeightRow weight = weight_row(kIsGated, kWarpPart, thread_row);
    step = at.step_begin;
    step_end = at.step_end;
    row = at.row_tile * kSize.rows + thread_row;
    column = at.column_tile * kTileColumns + weight.column;
    a = static_cast<const T*>(gemm.a) + row * gemm.a_stride + vector * kVector;
    b = weight.is_up
            ? static_cast<const T*>(gemm.b_up) + column * gemm.b_up_stride + vector * kVector
            : static_cast<const T*>(gemm.b) + column * gemm.b_stride + vector * kVector;
  }

  // Issues the copies of the next stage, if there is one. Commits a group in any case, so that
  // waits can count groups. What is outside of A and B becomes zeros.
  __device__ void next() {
    if (item < plan.num_items()) {
      const int thread_row = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
      T* to =
          stages + stage * (stage_bytes<Tile>() / 2) + swizzled<kSize.depth>(thread_row, vector);
      const int32_t depth = step * kSize.depth;
      const bool is_inside = depth + vector * kVector < gemm.depth;
#pragma unroll
      for (int first = 0; first < kSize.rows; first += kRowsAtOnce) {
        if (kSize.rows % kRowsAtOnce == 0 || first + thread_row < kSize.rows) {
          ptx::copy_async_16(to + first * kSize.depth,
                             a + depth + first * gemm.a_stride,
                             is_inside && row + first < rows);
        }
      }
      to += kSize.rows * kSize.depth;
      const bool is_up = kIsGated && weight_row(true, kWarpPart, thread_row).is_up;
      const int64_t stride = is_up ? gemm.b_up_stride : gemm.b_stride;
#pragma unroll
      for (int pass = 0; pass < kSize.columns / kRowsAtOnce; ++pass) {
        ptx::copy_async_16(to + pass * kRowsAtOnce * kSize.depth,
                           b + depth + pass * kColumnsAtOnce * stride,
                           is_inside && column + pass * kColumnsAtOnce < gemm.columns);
      }
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
      if (++step == step_end) {
        item += gridDim.x;
        begin_item();
      }
    }
    ptx::copy_commit();
  }
};

}  // namespace redknot::gpu
