#pragma once

#include "cuda/common/check_value.h"
#include "redknot/attention.h"
#include "redknot/planner.h"

namespace redknot::gpu {

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
