#pragma once

#include <cstdint>

#include "cuda/common/host_device.h"

namespace redknot::gpu {

struct Quotient {
  int64_t quotient;
  int64_t remainder;
};

// n >= 0, divisor > 0. A 64-bit division is a subroutine of some hundred instructions on a GPU; the
// 32-bit one is a few, and row and slot numbers nearly always fit it.
RK_HOST_DEVICE inline Quotient divide(int64_t n, int64_t divisor) {
  if (((n | divisor) >> 32) == 0) {
    const auto n32 = static_cast<uint32_t>(n);
    const auto divisor32 = static_cast<uint32_t>(divisor);
    const uint32_t quotient = n32 / divisor32;
    return {quotient, n32 - quotient * divisor32};
  }
  const int64_t quotient = n / divisor;
  return {quotient, n - quotient * divisor};
}

}  // namespace redknot::gpu
