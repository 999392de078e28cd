#pragma once

// Many keys of an item and their copies in A tiles, made once for all panels of the item.
#include <algorithm>
#include <cstring>

#include "amx.h"
#include "key_tile.h"
#include "mac.h"
#include "panel_state.h"
#include "transpose.h"

namespace redknot::cpu::REDKNOT_ISA {

// The depth of a bf16 tile; its halves have as many keys as a tile has rows.
inline constexpr int kUnitKeys = 32;
inline constexpr int kHalfKeys = 16;

// Where keys lie, gathered from tiles: so many that a panel's queries and sums, once they are in
// L1, are worth it, and few enough for their copies to stay in L2.
struct KeyList {
  static constexpr int kCapacity = 1024;
  int count = 0;
  int32_t offset = 0;
  const char* k[kCapacity];
  const char* v[kCapacity];
  int32_t positions[kCapacity];

  bool takes(const KeyTile& tile) const {
    return count == 0 || (tile.offset == offset && count + tile.count <= kCapacity);
  }
  void append(const KeyTile& tile) {
    offset = tile.offset;
    std::copy_n(tile.k, tile.count, k + count);
    std::copy_n(tile.v, tile.count, v + count);
    std::copy_n(tile.positions, tile.count, positions + count);
    count += tile.count;
  }
};

class StagedKeys {
 public:
  static constexpr int64_t scratch_floats(int64_t padded) { return KeyList::kCapacity * padded; }
  // Whole tiles along the dimensions: 32 as a depth of bf16, 2 * 16 as rows of V^T.
  static constexpr int64_t padded_dim(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

  StagedKeys(int64_t head_dim, Carver& carver)
      : head_dim_(head_dim), padded_(padded_dim(head_dim)) {
    keys_ = reinterpret_cast<char*>(carver.take(KeyList::kCapacity * padded_ / 2));
    values_ = reinterpret_cast<char*>(carver.take(KeyList::kCapacity * padded_ / 2));
  }

  void stage(const KeyList& list) {
    stage_keys(list);
    stage_values(list);
  }
  // A tiles [depth block of 32] of the keys of half a unit.
  const char* keys(int half) const { return keys_ + half * (padded_ / 32) * kTileBytes; }
  // A tiles [unit] of V^T for 16 dimensions, from `unit` on.
  const char* values(int64_t d, int unit) const {
    return values_ + (d / 16 * (KeyList::kCapacity / kUnitKeys) + unit) * kTileBytes;
  }

 private:
  // A tiles [key block of 16][depth block of 32]; rows behind the last key hold what they held.
  void stage_keys(const KeyList& list) {
    const int64_t depth_tiles = padded_ / 32;
    for (int i = 0; i < list.count; ++i) {
      char* row = keys_ + i / 16 * depth_tiles * kTileBytes + i % 16 * 64;
      for (int64_t d = 0; d < head_dim_; d += 32) {
        const __mmask32 mask = first_lanes(head_dim_ - d);
        _mm512_storeu_si512(row + d / 32 * kTileBytes,
                            _mm512_maskz_loadu_epi16(mask, list.k[i] + 2 * d));
      }
    }
  }

  static __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  }

  // A tiles of V^T [dimension block of 16][key block of 32], zeros behind the last key and
  // dimension.
  void stage_values(const KeyList& list) {
    const int units = (list.count + kUnitKeys - 1) / kUnitKeys;
    for (int unit = 0; unit < units; ++unit) {
      for (int64_t d = 0; d < padded_; d += 16) {
        const auto lanes = static_cast<__mmask16>(first_lanes(std::max<int64_t>(0, head_dim_ - d)));
        Vec words[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int key = unit * kUnitKeys + 2 * i;
          const __m256i a = load_values(list, key, d, lanes);
          const __m256i b = load_values(list, key + 1, d, lanes);
          words[i] = join_words(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
        }
        transpose(words);
        char* out = const_cast<char*>(values(d, unit));
        for (int i = 0; i < 16; ++i) store(reinterpret_cast<float*>(out + 64 * i), words[i]);
      }
    }
  }
  static __m256i load_values(const KeyList& list, int key, int64_t d, __mmask16 lanes) {
    return key < list.count ? _mm256_maskz_loadu_epi16(lanes, list.v[key] + 2 * d)
                            : _mm256_setzero_si256();
  }

  int64_t head_dim_;
  int64_t padded_;
  char* keys_;
  char* values_;
};

}  // namespace redknot::cpu::REDKNOT_ISA
