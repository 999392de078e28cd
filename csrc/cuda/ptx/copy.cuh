#pragma once

#include <cstdint>

#include "cuda/ptx/simt.cuh"

// Copies from global to shared memory that run beside the thread (cp.async, sm_80).
namespace redknot::gpu::ptx {

// 16 bytes past L1, which would only be polluted; zeros instead where `valid` is false, and nothing
// is read then. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async_16(void* smem, const void* source, bool valid RK_WHERE) {
#ifdef RK_SIMT
  ::simt::copy_async(smem, source, 16, valid ? 16 : 0, where);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(smem))),
               "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Closes the group of copies issued so far.
__device__ __forceinline__ void copy_commit() {
#ifdef RK_SIMT
  ::simt::copy_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits for this thread's copies but those of the newest kPending groups. Other threads see them
// behind a barrier.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
#ifdef RK_SIMT
  ::simt::copy_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

}  // namespace redknot::gpu::ptx
