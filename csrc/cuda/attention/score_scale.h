#pragma once

#include "redknot/attention.h"

namespace redknot::gpu {

// What makes scores of products q . k, in units of log2: log2 * q . k, or with a soft cap
// log2 * tanh(inside_tanh * q . k). Made on the host, so that kernels read it where they need it.
struct ScoreScale {
  float inside_tanh;  // 0: no soft cap
  float log2;

  explicit ScoreScale(const SegPagedAttentionParams& params)
      : inside_tanh(params.softcap > 0.0f ? params.softmax_scale / params.softcap : 0.0f),
        log2((params.softcap > 0.0f ? params.softcap : params.softmax_scale) *
             1.4426950408889634f) {}
};

}  // namespace redknot::gpu
