#pragma once

// Many query rows (prefill) in bf16 on AMX: scores^T = K Q^T and O^T += V^T P^T by tdpbf16ps, the
// softmax between them in AVX-512. Query rows lie on the lanes, in panels of four vectors, so that
// the softmax needs no reduction across lanes and its weights leave it in the layout of a B tile.
//
// A list of keys is staged once for all panels of the item: keys are copied into A tiles, values
// transposed into them. What is staged, queries and sums live in L2; what a panel works on lives in
// L1: its queries, the weights of 256 keys, two small buffers of scores and the sums of the product
// at hand, since a tile is stored at full speed only to lines that are there. Keys and values pass
// L1 by.
//
// While the tile unit computes the scores of 16 keys, the vector units turn those of 16 keys before
// into weights, interleaved finely enough for the core to run both at the same time. The tile unit
// keeps one of the two ports of fused multiply-adds for itself, so weights come from integer
// operations on 16 bits. They are summed up as they are multiplied, rounded to bf16, so that what
// rounding does to a row's largest weights cancels.
#include <type_traits>
#include <utility>

#include "amx_exp2.h"
#include "amx_keys.h"
#include "amx_panels.h"
#include "amx_products.h"
#include "amx_weigher.h"

namespace redknot::cpu::REDKNOT_ISA {

template <typename T>
class AmxAttention {
  static_assert(std::is_same_v<T, BFloat16>);

 public:
  static int64_t scratch_floats(int64_t rows, int64_t head_dim) {
    const int64_t panels = AmxPanels<T>::count_of(rows);
    const int64_t padded = StagedKeys::padded_dim(head_dim);
    return PanelState::scratch_floats(panels * kWidth) + StagedKeys::scratch_floats(padded) +
           AmxPanels<T>::scratch_floats(rows, padded) + 2 * panels * kStepFloats +
           3 * kProductFloats + kChunkKeys / 2 * kWidth + kWidth;
  }

  AmxAttention(const SegPagedAttentionParams& params, const Queries<T>& queries, float* scratch)
      : queries_(queries),
        head_dim_(params.pool.head_dim),
        padded_(StagedKeys::padded_dim(head_dim_)),
        // The sign of the scale goes into Q, exactly, so that the largest product is the largest
        // score.
        q_factor_(params.softmax_scale > 0.0f   ? 1.0f
                  : params.softmax_scale < 0.0f ? -1.0f
                                                : 0.0f),
        cap_scale_(params.softcap > 0.0f ? q_factor_ * params.softmax_scale / params.softcap
                                         : 0.0f),
        scale_(q_factor_ == 0.0f       ? 1.0f
               : params.softcap > 0.0f ? params.softcap * kLog2e
                                       : q_factor_ * params.softmax_scale * kLog2e),
        carver_(scratch),
        state_(queries, AmxPanels<T>::count_of(queries.rows()) * kWidth, carver_),
        staged_(head_dim_, carver_),
        panels_(queries, head_dim_, padded_, q_factor_, carver_),
        scores_(carver_.take(2 * kProductFloats)),
        products_(carver_.take(kProductFloats)) {
    steps_ = reinterpret_cast<Step*>(carver_.take(2 * panels_.count() * kStepFloats));
    weights_ = carver_.take(kChunkKeys / 2 * kWidth);
    rescale_ = carver_.take(kWidth);
    // Lanes without a query row have a maximum, so that nobody waits for their first key.
    for (int64_t m = queries.rows(); m < panels_.count() * kWidth; ++m) state_.max[m] = 0.0f;
  }

  void consume(const KeyTile& tile, const KeyTile*) {
    if (!keys_.takes(tile)) attend();
    keys_.append(tile);
  }

  void write_out() {
    finish();
    const auto share = [this](int64_t m) {
      const Vec sum = load(state_.sum + m);
      return sum == Vec{} ? Vec{} : broadcast(1.0f) / sum;
    };
    panels_.for_each_row(share, [&](int64_t m, int64_t d, int64_t count, Vec out) {
      if (count == kLanes) {
        store(queries_.out(m) + d, out);
      } else {
        store_partial(queries_.out(m) + d, out, count);
      }
    });
    for (int64_t m = 0; m < queries_.rows(); ++m) {
      queries_.write_lse(m, state_.max[m], state_.sum[m]);
    }
  }

  void write_partial(const Partial& partial) {
    finish();
    const auto one = [](int64_t) { return broadcast(1.0f); };
    panels_.for_each_row(one, [&](int64_t m, int64_t d, int64_t count, Vec sums) {
      store_partial(partial.sums + m * head_dim_ + d, sums, count);
    });
    std::memcpy(partial.max, state_.max, queries_.rows() * sizeof(float));
    std::memcpy(partial.denominators, state_.sum, queries_.rows() * sizeof(float));
  }

 private:
  static constexpr int kVecs = kPanelVecs;
  static constexpr int kWidth = kPanelWidth;
  static constexpr int kChunkKeys = 256;  // between two visits to the sums
  // The first weights are so many powers of two below 1, so that older sums are rarely scaled down
  // when higher scores come. fp32 sums and bf16 weights lose nothing by it.
  static constexpr float kHeadroom = 7.0f;

  // One panel against the keys [begin, end) of a list, or two where its sink and its window lie far
  // apart; its rows see no others.
  struct Step {
    int32_t panel;
    int32_t begin;
    int32_t end;
    int32_t first_unit() const { return begin / kUnitKeys; }
    int32_t end_unit() const { return (end + kUnitKeys - 1) / kUnitKeys; }
  };
  static constexpr int64_t kStepFloats = sizeof(Step) / sizeof(float);
  struct Half {
    const Step* step;
    int half;  // of the list
  };
  static constexpr int kHalfWords = kHalfKeys / 2 * kWidth;

  // --- keys -------------------------------------------------------------------------------------

  void finish() {
    if (keys_.count > 0) attend();
    products_.flush();
  }

  // All panels against what was gathered.
  void attend() {
    const int num_steps = list_steps();
    if (num_steps > 0) {
      panels_.turn_to(keys_.offset);
      staged_.stage(keys_);
      scoring_ = {steps_, 2 * steps_->first_unit()};
      steps_end_ = steps_ + num_steps;
      Idle idle;
      score_next(idle);
      score_next(idle);
      for (int i = 0; i < num_steps; ++i) attend_panel(steps_[i]);
    }
    keys_.count = 0;
  }

  int list_steps() {
    int num_steps = 0;
    const auto add = [&](int64_t panel, int begin, int end) {
      if (begin < end) steps_[num_steps++] = {static_cast<int32_t>(panel), begin, end};
    };
    const int32_t* positions = keys_.positions;
    const auto count = [=](int begin, int end, auto&& is_first) {
      return static_cast<int>(std::partition_point(positions + begin, positions + end, is_first) -
                              positions);
    };
    for (int64_t p = 0; p < panels_.count(); ++p) {
      const auto [first, last] = positions_of(p);
      const int end = count(0, keys_.count, [&](int32_t key) { return key <= last; });
      const int sink_end = queries_.window() < 0
                               ? end
                               : count(0, end, [&](int32_t key) { return key < queries_.sink(); });
      const int begin =
          count(sink_end, end, [&](int32_t key) { return behind_window(key, first); });
      if (begin / kUnitKeys > (sink_end + kUnitKeys - 1) / kUnitKeys) {
        add(p, 0, sink_end);
        add(p, begin, end);
      } else {
        add(p, sink_end == 0 ? begin : 0, end);
      }
    }
    return num_steps;
  }
  struct Positions {
    int32_t first;
    int32_t last;
  };
  Positions positions_of(int64_t panel) const {
    const int64_t last_row = std::min<int64_t>((panel + 1) * kWidth, queries_.rows()) - 1;
    return {state_.position[panel * kWidth], state_.position[last_row]};
  }
  TileClass classify(int32_t first_key, int32_t last_key, int64_t panel) const {
    const auto [first, last] = positions_of(panel);
    return classify_tile(first_key, last_key, first, last, queries_.window(), queries_.sink());
  }
  bool behind_window(int32_t key, int32_t query) const {
    return queries_.window() >= 0 && key >= queries_.sink() &&
           key <= int64_t{query} - queries_.window();
  }

  // --- tiles ------------------------------------------------------------------------------------

  // The scores of the next half, into one of two buffers in turn.
  template <typename Work>
  [[gnu::always_inline]] void score_next(Work& work) {
    products_.template multiply<false>(staged_.keys(scoring_.half),
                                       panels_.queries(scoring_.step->panel),
                                       padded_ / 32,
                                       scores_ + num_scored_++ % 2 * kProductFloats,
                                       work);
    if (++scoring_.half == 2 * scoring_.step->end_unit()) {
      ++scoring_.step;
      if (!all_scored()) scoring_.half = 2 * scoring_.step->first_unit();
    }
  }
  bool all_scored() const { return scoring_.step == steps_end_; }

  // Adds the weighed values of units [begin, end) to the sums of a panel.
  void add_values(const Step& step, int begin, int end) {
    float* sums = panels_.sums(step.panel);
    if (rescaled_) panels_.rescale(step.panel, rescale_);
    Idle idle;
    for (int64_t d = 0; d < padded_; d += kProductRows) {
      products_.template multiply<true>(
          staged_.values(d, begin), weights_, end - begin, sums + d * kWidth, idle);
    }
  }

  // --- the softmax ------------------------------------------------------------------------------

  // A panel against its keys of a list. The scores of its first two halves are on their way, those
  // of the next step's are afterwards.
  void attend_panel(const Step& step) {
    constexpr int kChunkUnits = kChunkKeys / kUnitKeys;
    load_state(step);
    for (int begin = step.first_unit(); begin < step.end_unit(); begin += kChunkUnits) {
      const int end = std::min(begin + kChunkUnits, step.end_unit());
      rescaled_ = false;
      for (float* rescale = rescale_; rescale < rescale_ + kWidth; ++rescale) *rescale = 1.0f;
      for (int half = 2 * begin; half < 2 * end; ++half) {
        weigh_half(step, half, half - 2 * begin);
      }
      add_values(step, begin, end);
    }
    store_state(step);
  }
  void load_state(const Step& step) {
    for (int c = 0; c < kVecs; ++c) {
      base_[c] = load(state_.max + int64_t{step.panel} * kWidth + c * kLanes);
      sums_[c] = load(state_.sum + int64_t{step.panel} * kWidth + c * kLanes);
    }
  }
  void store_state(const Step& step) {
    for (int c = 0; c < kVecs; ++c) {
      store(state_.max + int64_t{step.panel} * kWidth + c * kLanes, base_[c]);
      store(state_.sum + int64_t{step.panel} * kWidth + c * kLanes, sums_[c]);
    }
  }

  // Turns the scores of half a unit, the `index`th of its chunk, into weights, while those of the
  // half after the next are computed.
  void weigh_half(const Step& step, int half, int index) {
    if (all_scored()) products_.flush();
    float* scores = scores_ + num_weighed_++ % 2 * kProductFloats;
    float* words = weights_ + index * kHalfWords;
    const int begin = half * kHalfKeys;
    const int count = std::clamp(step.end - begin, 0, kHalfKeys);
    const int32_t* positions = keys_.positions + begin;
    if (cap_scale_ != 0.0f) {
      for (int i = 0; i < count * kWidth; i += kLanes) {
        store(scores + i, tanh(load(scores + i) * cap_scale_));
      }
    }
    const bool whole = count == kHalfKeys &&
                       classify(positions[0], positions[count - 1], step.panel) == TileClass::kFull;
    if (whole && bases_in_reach()) {
      Weigher weigher(scores, words, scale_, base_, sums_);
      if (!all_scored()) score_next(weigher);
      weigher.finish();
      if (weigher.exp2.all_inside()) {
        weigher.leave_sums(sums_);
        return;
      }
    } else {
      Idle idle;
      if (!all_scored()) score_next(idle);
      if (!whole) {
        state_.mask<kVecs>(int64_t{step.panel} * kWidth, positions, count, scores);
        for (int i = count * kWidth; i < kProductFloats; i += kLanes) {
          store(scores + i, broadcast(-kInf));
        }
      }
    }
    weigh_exactly(scores, words, index);
  }
  // Not at -infinity or NaN.
  bool bases_in_reach() const {
    __mmask16 inside = 0xffff;
    for (const Vec base : base_) {
      inside &= _mm512_cmp_ps_mask(
          _mm512_abs_ps((__m512)base), _mm512_set1_ps(Exp2Words::kReach), _CMP_LT_OQ);
    }
    return inside == 0xffff;
  }

  // Weighs any scores, -infinity included; raises the base where they ask for it.
  __attribute__((noinline)) void weigh_exactly(const float* scores, float* words, int index) {
    for (int c = 0; c < kVecs; ++c) {
      const float* column = scores + c * kLanes;
      const Vec top = column_max(column) * scale_;
      if (_mm512_cmp_ps_mask((__m512)top, (__m512)base_[c], _CMP_GT_OQ) != 0) {
        raise_base(c, top, index);
      }
      // A row that has seen nothing yet subtracts 0, not -infinity.
      const Vec base = base_[c] == -kInf ? Vec{} : -base_[c];
      for (int i = 0; i < kHalfKeys; i += 2) {
        const Vec a = exp2_weight(fma(load(column + i * kWidth), broadcast(scale_), base));
        const Vec b = exp2_weight(fma(load(column + (i + 1) * kWidth), broadcast(scale_), base));
        const Vec pair = pair_words(a, b);
        sums_[c] = add_words(sums_[c], pair);
        store(words + i / 2 * kWidth + c * kLanes, pair);
      }
    }
  }

  static Vec column_max(const float* column) {
    Vec tops[4];
    for (Vec& top : tops) top = broadcast(-kInf);
    for (int i = 0; i < kHalfKeys; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) tops[j] = max(load(column + (i + j) * kWidth), tops[j]);
    }
    return max(max(tops[0], tops[1]), max(tops[2], tops[3]));
  }

  // Takes the scores of column c relative to a whole number well above `top` where they exceed the
  // old one: what was summed is worth a power of two less, which is exact for sums, results and the
  // weights of the chunk's earlier halves.
  void raise_base(int c, Vec top, int num_halves) {
    const Vec ceiling = (Vec)_mm512_roundscale_ps((__m512)top, _MM_FROUND_TO_POS_INF);
    const Vec base = top > base_[c] ? ceiling + kHeadroom : base_[c];
    const Vec factor = exp2_nonpositive(base_[c] == base ? Vec{} : base_[c] - base);
    base_[c] = base;
    sums_[c] *= factor;
    float* rescale = rescale_ + c * kLanes;
    store(rescale, load(rescale) * factor);
    rescaled_ = true;
    float* words = weights_ + c * kLanes;
    for (int i = 0; i < num_halves * kHalfKeys / 2; ++i) {
      const VecI word = (VecI)load(words + i * kWidth);
      const Vec low = (Vec)(word << 16) * factor;
      const Vec high = (Vec)(word & broadcast(int32_t{-65536})) * factor;
      store(words + i * kWidth, pair_words(low, high));
    }
  }

  const Queries<T>& queries_;
  int64_t head_dim_;
  int64_t padded_;
  float q_factor_;
  float cap_scale_;  // of a product inside tanh; 0: no cap
  float scale_;
  Carver carver_;
  PanelState state_;
  StagedKeys staged_;
  AmxPanels<T> panels_;
  KeyList keys_;
  AmxTiles tiles_;
  float* scores_;  // [2, kHalfKeys, kWidth]
  PanelProducts products_;
  unsigned num_scored_ = 0;  // halves, of which the last may still be on its way
  unsigned num_weighed_ = 0;
  Step* steps_;  // [2 * panels]
  const Step* steps_end_ = nullptr;
  Half scoring_ = {};  // what to score next
  float* weights_;     // [kChunkKeys / 2, kWidth] words
  float* rescale_;     // [kWidth]
  bool rescaled_ = false;
  Vec base_[kVecs];  // of the panel being weighed
  Vec sums_[kVecs];
};

}  // namespace redknot::cpu::REDKNOT_ISA
