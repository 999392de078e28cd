#pragma once

// The query rows of a work item: row m is query head m % group of token m / group.
#include <algorithm>

#include "../dispatch.h"
#include "soft_cap.h"
#include "vec.h"

namespace redknot::cpu::REDKNOT_ISA {

inline constexpr float kLn2 = 0.69314718055994531f;

template <typename T>
class Queries {
 public:
  Queries(const SegPagedAttentionParams& params,
          const RotationTable& rotations,
          const WorkItem& item)
      : params_(params),
        rotations_(rotations),
        item_(item),
        group_(params.group_size()),
        first_head_(item.row % params.num_kv_heads * group_) {}

  int64_t rows() const { return (item_.q_end - item_.q_begin) * group_; }
  int64_t token(int64_t m) const { return item_.q_begin + m / group_; }
  int64_t head(int64_t m) const { return first_head_ + m % group_; }
  int32_t position(int64_t m) const { return params_.q_positions[token(m)]; }
  int32_t first_position() const { return params_.q_positions[item_.q_begin]; }
  int32_t last_position() const { return params_.q_positions[item_.q_end - 1]; }
  int64_t window() const { return params_.row_window[item_.row]; }
  int64_t sink() const { return params_.row_sink[item_.row]; }

  const T* given(int64_t m) const {
    return static_cast<const T*>(params_.q) + token(m) * params_.q_token_stride +
           head(m) * params_.q_head_stride;
  }
  // Row m turned by -offset, times `factor`.
  template <typename Out>
  void read(int64_t m, int32_t offset, Out* out, float factor = 1.0f) const {
    const T* x = given(m);
    const int64_t turned = offset == 0 ? 0 : params_.rotary_dim;
    if (turned > 0) turn_back(offset, x, factor, out);
    convert_row(x + turned, params_.pool.head_dim - turned, factor, out + turned);
  }

  T* out(int64_t m) const {
    return static_cast<T*>(params_.out) + token(m) * params_.out_token_stride +
           head(m) * params_.out_head_stride;
  }
  // max: largest score times log2(e); sum: of 2^(score - max).
  void write_lse(int64_t m, float max, float sum) const {
    if (params_.maybe_lse == nullptr) return;
    params_.maybe_lse[head(m) * params_.num_tokens + token(m)] =
        sum == 0.0f ? -kInf : max * kLn2 + __builtin_logf(sum);
  }

 private:
  template <typename Out>
  void turn_back(int32_t offset, const T* x, float factor, Out* out) const {
    int64_t i = 0;
    while (rotations_.offsets[i] != offset) ++i;
    const int64_t half = params_.rotary_dim / 2;
    const float* cos = rotations_.cos + i * half;
    const float* sin = rotations_.sin + i * half;
    const int64_t step = params_.rope_interleaved ? 2 : 1;
    const int64_t apart = params_.rope_interleaved ? 1 : half;
    int64_t d = 0;
    for (; !params_.rope_interleaved && d + kLanes <= half; d += kLanes) {
      const Vec low = load(x + d);
      const Vec high = load(x + half + d);
      const Vec c = load(cos + d) * factor;
      const Vec s = load(sin + d) * factor;
      store(out + d, fma(low, c, high * s));
      store(out + half + d, fma(high, c, -(low * s)));
    }
    for (; d < half; ++d) {
      const float low = to_float(x[d * step]);
      const float high = to_float(x[d * step + apart]);
      from_float(factor * (low * cos[d] + high * sin[d]), out + d * step);
      from_float(factor * (high * cos[d] - low * sin[d]), out + d * step + apart);
    }
  }

  const SegPagedAttentionParams& params_;
  const RotationTable& rotations_;
  const WorkItem& item_;
  int64_t group_;
  int64_t first_head_;
};

// Where a split leaves its partial result: sums [rows, head_dim], max [rows], denominators [rows].
struct Partial {
  float* sums;
  float* max;
  float* denominators;

  Partial(const SegPagedAttentionParams& params, int64_t index) {
    const int64_t rows = PlanView(params.plan).header->partial_rows;
    const int64_t head_dim = params.pool.head_dim;
    sums = params.maybe_workspace + index * rows * (head_dim + 2);
    max = sums + rows * head_dim;
    denominators = max + rows;
  }
};

}  // namespace redknot::cpu::REDKNOT_ISA
