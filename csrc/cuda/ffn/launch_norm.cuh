#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/ffn/gather_norm.cuh"

namespace redknot::gpu {

// Eight blocks of a row each fill a multiprocessor.
template <typename T, int kSize>
cudaError_t launch_gather_norm(const GatherNorm& norm, int32_t num_sms, cudaStream_t stream) {
  const auto blocks = static_cast<uint32_t>(std::min(norm.max_rows, 8 * num_sms));
  constexpr size_t kScratchBytes = kNormThreads / 32 * sizeof(float);
  gather_norm_kernel<T, kSize><<<blocks, kNormThreads, kScratchBytes, stream>>>(norm);
  return cudaGetLastError();
}

}  // namespace redknot::gpu
