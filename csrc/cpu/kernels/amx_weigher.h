#pragma once

// What the vector units do between the tile instructions of a product: scores to weights.
#include <utility>

#include "amx_exp2.h"
#include "amx_products.h"

namespace redknot::cpu::REDKNOT_ISA {

// Weights 2^(score * scale - base) of scores [kProductRows, kPanelWidth], rows being keys, that all
// are seen and not far from the base; whether none is far is known at the end. Words go to
// [kProductRows / 2, kPanelWidth].
struct Weigher {
  static constexpr auto kColumns = std::make_integer_sequence<int, kPanelVecs>();

  const float* scores;
  const float* end;
  float* words;
  Vec scale;
  Vec shifts[kPanelVecs];
  Vec sums[kPanelVecs];
  Exp2Words exp2;

  // `bases` and `sums_before` [kPanelVecs].
  Weigher(const float* unit_scores,
          float* unit_words,
          float score_scale,
          const Vec* bases,
          const Vec* sums_before)
      : Weigher(unit_scores, unit_words, score_scale, bases, sums_before, kColumns) {}

  // Half the vectors of two keys.
  template <int Place>
  [[gnu::always_inline]] void advance() {
    if (scores == end) return;
    weigh<Place % 2 * 2>();
    weigh<Place % 2 * 2 + 1>();
    if constexpr (Place % 2 == 1) {
      scores += 2 * kPanelWidth;
      words += kPanelWidth;
    }
  }
  [[gnu::always_inline]] void finish() {
    while (scores != end) {
      advance<0>();
      advance<1>();
    }
  }
  void leave_sums(Vec* out) const { leave_sums(out, kColumns); }

 private:
  // Columns are named one by one: the compiler keeps in registers what is never indexed.
  template <int... Column>
  Weigher(const float* unit_scores,
          float* unit_words,
          float score_scale,
          const Vec* bases,
          const Vec* sums_before,
          std::integer_sequence<int, Column...>)
      : scores(unit_scores),
        end(unit_scores + kProductFloats),
        words(unit_words),
        scale(broadcast(Exp2Words::kSteps * score_scale)),
        shifts{Exp2Words::kShift - Exp2Words::kSteps * bases[Column]...},
        sums{sums_before[Column]...} {}
  template <int... Column>
  void leave_sums(Vec* out, std::integer_sequence<int, Column...>) const {
    ((out[Column] = sums[Column]), ...);
  }

  template <int Column>
  [[gnu::always_inline]] void weigh() {
    const float* score = scores + Column * kLanes;
    const Vec pair = exp2(fma(load(score), scale, shifts[Column]),
                          fma(load(score + kPanelWidth), scale, shifts[Column]));
    sums[Column] = add_words(sums[Column], pair);
    store(words + Column * kLanes, pair);
  }
};

}  // namespace redknot::cpu::REDKNOT_ISA
