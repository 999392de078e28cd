#pragma once

// The multiply-accumulate of a kernel, on 32-bit words: a word is one fp32 number or, where the
// machine multiplies bf16 pairs, two neighbouring bf16 numbers. The kernels are written on words,
// so that fp32 and bf16 share one source.
#include "vec.h"

namespace redknot::cpu::REDKNOT_ISA {

// The word behind `p`, on every lane; `p` need not be aligned.
static inline Vec broadcast_word(const char* p) {
  float word;
  std::memcpy(&word, p, sizeof(word));
  return broadcast(word);
}

struct Fp32Mac {
  using Element = float;
  static constexpr int kPerWord = 1;
  static Vec mac(Vec a, Vec b, Vec acc) { return fma(a, b, acc); }
};

#if defined(REDKNOT_ISA_AVX512)
struct Bf16Mac {
  using Element = BFloat16;
  static constexpr int kPerWord = 2;
  static Vec mac(Vec a, Vec b, Vec acc) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
};

// The words (low[i], high[i]) of a vector whose halves hold 16 bf16 numbers each.
static inline Vec join_words(__m512i halves) {
  static constexpr struct alignas(64) {
    uint16_t lanes[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  } kInterleave;
  return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(&kInterleave), halves);
}

// Words (a[i], b[i]) of two vectors rounded to bf16.
static inline Vec pair_words(Vec a, Vec b) {
  return join_words((__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}

// out[d] = the word (a[d], b[d]); a null b stands for zeros.
static inline void interleave_rows(const BFloat16* a, const BFloat16* b, int64_t count, char* out) {
  const __m512i low = _mm512_set_epi16(47,
                                       15,
                                       46,
                                       14,
                                       45,
                                       13,
                                       44,
                                       12,
                                       43,
                                       11,
                                       42,
                                       10,
                                       41,
                                       9,
                                       40,
                                       8,
                                       39,
                                       7,
                                       38,
                                       6,
                                       37,
                                       5,
                                       36,
                                       4,
                                       35,
                                       3,
                                       34,
                                       2,
                                       33,
                                       1,
                                       32,
                                       0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t d = 0; d < count; d += 32) {
    const int64_t left = count - d;
    const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    const __m512i x = _mm512_maskz_loadu_epi16(mask, a + d);
    const __m512i y = _mm512_maskz_loadu_epi16(b == nullptr ? 0 : mask, b == nullptr ? a : b + d);
    const __mmask16 first = static_cast<__mmask16>(mask);
    const __mmask16 second = static_cast<__mmask16>(mask >> 16);
    _mm512_mask_storeu_epi32(out + 4 * d, first, _mm512_permutex2var_epi16(x, low, y));
    _mm512_mask_storeu_epi32(out + 4 * d + 64, second, _mm512_permutex2var_epi16(x, high, y));
  }
}
#endif

// What multiplies tensors of element type T.
template <typename T>
struct MacOf {
  using Type = Fp32Mac;
};
#if defined(REDKNOT_ISA_AVX512)
template <>
struct MacOf<BFloat16> {
  using Type = Bf16Mac;
};
#endif

}  // namespace redknot::cpu::REDKNOT_ISA
