#pragma once

// The two small GEMMs of a panel of query rows. Scores and output are kept transposed, query rows
// on the lanes: keys are then read by broadcast straight from their pages, nothing is repacked, and
// the softmax needs no reduction across lanes. A block is kBlockRows broadcasts times `Width`
// vectors: with the operands it fills the register file.
#include "mac.h"

namespace redknot::cpu::REDKNOT_ISA {

inline constexpr int kBlockRows = 6;
#if defined(REDKNOT_ISA_AVX512)
inline constexpr int kMaxWidth = 4;  // 24 sums, 4 operands, 1 broadcast of 32 registers
#else
inline constexpr int kMaxWidth = 2;  // 12 sums, 2 operands, 1 broadcast of 16 registers
#endif

// scores[r] = scale * sum_i keys[r][i] * queries[i], words i < depth;
// queries [depth, Width], scores [Rows, Width] in vectors.
template <typename Mac, int Rows, int Width>
static inline void score_block(
    const char* const* keys, const float* queries, int64_t depth, float scale, float* scores) {
  Vec sums[Rows][Width] = {};
  for (int64_t i = 0; i < depth; ++i) {
    Vec q[Width];
#pragma GCC unroll 4
    for (int c = 0; c < Width; ++c) q[c] = load(queries + (i * Width + c) * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const Vec k = broadcast_word(keys[r] + 4 * i);
#pragma GCC unroll 4
      for (int c = 0; c < Width; ++c) sums[r][c] = Mac::mac(k, q[c], sums[r][c]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Width; ++c) store(scores + (r * Width + c) * kLanes, sums[r][c] * scale);
  }
}

// out[r] = out[r] * rescale + sum_i values[i][r] * weights[i], words i < depth;
// weights [depth, Width], out [Rows, Width] in vectors, `values` [depth] rows of words.
template <typename Mac, int Rows, int Width>
static inline void value_block(const char* const* values,
                               int64_t first_byte,
                               const float* weights,
                               int64_t depth,
                               const Vec* rescale,
                               float* out) {
  Vec sums[Rows][Width];
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Width; ++c) {
      sums[r][c] = load(out + (r * Width + c) * kLanes) * rescale[c];
    }
  }
  for (int64_t i = 0; i < depth; ++i) {
    const char* value = values[i] + first_byte;
    Vec w[Width];
#pragma GCC unroll 4
    for (int c = 0; c < Width; ++c) w[c] = load(weights + (i * Width + c) * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const Vec v = broadcast_word(value + 4 * r);
#pragma GCC unroll 4
      for (int c = 0; c < Width; ++c) sums[r][c] = Mac::mac(v, w[c], sums[r][c]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Width; ++c) store(out + (r * Width + c) * kLanes, sums[r][c]);
  }
}

// Calls block(first row, its number of rows as a compile-time constant) until `rows` are covered.
// Too few sums wait for each other: the last eight rows are four and four, not six and two.
template <typename Block>
static inline void for_each_block(int64_t rows, Block&& block) {
  int64_t r = 0;
  for (; r + kBlockRows <= rows && rows - r != 8; r += kBlockRows) {
    block(r, std::integral_constant<int, kBlockRows>());
  }
  switch (rows - r) {
    case 8:
      block(r, std::integral_constant<int, 4>());
      return block(r + 4, std::integral_constant<int, 4>());
    case 5:
      return block(r, std::integral_constant<int, 5>());
    case 4:
      return block(r, std::integral_constant<int, 4>());
    case 3:
      return block(r, std::integral_constant<int, 3>());
    case 2:
      return block(r, std::integral_constant<int, 2>());
    case 1:
      return block(r, std::integral_constant<int, 1>());
    default:
      return;
  }
}

}  // namespace redknot::cpu::REDKNOT_ISA
