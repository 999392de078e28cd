#pragma once

#include <cstdint>

#include "cuda/ptx/simt.cuh"

namespace redknot::gpu {

// Sines and cosines of offset * inv_freq[i]. Angles are rounded to fp32, as everywhere, and then
// taken exactly: whole turns go in fp64, which is right for any position, and sincospif has no slow
// path for large arguments, whose registers and local memory sincosf costs every caller.
template <int kSize>
struct Angles {
  float sine[kSize];
  float cosine[kSize];

  __device__ Angles(const float* inv_freq, int32_t offset) {
    constexpr double kTurnsPerRadian = 0.15915494309189535;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float angle = static_cast<float>(offset) * inv_freq[i];
      const double turns = angle * kTurnsPerRadian;
      sincospif(2.0f * static_cast<float>(turns - rint(turns)), &sine[i], &cosine[i]);
    }
  }
};

}  // namespace redknot::gpu
