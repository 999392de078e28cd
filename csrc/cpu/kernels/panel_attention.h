#pragma once

// Many query rows (prefill). Rows lie on the lanes, in panels of up to kMaxWidth vectors; for every
// tile of keys and every panel: scores^T = K Q^T, mask, one step of the online softmax,
// O^T = O^T * rescale + V^T P^T. A tile of keys serves all panels while it is in cache.
#include <type_traits>

#include "block_gemm.h"
#include "key_tile.h"
#include "queries.h"

namespace redknot::cpu::REDKNOT_ISA {

template <typename T>
class PanelAttention {
 public:
  using Mac = typename MacOf<T>::Type;
  static constexpr bool kWiden = !std::is_same_v<typename Mac::Element, T>;
  static constexpr int kPanelRows = kMaxWidth * kLanes;
  // No rotation offset: positions are not negative.
  static constexpr int32_t kNotPacked = INT32_MIN;

  static int64_t scratch_floats(int64_t rows, int64_t head_dim) {
    const int64_t lanes = (rows + kPanelRows - 1) / kPanelRows * kPanelRows;
    return lanes * (2 * head_dim + 5) + kTileKeys * (kPanelRows + 2 * head_dim) + head_dim + kLanes;
  }

  PanelAttention(const SegPagedAttentionParams& params, const Queries<T>& queries, float* scratch)
      : queries_(queries),
        head_dim_(params.pool.head_dim),
        depth_(head_dim_ / Mac::kPerWord),
        scale_(params),
        panel_rows_(are_scattered(queries) ? kLanes : kPanelRows),
        num_panels_((queries.rows() + panel_rows_ - 1) / panel_rows_) {
    const auto take = [&scratch](int64_t count) {
      float* begin = scratch;
      scratch += (count + kLanes - 1) / kLanes * kLanes;
      return begin;
    };
    const int64_t lanes = num_panels_ * panel_rows_;
    q_ = take(lanes * depth_);
    out_ = take(lanes * head_dim_);
    max_ = take(lanes);
    sum_ = take(lanes);
    position_ = reinterpret_cast<int32_t*>(take(lanes));
    window_begin_ = reinterpret_cast<int32_t*>(take(lanes));
    packed_offset_ = reinterpret_cast<int32_t*>(take(num_panels_));
    std::fill_n(packed_offset_, num_panels_, kNotPacked);
    scores_ = take(kTileKeys * kPanelRows);
    wide_k_ = take(kWiden ? kTileKeys * head_dim_ : 0);
    values_ = take(kTileKeys * head_dim_);
    row_ = take(head_dim_);
    std::memset(out_, 0, lanes * head_dim_ * sizeof(float));
    for (int64_t m = 0; m < lanes; ++m) {
      const bool real = m < queries.rows();
      max_[m] = -kInf;
      sum_[m] = 0.0f;
      position_[m] = real ? queries.position(m) : INT32_MIN;
      // Keys at positions > window_begin are inside the window.
      const int64_t begin = int64_t{position_[m]} - queries.window();
      window_begin_[m] =
          queries.window() < 0 || begin < INT32_MIN ? INT32_MIN : static_cast<int32_t>(begin);
    }
  }

  void consume(KeyTile& tile, const KeyTile*) {
    if constexpr (kWiden) widen_rows<T>(tile.k, tile.count, head_dim_, wide_k_);
    prepare_values(tile);
    for (int64_t p = 0; p < num_panels_; ++p) {
      switch (width(p)) {
        case 1:
          panel_step<1>(p, tile);
          break;
        case 2:
          panel_step<2>(p, tile);
          break;
        case 3:
          panel_step<(kMaxWidth >= 3 ? 3 : 1)>(p, tile);
          break;
        default:
          panel_step<(kMaxWidth >= 4 ? 4 : 1)>(p, tile);
      }
    }
  }

  void write_out() const {
    for (int64_t m = 0; m < queries_.rows(); ++m) {
      read_column(m, row_);
      convert_row(row_, head_dim_, sum_[m] == 0.0f ? 0.0f : 1.0f / sum_[m], queries_.out(m));
      queries_.write_lse(m, max_[m], sum_[m]);
    }
  }

  void write_partial(const Partial& partial) const {
    for (int64_t m = 0; m < queries_.rows(); ++m) {
      read_column(m, partial.sums + m * head_dim_);
      partial.max[m] = max_[m];
      partial.denominators[m] = sum_[m];
    }
  }

 private:
  // Whether full panels would reach over far more keys than a window: then a panel is one vector,
  // which leaves out more of the keys that none of its rows sees.
  static bool are_scattered(const Queries<T>& queries) {
    const int64_t rows = queries.rows();
    if (queries.window() < 0 || rows <= kLanes) return false;
    const int64_t reach = int64_t{queries.position(rows - 1)} - queries.position(0);
    return reach * kPanelRows > 2 * queries.window() * rows;
  }
  // Vectors of panel p.
  int width(int64_t p) const {
    const int64_t rows = std::min<int64_t>(panel_rows_, queries_.rows() - p * panel_rows_);
    return static_cast<int>((rows + kLanes - 1) / kLanes);
  }
  // The sums of query row m.
  void read_column(int64_t m, float* row) const {
    const int64_t stride = width(m / panel_rows_) * kLanes;
    const float* column = out_ + m / panel_rows_ * panel_rows_ * head_dim_ + m % panel_rows_;
    for (int64_t d = 0; d < head_dim_; ++d) row[d] = column[d * stride];
  }

  // Turns the queries of panel p by -offset, to words [depth, width]; lanes without a row hold
  // zeros.
  template <int Width>
  void pack_queries(int64_t p, int32_t offset) {
    packed_offset_[p] = offset;
    const int64_t first = p * panel_rows_;
    const int64_t end = std::min<int64_t>(first + panel_rows_, queries_.rows());
    float* words = q_ + first * depth_;
    std::memset(words, 0, Width * kLanes * depth_ * sizeof(float));
    for (int64_t m = first; m < end; ++m) {
      queries_.read(m, offset, reinterpret_cast<typename Mac::Element*>(row_));
      float* column = words + m - first;
      for (int64_t i = 0; i < depth_; ++i) column[i * Width * kLanes] = row_[i];
    }
  }

  // Rows of words that hold the values of so many keys.
  static int64_t value_depth(int64_t keys) { return (keys + Mac::kPerWord - 1) / Mac::kPerWord; }
  // Points tile.v at rows of words.
  void prepare_values(KeyTile& tile) {
    if constexpr (kWiden) {
      widen_rows<T>(tile.v, tile.count, head_dim_, values_);
    } else if constexpr (Mac::kPerWord > 1) {
      for (int64_t i = 0; i < value_depth(tile.count); ++i) {
        const auto* first = reinterpret_cast<const T*>(tile.v[2 * i]);
        const auto* second =
            2 * i + 1 < tile.count ? reinterpret_cast<const T*>(tile.v[2 * i + 1]) : nullptr;
        char* words = reinterpret_cast<char*>(values_ + i * head_dim_);
        interleave_rows(first, second, head_dim_, words);
        tile.v[i] = words;
      }
    }
  }

  template <int Width>
  void panel_step(int64_t p, const KeyTile& tile) {
    const int64_t first = p * panel_rows_;
    const int64_t last = std::min<int64_t>(first + panel_rows_, queries_.rows()) - 1;
    const TileClass kind = classify_tile(tile.first_position(),
                                         tile.last_position(),
                                         position_[first],
                                         position_[last],
                                         queries_.window(),
                                         queries_.sink());
    if (kind == TileClass::kSkip) return;
    // Keys that no query of the panel sees, at both ends: those after its last one, and those
    // before the window of its first one.
    const auto is_seen = [&](int32_t key) {
      return key <= position_[last] && (key < queries_.sink() || key > window_begin_[first]);
    };
    int end = tile.count, begin = 0;
    while (end > 0 && !is_seen(tile.positions[end - 1])) --end;
    while (begin < end && !is_seen(tile.positions[begin])) ++begin;
    begin -= begin % Mac::kPerWord;  // words hold whole groups of keys
    const int count = end - begin;
    if (count == 0) return;

    if (packed_offset_[p] != tile.offset) pack_queries<Width>(p, tile.offset);
    const float* q = q_ + first * depth_;
    for_each_block(count, [&](int64_t r, auto rows) {
      score_block<Mac, rows(), Width>(
          tile.k + begin + r, q, depth_, scale_.product, scores_ + r * Width * kLanes);
    });
    if (scale_.capped != 0.0f) {
      for (float* score = scores_; score < scores_ + count * Width * kLanes; score += kLanes) {
        store(score, scale_.score(load(score)));
      }
    }
    if (kind == TileClass::kPartial) mask<Width>(first, tile.positions + begin, count);
    Vec rescale[Width];
    softmax<Width>(first, count, rescale);
    float* out = out_ + first * head_dim_;
    const int64_t depth = value_depth(count);
    for_each_block(head_dim_, [&](int64_t d, auto rows) {
      value_block<Mac, rows(), Width>(
          tile.v + begin / Mac::kPerWord, 4 * d, scores_, depth, rescale, out + d * Width * kLanes);
    });
  }

  template <int Width>
  void mask(int64_t first, const int32_t* positions, int count) {
    for (int c = 0; c < Width; ++c) {
      const VecI position = *reinterpret_cast<const VecI*>(position_ + first + c * kLanes);
      const VecI window_begin = *reinterpret_cast<const VecI*>(window_begin_ + first + c * kLanes);
      for (int i = 0; i < count; ++i) {
        const VecI key = broadcast(positions[i]);
        VecI visible = key <= position;
        if (positions[i] >= queries_.sink()) visible &= key > window_begin;
        float* score = scores_ + (i * Width + c) * kLanes;
        store(score, visible ? load(score) : broadcast(-kInf));
      }
    }
  }

  // Scores become weights 2^(score - max), as words; rescale is what older sums are worth.
  template <int Width>
  void softmax(int64_t first, int count, Vec* rescale) {
    constexpr int kStride = Width * kLanes;
    for (int c = 0; c < Width; ++c) {
      float* column = scores_ + c * kLanes;
      const Vec old_max = load(max_ + first + c * kLanes);
      Vec new_max = old_max;
      for (int i = 0; i < count; ++i) new_max = max(load(column + i * kStride), new_max);
      // A row that has seen nothing yet subtracts 0, not -infinity.
      const Vec base = new_max == -kInf ? Vec{} : new_max;
      rescale[c] = exp2_nonpositive(old_max - base);
      Vec sum = load(sum_ + first + c * kLanes) * rescale[c];
      if constexpr (Mac::kPerWord == 1) {
        for (int i = 0; i < count; ++i) {
          const Vec weight = exp2_nonpositive(load(column + i * kStride) - base);
          sum += weight;
          store(column + i * kStride, weight);
        }
      } else {
#if defined(REDKNOT_ISA_AVX512)
        for (int i = 0; i < count; i += 2) {
          const Vec a = exp2_nonpositive(load(column + i * kStride) - base);
          const Vec b =
              i + 1 < count ? exp2_nonpositive(load(column + (i + 1) * kStride) - base) : Vec{};
          sum += a + b;
          store(column + i / 2 * kStride, pair_words(a, b));
        }
#endif
      }
      store(max_ + first + c * kLanes, new_max);
      store(sum_ + first + c * kLanes, sum);
    }
  }

  const Queries<T>& queries_;
  int64_t head_dim_;
  int64_t depth_;  // words of a query row
  ScoreScale scale_;
  int64_t panel_rows_;
  int64_t num_panels_;
  float* q_;                // per panel [depth, width] words
  float* out_;              // per panel [head_dim, width]
  float* max_;              // [lanes]
  float* sum_;              // [lanes]
  int32_t* position_;       // [lanes]
  int32_t* window_begin_;   // [lanes]
  int32_t* packed_offset_;  // of each panel
  float* scores_;           // [kTileKeys, width]
  float* wide_k_;           // [kTileKeys, head_dim]
  float* values_;           // [kTileKeys, head_dim] words
  float* row_;              // [head_dim]
};

}  // namespace redknot::cpu::REDKNOT_ISA
