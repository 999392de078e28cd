// out = x w^T for a few rows of x. Every weight is read once, in the order it lies in memory; x is
// small and stays in the cache. A block is kColumns weight rows by up to kMaxRows rows of x, each
// pair with an accumulator of its own; the lanes of an accumulator are summed at the end.
#include "few_rows.h"

#include "../scratch.h"
#include "mac.h"
#if defined(REDKNOT_ISA_AMX)
#include "amx.h"
#endif

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
void block(const LinearParams& params,
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
void columns(const LinearParams& params,
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
const typename Operands<T>::X* operand(const LinearParams& params) {
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

#if defined(REDKNOT_ISA_AMX)
// On tiles the weights are the left factor, since 16 of their rows by 32 columns are a tile as they
// lie: out^T = w x^T. x^T is packed into tiles once per call and thread: for each 32 columns and 16
// rows of x, word [i][r] = the pair (x[r][2 i], x[r][2 i + 1]).
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 32;
constexpr int64_t kMinTileRows = 5;  // fewer are as fast on vectors, without the packing
constexpr int64_t kAheadBytes = 1024;

void pack_inputs(const LinearParams& params, int64_t row_tiles, char* packed) {
  const auto* x = static_cast<const BFloat16*>(params.x);
  const auto lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const auto offset =
      _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(params.in_dim) * 2));
  for (int64_t k = 0; k < params.in_dim; k += kTileColumns) {
    for (int64_t tile = 0; tile < row_tiles; ++tile) {
      const int64_t left = params.num_rows - tile * kTileRows;
      const auto rows = static_cast<__mmask16>(left >= kTileRows ? 0xffff : (1 << left) - 1);
      const BFloat16* from = x + tile * kTileRows * params.in_dim + k;
      for (int64_t pair = 0; pair < kTileColumns / 2; ++pair, packed += 64) {
        const __m512i words =
            _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), rows, offset, from + 2 * pair, 1);
        _mm512_storeu_si512(packed, words);
      }
    }
  }
}

// 16 columns of the output for all rows of x; Tiles of 16 rows.
template <int Tiles>
void tile_block(const LinearParams& params, const char* packed, int64_t column) {
  const auto* w = static_cast<const char*>(params.w) + column * params.w_stride * 2;
  const int64_t stride = params.w_stride * 2;
  tile_zero<0>();
  if constexpr (Tiles > 1) tile_zero<1>();
  if constexpr (Tiles > 2) tile_zero<2>();
  if constexpr (Tiles > 3) tile_zero<3>();
  for (int64_t k = 0; k < params.in_dim; k += kTileColumns, packed += Tiles * kTileBytes) {
    for (int64_t row = 0; row < kTileRows; ++row) {
      __builtin_prefetch(w + row * stride + k * 2 + kAheadBytes);
    }
    tile_load<4>(w + k * 2, stride);
    tile_load<5>(packed, 64);
    tile_mac<0, 4, 5>();
    if constexpr (Tiles > 1) {
      tile_load<6>(packed + kTileBytes, 64);
      tile_mac<1, 4, 6>();
    }
    if constexpr (Tiles > 2) {
      tile_load<7>(packed + 2 * kTileBytes, 64);
      tile_mac<2, 4, 7>();
    }
    if constexpr (Tiles > 3) {
      tile_load<5>(packed + 3 * kTileBytes, 64);
      tile_mac<3, 4, 5>();
    }
  }
  alignas(64) float sums[Tiles][kTileRows][kTileRows];  // [tile][column][row]
  tile_store<0>(sums[0], 64);
  if constexpr (Tiles > 1) tile_store<1>(sums[1], 64);
  if constexpr (Tiles > 2) tile_store<2>(sums[2], 64);
  if constexpr (Tiles > 3) tile_store<3>(sums[3], 64);
  auto* out = static_cast<BFloat16*>(params.out) + column;
  for (int64_t row = 0; row < params.num_rows; ++row, out += params.out_stride) {
    const auto& tile = sums[row / kTileRows];
    for (int64_t c = 0; c < kTileRows; ++c) from_float(tile[c][row % kTileRows], out + c);
  }
}

void tiled(const LinearParams& params, int64_t begin, int64_t end) {
  const int64_t row_tiles = (params.num_rows + kTileRows - 1) / kTileRows;
  auto* packed =
      static_cast<char*>(thread_scratch(params.in_dim / kTileColumns * row_tiles * kTileBytes));
  pack_inputs(params, row_tiles, packed);
  const AmxTiles tiles;
  const auto run = row_tiles == 1   ? tile_block<1>
                   : row_tiles == 2 ? tile_block<2>
                   : row_tiles == 3 ? tile_block<3>
                                    : tile_block<4>;
  for (int64_t column = begin; column < end; ++column) run(params, packed, column * kTileRows);
}
#endif

}  // namespace

bool takes_few_rows(const LinearParams& params) {
  return params.maybe_up == nullptr && params.num_rows >= 1 && params.num_rows <= kLimit &&
         params.out_dim % kBlockColumns == 0 &&
         params.in_dim % 32 == 0;  // a whole number of vectors or tiles on every instruction set
}

void few_row_linear(const LinearParams& params, int64_t begin, int64_t end) {
#if defined(REDKNOT_ISA_AMX)
  if (params.dtype == DType::kBFloat16 && params.num_rows >= kMinTileRows) {
    return tiled(params, begin, end);
  }
#endif
  const int64_t passes = (params.num_rows + kMaxRows - 1) / kMaxRows;
  const int64_t rows_per_pass = (params.num_rows + passes - 1) / passes;
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* x = operand<T>(params);
    for (int64_t column = begin * kBlockColumns; column < end * kBlockColumns; column += kColumns) {
      // The weights of these columns come from memory for the first rows, from the cache after.
      for (int64_t row = 0; row < params.num_rows; row += rows_per_pass) {
        const int64_t left = params.num_rows - row;
        columns<T>(params, x, row, left < rows_per_pass ? left : rows_per_pass, column);
      }
    }
  });
}

}  // namespace redknot::cpu::REDKNOT_ISA
