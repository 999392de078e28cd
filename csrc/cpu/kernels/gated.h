#pragma once

// activation(gate) * up, as torch rounds it.
#include "redknot/ffn.h"
#include "vec.h"

namespace redknot::cpu::REDKNOT_ISA {

template <typename T>
static inline Vec round_to(Vec x) {
  T buffer[kLanes];
  store(buffer, x);
  return load(buffer);
}

// What silu and GELU (by tanh) make of x is x / (1 + e^-y), y = x or, for 1 + tanh(y / 2) =
// 2 / (1 + e^-y), sqrt(8 / pi) (x + 0.044715 x^3): by e^-|y|, y having the sign of x, so that
// nothing overflows. Rounded to T as torch does before the product with `up`.
template <typename T, Activation kActivation>
static inline Vec gated(Vec gate, Vec up) {
  constexpr float kLog2e = 1.44269504f, kSqrt8OverPi = 1.59576912f;
  const Vec y = kActivation == Activation::kSilu
                    ? gate
                    : kSqrt8OverPi * (gate + 0.044715f * gate * gate * gate);
  const Vec e = exp2_nonpositive((y < 0.0f ? y : -y) * kLog2e);
  const Vec numerator = y < 0.0f ? gate * e : gate;
  return round_to<T>(numerator / (1.0f + e)) * up;
}

}  // namespace redknot::cpu::REDKNOT_ISA
