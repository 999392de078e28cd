#pragma once

// The vector of the instruction set this file is compiled for, as GCC vector types: arithmetic,
// comparison and ?: work on them as they stand; what differs per set is in the small functions
// here.
#include <cstdint>
#include <cstring>
#include <utility>

#include "redknot/dispatch.h"

#if !defined(REDKNOT_ISA_DEFAULT)
#include <immintrin.h>
#endif

namespace redknot::cpu::REDKNOT_ISA {

#if defined(REDKNOT_ISA_AVX512)
inline constexpr int kLanes = 16;
#elif defined(REDKNOT_ISA_AVX2)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif
inline constexpr int kVecBytes = kLanes * 4;

typedef float Vec __attribute__((vector_size(kVecBytes), may_alias));
typedef int32_t VecI __attribute__((vector_size(kVecBytes), may_alias));
typedef float VecU __attribute__((vector_size(kVecBytes), may_alias, aligned(4)));

inline constexpr float kInf = __builtin_huge_valf();

static inline Vec broadcast(float x) { return x - Vec{}; }
static inline VecI broadcast(int32_t x) { return x - VecI{}; }

// --- memory -----------------------------------------------------------------------------------

static inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
static inline void store(float* p, Vec x) { *reinterpret_cast<VecU*>(p) = x; }

static inline float to_float(float x) { return x; }
static inline float to_float(BFloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
static inline float to_float(Float16 x) {
#if defined(REDKNOT_ISA_DEFAULT)
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    return __builtin_bit_cast(float, sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  // Scaling by 2^112 moves the exponent and makes subnormals normal.
  const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, scaled));
#else
  return _cvtsh_ss(x.bits);
#endif
}

static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, BFloat16* out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded >> 16);
}
static inline void from_float(float x, Float16* out) {
#if defined(REDKNOT_ISA_DEFAULT)
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded to even, in the low mantissa.
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    half = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#else
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#endif
}

// max(a, b) is b where either is NaN, on every instruction set.
#if defined(REDKNOT_ISA_AVX512)
static inline Vec load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
static inline Vec load(const Float16* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store(BFloat16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
static inline void store(Float16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
static inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps(a, b, c); }
static inline Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps(a, b); }
#elif defined(REDKNOT_ISA_AVX2)
static inline Vec load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
static inline Vec load(const Float16* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store(Float16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
static inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps(a, b, c); }
static inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps(a, b); }
#else
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif

#if !defined(REDKNOT_ISA_AVX512)
template <typename T>
static inline void store_each(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p + i);
}
static inline void store(BFloat16* p, Vec x) { store_each(p, x); }
#endif
#if defined(REDKNOT_ISA_DEFAULT)
template <typename T>
static inline Vec load_each(const T* p) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
}
static inline Vec load(const BFloat16* p) { return load_each(p); }
static inline Vec load(const Float16* p) { return load_each(p); }
static inline void store(Float16* p, Vec x) { store_each(p, x); }
#endif

// The first `count` < kLanes elements, zeros behind them; memory past them is not touched.
template <typename T>
static inline Vec load_partial(const T* p, int64_t count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}
template <typename T>
static inline void store_partial(T* p, Vec x, int64_t count) {
  T buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, count * sizeof(T));
}

// out = in * scale over a row, from one element type to another.
template <typename In, typename Out>
static inline void convert_row(const In* in, int64_t count, float scale, Out* out) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(out + d, load(in + d) * scale);
  if (d < count) store_partial(out + d, load_partial(in + d, count - d) * scale, count - d);
}

// --- across lanes -----------------------------------------------------------------------------

// x with neighbouring segments of `Half` lanes exchanged.
template <int Half, int... Lane>
static inline Vec exchange(Vec x, std::integer_sequence<int, Lane...>) {
  return __builtin_shuffle(x, VecI{(Lane ^ Half)...});
}
template <int Half = kLanes / 2, typename Join>
static inline float reduce(Vec x, Join&& join) {
  if constexpr (Half == 0) {
    return x[0];
  } else {
    const Vec other = exchange<Half>(x, std::make_integer_sequence<int, kLanes>());
    return reduce<Half / 2>(join(x, other), join);
  }
}
static inline float reduce_add(Vec x) {
  return reduce(x, [](Vec a, Vec b) { return a + b; });
}
static inline float reduce_max(Vec x) {
  return reduce(x, [](Vec a, Vec b) { return max(a, b); });
}

// --- exp2 ---------------------------------------------------------------------------------------

// 2^x for x <= 0, relative error below 1.1e-7, exactly 1 at 0, 0 below the normal range and at
// -infinity, NaN at NaN. Least-maximum polynomial of degree 6 for the fraction in [-1/2, 1/2].
static inline Vec exp2_nonpositive(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  const Vec clamped = max(broadcast(-127.0f), x);
  const Vec shifted = clamped + kRound;
  const Vec integer = shifted - kRound;
  const Vec f = clamped - integer;
  Vec p = broadcast(0x1.41d308p-13f);
  p = fma(p, f, broadcast(0x1.5f4562p-10f));
  p = fma(p, f, broadcast(0x1.3b2dbcp-7f));
  p = fma(p, f, broadcast(0x1.c6aed4p-5f));
  p = fma(p, f, broadcast(0x1.ebfbdap-3f));
  p = fma(p, f, broadcast(0x1.62e430p-1f));
  p = fma(p, f, broadcast(1.0f));
#if defined(REDKNOT_ISA_AVX512)
  const Vec scaled = (Vec)_mm512_scalef_ps((__m512)p, (__m512)integer);
#else
  const Vec scaled = x == x ? (Vec)((VecI)p + ((VecI)shifted << 23)) : x;
#endif
  return x < -126.0f ? Vec{} : scaled;
}

}  // namespace redknot::cpu::REDKNOT_ISA
