#pragma once

#include <cstdint>

#include "cuda/common/check_value.h"
#include "cuda/common/host_device.h"
#include "redknot/rope.h"

namespace redknot::gpu {

// Keys that turn by the same angles: rows a fixed stride apart. Offsets and strides count elements.
struct KeyRows {
  int64_t k_begin;
  int64_t out_begin;
  int64_t k_stride;
  int64_t out_stride;
  int64_t num_rows;  // 0 or less: nothing to do
  int32_t offset;    // positions to turn by
};

// The heads of a token share its offset; a run is up to 8 of them: enough to make a lane's sines,
// computed once per run, cheap beside its loads and stores.
struct TokenKeys {
  static constexpr int64_t kHeadsPerRun = 8;
  RopeRealignParams params;

  RK_HOST_DEVICE const void* k() const { return params.k; }
  RK_HOST_DEVICE void* out() const { return params.out; }
  RK_HOST_DEVICE int64_t num_groups() const { return params.num_tokens; }
  RK_HOST_DEVICE int64_t num_runs() const {
    return (params.num_heads + kHeadsPerRun - 1) / kHeadsPerRun;
  }

  RK_HOST_DEVICE KeyRows operator()(int64_t token, int64_t run) const {
    const int64_t first_head = run * kHeadsPerRun;
    const int64_t heads_left = params.num_heads - first_head;
    const int64_t offset = params.maybe_offsets ? params.maybe_offsets[token] : params.offset;
    const bool stays = offset == 0 && params.k == params.out;
    return {token * params.k_token_stride + first_head * params.k_head_stride,
            token * params.out_token_stride + first_head * params.out_head_stride,
            params.k_head_stride,
            params.out_head_stride,
            stays ? 0 : (heads_left < kHeadsPerRun ? heads_left : kHeadsPerRun),
            static_cast<int32_t>(offset)};
  }
};

// The valid slots of a page share its offset. A run takes every fourth slot, so that no run of a
// half-filled page is empty while another is long.
struct PageKeys {
  static constexpr int64_t kRunsPerPage = 4;
  RopeRealignPagesParams params;

  RK_HOST_DEVICE const void* k() const { return params.k_cache; }
  RK_HOST_DEVICE void* out() const { return params.k_cache; }
  RK_HOST_DEVICE int64_t num_groups() const { return params.num_refs; }
  RK_HOST_DEVICE int64_t num_runs() const { return kRunsPerPage; }

  RK_HOST_DEVICE KeyRows operator()(int64_t reference, int64_t run) const {
    const PageRef& page = params.page_refs[reference];
    RK_CHECK_VALUE(0 <= page.page && page.page < params.num_pages,
                   "page_refs must name pages below num_pages");
    RK_CHECK_VALUE(0 <= page.num_valid && page.num_valid <= params.page_size,
                   "page_refs must have 0 to page_size valid slots");
    const int64_t begin = page.page * params.k_page_stride + run * params.k_slot_stride;
    const int64_t stride = kRunsPerPage * params.k_slot_stride;
    const int64_t num_rows = (page.num_valid - run + kRunsPerPage - 1) / kRunsPerPage;
    return {begin,
            begin,
            stride,
            stride,
            page.rotation_offset == 0 ? 0 : num_rows,
            page.rotation_offset};
  }
};

}  // namespace redknot::gpu
