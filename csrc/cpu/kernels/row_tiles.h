#pragma once

// The products of few query rows in bf16 on AMX, with keys and values where they lie: 16 slots of a
// page are the rows of a tile.
//
// Scores [16 keys, rows] = K [16 keys, 32 dims] * Q^T [32 dims, rows].
// Values: as a B tile, row j of V [16 keys, 32 dims] reads as the pairs (V[j][2n], V[j][2n + 1]) of
// a depth of 32. Weights (w, 0) pick the even dimensions of the pairs, (0, w) the odd ones; both
// are rows of one A tile. Half of the products are with zero, but no value is ever moved.
//
// 0 * infinity: an infinite value makes its pair NaN. is_sound() tells, and RowVectors then does
// the item.
#include <bit>
#include <cmath>

#include "amx.h"
#include "amx_exp2.h"
#include "carver.h"
#include "key_tile.h"
#include "queries.h"

namespace redknot::cpu::REDKNOT_ISA {

class RowTiles {
 public:
  static int64_t scratch_floats(int64_t rows, int64_t head_dim) {
    const int64_t columns = columns_of(rows);
    const int64_t words = depth_of(head_dim) * 16;
    return words * columns + 2 * columns * (words + kRowTileKeys) + 2 * kRowTileKeys * columns +
           16 * words + 32 * depth_of(head_dim);
  }

  RowTiles(const PagePool& pool, int64_t rows, Carver& carver)
      : rows_(rows),
        columns_(columns_of(rows)),
        block_(std::min<int64_t>(columns_, 8)),
        head_dim_(pool.head_dim),
        depth_(depth_of(head_dim_)),
        words_(depth_ * 16),
        k_stride_(pool.k_slot_stride * int64_t{sizeof(BFloat16)}),
        v_stride_(pool.v_slot_stride * int64_t{sizeof(BFloat16)}),
        tiles_(shape(columns_, 2 * block_)),
        q_(carver.take(words_ * columns_)),
        out_(carver.take(2 * columns_ * words_)),
        weights_(carver.take(2 * columns_ * kRowTileKeys)),
        products_(carver.take(kRowTileKeys * columns_)),
        scores_(carver.take(kRowTileKeys * columns_)),
        staged_(carver.take(16 * words_)),
        row_(carver.take(32 * depth_)) {
    std::memset(out_, 0, 2 * columns_ * words_ * sizeof(float));
    std::memset(weights_, 0, 2 * columns_ * kRowTileKeys * sizeof(float));
  }

  int64_t head_dim() const { return head_dim_; }
  int64_t row_bytes() const { return 2 * head_dim_; }

  // Words [words, columns], zeros behind the last dimension and row.
  template <typename Queries>
  void pack(const Queries& queries, int32_t offset) {
    std::memset(q_, 0, words_ * columns_ * sizeof(float));
    for (int64_t m = 0; m < rows_; ++m) {
      queries.read(m, offset, row_);
      convert_row(row_, head_dim_, 1.0f, reinterpret_cast<BFloat16*>(row_));
      for (int64_t i = 0; i < head_dim_ / 2; ++i) q_[i * columns_ + m] = row_[i];
    }
  }

  int64_t score_steps(const KeyTile& tile) const { return tile.padded_count() / 16 * depth_; }
  void score(const KeyTile& tile, FetchAhead& ahead) {
    const int64_t row_bytes = columns_ * int64_t{sizeof(float)};
    for (int i = 0; i < tile.padded_count(); i += 16) {
      const Block keys = block(tile.k + i, k_stride_, tile.broken[i / 16]);
      tile_zero<kScores>();
      for (int64_t d = 0; d < depth_; ++d) {
        ahead.step();
        tile_load<kQueries>(q_ + d * 16 * columns_, row_bytes);
        tile_load<kData>(keys.begin + 64 * d, keys.stride);
        tile_mac<kScores, kData, kQueries>();
      }
      tile_store<kScores>(products_ + i * columns_, row_bytes);
    }
    switch (columns_) {
      case 1:
        return turn_scores<1>(tile.padded_count());
      case 2:
        return turn_scores<2>(tile.padded_count());
      case 4:
        return turn_scores<4>(tile.padded_count());
      case 8:
        return turn_scores<8>(tile.padded_count());
      default:
        return turn_scores<16>(tile.padded_count());
    }
  }

  void rescale(int64_t m, float factor) {
    for (const int64_t row : {even_row(m), even_row(m) + block_}) {
      float* out = out_ + row * words_;
      for (int64_t d = 0; d < words_; d += kLanes) store(out + d, load(out + d) * factor);
    }
  }

  static Vec exp2(Vec x) { return exp2_weight(x); }
  float* scores(int64_t m) { return scores_ + m * kRowTileKeys; }
  void set_weights(int64_t m, int i, Vec weights) {
    float* even = weights_ + even_row(m) * kRowTileKeys + i;
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)weights));
    store(even, (Vec)low);
    store(even + block_ * kRowTileKeys, (Vec)_mm512_slli_epi32(low, 16));
  }

  void add_values(const KeyTile& tile, const KeyTile& next) {
    FetchAhead ahead(next.keys(),
                     next.values(),
                     row_bytes(),
                     tile.padded_count() / 16 * depth_ * (columns_ / block_));
    for (int64_t row = 0; row < 2 * columns_; row += 2 * block_) {
      for (int64_t d = 0; d < depth_; d += kSumTiles) add_columns(tile, row, d, ahead);
    }
  }

  bool is_sound() const {
    bool sound = true;
    for (int64_t i = 0; i < 2 * columns_ * words_; ++i) sound &= out_[i] == out_[i];
    return sound;
  }

  void read(int64_t m, float* out) const {
    const float* even = out_ + even_row(m) * words_;
    const float* odd = even + block_ * words_;
    for (int64_t i = 0; i < head_dim_ / 2; ++i) {
      out[2 * i] = even[i];
      out[2 * i + 1] = odd[i];
    }
  }

 private:
  static constexpr int kScores = 0;
  static constexpr int kQueries = 1;
  static constexpr int kData = 2;
  static constexpr int kWeights = 3;
  static constexpr int kSums = 4;
  static constexpr int kSumTiles = 4;  // 128 dimensions at a time

  // 16 rows of keys or values, `stride` bytes apart.
  struct Block {
    const char* begin;
    int64_t stride;
  };

  static int64_t columns_of(int64_t rows) {
    return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(rows)));
  }
  static int64_t depth_of(int64_t head_dim) { return (head_dim + 31) / 32; }

  static TileShape shape(int64_t columns, int64_t weight_rows) {
    TileShape shape;
    shape.row_bytes[kScores] = shape.row_bytes[kQueries] = static_cast<uint16_t>(4 * columns);
    for (int i = kWeights; i < kSums + kSumTiles; ++i) {
      shape.rows[i] = static_cast<uint8_t>(weight_rows);
    }
    return shape;
  }

  // Of weights and sums: rows m of a block hold even dimensions, those behind the block odd ones.
  int64_t even_row(int64_t m) const { return m / block_ * 2 * block_ + m % block_; }

  // Copied if they do not lie evenly or a tile would reach beyond the slot.
  Block block(const char* const* rows, int64_t stride, bool broken) {
    if (!broken && head_dim_ % 32 == 0) return {rows[0], stride};
    const int64_t bytes = depth_ * 64;
    auto* staged = reinterpret_cast<char*>(staged_);
    for (int i = 0; i < 16; ++i) {
      std::memcpy(staged + i * bytes, rows[i], 2 * head_dim_);
      std::memset(staged + i * bytes + 2 * head_dim_, 0, bytes - 2 * head_dim_);
    }
    return {staged, bytes};
  }

  // [keys, columns] into [columns, keys]: unshuffling moves one bit of the column's number from the
  // bottom of the index to its top.
  template <int Columns>
  void turn_scores(int count) {
    constexpr VecI kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    for (int key = 0; key < count; key += 16) {
      Vec a[Columns];
#pragma GCC unroll 16
      for (int i = 0; i < Columns; ++i) a[i] = load(products_ + key * Columns + i * kLanes);
#pragma GCC unroll 4
      for (int bit = 1; bit < Columns; bit *= 2) {
        Vec b[Columns];
#pragma GCC unroll 8
        for (int i = 0; i < Columns / 2; ++i) {
          b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], kEven);
          b[Columns / 2 + i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], kEven + 1);
        }
#pragma GCC unroll 16
        for (int i = 0; i < Columns; ++i) a[i] = b[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < Columns; ++i) store(scores(i) + key, a[i]);
    }
  }

  // Sums of rows [row, row + 2 * block) in up to kSumTiles tiles of dimensions, from tile `first`.
  void add_columns(const KeyTile& tile, int64_t row, int64_t first, FetchAhead& ahead) {
    float* out = out_ + row * words_ + first * 16;
    switch (std::min<int64_t>(kSumTiles, depth_ - first)) {
      case 1:
        return add_columns<1>(tile, row, first, ahead, out);
      case 2:
        return add_columns<2>(tile, row, first, ahead, out);
      case 3:
        return add_columns<3>(tile, row, first, ahead, out);
      default:
        return add_columns<4>(tile, row, first, ahead, out);
    }
  }
  template <int Tiles>
  void add_columns(const KeyTile& tile, int64_t row, int64_t first, FetchAhead& ahead, float* out) {
    const int64_t out_stride = words_ * int64_t{sizeof(float)};
    const float* weights = weights_ + row * kRowTileKeys;
    each_sum<Tiles>([&]<int C>() { tile_load<kSums + C>(out + C * 16, out_stride); });
    for (int i = 0; i < tile.padded_count(); i += 16) {
      const Block values = block(tile.v + i, v_stride_, tile.broken[i / 16]);
      tile_load<kWeights>(weights + i, kRowTileKeys * sizeof(float));
      each_sum<Tiles>([&]<int C>() {
        ahead.step();
        tile_load<kData>(values.begin + 64 * (first + C), values.stride);
        tile_mac<kSums + C, kWeights, kData>();
      });
    }
    each_sum<Tiles>([&]<int C>() { tile_store<kSums + C>(out + C * 16, out_stride); });
  }
  template <int Tiles, typename Visit>
  [[gnu::always_inline]] static void each_sum(Visit&& visit) {
    visit.template operator()<0>();
    if constexpr (Tiles > 1) visit.template operator()<1>();
    if constexpr (Tiles > 2) visit.template operator()<2>();
    if constexpr (Tiles > 3) visit.template operator()<3>();
  }

  int64_t rows_;
  int64_t columns_;  // rows, rounded up to a power of two
  int64_t block_;    // rows whose values are added at a time
  int64_t head_dim_;
  int64_t depth_;  // tiles along the dimensions
  int64_t words_;  // pairs of dimensions, padded
  int64_t k_stride_;
  int64_t v_stride_;
  AmxTiles tiles_;
  float* q_;         // [words, columns]
  float* out_;       // [2 * columns, words]
  float* weights_;   // [2 * columns, kRowTileKeys] words
  float* products_;  // [kRowTileKeys, columns]
  float* scores_;    // [columns, kRowTileKeys]
  float* staged_;    // [16, words]
  float* row_;       // [padded dims]
};

}  // namespace redknot::cpu::REDKNOT_ISA
