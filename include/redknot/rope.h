#pragma once

#include <cstdint>

#include "redknot/paged_kv.h"
#include "redknot/types.h"

namespace redknot {

// Moves rotated keys by an offset of positions: out = R(offset) k. One rotation by the difference,
// angles offset * inv_freq in fp32, one rounding; position-independent frequencies only. The first
// rotary_dim dimensions turn, the rest is copied. Pairs are (d, d + rotary_dim / 2), or
// (2 d, 2 d + 1) when interleaved.
struct RopeRealignParams {
  const void* k = nullptr;                 // [num_tokens, num_heads, head_dim]
  void* out = nullptr;                     // as k; may be k itself, same strides then
  const int32_t* maybe_offsets = nullptr;  // [num_tokens], used instead of `offset`
  const float* inv_freq = nullptr;         // [rotary_dim / 2]
  int64_t offset = 0;                      // positions, |offset| < 2^31
  int64_t num_tokens = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  int64_t rotary_dim = 0;
  int64_t k_token_stride = 0;  // strides count elements, the last dimension is contiguous
  int64_t k_head_stride = 0;
  int64_t out_token_stride = 0;
  int64_t out_head_stride = 0;
  DType dtype = DType::kFloat32;
  bool interleaved = false;
};

// The in-page form: the valid keys of every listed page are turned by the page's rotation_offset,
// so that the reference may then say 0. first_position is not looked at; no page is listed twice.
struct RopeRealignPagesParams {
  void* k_cache = nullptr;             // [num_pages, page_size, head_dim]
  const PageRef* page_refs = nullptr;  // [num_refs]
  const float* inv_freq = nullptr;     // [rotary_dim / 2]
  int64_t num_refs = 0;
  int64_t num_pages = 0;
  int64_t page_size = 0;
  int64_t head_dim = 0;
  int64_t rotary_dim = 0;
  int64_t k_page_stride = 0;
  int64_t k_slot_stride = 0;
  DType dtype = DType::kFloat32;
  bool interleaved = false;
};

}  // namespace redknot
