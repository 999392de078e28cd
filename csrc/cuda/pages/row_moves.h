#pragma once

#include <cstdint>

#include "cuda/common/check_value.h"
#include "cuda/common/divide.h"
#include "cuda/common/host_device.h"
#include "redknot/pages.h"

namespace redknot::gpu {

// One row: the K and the V of one token slot of one head, head_dim elements each. Offsets count
// elements from the bases of the source and of the pool.
struct RowMove {
  int64_t k_from;
  int64_t k_to;
  int64_t v_from;
  int64_t v_to;
  bool skip;
};

// Row = token * num_kv_heads + head.
struct WriteRows {
  WritePagesParams params;

  RK_HOST_DEVICE const void* k_source() const { return params.k; }
  RK_HOST_DEVICE const void* v_source() const { return params.v; }
  RK_HOST_DEVICE int64_t num_rows() const { return params.num_tokens * params.num_kv_heads; }

  RK_HOST_DEVICE RowMove operator()(int64_t row) const {
    const auto [token, head] = divide(row, params.num_kv_heads);
    const int64_t slot_number = params.slots[token * params.slots_token_stride + head];
    RK_CHECK_VALUE(slot_number >= -1 && slot_number < params.pool.num_pages * params.pool.page_size,
                   "slots must be -1 or below num_pages * page_size");
    if (slot_number < 0) return {0, 0, 0, 0, true};
    const auto [page, slot] = divide(slot_number, params.pool.page_size);
    return {token * params.k_token_stride + head * params.k_head_stride,
            params.pool.k_offset(page, slot),
            token * params.v_token_stride + head * params.v_head_stride,
            params.pool.v_offset(page, slot),
            false};
  }
};

// Row = copy * page_size + slot.
struct CopyRows {
  CopyPagesParams params;

  RK_HOST_DEVICE const void* k_source() const { return params.pool.k; }
  RK_HOST_DEVICE const void* v_source() const { return params.pool.v; }
  RK_HOST_DEVICE int64_t num_rows() const { return params.num_copies * params.pool.page_size; }

  RK_HOST_DEVICE RowMove operator()(int64_t row) const {
    const auto [copy, slot] = divide(row, params.pool.page_size);
    const int64_t source = params.copies[2 * copy];
    const int64_t destination = params.copies[2 * copy + 1];
    RK_CHECK_VALUE(0 <= source && source < params.pool.num_pages && 0 <= destination &&
                       destination < params.pool.num_pages,
                   "copies must name pages below num_pages");
    return {params.pool.k_offset(source, slot),
            params.pool.k_offset(destination, slot),
            params.pool.v_offset(source, slot),
            params.pool.v_offset(destination, slot),
            false};
  }
};

}  // namespace redknot::gpu
