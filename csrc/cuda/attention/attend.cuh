#pragma once

#include "cuda/attention/items.cuh"
#include "cuda/attention/plan.h"
#include "cuda/attention/result.cuh"
#include "redknot/attention.h"

// seg_paged_attention on a GPU: out = softmax(q k^T * scale) v over the keys that a query sees.
//
// A block of threads goes through the work items that the plan gives it, one tile of query rows
// (tokens x query heads of one KV head) against a range of pages each. Warp 0 walks the page
// references and packs what the tile may see into blocks of keys (key_walker.cuh); all threads copy
// blocks into the stages of shared memory, kStages - 1 ahead of the products; every warp keeps an
// online softmax of its rows (prefill) or of its keys (decode). Blocks in which every query sees
// every key pay no mask. Queries are turned once per run of pages with one rotation offset.
//
// Assumed: 16-bit elements; 16-byte aligned rows of q, out, K and V; softmax_scale > 0; a plan for
// these very rows.
namespace redknot::gpu {

template <typename T, int kHeadDim, bool kIsPrefill, bool kIsCompact>
struct Attend {
  using Shape = TileShape<kHeadDim, kIsPrefill, kIsCompact>;
  using Shared = SharedMemory<T, kHeadDim, kIsPrefill, kIsCompact>;
  using Matrix = SharedMatrix<T, kHeadDim>;
  using State = SoftmaxState<T, kHeadDim, Shape::kRowTiles, Shape::kKeysPerWarp>;
  using Threads = BlockThreads<Shape::kThreads>;

  static constexpr bool kMayBeLarge = kIsPrefill && kHasCompactPrefill<kHeadDim> && !kIsCompact;
  static_assert(sizeof(Shared) <= (kMayBeLarge ? kMostSharedBytes : kLeastSharedBytes));
  // Two blocks of decode share the 227 KiB of an H100.
  static_assert(kIsPrefill || 2 * (sizeof(Shared) + 1024) <= 227 * 1024);

  const SegPagedAttentionParams& params;
  const ScoreScale& scale;
  const int32_t group_size;
  Shared& shared;

  __device__ Matrix keys(int number) const { return {shared.stages[number % Shape::kStages][0]}; }
  __device__ Matrix values(int number) const { return {shared.stages[number % Shape::kStages][1]}; }
  __device__ KeyBlock<Shape::kChunks>& block(int number) const {
    return shared.blocks[number % Shared::kDescribed];
  }

  // Commits a group in any case, so that waits can count groups.
  __device__ void load(int number) const {
    if (block(number).num_chunks > 0) {
      load_block<T, kHeadDim, Shape>(params.pool, block(number), keys(number), values(number));
    }
    ptx::copy_commit();
  }

  // What is needed rarely is read again then: the sums need every register.
  __device__ int32_t first_head(const WorkItem& item) const {
    return item.row % static_cast<int32_t>(params.num_kv_heads) * group_size;
  }
  __device__ int32_t num_rows(const WorkItem& item) const {
    return (item.q_end - item.q_begin) * group_size;
  }
  __device__ void load_queries_turned(const WorkItem& item, int32_t rotation_offset) const {
    const QueryRows<T> rows{static_cast<const T*>(params.q) + item.q_begin * params.q_token_stride +
                                first_head(item) * params.q_head_stride,
                            params.q_token_stride,
                            params.q_head_stride,
                            group_size,
                            num_rows(item)};
    load_queries<T, kHeadDim, Shape::kRows, Threads>(
        rows,
        Matrix{shared.queries},
        params.maybe_inv_freq,
        params.maybe_inv_freq == nullptr ? 0 : static_cast<int32_t>(params.rotary_dim),
        params.rope_interleaved,
        rotation_offset);
  }

  __device__ void run(const WorkItem& item) const {
    const int warp = threadIdx.x / kWarpSize;
    const int first_row = kIsPrefill ? warp * Shape::kRowTiles * kMmaRows : 0;
    const int first_key = kIsPrefill ? 0 : warp * Shape::kKeysPerWarp;
    const Matrix queries{shared.queries};
    check_item(params, item, Shape::kThreads);

    // --- prologue: queries, the first blocks ---------------------------------------------------
    __syncthreads();  // the item before this one is done with shared memory
    KeyWalker<Shape::kChunks>& walker = shared.walkers[threadIdx.x % kWarpSize];
    if (threadIdx.x == 0) shared.reach = reach_of(params, item);
    if (warp == 0) {
      walker.start(params, item);
      for (int number = 0; number < Shape::kStages; ++number) walker.next(&block(number));
    }
    for (int row = threadIdx.x; row < Shape::kRows; row += Shape::kThreads) {
      const int32_t token = item.q_begin + row / group_size;
      shared.positions[row] = row < num_rows(item) ? params.q_positions[token] : -1;
    }
    int32_t rotation_offset = 0;
    load_queries_turned(item, rotation_offset);
    __syncthreads();
    for (int number = 0; number < Shape::kStages - 1; ++number) load(number);

    // --- blocks of keys --------------------------------------------------------------------------
    State state;
    state.clear();
    for (int number = 0;; ++number) {
      ptx::copy_wait<Shape::kStages - 2>();
      __syncthreads();  // this block has landed for all; the one before it is no longer read
      const KeyBlock<Shape::kChunks>& now = block(number);
      if (now.num_chunks == 0) break;
      load(number + Shape::kStages - 1);
      if (warp == 0) walker.next(&block(number + Shape::kStages));
      if (now.rotation_offset != rotation_offset) {
        rotation_offset = now.rotation_offset;
        load_queries_turned(item, rotation_offset);
        __syncthreads();
      }
      state.add_block(queries,
                      keys(number),
                      values(number),
                      now,
                      shared.positions,
                      shared.reach,
                      scale,
                      first_row,
                      first_key);
    }

    // --- epilogue --------------------------------------------------------------------------------
    ptx::copy_wait<0>();
    if constexpr (!kIsPrefill) {
      constexpr int kSlots = Shape::kWarpsOverKeys - 1;
      using Slots = WarpState<State::kColumnTiles>[kSlots];
      static_assert(sizeof(Slots) <= sizeof(shared.stages));
      merge_warps<Threads, Shape::kWarpsOverKeys>(state, reinterpret_cast<Slots&>(shared.stages));
      if (warp != 0) return;
    }
    write_rows<T, kHeadDim>(
        params,
        {item.q_begin, first_head(item), group_size, num_rows(item), item.partial},
        state,
        queries,
        first_row);
  }
};

template <typename T, int kHeadDim, bool kIsPrefill, bool kIsCompact = false>
__global__ void __launch_bounds__((TileShape<kHeadDim, kIsPrefill, kIsCompact>::kThreads),
                                  (TileShape<kHeadDim, kIsPrefill, kIsCompact>::kBlocksPerSm))
    attend_kernel(SegPagedAttentionParams params, PlanShape plan, ScoreScale scale) {
  RK_DYNAMIC_SMEM(smem);
  using Kernel = Attend<T, kHeadDim, kIsPrefill, kIsCompact>;
  const Kernel attend{
      params, scale, plan.group_size, *reinterpret_cast<typename Kernel::Shared*>(smem)};
  each_item<kIsPrefill>(params.plan, plan.items, [&](const WorkItem& item) { attend.run(item); });
}

// Merges the partial results of every split tile, in the order of its splits. A warp takes a result
// row; a tile is found by its first split.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(128)
    merge_splits_kernel(SegPagedAttentionParams params, PlanShape plan) {
  constexpr int kWarps = 4;
  constexpr int kColumns = kHeadDim / kWarpSize;  // of a lane: lane, lane + 32, ...
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const auto& header = *reinterpret_cast<const GpuPlanHeader*>(params.plan);
  const auto* items = reinterpret_cast<const WorkItem*>(params.plan + plan.items);
  for (int32_t i = blockIdx.x; i < header.num_items; i += gridDim.x) {
    const WorkItem item = items[i];
    if (item.num_splits == 1 || item.split != 0) continue;
    const int32_t rows_per_split = i < header.num_prefill_items ? kPrefillRows : kDecodeRows;
    const int32_t kv_head = item.row % static_cast<int32_t>(params.num_kv_heads);
    const ResultRows rows{item.q_begin,
                          kv_head * plan.group_size,
                          plan.group_size,
                          (item.q_end - item.q_begin) * plan.group_size,
                          -1};
    for (int row = warp; row < rows.num_rows; row += kWarps) {
      const auto partial = [&](int split) {
        return partial_row(params, kHeadDim, item.partial + split * rows_per_split + row);
      };
      float maximum = -INFINITY;
      for (int split = 0; split < item.num_splits; ++split) {
        maximum = fmaxf(maximum, partial(split)[kHeadDim]);
      }
      const float reference = maximum == -INFINITY ? 0.0f : maximum;
      float denominator = 0.0f, sums[kColumns] = {};
      for (int split = 0; split < item.num_splits; ++split) {
        const float* from = partial(split);
        const float weight = ptx::exp2(from[kHeadDim] - reference);
        denominator += from[kHeadDim + 1] * weight;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[c] += from[lane + c * kWarpSize] * weight;
      }
      const float scale = inverse(denominator);
      T* out = out_row<T>(params, rows, row);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[lane + c * kWarpSize] = from_float<T>(sums[c] * scale);
      if (lane == 0) write_lse(params, rows, row, maximum, denominator);
    }
  }
}

}  // namespace redknot::gpu
