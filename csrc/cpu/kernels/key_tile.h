#pragma once

// Keys are taken where they lie: a tile is a list of pointers to at most kTileKeys valid slots that
// some query of the item may see, all with the same rotation offset. Slots past num_valid are never
// touched, so whatever a free page holds cannot leak.
#include <utility>

#include "../dispatch.h"
#include "vec.h"

namespace redknot::cpu::REDKNOT_ISA {

// With 64 query rows the fp32 scores of a tile take 32 KiB.
inline constexpr int kTileKeys = 128;

struct KeyTile {
  int count = 0;
  int32_t offset = 0;
  const char* k[kTileKeys];
  const char* v[kTileKeys];
  int32_t positions[kTileKeys];

  int32_t first_position() const { return positions[0]; }
  int32_t last_position() const { return positions[count - 1]; }
};

// Calls visit(tile, next) for the keys of [ref_begin, ref_end) that the queries may see, in order;
// next is the tile after it, to be fetched ahead, or null.
template <typename T, typename Queries, typename Visit>
inline void for_each_key_tile(const SegPagedAttentionParams& params,
                              const Queries& queries,
                              const WorkItem& item,
                              Visit&& visit) {
  const PagePool& pool = params.pool;
  KeyTile buffers[2];
  KeyTile* tile = &buffers[0];
  KeyTile* previous = &buffers[1];
  const auto flush = [&] {
    if (previous->count > 0) visit(*previous, tile->count > 0 ? tile : nullptr);
    std::swap(tile, previous);
    tile->count = 0;
  };
  for (int64_t r = item.ref_begin; r < item.ref_end; ++r) {
    const PageRef& ref = params.page_refs[r];
    if (ref.first_position > queries.last_position()) break;
    const SlotRange slots = visible_slots(
        ref, queries.first_position(), queries.last_position(), queries.window(), queries.sink());
    if (slots.begin == slots.end) continue;
    if (tile->count > 0 && ref.rotation_offset != tile->offset) flush();
    for (int32_t slot = slots.begin; slot < slots.end; ++slot) {
      const int i = tile->count++;
      tile->offset = ref.rotation_offset;
      tile->k[i] = reinterpret_cast<const char*>(static_cast<const T*>(pool.k) +
                                                 pool.k_offset(ref.page, slot));
      tile->v[i] = reinterpret_cast<const char*>(static_cast<const T*>(pool.v) +
                                                 pool.v_offset(ref.page, slot));
      tile->positions[i] = ref.first_position + slot;
      if (tile->count == kTileKeys) flush();
    }
  }
  flush();  // what is left becomes the previous tile
  flush();
}

// Asks for memory ahead of its use, into L2: L1 is full of the tile at hand.
template <int Bytes>
static inline void fetch_ahead(const char* p) {
  for (int b = 0; b < Bytes; b += 64) __builtin_prefetch(p + b, 0, 2);
}

// Rows of T as rows of fp32, for machines that cannot multiply T.
template <typename T>
inline void widen_rows(const char** rows, int count, int64_t head_dim, float* out) {
  for (int i = 0; i < count; ++i) {
    float* wide = out + i * head_dim;
    convert_row(reinterpret_cast<const T*>(rows[i]), head_dim, 1.0f, wide);
    rows[i] = reinterpret_cast<const char*>(wide);
  }
}

}  // namespace redknot::cpu::REDKNOT_ISA
