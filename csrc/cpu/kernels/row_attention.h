#pragma once

// Few query rows (decode), bound by reading pages. Dimensions lie on the lanes: every key and value
// is read once from its page, in order, for all query rows of the group.
#include <type_traits>
#include <utility>

#include "key_tile.h"
#include "mac.h"
#include "queries.h"

namespace redknot::cpu::REDKNOT_ISA {

// One step of transpose_add: vectors a, b hold segments of 2 * Half lanes; the result holds, for
// each segment of a and then of b, the sum of its halves.
template <int Half, int... Lane>
static inline Vec add_halves(Vec a, Vec b, std::integer_sequence<int, Lane...>) {
  constexpr auto source = [](int lane) {
    const int segment = lane / (2 * Half) * 2 * Half;
    const int within = lane % (2 * Half);
    return within < Half ? segment + within : kLanes + segment + within - Half;
  };
  return __builtin_shuffle(a, b, VecI{source(Lane)...}) +
         __builtin_shuffle(a, b, VecI{source(Lane) + Half...});
}

// Lane j of the result is the sum of the lanes of sums[j].
template <int Half = kLanes / 2>
static inline Vec transpose_add(Vec* sums) {
  if constexpr (Half == 0) {
    return sums[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < Half; ++i) {
      sums[i] =
          add_halves<Half>(sums[i], sums[i + Half], std::make_integer_sequence<int, kLanes>());
    }
    return transpose_add<Half / 2>(sums);
  }
}

template <typename T>
class RowAttention {
 public:
  using Mac = typename MacOf<T>::Type;
  static constexpr bool kWiden = !std::is_same_v<typename Mac::Element, T>;

  static int64_t scratch_floats(int64_t rows, int64_t head_dim) {
    const int64_t padded = head_dim + kLanes;
    return rows * (2 * padded + kTileKeys + 2 * kLanes) + 3 * padded +
           (kWiden ? kTileKeys * head_dim : 0);
  }

  RowAttention(const SegPagedAttentionParams& params, const Queries<T>& queries, float* scratch)
      : queries_(queries),
        rows_(queries.rows()),
        head_dim_(params.pool.head_dim),
        padded_((head_dim_ + kLanes - 1) / kLanes * kLanes),
        depth_(head_dim_ / Mac::kPerWord),
        scale_(params) {
    const auto take = [&scratch](int64_t count) {
      float* begin = scratch;
      scratch += (count + kLanes - 1) / kLanes * kLanes;
      return begin;
    };
    q_ = take(rows_ * padded_);
    out_ = take(rows_ * padded_);
    scores_ = take(rows_ * kTileKeys);
    max_ = take(rows_);
    sum_ = take(rows_);
    row_ = take(padded_);
    wide_k_ = take(kWiden ? kTileKeys * head_dim_ : 0);
    std::memset(out_, 0, rows_ * padded_ * sizeof(float));
    for (int64_t m = 0; m < rows_; ++m) {
      max_[m] = -kInf;
      sum_[m] = 0.0f;
    }
  }

  void consume(KeyTile& tile, const KeyTile* next) {
    if (!ready_ || tile.offset != offset_) pack_queries(tile.offset);
    const TileClass kind = classify_tile(tile.first_position(),
                                         tile.last_position(),
                                         queries_.first_position(),
                                         queries_.last_position(),
                                         queries_.window(),
                                         queries_.sink());
    if (kind == TileClass::kSkip) return;
    if constexpr (kWiden) widen_rows<T>(tile.k, tile.count, head_dim_, wide_k_);
    const int padded_count = (tile.count + kLanes - 1) / kLanes * kLanes;
    for (int i = tile.count; i < padded_count; ++i) {
      tile.k[i] = tile.k[0];
      tile.v[i] = tile.v[0];
    }
    for (int i = 0; i < padded_count; i += kLanes) score_keys(tile, i);
    for (int64_t m = 0; m < rows_; ++m) {
      float* scores = scores_ + m * kTileKeys;
      for (int i = tile.count; i < padded_count; ++i) scores[i] = -kInf;
      if (kind == TileClass::kPartial) mask(m, tile, scores);
      softmax(m, padded_count, scores);
    }
    for (int64_t m = 0; m < rows_; m += kValueRows) {
      const bool fetch = m == 0 && next != nullptr && next->count >= tile.count;
      add_values(m, std::min<int64_t>(kValueRows, rows_ - m), tile, fetch ? next->k : tile.k);
    }
  }

  void write_out() const {
    for (int64_t m = 0; m < rows_; ++m) {
      const float inverse = sum_[m] == 0.0f ? 0.0f : 1.0f / sum_[m];
      convert_row(out_ + m * padded_, head_dim_, inverse, queries_.out(m));
      queries_.write_lse(m, max_[m], sum_[m]);
    }
  }

  void write_partial(const Partial& partial) const {
    for (int64_t m = 0; m < rows_; ++m) {
      std::memcpy(partial.sums + m * head_dim_, out_ + m * padded_, head_dim_ * sizeof(float));
      partial.max[m] = max_[m];
      partial.denominators[m] = sum_[m];
    }
  }

 private:
  static constexpr int kValueRows = 4;
  static constexpr int kValueVecs = kLanes == 16 ? 4 : 2;  // 16 or 8 sums in registers

  void pack_queries(int32_t offset) {
    ready_ = true;
    offset_ = offset;
    std::memset(q_, 0, rows_ * padded_ * sizeof(float));
    for (int64_t m = 0; m < rows_; ++m) {
      queries_.read(m, offset, row_);
      auto* words = reinterpret_cast<typename Mac::Element*>(q_ + m * padded_);
      convert_row(row_, head_dim_, 1.0f, words);
    }
  }

  // sums[i] += keys[i] * q over `Vecs` vectors of words at `d`.
  template <int Vecs>
  static void score_step(const char* const* keys, const float* q, int64_t d, Vec* sums) {
    Vec query[Vecs];
    for (int c = 0; c < Vecs; ++c) query[c] = load(q + d + c * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const float* key = reinterpret_cast<const float*>(keys[i]) + d;
#pragma GCC unroll 4
      for (int c = 0; c < Vecs; ++c) sums[i] = Mac::mac(load(key + c * kLanes), query[c], sums[i]);
    }
  }

  // Asks for the values of kLanes keys, a share with every query row, so that fetching and
  // computing overlap.
  void fetch_values(const char* const* values, int64_t m) const {
    const int64_t lines = (head_dim_ * sizeof(T) + 63) / 64;
    for (int64_t line = lines * m / rows_; line < lines * (m + 1) / rows_; ++line) {
      for (int i = 0; i < kLanes; ++i) fetch_ahead<64>(values[i] + 64 * line);
    }
  }

  // Scores of kLanes keys of a tile, from `first`, for every query row.
  void score_keys(const KeyTile& tile, int first) {
    const char* const* keys = tile.k + first;
    for (int64_t m = 0; m < rows_; ++m) {
      fetch_values(tile.v + first, m);
      const float* q = q_ + m * padded_;
      Vec sums[kLanes] = {};
      int64_t d = 0;
      for (; d + 4 * kLanes <= depth_; d += 4 * kLanes) score_step<4>(keys, q, d, sums);
      for (; d + kLanes <= depth_; d += kLanes) score_step<1>(keys, q, d, sums);
      if (d < depth_) {
        const Vec query = load(q + d);
        for (int i = 0; i < kLanes; ++i) {
          const Vec key = load_partial(reinterpret_cast<const float*>(keys[i]) + d, depth_ - d);
          sums[i] = Mac::mac(key, query, sums[i]);
        }
      }
      store(scores_ + m * kTileKeys + first, scale_.score(transpose_add(sums) * scale_.product));
    }
  }

  void mask(int64_t m, const KeyTile& tile, float* scores) const {
    for (int i = 0; i < tile.count; ++i) {
      if (!is_visible(
              tile.positions[i], queries_.position(m), queries_.window(), queries_.sink())) {
        scores[i] = -kInf;
      }
    }
  }

  void softmax(int64_t m, int padded_count, float* scores) {
    Vec tile_max = load(scores);
    for (int i = kLanes; i < padded_count; i += kLanes) tile_max = max(load(scores + i), tile_max);
    const float new_max = std::max(max_[m], reduce_max(tile_max));
    const float base = new_max == -kInf ? 0.0f : new_max;
    const float rescale = exp2_nonpositive(broadcast(max_[m] - base))[0];
    Vec sum = {};
    for (int i = 0; i < padded_count; i += kLanes) {
      const Vec weight = exp2_nonpositive(load(scores + i) - base);
      sum += weight;
      store(scores + i, weight);
    }
    sum_[m] = sum_[m] * rescale + reduce_add(sum);
    max_[m] = new_max;
    if (rescale != 1.0f) {
      float* out = out_ + m * padded_;
      for (int64_t d = 0; d < padded_; d += kLanes) store(out + d, load(out + d) * rescale);
    }
  }

  // out[m .. m + rows) += weights * values.
  void add_values(int64_t m, int64_t rows, const KeyTile& tile, const char* const* ahead) {
    int64_t d = 0;
    for (; d + kValueVecs * kLanes <= head_dim_; d += kValueVecs * kLanes) {
      if (rows == kValueRows) {
        add_value_block<kValueRows, kValueVecs>(m, d, tile, ahead);
      } else {
        for (int64_t i = 0; i < rows; ++i) add_value_block<1, kValueVecs>(m + i, d, tile, ahead);
      }
    }
    for (; d < head_dim_; d += kLanes) {
      for (int64_t i = 0; i < rows; ++i) add_value_block<1, 1>(m + i, d, tile, ahead);
    }
  }

  template <int Rows, int Vecs>
  void add_value_block(int64_t m, int64_t d, const KeyTile& tile, const char* const* ahead) {
    Vec sums[Rows][Vecs];
    for (int r = 0; r < Rows; ++r) {
      for (int c = 0; c < Vecs; ++c) sums[r][c] = load(out_ + (m + r) * padded_ + d + c * kLanes);
    }
    const float* weights = scores_ + m * kTileKeys;
    const int64_t left = head_dim_ - d;
    for (int i = 0; i < tile.count; ++i) {
      const T* value = reinterpret_cast<const T*>(tile.v[i]) + d;
      fetch_ahead<Vecs * kLanes * sizeof(T)>(ahead[i] + d * sizeof(T));
      Vec v[Vecs];
      for (int c = 0; c < Vecs; ++c) {
        v[c] = Vecs == 1 && left < kLanes ? load_partial(value, left) : load(value + c * kLanes);
      }
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const Vec weight = broadcast(weights[r * kTileKeys + i]);
        for (int c = 0; c < Vecs; ++c) sums[r][c] = fma(weight, v[c], sums[r][c]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int c = 0; c < Vecs; ++c) store(out_ + (m + r) * padded_ + d + c * kLanes, sums[r][c]);
    }
  }

  const Queries<T>& queries_;
  int64_t rows_;
  int64_t head_dim_;
  int64_t padded_;  // head_dim rounded up to whole vectors
  int64_t depth_;   // words of a query row
  ScoreScale scale_;
  bool ready_ = false;
  int32_t offset_ = 0;
  float* q_;       // [rows, padded] words
  float* out_;     // [rows, padded]
  float* scores_;  // [rows, kTileKeys]
  float* max_;     // [rows]
  float* sum_;     // [rows]
  float* row_;     // [padded]
  float* wide_k_;  // [kTileKeys, head_dim]
};

}  // namespace redknot::cpu::REDKNOT_ISA
