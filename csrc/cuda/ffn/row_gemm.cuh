#pragma once

#include "cuda/ffn/epilogue.cuh"
#include "cuda/ffn/tile_product.cuh"

// The products of gathered_ffn with mma.sync (sm_80): C = A B^T over the rows that *count says.
//
// A block per SM goes through the items of the plan (schedule.h), which every block makes for
// itself from the count: a tile of C, or a part of its depth. All threads copy stages of A and B
// ahead of the products (tile_loads.cuh); eight warps share a tile, each with its sums in
// registers. The fragments of the next 16 of depth are read while those before are multiplied.
// Where a tile's depth is split, each part leaves its sums in memory, and whichever block arrives
// last adds them up in the order of the parts: no atomics on results, the same bits in every run.
//
// Assumed: 16-bit elements; columns, depth and strides are multiples of 8, pointers of 16 bytes;
// `arrivals` is zero (gather_norm_kernel sees to it) and becomes so again.
namespace redknot::gpu {

// The best of all plans; the lanes of a warp look at a number of splits each.
__device__ inline GemmPlan plan_of_warp(TileSize tile,
                                        const RowGemm& gemm,
                                        int32_t rows,
                                        int32_t columns_of_b) {
  const GemmPlan unsplit = unsplit_plan(tile, rows, columns_of_b, gemm.depth);
  const auto workers = static_cast<int32_t>(gridDim.x);
  uint64_t best = rank_of_splits(
      tile, unsplit, static_cast<int32_t>(threadIdx.x % 32) + 1, workers, gemm.partial_floats);
  for (int step = 16; step > 0; step /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, best, step);
    if (other < best) best = other;
  }
  return split_plan(unsplit, static_cast<int32_t>(best & 0xffffffffu));
}

// Leaves the sums of one part of a tile and returns whether this block came last; then they are
// those of the whole tile. For the first kGemmThreads threads of a block, which sync() brings
// together.
template <int kCount, typename Sync>
__device__ bool join_splits(const RowGemm& gemm,
                            const GemmPlan& plan,
                            const WorkItem2d& at,
                            int32_t* arrived,
                            float (&sums)[kCount],
                            Sync&& sync) {
  const int32_t first_item = at.tile(plan) * plan.splits;
  const auto part = [&](int32_t split) {
    return gemm.partials + (int64_t{first_item + split} * kCount) * kGemmThreads + threadIdx.x;
  };
  float* own = part(at.split);
#pragma unroll
  for (int i = 0; i < kCount; ++i) own[i * kGemmThreads] = sums[i];
  __threadfence();
  sync();
  if (threadIdx.x == 0) *arrived = atomicAdd(gemm.arrivals + at.tile(plan), 1);
  sync();
  if (*arrived != plan.splits - 1) return false;
  __threadfence();
  if (threadIdx.x == 0) gemm.arrivals[at.tile(plan)] = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = 0.0f;
  for (int32_t split = 0; split < plan.splits; ++split) {
    const float* from = part(split);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += __ldcg(from + i * kGemmThreads);
  }
  return true;
}

// What comes behind the products of an item: the sums of a warp, whose first row of C and of B are
// given, go where they belong.
template <typename T, Result kResult, int kRowTiles, int kColumnTiles, typename Sync>
__device__ void finish_tile(const RowGemm& gemm,
                            const GemmPlan& plan,
                            const WorkItem2d& at,
                            int32_t rows,
                            int32_t row,
                            int32_t column_of_b,
                            int32_t* arrived,
                            float (&sums)[kRowTiles][kColumnTiles][4],
                            Sync&& sync) {
  if (plan.splits > 1) {
    constexpr int kCount = kRowTiles * kColumnTiles * 4;
    auto& flat = reinterpret_cast<float (&)[kCount]>(sums);
    if (!join_splits(gemm, plan, at, arrived, flat, sync)) return;
  }
  const RowSink<T, kResult> sink{gemm, rows};
  if constexpr (kResult == Result::kGated) {
    activate(sums, gemm.activation);
    write_tile<kRowTiles, kColumnTiles / 2>(sums, row, column_of_b / 2, sink);
  } else {
    if (kResult == Result::kStore && gemm.bias != nullptr) add_bias<T>(gemm, column_of_b, sums);
    write_tile<kRowTiles, kColumnTiles>(sums, row, column_of_b, sink);
  }
}

template <typename T, typename Tile, Result kResult>
__device__ void multiply_tiles(const RowGemm& gemm, int32_t rows, unsigned char* smem) {
  constexpr bool kIsGated = kResult == Result::kGated;
  using Loads = TileLoads<T, Tile, kIsGated>;
  using Product = TileProduct<T, Tile>;
  constexpr int kStageElements = stage_bytes<Tile>() / 2;
  const GemmPlan plan =
      plan_of_warp(Tile::kSize, gemm, rows, kIsGated ? 2 * gemm.columns : gemm.columns);
  T* stages = reinterpret_cast<T*>(smem);
  auto* arrived = reinterpret_cast<int32_t*>(smem + kStageBytes);
  Loads loads(gemm, plan, stages, rows);
  for (int i = 0; i < Tile::kStages - 1; ++i) loads.next();
  ptx::copy_wait<Tile::kStages - 2>();
  __syncthreads();

  Product product;
  typename Product::Fragments fragments[2];
  Product::load(fragments[0], stages, 0);
  int stage = 0;
  for (int32_t item = blockIdx.x; item < plan.num_items(); item += gridDim.x) {
    const WorkItem2d at = item_at(plan, item);
    product.clear();
    for (int32_t step = at.step_begin; step < at.step_end; ++step) {
#pragma unroll
      for (int k = 0; k < Product::kDepthTiles; ++k) {
        if (k + 1 < Product::kDepthTiles) {
          Product::load(fragments[(k + 1) % 2], stages + stage * kStageElements, k + 1);
        } else {
          // The next stage has landed for all; the one now loaded into is no longer read.
          ptx::copy_wait<Tile::kStages - 2>();
          __syncthreads();
          stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
          Product::load(fragments[(k + 1) % 2], stages + stage * kStageElements, 0);
        }
        if (k == 0) loads.next();
        product.add(fragments[k % 2]);
      }
    }
    const auto sync = [] { __syncthreads(); };
    const int32_t row = at.row_tile * Tile::kSize.rows + Product::first_row();
    const int32_t column = at.column_tile * Tile::kSize.columns + Product::first_column();
    finish_tile<T, kResult>(gemm, plan, at, rows, row, column, arrived, product.sums, sync);
  }
  ptx::copy_wait<0>();
}

template <typename T, Result kResult>
__global__ void __launch_bounds__(kGemmThreads, 1) row_gemm_kernel(RowGemm gemm) {
  RK_DYNAMIC_SMEM(smem);
  const int32_t rows = rows_of_call(gemm.count, gemm.first_row, gemm.max_rows);
  if (rows == 0 || rows < gemm.least_rows || rows > gemm.most_rows) return;
  if (rows <= kFlatRows) {
    multiply_tiles<T, FlatTile, kResult>(gemm, rows, smem);
  } else if (rows <= kLowRows) {
    multiply_tiles<T, LowTile, kResult>(gemm, rows, smem);
  } else {
    multiply_tiles<T, WideTile, kResult>(gemm, rows, smem);
  }
}

}  // namespace redknot::gpu
