#pragma once

#include "cuda/ffn/hopper_gemm.h"
#include "cuda/ffn/row_gemm.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/wgmma.cuh"

// The products of gathered_ffn with wgmma and the copy engine (sm_90a): C = A B^T over the rows
// that *count says, when they are more than the mma.sync kernel takes.
//
// A block per SM goes through the items of the same plan (schedule.h). One thread of the last
// warpgroup has the engine load stages of A (128 rows) and B (256 rows: a gate and an up tile of
// 128 each, or 256 of one matrix), up to kStages ahead and across items, so that loads go on during
// an epilogue. Two warpgroups multiply 64 rows each with m64n256k16: their sums are 128 registers a
// thread, and a gate and its up are in the same thread. `full` barriers count the bytes of a stage,
// `empty` ones the warps that are done with it.
//
// What is outside of A and B arrives as zeros; rows of A behind *count are whatever they are, and
// end in rows of C that are not written.
namespace redknot::gpu {

struct alignas(1024) HopperStage {
  unsigned char a[HopperTile::kSize.rows * ptx::kSwizzleRowBytes];
  unsigned char b[HopperTile::kSize.columns * ptx::kSwizzleRowBytes];
};

struct HopperShared {
  HopperStage stages[HopperTile::kStages];
  uint64_t full[HopperTile::kStages];
  uint64_t empty[HopperTile::kStages];
  int32_t arrived;
};
static_assert(sizeof(HopperShared) <= 227 * 1024);

// Which stage comes next, and the parity of its phase.
struct StageCursor {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == HopperTile::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <Result kResult>
__device__ void load_items(const HopperGemm& params, const GemmPlan& plan, HopperShared& shared) {
  constexpr bool kIsGated = kResult == Result::kGated;
  constexpr int kBox = HopperTile::kBoxRows;
  const TensorMap& second = kIsGated ? params.b_up : params.b;
  StageCursor cursor;
  for (int32_t item = blockIdx.x; item < plan.num_items(); item += gridDim.x) {
    const WorkItem2d at = item_at(plan, item);
    const int32_t row = at.row_tile * HopperTile::kSize.rows;
    const int32_t column = at.column_tile * (kIsGated ? kBox : 2 * kBox);
    const int32_t second_column = kIsGated ? column : column + kBox;
    for (int32_t step = at.step_begin; step < at.step_end; ++step) {
      HopperStage& stage = shared.stages[cursor.stage];
      uint64_t* full = &shared.full[cursor.stage];
      ptx::wait(&shared.empty[cursor.stage], cursor.phase ^ 1);
      ptx::arrive_expecting(full, sizeof(HopperStage));
      const int32_t depth = step * HopperTile::kSize.depth;
      ptx::load_box(stage.a, params.a, full, depth, row);
      ptx::load_box(stage.b, params.b, full, depth, column);
      ptx::load_box(stage.b + sizeof(stage.b) / 2, second, full, depth, second_column);
      cursor.advance();
    }
  }
}

template <typename T, Result kResult>
__device__ void multiply_items(const RowGemm& gemm,
                               const GemmPlan& plan,
                               int32_t rows,
                               HopperShared& shared) {
  constexpr int kSteps = HopperTile::kSize.depth / 16;  // of a product
  constexpr int kColumnTiles = HopperTile::kSize.columns / 8;
  const int group = static_cast<int>(threadIdx.x) / 128, warp = threadIdx.x / 32 % 4;
  const bool is_first_lane = threadIdx.x % 32 == 0;
  const uint32_t stages = ptx::shared_address(shared.stages);
  constexpr uint32_t kGroupBytes = 64 * ptx::kSwizzleRowBytes;  // rows of A of a warpgroup
  StageCursor cursor;
  for (int32_t item = blockIdx.x; item < plan.num_items(); item += gridDim.x) {
    const WorkItem2d at = item_at(plan, item);
    float sums[1][kColumnTiles][4];
    ptx::hold(sums[0]);
    int before = 0;  // the stage whose products may still be under way
    for (int32_t step = at.step_begin; step < at.step_end; ++step) {
      const uint32_t stage = stages + cursor.stage * static_cast<uint32_t>(sizeof(HopperStage));
      const uint32_t a = stage + group * kGroupBytes;
      const uint32_t b = stage + static_cast<uint32_t>(sizeof(HopperStage::a));
      ptx::wait(&shared.full[cursor.stage], cursor.phase);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        ptx::wgmma<T, ptx::Major::kK>(
            sums[0], ptx::k_major(a, k), ptx::k_major(b, k), k > 0 || step > at.step_begin);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the products of the stage before
      if (step > at.step_begin && is_first_lane) ptx::arrive(&shared.empty[before]);
      before = cursor.stage;
      cursor.advance();
    }
    ptx::wgmma_wait<0>();
    ptx::hold(sums[0]);
    if (is_first_lane) ptx::arrive(&shared.empty[before]);
    const auto sync = [] { ptx::sync_named(1, kGemmThreads); };
    const int32_t row = at.row_tile * HopperTile::kSize.rows + group * 64 + warp * 16;
    const int32_t column = at.column_tile * HopperTile::kSize.columns;
    finish_tile<T, kResult>(gemm, plan, at, rows, row, column, &shared.arrived, sums, sync);
  }
}

template <typename T, Result kResult>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_gemm_kernel(const __grid_constant__ HopperGemm params) {
  RK_DYNAMIC_SMEM(smem);
  auto& shared = *reinterpret_cast<HopperShared*>(smem);
  const RowGemm& gemm = params.gemm;
  const int32_t rows = rows_of_call(gemm.count, gemm.first_row, gemm.max_rows);
  if (rows == 0 || rows < gemm.least_rows || rows > gemm.most_rows) return;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < HopperTile::kStages; ++stage) {
      ptx::init_barrier(&shared.full[stage], 1);
      ptx::init_barrier(&shared.empty[stage], kGemmThreads / 32);
    }
    ptx::fence_barrier_init();
    ptx::prefetch_map(params.a);
    ptx::prefetch_map(params.b);
    if (kResult == Result::kGated) ptx::prefetch_map(params.b_up);
  }
  const int32_t columns_of_b = kResult == Result::kGated ? 2 * gemm.columns : gemm.columns;
  const GemmPlan plan = plan_of_warp(HopperTile::kSize, gemm, rows, columns_of_b);
  __syncthreads();
  if (threadIdx.x >= kGemmThreads) {
    ptx::give_registers<kProducerRegisters>();
    if (threadIdx.x == kGemmThreads) load_items<kResult>(params, plan, shared);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    multiply_items<T, kResult>(gemm, plan, rows, shared);
  }
}

}  // namespace redknot::gpu
