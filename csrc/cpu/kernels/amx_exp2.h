#pragma once

// Weights of the softmax in bf16: powers of two of scores, and their rounding.
#include <cstring>

#include "mac.h"

namespace redknot::cpu::REDKNOT_ISA {

// 2^x rounded later to bf16: relative error below 2.7e-6, 0 below 2^-126 and at -infinity, NaN at
// NaN. Polynomial of degree 4 for the fraction in [0, 1); scalef takes the floor of x itself.
static inline Vec exp2_weight(Vec x) {
  const __m512 f = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = broadcast(0x1.bb7cd4p-7f);
  p = fma(p, (Vec)f, broadcast(0x1.aa13f0p-5f));
  p = fma(p, (Vec)f, broadcast(0x1.ee798ap-3f));
  p = fma(p, (Vec)f, broadcast(0x1.62d166p-1f));
  p = fma(p, (Vec)f, broadcast(0x1.00002cp+0f));
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
}

// 2^(k / 32) of sixteen k with -3840 <= k < 256 that need not be whole: relative error below
// 5.3e-5. A table of 2^(i / 32) for the whole part and a straight line for the rest; others are
// noticed.
struct Exp2Table {
  static constexpr int32_t kOne = 0x4b400000;  // 1.5 * 2^23: a float whose lowest bit is worth 1
  static constexpr float kShift = 12582912.0f + 3840.0f;
  static constexpr float kSlope = 46.0f;  // 32 / ln(2), rounded
  Vec shift = broadcast(kShift);
  Vec shift_and_slope = broadcast(kShift + kSlope);
  Vec low = load(table().entries);
  Vec high = load(table().entries + kLanes);
  VecI outside = {};  // bits that only a k outside sets

  [[gnu::always_inline]] Vec operator()(Vec k) {
    const Vec t = k + shift;  // its lowest bits: the whole part + 3840
    const __m512i bits = (__m512i)t;
    outside =
        (VecI)_mm512_ternarylogic_epi32((__m512i)outside, bits, _mm512_set1_epi32(kOne), 0xf6);
    const VecI entry = (VecI)_mm512_permutex2var_ps((__m512)low, bits, (__m512)high);
    const Vec power = (Vec)(entry + (VecI)_mm512_slli_epi32(bits, 18));
    return power * (k - (t - shift_and_slope));
  }
  bool all_inside() const {
    return _mm512_test_epi32_mask((__m512i)outside, _mm512_set1_epi32(~0xfff)) == 0;
  }

 private:
  // 2^(i / 32) / kSlope, scaled so that the line's error is centred, less what the shifted bits of
  // t add to it.
  struct Entries {
    alignas(64) float entries[2 * kLanes];
    Entries() {
      for (int32_t i = 0; i < 2 * kLanes; ++i) {
        const float power = 1.000046f / kSlope * __builtin_exp2f(static_cast<float>(i) / 32.0f);
        int32_t bits;
        std::memcpy(&bits, &power, sizeof(bits));
        bits -= (3840 + i) << 18;
        std::memcpy(&entries[i], &bits, sizeof(bits));
      }
    }
  };
  static const Entries& table() {
    static const Entries entries;
    return entries;
  }
};

// Words (a[i], b[i]) of two vectors rounded to bf16, by integer operations.
static inline Vec round_pair(Vec a, Vec b) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)a, half), 16);
  const __m512i high = _mm512_add_epi32((__m512i)b, half);
  return (Vec)_mm512_mask_blend_epi16(0xaaaaaaaa, low, high);
}

}  // namespace redknot::cpu::REDKNOT_ISA
