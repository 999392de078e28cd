#pragma once

#include "cuda/attention/hopper_shape.h"
#include "cuda/attention/plan.h"
#include "cuda/attention/score_scale.h"

namespace redknot::gpu {

// What a kernel for Hopper is given: the call, and boxes of its pages. A chunk is 16 slots, a run
// is run_chunks chunks of one page.
struct HopperParams {
  TensorMap key_chunk, key_run;
  TensorMap value_slot, value_chunk, value_run;
  SegPagedAttentionParams call;
  PlanShape plan;
  ScoreScale scale;
  int32_t run_chunks;
};

inline TensorLayout page_layout(const PagePool& pool, bool is_keys, int slots) {
  const auto size = [](int64_t x) { return static_cast<uint64_t>(x); };
  const int64_t slot_stride = is_keys ? pool.k_slot_stride : pool.v_slot_stride;
  // The stride of a dimension of one page means nothing, and may be anything.
  const int64_t page_stride = pool.num_pages == 1 ? pool.page_size * slot_stride
                              : is_keys           ? pool.k_page_stride
                                                  : pool.v_page_stride;
  TensorLayout layout;
  layout.base = is_keys ? pool.k : pool.v;
  layout.dtype = pool.dtype;
  layout.rank = 3;
  layout.size[0] = size(pool.head_dim);
  layout.size[1] = size(pool.page_size);
  layout.size[2] = size(pool.num_pages);
  layout.stride[1] = size(slot_stride);
  layout.stride[2] = size(page_stride);
  layout.box[1] = static_cast<uint32_t>(slots);
  return layout;
}

// The longest run that pages hold, as a power of two.
constexpr int run_chunks(int64_t page_size, int block_chunks) {
  int chunks = 1;
  while (2 * chunks <= block_chunks && 2 * chunks * kChunkKeys <= page_size) chunks *= 2;
  return chunks;
}

// For blocks of block_chunks chunks. False where the copy engine cannot describe the pool: its
// strides may be ones that it has no boxes for.
inline bool fill_hopper_params(const SegPagedAttentionParams& call,
                               int block_chunks,
                               HopperParams* params) {
  const int chunks = run_chunks(call.pool.page_size, block_chunks);
  const auto encode = [&](bool is_keys, int slots, TensorMap* map) {
    return encode_tensor_map(page_layout(call.pool, is_keys, slots), map);
  };
  params->call = call;
  params->run_chunks = chunks;
  return encode(true, kChunkKeys, &params->key_chunk) &&
         encode(true, chunks * kChunkKeys, &params->key_run) &&
         encode(false, 1, &params->value_slot) && encode(false, kChunkKeys, &params->value_chunk) &&
         encode(false, chunks * kChunkKeys, &params->value_run);
}

}  // namespace redknot::gpu
