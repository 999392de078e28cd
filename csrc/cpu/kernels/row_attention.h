#pragma once

// Few query rows (decode), bound by reading pages: every key and value is read once from its page,
// in order, for all query rows of the group. Products says what multiplies: RowVectors, or RowTiles
// with AMX. What is read next is asked for ahead, evenly between the arithmetic, so that memory
// never rests: the values of a tile during its scores, the keys of the next tile during its values.
#include "carver.h"
#include "key_tile.h"
#include "queries.h"

namespace redknot::cpu::REDKNOT_ISA {

template <typename Products>
class RowAttention {
 public:
  static int64_t scratch_floats(int64_t rows, int64_t head_dim) {
    return 2 * Carver::rounded(rows) + Carver::rounded(head_dim) +
           Products::scratch_floats(rows, head_dim);
  }

  template <typename Queries>
  RowAttention(const SegPagedAttentionParams& params, const Queries& queries, float* scratch)
      : rows_(queries.rows()),
        scale_(params),
        carver_(scratch),
        products_(params.pool, rows_, carver_),
        max_(carver_.take(rows_)),
        sum_(carver_.take(rows_)),
        row_(carver_.take(params.pool.head_dim)) {
    for (int64_t m = 0; m < rows_; ++m) {
      max_[m] = -kInf;
      sum_[m] = 0.0f;
    }
  }

  // `next` is what will be consumed next, by anyone on this thread.
  template <typename Queries>
  void consume(const Queries& queries, KeyTile& tile, const KeyTile& next) {
    if (!ready_ || tile.offset != offset_) products_.pack(queries, tile.offset);
    ready_ = true;
    offset_ = tile.offset;
    const TileClass kind = classify_tile(tile.first_position(),
                                         tile.last_position(),
                                         queries.first_position(),
                                         queries.last_position(),
                                         queries.window(),
                                         queries.sink());
    if (kind == TileClass::kSkip) return;
    tile.pad();
    const int count = tile.padded_count();
    FetchAhead ahead(tile.values(),
                     next.keys(),
                     products_.row_bytes(),
                     products_.score_steps(tile) + rows_ * (count / kLanes));
    products_.score(tile, ahead);
    for (int64_t m = 0; m < rows_; ++m) {
      float* scores = products_.scores(m);
      scale(count, scores);
      for (int i = tile.count; i < count; ++i) scores[i] = -kInf;
      if (kind == TileClass::kPartial) mask(queries, m, tile, scores);
      softmax(m, count, scores, ahead);
    }
    products_.add_values(tile, next);
  }

  // Whether the results are what exact products would give; if not, nothing was written.
  bool is_sound() const { return products_.is_sound(); }

  template <typename Queries>
  void write_out(const Queries& queries) {
    for (int64_t m = 0; m < rows_; ++m) {
      products_.read(m, row_);
      const float inverse = sum_[m] == 0.0f ? 0.0f : 1.0f / sum_[m];
      convert_row(row_, products_.head_dim(), inverse, queries.out(m));
      queries.write_lse(m, max_[m], sum_[m]);
    }
  }

  void write_partial(const Partial& partial) const {
    for (int64_t m = 0; m < rows_; ++m) {
      products_.read(m, partial.sums + m * products_.head_dim());
      partial.max[m] = max_[m];
      partial.denominators[m] = sum_[m];
    }
  }

 private:
  template <typename Queries>
  static void mask(const Queries& queries, int64_t m, const KeyTile& tile, float* scores) {
    for (int i = 0; i < tile.count; ++i) {
      if (!is_visible(tile.positions[i], queries.position(m), queries.window(), queries.sink())) {
        scores[i] = -kInf;
      }
    }
  }

  void scale(int count, float* scores) const {
    if (scale_.capped == 0.0f) {
      for (int i = 0; i < count; i += kLanes) store(scores + i, load(scores + i) * scale_.product);
    } else {
      for (int i = 0; i < count; i += kLanes) {
        store(scores + i, scale_.score(load(scores + i) * scale_.product));
      }
    }
  }

  void softmax(int64_t m, int count, float* scores, FetchAhead& ahead) {
    Vec tile_max = load(scores);
    for (int i = kLanes; i < count; i += kLanes) tile_max = max(load(scores + i), tile_max);
    const float new_max = std::max(max_[m], reduce_max(tile_max));
    const float base = new_max == -kInf ? 0.0f : new_max;
    if (new_max != max_[m]) {
      const float factor = exp2_nonpositive(broadcast(max_[m] - base))[0];
      products_.rescale(m, factor);
      sum_[m] *= factor;
      max_[m] = new_max;
    }
    Vec sum = {};
    for (int i = 0; i < count; i += kLanes) {
      const Vec weight = Products::exp2(load(scores + i) - base);
      sum += weight;
      products_.set_weights(m, i, weight);
      ahead.step();
    }
    sum_[m] += reduce_add(sum);
  }

  int64_t rows_;
  ScoreScale scale_;
  Carver carver_;
  Products products_;
  bool ready_ = false;
  int32_t offset_ = 0;
  float* max_;  // [rows]
  float* sum_;  // [rows]
  float* row_;  // [head_dim]
};

}  // namespace redknot::cpu::REDKNOT_ISA
