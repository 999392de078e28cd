#pragma once

#include <cstdint>

#include "cuda/ptx/simt.cuh"

// Barriers of a part of a block, and how its warps share the registers (sm_90).
namespace redknot::gpu::ptx {

// An address in the window of shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* smem) {
#ifdef RK_SIMT
  return ::simt::shared_address(smem);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
#endif
}

// --- mbarrier -----------------------------------------------------------------------------------
// A barrier object of 8 bytes in shared memory. A phase is over when as many threads arrived as
// init_barrier said, and as many bytes as they announced; the next one begins at once. Phases are
// numbered from 0, their parity is the lowest bit.

// By one thread, before fence_barrier_init() and a block barrier.
__device__ __forceinline__ void init_barrier(uint64_t* barrier, uint32_t arrivals RK_WHERE) {
#ifdef RK_SIMT
  ::simt::init_barrier(barrier, arrivals, where);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
#ifndef RK_SIMT
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
}

// What this thread did before is seen by those who wait for the phase.
__device__ __forceinline__ void arrive(uint64_t* barrier RK_WHERE) {
#ifdef RK_SIMT
  ::simt::arrive(barrier, 0, where);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

// The same, and the phase also waits for so many bytes of copies that name this barrier.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, uint32_t bytes RK_WHERE) {
#ifdef RK_SIMT
  ::simt::arrive(barrier, bytes, where);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Until the phase of this parity is over. At the beginning the phase before the first, of parity 1,
// counts as over.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity RK_WHERE) {
#ifdef RK_SIMT
  ::simt::wait_barrier(barrier, parity, where);
#else
  asm volatile(
      "{\n"
      ".reg .pred is_over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 is_over, [%0], %1;\n"
      "@!is_over bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// --- named barriers -----------------------------------------------------------------------------
// Number 0 is __syncthreads, 1 to 15 are free. `threads`, a multiple of 32, counts those who arrive
// and those who wait.
__device__ __forceinline__ void sync_named(int number, int threads RK_WHERE) {
#ifdef RK_SIMT
  ::simt::named_barrier(number, threads, true, where);
#else
  asm volatile("barrier.cta.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
#endif
}
__device__ __forceinline__ void arrive_named(int number, int threads RK_WHERE) {
#ifdef RK_SIMT
  ::simt::named_barrier(number, threads, false, where);
#else
  asm volatile("barrier.cta.arrive %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
#endif
}

// --- the two proxies ----------------------------------------------------------------------------
// What this thread wrote to shared memory is seen by wgmma and the copy engine: after the writes,
// before the barrier that the reader waits for.
__device__ __forceinline__ void fence_async_proxy() {
#ifdef RK_SIMT
  ::simt::fence_async_proxy();
#else
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// --- registers ----------------------------------------------------------------------------------
// All warps of a warpgroup, once, at the head of their branch; a multiple of 8 from 24 to 256. The
// compiler honours it only in kernels with __launch_bounds__(threads, 1).
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#ifndef RK_SIMT
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#ifndef RK_SIMT
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

}  // namespace redknot::gpu::ptx
