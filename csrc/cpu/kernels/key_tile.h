#pragma once

// Keys are taken where they lie: a tile is a list of pointers to at most kTileKeys valid slots that
// some query of the item may see, all with the same rotation offset. Slots past num_valid are never
// touched, so whatever a free page holds cannot leak.
#include <algorithm>

#include "../dispatch.h"
#include "vec.h"

namespace redknot::cpu::REDKNOT_ISA {

// With 64 query rows the fp32 scores of a tile take 32 KiB.
inline constexpr int kTileKeys = 128;
// Of few query rows: their keys and values take 32 KiB at 128 dimensions.
inline constexpr int kRowTileKeys = 64;

// Keys or values of a tile.
struct TileRows {
  const char* const* begin;
  int count;
};

struct KeyTile {
  int count = 0;
  int32_t offset = 0;
  const char* k[kTileKeys];
  const char* v[kTileKeys];
  int32_t positions[kTileKeys];
  bool broken[kTileKeys / 16];  // which sixteens of keys do not lie in one page

  int32_t first_position() const { return positions[0]; }
  int32_t last_position() const { return positions[count - 1]; }
  TileRows keys() const { return {k, count}; }
  TileRows values() const { return {v, count}; }

  // Whole vectors of keys: pad() repeats the first one behind the last.
  int padded_count() const { return (count + kLanes - 1) / kLanes * kLanes; }
  void pad() {
    if (count % 16 != 0) broken[count / 16] = true;
    for (int i = count; i < padded_count(); ++i) {
      k[i] = k[0];
      v[i] = v[0];
    }
  }
};

// The keys of an item that some of its queries may see, in order, a tile at a time.
template <typename T>
class KeyTiles {
 public:
  KeyTiles(const SegPagedAttentionParams& params, const WorkItem& item, int tile_keys)
      : params_(params),
        tile_keys_(tile_keys),
        first_query_(params.q_positions[item.q_begin]),
        last_query_(params.q_positions[item.q_end - 1]),
        window_(params.row_window[item.row]),
        sink_(params.row_sink[item.row]),
        ref_(item.ref_begin),
        end_(item.ref_end) {}

  // The next tile; empty when there is none.
  void read(KeyTile* tile) {
    tile->count = 0;
    std::memset(tile->broken, 0, sizeof(tile->broken));
    while (ref_ < end_ && tile->count < tile_keys_) {
      const PageRef& ref = params_.page_refs[ref_];
      if (ref.first_position > last_query_) break;
      const SlotRange slots = visible_slots(ref, first_query_, last_query_, window_, sink_);
      const int32_t begin = std::max(slots.begin, taken_);
      const int32_t end = std::min(slots.end, begin + tile_keys_ - tile->count);
      if (begin < end) {
        if (tile->count > 0 && ref.rotation_offset != tile->offset) break;
        append(ref, begin, end, tile);
      }
      const bool whole = end >= slots.end;
      taken_ = whole ? 0 : end;
      ref_ += whole;
    }
  }

 private:
  void append(const PageRef& ref, int32_t begin, int32_t end, KeyTile* tile) const {
    const PagePool& pool = params_.pool;
    const auto address = [](const void* cache, int64_t offset) {
      return reinterpret_cast<const char*>(static_cast<const T*>(cache) + offset);
    };
    const char* k = address(pool.k, pool.k_offset(ref.page, begin));
    const char* v = address(pool.v, pool.v_offset(ref.page, begin));
    const int64_t k_step = pool.k_slot_stride * int64_t{sizeof(T)};
    const int64_t v_step = pool.v_slot_stride * int64_t{sizeof(T)};
    tile->offset = ref.rotation_offset;
    if (tile->count % 16 != 0) tile->broken[tile->count / 16] = true;
    for (int32_t i = 0; i < end - begin; ++i) {
      tile->k[tile->count + i] = k + i * k_step;
      tile->v[tile->count + i] = v + i * v_step;
      tile->positions[tile->count + i] = ref.first_position + begin + i;
    }
    tile->count += end - begin;
  }

  const SegPagedAttentionParams& params_;
  int tile_keys_;
  int32_t first_query_;
  int32_t last_query_;
  int64_t window_;
  int64_t sink_;
  int64_t ref_;
  int64_t end_;
  int32_t taken_ = 0;  // slots of `ref_` that earlier tiles hold
};

// Asks for memory ahead of its use, into L2: L1 is full of the tile at hand.
template <int Bytes>
static inline void fetch_ahead(const char* p) {
  for (int b = 0; b < Bytes; b += 64) __builtin_prefetch(p + b, 0, 2);
}

// Asks for `rows`, a share of them at each of `steps` steps: spread evenly over arithmetic, so that
// neither waits for the other, and round the memory pages they lie in, so that the processor's own
// prefetcher, which works within a memory page, runs ahead in all of them at once. Of `later`,
// whose turn is next, only the first line of every memory page, for it to start there.
class FetchAhead {
 public:
  FetchAhead(TileRows rows, TileRows later, int64_t row_bytes, int64_t steps)
      : rows_(rows),
        later_(later),
        row_bytes_(row_bytes),
        share_((rows.count + steps - 1) / steps),
        rows_per_page_(std::max<int64_t>(1, kMemoryPageBytes / row_bytes)),
        left_(rows.count) {}

  void step() {
    const int64_t end = std::max<int64_t>(0, left_ - share_);
    for (; left_ > end; --left_) {
      fetch_row(rows_.begin[row_]);
      row_ += rows_per_page_;
      if (row_ >= rows_.count) row_ = ++first_;
      if (--rows_to_later_ == 0 && later_row_ < later_.count) {
        fetch_ahead<64>(later_.begin[later_row_]);
        later_row_ += rows_per_page_;
        rows_to_later_ = rows_per_page_;
      }
    }
  }

 private:
  static constexpr int64_t kMemoryPageBytes = 4096;

  void fetch_row(const char* row) const {
    for (int64_t b = 0; b < row_bytes_; b += 64) fetch_ahead<64>(row + b);
  }

  TileRows rows_;
  TileRows later_;
  int64_t row_bytes_;
  int64_t share_;
  int64_t rows_per_page_;
  int64_t left_;       // rows not asked for yet
  int64_t first_ = 0;  // place within the memory pages of this round
  int64_t row_ = 0;
  int64_t later_row_ = 0;
  int64_t rows_to_later_ = 1;
};

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
