#pragma once

// The products of few query rows on vectors. Dimensions lie on the lanes.
#include <type_traits>
#include <utility>

#include "carver.h"
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
class RowVectors {
 public:
  using Mac = typename MacOf<T>::Type;
  static constexpr bool kWiden = !std::is_same_v<typename Mac::Element, T>;

  static int64_t scratch_floats(int64_t rows, int64_t head_dim) {
    const int64_t padded = padded_dim(head_dim);
    return (2 * rows + 1) * padded + rows * kRowTileKeys + (kWiden ? kRowTileKeys * head_dim : 0);
  }

  RowVectors(const PagePool& pool, int64_t rows, Carver& carver)
      : rows_(rows),
        head_dim_(pool.head_dim),
        padded_(padded_dim(head_dim_)),
        depth_(head_dim_ / Mac::kPerWord),
        q_(carver.take(rows_ * padded_)),
        out_(carver.take(rows_ * padded_)),
        row_(carver.take(padded_)),
        scores_(carver.take(rows_ * kRowTileKeys)),
        wide_k_(carver.take(kWiden ? kRowTileKeys * head_dim_ : 0)) {
    std::memset(out_, 0, rows_ * padded_ * sizeof(float));
  }

  int64_t head_dim() const { return head_dim_; }
  int64_t row_bytes() const { return head_dim_ * int64_t{sizeof(T)}; }

  template <typename Queries>
  void pack(const Queries& queries, int32_t offset) {
    std::memset(q_, 0, rows_ * padded_ * sizeof(float));
    for (int64_t m = 0; m < rows_; ++m) {
      queries.read(m, offset, row_);
      auto* words = reinterpret_cast<typename Mac::Element*>(q_ + m * padded_);
      convert_row(row_, head_dim_, 1.0f, words);
    }
  }

  int64_t score_steps(const KeyTile& tile) const { return tile.padded_count() / kLanes * rows_; }
  void score(KeyTile& tile, FetchAhead& ahead) {
    if constexpr (kWiden) widen_rows<T>(tile.k, tile.padded_count(), head_dim_, wide_k_);
    for (int i = 0; i < tile.padded_count(); i += kLanes) {
      for (int64_t m = 0; m < rows_; ++m) {
        ahead.step();
        store(scores(m) + i, score_keys(tile.k + i, q_ + m * padded_));
      }
    }
  }

  void rescale(int64_t m, float factor) {
    float* out = out_ + m * padded_;
    for (int64_t d = 0; d < padded_; d += kLanes) store(out + d, load(out + d) * factor);
  }

  static Vec exp2(Vec x) { return exp2_nonpositive(x); }
  float* scores(int64_t m) { return scores_ + m * kRowTileKeys; }
  void set_weights(int64_t m, int i, Vec weights) { store(scores(m) + i, weights); }

  void add_values(const KeyTile& tile, const KeyTile& next) {
    for (int64_t m = 0; m < rows_; m += kValueRows) {
      const bool fetch = m == 0 && next.count >= tile.count;
      add_rows(m, std::min<int64_t>(kValueRows, rows_ - m), tile, fetch ? next.k : tile.k);
    }
  }

  bool is_sound() const { return true; }

  void read(int64_t m, float* out) const {
    std::memcpy(out, out_ + m * padded_, head_dim_ * sizeof(float));
  }

 private:
  static constexpr int kValueRows = 4;
  static constexpr int kValueVecs = kLanes == 16 ? 4 : 2;  // 16 or 8 sums in registers

  static int64_t padded_dim(int64_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

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

  // Products of kLanes keys with a query row.
  Vec score_keys(const char* const* keys, const float* q) const {
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
    return transpose_add(sums);
  }

  // out[m .. m + rows) += weights * values.
  void add_rows(int64_t m, int64_t rows, const KeyTile& tile, const char* const* ahead) {
    int64_t d = 0;
    for (; d + kValueVecs * kLanes <= head_dim_; d += kValueVecs * kLanes) {
      if (rows == kValueRows) {
        add_block<kValueRows, kValueVecs>(m, d, tile, ahead);
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          add_block<1, kValueVecs>(m + i, d, tile, ahead);
        }
      }
    }
    for (; d < head_dim_; d += kLanes) {
      for (int64_t i = 0; i < rows; ++i) add_block<1, 1>(m + i, d, tile, ahead);
    }
  }

  template <int Rows, int Vecs>
  void add_block(int64_t m, int64_t d, const KeyTile& tile, const char* const* ahead) {
    Vec sums[Rows][Vecs];
    for (int r = 0; r < Rows; ++r) {
      for (int c = 0; c < Vecs; ++c) sums[r][c] = load(out_ + (m + r) * padded_ + d + c * kLanes);
    }
    const float* weights = scores(m);
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
        const Vec weight = broadcast(weights[r * kRowTileKeys + i]);
        for (int c = 0; c < Vecs; ++c) sums[r][c] = fma(weight, v[c], sums[r][c]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int c = 0; c < Vecs; ++c) store(out_ + (m + r) * padded_ + d + c * kLanes, sums[r][c]);
    }
  }

  int64_t rows_;
  int64_t head_dim_;
  int64_t padded_;  // head_dim rounded up to whole vectors
  int64_t depth_;   // words of a query row
  float* q_;        // [rows, padded] words
  float* out_;      // [rows, padded]
  float* row_;      // [padded]
  float* scores_;   // [rows, kRowTileKeys], then weights
  float* wide_k_;   // [kRowTileKeys, head_dim]
};

}  // namespace redknot::cpu::REDKNOT_ISA
