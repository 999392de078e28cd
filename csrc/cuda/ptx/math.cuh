#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/ptx/simt.cuh"

namespace redknot::gpu::ptx {

// x, of which the compiler forgets where it came from: what is computed from it is computed here,
// and not once before a loop, to be carried through it in registers that the loop needs.
__device__ __forceinline__ int recomputed(int x) {
#ifdef RK_SIMT
  return x;
#else
  asm volatile("" : "+r"(x));
  return x;
#endif
}

// x, which all lanes of a warp have alike, in a register that the warp shares.
__device__ __forceinline__ uint32_t uniform(uint32_t x) {
#ifdef RK_SIMT
  return x;
#else
  return __shfl_sync(0xffffffffu, x, 0);
#endif
}

// 2^x to about 2 ulp; tiny results are 0, and 2^-inf is 0.
__device__ __forceinline__ float exp2(float x) {
#ifdef RK_SIMT
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x to about 1 ulp, for x whose inverse is no denormal.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef RK_SIMT
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// tanh to about 3e-7 of 1. tanh.approx is 5e-4 off, times the cap that would be seen in a score.
__device__ __forceinline__ float tanh(float x) {
  constexpr float kTwoLog2e = 2.88539008f;
  return 1.0f - 2.0f * reciprocal(exp2(x * kTwoLog2e) + 1.0f);
}

// Two elements in one register, `low` in the low half, rounded to nearest.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#ifdef RK_SIMT
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(low).bits | uint32_t{__float2bfloat16_rn(high).bits} << 16;
  } else {
    return __float2half_rn(low).bits | uint32_t{__float2half_rn(high).bits} << 16;
  }
#else
  uint32_t packed;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#endif
}

}  // namespace redknot::gpu::ptx
