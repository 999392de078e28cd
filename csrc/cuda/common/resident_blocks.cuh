#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>

namespace redknot::gpu {

// Blocks of a persistent grid: as many as the current device runs at once, asked for once per
// device and kernel.
template <auto kKernel>
cudaError_t resident_blocks(int threads, size_t smem_bytes, int* blocks) {
  constexpr int kMaxDevices = 64;
  static std::array<std::atomic<int>, kMaxDevices> known;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  *blocks = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (*blocks > 0) return cudaSuccess;

  int num_sms = 0, per_sm = 0;
  status = cudaFuncSetAttribute(
      kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kKernel, threads, smem_bytes);
  }
  if (status != cudaSuccess) return status;
  *blocks = std::max(1, num_sms * per_sm);
  if (device < kMaxDevices) known[device].store(*blocks, std::memory_order_relaxed);
  return cudaSuccess;
}

}  // namespace redknot::gpu
