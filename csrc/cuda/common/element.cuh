#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "redknot/types.h"

namespace redknot::gpu {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T>
struct Element {
  using type = T;
};

// Calls `body` with the Element of the type that `dtype` names.
template <typename Body>
auto with_element(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(Element<__nv_bfloat16>{});
    case DType::kFloat16:
      return body(Element<__half>{});
    case DType::kFloat32:
      break;
  }
  return body(Element<float>{});
}

// kSize elements that one load or store moves.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T element[kSize];
};

}  // namespace redknot::gpu
