#pragma once

#include <cstdint>

#include "redknot/types.h"

namespace redknot {

// The pool of pages of one device as kernels see it. k and v may be views of one tensor, so page
// and slot strides are free; only the last dimension is contiguous. Strides count elements.
struct PagePool {
  void* k = nullptr;  // [num_pages, page_size, head_dim]
  void* v = nullptr;  // [num_pages, page_size, head_dim]
  int64_t num_pages = 0;
  int64_t page_size = 0;
  int64_t head_dim = 0;
  int64_t k_page_stride = 0;
  int64_t k_slot_stride = 0;
  int64_t v_page_stride = 0;
  int64_t v_slot_stride = 0;
  DType dtype = DType::kFloat32;

  constexpr int64_t k_offset(int64_t page, int64_t slot) const {
    return page * k_page_stride + slot * k_slot_stride;
  }
  constexpr int64_t v_offset(int64_t page, int64_t slot) const {
    return page * v_page_stride + slot * v_slot_stride;
  }
};

// pool[slots[t, h]] = k[t, h], v[t, h]. A slot number is page * page_size + slot in the page; two
// tokens never share one.
struct WritePagesParams {
  PagePool pool;
  const void* k = nullptr;         // [num_tokens, num_kv_heads, head_dim]
  const void* v = nullptr;         // [num_tokens, num_kv_heads, head_dim]
  const int64_t* slots = nullptr;  // [num_tokens, num_kv_heads]; negative: skip
  int64_t num_tokens = 0;
  int64_t num_kv_heads = 0;
  int64_t k_token_stride = 0;
  int64_t k_head_stride = 0;
  int64_t v_token_stride = 0;
  int64_t v_head_stride = 0;
  int64_t slots_token_stride = 0;  // the head stride is 1
};

// Whole pages, K and V: the copies of copy on write. No destination is also a source, and none
// occurs twice, so the copies may run in any order.
struct CopyPagesParams {
  PagePool pool;
  const int32_t* copies = nullptr;  // [num_copies, 2]: source page, destination page
  int64_t num_copies = 0;
};

}  // namespace redknot
