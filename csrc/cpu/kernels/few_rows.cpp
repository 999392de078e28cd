// out = x w^T for a few rows of x. Every weight is read once, in the order it lies in memory; x is
// small and stays in the cache. A block is kColumns weight rows by up to kMaxRows rows of x, each
// pair with an accumulator of its own; the lanes of an accumulator are summed at the end.
#include "few_rows.h"

#include "../scratch.h"
#include "mac.h"

namespace redknot::cpu::REDKNOT_ISA {
namespace {

constexpr int64_t kBlockColumns = 16;  // what a call's range counts
constexpr int kColumns = 4;
constexpr int64_t kLimit = 64;

// How a vector of weights meets one of x: as pairs of bf16 where the machine multiplies them, else
// in fp32, with x converted beforehand.
template <typename T, typename Mac = typename MacOf<T>::Type>
struct Operands {
  using X = float;
  static constexpr int64_t kStep = kLanes;
  static Vec weights(const T* w) { return load(w); }
  static Vec inputs(const X* x) { return load(x); }
};
#if defined(REDKNOT_ISA_AVX512)
constexpr int kMaxRows = 6;  // 24 accumulators, 4 weights, 1 input of 32 registers
template <>
struct Operands<BFloat16, Bf16Mac> {
  using X = BFloat16;
  static constexpr int64_t kStep = 2 * kLanes;
  static Vec weights(const BFloat16* w) { return load(reinterpret_cast<const float*>(w)); }
  static Vec inputs(const X* x) { return load(reinterpret_cast<const float*>(x)); }
};
#else
constexpr int kMaxRows = 2;  // 8 accumulators, 4 weights, 1 input of 16 registers
#endif

inline float sum_of_lanes(Vec x) {
#if defined(REDKNOT_ISA_AVX512)
  return _mm512_reduce_add_ps((__m512)x);
#else
  return reduce_add(x);
#endif
}

template <typename T, int Rows>
void block(const FewRowLinearParams& params,
           const typename Operands<T>::X* x,
           int64_t first_row,
           int64_t column) {
  using Ops = Operands<T>;
  using Mac = typename MacOf<T>::Type;
  const T* w = static_cast<const T*>(params.w) + column * params.w_stride;
  x += first_row * params.in_dim;
  Vec sums[kColumns][Rows] = {};
  for (int64_t k = 0; k < params.in_dim; k += Ops::kStep) {
    Vec weights[kColumns];
    for (int c = 0; c < kColumns; ++c) weights[c] = Ops::weights(w + c * params.w_stride + k);
    for (int r = 0; r < Rows; ++r) {
      const Vec input = Ops::inputs(x + r * params.in_dim + k);
      for (int c = 0; c < kColumns; ++c) sums[c][r] = Mac::mac(weights[c], input, sums[c][r]);
    }
  }
  T* out = static_cast<T*>(params.out) + first_row * params.out_stride + column;
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      from_float(sum_of_lanes(sums[c][r]), out + r * params.out_stride + c);
    }
  }
}

template <typename T>
void columns(const FewRowLinearParams& params,
             const typename Operands<T>::X* x,
             int64_t first_row,
             int64_t rows,
             int64_t column) {
  switch (rows) {
#if defined(REDKNOT_ISA_AVX512)
    case 6:
      return block<T, 6>(params, x, first_row, column);
    case 5:
      return block<T, 5>(params, x, first_row, column);
    case 4:
      return block<T, 4>(params, x, first_row, column);
    case 3:
      return block<T, 3>(params, x, first_row, column);
#endif
    case 2:
      return block<T, 2>(params, x, first_row, column);
    default:
      return block<T, 1>(params, x, first_row, column);
  }
}

// x in the type that it is multiplied in: itself, or an fp32 copy of this thread's.
template <typename T>
const typename Operands<T>::X* operand(const FewRowLinearParams& params) {
  using X = typename Operands<T>::X;
  if constexpr (sizeof(X) == sizeof(T)) {
    return static_cast<const X*>(params.x);
  } else {
    const int64_t count = params.num_rows * params.in_dim;
    auto* copy = static_cast<X*>(thread_scratch(count * static_cast<int64_t>(sizeof(X))));
    convert_row(static_cast<const T*>(params.x), count, 1.0f, copy);
    return copy;
  }
}

}  // namespace

bool takes_few_rows(const FewRowLinearParams& params) {
  return params.num_rows <= kLimit && params.out_dim % kBlockColumns == 0 &&
         params.in_dim % (2 * kLanes) == 0;
}

void few_row_linear(const FewRowLinearParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* x = operand<T>(params);
    for (int64_t column = begin * kBlockColumns; column < end * kBlockColumns; column += kColumns) {
      // The weights of these columns come from memory for the first rows, from the cache after.
      for (int64_t row = 0; row < params.num_rows; row += kMaxRows) {
        const int64_t rows = params.num_rows - row < kMaxRows ? params.num_rows - row : kMaxRows;
        columns<T>(params, x, row, rows, column);
      }
    }
  });
}

}  // namespace redknot::cpu::REDKNOT_ISA
