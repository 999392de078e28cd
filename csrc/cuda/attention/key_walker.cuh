#pragma once

#include "cuda/attention/plan.h"
#include "cuda/attention/tile_shape.h"
#include "cuda/ptx/simt.cuh"
#include "redknot/attention.h"
#include "redknot/paged_kv.h"
#include "redknot/planner.h"

namespace redknot::gpu {

// A block of keys as the loads and the mask see it: chunks of 16 slots, all with one rotation
// offset. Chunks behind num_chunks have no valid slot. num_chunks 0: the row has no more keys.
template <int kChunks>
struct KeyBlock {
  int32_t page[kChunks];
  int32_t slot[kChunks];      // of the chunk's first key in its page
  int32_t position[kChunks];  // true position of that key
  int32_t num_valid[kChunks];
  int32_t rotation_offset;
  int32_t num_chunks;
  int32_t is_partial;  // whether some pair of a query and a slot is not visible
};

// What the queries of a work item may see.
struct Reach {
  int32_t query_first;
  int32_t query_last;
  int32_t window;
  int32_t sink;
};

__device__ inline Reach reach_of(const SegPagedAttentionParams& params, const WorkItem& item) {
  return {params.q_positions[item.q_begin],
          params.q_positions[item.q_end - 1],
          params.row_window[item.row],
          params.row_sink[item.row]};
}

// Walks a row's page references and packs what the tile may see into blocks; pages that no query of
// the tile sees are passed over 32 at a time. All lanes of one warp act together: each holds one
// reference.
template <int kChunks>
class KeyWalker {
 public:
  __device__ void start(const SegPagedAttentionParams& params, const WorkItem& item) {
    refs_ = params.page_refs;
    next_ref_ = item.ref_begin;
    ref_end_ = item.ref_end;
    reach_ = reach_of(params, item);
    chunk_ = chunk_end_ = 0;
  }

  // Writes the next block to shared memory; other warps see it behind a barrier.
  __device__ void next(KeyBlock<kChunks>* block) {
    const int lane = threadIdx.x % kWarpSize;
    int filled = 0;
    int32_t rotation = 0;
    bool is_partial = false;
    while (filled < kChunks) {
      const uint32_t lanes_with_keys = __ballot_sync(kAllLanes, chunk_ < chunk_end_);
      if (lanes_with_keys == 0) {
        if (next_ref_ >= ref_end_) break;
        load_references(lane);
        continue;
      }
      const int source = __ffs(lanes_with_keys) - 1;
      const int32_t offset = __shfl_sync(kAllLanes, ref_.rotation_offset, source);
      if (filled > 0 && offset != rotation) break;
      rotation = offset;

      const int32_t first_chunk = __shfl_sync(kAllLanes, chunk_, source);
      const int32_t chunks_left = __shfl_sync(kAllLanes, chunk_end_, source) - first_chunk;
      const int32_t page = __shfl_sync(kAllLanes, ref_.page, source);
      const int32_t position = __shfl_sync(kAllLanes, ref_.first_position, source);
      const int32_t num_valid = __shfl_sync(kAllLanes, ref_.num_valid, source);
      const int taken = chunks_left < kChunks - filled ? chunks_left : kChunks - filled;
      if (lane >= filled && lane < filled + taken) {
        const int32_t slot = (first_chunk + lane - filled) * kChunkKeys;
        block->page[lane] = page;
        block->slot[lane] = slot;
        block->position[lane] = position + slot;
        block->num_valid[lane] = num_valid - slot < kChunkKeys ? num_valid - slot : kChunkKeys;
      }
      const int32_t slot_begin = first_chunk * kChunkKeys;
      const int32_t slot_end = slot_begin + taken * kChunkKeys;
      is_partial = is_partial || slot_end > num_valid ||
                   classify_tile(int64_t{position} + slot_begin,
                                 int64_t{position} + slot_end - 1,
                                 reach_.query_first,
                                 reach_.query_last,
                                 reach_.window,
                                 reach_.sink) != TileClass::kFull;
      if (lane == source) chunk_ += taken;
      filled += taken;
    }
    if (lane >= filled && lane < kChunks) {
      block->page[lane] = 0;
      block->slot[lane] = 0;
      block->position[lane] = 0;
      block->num_valid[lane] = 0;
    }
    if (lane == 0) {
      block->rotation_offset = rotation;
      block->num_chunks = filled;
      block->is_partial = is_partial || filled < kChunks;
    }
  }

 private:
  static constexpr uint32_t kAllLanes = 0xffffffffu;

  __device__ void load_references(int lane) {
    chunk_ = chunk_end_ = 0;
    if (next_ref_ + lane < ref_end_) {
      ref_ = refs_[next_ref_ + lane];
      const SlotRange slots =
          visible_slots(ref_, reach_.query_first, reach_.query_last, reach_.window, reach_.sink);
      if (slots.begin < slots.end) {
        chunk_ = slots.begin / kChunkKeys;
        chunk_end_ = (slots.end + kChunkKeys - 1) / kChunkKeys;
      }
    }
    next_ref_ += kWarpSize;
  }

  const PageRef* refs_;
  int32_t next_ref_;
  int32_t ref_end_;
  Reach reach_;
  PageRef ref_;    // of this lane
  int32_t chunk_;  // its chunks that are still to be handed out
  int32_t chunk_end_;
};

}  // namespace redknot::gpu
