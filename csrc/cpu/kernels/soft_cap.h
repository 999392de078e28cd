#pragma once

// From products q . k to scores in units of log2: scale * log2(e) * product, or with a soft cap
// cap * log2(e) * tanh(scale / cap * product).
#include "redknot/attention.h"
#include "vec.h"

namespace redknot::cpu::REDKNOT_ISA {

inline constexpr float kLog2e = 1.44269504088896341f;

// Relative error below 1.2e-6, and below 1e-6 of 1 anywhere.
static inline Vec tanh(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec e = exp2_nonpositive(size * (-2.0f * kLog2e));
  const Vec far = (1.0f - e) / (1.0f + e);
  // Where 1 - e cancels: the series, of which the next term is below 1e-8 of x.
  const Vec square = x * x;
  Vec near = broadcast(-17.0f / 315.0f);
  near = fma(near, square, broadcast(2.0f / 15.0f));
  near = fma(near, square, broadcast(-1.0f / 3.0f));
  near = fma(near, square, broadcast(1.0f));
  return size < 0.1f ? near * x : (x < 0.0f ? -far : far);
}

struct ScoreScale {
  float product;  // of a product: with a cap inside tanh, else all there is
  float capped;   // of tanh; 0: no cap

  explicit ScoreScale(const SegPagedAttentionParams& params)
      : product(params.softcap > 0.0f ? params.softmax_scale / params.softcap
                                      : params.softmax_scale * kLog2e),
        capped(params.softcap * kLog2e) {}

  Vec score(Vec scaled_product) const {
    return capped == 0.0f ? scaled_product : tanh(scaled_product) * capped;
  }
};

}  // namespace redknot::cpu::REDKNOT_ISA
