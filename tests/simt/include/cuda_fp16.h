#pragma once

#include <cstdint>
#include <cstring>

#include "simt.hpp"

struct alignas(2) __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof(value));
  return static_cast<float>(value);
}

inline __half __float2half_rn(float value) {
  const auto narrow = static_cast<_Float16>(value);
  __half x;
  std::memcpy(&x, &narrow, sizeof(x));
  return x;
}
