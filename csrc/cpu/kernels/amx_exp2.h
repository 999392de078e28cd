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

// 2^x in bf16 for -127 <= x < 1 by integer operations on 16 bits, two vectors at a time; x outside
// is noticed. A number of steps of 1 / 512 since 2^-127 is the power's bits in bf16 and two bits
// more, but for what the straight lines that bf16 draws between powers of two exceed the curve: a
// table by the upper 6 bits of the fraction. Relative error below 6.3e-3, RMS 1.8e-3, where
// rounding to bf16 alone has 3.9e-3 and 1.7e-3.
struct Exp2Words {
  static constexpr float kSteps = 512.0f;  // to an octave
  // Above the largest base whose product with kSteps is added to the shift exactly.
  static constexpr float kReach = 16384.0f;
  static constexpr int32_t kWholeBits = 0x4b400000;  // 1.5 * 2^23: a float whose lowest bit is 1
  static constexpr float kHalf = 2.0f;               // of a step of bf16, to round to it
  // kSteps * x + kShift is whole, its lowest 16 bits the number of steps.
  static constexpr float kShift = 12582912.0f + 127.0f * kSteps + kHalf;
  __m512i excess = _mm512_load_si512(table().entries);
  __m512i seen = {};

  // The words (2^x, 2^y) for a = kSteps * x + kShift and b, the same of y.
  [[gnu::always_inline]] Vec operator()(Vec a, Vec b) {
    seen = _mm512_ternarylogic_epi32(seen, (__m512i)a, (__m512i)b, 0xfe);  // or
    const __m512i low_halves = _mm512_set4_epi32(0x0d0c0000, 0x09080000, 0x05040000, 0x01000000);
    const __m512i steps =
        _mm512_mask_shuffle_epi8((__m512i)a, 0xcccccccccccccccc, (__m512i)b, low_halves);
    const __m512i entries =
        _mm512_maskz_permutexvar_epi8(0x5555555555555555, _mm512_srli_epi16(steps, 3), excess);
    return (Vec)_mm512_srli_epi16(_mm512_sub_epi16(steps, entries), 2);
  }
  bool all_inside() const {
    return _mm512_test_epi32_mask(seen, _mm512_set1_epi32(~(kWholeBits | 0xffff))) == 0;
  }

 private:
  struct Entries {
    alignas(64) uint8_t entries[64] = {};  // none of the first: nothing could be taken from 0 steps
    Entries() {
      for (int i = 1; i < 64; ++i) {
        const float x = (8.0f * static_cast<float>(i) + 3.5f - kHalf) / kSteps;
        // One more than rounded down: kHalf rounds up what lies halfway.
        entries[i] = static_cast<uint8_t>(kSteps * (1.0f + x - __builtin_exp2f(x)) + 1.0f);
      }
    }
  };
  static const Entries& table() {
    static const Entries entries;
    return entries;
  }
};

// Sums plus both bf16 numbers of every word.
static inline Vec add_words(Vec sums, Vec words) {
  return Bf16Mac::mac(words, (Vec)broadcast(int32_t{0x3f803f80}), sums);
}

}  // namespace redknot::cpu::REDKNOT_ISA
