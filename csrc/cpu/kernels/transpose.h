#pragma once

// A square of kLanes vectors, turned: exchanges halves of segments that shrink to one lane.
#include <utility>

#include "vec.h"

namespace redknot::cpu::REDKNOT_ISA {

// Segments of 2 * Half lanes of a and b: the first (Second = 0) or second halves of both.
template <int Half, int Second, int... Lane>
static inline Vec join_halves(Vec a, Vec b, std::integer_sequence<int, Lane...>) {
  constexpr auto source = [](int lane) {
    const int segment = lane / (2 * Half) * 2 * Half;
    const int within = lane % (2 * Half);
    return Second * Half + (within < Half ? segment + within : kLanes + segment + within - Half);
  };
  return __builtin_shuffle(a, b, VecI{source(Lane)...});
}

// Lane j of rows[i] becomes lane i of rows[j].
template <int Half = kLanes / 2>
static inline void transpose(Vec* rows) {
  if constexpr (Half > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & Half) != 0) continue;
      const Vec a = rows[i];
      const Vec b = rows[i + Half];
      rows[i] = join_halves<Half, 0>(a, b, lanes);
      rows[i + Half] = join_halves<Half, 1>(a, b, lanes);
    }
    transpose<Half / 2>(rows);
  }
}

}  // namespace redknot::cpu::REDKNOT_ISA
