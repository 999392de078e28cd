#pragma once

#include <cmath>
#include <cstdint>

namespace redknot::cpu {

// cos and sin [half] of offset * inv_freq; the product is fp32, as in the models themselves.
inline void rotation_angles(
    int64_t offset, const float* inv_freq, int64_t half, float* cos, float* sin) {
  for (int64_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(offset) * inv_freq[i];
    cos[i] = std::cos(angle);
    sin[i] = std::sin(angle);
  }
}

}  // namespace redknot::cpu
