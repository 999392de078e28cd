#pragma once

#include "cuda/attention/plan.h"
#include "cuda/common/check_value.h"
#include "redknot/attention.h"

namespace redknot::gpu {

// Calls `run` with every item of the prefill or of the decode that is this block's.
template <bool kIsPrefill, typename Run>
__device__ void each_item(const int32_t* plan, int64_t items_begin, Run&& run) {
  const auto& header = *reinterpret_cast<const GpuPlanHeader*>(plan);
  const auto* items = reinterpret_cast<const WorkItem*>(plan + items_begin);
  const int32_t begin = kIsPrefill ? 0 : header.num_prefill_items;
  const int32_t count = (kIsPrefill ? header.num_prefill_items : header.num_items) - begin;
  const auto num_blocks = static_cast<int32_t>(gridDim.x);
  for (int32_t round = 0; round * num_blocks < count; ++round) {
    const int32_t item = item_of_round(round, static_cast<int32_t>(blockIdx.x), num_blocks);
    if (item < count) run(items[begin + item]);
  }
}

// All `num_threads` threads of a block, or the 32 of one of its warps, look at the lists that a
// work item reads, before any is followed; nothing in builds that trust them.
__device__ inline void check_item(const SegPagedAttentionParams& params,
                                  const WorkItem& item,
                                  int32_t num_threads) {
  if constexpr (kChecksValues) {
    RK_CHECK_VALUE(0 <= item.q_begin && item.q_end <= params.num_tokens,
                   "cu_seqlens_q must lie between 0 and num_tokens");
    RK_CHECK_VALUE(0 <= item.ref_begin && item.ref_end <= params.num_refs,
                   "row_indptr must lie between 0 and num_refs");
    const auto first = static_cast<int32_t>(threadIdx.x) % num_threads;
    for (int32_t r = item.ref_begin + first; r < item.ref_end; r += num_threads) {
      const PageRef ref = params.page_refs[r];
      RK_CHECK_VALUE(0 <= ref.page && ref.page < params.pool.num_pages,
                     "page_refs must name pages below num_pages");
      RK_CHECK_VALUE(0 <= ref.num_valid && ref.num_valid <= params.pool.page_size,
                     "page_refs must have 0 to page_size valid slots");
      RK_CHECK_VALUE(ref.first_position >= 0, "page_refs must have positions from 0 on");
      RK_CHECK_VALUE(ref.rotation_offset == 0 || params.maybe_inv_freq != nullptr,
                     "page_refs has rotation offsets, so inv_freq is needed");
    }
  }
}

}  // namespace redknot::gpu
