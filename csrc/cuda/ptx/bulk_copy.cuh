#pragma once

#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/tensor_map.h"

// Copies by the copy engine (TMA, sm_90), from global to shared memory. One thread issues them;
// their bytes count towards the phase of `barrier` (arrive_expecting). A box is stored row by row
// of 128 bytes, whose 16-byte vectors are exchanged by the address: vector v of the row at address
// a goes to v ^ (a / 128) % 8. What lies outside the tensor becomes zeros, and its bytes count too.
// `smem` is a multiple of 128 bytes.
namespace redknot::gpu::ptx {

// `bytes`, a multiple of 16, as they are; both addresses are multiples of 16.
__device__ __forceinline__ void bulk_load(void* smem,
                                          const void* source,
                                          uint32_t bytes,
                                          uint64_t* barrier RK_WHERE) {
#ifdef RK_SIMT
  ::simt::bulk_load(smem, source, bytes, barrier, where);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(shared_address(smem)),
      "l"(source),
      "r"(bytes),
      "r"(shared_address(barrier))
      : "memory");
#endif
}

// Box whose first element is (x, y).
__device__ __forceinline__ void load_box(
    void* smem, const TensorMap& map, uint64_t* barrier, int32_t x, int32_t y RK_WHERE) {
#ifdef RK_SIMT
  ::simt::load_box(smem, map, barrier, {x, y, 0, 0}, 2, where);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(shared_address(smem)),
      "l"(&map),
      "r"(shared_address(barrier)),
      "r"(x),
      "r"(y)
      : "memory");
#endif
}
__device__ __forceinline__ void load_box(
    void* smem, const TensorMap& map, uint64_t* barrier, int32_t x, int32_t y, int32_t z RK_WHERE) {
#ifdef RK_SIMT
  ::simt::load_box(smem, map, barrier, {x, y, z, 0}, 3, where);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(shared_address(smem)),
      "l"(&map),
      "r"(shared_address(barrier)),
      "r"(x),
      "r"(y),
      "r"(z)
      : "memory");
#endif
}
__device__ __forceinline__ void load_box(void* smem,
                                         const TensorMap& map,
                                         uint64_t* barrier,
                                         int32_t x,
                                         int32_t y,
                                         int32_t z,
                                         int32_t w RK_WHERE) {
#ifdef RK_SIMT
  ::simt::load_box(smem, map, barrier, {x, y, z, w}, 4, where);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(shared_address(smem)),
      "l"(&map),
      "r"(shared_address(barrier)),
      "r"(x),
      "r"(y),
      "r"(z),
      "r"(w)
      : "memory");
#endif
}

// Brings a map, which lies in the kernel's parameters, near the engine.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
#ifdef RK_SIMT
  static_cast<void>(map);
#else
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
#endif
}

}  // namespace redknot::gpu::ptx
