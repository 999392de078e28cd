#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/ffn/gather_norm.cuh"

namespace redknot::gpu {

// Five blocks of a row each run on a multiprocessor at least.
template <typename T, int kSize>
cudaError_t launch_gather_norm(const GatherNorm& norm, int32_t num_sms, cudaStream_t stream) {
  const auto blocks = static_cast<uint32_t>(std::min(norm.max_rows, 5 * num_sms));
  constexpr size_t kScratchBytes = kNormThreads / 32 * sizeof(float);
  gather_norm_kernel<T, kSize><<<blocks, kNormThreads, kScratchBytes, stream>>>(norm);
  return cudaGetLastError();
}

}  // namespace redknot::gpu
